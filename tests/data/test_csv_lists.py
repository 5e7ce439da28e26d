"""Clip lists in files: seconds, labels by name or number, groups, and rows that cannot be packed."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_loader import loader
from videos import pictures, write_three

from vito_fast.cli.main import main
from vito_fast.data.loader.loader import ClipLoader
from vito_fast.data.pack.clip_list import read_clip_list
from vito_fast.data.pack.clips import Span, TimeSpan
from vito_fast.data.pack.edit import append, merge, subset
from vito_fast.data.pack.pack import pack
from vito_fast.data.store.inspect import inspect_store
from vito_fast.data.store.store import Store, frames
from vito_fast.errors import UserError

QUIET = {"progress": False, "processes": 1, "short_side": 48}
LIST = """\
path,start,end,label,id,group,note
a.mp4,0.4,0.8,dog,first,g,x
a.mp4,0,0.6,cat,overlaps,,
b.mp4,,,dog,whole,,
c.mkv,0.2,0.36,ant,variable,g,
c.mkv,1.2,,cat,rest,,
a.mp4,2,3,cat,beyond,,
gone.mp4,0,1,cat,gone,,
../a.mp4,,,cat,outside,,
"""


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    return write_three(tmp_path_factory.mktemp("videos"))


def listed(path, text):
    path.write_text(text)
    return path


@pytest.mark.parametrize("format", ["jpeg", "h264", "copy"])
def test_a_list_of_seconds(format, videos, tmp_path):
    path = listed(tmp_path / "list.csv", LIST)
    report = pack(videos, tmp_path / "s", clips=read_clip_list(path), format=format, **QUIET)
    assert (report.found, report.packed, report.clips) == (8, 5, 5)
    assert report.lines()[2] == "8 rows of the clip list: 5 packed, 3 rejected, 0 skipped"
    assert not inspect_store(tmp_path / "s", progress=False).damaged
    index = Store(tmp_path / "s").index
    infos = [index.clip(clip) for clip in range(5)]
    assert [(info.source, info.num_frames) for info in infos] == [
        ("a.mp4", 15), ("a.mp4", 10), ("c.mkv", 4), ("c.mkv", 10), ("b.mp4", 40),
    ]  # fmt: skip
    assert [info.video for info in infos] == [0, 0, 0, 0, 1]
    assert [index.times(clip)[0] for clip in (0, 1, 2)] == pytest.approx([0, 0.4, 0.213], abs=1e-3)
    original = pictures(40, seed=ord("a"))
    for clip, first in ((0, 0), (1, 10)):
        shown = frames(tmp_path / "s", clip, [0])[0]
        error = [np.abs(shown.astype(int) - picture.astype(int)).mean() for picture in original]
        assert int(np.argmin(error)) == first
    with loader(tmp_path / "s", 5) as data:
        rows = sorted(zip(*(data.batch(0)[name] for name in ("clip", "label", "id", "group")), strict=True))
    assert [(int(label), name, group) for _, label, name, group in rows] == [
        (1, "overlaps", ""), (2, "first", "g"), (0, "variable", "g"), (1, "rest", ""), (2, "whole", ""),
    ]  # fmt: skip
    classes = pq.read_table(tmp_path / "s" / "labels.parquet")["class"].to_pylist()
    assert classes == ["cat", "dog", "ant", "cat", "dog"]
    quarantine = [json.loads(line) for line in (tmp_path / "s" / "quarantine.jsonl").read_text().splitlines()]
    assert sorted((entry["line"], entry["reason"].split(":")[0]) for entry in quarantine) == [
        (7, "no frame in the clip"), (8, "no such file"), (9, "outside the source folder"),
    ]  # fmt: skip


def test_the_command_and_a_list_as_parquet(videos, tmp_path, capsys):
    columns = {"source": ["a.mp4", "b.mp4"], "start": [0.0, 0.2], "end": [1.0, None], "label": [7, 3]}
    pq.write_table(pa.table(columns), tmp_path / "list.parquet")
    words = ["pack", str(videos), str(tmp_path / "s"), "--clips", str(tmp_path / "list.parquet"), "--processes", "1"]
    assert main(words) == 0
    assert "2 rows of the clip list: 2 packed" in capsys.readouterr().out
    assert main(words) == 0
    assert pq.read_table(tmp_path / "s" / "labels.parquet")["label"].to_pylist() == [7, 3]
    pq.write_table(pa.table({**columns, "label": [7, 4]}), tmp_path / "list.parquet")
    assert main(words) == 2
    assert "other files" in capsys.readouterr().err


def test_a_list_reads_back_what_a_store_says_of_its_clips(tmp_path):
    """``labels.parquet`` of a curated store is a list of frames: its ``source`` is where a video is from."""
    row = {"source": "the web", "path": "a.mp4", "first_frame": 3, "end_frame": 9, "start": 1536, "label": 4,
           "class": "goldfish", "clip_id": "x", "group": None}  # fmt: skip
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "list.parquet")
    expected = Span(3, 9, 1536, label=4, class_name="goldfish", id="x", line=1)
    assert read_clip_list(tmp_path / "list.parquet") == {"a.mp4": [expected]}


def test_a_row_in_a_damaged_part_is_rejected_alone(videos, tmp_path):
    (tmp_path / "videos").mkdir()
    data = bytearray((videos / "a.mp4").read_bytes())
    place = data.index(b"mdat") + 4 + (len(data) - data.index(b"mdat")) // 3
    data[place : place + 200] = bytes(200)
    (tmp_path / "videos" / "a.mp4").write_bytes(data)
    clips = {"a.mp4": [TimeSpan(0, 0.2, line=2), TimeSpan(0, 1.6, line=3)]}
    for format in ("h264", "copy"):
        report = pack(tmp_path / "videos", tmp_path / format, clips=clips, format=format, **QUIET)
        assert (report.packed, report.found, report.salvaged) == (1, 2, 1)
        (entry,) = [json.loads(line) for line in (tmp_path / format / "quarantine.jsonl").open() if "line" in line]
        assert entry["line"] == 3
        assert entry["reason"].startswith("damage or another frame size in the clip")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "has no rows"),
        ("file,start\na.mp4,1\n", "has no column path or source: its header is start"),
        ("path,start\na.mp4,one\n", "line 2, column start: 'one' is no number of seconds"),
        ("path,start\na.mp4,-1\n", "line 2, column start: '-1' is no number of seconds"),
        ("path,end\na.mp4,inf\n", "line 2, column end: 'inf' is no number of seconds"),
        ("path,start\na.mp4,1\n,2\n", "line 3, column path: is empty"),
        ("path\na.mp4\na.mp4\n", "line 3, column path: names 'a.mp4' again"),
        ("path,start\na.mp4,1,2\n", "line 2 has more fields than the header"),
        ("path,label\na.mp4,-2\n", "column label: -2 is not within"),
        ('path\n"a.mp4\n', "line 1 cannot be read"),
    ],
)
def test_a_list_that_makes_no_sense(text, words, tmp_path):
    with pytest.raises(UserError, match=words):
        read_clip_list(listed(tmp_path / "list.csv", text))


def named(store):
    rows = pq.read_table(store / "labels.parquet").to_pylist()
    return {row["clip_id"]: (row["label"], row["class"]) for row in rows}


def test_classes_of_one_name_have_one_number_in_all_stores(videos, tmp_path):
    for name, text in (
        ("one", "path,label,id,group\na.mp4,cat,a,g\nb.mp4,dog,b,\n"),
        ("two", "path,label,id,group\nc.mkv,bee,c,g\nb.mp4,cat,d,\n"),
    ):
        clips = read_clip_list(listed(tmp_path / f"{name}.csv", text))
        pack(videos, tmp_path / name, clips=clips, **QUIET)
    assert named(tmp_path / "two") == {"c": (0, "bee"), "d": (1, "cat")}
    with ClipLoader({str(tmp_path / "one"): 1, str(tmp_path / "two"): 1}, 4, threads=1) as data:
        batch = data.batch(0)
        seen = dict(zip(batch["id"], batch["label"].tolist(), strict=True))
    expected = {"a": (0, "cat"), "b": (1, "dog"), "c": (2, "bee"), "d": (0, "cat")}
    assert seen.items() <= {name: label for name, (label, _) in expected.items()}.items()
    merge(tmp_path / "both", [tmp_path / "one", tmp_path / "two"])
    merged = named(tmp_path / "both")
    assert merged == {name: label for name, label in expected.items() if name in merged}
    index = Store(tmp_path / "both").index
    video = {index.clip(clip).source: index.clip(clip).video for clip in range(len(index))}
    assert video["a.mp4"] == video["c.mkv"] != video["b.mp4"], "a group is one video of the merged store, too"
    subset(tmp_path / "both", tmp_path / "some", clips=[0, len(index) - 1])
    assert named(tmp_path / "some").items() <= merged.items()


def test_names_and_bare_numbers_do_not_mix(videos, tmp_path):
    for name, text in (("one", "path,label\na.mp4,cat\n"), ("two", "path,label\nb.mp4,0\n")):
        pack(videos, tmp_path / name, clips=read_clip_list(listed(tmp_path / f"{name}.csv", text)), **QUIET)
    for use in (
        lambda: merge(tmp_path / "both", [tmp_path / "one", tmp_path / "two"]),
        lambda: ClipLoader({str(tmp_path / "one"): 1, str(tmp_path / "two"): 1}, 2, threads=1),
    ):
        with pytest.raises(UserError, match=r"one names its classes and .*two has label numbers alone"):
            use()
    append(videos, tmp_path / "two", processes=1, progress=False)
    assert pq.read_table(tmp_path / "two" / "labels.parquet")["label"].to_pylist() == [None, 0, None]


def test_append_takes_a_list_and_passes_over_the_files_that_the_store_has(videos, tmp_path, capsys):
    first = "path,start,end,label,id\na.mp4,0,0.4,cat,one\n"
    listed(tmp_path / "first.csv", first)
    grown = listed(tmp_path / "grown.csv", first + "b.mp4,0.4,0.8,bee,two\nb.mp4,1.2,,cat,three\ngone.mp4,,,cat,\n")
    pack(videos, tmp_path / "s", clips=read_clip_list(tmp_path / "first.csv"), **QUIET)
    words = ["store", "append", str(videos), str(tmp_path / "s"), "--processes", "1", "--clips"]
    assert main([*words, str(grown)]) == 0
    assert "4 rows of the clip list: 3 packed" in capsys.readouterr().out
    assert named(tmp_path / "s") == {"one": (0, "cat"), "two": (2, "bee"), "three": (0, "cat")}
    store = Store(tmp_path / "s")
    assert [store.index.clip(clip).num_frames for clip in range(len(store))] == [10, 10, 10]
    assert main([*words, str(grown)]) == 2
    assert "no new video in the clip list: all are known" in capsys.readouterr().err
    assert len(Store(tmp_path / "s")) == 3
