"""The end of the contrastive losses: softplus of the negatives' log-sum-exp minus the positive's logit.

    loss_i = mean over p of softplus(lse_i - logit_ip),     softplus(x) = log(1 + e^x)
    loss_i = mean over p of lse_i - logit_ip                with ``decoupled``; 0 without negatives

That is -log of the positive's share among itself and the negatives. A two-sided loss takes the mean over the pair's row
and its column. lse comes in two parts (``terms.split_sum``), since a difference of large logits may be small. lse and
logits are in units of log 2. One kernel each way replaces ten of PyTorch's, which at a few thousand rows take
longer than the products. Deterministic, float32 (float64 for float64); one program adds up a sum or a mean.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vito_kernels._core.autograd import autograd_op, refuse_double_backward, register_flops, softplus
from vito_kernels._core.checks import check_reduction, reduce
from vito_kernels._core.lazy_triton import cdiv, jit, on_device, reduction_rows, use_triton
from vito_kernels.contrastive.device_functions import sigmoid
from vito_kernels.contrastive.device_functions import softplus as device_softplus
from vito_kernels.contrastive.terms import LOG2E

if TYPE_CHECKING:
    import triton.language as tl

ROWS = 256  # of a program


@jit
def _term(x, lse, DECOUPLED: tl.constexpr):
    """The loss of a row whose log-sum-exp is x above its positive."""
    if DECOUPLED:
        return tl.where(lse == -float("inf"), 0.0, x)
    else:
        return device_softplus(x)


@jit
def _term_grad(x, lse, DECOUPLED: tl.constexpr):
    if DECOUPLED:
        return tl.where(lse == -float("inf"), 0.0, 1.0)
    else:
        return sigmoid(x)


@jit
def softplus_loss_fwd_kernel(
    lse2, lse_residual, second, second_residual, logits, out, M, rows, PAIRS: tl.constexpr, SIDES: tl.constexpr,
    ROWS: tl.constexpr, REDUCED: tl.constexpr, DECOUPLED: tl.constexpr,
):  # fmt: skip
    """The losses of the rows, or by one program their sum over ``rows``."""
    reduced = tl.zeros((ROWS,), tl.float32)
    for first in range(tl.program_id(0) * ROWS, M, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)
        lse = tl.load(lse2 + row, mask=row < M, other=0.0)
        lost = tl.load(lse_residual + row, mask=row < M, other=0.0)
        if SIDES == 2:
            other = tl.load(second + row, mask=row < M, other=0.0)
            other_lost = tl.load(second_residual + row, mask=row < M, other=0.0)
        total = tl.zeros((ROWS,), tl.float32)
        for p in range(PAIRS):
            logit = tl.load(logits + row.to(tl.int64) * PAIRS + p, mask=row < M, other=0.0)
            total += _term((lse - logit + lost) * 0.6931471805599453, lse, DECOUPLED)
            if SIDES == 2:
                total += _term((other - logit + other_lost) * 0.6931471805599453, other, DECOUPLED)
        total /= PAIRS * SIDES
        if REDUCED:
            reduced += tl.where(row < M, total, 0.0)
        else:
            tl.store(out + row, total, mask=row < M)
    if REDUCED:
        tl.store(out, tl.sum(reduced, 0) / rows)


@jit
def softplus_loss_bwd_kernel(
    gradient, lse2, lse_residual, second, second_residual, logits, g_lse2, g_second, g_logits, M, rows, stride,
    PAIRS: tl.constexpr, SIDES: tl.constexpr, ROWS: tl.constexpr, DECOUPLED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    lse = tl.load(lse2 + row, mask=row < M, other=0.0)
    lost = tl.load(lse_residual + row, mask=row < M, other=0.0)
    g = tl.load(gradient + row.to(tl.int64) * stride, mask=row < M, other=0.0) / rows / (PAIRS * SIDES)
    total = tl.zeros((ROWS,), tl.float32)
    if SIDES == 2:
        other = tl.load(second + row, mask=row < M, other=0.0)
        other_lost = tl.load(second_residual + row, mask=row < M, other=0.0)
        other_total = total
    for p in range(PAIRS):
        place = row.to(tl.int64) * PAIRS + p
        logit = tl.load(logits + place, mask=row < M, other=0.0)
        share = g * _term_grad((lse - logit + lost) * 0.6931471805599453, lse, DECOUPLED)
        total += share
        if SIDES == 2:
            other_share = g * _term_grad((other - logit + other_lost) * 0.6931471805599453, other, DECOUPLED)
            other_total += other_share
            share += other_share
        tl.store(g_logits + place, -share * 0.6931471805599453, mask=row < M)
    tl.store(g_lse2 + row, total * 0.6931471805599453, mask=row < M)
    if SIDES == 2:
        tl.store(g_second + row, other_total * 0.6931471805599453, mask=row < M)


Sides = tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # lse2 (M,) and its lse_residual, of one side or of two


def launch_softplus_loss(sides: Sides, logits: Tensor, reduction: str, decoupled: bool) -> Tensor:
    (rows, pairs), reduced = logits.shape, reduction != "none"
    out, grid = sides[0].new_empty(() if reduced else rows), 1 if reduced else cdiv(rows, ROWS)
    with on_device(out):
        softplus_loss_fwd_kernel[(grid,)](
            *_dense(sides), logits.contiguous(), out, rows, _divisor(reduction, rows), pairs, _count(sides),
            reduction_rows(rows) if reduced else ROWS, reduced, decoupled, num_warps=8 if reduced else 4,
        )  # fmt: skip
    return out


def _divisor(reduction: str, rows: int) -> float:
    return float(rows) if reduction == "mean" else 1.0


def launch_softplus_loss_backward(
    gradient: Tensor, sides: Sides, logits: Tensor, reduction: str, decoupled: bool
) -> tuple[Tensor, Tensor, Tensor]:
    logits, (rows, pairs), count, lse2 = logits.contiguous(), logits.shape, _count(sides), sides[0]
    g_lse2, g_logits, g_second = torch.empty_like(lse2), torch.empty_like(logits), lse2.new_empty(rows * (count - 1))
    with on_device(lse2):
        softplus_loss_bwd_kernel[(cdiv(rows, ROWS),)](
            gradient, *_dense(sides), logits, g_lse2, g_second, g_logits, rows, _divisor(reduction, rows),
            gradient.stride(0) if reduction == "none" else 0, pairs, count, ROWS, decoupled,
        )  # fmt: skip
    return g_lse2, g_logits, g_second


def _dense(sides: Sides) -> list[Tensor | None]:
    return [x if x is None else x.contiguous() for x in sides]


def _count(sides: Sides) -> int:
    return 1 if sides[2] is None else 2


@torch.library.custom_op("vito_kernels::softplus_loss", mutates_args=())
def softplus_loss_op(
    lse2: Tensor,
    lse_residual: Tensor,
    second: Tensor | None,
    second_residual: Tensor | None,
    logits: Tensor,
    reduction: str,
    decoupled: bool,
) -> Tensor:
    """As ``softplus_loss``."""
    sides = lse2, lse_residual, second, second_residual
    if use_triton(lse2):
        return launch_softplus_loss(sides, logits, reduction, decoupled)
    over = _over_logits(sides, logits)
    return reduce((over.masked_fill(over == -torch.inf, 0) if decoupled else softplus(over)).mean((0, 2)), reduction)


@softplus_loss_op.register_fake
def _(lse2, lse_residual, second, second_residual, logits, reduction, decoupled):
    return lse2.new_empty(lse2.shape if reduction == "none" else ())


@torch.library.custom_op("vito_kernels::softplus_loss_backward", mutates_args=())
def softplus_loss_backward_op(
    gradient: Tensor,
    lse2: Tensor,
    lse_residual: Tensor,
    second: Tensor | None,
    second_residual: Tensor | None,
    logits: Tensor,
    reduction: str,
    decoupled: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of lse2 (M,), of the logits (M, P), and of ``second``, (M,) or (0,)."""
    sides = lse2, lse_residual, second, second_residual
    if use_triton(lse2):
        return launch_softplus_loss_backward(gradient, sides, logits, reduction, decoupled)
    over = _over_logits(sides, logits)
    shares = (over != -torch.inf).to(over.dtype) if decoupled else over.sigmoid_()
    rows = gradient[:, None] if reduction == "none" else gradient / _divisor(reduction, len(lse2))
    shares.mul_(rows / (shares.shape[0] * shares.shape[2] * LOG2E))
    return shares[0].sum(1), shares.sum(0).neg_(), shares[1:].sum((0, 2)) if len(shares) == 2 else shares.new_empty(0)


