"""The tasks on labeled folders: tiny folders of images and videos that are written here."""

import json
import shutil
from pathlib import Path

import av
import numpy as np
import pytest
import skimage
import torch
from forks import on_ranks
from PIL import Image

from vito_fast.errors import UserError
from vito_fast.evaluate import folders, linear
from vito_fast.evaluate.correspondence_task import Correspondence
from vito_fast.evaluate.encoders import load
from vito_fast.evaluate.folder_tasks import Corruptions, Knn, Linear, PmK
from vito_fast.evaluate.task import find_preset

COLORS = {"blue": (30, 40, 210), "green": (40, 190, 50), "red": (220, 40, 30)}


def picture(color, rng, size=(40, 48)):
    image = np.array(color) + rng.normal(0, 25, (*size, 3)) + 40 * np.sin(np.arange(size[1]) / 5)[None, :, None]
    return image.clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for part, count in (("train", 8), ("val", 3)):
        for name, color in COLORS.items():
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                Image.fromarray(picture(color, rng)).save(root / part / name / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Colors again; in val the last of red turns blue five frames behind the middle."""
    root, rng = tmp_path_factory.mktemp("videos"), np.random.default_rng(1)
    for part, count in (("train", 3), ("val", 2)):
        for name, color in COLORS.items():
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                turns = part == "val" and name == "red" and number == 1
                with av.open(str(root / part / name / f"{number}.mp4"), "w") as container:
                    stream = container.add_stream("mpeg4", rate=25)
                    stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 48, 48, "yuv420p", 2_000_000
                    for t in range(24):
                        shown = COLORS["blue"] if turns and t >= 17 else color
                        frame = av.VideoFrame.from_ndarray(picture(shown, rng, (48, 48)), format="rgb24")
                        container.mux(stream.encode(frame))
                    container.mux(stream.encode(None))
    return root


def small(task, **changes):
    return find_preset(task, None).with_options({"size": 32, **changes})


def test_knn_and_linear_tell_colors(images, tmp_path):
    for task in (Knn(), Linear()):
        preset = small(task, **({"k": 3} if task.name == "knn" else {"strengths": [0.01, 1.0]}))
        result = task.run(load("pixels"), images, preset, tmp_path)
        assert (result.metrics["top1"].value, result.metrics["top1"].n) == (1, 9)
        assert set(result.groups) == set(COLORS)
        work = next(tmp_path.rglob(f"{task.name}-{preset.name.rstrip('*')}"))
        assert all((work / file).is_file() for file in result.media.values())
    probe, notes = linear.load_probe(next(tmp_path.rglob("head.safetensors")))
    assert notes == {"classes": "blue green red", "size": "32", "features": "pooled", "top1": "1.0"}
    assert probe.weight.shape == (3, 768)
    assert "chosen inside train" in result.notes[0]


def test_a_mean_of_frames_stands_for_a_video(videos, tmp_path):
    result = Knn().run(load("pixels"), videos, small(Knn(), k=1, frames=2), tmp_path)
    right = {name: item["top1"] for name, item in result.items.items()}
    assert all(right[name] == 1 for name in right if name != "red/1.mp4")


def test_features_do_not_depend_on_company_and_leave_buffers_alone(images, tmp_path):
    encoder = load("random:resnet18")
    before = {name: tensor.clone() for name, tensor in encoder.backbone.state_dict().items()}
    options = folders.FolderOptions(size=32)
    train = folders.labeled_folder(images / "train")
    cache = folders.FeatureCache(tmp_path)
    found = folders.features(encoder, train, options, cache)
    one = folders.encode(encoder, folders.read_item(train.paths[5], options), options)
    torch.testing.assert_close(found[5], one[0], rtol=1e-4, atol=1e-5)
    assert all(torch.equal(before[name], tensor) for name, tensor in encoder.backbone.state_dict().items())
    assert torch.equal(folders.features(encoder, train, options, cache), found)
    assert len(list(tmp_path.iterdir())) == 1


def test_corruptions_are_relative_to_clean(images, tmp_path):
    task = Corruptions()
    preset = small(task, k=3, names=["contrast", "gaussian_noise"], severities=[1, 5])
    result = task.run(load("pixels"), images, preset, tmp_path)
    assert list(result.metrics) == ["corrupted", "clean", "corrupted / clean"]
    assert result.metrics["clean"].value == 1
    assert result.metrics["corrupted / clean"].value == pytest.approx(result.metrics["corrupted"].value)
    assert 0 < result.metrics["corrupted"].value <= 1
    assert set(result.groups) == {"contrast", "gaussian_noise"}
    with pytest.raises(UserError, match="unknown corruption 'rain'"):
        task.run(load("pixels"), images, small(task, names=["rain"]), tmp_path)


def test_pm_k_finds_the_frames_that_turn(videos, images, tmp_path):
    result = PmK().run(load("pixels"), videos, small(PmK(), k=3, window=8), tmp_path)
    assert list(result.metrics) == ["pm-8", "anchor"]
    assert result.metrics["anchor"].value == 1
    assert {name for name, item in result.items.items() if item["pm-8"] == 0} == {"red/1.mp4"}
    assert list(result.media) == ["red/1.mp4: right, and wrong nearby"]
    assert "not the reviewed sets" in result.notes[0]
    near = PmK().run(load("pixels"), videos, small(PmK(), k=3, window=4), tmp_path)
    assert near.metrics["pm-4"].value == 1
    assert "pmk reads videos" in PmK().check(images, PmK().options()).problems[0]


def test_wrong_folders_are_one_line(images, tmp_path):
    root = tmp_path / "copy"
    with pytest.raises(UserError, match="no folder"):
        Knn().run(load("pixels"), root, small(Knn()), tmp_path)
    shutil.copytree(images, root)
    shutil.copy(root / "train" / "red" / "0.png", root / "val" / "red" / "0.png")
    assert "is in train too" in Knn().check(root, Knn().options()).problems[0]
    (root / "val" / "red").rename(root / "val" / "pink")
    assert "pink is no class of the training set" in Knn().check(root, Knn().options()).problems[0]
    (root / "train" / "empty").mkdir()
    assert "empty has no images" in Knn().check(root, Knn().options()).problems[0]
    with pytest.raises(UserError, match="no folders"):
        folders.labeled_folder(root / "train" / "empty")
    (root / "train" / "red" / "0.png").write_bytes(b"none")
    with pytest.raises(UserError, match=r"0\.png"):
        folders.read_item(root / "train" / "red" / "0.png", folders.FolderOptions())
    (root / "clip.mp4").write_bytes(b"none")
    with pytest.raises(UserError, match=r"clip\.mp4"):
        folders.frame_count(root / "clip.mp4")


def test_correspondence_on_the_real_pair(tmp_path):
    data = Path(skimage.__file__).parent / "data"
    preset = find_preset(Correspondence(), None).with_options({"spacing": 24})
    found = Correspondence().check(data, preset.options)
    assert (found.problems, found.items, found.size) == ((), 1, (500, 741))
    result = Correspondence().run(load("pixels"), data, preset, tmp_path)
    assert result.metrics["pck"].value == pytest.approx(result.groups["motorcycle"]["pck"], abs=1e-12)
    assert 0.02 < result.metrics["pck"].value < 0.9
    assert result.metrics["pck"].standard_error > 0
    assert "has no pairs" in Correspondence().check(tmp_path, preset.options).problems[0]


def measure(rank, images, videos, out):
    encoder = load("pixels")
    items = [
        Knn().run(encoder, images, small(Knn(), k=3), out).items,
        Corruptions().run(encoder, images, small(Corruptions(), names=["shot_noise"], severities=[5]), out).items,
        PmK().run(encoder, videos, small(PmK(), k=3), out).items,
    ]
    (out / f"rank{rank}.json").write_text(json.dumps(items))


def test_two_ranks_give_what_one_gives(images, videos, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    measure(0, images, videos, tmp_path / "one")
    on_ranks(2, tmp_path / "store", measure, images, videos, tmp_path / "two")
    one = (tmp_path / "one" / "rank0.json").read_text()
    assert (tmp_path / "two" / "rank0.json").read_text() == (tmp_path / "two" / "rank1.json").read_text() == one
