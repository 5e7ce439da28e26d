"""Log-sum-exp over keys and InfoNCE on it, without the M x N matrix of logits.

    logits = scale * q @ k.T                                        (M, N), never in memory
    lse    = logits.masked_fill(mask, -inf).logsumexp(1)            similarity_lse
    loss   = softplus(lse - scale * (q * k[positive]).sum(1))       info_nce: the mask holds the positive

q (M, D) and k (N, D) are float32, bfloat16 or float16, with sums in float32. The forward pass keeps the keys' mean
under the softmax,

    mean   = logits.masked_fill(mask, -inf).softmax(1) @ k          (M, D), d lse / d q = scale * mean

so it is FlashAttention's forward with V = K, and the gradient of q is a scaling: 4 M N D flops for both. One program
owns each output row and sums it in a fixed order: deterministic, no atomics.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vito_kernels._core.autograd import autograd_op, refuse_double_backward, register_flops, softplus
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
from vito_kernels.contrastive.gpu import path_of
from vito_kernels.contrastive.per_query import apply_per_query_lse
from vito_kernels.contrastive.replay import replayed
from vito_kernels.contrastive.softplus_loss import softplus_loss
from vito_kernels.contrastive.terms import LOG2E, Mask

# ---- custom op


@torch.library.custom_op("vito_kernels::similarity_lse", mutates_args=())
def similarity_lse_op(
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    q_group: Tensor | None,
    k_group: Tensor | None,
    positive: Tensor | None,
    diagonal: int | None,
    compute_grad_q: bool,
    matmul_dtype: torch.dtype | None = None,
    cache_logits: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Log-sum-exp over the unmasked keys; lse2 and logits in units of log 2.

    Args:
        q, k, scale: (M, D), (N, D), ().
        q_group, k_group, positive, diagonal: as for ``Mask``. The positives, or without them the key on the diagonal,
            are the positives of a query.
        compute_grad_q: also compute ``mean``, which the gradients of q and scale need.
        matmul_dtype: holds the values of q and k exactly (see ``autocast_inputs``), for the tensor cores.
        cache_logits: the CPU path caches tiles for the gradient of k.

    Returns:
        lse2 (M,), logits of the positives (M, P), mean (M, D) or (0, D), the rounding residual of lse2 (M,), and the
        logit cache.
    """
    path, mask = path_of(q), Mask(q_group, k_group, positive, diagonal)
    path.check_values(scale, positive, k)
    logit_cache = path.alloc_logit_cache(q, k, scale, cache_logits)
    lse2, lse_residual, mean, logits = path.lse_forward(q, k, scale, mask, compute_grad_q, matmul_dtype, logit_cache)
    return lse2, logits, mean, lse_residual, logit_cache


@similarity_lse_op.register_fake
def _(q, k, scale, q_group, k_group, positive, diagonal, compute_grad_q, matmul_dtype=None, cache_logits=False):
    rows, width = q.shape
    new = lambda *shape: scale.new_empty(shape)  # noqa: E731
    logit_cache = path_of(q).alloc_logit_cache(q, k, scale, cache_logits)
    mean = new(rows if compute_grad_q else 0, width)
    return new(rows), new(rows, _num_positives(positive, diagonal)), mean, new(rows), logit_cache


@torch.library.custom_op("vito_kernels::similarity_lse_backward", mutates_args=())
def similarity_lse_backward_op(
    g_lse2: Tensor,
    g_positive: Tensor,
    q: Tensor,
    k: Tensor | None,
    scale: Tensor,
    q_group: Tensor | None,
    k_group: Tensor | None,
    positive: Tensor | None,
    diagonal: int | None,
    lse2: Tensor,
    lse_residual: Tensor,
    mean: Tensor,
    logit_cache: Tensor,
    need_q: bool,
    need_k: bool,
    need_scale: bool,
    matmul_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dscale), each rounded once to its input's dtype; a gradient that is not needed is empty."""
    path, mask = path_of(q), Mask(q_group, k_group, positive, diagonal)
    pair_weight = g_positive if g_positive.shape[1] else None
    if pair_weight is None:  # lse itself was asked for, and anything may arrive at the -inf of a fully masked query
        g_lse2 = g_lse2.masked_fill(lse2 == -math.inf, 0)
    base, key_base = mean if need_q or need_scale else None, None
    if need_k and k is not None:
        softmax = path.softmax_grad(lse2, lse_residual, g_lse2)
        given = softmax, None, mask, False, True, matmul_dtype, logit_cache
        _, key_base = path.lse_backward(q, k, scale, *given, parts=positive is None)
    if positive is None:
        options = None if k is None else pair_weight, diagonal or 0, g_lse2, need_q, need_scale
        dq, dscale, dk = path.grad_epilogues(base, key_base, scale, q, q if k is None else k, *options)
        return dq, dk, dscale
    dq, dk, dscale = q.new_empty(0), q.new_empty(0), scale.new_empty(0)
    if base is not None:
        pairs = {"pair_weight": pair_weight, "k": k, "positive": positive, "other": q if need_scale else None}
        dq, dscale = path.grad_epilogue(base, scale, q.dtype, store=need_q, weight=g_lse2, **pairs)
    if key_base is not None and k is not None:
        _scatter_positives(key_base, q, positive, g_positive)
        dk = key_base.mul_(scale).to(k.dtype)
    return dq, dk, dscale


