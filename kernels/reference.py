"""The specification of every op: plain PyTorch, the same names and arguments, differentiable, any float dtype.

Contrastive losses build the full matrix of logits. InfoNCE: van den Oord et al. 2018 (arXiv 1807.03748), eq. 4. CLIP:
Radford et al. 2021 (arXiv 2103.00020), fig. 3. NT-Xent: Chen et al. 2020 (arXiv 2002.05709), eq. 1.

Photometric augmentation follows ``byol/utils/augmentations.py`` of google-deepmind/deepmind-research (2020) and
``utils/augmentations.py`` of google-deepmind/detcon (2021), which agree. Details that are easily wrong:

- every jitter operation is followed by its own clip to [0, 1], not only the whole jitter;
- brightness adds a delta;
- contrast multiplies about the mean of each channel *at that point of the order*;
- saturation and hue go through HSV, with s multiplied and clipped to [0, 1], and h shifted modulo one turn;
- gray is 0.2989 R + 0.5870 G + 0.1140 B;
- blur is separable and zero-padded ('SAME'), so borders darken;
- the radius of the blur is ``int(height / 10 / 2)`` for any sigma;
- solarize replaces x >= threshold by 1 - x; a last clip to [0, 1] precedes the normalization.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import permutations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import cross_entropy, softplus

__all__ = [
    "attention_pool",
    "batch_norm",
    "clip_loss",
    "info_nce",
    "lit_loss",
    "matryoshka_loss",
    "moco_loss",
    "multi_view_info_nce",
    "normalize",
    "ntxent",
    "photometric",
    "siglip_loss",
    "similarity_lse",
    "supcon_loss",
    "topk_accuracy",
]

GRAY_WEIGHTS = (0.2989, 0.5870, 0.1140)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
ORDERS = tuple(permutations(range(4)))  # lexicographic; 0 brightness, 1 contrast, 2 saturation, 3 hue

# ---- contrastive losses


def similarity_lse(
    q: Tensor, k: Tensor, scale: float | Tensor, *, q_group: Tensor | None = None, k_group: Tensor | None = None
) -> Tensor:
    """Log-sum-exp of ``scale * q @ k.T`` over the keys of another group, (M,). -inf and no gradient without any."""
    logits = scale * q @ k.T
    if q_group is not None and k_group is not None:
        logits = logits.masked_fill(q_group[:, None] == k_group[None], -math.inf)
    return _logsumexp(logits)


def _logsumexp(logits: Tensor) -> Tensor:
    """``logits.logsumexp(1)`` whose gradient is zero, not NaN, for a row of -inf."""
    empty = (logits == -math.inf).all(1)
    return logits.masked_fill(empty[:, None], 0).logsumexp(1).masked_fill(empty, -math.inf)


def info_nce(
    q: Tensor,
    k: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    positive: Tensor | None = None,
    negatives: Tensor | None = None,
    q_group: Tensor | None = None,
    k_group: Tensor | None = None,
    label_smoothing: float = 0.0,
    hard_negatives: float = 0.0,
    debias: float = 0.0,
    decoupled: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """Cross entropy of each positive against the negatives, averaged over a query's positives; see
    ``vito_kernels.info_nce``.
    """
    if negatives is not None:
        others = (q @ negatives.T if negatives.dim() == 2 else (negatives @ q[:, :, None])[:, :, 0]) / temperature
        own = (q * k).sum(1) / temperature
        loss = _logsumexp(others) - own if decoupled else _logsumexp(torch.cat([own[:, None], others], 1)) - own
        return _reduce(loss, reduction)
    logits = q @ k.T / temperature
    rows = torch.arange(len(q), device=q.device)
    positive = (rows if positive is None else positive).long().reshape(len(q), -1)
    excluded = torch.zeros_like(logits, dtype=torch.bool).scatter(1, positive, True)
    if q_group is not None and k_group is not None:
        excluded = excluded | (q_group[:, None] == k_group[None])
    if hard_negatives or debias:
        losses = _reweighted(logits, logits.gather(1, positive), excluded, 1 / temperature, hard_negatives, debias)
        return _reduce(losses.mean(1), reduction)
    negatives = logits.masked_fill(excluded, -math.inf)
    if decoupled:
        loss = _logsumexp(negatives) - logits.gather(1, positive).mean(1)
        return _reduce(loss.masked_fill(excluded.all(1), 0), reduction)
    first = torch.zeros_like(rows)
    columns = [
        cross_entropy(torch.cat([logits[rows, column, None], negatives], 1), first, reduction="none")
        for column in positive.unbind(1)
    ]
    loss = torch.stack(columns).mean(0)
    if label_smoothing:
        loss = cross_entropy(logits, positive[:, 0], label_smoothing=label_smoothing, reduction="none")
    return _reduce(loss, reduction)


def multi_view_info_nce(
    queries: Tensor,
    keys: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    positive_offset: int = 0,
    q_group: Tensor | None = None,
    k_group: Tensor | None = None,
    reduction: str = "sum",
) -> Tensor:
    """``info_nce`` of queries (V, B, D) of each view a over keys (V, N, D) of each view b != a; see
    ``vito_kernels.multi_view_info_nce``.
    """
    views, rows, _ = queries.shape
    options: dict[str, Any] = {"temperature": temperature, "q_group": q_group, "k_group": k_group, "reduction": "none"}
    positive = torch.arange(rows, device=queries.device) + positive_offset
    pairs = permutations(range(views), 2)
    losses = torch.stack([info_nce(queries[a], keys[b], positive=positive, **options) for a, b in pairs])
    return losses if reduction == "none" else losses.mean() if reduction == "mean" else losses.mean(1).sum()


def _reweighted(
    logits: Tensor, positives: Tensor, excluded: Tensor, scale: float | Tensor, beta: float, share: float
) -> Tensor:
    """Robinson et al. 2021 (arXiv 2010.04592), eq. 4 and code; beta = 0 is Chuang et al. 2020 (arXiv 2007.00224), eq.
    8. In logarithms, which do not overflow:

        hard      = n * sum(e^((1 + beta) * logit)) / sum(e^(beta * logit))        over the n negatives
        negatives = max((hard - share * n * e^positive) / (1 - share), n * e^-scale)
        loss      = log(1 + negatives / e^positive)
    """
    empty = excluded.all(1, keepdim=True)
    excluded = excluded & ~empty  # a query without negatives takes any: its loss is set to 0

    def log_sum(factor: float) -> Tensor:
        return (factor * logits).masked_fill(excluded, -math.inf).logsumexp(1, keepdim=True)

    log_n = log_sum(0)
    negatives = hard = log_n + log_sum(1 + beta) - log_sum(beta)
    if share:
        part = math.log(share) + log_n + positives - hard  # the subtrahend over the minuend
        below_one = part.clamp(max=-torch.finfo(part.dtype).eps)
        rest = hard + torch.log(-torch.expm1(below_one)) - math.log1p(-share)
        floor = log_n - scale
        negatives = torch.where(part < 0, torch.maximum(rest, floor), floor)
    return torch.logaddexp(negatives - positives, torch.zeros_like(positives)).masked_fill(empty, 0)


def normalize(x: Tensor) -> Tensor:
    """The rows of x over their Euclidean length, or 1e-12."""
    return torch.nn.functional.normalize(x, dim=1)


def moco_loss(
    q: Tensor, k: Tensor, queue: Tensor, *, temperature: float | Tensor = 0.07, reduction: str = "mean"
) -> Tensor:
    """Query i's positive is k_i, its negatives are the queue (He et al. 2020, arXiv 1911.05722, algorithm 1)."""
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], 1) / temperature
    return cross_entropy(logits, torch.zeros(len(q), dtype=torch.long, device=q.device), reduction=reduction)


