"""Nearest neighbors among the frames of other clips: accuracy with an error bar, and baselines without a network.

Pure functions of tensors. The frames of one clip are not independent, so the standard error is that of the mean over
clips.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

NEIGHBORS = 5
BINS = 4
"""Levels of each color channel in a histogram."""
THUMBNAIL = 16
"""Side of the frames that the pixel baseline compares."""


class Accuracy(NamedTuple):
    """A share of frames, 0 to 1, and its standard error over clips."""

    value: float
    error: float


def knn_accuracy(features: Tensor, labels: Tensor, clips: Tensor, k: int = NEIGHBORS) -> Accuracy:
    """Classify each frame by its ``k`` nearest neighbors, by cosine, among the frames of other clips.

    The most frequent label wins; of equally frequent ones that of the larger summed cosine. Deterministic.

    Args:
        features: (N, D) floating point; a zero row has cosine 0 with all.
        labels: (N,) int64 from 0.
        clips: (N,) int64; a frame never meets one of its own clip.
        k: Neighbors that vote; fewer if a frame has fewer candidates.

    Returns:
        The mean over clips of the share of right frames. NaN for features that are not finite.

    Raises:
        ValueError: lengths that differ, or frames of fewer than two clips.
    """
    if not len(features) == len(labels) == len(clips):
        raise ValueError(f"{len(features)} features, {len(labels)} labels and {len(clips)} clips: must be as many")
    _, clip = clips.unique(return_inverse=True)
    sizes = clip.bincount()
    if len(sizes) < 2:
        raise ValueError(f"frames of {len(sizes)} clips: at least 2 are needed")
    if not torch.isfinite(features).all():
        return Accuracy(math.nan, math.nan)
    rows = F.normalize(features.float(), dim=1)
    similarity = (rows @ rows.T).masked_fill(clip[:, None] == clip, -torch.inf)
    cosine, nearest = similarity.topk(min(k, len(rows) - int(sizes.max())), dim=1)
    votes = rows.new_zeros(len(rows), int(labels.max()) + 1)
    votes.scatter_add_(1, labels[nearest], 1 + cosine / (8 * k))  # the sum of cosines only breaks ties
    right = (votes.argmax(1) == labels).double()
    share = torch.zeros(len(sizes), dtype=torch.float64, device=right.device).scatter_add_(0, clip, right) / sizes
    return Accuracy(share.mean().item(), (share.std() / math.sqrt(len(sizes))).item())


def color_histogram(images: Tensor, bins: int = BINS) -> Tensor:
    """Square roots of the joint histogram of colors; their cosine is the Bhattacharyya coefficient.

    Args:
        images: (N, 3, H, W) in [0, 1].
        bins: Levels of each channel.

    Returns:
        (N, bins**3) float32, rows of unit length.
    """
    level = (images * bins).long().clamp(0, bins - 1)
    color = ((level[:, 0] * bins + level[:, 1]) * bins + level[:, 2]).flatten(1)
    counts = torch.zeros(len(images), bins**3, device=images.device)
    counts.scatter_add_(1, color, torch.ones_like(color, dtype=counts.dtype))
    return (counts / color.shape[1]).sqrt()


def thumbnails(images: Tensor, side: int = THUMBNAIL) -> Tensor:
    """Pixels of images (N, 3, H, W) averaged to ``side`` x ``side``, less their mean over the N: (N, 3 side^2)."""
    small = F.adaptive_avg_pool2d(images.float(), side).flatten(1)
    return small - small.mean(0)