@similarity_lse_backward_op.register_fake
def _(
    g_lse2, g_positive, q, k, scale, q_group, k_group, positive, diagonal, lse2, lse_residual, mean, logit_cache,
    need_q, need_k, need_scale, matmul_dtype=None,
):  # fmt: skip
    return (
        q.new_empty(q.shape if need_q else 0),
        q.new_empty(k.shape if need_k else 0),
        scale.new_empty(() if need_scale else 0),
    )


def _num_positives(positive: Tensor | None, diagonal: int | None) -> int:
    return int(diagonal is not None) if positive is None else positive.shape[1]


def _scatter_positives(grad: Tensor, q: Tensor, positive: Tensor, g_positive: Tensor) -> None:
    """Adds to each positive key (N, D) its queries times their weights, deterministically."""
    if positive.is_cuda:  # unchecked there; one that is no key made the loss NaN
        positive = positive.clamp(0, len(grad) - 1)
    for p, keys in enumerate(positive.unbind(1)):
        part = q.to(grad.dtype) * (g_positive[:, p, None] * LOG2E)
        if grad.is_cuda:
            grad.index_put_((keys,), part, accumulate=True)  # sorts there: no atomics, the same sum every time
        else:
            grad.index_add_(0, keys, part)  # in order; index_put_ adds float32 atomically from every thread


def _setup_context(ctx, inputs, output):
    q, k, scale, q_group, k_group, positive, ctx.diagonal, _, ctx.matmul_dtype, _ = inputs
    lse2, _, mean, lse_residual, logit_cache = output
    # Locked keys without positives are not saved: a queue may take new keys before the backward pass.
    save_k = k.requires_grad or positive is not None or ctx.diagonal is not None
    masks = q_group, k_group, positive
    ctx.save_for_backward(q, k if save_k else None, scale, *masks, lse2, lse_residual, mean, logit_cache)
    ctx.set_materialize_grads(False)


def _backward(ctx, g_lse2, g_positive, *_):  # no gradient reaches the other outputs, which stay in this module
    *inputs, lse2, lse_residual, mean, logit_cache = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    g_lse2 = torch.zeros_like(lse2) if g_lse2 is None else g_lse2
    if g_positive is None:
        g_positive = lse2.new_zeros(lse2.shape[0], _num_positives(inputs[-1], ctx.diagonal))
    saved = *inputs, ctx.diagonal, lse2, lse_residual, mean, logit_cache
    grads = apply_similarity_lse_backward(g_lse2, g_positive, *saved, *needs, ctx.matmul_dtype)
    return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), *(None,) * 7


register_flops(
    similarity_lse_op, lambda q, k, compute_grad_q, **_: (4 if compute_grad_q else 2) * len(q) * len(k) * q.shape[1]
)
register_flops(
    similarity_lse_backward_op,
    lambda q, k, need_k, **_: 4 * len(q) * len(k) * q.shape[1] if need_k and k is not None else 0,
)
apply_similarity_lse = autograd_op(similarity_lse_op, _setup_context, _backward)
apply_similarity_lse_backward = refuse_double_backward(similarity_lse_backward_op)

# ---- shared by the losses


def lse_and_positives(
    q: Tensor,
    k: Tensor,
    scale: float | Tensor,
    positive: Tensor | None,
    diagonal: int | None,
    q_group: Tensor | None = None,
    k_group: Tensor | None = None,
    cache_logits: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """The inputs of ``softplus_loss``: lse2 over the negatives (M,), logits of the positives (M, P), residual (M,).

    ``positive`` (M, P), or None where the positive of query i is key ``i + diagonal``: that layout needs no mask
    elsewhere. Where both are None, no query has a positive. Without ``cache_logits`` the CPU path caches none, for
    losses of several passes.
    """
    (q, k), matmul_dtype = autocast_inputs(q, k)
    scale = scale_tensor(scale, q)
    diagonal = None if positive is not None else diagonal
    compute_grad_q, cache_logits = needs_grad(q, scale), cache_logits and needs_grad(k)
    masks = q_group, k_group, positive, diagonal
    lse2, logits, _, lse_residual, _ = apply_similarity_lse(
        q, k, scale, *masks, compute_grad_q, matmul_dtype, cache_logits
    )
    return lse2, logits, lse_residual


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
    hard_negatives = float(hard_negatives)  # NumPy's would round the scales
    harder = scale * (1 + hard_negatives) if hard_negatives else scale
    lse2, positives, lse_residual = lse_and_positives(
        q, k, harder, columns, 0, *groups, cache_logits=not hard_negatives
    )
    if not (hard_negatives or debias or label_smoothing):
        return softplus_loss(lse2, lse_residual, positives, reduction=reduction, decoupled=decoupled)
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
    logits = len(q) * (len(q) + len(negatives))
    if shared and not decoupled and logits <= small.MOST_LOGITS and small.is_small(q, k, negatives):
        return small.pairs(q, torch.cat([k, negatives]), scale, small.key_before_queue, reduction)
    (q, k, negatives), matmul_dtype = autocast_inputs(q, k, negatives)
    factor = scale_tensor(scale, q)
    compute_grad_q = needs_grad(q, factor)
    if shared:
        masks = None, None, None, None
        cache_logits = needs_grad(negatives)
        lse2, _, _, lse_residual, _ = apply_similarity_lse(
            q, negatives, factor, *masks, compute_grad_q, matmul_dtype, cache_logits
        )
    else:
        lse2, lse_residual, _ = apply_per_query_lse(q, negatives.contiguous(), factor, compute_grad_q)
    positives = (q.to(factor.dtype) * k).sum(1, keepdim=True) * (factor * LOG2E)
    return softplus_loss(lse2, lse_residual, positives, reduction=reduction, decoupled=decoupled)


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
