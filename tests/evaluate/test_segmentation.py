"""mIoU against known values, a count by hand and torchmetrics' definition."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vito_fast.evaluate import segmentation


def g4():
    n, i, j = np.meshgrid(np.arange(3), np.arange(24), np.arange(32), indexing="ij")
    truth = (i // 6 + j // 8 + n) % 4
    prediction = np.where((7 * i + 3 * j + 5 * n) % 10 < 7, truth, (i + 2 * j + n) % 5)
    truth = np.where((32 * i + j + n) % 17 == 0, 255, truth)
    return torch.tensor(truth), torch.tensor(prediction)


def test_one_matrix_over_all_images():
    truth, prediction = g4()
    confusion = sum(segmentation.confusion_matrix(t, p, 5) for t, p in zip(truth, prediction, strict=True))
    expected = [0.653481012658, 0.639191290824, 0.634259259259, 0.647335423197, 0]
    assert segmentation.iou(confusion).tolist() == pytest.approx(expected, abs=1e-12)
    assert segmentation.mean_iou(confusion) == pytest.approx(0.5148533971878482, abs=1e-15)
    assert segmentation.pixel_accuracy(confusion) == pytest.approx(0.7601476014760148, abs=1e-15)
    each = [
        segmentation.mean_iou(segmentation.confusion_matrix(t, p, 5)) for t, p in zip(truth, prediction, strict=True)
    ]
    assert np.mean(each) == pytest.approx(0.5149107966780381)  # the mean over images is another number


@given(st.integers(0, 2**32 - 1), st.integers(1, 7), st.integers(0, 60))
def test_counts_by_hand(seed, classes, pixels):
    rng = np.random.default_rng(seed)
    truth = rng.choice([*range(classes), 255], pixels)
    prediction = rng.integers(0, classes, pixels)
    confusion = segmentation.confusion_matrix(torch.tensor(truth), torch.tensor(prediction), classes)
    scores = []
    for c in range(classes):
        kept = truth != 255
        union = ((truth == c) | (prediction == c)) & kept
        if union.any():
            scores.append(((truth == c) & (prediction == c)).sum() / union.sum())
    found = segmentation.mean_iou(confusion.numpy())
    assert found == pytest.approx(np.mean(scores)) if scores else np.isnan(found)
    perfect = segmentation.confusion_matrix(
        torch.tensor(truth), torch.tensor(np.where(truth == 255, 0, truth)), classes
    )
    if (truth != 255).any():
        assert segmentation.mean_iou(perfect) == segmentation.pixel_accuracy(perfect) == 1


def test_ade20k_zero_is_ignored():
    labels = torch.tensor([0, 1, 150, 255], dtype=torch.uint8)
    assert segmentation.reduce_zero_label(labels).tolist() == [255, 0, 149, 255]


def test_labels_that_are_no_class():
    with pytest.raises(ValueError, match="truth has labels 0 to 7, there are 5"):
        segmentation.confusion_matrix(torch.tensor([0, 7]), torch.tensor([0, 0]), 5)
    with pytest.raises(ValueError, match="prediction has labels -1"):
        segmentation.confusion_matrix(torch.tensor([0, 1]), torch.tensor([-1, 0]), 5)
    with pytest.raises(ValueError, match="one shape"):
        segmentation.confusion_matrix(torch.zeros(2, 3), torch.zeros(3, 2), 5)
    with pytest.raises(ValueError, match="square"):
        segmentation.mean_iou(np.zeros((2, 3)))
    assert np.isnan(segmentation.mean_iou(np.zeros((3, 3))))
