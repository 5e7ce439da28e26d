"""Alignment of saliency maps with human ones, by ClickMe's protocol.

Source: Fel et al., "Harmonizing the object recognition strategies of deep neural networks with humans" (2022). The
published score is of the *gradient*: the maximum over colors of |d class logit / d input|. Its Spearman correlation
with the human map is divided by the correlation among humans. Traps: an attention map's correlation is another number
and has another name here; a center prior beats most attention maps and is always reported; the official pipeline
blurs the human map with a kernel of even size, and drops the last incomplete batch of 64; a constant map has no rank
correlation, and is counted instead of scored.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata
from torch import Tensor

CEILING = 0.65753
"""The mean Spearman correlation among humans on ClickMe, as published."""
BATCH = 64


@dataclass(frozen=True)
class Alignment:
    """Agreement of maps with human maps.

    Args:
        score: the mean correlation over the ceiling. NaN if no map has a correlation.
        correlation: the mean correlation.
        correlations: of each map, NaN for constant ones.
        constant: number of constant maps, which are in no mean.
    """

    score: float
    correlation: float
    correlations: NDArray[np.float64]
    constant: int


def spearman(first: ArrayLike, second: ArrayLike) -> float:
    """Spearman's rank correlation of two maps of one shape, ties at their mean rank. NaN if one is constant."""
    a, b = np.asarray(first), np.asarray(second)
    if a.shape != b.shape or not a.size:
        raise ValueError(f"two maps of one shape, not {a.shape} and {b.shape}")
    if not (np.isfinite(a).all() and np.isfinite(b).all()) or a.min() == a.max() or b.min() == b.max():
        return float("nan")
    ranks = np.stack([rankdata(a.ravel()), rankdata(b.ravel())])
    ranks -= ranks.mean(1, keepdims=True)
    return float(ranks[0] @ ranks[1] / np.sqrt((ranks[0] @ ranks[0]) * (ranks[1] @ ranks[1])))


def alignment(maps: ArrayLike | Tensor, human: ArrayLike | Tensor, *, ceiling: float = CEILING) -> Alignment:
    """Agreement of maps with human maps.

    Args:
        maps: (N, H, W) saliency, any scale.
        human: (N, H, W) likewise.
        ceiling: the correlation among humans; ClickMe's by default.
    """
    a, b = (np.asarray(x.detach().cpu() if isinstance(x, Tensor) else x) for x in (maps, human))
    if a.shape != b.shape or a.ndim != 3:
        raise ValueError(f"maps must be two (N, H, W), not {a.shape} and {b.shape}")
    values = np.array([spearman(x, y) for x, y in zip(a, b, strict=True)], dtype=np.float64)
    scored = values[~np.isnan(values)]
    mean = float(scored.mean()) if len(scored) else float("nan")
    return Alignment(mean / ceiling, mean, values, int(np.isnan(values).sum()))


def gradient_saliency(logits: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> Tensor:
    """max over colors of |d logit of the label / d image|.

    Args:
        logits: normalized images (B, 3, H, W) -> (B, classes), differentiable, in eval mode.
        images: (B, 3, H, W), normalized.
        labels: (B,) int64.

    Returns:
        (B, H, W) float32.
    """
    with torch.enable_grad():
        inputs = images.detach().float().requires_grad_(True)
        # Images do not meet in eval mode, so the sum's gradient holds each image's own.
        chosen = logits(inputs).gather(1, labels[:, None]).sum()
        (gradient,) = torch.autograd.grad(chosen, inputs)
    return gradient.abs().amax(1).float()


def human_map(heatmap: Tensor) -> Tensor:
    """ClickMe's treatment of a human map: 256 -> 64, blurred by a 10 x 10 kernel of sigma 10, -> 224.

    Args:
        heatmap: (N, 256, 256), any dtype.

    Returns:
        (N, 224, 224) float32. Resizing is bilinear without antialiasing; the blur pads zeros, 4 before and 5 behind.
    """
    small = F.interpolate(heatmap.float()[:, None], (64, 64), mode="bilinear", align_corners=False)
    x = torch.arange(-5.0, 5)
    across, down = (-(axis**2) / 200 for axis in (x, x.flip(0)))  # the official kernel counts rows downward
    kernel = (down[:, None] + across).exp()
    blurred = F.conv2d(F.pad(small, (4, 5, 4, 5)), (kernel / kernel.sum())[None, None])
    return F.interpolate(blurred, (224, 224), mode="bilinear", align_corners=False)[:, 0]


def center_prior(height: int, width: int) -> Tensor:
    """The map that any saliency must beat: minus the distance to the center, in half sides, (H, W) float32."""
    y = torch.linspace(-1, 1, height)[:, None] if height > 1 else torch.zeros(1, 1)
    x = torch.linspace(-1, 1, width) if width > 1 else torch.zeros(1)
    return -(y**2 + x**2).sqrt()
