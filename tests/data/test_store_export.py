"""Export: a store's clips as files have its packets, and packing them again gives its frames."""

import csv
import shutil

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from videos import display, pictures, rotate, skip_start, write

from vito_fast.cli.main import main
from vito_fast.data.pack.clip_list import read_clip_list
from vito_fast.data.pack.export import export
from vito_fast.data.pack.pack import pack
from vito_fast.data.store.store import Store, frames
from vito_fast.errors import UserError

QUIET = {"progress": False, "processes": 1, "short_side": 48}


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Videos with reordered frames, an edit list, and turned ones; clips of 1.1 s begin amid groups of pictures."""
    folder, work = tmp_path_factory.mktemp("videos"), tmp_path_factory.mktemp("work")
    plain = write(folder / "a.mp4", pictures(60), b_frames=2, gop=24)
    write(folder / "b.mkv", pictures(60, seed=1), "libx265", b_frames=2, gop=24)
    write(folder / "c.webm", pictures(60, seed=2), "libvpx", gop=24)
    write(folder / "d.webm", pictures(60, seed=3), "libvpx-vp9", gop=24)
    skip_start(write(work / "e.mp4", pictures(60, seed=4), b_frames=2, gop=24), folder / "e.mp4", 7 * 512)
    rotate(plain, folder / "f.mp4", 3)
    display(plain, folder / "g.mp4", (0, 1, 1, 0))
    return folder


@pytest.mark.parametrize("format", ["copy", "h264", "jpeg"])
def test_packing_an_export_gives_the_store_again(format, videos, tmp_path):
    pack(videos, tmp_path / "s", format=format, clip_length=1.1, **QUIET)
    first = Store(tmp_path / "s")
    number = export(tmp_path / "s", tmp_path / "out")
    assert number == len(first)
    clips = read_clip_list(tmp_path / "out" / "clips.csv")
    pack(tmp_path / "out", tmp_path / "again", format="copy", clips=clips, **QUIET)
    second = Store(tmp_path / "again")
    assert second.report.packed == len(second) == number
    for clip in range(number):
        one, two = first.index.clip(clip), second.index.clip(clip)
        assert one.codec == two.codec
        assert (one.num_frames, one.rotation, one.mirror) == (two.num_frames, two.rotation, two.mirror)
        times = [store.index.times(clip) for store in (first, second)]
        np.testing.assert_allclose(times[1] - times[1][0], times[0] - times[0][0], atol=1e-3)
        if format == "jpeg" or one.codec == "vp9":
            sums = [store.index.packets(clip).checksums.tolist() for store in (first, second)]
            assert sums[0] == sums[1], "the packets are the store's"
        else:
            count = range(one.num_frames)
            np.testing.assert_array_equal(frames(second, clip, count), frames(first, clip, count))


def test_players_show_the_frames_of_a_clip_alone(videos, tmp_path):
    pack(videos, tmp_path / "s", format="h264", clip_length=1.1, **QUIET)
    export(tmp_path / "s", tmp_path / "out")
    with av.open(str(tmp_path / "out" / "0000" / "0000001.mp4")) as container:
        stream = container.streams.video[0]
        times = [float(frame.pts * frame.time_base) for frame in container.decode(stream)]
    assert times == pytest.approx(Store(tmp_path / "s").index.times(1) - Store(tmp_path / "s").index.times(1)[0])


def test_labels_and_what_cannot_be_exported(stores, tmp_path, capsys):
    shutil.copytree(stores / "jpeg", tmp_path / "s")
    count = len(Store(tmp_path / "s"))
    columns = {"label": [0, 1, -1] + [0] * (count - 3), "class": ["cat", "dog", None] + ["cat"] * (count - 3),
               "clip_id": [f"id{n}" for n in range(count)], "group": ["g"] + [None] * (count - 1)}  # fmt: skip
    pq.write_table(pa.table(columns), tmp_path / "s" / "labels.parquet")
    assert main(["store", "export", str(tmp_path / "s"), str(tmp_path / "out")]) == 0
    assert f"{count} clips: {tmp_path / 'out'}, listed in" in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "out" / "clips.csv").open()))
    assert [(row["label"], row["id"], row["group"]) for row in rows[:3]] == [
        ("cat", "id0", "g"), ("dog", "id1", ""), ("", "id2", ""),
    ]  # fmt: skip
    assert rows[0]["origin"] == Store(tmp_path / "s").index.clip(0).source
    with pytest.raises(UserError, match="out exists"):
        export(tmp_path / "s", tmp_path / "out")
    shard = next((tmp_path / "s").glob("shard-*"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 255
    shard.write_bytes(data)
    with pytest.raises(UserError, match=r"cannot be exported: .*checksum"):
        export(tmp_path / "s", tmp_path / "broken")
    assert not [path for path in tmp_path.iterdir() if "broken" in path.name]
