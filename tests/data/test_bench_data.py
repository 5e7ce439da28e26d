"""The benchmark of a store: that its figures are those of what it read, and that its readers read the right frames."""

import json
from pathlib import Path

import numpy as np
import pytest
from videos import pictures, write

from vito_fast.cli import store as cli_store
from vito_fast.data.bench_data import READERS, _files, _times, bench_data, decoding, installed, lines
from vito_fast.data.pack.pack import pack
from vito_fast.data.store.media import Source
from vito_fast.data.store.picture import rgb
from vito_fast.data.store.store import Store, frames
from vito_fast.errors import UserError
from vito_fast.train.attention_maps import video_frames


@pytest.fixture(scope="module")
def result(stores):
    return bench_data(stores / "copy", batch_size=2, seconds=0.2, size=48, pairs=4, rounds=2, threads=1, device="cpu")


def test_figures_hang_together(result):
    assert json.loads(json.dumps(result)) == result
    loader = result["loader"]
    assert loader["pairs_per_s"] == pytest.approx(loader["pairs"] / loader["seconds"], rel=0.05)
    assert sum(loader["share"].values()) == pytest.approx(1, abs=1e-3)
    assert loader["d_per_u"] > 1  # B-frames and groups of 12
    assert loader["bytes_per_pair"] > 100
    assert loader["failures"] == 0
    assert (result["format"], result["size"]) == ("copy", 48)
    assert result["machine"]["versions"]["torch"]
    assert "measured: " in lines(result)[-1]


def test_readers_agree_on_the_clips(result, stores):
    """PyAV is always installed, so there is always one to race; whoever else is must deliver the same frames."""
    decode = result["decode"]
    assert {"vito_fast", "PyAV"} <= set(decode["readers"])
    assert {*decode["readers"], *decode["missing"]} == {"vito_fast", "PyAV", "torchcodec", "decord2", "OpenCV"}
    assert all(row["far"] == 0 for row in decode["readers"].values()), decode
    times = {name: row["ms_per_pair"] for name, row in decode["readers"].items()}
    mine = times.pop("vito_fast")
    assert decode["speedup"] == pytest.approx(min(times.values()) / mine, rel=0.02)


@pytest.mark.parametrize("format", ["jpeg", "copy"])
def test_readers_agree_on_the_originals(stores, folder, format):
    decode = decoding(stores / format, originals=folder, size=48, pairs=16, rounds=1)
    assert decode["readers"]["PyAV"]["far"] == 0, decode


def test_clips_that_begin_inside_a_group_of_pictures(tmp_path):
    """The file written for the public readers has pictures before the clip's first frame: they are not counted."""
    write(tmp_path / "video.mp4", pictures(60), gop=50, b_frames=2)
    pack(tmp_path / "video.mp4", tmp_path / "store", format="copy", min_length=0, clip_length=0.8, progress=False)
    store = Store(tmp_path / "store")
    assert len(store) == 3
    requests = [(clip, [1, store.index.clip(clip).num_frames - 1]) for clip in range(3)]
    read = installed()[0]["PyAV"]
    for (path, asked), (clip, numbers) in zip(_files(store, requests, None, tmp_path), requests, strict=True):
        np.testing.assert_array_equal(read(path, asked), frames(store, clip, numbers))


def test_d_per_u_of_jpeg_is_one(stores):
    small = {"batch_size": 2, "seconds": 0.1, "size": 32, "pairs": 1, "rounds": 1, "device": "cpu"}
    assert bench_data(stores / "jpeg", **small)["loader"]["d_per_u"] == 1


def test_pyav_reads_the_frames_asked_for(tmp_path):
    path = write(tmp_path / "video.mp4", pictures(60), gop=20, b_frames=2)
    truth = [rgb(frame) for _, frame in Source(path).frames()]
    read = installed()[0]["PyAV"]
    for asked in ([3, 40], [40, 3], [25, 30], [0, 59], [7, 7]):
        for number, got in zip(asked, read(path, asked), strict=True):
            np.testing.assert_array_equal(got, truth[number])


def test_an_original_that_is_not_there(stores, tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        decoding(stores / "jpeg", originals=tmp_path, pairs=1, rounds=1)


@pytest.mark.parametrize("name", ["pairs", "rounds", "seconds"])
@pytest.mark.parametrize("value", [0, float("nan"), float("inf")])
def test_senseless_numbers(stores, name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        bench_data(stores / "jpeg", **{name: value})


@pytest.mark.parametrize("output", ["/nope/x.json", "/"])
def test_an_output_that_cannot_be_written(stores, output, monkeypatch):
    monkeypatch.setattr("vito_fast.data.bench_data.bench_data", lambda *_, **__: pytest.fail("measured first"))
    with pytest.raises(UserError, match=f"cannot write {output}: "):
        cli_store.bench_data(stores / "jpeg", output=Path(output))


@pytest.mark.parametrize("name", sorted(READERS))
def test_readers_take_no_name_for_a_url(tmp_path, monkeypatch, name):
    readers, missing = installed()
    if name in missing:
        pytest.skip(missing[name])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "http:").mkdir()
    path = write(tmp_path / "http:" / "video.mp4", pictures(10)).relative_to(tmp_path)
    assert len(readers[name](path, [0, 5])) == 2
    assert len(_times(path)) == 10
    assert len(video_frames(path, 2, 32)) == 2
