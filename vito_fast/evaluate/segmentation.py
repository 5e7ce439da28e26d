"""Semantic segmentation's metrics: intersection over union from one confusion matrix over all images.

Source: Long et al., "Fully Convolutional Networks for Semantic Segmentation" (2015). Traps: mIoU is the mean over
classes of one matrix, never a mean over images; the ignored label (255) is no class; a class that is in neither truth
nor prediction has no score and does not count as zero.
"""

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

IGNORE = 255
"""The label of pixels that no metric reads. In ADE20K's own files that is 0: see ``reduce_zero_label``."""


def confusion_matrix(truth: Tensor, prediction: Tensor, classes: int, *, ignore: int = IGNORE) -> Tensor:
    """Counts of pixels by true class (row) and predicted class (column).

    Args:
        truth: integer labels of any shape.
        prediction: integer labels of the same shape, below ``classes``.
        classes: number of classes.
        ignore: the true label to leave out.

    Returns:
        (classes, classes) int64 on the inputs' device. Matrices of images and of ranks add up. Exact.

    Raises:
        ValueError: for shapes that differ or a label that is no class, which is named.
    """
    if truth.shape != prediction.shape:
        raise ValueError(f"truth {tuple(truth.shape)} and prediction {tuple(prediction.shape)} must have one shape")
    kept = truth != ignore
    rows, columns = truth[kept].long(), prediction[kept].long()
    for name, labels in (("truth", rows), ("prediction", columns)):
        if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
            raise ValueError(
                f"{name} has labels {int(labels.min())} to {int(labels.max())}, there are {classes} classes"
            )
    return torch.bincount(rows * classes + columns, minlength=classes**2).view(classes, classes)


def reduce_zero_label(labels: Tensor) -> Tensor:
    """ADE20K's labels 1 to 150 as classes 0 to 149, and its 0 ("other") as ignored. uint8 in, uint8 out."""
    return torch.where((labels == 0) | (labels == IGNORE), IGNORE, labels.int() - 1).to(torch.uint8)


def iou(confusion: ArrayLike | Tensor) -> NDArray[np.float64]:
    """Intersection over union of each class, (classes,) float64; NaN for one in neither truth nor prediction."""
    matrix = _square(confusion)
    both = np.diag(matrix)
    union = matrix.sum(0) + matrix.sum(1) - both
    return np.divide(both, union, out=np.full(len(matrix), np.nan), where=union > 0)


def mean_iou(confusion: ArrayLike | Tensor) -> float:
    """The mean of :func:`iou` over the classes that have one. NaN if none has.

    Args:
        confusion: (classes, classes) counts, rows by truth and columns by prediction, over all images.
    """
    values = iou(confusion)
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else float("nan")


def pixel_accuracy(confusion: ArrayLike | Tensor) -> float:
    """The fraction of pixels with the right class. NaN without any pixel."""
    matrix = _square(confusion)
    return float(np.trace(matrix) / matrix.sum()) if matrix.sum() else float("nan")


def _square(confusion: ArrayLike | Tensor) -> NDArray[np.float64]:
    matrix = np.asarray(confusion.cpu() if isinstance(confusion, Tensor) else confusion, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"a confusion matrix is square, not {matrix.shape}")
    return matrix
