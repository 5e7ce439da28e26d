"""Custom ops of losses in which one side is queries: the log-sum-exp over keys, and the loss of it and the positives.

The forward pass keeps the keys' mean under the softmax, so the gradient of the queries is a scaling of it; that of the
keys takes a pass of its own. See :mod:`.info_nce`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from vito_kernels._core.autograd import autograd_op, refuse_double_backward, register_flops
from vito_kernels._core.checks import autocast_inputs, check_reduction, needs_grad, scale_tensor
from vito_kernels.contrastive.gpu import path_of
from vito_kernels.contrastive.softplus_loss import divisor_of
from vito_kernels.contrastive.terms import LOG2E, Mask, SoftmaxGrad

# ---- custom op: log-sum-exp


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
    softmax = path.softmax_grad(lse2, lse_residual, g_lse2) if need_k and k is not None else None
    given = q, k, k, scale, mask, mean, logit_cache, need_q, need_scale, matmul_dtype
    return _gradients(path, None, softmax, g_lse2, pair_weight, *given)


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


def _lse_setup(ctx, inputs, output):
    q, k, scale, q_group, k_group, positive, ctx.diagonal, _, ctx.matmul_dtype, _ = inputs
    lse2, _, mean, lse_residual, logit_cache = output
    # Locked keys without positives are not saved: a queue may take new keys before the backward pass.
    save_k = k.requires_grad or positive is not None or ctx.diagonal is not None
    masks = q_group, k_group, positive
    ctx.save_for_backward(q, k if save_k else None, scale, *masks, lse2, lse_residual, mean, logit_cache)
    ctx.set_materialize_grads(False)


def _lse_backward(ctx, g_lse2, g_positive, *_):  # no gradient reaches the other outputs, which stay in this module
    *inputs, lse2, lse_residual, mean, logit_cache = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    g_lse2 = torch.zeros_like(lse2) if g_lse2 is None else g_lse2
    if g_positive is None:
        g_positive = lse2.new_zeros(lse2.shape[0], _num_positives(inputs[-1], ctx.diagonal))
    saved = *inputs, ctx.diagonal, lse2, lse_residual, mean, logit_cache
    grads = apply_similarity_lse_backward(g_lse2, g_positive, *saved, *needs, ctx.matmul_dtype)
    return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), *(None,) * 7


def _forward_flops(q: Tensor, k: Tensor, compute_grad_q: bool, **_: Any) -> int:
    return (4 if compute_grad_q else 2) * len(q) * len(k) * q.shape[1]


def _backward_flops(q: Tensor, k: Tensor | None, need_k: bool, **_: Any) -> int:
    return 4 * len(q) * len(k) * q.shape[1] if need_k and k is not None else 0


register_flops(similarity_lse_op, _forward_flops)
register_flops(similarity_lse_backward_op, _backward_flops)
apply_similarity_lse = autograd_op(similarity_lse_op, _lse_setup, _lse_backward)
apply_similarity_lse_backward = refuse_double_backward(similarity_lse_backward_op)

# ---- custom op: the loss


@torch.library.custom_op("vito_kernels::one_sided_loss", mutates_args=())
def one_sided_loss_op(
    q: Tensor,
    k: Tensor,
    own_key: Tensor | None,
    scale: Tensor,
    q_group: Tensor | None,
    k_group: Tensor | None,
    positive: Tensor | None,
    diagonal: int | None,
    compute_grad_q: bool,
    reduction: str,
    decoupled: bool,
    matmul_dtype: torch.dtype | None = None,
    cache_logits: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss and the weights of its gradients.

    Args:
        own_key: (M, D), the positive of each query, if it is not among k. Then without ``positive`` and ``diagonal``.
        reduction: "mean", "sum" or "none".
        decoupled: leave the positive out of the denominator.

    The others as for ``similarity_lse_op``.

    Returns:
        The loss () or (M,), ``SoftmaxGrad`` as lse2 and weight (M,), the derivatives by lse2 (M,) and by the positives'
        logits (M, P), both in units of log 2, mean (M, D) or (0, D), and the logit cache.
    """
    path, mask = path_of(q), Mask(q_group, k_group, positive, diagonal)
    path.check_values(scale, positive, k)
    logit_cache = path.alloc_logit_cache(q, k, scale, cache_logits)
    divisor = divisor_of(reduction, len(q))
    given = q, k, own_key, scale, mask, compute_grad_q, divisor, decoupled, matmul_dtype, logit_cache
    found = path.loss_forward(*given)
    softmax = found.softmaxes[0]
    return found.loss, softmax.lse2, softmax.weight, found.weights[0], found.pair_weight, found.mean, logit_cache


