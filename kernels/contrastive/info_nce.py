"""Log-sum-exp over keys and InfoNCE on it, without the M x N matrix of logits.

    logits = scale * q @ k.T                                        (M, N), never in memory
    lse    = logits.masked_fill(mask, -inf).logsumexp(1)            similarity_lse
    loss   = softplus(lse - scale * (q * k[positive]).sum(1))       info_nce: the mask holds the positive

q (M, D) and k (N, D) are float32, bfloat16 or float16, with sums in float32. The forward pass keeps the keys' mean
under the softmax,

    mean   = logits.masked_fill(mask, -inf).softmax(1) @ k          (M, D), d lse / d q = scale * mean

so it is FlashAttention's forward with V = K, and the gradient of q is a scaling: 4 M N D flops for both. One program
owns each output row and sums it in a fixed order: deterministic. The ops are in :mod:`.one_sided`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vito_kernels._core.autograd import softplus
from vito_kernels._core.checks import (
    Reduction,
    autocast_inputs,
    check_groups,
    check_negatives,
    check_options,
    check_pair,
    check_paired,
    check_positive_range,
    inverse_temperature,
    needs_grad,
    positive_columns,
    reduce,
    scale_tensor,
)
from vito_kernels.contrastive import small
from vito_kernels.contrastive.one_sided import lse_and_positives, one_sided_loss
from vito_kernels.contrastive.per_query import apply_per_query_lse
from vito_kernels.contrastive.replay import replayed
from vito_kernels.contrastive.softplus_loss import softplus_loss
from vito_kernels.contrastive.terms import LOG2E

# ---- public functions


@replayed
def similarity_lse(
    q: Tensor, k: Tensor, scale: float | Tensor, *, q_group: Tensor | None = None, k_group: Tensor | None = None
) -> Tensor:
    """Log-sum-exp of ``scale * q_i . k_j`` over the keys j of another group than query i.

    Equivalent: ``(scale * q @ k.T).masked_fill(q_group[:, None] == k_group[None], -inf).logsumexp(1)``.

    Args:
        q, k: (M, D) and (N, D) of one device and dtype: float32, bfloat16, float16, or float64, which PyTorch computes.
            Under autocast the first three may mix. Rows may be strided.
        scale: the inverse temperature, a number or a tensor of one element, which may require grad.
        q_group, k_group: (M,) and (N,) int64 or int32 ids; by default every key counts.

    Returns:
        (M,) float32, or float64 for float64. A fully masked query has -inf and no gradient.

    Raises:
        ValueError: a wrong shape, device or value, one group without the other, or a scale that is not finite.
        TypeError: a wrong dtype.
        RuntimeError: in double backward; there is no second derivative.

    Sums are float32. A GPU takes float32 products on the tensor cores in three bfloat16 parts, as exact as float32, or
    in fewer by ``torch.set_float32_matmul_precision``. Beyond D = 256 (128 on sm_80, 0 on sm_100) it takes the plain
    units.
    Autocast rounds float32 and mixed embeddings to its dtype but not their gradients, which stay exact to about 5e-4
    however likely the positive. A bfloat16 tensor has a bfloat16 gradient; that rounding moves it by 1.7e-3 (Frobenius
    norms).

    Costs 2 M N D flops without gradient, 4 M N D with that of q, and 4 M N D more for that of k. For k the CPU caches
    the first 31 MiB of logits, which halves that cost up to 2850 x 2850. For 16-bit embeddings wider than 512 (256
    where keys require grad, or in a two-sided loss) a GPU keeps up to 256 MiB of exponentials at a time.
    Deterministic.
    """
    check_pair(q, k)
    check_groups(q_group, k_group, q, k)
    return lse_and_positives(q, k, scale, None, None, q_group, k_group)[0] / LOG2E


@replayed
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
    reduction: Reduction = "mean",
) -> Tensor:
    """InfoNCE of queries against keys: ``softplus(lse_of_negatives - logit_of_positive)``.

    Equivalent, for one positive and no groups: ``cross_entropy(q @ k.T / temperature, positive)``. In this form the
    positive is not part of the sum, so the gradient does not cancel when its probability is close to one.

    Args:
        q, k: (M, D) and (N, D), as for ``similarity_lse``. Nothing is normalized here.
        temperature: a positive number or a tensor of one element, which may require grad.
        positive: (M,) or (M, P) key indices, by default ``arange(M)``. With P positives the loss of a query is the mean
            over them, each against the same negatives. Each logit is compared with P indices, which costs a GPU more
            than the product beyond P of some 8.
        negatives: (N, D), or (M, N, D) with those of each query, with or without gradient. They replace the other keys
            as negatives: query i then has the positive k_i and no other key. Without positive, groups and the options
            below but ``decoupled``.
        q_group, k_group: (M,) and (N,) ids. A key of the query's group is no negative.
        label_smoothing: in [0, 1), that of ``cross_entropy``. Needs one positive and no groups.
        hard_negatives: at least 0; weights each negative by ``exp(hard_negatives * logit)``, normalized to mean 1
            (Robinson et al., arXiv 2010.04592), at twice the cost.
        debias: in [0, 1), the share of the positive's class among the negatives, which is subtracted (Chuang et al.,
            arXiv 2007.00224; for unit vectors). This and ``hard_negatives`` count negatives in a pass over 16 columns.
        decoupled: leave the positive out of the denominator (Yeh et al., arXiv 2110.06848); without the options above.
        reduction: "mean", "sum" or "none".

    Returns:
        A float32 scalar, or (M,) with "none". A query without negatives has loss 0.

    Raises:
        ValueError, TypeError: as ``similarity_lse``, and for options out of range or that do not combine.

    Cost and determinism as for ``similarity_lse``.
    """
    if not (few := small.is_small(q, k, positive, q_group, k_group)):
        check_pair(q, k)
    check_options(label_smoothing, hard_negatives, debias, positive, q_group, decoupled)
    plain = not (label_smoothing or hard_negatives or debias or decoupled)
    if few and plain and positive is negatives is q_group is k_group is None and len(q) <= len(k):
        return small.pairs(q, k, inverse_temperature(temperature), small.one_positive, reduction)
    check_groups(q_group, k_group, q, k)
    if negatives is not None:
        check_paired(q, k, ("q", "k"))
        check_negatives(negatives, q)
        others = {"positive": positive, "q_group": q_group, "label_smoothing": label_smoothing}
        others |= {"hard_negatives": hard_negatives, "debias": debias}
        if given := [name for name, value in others.items() if isinstance(value, Tensor) or value]:
            raise ValueError(f"negatives goes without {', '.join(given)}")
        return against_negatives(q, k, negatives, inverse_temperature(temperature), reduction, decoupled)
    columns = positive_columns(positive, q, k)
    scale = inverse_temperature(temperature)
    groups = (q_group, k_group)
    if few and plain and (columns is None or columns.shape[1] == 1):
        terms = small.rows(None if q_group is None or k_group is None else (q_group, k_group), columns)
        try:
            return small.pairs(q, k, scale, terms, reduction)
        except RuntimeError:  # of an index that is no key
            if columns is not None:
                check_positive_range(columns, len(k))
            raise
    if plain or decoupled:
        return one_sided_loss(q, k, scale, columns, 0, *groups, reduction=reduction, decoupled=decoupled)
    hard_negatives = float(hard_negatives)  # NumPy's would round the scales
    harder = scale * (1 + hard_negatives) if hard_negatives else scale
    lse2, positives, lse_residual = lse_and_positives(
        q, k, harder, columns, 0, *groups, cache_logits=not hard_negatives
    )
    logits = positives / LOG2E
    if hard_negatives or debias:
        negatives = lse2 / LOG2E

        def lse_of_negatives(scale: float | Tensor, width: int = q.shape[1]) -> Tensor:
            sides = q[:, :width], k[:, :width]
            return lse_and_positives(*sides, scale, columns, 0, *groups, cache_logits=False)[0] / LOG2E

        with torch.no_grad():  # at a scale of zero, the logarithm of how many negatives there are
            log_count = lse_of_negatives(0.0, 16)
        if hard_negatives:
            logits = logits / (1 + hard_negatives)
            average = negatives - lse_of_negatives(scale * hard_negatives) + log_count
            negatives = torch.where(negatives == -torch.inf, negatives, average)
        sums = _debiased(negatives, logits, log_count, scale, debias) if debias else negatives[:, None]
        loss = softplus(sums - logits).mean(1)
    else:
        loss = softplus_loss(lse2, lse_residual, positives)
    if label_smoothing:
        (left, right), _ = autocast_inputs(q, k)
        loss = loss + label_smoothing * (logits[:, 0] - _mean_logit(left, right, scale))
    return reduce(loss, reduction)


def against_negatives(
    q: Tensor, k: Tensor, negatives: Tensor, scale: float | Tensor, reduction: str, decoupled: bool = False
) -> Tensor:
    """InfoNCE of q (M, D) whose positives are the rows of k (M, D), against negatives (N, D) or (M, N, D)."""
    shared = negatives.dim() == 2
    logits = len(q) * max(len(q), len(negatives))
    if shared and not decoupled and logits <= small.MOST_LOGITS and small.is_small(q, k, negatives):
        return small.pairs(q, torch.cat([k, negatives]), scale, small.key_before_queue, reduction)
    if shared:
        return one_sided_loss(q, negatives, scale, None, None, own_key=k, reduction=reduction, decoupled=decoupled)
    (q, k, negatives), _ = autocast_inputs(q, k, negatives)
    factor = scale_tensor(scale, q)
    lse2, lse_residual, _ = apply_per_query_lse(q, negatives.contiguous(), factor, needs_grad(q, factor))
    positives = (q.to(factor.dtype) * k).sum(1, keepdim=True) * (factor * LOG2E)
    return reduce(softplus_loss(lse2, lse_residual, positives, decoupled=decoupled), reduction)


def _debiased(negatives: Tensor, positives: Tensor, log_count: Tensor, scale: float | Tensor, share: float) -> Tensor:
    """log of (sum over negatives - share * n * e^positive) / (1 - share), at least that of n opposite vectors."""
    negatives, log_count = negatives[:, None], log_count[:, None]
    floor = log_count - scale
    excess = math.log(share) + log_count + positives - negatives
    excess = excess.masked_fill(log_count == -torch.inf, -1).clamp(max=-1e-6)  # beyond, the floor holds
    sums = negatives + torch.log(-torch.expm1(excess)) - math.log1p(-share)
    below = (math.log(share) + log_count + positives >= negatives) | (sums < floor) & (log_count > -torch.inf)
    return torch.where(below, floor + torch.zeros_like(sums), sums)


def _mean_logit(q: Tensor, k: Tensor, scale: float | Tensor) -> Tensor:
    """Mean of each query's logits: its product with the keys' mean, not by a matmul, which autocast would round."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return (q.to(dtype) * k.to(dtype).mean(0)).sum(1) * scale