def supcon_loss(
    z: Tensor,
    labels: Tensor,
    *,
    keys: Tensor | None = None,
    key_labels: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    reduction: str = "mean",
) -> Tensor:
    """Khosla et al. 2020 (arXiv 2004.11362), eq. 2 (L_out): the mean over rows that have a positive. With keys, rows
    are compared with these instead of each other.
    """
    z = normalize(z)
    if keys is None or key_labels is None:
        logits = (z @ z.T / temperature).fill_diagonal_(-math.inf)
        same = (labels[:, None] == labels[None]).fill_diagonal_(False)
    else:
        logits, same = z @ normalize(keys).T / temperature, labels[:, None] == key_labels
    log_p = (logits - logits.logsumexp(1, keepdim=True)).masked_fill(~same, 0)
    count = same.sum(1)
    loss = -log_p.sum(1) / count.clamp(min=1)
    return loss.sum() / (count > 0).sum().clamp(min=1) if reduction == "mean" else _reduce(loss, reduction)


def clip_loss(x: Tensor, y: Tensor, scale: float | Tensor) -> Tensor:
    """Mean of the cross entropies of x's rows against y's and of y's rows against x's; row i belongs to row i."""
    logits = scale * x @ y.T
    labels = torch.arange(len(x), device=x.device)
    return (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2


def siglip_loss(
    x: Tensor, y: Tensor, scale: float | Tensor, bias: float | Tensor = 0.0, *, reduction: str = "mean"
) -> Tensor:
    """Zhai et al. 2023 (arXiv 2303.15343), algorithm 1: a binary question for every pair, summed over the columns."""
    logits = scale * x @ y.T + bias
    sign = 2 * torch.eye(len(x), dtype=logits.dtype, device=x.device) - 1
    return _reduce(softplus(-sign * logits, threshold=50).sum(1), reduction)


def topk_accuracy(
    q: Tensor,
    k: Tensor,
    topk: Sequence[int] = (1, 5),
    *,
    positive: Tensor | None = None,
    q_group: Tensor | None = None,
    k_group: Tensor | None = None,
) -> Tensor:
    """Shares of queries with fewer than n keys more similar than the positive, for each n of ``topk``."""
    s = q @ k.T
    columns = (torch.arange(len(q), device=q.device) if positive is None else positive).long().reshape(len(q), 1)
    own = s.gather(1, columns)
    if q_group is not None and k_group is not None:
        s = s.masked_fill(q_group[:, None] == k_group[None], -math.inf)
    rank = (s > own).sum(1)
    return torch.stack([(rank < n).to(s.dtype).mean() for n in topk])


def matryoshka_loss(
    loss: Callable[..., Tensor],
    embeddings: Sequence[Tensor],
    widths: Sequence[int],
    *,
    weights: Sequence[float] | None = None,
) -> Tensor:
    """Kusupati et al. 2022 (arXiv 2205.13147), eq. 1: the loss of each prefix, normalized, summed."""
    factors = [1.0] * len(widths) if weights is None else weights
    terms = [w * loss(*(normalize(x[:, :n]) for x in embeddings)) for n, w in zip(widths, factors, strict=True)]
    return torch.stack(terms).sum(0)


def lit_loss(locked: Tensor, y: Tensor, scale: float | Tensor) -> Tensor:
    """``clip_loss`` whose first tower is locked (Zhai et al. 2022, arXiv 2111.07991)."""
    return clip_loss(locked.detach(), y, scale)


def ntxent(
    z1: Tensor, z2: Tensor, temperature: float | Tensor, *, decoupled: bool = False, reduction: str = "mean"
) -> Tensor:
    """Each of the 2B embeddings, normalized, against all others; its positive is the other view of its sample."""
    z = normalize(torch.cat([z1, z2]))
    logits, partner = z @ z.T / temperature, torch.arange(len(z), device=z.device).roll(len(z1))
    if decoupled:  # Yeh et al. 2021 (arXiv 2110.06848), eq. 6
        own = torch.eye(len(z), dtype=torch.bool, device=z.device)
        loss = _logsumexp(logits.masked_fill(own | own[partner], -math.inf)) - logits.gather(1, partner[:, None])[:, 0]
        return _reduce(loss.masked_fill(loss == -math.inf, 0), reduction)
    return cross_entropy(logits.fill_diagonal_(-math.inf), partner, reduction=reduction)


def _reduce(loss: Tensor, reduction: str) -> Tensor:
    return loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()


# ---- attention pooling and batch norm


def attention_pool(features: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted mean over all locations: ``weights = softmax(logits)``, ``pooled = sum_l weights_l features_l``.

    Args:
        features: (B, L, C), or (B, C, H, W) with L = H * W in row-major order.
        logits: (B, L), one score per location.

    Returns:
        ``pooled`` (B, C) in the features' dtype and ``weights`` (B, L). Softmax and sum run in float32, or in float64
        if either input is float64; the weights keep that dtype.
    """
    if features.ndim == 4:
        features = features.flatten(2).transpose(1, 2)
    dtype = torch.promote_types(torch.promote_types(features.dtype, logits.dtype), torch.float32)
    weights = torch.softmax(logits.to(dtype), dim=1)
    pooled = torch.einsum("bl,blc->bc", weights, features.to(dtype))
    return pooled.to(features.dtype), weights


def batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    *,
    momentum: float,
    eps: float,
    residual: Tensor | None = None,
    relu: bool = False,
    groups: int = 1,
) -> Tensor:
    """``y = (x - mean) / sqrt(var + eps) * weight + bias [+ residual]``, then ``max(y, 0)`` with ``relu``.

    Mean and biased variance of each of the C channels of x, (B, C) or (B, C, H, W), over all else. The running
    statistics move by ``momentum`` towards the mean and the unbiased variance. All in float32, or in float64 if x is
    float64; y has the dtype of x. ``groups``: consecutive equal shares of the batch, normalized one after the other.
    """
    if groups > 1:
        running = running_mean, running_var
        residuals = [None] * groups if residual is None else residual.chunk(groups)
        return torch.cat(
            [
                batch_norm(share, weight, bias, *running, momentum=momentum, eps=eps, residual=last, relu=relu)
                for share, last in zip(x.chunk(groups), residuals, strict=True)
            ]
        )
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    rows = wide.movedim(1, -1).flatten(0, -2)
    mean, var = rows.mean(0), rows.var(0, correction=0)
    with torch.no_grad():
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(rows.var(0), momentum)
    z = ((rows - mean) * (var + eps).rsqrt() * weight + bias).view(wide.movedim(1, -1).shape).movedim(-1, 1)
    z = z if residual is None else z + residual
    return (torch.relu(z) if relu else z).to(x.dtype)


# ---- photometric augmentation


def photometric(
    images: Tensor,
    params: Tensor,
    *,
    kernel_size: int | None = None,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Jitter, gray, blur, solarize and normalize each image by its own row of parameters.

    Args:
        images: (B, H, W, 3) uint8.
        params: (B, 8), columns as in ``from vito_kernels.photometric import PARAMS``.
        kernel_size: odd number of taps of the blur; by default ``2 * int(H / 10 / 2) + 1``.
        mean, std: per-channel normalization, in units of [0, 1] intensities.
        dtype: of the result. Arithmetic is in float64 if it is float64, else in float32.

    Returns:
        (B, 3, H, W), channels_last.
    """
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    radius = (kernel_size - 1) // 2 if kernel_size is not None else int(images.shape[1] / 10 / 2)
    out = [
        _augment(image.to(compute) / 255, row.to(compute), radius) for image, row in zip(images, params, strict=True)
    ]
    x = torch.stack(out) if out else images.to(compute)
    x = (x - x.new_tensor(mean)) / x.new_tensor(std)
    return x.to(dtype).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)


def _augment(x: Tensor, row: Tensor, radius: int) -> Tensor:
    """One image (H, W, 3) in [0, 1] through everything but the normalization."""
    brightness, contrast, saturation, hue, order, gray, sigma, threshold = row
    jitter = (
        lambda x: x + brightness,
        lambda x: adjust_contrast(x, contrast),
        lambda x: adjust_saturation(x, saturation),
        lambda x: adjust_hue(x, hue),
    )
    for operation in ORDERS[int(order)] if order >= 0 else ():
        x = jitter[operation](x).clamp(0, 1)
    if gray:
        x = (x @ x.new_tensor(GRAY_WEIGHTS))[..., None].expand(x.shape).clamp(0, 1)
    if sigma > 0:
        x = gaussian_blur(x, sigma, radius)
    return torch.where(x < threshold, x, 1 - x).clamp(0, 1)


def adjust_contrast(x: Tensor, factor: Tensor) -> Tensor:
    mean = x.mean(dim=(0, 1))
    return factor * (x - mean) + mean


def adjust_saturation(x: Tensor, factor: Tensor) -> Tensor:
    h, s, v = rgb_to_hsv(x)
    return hsv_to_rgb(h, (s * factor).clamp(0, 1), v)


def adjust_hue(x: Tensor, turns: Tensor) -> Tensor:
    h, s, v = rgb_to_hsv(x)
    return hsv_to_rgb((h + turns) % 1, s, v)


def rgb_to_hsv(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(H, W, 3) to hue in turns [0, 1), saturation and value, each (H, W). A gray pixel has hue 0."""
    r, g, b = x.unbind(-1)
    v = x.amax(-1)
    chroma = v - x.amin(-1)
    s = torch.where(v > 0, chroma / v, 0)
    sixth = 1 / (6 * chroma)
    h = torch.where(r == v, sixth * (g - b), torch.where(g == v, sixth * (b - r) + 1 / 3, sixth * (r - g) + 2 / 3))
    h = torch.where(chroma > 0, h, 0)
    return torch.where(h < 0, h + 1, h), s, v


def hsv_to_rgb(h: Tensor, s: Tensor, v: Tensor) -> Tensor:
    """Inverse of :func:`rgb_to_hsv`: each channel is v minus chroma times a trapezoid of the hue."""
    chroma = s * v
    distance = [(6 * h + offset) % 6 for offset in (5, 3, 1)]  # from the hue opposite to red, green, blue
    return torch.stack([v - chroma * torch.minimum(d, 4 - d).clamp(0, 1) for d in distance], -1)


def gaussian_blur(x: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """Separable Gaussian of 2 * radius + 1 taps over the (H, W) of (H, W, 3), zeros beyond the border."""
    offsets = torch.arange(-radius, radius + 1, dtype=x.dtype, device=x.device)
    taps = torch.exp(-(offsets**2) / (2 * sigma**2))
    taps = (taps / taps.sum()).expand(3, 1, -1)
    planes = x.permute(2, 0, 1)[None]
    planes = F.conv2d(planes, taps[:, :, None, :], padding=(0, radius), groups=3)
    planes = F.conv2d(planes, taps[:, :, :, None], padding=(radius, 0), groups=3)
    return planes[0].permute(1, 2, 0)