@one_sided_loss_op.register_fake
def _(
    q, k, own_key, scale, q_group, k_group, positive, diagonal, compute_grad_q, reduction, decoupled, matmul_dtype=None,
    cache_logits=False,
):  # fmt: skip
    (rows, width), new = q.shape, scale.new_empty
    pair_weight, mean = new(rows, _num_positives(positive, 0)), new(rows if compute_grad_q else 0, width)
    logit_cache = path_of(q).alloc_logit_cache(q, k, scale, cache_logits)
    return new(rows if reduction == "none" else ()), new(rows), new(rows), new(rows), pair_weight, mean, logit_cache


@torch.library.custom_op("vito_kernels::one_sided_loss_backward", mutates_args=())
def one_sided_loss_backward_op(
    gradient: Tensor,
    q: Tensor,
    k: Tensor | None,
    own_key: Tensor | None,
    scale: Tensor,
    q_group: Tensor | None,
    k_group: Tensor | None,
    positive: Tensor | None,
    diagonal: int | None,
    lse2: Tensor,
    softmax_weight: Tensor,
    weight: Tensor,
    pair_weight: Tensor,
    mean: Tensor,
    logit_cache: Tensor,
    need_q: bool,
    need_k: bool,
    need_own: bool,
    need_scale: bool,
    matmul_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, d own_key, dscale), each rounded once to its input's dtype; a gradient that is not needed is empty."""
    path, mask = path_of(q), Mask(q_group, k_group, positive, diagonal)
    factor = None if gradient.dim() else gradient
    if factor is None:  # of each row
        softmax_weight, weight = softmax_weight * gradient, weight * gradient
        pair_weight = pair_weight * gradient[:, None]
    d_own = q.new_empty(0)
    if need_own and own_key is not None:
        d_own = q.to(scale.dtype) * (pair_weight * scale * LOG2E)
        d_own = (d_own if factor is None else d_own * factor).to(own_key.dtype)
    softmax = SoftmaxGrad(lse2, softmax_weight) if need_k and k is not None else None
    given = q, k, k if own_key is None else own_key, scale, mask, mean, logit_cache, need_q, need_scale, matmul_dtype
    dq, dk, dscale = _gradients(path, factor, softmax, weight, pair_weight, *given)
    return dq, dk, d_own, dscale


@one_sided_loss_backward_op.register_fake
def _(
    gradient, q, k, own_key, scale, q_group, k_group, positive, diagonal, lse2, softmax_weight, weight, pair_weight,
    mean, logit_cache, need_q, need_k, need_own, need_scale, matmul_dtype=None,
):  # fmt: skip
    return (
        q.new_empty(q.shape if need_q else 0),
        q.new_empty(k.shape if need_k else 0),
        q.new_empty(own_key.shape if need_own else 0),
        scale.new_empty(() if need_scale else 0),
    )


def _loss_setup(ctx, inputs, output):
    q, k, own_key, scale, q_group, k_group, positive, ctx.diagonal, _, _, _, ctx.matmul_dtype, _ = inputs
    # Locked keys that are no positives are not saved: a queue may take new keys before the backward pass.
    save_k = k.requires_grad or own_key is None
    ctx.save_for_backward(q, k if save_k else None, own_key, scale, q_group, k_group, positive, *output[1:])
    ctx.set_materialize_grads(False)


