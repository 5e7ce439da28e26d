"""SigLIP: every pair of a row of x and a row of y is a yes-or-no question; no softmax, so that ranks need no sums.

    s    = scale * x @ y.T + bias                                   (M, N), never in memory
    loss = (softplus(s) off the diagonal, softplus(-s) on it).sum() / M

The forward pass (kind "sigmoid" of :mod:`.forward`) sums softplus(s) and p = sigmoid(s) by row, and with gradient
p @ y, of which the gradient of x is a scaling. That of y takes a second pass. The pairs on the diagonal are masked in
both and have a loss of their own, in which nothing cancels. 2 M N D flops without gradient, 4 M N D with that of x,
4 M N D more for that of y. Deterministic, no atomics.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vito_kernels._core.autograd import autograd_op, refuse_double_backward, register_flops
from vito_kernels._core.autograd import softplus as plain_softplus
from vito_kernels._core.checks import (
    Reduction,
    autocast_inputs,
    check_paired,
    check_reduction,
    check_scale,
    needs_grad,
    reduce,
    scale_tensor,
)
from vito_kernels._core.lazy_triton import cdiv, jit, on_device, reduction_rows, use_triton
from vito_kernels.contrastive import small
from vito_kernels.contrastive.device_functions import sigmoid, softplus
from vito_kernels.contrastive.gpu import path_of
from vito_kernels.contrastive.replay import replayed
from vito_kernels.contrastive.terms import LOG2E, Mask, SoftmaxGrad

if TYPE_CHECKING:
    import triton.language as tl

# ---- Triton kernels


@jit
def siglip_fwd_kernel(
    sums, logits, bias, loss, M, divisor, ROWS: tl.constexpr, PAIRED: tl.constexpr, REDUCED: tl.constexpr
):
    """Each row's sum, and softplus(-s) of its pair; or by one program their sum over ``divisor``."""
    offset = tl.load(bias)
    reduced = tl.zeros((ROWS,), tl.float32)
    for first in range(tl.program_id(0) * ROWS, M, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)
        total = tl.load(sums + row, mask=row < M, other=0.0) * 0.6931471805599453
        if PAIRED:
            logit = tl.load(logits + row, mask=row < M, other=0.0) * 0.6931471805599453
            total += softplus(-(logit + offset))
        if REDUCED:
            reduced += tl.where(row < M, total, 0.0)
        else:
            tl.store(loss + row, total, mask=row < M)
    if REDUCED:
        tl.store(loss, tl.sum(reduced, 0) / divisor)