@softplus_loss_backward_op.register_fake
def _(gradient, lse2, lse_residual, second, second_residual, logits, reduction, decoupled):
    return torch.empty_like(lse2), torch.empty_like(logits), lse2.new_empty(0 if second is None else lse2.shape)


def _over_logits(sides: Sides, logits: Tensor) -> Tensor:
    """(S, M, P): each log-sum-exp minus each logit of its row, in natural units."""
    lse2, lse_residual, second, second_residual = sides
    over = [(lse2[:, None] - logits).add_(lse_residual[:, None])]
    if second is not None and second_residual is not None:
        over.append((second[:, None] - logits).add_(second_residual[:, None]))
    return torch.stack(over).div_(LOG2E)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.reduction, ctx.decoupled = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, gradient):
    sides = ctx.saved_tensors
    g_lse2, g_logits, g_second = apply_backward(gradient, *sides, ctx.reduction, ctx.decoupled)
    return g_lse2, None, None if sides[2] is None else g_second, None, g_logits, None, None


register_flops(softplus_loss_op)
register_flops(softplus_loss_backward_op)
apply_softplus_loss = autograd_op(softplus_loss_op, _setup_context, _backward)
apply_backward = refuse_double_backward(softplus_loss_backward_op)


def softplus_loss(
    lse2: Tensor,
    lse_residual: Tensor,
    logits: Tensor,
    second: Tensor | None = None,
    second_residual: Tensor | None = None,
    *,
    reduction: str = "none",
    decoupled: bool = False,
) -> Tensor:
    """The loss of each row, of one side or of two.

    Args:
        lse2, lse_residual: (M,), the log-sum-exp of the negatives and its rounding residual, in units of log 2.
        logits: (M, P), of the positives, in units of log 2.
        second, second_residual: (M,), the log-sum-exp of another side; the result is the mean over both.
        reduction: "mean", "sum" or "none".
        decoupled: leave the positive out of the denominator.

    Returns:
        () or (M,), in natural units.
    """
    check_reduction(reduction)
    return apply_softplus_loss(lse2, lse_residual, second, second_residual, logits, reduction, decoupled)
