"""UCF101 end to end on a tiny copy in the benchmark's layout, written here."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from vito_fast.errors import UserError
from vito_fast.evaluate.encoders import load
from vito_fast.evaluate.task import find_preset, find_task
from vito_fast.evaluate.ucf101 import Ucf101, decode, read_clip, read_clips, read_lists

CLASSES = ("Archery", "Bowling", "Diving")


def scene(label, rng):
    """12 frames of moving stripes; their direction and color are the class."""
    y, x = np.mgrid[:48, :64]
    along = (y, x, x + y)[label]
    phases = rng.uniform(0, 6) + 0.4 * np.arange(12)
    gray = 128 + 80 * np.sin(along[None] * 0.9 + phases[:, None, None]) + rng.normal(0, 5, (12, 48, 64))
    tint = np.full(3, 0.6)
    tint[label] = 1.0
    return (gray[..., None] * tint).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def data(tmp_path_factory, write_video):
    root, rng = tmp_path_factory.mktemp("ucf"), np.random.default_rng(0)
    (root / "ucfTrainTestlist").mkdir()
    lists = {"train": [], "test": []}
    for number, name in enumerate(CLASSES):
        (root / "UCF-101" / name).mkdir(parents=True)
        for group in range(1, 6):
            video = f"{name}/v_{name}_g{group:02d}_c01.avi"
            write_video(root / "UCF-101" / video, scene(number, rng))
            lists["test" if group < 3 else "train"].append(video if group < 3 else f"{video} {number + 1}")
    classes = "".join(f"{i + 1} {name}\n" for i, name in enumerate(CLASSES))
    (root / "ucfTrainTestlist" / "classInd.txt").write_text(classes)
    for kind, lines in lists.items():
        (root / "ucfTrainTestlist" / f"{kind}list01.txt").write_text("\r\n".join(lines) + "\r\n")
    return root


@pytest.fixture(scope="module")
def small():
    preset = find_preset(find_task("ucf101"), "finetune")
    changes = {"frames": 3, "fps": 8.0, "size": 32, "epochs": 12, "batch_size": 9, "test_clips": 2, "subset": True}
    changes |= {
        "lr": 3e-3,
        "jitter": (0.0,) * 4,
        "min_area": 0.5,
        "dropout": 0.2,
        "dtype": "float32",
        "schedule": "cosine",
    }
    return preset.with_options(changes)


def test_it_learns_the_classes(data, small, tmp_path):
    encoder = load("random:resnet18")
    before = {name: t.clone() for name, t in encoder.backbone.state_dict().items()}
    result = Ucf101().run(encoder, data, small, tmp_path)
    assert result.metrics["top1"].value >= 5 / 6
    assert result.metrics["top1"].n == 6
    assert set(result.items) == {v.name for v in read_lists(data, 1)[2]}
    assert set(result.groups) == set(CLASSES)
    assert result.notes[0].startswith("9 training videos, 6 test videos, 3 classes; split 1 has 9,537")
    assert all(torch.equal(t, before[name]) for name, t in encoder.backbone.state_dict().items())


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


def test_wrong_copies_are_one_line(data, tmp_path, small):
    task, strict = Ucf101(), find_preset(find_task("ucf101"), "finetune").options
    assert task.check(data, small.options).problems == ()
    assert "9 training videos" in task.check(data, strict).problems[0]
    assert "unpack both archives" in task.check(tmp_path, strict).problems[0]
    copy = tmp_path / "copy"
    (copy / "ucfTrainTestlist").mkdir(parents=True)
    (copy / "UCF-101").mkdir()
    for path in (data / "ucfTrainTestlist").iterdir():
        (copy / "ucfTrainTestlist" / path.name).write_text(path.read_text())
    assert "is missing, and 14 others" in task.check(copy, small.options).problems[0]
    train = (copy / "ucfTrainTestlist" / "trainlist01.txt").read_text()
    (copy / "ucfTrainTestlist" / "testlist01.txt").write_text(train)
    assert "the lists share 9 groups" in task.check(copy, small.options).problems[1]
    (copy / "ucfTrainTestlist" / "testlist01.txt").write_text("../../etc/passwd 1\n")
    assert "is no CLASS/VIDEO" in task.check(copy, small.options).problems[0]


def test_a_torn_video_is_named(tmp_path):
    path = Path(tmp_path / "torn.avi")
    path.write_bytes(b"RIFF nothing")
    with pytest.raises(UserError, match=r"cannot decode .*torn\.avi"):
        decode(path)
