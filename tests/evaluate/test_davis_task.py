"""The task on a tiny copy in the official layout: order of baselines, resume, and two ranks as one."""

import dataclasses
import json
import os

import numpy as np
import pytest
import torch
from forks import on_ranks
from PIL import Image

from vito_fast.errors import UserError
from vito_fast.evaluate import davis, propagate
from vito_fast.evaluate.davis_task import Davis, DavisOptions
from vito_fast.evaluate.encoders import load
from vito_fast.evaluate.task import find_preset, presets


def scene(rng, frames):
    """Two textured objects over a textured ground, moving apart; the second hides the first."""
    height, width = 96, 128
    ground = rng.integers(0, 90, (height, width, 3))
    colors = rng.integers(120, 255, (2, 3))
    images, masks = [], []
    for t in range(frames):
        ids = np.zeros((height, width), np.uint8)
        ids[20 + 2 * t : 52 + 2 * t, 16 + 5 * t : 56 + 5 * t] = 1
        ids[56:88, 88 - 6 * t : 120 - 6 * t] = 2
        image = ground.copy()
        for number in (1, 2):
            image[ids == number] = colors[number - 1]
        images.append(image + rng.integers(0, 8, image.shape))
        masks.append(ids)
    return np.stack(images).astype(np.uint8), np.stack(masks)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("DAVIS"), np.random.default_rng(0)
    (root / "ImageSets" / "2017").mkdir(parents=True)
    for name, frames in {"one": 6, "three": 5, "two": 4}.items():
        images, masks = scene(rng, frames)
        for kind, pictures, suffix in (("JPEGImages", images, "jpg"), ("Annotations", masks, "png")):
            folder = root / kind / "480p" / name
            folder.mkdir(parents=True)
            for t, picture in enumerate(pictures):
                Image.fromarray(picture).save(folder / f"{t:05d}.{suffix}")
    (root / "ImageSets" / "2017" / "val.txt").write_text("one\nthree\ntwo\n")
    return root


def small(**changes):
    return find_preset(Davis(), "vfs").with_options({"resize": "none", "subset": True, "radius": 6.0, **changes})


def test_presets_are_the_published_protocols():
    found = presets(Davis())
    assert list(found) == ["vfs", "crw", "dino"]
    for name, preset in found.items():
        values = {field.name: getattr(preset.options, field.name) for field in dataclasses.fields(propagate.Preset)}
        assert propagate.Preset(**values) == propagate.PRESETS[name]
        assert (preset.options.stage, preset.options.stride) == (DavisOptions().stage, DavisOptions().stride)


def test_it_runs_writes_official_results_and_resumes(data, tmp_path):
    encoder = load("random:resnet18")
    before = {name: tensor.clone() for name, tensor in encoder.backbone.state_dict().items()}
    result = Davis().run(encoder, data, small(), tmp_path)
    assert all(torch.equal(before[name], tensor) for name, tensor in encoder.backbone.state_dict().items())
    assert list(result.metrics)[:3] == ["J&F", "J", "F"]
    assert set(result.items) == {f"{name}_{number}" for name in ("one", "three", "two") for number in (1, 2)}
    assert result.notes == ["3 sequences, not the benchmark's 30"]
    work = next(tmp_path.rglob("davis-vfs"))
    official = davis.evaluate_results(work / "masks", data).summary
    assert result.metrics["J&F"].value == pytest.approx(official["J&F-Mean"], abs=1e-12)
    assert result.metrics["F-Decay"].value == official["F-Decay"]
    assert all((work / file).is_file() for file in result.media.values())
    # A run that was killed keeps whole sequences: a marked one is read again, not made again.
    blank = Image.new("L", (128, 96))
    for path in (work / "masks" / "two").iterdir():
        blank.save(path)
    next(tmp_path.rglob("davis-vfs.json")).unlink()
    again = Davis().run(encoder, data, small(), tmp_path)
    assert again.items["two_1"]["J"] == 0
    assert again.items["one_1"] == result.items["one_1"]


def test_pixels_follow_colors_better_than_copying_the_first_frame(data, tmp_path):
    pixels = Davis().run(load("pixels"), data, small(), tmp_path).metrics["J&F"].value
    copied = []
    for name in ("one", "three", "two"):
        paths = davis.frames(davis.annotations(data) / name, ".png")
        masks = np.stack([np.asarray(Image.open(path)) for path in paths])
        copied += davis.score_sequence(name, masks, masks[:1].repeat(len(masks), 0))
    assert pixels > np.mean([score.jf for score in copied]) + 0.2


def test_wrong_copies_are_refused(data, tmp_path):
    assert "val.txt lacks bike-packing" in Davis().check(data, DavisOptions()).problems
    found = Davis().check(data, DavisOptions(subset=True))
    assert (found.problems, found.items, found.forward_images, found.size) == ((), 3, 15, (480, 640))
    with pytest.raises(UserError, match="JPEGImages and Annotations"):
        Davis().run(load("pixels"), tmp_path, small(), tmp_path / "out")


def measure(rank, data, out):
    result = Davis().run(load("pixels"), data, small(), out)
    (out / f"rank{rank}.json").write_text(json.dumps(result.items))


def test_two_ranks_give_what_one_gives(data, tmp_path):
    measure(0, data, tmp_path)
    one = (tmp_path / "rank0.json").read_text()
    for path in tmp_path.rglob("davis-vfs*"):
        os.rename(path, tmp_path / f"old-{path.name}")
    on_ranks(2, tmp_path / "store", measure, data, tmp_path)
    assert (tmp_path / "rank0.json").read_text() == (tmp_path / "rank1.json").read_text() == one
