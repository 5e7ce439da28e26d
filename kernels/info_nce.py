"""Log-sum-exp over keys and InfoNCE on it, without ever building the M x N matrix of logits.

logits = scale * q @ k.T                                        (M, N), never in memory
lse    = logits.masked_fill(excluded, -inf).logsumexp(1)        similarity_lse
loss   = softplus(lse - scale * (q * k[positive]).sum(1))       info_nce: excluded holds the positive
"""

from __future__ import annotations

import torch
from torch import Tensor

from vito_kernels import tiled
from vito_kernels._ops import autograd_op, refuse_double_backward
from vito_kernels.checks import (
    check_groups,
    check_pair,
    check_positive_range,
    inverse_temperature,
    positive_columns,
    reduce,
    scale_tensor,
)

# ---------------------------------------------------------------------------------------------------------- custom op


@torch.library.custom_op("vito_kernels::contrast", mutates_args=())
def contrast(
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    q_group: Tensor | None,
    k_group: Tensor | None,
    positive: Tensor | None,
    diagonal: int | None,
    bring_mean: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(lse (M,) over the keys that a query may see, logits of its positives (M, P), mean (M, D) of the keys under the
    softmax).

    Keys of the query's group, its positives, and key ``i + diagonal`` are not seen; the latter counts as its only
    positive. ``mean`` is what the gradient of q needs: with ``bring_mean`` forward and backward together cost 4 M N D
    flops.
    """
    if positive is not None and not positive.is_cuda:
        check_positive_range(positive, k.shape[0])
    if not scale.is_cuda and not bool(torch.isfinite(scale)):
        raise ValueError(f"scale must be finite, got {scale.item()}")
    exclusion = tiled.Exclusion(q_group, k_group, positive, diagonal)
    lse, mean = tiled.forward(q, k, scale, exclusion, bring_mean)
    return lse, _positive_logits(q, k, scale, positive, diagonal), mean


@contrast.register_fake
def _(q, k, scale, q_group, k_group, positive, diagonal, bring_mean):
    count = positive.shape[1] if positive is not None else int(diagonal is not None)
    rows, width = q.shape
    new = lambda *shape: scale.new_empty(shape)  # noqa: E731
    return new(rows), new(rows, count), new(rows if bring_mean else 0, width)


@torch.library.custom_op("vito_kernels::contrast_backward", mutates_args=())
def contrast_backward(
    g_lse: Tensor,
    g_positive: Tensor,
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    q_group: Tensor | None,
    k_group: Tensor | None,
    positive: Tensor | None,
    diagonal: int | None,
    lse: Tensor,
    mean: Tensor,
    need_q: bool,
    need_k: bool,
    need_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dscale) of ``contrast``, each rounded once to its input's dtype; what is not needed comes back empty."""
    dq, dk, dscale = q.new_empty(0), k.new_empty(0), scale.new_empty(0)
    if need_q or need_scale:
        pull = mean * g_lse[:, None]
        for p, (rows, keys) in enumerate(_pairs(q, k, positive, diagonal)):
            pull[rows].addcmul_(k[keys].to(pull.dtype), g_positive[rows, p, None])
        if need_scale:
            dscale = (pull * q).sum()
        if need_q:
            dq = pull.mul_(scale).to(q.dtype)
    if need_k:
        exclusion = tiled.Exclusion(q_group, k_group, positive, diagonal)
        _, push = tiled.gradient(q, k, scale, tiled.Role(lse, g_lse), None, exclusion, need_x=False, need_y=True)
        for p, (rows, keys) in enumerate(_pairs(q, k, positive, diagonal)):
            part = q[rows].to(push.dtype) * g_positive[rows, p, None]
            if isinstance(keys, slice):
                push[keys] += part
            else:
                push.index_put_((keys,), part, accumulate=True)  # sorts on a GPU: no atomics, the same sum every time
        dk = push.mul_(scale).to(k.dtype)
    return dq, dk, dscale


@contrast_backward.register_fake
def _(g_lse, g_positive, q, k, scale, q_group, k_group, positive, diagonal, lse, mean, need_q, need_k, need_scale):
    return (
        torch.empty_like(q, memory_format=torch.contiguous_format) if need_q else q.new_empty(0),
        torch.empty_like(k, memory_format=torch.contiguous_format) if need_k else k.new_empty(0),
        scale.new_empty(()) if need_scale else scale.new_empty(0),
    )


def _pairs(q: Tensor, k: Tensor, positive: Tensor | None, diagonal: int | None) -> list[tuple[slice, slice | Tensor]]:
    """(queries, their keys) for each column of positives."""
    if diagonal is not None:
        return [(slice(None), slice(diagonal, diagonal + q.shape[0]))]
    return [] if positive is None else [(slice(None), column) for column in positive.unbind(1)]


def _positive_logits(q: Tensor, k: Tensor, scale: Tensor, positive: Tensor | None, diagonal: int | None) -> Tensor:
    pairs = _pairs(q, k, positive, diagonal)
    logits = scale.new_empty(q.shape[0], len(pairs))
    wide = q.to(scale.dtype)
    for p, (_, keys) in enumerate(pairs):
        torch.sum(wide * k[keys], 1, dtype=scale.dtype, out=logits[:, p])
    return logits.mul_(scale)


def _setup_context(ctx, inputs, output):
    q, k, scale, q_group, k_group, positive, ctx.diagonal, ctx.bring_mean = inputs
    lse, _, mean = output
    ctx.save_for_backward(q, k, scale, q_group, k_group, positive, lse, mean)
    ctx.set_materialize_grads(False)


def _backward(ctx, g_lse, g_positive, _):  # nothing outside this module sees the mean, so no gradient comes to it
    q, k, scale, q_group, k_group, positive, lse, mean = ctx.saved_tensors
    need_q, need_k, need_scale = ctx.needs_input_grad[:3]
    count = positive.shape[1] if positive is not None else int(ctx.diagonal is not None)
    g_lse = torch.zeros_like(lse) if g_lse is None else g_lse
    g_positive = lse.new_zeros(lse.shape[0], count) if g_positive is None else g_positive
    dq, dk, dscale = apply_contrast_backward(
        g_lse, g_positive, q, k, scale, q_group, k_group, positive, ctx.diagonal, lse, mean, need_q, need_k, need_scale
    )
    return dq if need_q else None, dk if need_k else None, dscale if need_scale else None, None, None, None, None, None


apply_contrast = autograd_op(contrast, _setup_context, _backward)
apply_contrast_backward = refuse_double_backward(contrast_backward)

# --------------------------------------------------------------------------------------------------- public functions


def autocast(*tensors: Tensor) -> list[Tensor]:
    """As autocast does for a matmul: float32 embeddings become its dtype. Sums and losses stay in float32."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return list(tensors)
    return [x.to(torch.get_autocast_dtype(kind)) if x.dtype == torch.float32 else x for x in tensors]


def differentiable(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def similarity_lse(
    q: Tensor, k: Tensor, scale: float | Tensor, *, q_group: Tensor | None = None, k_group: Tensor | None = None
) -> Tensor:
    """Log-sum-exp of ``scale * q_i . k_j`` over the keys j whose group differs from the query's; (M,) float32.

    Equivalent: ``(scale * q @ k.T).masked_fill(q_group[:, None] == k_group[None], -inf).logsumexp(1)``.

    q (M, D) and k (N, D) share a dtype (float32, bfloat16, float16; float64 runs in PyTorch) and a device; rows may
    be strided. ``scale`` is a number or a tensor of one element, which may require grad. Groups are int64 or int32,
    (M,) and (N,); without them every key counts. A query that sees no key has lse = -inf and no gradient.

    Sums are in float32 (float64 for float64, and so is the result). Under autocast float32 embeddings take its dtype.
    The gradient of q comes with the forward pass: 4 M N D flops for both together, 2 M N D without a gradient; keys
    that require grad cost 4 M N D more. Deterministic. No second derivative: double backward raises RuntimeError.

    Raises ValueError or TypeError for a wrong shape, dtype, device, number of groups or a scale that is not finite.
    """
    check_pair(q, k)
    check_groups(q_group, k_group, q, k)
    q, k = autocast(q, k)
    scale = scale_tensor(scale, q)
    return apply_contrast(q, k, scale, q_group, k_group, None, None, differentiable(q, scale))[0]


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
    """InfoNCE of queries against keys: each query's positive against its negatives, ``softplus(lse_negatives -
    logit_positive)``.

    Equivalent, for one positive and no groups: ``cross_entropy(q @ k.T / temperature, positive)``. In this form the
    positive is not part of the sum, so the gradient does not cancel when its probability is close to one.

    q (M, D), k (N, D): as for ``similarity_lse``; nothing is normalised here. ``positive`` (M,) or (M, P) holds key
    indices, default ``arange(M)``; with P positives the loss of a query is the mean over them, each against the same
    negatives. The negatives are the keys that are no positive of the query and, given groups, whose ``k_group``
    differs from its ``q_group``. ``temperature`` is a positive number or a tensor of one element, which may require
    grad.

    Returns a float32 scalar, or (M,) with ``reduction="none"``; a query without negatives has loss 0. Dtypes, cost,
    errors and determinism as for ``similarity_lse``.
    """
    check_pair(q, k)
    check_groups(q_group, k_group, q, k)
    columns = positive_columns(positive, q, k)
    negatives, logits = negatives_and_positives(q, k, inverse_temperature(temperature), columns, 0, q_group, k_group)
    return reduce(torch.nn.functional.softplus(negatives[:, None] - logits).mean(1), reduction)


def negatives_and_positives(
    q: Tensor,
    k: Tensor,
    scale: float | Tensor,
    positive: Tensor | None,
    diagonal: int,
    q_group: Tensor | None = None,
    k_group: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(lse over the negatives (M,), logits of the positives (M, P)): what every loss here is made of.

    ``positive`` (M, P), or None where the positive of query i is key ``i + diagonal``: that layout needs no mask
    elsewhere.
    """
    q, k = autocast(q, k)
    scale = scale_tensor(scale, q)
    lse, logits, _ = apply_contrast(
        q, k, scale, q_group, k_group, positive, None if positive is not None else diagonal, differentiable(q, scale)
    )
    return lse, logits
