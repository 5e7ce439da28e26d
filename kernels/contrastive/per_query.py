"""Log-sum-exp over negatives that each query has for itself, such as mined ones.

    s    = scale * (negatives @ q[:, :, None])[:, :, 0]             (M, K)
    lse  = s.logsumexp(1)
    mean = (s.softmax(1)[:, None] @ negatives)[:, 0]                (M, D), d lse / d q = scale * mean

q (M, D), negatives (M, K, D): float32, bfloat16 or float16; sums float32. No product is shared between queries, so that
memory bounds both passes: each reads the negatives once, and the gradient writes as many. A program owns a query, or
some negatives of one. Deterministic, no atomics.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vito_kernels._core.autograd import autograd_op, refuse_double_backward, register_flops
from vito_kernels._core.lazy_triton import cdiv, jit, on_device, program_shape, rows_contiguous
from vito_kernels.contrastive import gpu
from vito_kernels.contrastive.terms import LOG2E, SoftmaxGrad, split_sum

if TYPE_CHECKING:
    import triton.language as tl

# ---- Triton kernels


@jit
def per_query_lse_fwd_kernel(
    q, negatives, scale, lse2, lse_residual, mean, K, D, q_stride, WIDTH: tl.constexpr, TILE: tl.constexpr,
    MEAN: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column, key = tl.arange(0, WIDTH), tl.arange(0, TILE)
    own = tl.load(q + row * q_stride + column, mask=column < D, other=0.0).to(tl.float32)
    scale2 = tl.load(scale) * 1.4426950408889634
    negatives += row * K * D
    top = tl.full((1,), -3.4028234663852886e38, tl.float32)
    total = tl.zeros((1,), tl.float32)
    acc = tl.zeros((WIDTH,), tl.float32)
    for first in range(0, K, TILE):
        inside = (first + key < K)[:, None] & (column < D)[None]
        place = negatives + (first + key).to(tl.int64)[:, None] * D + column[None]
        keys = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        s = tl.where(first + key < K, tl.sum(keys * own[None], 1) * scale2, -float("inf"))
        new_top = tl.maximum(top, tl.max(s, 0))
        old = tl.exp2(top - new_top)
        p = tl.exp2(s - new_top)
        total = total * old + tl.sum(p, 0)
        if MEAN:
            acc = acc * old + tl.sum(p[:, None] * keys, 0)
        top = new_top
    log_total = tl.log2(total)
    whole = log_total + top
    one = tl.arange(0, 1)
    tl.store(lse2 + row + one, whole)
    tl.store(lse_residual + row + one, top - whole + log_total)
    if MEAN:
        tl.store(mean + row * D + column, acc / total, mask=column < D)


@jit
def per_query_lse_bwd_kernel(
    q, negatives, scale, lse2, weight, out, K, D, q_stride, WIDTH: tl.constexpr, TILE: tl.constexpr
):
    """The gradient of the negatives: scale p_ij weight_i q_i."""
    row = tl.program_id(0).to(tl.int64)
    column, key = tl.arange(0, WIDTH), tl.program_id(1) * TILE + tl.arange(0, TILE)
    own = tl.load(q + row * q_stride + column, mask=column < D, other=0.0).to(tl.float32)
    inside = (key < K)[:, None] & (column < D)[None]
    place = (row * K + key)[:, None] * D + column[None]
    keys = tl.load(negatives + place, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(scale)
    s = tl.sum(keys * own[None], 1) * (factor * 1.4426950408889634)
    p = tl.exp2(s - tl.load(lse2 + row)) * (tl.load(weight + row) * factor)
    tl.store(out + place, (p[:, None] * own[None]).to(out.dtype.element_ty), mask=inside)


def _lse_forward(q: Tensor, negatives: Tensor, scale: Tensor, compute_grad_q: bool) -> tuple[Tensor, Tensor, Tensor]:
    (M, K, D), q = negatives.shape, rows_contiguous(q)
    lse2, lse_residual, mean = scale.new_empty(M), scale.new_empty(M), scale.new_empty(M if compute_grad_q else 0, D)
    width, tile = program_shape(D)
    with on_device(q):
        per_query_lse_fwd_kernel[(M,)](
            q, negatives, scale, lse2, lse_residual, mean, K, D, q.stride(0), width, 2 * tile, compute_grad_q
        )
    return lse2, lse_residual, mean


def _grad_negatives(q: Tensor, negatives: Tensor, scale: Tensor, softmax: SoftmaxGrad) -> Tensor:
    (M, K, D), q, out = negatives.shape, rows_contiguous(q), torch.empty_like(negatives)
    width, tile = program_shape(D)
    with on_device(q):
        per_query_lse_bwd_kernel[(M, cdiv(K, 2 * tile))](
            q, negatives, scale, softmax.lse2, softmax.weight, out, K, D, q.stride(0), width, 2 * tile
        )
    return out


# ---- in PyTorch


def _logits2(q: Tensor, negatives: Tensor, scale: Tensor) -> Tensor:
    return torch.bmm(negatives.to(scale.dtype), q.to(scale.dtype)[:, :, None])[:, :, 0].mul_(scale * LOG2E)


def _plain_forward(q: Tensor, negatives: Tensor, scale: Tensor, compute_grad_q: bool) -> tuple[Tensor, Tensor, Tensor]:
    s = _logits2(q, negatives, scale)
    top = s.amax(1)
    p = s.sub_(top[:, None]).exp2_()
    total, lse2, residual = p.sum(1), torch.empty_like(top), torch.empty_like(top)
    split_sum(total.log2(), top, lse2, residual)
    if not compute_grad_q:
        return lse2, residual, scale.new_empty(0, q.shape[1])
    return lse2, residual, torch.bmm(p.div_(total[:, None])[:, None], negatives.to(p.dtype))[:, 0]


def _plain_grad(q: Tensor, negatives: Tensor, scale: Tensor, softmax: SoftmaxGrad) -> Tensor:
    p = _logits2(q, negatives, scale).sub_(softmax.lse2[:, None]).exp2_().mul_(softmax.weight[:, None] * scale)
    return (p[:, :, None] * q.to(p.dtype)[:, None]).to(negatives.dtype)


# ---- custom op


@torch.library.custom_op("vito_kernels::per_query_lse", mutates_args=())
def per_query_lse_op(
    q: Tensor, negatives: Tensor, scale: Tensor, compute_grad_q: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """lse2 (M,), its residual, mean (M, D) or (0, D) of q (M, D), negatives (M, K, D), contiguous, and scale ()."""
    path = gpu.path_of(q)
    path.check_values(scale)
    return (_lse_forward if path is gpu else _plain_forward)(q, negatives, scale, compute_grad_q)


@per_query_lse_op.register_fake
def _(q, negatives, scale, compute_grad_q):
    rows, width = q.shape
    return scale.new_empty(rows), scale.new_empty(rows), scale.new_empty(rows if compute_grad_q else 0, width)


@torch.library.custom_op("vito_kernels::per_query_lse_backward", mutates_args=())
def per_query_lse_backward_op(
    g_lse2: Tensor,
    q: Tensor,
    negatives: Tensor,
    scale: Tensor,
    lse2: Tensor,
    lse_residual: Tensor,
    mean: Tensor,
    need_q: bool,
    need_negatives: bool,
    need_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dnegatives, dscale), each rounded once to its input's dtype; a gradient that is not needed is empty."""
    path = gpu.path_of(q)
    dq, grad, dscale = q.new_empty(0), negatives.new_empty(0), scale.new_empty(0)
    if need_q or need_scale:
        other = q if need_scale else None
        dq, dscale = path.grad_epilogue(mean, scale, q.dtype, store=need_q, weight=g_lse2, other=other)
    if need_negatives:
        softmax = path.softmax_grad(lse2, lse_residual, g_lse2)
        grad = (_grad_negatives if path is gpu else _plain_grad)(q, negatives, scale, softmax)
    return dq, grad, dscale


@per_query_lse_backward_op.register_fake
def _(g_lse2, q, negatives, scale, lse2, lse_residual, mean, need_q, need_negatives, need_scale):
    return (
        q.new_empty(q.shape if need_q else 0),
        negatives.new_empty(negatives.shape if need_negatives else 0),
        scale.new_empty(() if need_scale else 0),
    )


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3], *output)
    ctx.set_materialize_grads(False)


def _backward(ctx, g_lse2, *_):  # no gradient reaches the other outputs, which stay in this module
    if g_lse2 is None:
        return (None,) * 4
    needs = ctx.needs_input_grad[:3]
    grads = apply_backward(g_lse2.contiguous(), *ctx.saved_tensors, *needs)
    return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), None


register_flops(
    per_query_lse_op, lambda negatives, compute_grad_q, **_: (4 if compute_grad_q else 2) * negatives.numel()
)
register_flops(
    per_query_lse_backward_op, lambda negatives, need_negatives, **_: 2 * negatives.numel() if need_negatives else 0
)
apply_per_query_lse = autograd_op(per_query_lse_op, _setup_context, _backward)
apply_backward = refuse_double_backward(per_query_lse_backward_op)
