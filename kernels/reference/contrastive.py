"""The contrastive losses over the full matrix of logits.

Sources: InfoNCE: van den Oord et al. 2018 (arXiv 1807.03748), eq. 4. CLIP: Radford et al. 2021 (arXiv 2103.00020),
fig. 3. NT-Xent: Chen et al. 2020 (arXiv 2002.05709), eq. 1.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


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
    q_group: Tensor | None = None,
    k_group: Tensor | None = None,
    label_smoothing: float = 0.0,
    hard_negatives: float = 0.0,
    debias: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Cross entropy of each positive against the negatives, averaged over a query's positives; see
    ``vito_kernels.info_nce``.
    """
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
    losses = torch.stack(
        [
            info_nce(queries[a], keys[b], positive=positive, **options)
            for a in range(views)
            for b in range(views)
            if a != b
        ]
    )
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


def supcon_loss(z: Tensor, labels: Tensor, *, temperature: float | Tensor = 0.1, reduction: str = "mean") -> Tensor:
    """Khosla et al. 2020 (arXiv 2004.11362), eq. 2 (L_out): the mean over rows that have a positive."""
    z = normalize(z)
    logits = (z @ z.T / temperature).fill_diagonal_(-math.inf)
    same = (labels[:, None] == labels[None]).fill_diagonal_(False)
    log_p = (logits - logits.logsumexp(1, keepdim=True)).masked_fill(~same, 0)
    count = same.sum(1)
    loss = -log_p.sum(1) / count.clamp(min=1)
    return loss.sum() / (count > 0).sum().clamp(min=1) if reduction == "mean" else _reduce(loss, reduction)


def clip_loss(x: Tensor, y: Tensor, scale: float | Tensor) -> Tensor:
    """Mean of the cross entropies of x's rows against y's and of y's rows against x's; row i belongs to row i."""
    logits = scale * x @ y.T
    labels = torch.arange(len(x), device=x.device)
    return (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2


def lit_loss(locked: Tensor, y: Tensor, scale: float | Tensor) -> Tensor:
    """``clip_loss`` whose first tower is locked (Zhai et al. 2022, arXiv 2111.07991)."""
    return clip_loss(locked.detach(), y, scale)


def ntxent(z1: Tensor, z2: Tensor, temperature: float | Tensor, *, reduction: str = "mean") -> Tensor:
    """Each of the 2B embeddings, normalized, against all others; its positive is the other view of its sample."""
    z = normalize(torch.cat([z1, z2]))
    logits = (z @ z.T / temperature).fill_diagonal_(-math.inf)
    return cross_entropy(logits, torch.arange(len(z), device=z.device).roll(len(z1)), reduction=reduction)


def _reduce(loss: Tensor, reduction: str) -> Tensor:
    return loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()
