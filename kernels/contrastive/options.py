"""Arithmetic behind the options of ``info_nce``, on vectors of log-sum-exps."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def debiased(negatives: Tensor, positives: Tensor, log_count: Tensor, scale: float | Tensor, share: float) -> Tensor:
    """log of (sum over negatives - share * n * e^positive) / (1 - share), at least that of n opposite vectors."""
    negatives, log_count = negatives[:, None], log_count[:, None]
    floor = log_count - scale
    excess = math.log(share) + log_count + positives - negatives
    excess = excess.masked_fill(log_count == -torch.inf, -1).clamp(max=-1e-6)  # beyond, the floor holds
    sums = negatives + torch.log(-torch.expm1(excess)) - math.log1p(-share)
    below = (math.log(share) + log_count + positives >= negatives) | (sums < floor) & (log_count > -torch.inf)
    return torch.where(below, floor + torch.zeros_like(sums), sums)


def mean_logit(q: Tensor, k: Tensor, scale: float | Tensor) -> Tensor:
    """Mean over all keys of each query's logits: one product with the keys' mean, which is no matmul, as autocast would
    round it.
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return (q.to(dtype) * k.to(dtype).mean(0)).sum(1) * scale