def _loss_backward(ctx, gradient, *_):  # no gradient reaches the other outputs, which stay in this module
    if gradient is None:
        return (None,) * 13
    *inputs, lse2, softmax_weight, weight, pair_weight, mean, logit_cache = ctx.saved_tensors
    needs = ctx.needs_input_grad[:4]
    saved = *inputs, ctx.diagonal, lse2, softmax_weight, weight, pair_weight, mean, logit_cache
    grads = apply_one_sided_loss_backward(gradient, *saved, *needs, ctx.matmul_dtype)
    return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), *(None,) * 9


register_flops(one_sided_loss_op, _forward_flops)
register_flops(one_sided_loss_backward_op, _backward_flops)
apply_one_sided_loss = autograd_op(one_sided_loss_op, _loss_setup, _loss_backward)
apply_one_sided_loss_backward = refuse_double_backward(one_sided_loss_backward_op)

# ---- gradients, of both


def _gradients(
    path: Any,
    gradient: Tensor | None,
    softmax: SoftmaxGrad | None,
    weight: Tensor,
    pair_weight: Tensor | None,
    q: Tensor,
    k: Tensor | None,
    positive_keys: Tensor | None,
    scale: Tensor,
    mask: Mask,
    mean: Tensor,
    logit_cache: Tensor,
    need_q: bool,
    need_scale: bool,
    matmul_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dscale), ``gradient`` times those of the weights. dk only with the keys' ``softmax``.

    The positives are rows of ``positive_keys``, which are k or, outside of k, one for each query.
    """
    base, key_base, positive = mean if need_q or need_scale else None, None, mask.positive
    outside, diagonal = positive_keys is not k, mask.diagonal or 0
    if softmax is not None:
        given = softmax, None, mask, False, True, matmul_dtype, logit_cache
        _, key_base = path.lse_backward(q, k, scale, *given, parts=positive is None)
    if positive is None and not (outside and key_base is not None):
        keys = q if positive_keys is None else positive_keys
        options = None if positive_keys is None else pair_weight, diagonal, weight, need_q, need_scale, gradient
        dq, dscale, dk = path.grad_epilogues(base, key_base, scale, q, keys, *options)
        return dq, dk, dscale
    dq, dk, dscale = q.new_empty(0), q.new_empty(0), scale.new_empty(0)
    if base is not None:
        pairs = {"pair_weight": pair_weight, "k": positive_keys, "positive": positive}
        factors = {"weight": weight, "gradient": gradient, "other": q if need_scale else None}
        dq, dscale = path.grad_epilogue(base, scale, q.dtype, store=need_q, **factors, **pairs)
    if key_base is not None and k is not None:
        if positive is not None and pair_weight is not None:
            _scatter_positives(key_base, q, positive, pair_weight)
        dk, _ = path.grad_epilogue(key_base, scale, k.dtype, gradient=gradient)
    return dq, dk, dscale


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


def one_sided_loss(
    q: Tensor,
    k: Tensor,
    scale: float | Tensor,
    positive: Tensor | None,
    diagonal: int | None,
    q_group: Tensor | None = None,
    k_group: Tensor | None = None,
    *,
    own_key: Tensor | None = None,
    reduction: str = "mean",
    decoupled: bool = False,
) -> Tensor:
    """InfoNCE, () or (M,), with positives as for ``lse_and_positives``, or ``own_key`` (M, D), which are not in k."""
    check_reduction(reduction)
    (q, k, *own), matmul_dtype = autocast_inputs(q, k, *([] if own_key is None else [own_key]))
    scale = scale_tensor(scale, q)
    masks = q_group, k_group, positive, diagonal if positive is None else None
    options = needs_grad(q, scale), reduction, decoupled, matmul_dtype, needs_grad(k)
    return apply_one_sided_loss(q, k, own[0] if own else None, scale, *masks, *options)[0]
