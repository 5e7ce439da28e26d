"""PASCAL VOC and ADE20K end to end on tiny copies in the benchmarks' layouts, written here."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from vito_fast.evaluate.encoders import load
from vito_fast.evaluate.segmentation import mean_iou
from vito_fast.evaluate.segmentation_task import (
    Ade20k,
    Pascal,
    SegmentationModel,
    SegmentationOptions,
    TrainCrops,
    bootstrap_error,
)
from vito_fast.evaluate.task import find_preset

COLORS = {1: (220, 40, 40), 2: (40, 200, 60)}
"""Of the two objects that the pictures show; a disc is class 1 and a square is class 2."""


def picture(rng):
    """An image (48,64,3) and its labels: 0 background, 1 and 2 the objects, 255 around them."""
    image = rng.normal(110, 12, (48, 64, 3))
    labels = np.zeros((48, 64), np.uint8)
    y, x = np.mgrid[:48, :64]
    for label, left in ((1, 0), (2, 32)):
        cy, cx, r = rng.integers(16, 32), left + rng.integers(12, 20), rng.integers(9, 13)
        distance = np.hypot(y - cy, x - cx) if label == 1 else np.maximum(abs(y - cy), abs(x - cx))
        labels[distance < r + 1] = 255
        labels[distance < r] = label
        image[distance < r] = np.array(COLORS[label]) + rng.normal(0, 8, (int((distance < r).sum()), 3))
    return image.clip(0, 255).astype(np.uint8), labels


def write(image, labels, image_path, labels_path):
    for path in (image_path, labels_path):
        path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(image_path, quality=95)
    indexed = Image.fromarray(labels)
    if image_path.parent.name == "JPEGImages":
        indexed = indexed.convert("P")
        indexed.putpalette(list(range(255)) + [0] * 513)
    indexed.save(labels_path)


@pytest.fixture(scope="module")
def voc(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("voc"), np.random.default_rng(0)
    for kind, count, folder in (("train_aug", 10, "SegmentationClassAug"), ("val", 4, "SegmentationClass")):
        names = [f"2007_{kind[0]}{i:03d}" for i in range(count)]
        for name in names:
            image, labels = picture(rng)
            write(image, labels, root / "JPEGImages" / f"{name}.jpg", root / folder / f"{name}.png")
        path = root / "ImageSets" / "Segmentation" / f"{kind}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [f"/JPEGImages/{n}.jpg /SegmentationClassAug/{n}.png" if kind != "val" else n for n in names]
        path.write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture(scope="module")
def ade(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("ade"), np.random.default_rng(1)
    for kind, count in (("training", 6), ("validation", 2)):
        for i in range(count):
            image, labels = picture(rng)
            shifted = np.where(labels == 255, 0, labels + 1).astype(np.uint8)  # ADE20K's own: 0 is "other"
            stem = f"ADE_{kind[:3]}_{i:08d}"
            write(image, shifted, root / "images" / kind / f"{stem}.jpg", root / "annotations" / kind / f"{stem}.png")
    return root


def small(task, preset, **more):
    changes = {"crop": 48, "batch_size": 5, "epochs": 10, "lr": 0.05, "scales": (0.8, 1.2), "subset": True, "stride": 8}
    changes |= {"photometric": False, "test_short": 0}
    return find_preset(task, preset).with_options(changes | more)


def test_pascal_is_learned(voc, tmp_path):
    result = Pascal().run(load("random:resnet18"), voc, small(Pascal(), "fcn", epochs=20), tmp_path)
    assert result.metrics["miou"].value > 0.8
    assert 0 < result.metrics["miou"].standard_error < 0.2
    assert result.metrics["pixel_accuracy"].value > 0.9
    scored = {name for name, scores in result.groups.items() if scores["iou"] is not None}
    assert scored == {"background", "aeroplane", "bicycle"}
    assert len(result.items) == 4
    assert result.notes[:2] == [
        "10 training images, and the benchmark has 10,582",
        "4 validation images, and the benchmark has 1,449",
    ]
    assert all((next(tmp_path.rglob(name))).is_file() for name in result.media.values())


def test_ade20k_leaves_label_0_out(ade, tmp_path):
    result = Ade20k().run(
        load("random:resnet18"), ade, small(Ade20k(), "linear", lr=1.0, epochs=16, stride=4), tmp_path
    )
    scored = {name for name, scores in result.groups.items() if scores["iou"] is not None}
    assert {"class 1", "class 2", "class 3"} <= scored
    assert result.metrics["pixel_accuracy"].value > 0.85


def test_counts_give_the_confusion_matrix_s_score():
    rng = np.random.default_rng(0)
    matrices = rng.integers(0, 50, (6, 4, 4))
    counts = np.stack([[np.diag(m), m.sum(1), m.sum(0)] for m in matrices])
    total = counts.sum(0)
    assert np.mean(total[0] / (total[1] + total[2] - total[0])) == pytest.approx(mean_iou(matrices.sum(0)))
    assert bootstrap_error(np.repeat(counts[:1], 5, 0)) == pytest.approx(0, abs=1e-12)  # equal images: no doubt
    assert bootstrap_error(counts) > 0.005


def test_the_fcn_is_mocos():
    """ResNet-50's conv5 with dilation 2 and stride 1; 2 x (3 x 3, 256, dilation 6); stride 16."""
    model = SegmentationModel(load("random:resnet50"), 21, SegmentationOptions())
    convs = [m for m in model.backbone.get_submodule("layer4").modules() if isinstance(m, nn.Conv2d)]
    assert {(m.dilation, m.stride, m.padding) for m in convs if m.kernel_size == (3, 3)} == {((2, 2), (1, 1), (2, 2))}
    assert {m.stride for m in convs} == {(1, 1)}
    assert [m.dilation[0] for m in model.head if isinstance(m, nn.Conv2d)] == [6, 6, 1]
    with torch.no_grad():
        assert model.backbone(torch.zeros(1, 3, 64, 64))[-1].shape == (1, 2048, 4, 4)
        assert model.eval().logits(torch.zeros(1, 3, 50, 70, dtype=torch.uint8)).shape == (1, 21, 50, 70)


