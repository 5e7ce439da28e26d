"""The contrastive losses over the full matrix of logits, as one would write them without regard to memory.

Sources: InfoNCE: van den Oord et al. 2018 (arXiv 1807.03748), eq. 4. CLIP: Radford et al. 2021 (arXiv 2103.00020),
fig. 3. NT-Xent: Chen et al. 2020 (arXiv 2002.05709), eq. 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize


def similarity_lse(
    q: Tensor, k: Tensor, scale: float | Tensor, *, q_group: Tensor | None = None, k_group: Tensor | None = None
) -> Tensor:
    """(M,): log-sum-exp of ``scale * q @ k.T`` over the keys of another group; -inf, without gradient, where there is
    none.
    """
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
    negatives = logits.masked_fill(excluded, -math.inf)
    first = torch.zeros_like(rows)
    losses = [
        cross_entropy(torch.cat([logits[rows, column, None], negatives], 1), first, reduction="none")
        for column in positive.unbind(1)
    ]
    return _reduce(torch.stack(losses).mean(0), reduction)


def clip_loss(x: Tensor, y: Tensor, scale: float | Tensor) -> Tensor:
    """Mean of the cross entropies of x's rows against y's and of y's rows against x's; row i belongs to row i."""
    logits = scale * x @ y.T
    labels = torch.arange(len(x), device=x.device)
    return (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2


def ntxent(z1: Tensor, z2: Tensor, temperature: float | Tensor) -> Tensor:
    """Each of the 2B embeddings, normalised, against all others; its positive is the other view of its sample."""
    z = normalize(torch.cat([z1, z2]), dim=1)
    logits = (z @ z.T / temperature).fill_diagonal_(-math.inf)
    return cross_entropy(logits, torch.arange(len(z), device=z.device).roll(len(z1)))


def _reduce(loss: Tensor, reduction: str) -> Tensor:
    return {"mean": loss.mean, "sum": loss.sum, "none": lambda: loss}[reduction]()
