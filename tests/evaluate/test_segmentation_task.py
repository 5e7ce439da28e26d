"""PASCAL VOC and ADE20K: the network, crops, scores and wrong copies. test_finetune_tasks.py trains on them."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import MASK_COLORS
from torch import nn

from vito_fast.evaluate.encoders import load
from vito_fast.evaluate.result import deviation
from vito_fast.evaluate.segmentation import mean_iou
from vito_fast.evaluate.segmentation_task import (
    Ade20k,
    Pascal,
    SegmentationModel,
    SegmentationOptions,
    TrainCrops,
    resampled_miou,
)


@pytest.fixture
def voc(copies):
    return copies["pascal"]


@pytest.fixture
def ade(copies):
    return copies["ade20k"]


def test_counts_give_the_confusion_matrix_s_score():
    rng = np.random.default_rng(0)
    matrices = rng.integers(0, 50, (6, 4, 4))
    counts = np.stack([[np.diag(m), m.sum(1), m.sum(0)] for m in matrices])
    total = counts.sum(0)
    assert np.mean(total[0] / (total[1] + total[2] - total[0])) == pytest.approx(mean_iou(matrices.sum(0)))
    assert deviation(resampled_miou(np.repeat(counts[:1], 5, 0))) == pytest.approx(
        0, abs=1e-12
    )  # equal images: no doubt
    assert deviation(resampled_miou(counts)) > 0.005


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
        image, labels = crops.sample(number % 8, np.random.default_rng(number))
        assert (image.shape, labels.shape) == ((3, 80, 80), (80, 80))
        for label, color in MASK_COLORS.items():
            inside = labels == label
            if inside.sum() > 50:
                shown = image[:, inside].float().mean(1)
                assert (shown - torch.tensor(color)).abs().max() < 30
    again = crops.sample(3, np.random.default_rng(3))
    assert torch.equal(again[0], crops.sample(3, np.random.default_rng(3))[0])


def test_wrong_copies_are_one_line(voc, ade, tmp_path):
    options = SegmentationOptions(subset=True)
    assert Pascal().check(voc, options).problems == ()
    assert Pascal().check(voc, SegmentationOptions()).problems[0].startswith("8 training images")
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