def test_crops_move_image_and_labels_together(voc):
    train, _ = Pascal().pairs(voc)
    options = SegmentationOptions(crop=80, scales=(0.5, 2.0))
    crops = TrainCrops(train, options, Pascal().read_labels, (0.5, 0.5, 0.5))
    for number in range(12):
        image, labels = crops.sample(number % 10, np.random.default_rng(number))
        assert (image.shape, labels.shape) == ((3, 80, 80), (80, 80))
        for label, color in COLORS.items():
            inside = labels == label
            if inside.sum() > 50:
                shown = image[:, inside].float().mean(1)
                assert (shown - torch.tensor(color)).abs().max() < 30
    again = crops.sample(3, np.random.default_rng(3))
    assert torch.equal(again[0], crops.sample(3, np.random.default_rng(3))[0])


def test_wrong_copies_are_one_line(voc, ade, tmp_path):
    options = SegmentationOptions(subset=True)
    assert Pascal().check(voc, options).problems == ()
    assert Pascal().check(voc, SegmentationOptions()).problems[0].startswith("10 training images")
    assert "give the folder VOCdevkit/VOC2012" in Pascal().check(tmp_path, options).problems[0]
    assert "give the folder ADEChallengeData2016" in Ade20k().check(tmp_path, options).problems[0]
    (tmp_path / "ImageSets" / "Segmentation").mkdir(parents=True)
    assert "get SBD's labels" in Pascal().check(tmp_path, options).problems[0]
    (tmp_path / "SegmentationClassAug").mkdir()
    assert "has no train_aug.txt" in Pascal().check(tmp_path, options).problems[0]
    path = next((ade / "annotations" / "validation").glob("*.png"))
    kept = path.read_bytes()
    labels = np.array(Image.open(path))
    for wrong, message in {
        "reduced": "zero was reduced before",
        "high": "has label 200, and the benchmark's labels end at 150",
        "color": "is a RGB image; labels are palette or gray",
    }.items():
        for other in (ade / "annotations" / "validation").glob("*.png"):
            changed = {"reduced": labels - 1, "high": labels + 199 * (labels == 1), "color": np.stack([labels] * 3, 2)}
            Image.fromarray(changed[wrong].astype(np.uint8)).save(other)
        assert message in Ade20k().check(ade, options).problems[0]
    for other in (ade / "annotations" / "validation").glob("*.png"):
        other.write_bytes(kept)
    path.unlink()
    assert "is missing: the lists name it" in Ade20k().check(ade, options).problems[0]
    path.write_bytes(kept)
