"""Stores that grow, join and shrink hold the clips that packing at once gives."""

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
from test_pack import contents

from vito_fast.cli.main import main
from vito_fast.config import ClipFilter
from vito_fast.data.pack import edit
from vito_fast.data.pack.edit import append, merge, subset
from vito_fast.data.pack.pack import pack
from vito_fast.data.store.inspect import inspect_store
from vito_fast.data.store.store import Store, frames
from vito_fast.errors import UserError

FORMATS = ("jpeg", "h264", "copy")


def options(format):
    return {"format": format, "short_side": 32, "clip_length": 1.6, "progress": False, "processes": 1}


@pytest.fixture(scope="module")
def halves(folder, tmp_path_factory):
    """The videos in two folders."""
    root = tmp_path_factory.mktemp("halves")
    for number, names in enumerate((["v0.mp4", "v3.mp4", "sub/long.mkv"], ["v1.mp4", "v2.mp4", "v4.mp4"])):
        for name in names:
            (root / str(number) / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / name, root / str(number) / name)
    return root


def whole(store):
    """No clip is damaged, and each decodes."""
    assert not inspect_store(store, progress=False).damaged
    opened = Store(store)
    for clip in range(len(opened)):
        frames(opened, clip, [0, opened.index.clip(clip).num_frames - 1])
    return contents(store)


@pytest.mark.parametrize("format", FORMATS)
def test_merged_and_appended_are_as_packed_at_once(format, halves, stores, folder, tmp_path):
    for half in "01":
        pack(halves / half, tmp_path / half, **options(format))
    report = merge(tmp_path / "merged", [tmp_path / "1", tmp_path / "0"])
    assert whole(tmp_path / "merged") == contents(stores / format)
    packed = Store(stores / format).report
    for name in ("clips", "videos", "frames", "short_shots", "frame_rates", "packed", "found"):
        assert getattr(report, name) == getattr(packed, name), name
    assert report.hours == pytest.approx(packed.hours)
    with pytest.raises(UserError, match="no new video"):
        append(halves / "0", tmp_path / "0", progress=False)
    shards = {path.name: path.read_bytes() for path in (tmp_path / "0").glob("shard-*")}
    (tmp_path / "0" / "shard-00007.bin").write_bytes(b"of an append that was killed")
    report = append(folder, tmp_path / "0", processes=1, progress=False)
    assert whole(tmp_path / "0") == contents(stores / format)
    assert report == Store(tmp_path / "0").report
    assert all((tmp_path / "0" / name).read_bytes() == content for name, content in shards.items())
    assert not (tmp_path / "0" / ".append").exists()


def test_an_append_that_is_killed_last_leaves_nothing(halves, tmp_path, monkeypatch):
    pack(halves / "0", tmp_path / "s", **options("jpeg"))

    def killed(path, **options):
        if path.name == ".append":
            raise KeyboardInterrupt
        rmtree(path, **options)

    rmtree = shutil.rmtree
    monkeypatch.setattr(edit.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        append(halves / "1", tmp_path / "s", processes=1, progress=False)
    monkeypatch.undo()
    assert (tmp_path / "s" / ".append").exists()
    expected = contents(tmp_path / "s")
    with pytest.raises(UserError, match="no new video"):
        append(halves / "1", tmp_path / "s", processes=1, progress=False)
    assert not (tmp_path / "s" / ".append").exists()
    assert contents(tmp_path / "s") == expected


def test_what_several_stores_have_is_taken_once(stores, tmp_path):
    copy = Path(shutil.copytree(stores / "jpeg", tmp_path / "copy"))
    report = merge(tmp_path / "s", [stores / "jpeg", copy])
    assert whole(tmp_path / "s") == contents(stores / "jpeg")
    assert report.clips == len(Store(stores / "jpeg"))


@pytest.mark.parametrize("format", FORMATS)
def test_a_subset_holds_the_wanted_clips_alone(format, stores, tmp_path):
    report = subset(stores / format, tmp_path / "s", where=ClipFilter(sources=("v*.mp4",), min_seconds=1.0))
    every = contents(stores / format)
    wanted = [clip for clip in every if clip[0].startswith("v")]
    assert [clip[:1] + clip[2:] for clip in whole(tmp_path / "s")] == [clip[:1] + clip[2:] for clip in wanted]
    assert report.clips == report.videos == report.packed == report.found == 5
    assert report.bytes < Store(stores / format).report.bytes
    subset(stores / format, tmp_path / "t", clips=[2, 0])
    assert [clip[0] for clip in whole(tmp_path / "t")] == [every[0][0], every[2][0]]
    got, source = Store(tmp_path / "t"), Store(stores / format)
    for mine, theirs in ((0, 0), (1, 2)):
        np.testing.assert_array_equal(frames(got, mine, [3, 9]), frames(source, theirs, [3, 9]))


def test_what_cannot_be_done_leaves_nothing_behind(stores, tmp_path):
    with pytest.raises(UserError, match="at least two stores, got 1"):
        merge(tmp_path / "s", [stores / "jpeg"])
    with pytest.raises(UserError, match=r"h264 has format=h264, .*jpeg has jpeg"):
        merge(tmp_path / "s", [stores / "jpeg", stores / "h264"])
    with pytest.raises(UserError, match=r"no clip of .* is left"):
        subset(stores / "jpeg", tmp_path / "s", where=ClipFilter(min_side=1000))
    with pytest.raises(IndexError):
        subset(stores / "jpeg", tmp_path / "s", clips=[99])
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "s").mkdir()
    with pytest.raises(UserError, match="exists: choose a new folder"):
        subset(stores / "jpeg", tmp_path / "s")


def test_the_commands(stores, tmp_path, capsys):
    (tmp_path / "numbers").write_text("0\n3\n")
    store, out = str(stores / "jpeg"), str(tmp_path / "s")
    assert main(["store", "subset", store, out, "--clips", str(tmp_path / "numbers")]) == 0
    assert main(["store", "merge", str(tmp_path / "m"), store, out]) == 0
    assert contents(tmp_path / "m") == contents(stores / "jpeg")
    assert main(["store", "stats", store, "--table", str(tmp_path / "t.csv")]) == 0
    rows = list(csv.DictReader((tmp_path / "t.csv").open()))
    assert sum(int(row["clips"]) for row in rows) == len(Store(stores / "jpeg"))
    assert {row["rate"] for row in rows} == {"25.0"}
    assert main(["store", "burn", store]) == 2
    assert "unknown command 'store burn': choose append, merge, subset, export, stats" in capsys.readouterr().err
