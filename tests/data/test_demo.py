"""The demo's videos: made of what the wheels carry, the same every time, with masks that fit."""

import importlib.util
import subprocess
import sys

import av
import numpy as np
import pytest
from PIL import Image

from vito_fast.data import demo
from vito_fast.data.demo import Scene, draw, scenes, wheel_folder
from vito_fast.data.pack.pack import pack
from vito_fast.errors import UserError


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-m", "vito_fast.data.demo", str(out), "--count", "3"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("6 videos in ")
    return out


def test_videos_and_masks(small):
    for scene in scenes(3, 0):
        with av.open(str(small / "videos" / f"{scene.name}.mp4")) as container:
            pictures = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert len(pictures) == scene.frames
        masks = sorted((small / "Annotations" / scene.name).iterdir())
        assert [path.name for path in masks] == [f"{n:05d}.png" for n in range(scene.frames)]
        for number, (picture, labels) in enumerate(draw(scene)):
            if number not in (0, 30):
                continue
            with Image.open(masks[number]) as mask:
                assert mask.mode == "P"
                assert mask.getpalette()[:9] == list(demo.PALETTE)
                np.testing.assert_array_equal(np.asarray(mask), labels)
            assert np.abs(pictures[number].astype(int) - picture).mean() < 8
        assert not list(small.rglob("*.part"))


def test_the_masked_things_move_on_their_own():
    scene = Scene("s", "coffee.png", ("chelsea.png", "astronaut.png"), seed=5, frames=40, rate=25)
    everything = list(draw(scene))
    for label in (1, 2):
        sizes = [np.count_nonzero(labels == label) for _, labels in everything]
        assert min(sizes) > 200
        places = [np.argwhere(labels == label).mean(0) for _, labels in everything]
        steps = np.linalg.norm(np.diff(places, axis=0), axis=1)
        assert 0 < steps.max() < 20, "smoothly"
        assert np.linalg.norm(places[0] - places[-1]) > 5


def test_same_seed_same_pictures():
    assert scenes(20, 3) == scenes(20, 3) != scenes(20, 4)
    names = [scene.background for scene in scenes(60, 0)]
    assert len(set(names)) == len(demo.PHOTOGRAPHS)
    one, two = (next(draw(scenes(2, 3)[1])) for _ in range(2))
    np.testing.assert_array_equal(one[0], two[0])


def test_enough_clips(small, tmp_path):
    """Three scenes and the real clips; with the sixty of the default that makes more than 64."""
    report = pack(small / "videos", tmp_path / "s", progress=False)
    assert report.rejected == {}
    assert report.videos == 6
    assert report.clips - 3 + 60 >= 64


def test_done_already(small):
    before = (small / "videos" / f"{scenes(3, 0)[0].name}.mp4").stat().st_mtime_ns
    assert demo.demo(small, count=3) == small / "videos"
    assert (small / "videos" / f"{scenes(3, 0)[0].name}.mp4").stat().st_mtime_ns == before


def test_what_was_deleted_is_made_again(small):
    path = small / "videos" / f"{scenes(3, 0)[1].name}.mp4"
    before = path.read_bytes()
    path.unlink()
    demo.demo(small, count=3)
    assert path.read_bytes() == before, "and the same seed gives the same bytes"


def test_wheels_missing(monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "skvideo" else find(name))
    with pytest.raises(UserError, match="scikit-video: pip install"):
        demo.demo(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert wheel_folder("skimage", "data").is_dir()


def test_not_writable():
    with pytest.raises(UserError, match="cannot write the demo into /proc/demo"):
        demo.demo("/proc/demo", count=1)
