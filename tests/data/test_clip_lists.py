"""Packing by a clip list, and the limits of one file."""

import subprocess
import time

import numpy as np
import pytest
from videos import pictures, write, write_three

from vito_fast.data.pack import pack
from vito_fast.data.pack.clips import Span
from vito_fast.data.store.description import Limits
from vito_fast.data.store.index import Index
from vito_fast.data.store.store import frames
from vito_fast.errors import UserError

QUIET = {"progress": False, "processes": 1, "short_side": 48}
TICK = 12800 // 25
"""Ticks per frame of an MP4 at 25 frames per second."""


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    return write_three(tmp_path_factory.mktemp("three"))


def test_a_store_holds_the_clips_of_the_list_frame_for_frame(three, tmp_path):
    clips = {
        "a.mp4": [Span(0, 7, 0), Span(7, 8, 7 * TICK), Span(20, 40, 20 * TICK)],
        "c.mkv": [Span(5, 9, 5 * 40 + 13)],
    }
    report = pack(three, tmp_path / "s", clips=clips, **QUIET)
    assert (report.clips, report.videos, report.rejected, report.short_shots) == (4, 2, {}, 0)
    index = Index(tmp_path / "s" / "index.bin")
    seen = [(index.clip(n).source, index.clip(n).num_frames) for n in range(4)]
    assert seen == [("a.mp4", 7), ("a.mp4", 1), ("a.mp4", 20), ("c.mkv", 4)]
    times = index.packets(3).pts.astype(float) * float(index.clip(3).time_base)
    assert times == pytest.approx([0.213, 0.24, 0.293, 0.333])
    original = pictures(40, seed=ord("a"))
    for clip, first in ((0, 0), (2, 20)):
        shown = frames(tmp_path / "s", clip, [0])[0]
        error = [np.abs(shown.astype(int) - original[n].astype(int)).mean() for n in range(40)]
        assert int(np.argmin(error)) == first


def test_members_of_a_group_are_one_video(three, tmp_path):
    clips = {
        "a.mp4": [Span(0, 10, 0, group="g"), Span(10, 20, 10 * TICK)],
        "b.mp4": [Span(0, 10, 0)],
        "c.mkv": [Span(0, 10, 0, group="g")],
    }
    report = pack(three, tmp_path / "s", clips=clips, **QUIET)
    index = Index(tmp_path / "s" / "index.bin")
    videos = {}
    for n in range(len(index)):
        videos.setdefault(index.clip(n).source, set()).add(index.clip(n).video)
    assert report.videos == 2
    assert videos["a.mp4"] == videos["c.mkv"] != videos["b.mp4"]


@pytest.mark.parametrize(
    ("span", "reason"), [(Span(30, 41, 30 * TICK), "has 40 frames"), (Span(3, 9, 7), "is at tick 1536, not 7")]
)
def test_a_list_that_does_not_fit_the_file_rejects_it(three, tmp_path, span, reason):
    report = pack(three, tmp_path / "s", clips={"a.mp4": [span], "b.mp4": [Span(0, 5, 0)]}, **QUIET)
    assert report.clips == 1
    assert reason in (tmp_path / "s" / "quarantine.jsonl").read_text()


@pytest.mark.parametrize(
    ("clips", "message"),
    [
        ({}, "empty"),
        ({"../a.mp4": [Span(0, 5, 0)]}, "outside the source folder"),
        ({"x\0.mp4": [Span(0, 5, 0)]}, "cannot be read"),
        ({"a.mp4": [Span(0, 5, 0), Span(4, 6, 0)]}, "overlap"),
    ],
)
def test_a_bad_list_is_refused(three, tmp_path, clips, message):
    with pytest.raises((UserError, ValueError), match=message):
        pack(three, tmp_path / "s", clips=clips, **QUIET)


def test_too_many_frames_and_pixels_reject_a_file(three, tmp_path):
    write(tmp_path / "long.mp4", pictures(60))
    for number, limits in enumerate([Limits(frames=50), Limits(pixels=1000)]):
        (three / "long.mp4").write_bytes((tmp_path / "long.mp4").read_bytes())
        clips = {"long.mp4": [Span(0, 5, 0)], "a.mp4": [Span(0, 5, 0)]}
        if limits.frames == 50:
            assert pack(three, tmp_path / f"s{number}", clips=clips, limits=limits, **QUIET).clips == 1
            assert "more than 50 frames" in (tmp_path / f"s{number}" / "quarantine.jsonl").read_text()
        else:
            with pytest.raises(UserError, match="64 x 48 pixels, more than 1000"):
                pack(three, tmp_path / f"s{number}", clips=clips, limits=limits, **QUIET)


BUSY = """
import sys, time
from vito_fast.data.pack import process_pool as worker
def endless(job, shard, options, limits, heartbeat):
    while True:
        time.sleep(0.05)
        heartbeat()
worker._pack_one = endless
sys.argv = ["worker", *sys.argv[1:]]
worker.main()
"""


def test_a_file_that_beats_for_ever_ends_by_wall_time(three, tmp_path, monkeypatch):
    script = tmp_path / "busy.py"
    script.write_text(BUSY)
    popen = subprocess.Popen

    def start(command, **options):
        return popen([command[0], str(script), command[3]], **options)

    monkeypatch.setattr("vito_fast.data.pack.process_pool.subprocess.Popen", start)
    begin = time.monotonic()
    with pytest.raises(UserError, match="not packed within 2 s"):
        pack(three / "a.mp4", tmp_path / "s", limits=Limits(seconds=2.0), **QUIET)
    assert time.monotonic() - begin < 30


def test_limits_are_positive():
    with pytest.raises(ValueError, match="frames is 0"):
        Limits(frames=0)