@jit
def siglip_bwd_kernel(
    gradient, logits, shares, bias, weight, weight2, below, pair, offsets, M, divisor, stride, ROWS: tl.constexpr,
    PAIRED: tl.constexpr,
):  # fmt: skip
    """Of each row: the weight of its p, in either unit, the opposite of the bias, the weight of the pair, and its part
    of the gradient of the bias.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    offset = tl.load(bias)
    g = tl.load(gradient + row.to(tl.int64) * stride, mask=row < M, other=0.0) / divisor
    part = g * tl.load(shares + row, mask=row < M, other=0.0)
    if PAIRED:
        own = -g * sigmoid(-(tl.load(logits + row, mask=row < M, other=0.0) * 0.6931471805599453 + offset))
        tl.store(pair + row, own * 0.6931471805599453, mask=row < M)
        part += own
    tl.store(weight + row, g, mask=row < M)
    tl.store(weight2 + row, g * 0.6931471805599453, mask=row < M)
    tl.store(below + row, offset * -1.4426950408889634 + tl.zeros((ROWS,), tl.float32), mask=row < M)
    tl.store(offsets + row, part, mask=row < M)


# ---- losses of the sums, and their gradients


def losses(sums: Tensor, logits: Tensor, bias: Tensor, reduction: str) -> Tensor:
    """Of the sums (M,) of log2(1 + e^s) and the logits of pairs (M, 1) or (M, 0), in units of log 2."""
    M, reduced = len(sums), reduction != "none"
    if not use_triton(sums):
        loss = sums / LOG2E
        if logits.shape[1]:
            loss = loss + plain_softplus(-(logits[:, 0] / LOG2E + bias))
        return reduce(loss, reduction)
    loss = sums.new_empty(() if reduced else M)
    rows = reduction_rows(M)
    with on_device(sums):
        siglip_fwd_kernel[(1 if reduced else cdiv(M, rows),)](
            sums, logits, bias, loss, M, _divisor(reduction, M), rows, logits.shape[1] > 0, reduced, num_warps=8
        )
    return loss


def row_grads(
    gradient: Tensor, logits: Tensor, shares: Tensor, bias: Tensor, reduction: str
) -> tuple[SoftmaxGrad, Tensor, Tensor | None, Tensor]:
    """The sigmoid in a gradient, its weight (M,) in units of log 2, that of the pairs (M, 1), the part of the bias."""
    M, paired = len(shares), logits.shape[1] > 0
    if not use_triton(shares):
        weight = (gradient / _divisor(reduction, M)).expand(M).contiguous()
        part, pair = weight * shares, None
        if paired:
            own = -weight * torch.sigmoid(-(logits[:, 0] / LOG2E + bias))
            part, pair = part + own, (own / LOG2E)[:, None]
        return SoftmaxGrad((bias * -LOG2E).expand(M).contiguous(), weight), weight / LOG2E, pair, part
    weight, weight2, below, part = (torch.empty_like(shares) for _ in range(4))
    pair = shares.new_empty(M, 1) if paired else None
    with on_device(shares):
        siglip_bwd_kernel[(cdiv(M, 256),)](
            gradient, logits, shares, bias, weight, weight2, below, pair, part, M, _divisor(reduction, M),
            gradient.stride(0) if reduction == "none" else 0, 256, paired,
        )  # fmt: skip
    return SoftmaxGrad(below, weight), weight2, pair, part


def _divisor(reduction: str, rows: int) -> float:
    return float(rows) if reduction == "mean" else 1.0


# ---- custom op


@torch.library.custom_op("vito_kernels::siglip", mutates_args=())
def siglip_op(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    diagonal: int | None,
    compute_grad_x: bool,
    reduction: str,
    matmul_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses of the rows of x and what their gradients need.

    Args:
        x, y, scale, bias: (M, D), (N, D), (), ().
        diagonal: row i of x and row ``i + diagonal`` of y are a pair; None where there are no pairs.
        compute_grad_x: also compute ``mean``, which the gradients of x and the scale need.
        reduction: "mean", "sum" or "none".
        matmul_dtype: holds the values of x and y exactly, for the tensor cores.

    Returns:
        The loss () or (M,), the logits of the pairs (M, 1) or (M, 0) without bias, in units of log 2, the sums (M,) of
        p = sigmoid(s) over other rows, and mean = p @ y, (M, D) or (0, D).
    """
    path = path_of(x)
    path.check_values(scale)
    found = path.sigmoid_forward(x, y, scale, bias, Mask(diagonal=diagonal), compute_grad_x, matmul_dtype)
    sums, logits, shares, mean = found
    return losses(sums, logits, bias, reduction), logits, shares, mean


@siglip_op.register_fake
def _(x, y, scale, bias, diagonal, compute_grad_x, reduction, matmul_dtype=None):
    (rows, width), new = x.shape, scale.new_empty
    loss = new(rows if reduction == "none" else ())
    return loss, new(rows, int(diagonal is not None)), new(rows), new(rows if compute_grad_x else 0, width)


