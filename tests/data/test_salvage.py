"""Damaged files: what is good is kept, what is not is named, and no wrong picture is taken."""

import json

import numpy as np
import pytest
from test_exact import sequential
from videos import pictures, remux, write

from vito_fast.data.pack.pack import pack
from vito_fast.data.store.media import BadVideo, Source
from vito_fast.data.store.picture import rgb
from vito_fast.data.store.store import Store, frames
from vito_fast.errors import UserError

QUIET = {"progress": False, "processes": 1, "min_length": 0, "shot_cuts": False}


def quarantine(store):
    return {
        entry.pop("file"): entry for entry in map(json.loads, (store / "quarantine.jsonl").read_text().splitlines())
    }


def packed(path, store, **options):
    """All frames of a copy store, in order, and the report."""
    report = pack(path, store, format="copy", **QUIET, **options)
    opened = Store(store)
    shown = [frames(opened, clip, range(opened.index.clip(clip).num_frames)) for clip in range(len(opened))]
    return [picture for clip in shown for picture in clip], report


def test_segments_end_to_end(tmp_path):
    """MPEG-TS files in a row, whose counters and times begin again: every frame, in order."""
    parts = [write(tmp_path / f"{n}.ts", pictures(70, seed=n), b_frames=2) for n in range(3)]
    truth = [picture for part in parts for picture in sequential(part)[1]]
    path = tmp_path / "all.ts"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    with pytest.raises(UserError, match="damaged or cut short"):
        pack(path, tmp_path / "strict", format="copy", strict=True, **QUIET)
    shown, report = packed(path, tmp_path / "s")
    np.testing.assert_array_equal(shown, truth)
    index = Store(tmp_path / "s").index
    times = np.concatenate([index.times(clip) for clip in range(len(index))])
    assert (np.diff(times) > 0).all()
    assert times[-1] - times[0] == pytest.approx(209 / 25, abs=0.2)
    assert (report.packed, report.salvaged, report.lost_frames) == (1, 0, 0)


@pytest.mark.parametrize(("suffix", "codec"), [("avi", "mpeg4"), ("mp4", "libx264"), ("mkv", "libx264")])
def test_a_file_that_is_cut_short(suffix, codec, tmp_path):
    options = {"movflags": "faststart"} if suffix == "mp4" else {}
    path = write(tmp_path / f"a.{suffix}", pictures(60, 96, 128), codec, gop=20, container=options)
    truth = sequential(path)[1]
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * 0.7)])
    shown, report = packed(path, tmp_path / "s")
    assert 20 <= len(shown) < 55
    np.testing.assert_array_equal(shown, truth[: len(shown)])
    assert pack(path, tmp_path / "jpeg", **QUIET).frames == len(shown)
    if suffix != "mkv":  # Matroska may end anywhere
        assert report.salvaged == 1
        assert quarantine(tmp_path / "s")[path.name]["state"] == "salvaged"
        with pytest.raises(UserError, match="no usable video"):
            pack(path, tmp_path / "strict", format="copy", strict=True, **QUIET)


@pytest.mark.parametrize("b_frames", [0, 3])
@pytest.mark.parametrize("codec", ["libx264", "libx265", "mpeg4", "libvpx-vp9"])
def test_damage_in_the_middle(codec, b_frames, tmp_path):
    """Each frame that is taken is the right one, and those after the next key are taken."""
    options = {"libx264": {"preset": "veryfast"}}.get(codec, {})
    whole = write(tmp_path / "whole.mkv", pictures(90, seed=1), codec, gop=15, b_frames=b_frames, options=options)
    truth = sequential(whole)[1]

    def spoil(packets):
        for number in (40, 41):
            payload = bytes(byte ^ 0x5A for byte in bytes(packets[number])[:40]) + bytes(packets[number])[40:]
            packets[number].update(payload)
        return packets

    path = remux(whole, tmp_path / "a.mkv", spoil)
    with pytest.raises(UserError, match="no usable video"):
        pack(path, tmp_path / "strict", format="copy", strict=True, **QUIET)
    shown, report = packed(path, tmp_path / "s", keep_still=True)
    places = [next((n for n, other in enumerate(truth) if np.array_equal(picture, other)), None) for picture in shown]
    assert None not in places
    assert places == sorted(set(places))
    assert len(shown) == 90 - report.lost_frames
    assert set(range(30)) | set(range(75, 90)) <= set(places)
    assert pack(path, tmp_path / "jpeg", keep_still=True, **QUIET).frames == len(shown)


def test_a_change_of_size_begins_a_clip(tmp_path):
    parts = [write(tmp_path / f"{n}.ts", pictures(30, *size, seed=n)) for n, size in enumerate([(48, 64), (64, 96)])]
    path = tmp_path / "all.ts"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    for format in ("copy", "jpeg", "h264"):
        pack(path, tmp_path / format, format=format, **QUIET)
        store = Store(tmp_path / format)
        sizes = [(store.index.clip(clip).height, store.index.clip(clip).width) for clip in range(len(store))]
        assert sizes == [(48, 64), (64, 96)]
        for clip, part in enumerate(parts):
            truth = np.stack(sequential(part)[1]).astype(int)
            assert np.abs(frames(store, clip, range(30)) - truth).mean() < (1e-9 if format == "copy" else 8)


def test_only_salvage_passes_over_damage(tmp_path):
    path = write(tmp_path / "a.avi", pictures(60, 96, 128), "mpeg4", gop=20)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * 0.7)])
    with pytest.raises(BadVideo):
        list(Source(path).frames())
    source = Source(path, salvage=True)
    assert 20 < len([rgb(frame) for _, frame in source.frames()]) < 60
    assert source.damage
