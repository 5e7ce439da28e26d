"""UCF101: lists, clips and wrong copies. test_finetune_tasks.py trains on it."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from vito_fast.errors import UserError
from vito_fast.evaluate.ucf101 import Ucf101, decode, read_clip, read_clips


@pytest.fixture
def data(copies):
    return copies["ucf101"]


def test_clips_are_taken_at_their_times(tmp_path, write_video):
    levels = np.arange(20, 240, 20)[:11]
    pictures = np.broadcast_to(levels[:, None, None, None], (11, 32, 32, 3)).astype(np.uint8)
    write_video(tmp_path / "v.avi", pictures, rate=10)
    frames, times = decode(tmp_path / "v.avi")
    assert (tuple(frames.shape), times[-1]) == ((11, 3, 32, 32), 1.0)
    shown = lambda clip: (clip[:, 0, 0, 0] / 20).round().int().tolist()  # noqa: E731
    assert shown(read_clip(tmp_path / "v.avi", 0.0, 4, 5.0)) == [1, 3, 5, 7]
    assert shown(read_clip(tmp_path / "v.avi", 1.0, 4, 5.0)) == [4, 6, 8, 10]
    assert shown(read_clip(tmp_path / "v.avi", 0.5, 8, 5.0)) == [1, 3, 5, 7, 9, 11, 2, 4]  # it loops
    options = dataclasses.replace(Ucf101.options(), frames=2, fps=10.0, size=28)
    clips = read_clips(tmp_path / "v.avi", 3, options)
    assert clips.shape == (3, 2, 3, 28, 28)
    assert [shown(clip) for clip in clips] == [[1, 2], [5, 6], [10, 11]]


def test_wrong_copies_are_one_line(data, tmp_path):
    task, strict = Ucf101(), Ucf101.options()
    subset = Ucf101.options(subset=True)
    assert task.check(data, subset).problems == ()
    assert "9 training videos" in task.check(data, strict).problems[0]
    assert "unpack both archives" in task.check(tmp_path, strict).problems[0]
    copy = tmp_path / "copy"
    (copy / "ucfTrainTestlist").mkdir(parents=True)
    (copy / "UCF-101").mkdir()
    for path in (data / "ucfTrainTestlist").iterdir():
        (copy / "ucfTrainTestlist" / path.name).write_text(path.read_text())
    assert "is missing, and 14 others" in task.check(copy, subset).problems[0]
    train = (copy / "ucfTrainTestlist" / "trainlist01.txt").read_text()
    (copy / "ucfTrainTestlist" / "testlist01.txt").write_text(train)
    assert "the lists share 9 groups" in task.check(copy, subset).problems[1]
    (copy / "ucfTrainTestlist" / "testlist01.txt").write_text("../../etc/passwd 1\n")
    assert "is no CLASS/VIDEO" in task.check(copy, subset).problems[0]


def test_a_torn_video_is_named(tmp_path):
    path = Path(tmp_path / "torn.avi")
    path.write_bytes(b"RIFF nothing")
    with pytest.raises(UserError, match=r"cannot decode .*torn\.avi"):
        decode(path)