@torch.library.custom_op("vito_kernels::siglip_backward", mutates_args=())
def siglip_backward_op(
    gradient: Tensor,
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    diagonal: int | None,
    logits: Tensor,
    shares: Tensor,
    mean: Tensor,
    need_x: bool,
    need_y: bool,
    need_scale: bool,
    need_bias: bool,
    reduction: str,
    matmul_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dy, dscale, dbias), each rounded once to its input's dtype; one that is not needed is empty."""
    path, mask = path_of(x), Mask(diagonal=diagonal)
    share, weight, pair, part = row_grads(gradient, logits, shares, bias, reduction)
    base, key_base = mean if need_x or need_scale else None, None
    if need_y:
        given = share, None, mask, False, True, matmul_dtype
        _, key_base = path.lse_backward(x, y, scale, *given, sigmoid=True, parts=True)
    options = pair, diagonal or 0, weight, need_x, need_scale
    dx, dscale, dy = path.grad_epilogues(base, key_base, scale, x, y, *options)
    return dx, dy, dscale, part.sum() if need_bias else scale.new_empty(0)


@siglip_backward_op.register_fake
def _(
    gradient, x, y, scale, bias, diagonal, logits, shares, mean, need_x, need_y, need_scale, need_bias, reduction,
    matmul_dtype=None,
):  # fmt: skip
    return (
        x.new_empty(x.shape if need_x else 0),
        y.new_empty(y.shape if need_y else 0),
        scale.new_empty(() if need_scale else 0),
        scale.new_empty(() if need_bias else 0),
    )


def _setup_context(ctx, inputs, output):
    x, y, scale, bias, ctx.diagonal, _, ctx.reduction, ctx.matmul_dtype = inputs
    ctx.save_for_backward(x, y, scale, bias, *output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, gradient, *_):  # no gradient reaches the other outputs, which stay in this module
    if gradient is None:
        return (None,) * 8
    x, y, scale, bias, *more = ctx.saved_tensors
    needs, inputs = ctx.needs_input_grad[:4], (x, y, scale, bias, ctx.diagonal)
    grads = apply_siglip_backward(gradient, *inputs, *more, *needs, ctx.reduction, ctx.matmul_dtype)
    return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), *(None,) * 4


register_flops(siglip_op, lambda x, y, compute_grad_x, **_: (4 if compute_grad_x else 2) * len(x) * len(y) * x.shape[1])
register_flops(siglip_backward_op, lambda x, y, need_y, **_: 4 * len(x) * len(y) * x.shape[1] if need_y else 0)
apply_siglip = autograd_op(siglip_op, _setup_context, _backward)
apply_siglip_backward = refuse_double_backward(siglip_backward_op)

# ---- public function


@replayed
def siglip_loss(
    x: Tensor, y: Tensor, scale: float | Tensor, bias: float | Tensor = 0.0, *, reduction: Reduction = "mean"
) -> Tensor:
    """The sigmoid loss of SigLIP (Zhai et al., arXiv 2303.15343), where row i of x belongs to row i of y.

    Equivalent, with ``s = scale * x @ y.T + bias`` and ``sign = 2 * eye(M) - 1``:
    ``-logsigmoid(sign * s).sum(1).mean()``.

    Args:
        x, y: (M, D), as q and k of ``similarity_lse``. Nothing is normalized here.
        scale, bias: numbers or tensors of one element, which may require grad. SigLIP starts at 10 and -10.
        reduction: "mean" or "sum" over the rows of x, or "none".

    Returns:
        A float32 scalar, or (M,) with "none".

    Raises:
        ValueError, TypeError: as ``similarity_lse``.

    Costs 2 M M D flops without gradient, 4 M M D with that of x, and 4 M M D more for that of y. Autocast and
    determinism as for ``similarity_lse``. Across ranks: ``vito_kernels.distributed.global_siglip_loss``.
    """
    if not (few := small.is_small(x, y) and len(x) == len(y)):
        check_paired(x, y, ("x", "y"))
    check_reduction(reduction)
    if not isinstance(bias, Tensor):
        bias = check_scale(bias, x, "bias")
    if few:
        shift = scale_tensor(bias, x) if isinstance(bias, Tensor) else None
        return small.pairs(x, y, scale, small.all_pairs(bias if shift is None else shift), reduction, shift)
    (x, y), matmul_dtype = autocast_inputs(x, y)
    factor, shift = scale_tensor(scale, x), scale_tensor(bias, x)
    return apply_siglip(x, y, factor, shift, 0, needs_grad(x, factor), reduction, matmul_dtype)[0]
