"""How far the negatives of a query come up to its positives: where the contrastive losses end.

    margin_i = mean over p of softplus(lse_i - logit_ip),     softplus(x) = log(1 + e^x)

which is -log of the positive's share among itself and the negatives; in a loss of two sides it is the mean of that of
the pair's row and that of its column. One kernel each way, in place of ten of PyTorch's that take longer than the
products of a few thousand rows. Elementwise, deterministic, in float32 (float64 for float64).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vito_kernels._ops import autograd_op, refuse_double_backward, softplus
from vito_kernels._tiles import cdiv
from vito_kernels._triton import Spec, jit, on_device, use_triton
from vito_kernels.tiled import LOG2E

if TYPE_CHECKING:
    import triton.language as tl

ROWS = 256  # of a program


@jit
def _softplus(x):
    e = tl.exp(-tl.abs(x))
    u = 1.0 + e  # log(1 + e) to its last bit also where e is small: what u lost, u - 1 lost as well
    return tl.maximum(x, 0.0) + tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))


@jit
def _sigmoid(x):
    e = tl.exp(-tl.abs(x))  # which cannot overflow
    return tl.where(x > 0.0, 1.0, e) / (1.0 + e)


@jit
def _margin_kernel(
    lse2, second, logits, out, M, PAIRS: tl.constexpr, SIDES: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    lse = tl.load(lse2 + row, mask=row < M, other=0.0) * 0.6931471805599453
    if SIDES == 2:
        other = tl.load(second + row, mask=row < M, other=0.0) * 0.6931471805599453
    total = tl.zeros((ROWS,), tl.float32)
    for p in tl.static_range(PAIRS):
        logit = tl.load(logits + row.to(tl.int64) * PAIRS + p, mask=row < M, other=0.0)
        total += _softplus(lse - logit)
        if SIDES == 2:
            total += _softplus(other - logit)
    tl.store(out + row, total / (PAIRS * SIDES), mask=row < M)


@jit
def _margin_gradient_kernel(
    gradient, lse2, second, logits, g_lse2, g_second, g_logits, M, stride, PAIRS: tl.constexpr, SIDES: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    lse = tl.load(lse2 + row, mask=row < M, other=0.0) * 0.6931471805599453
    g = tl.load(gradient + row * stride, mask=row < M, other=0.0) / (PAIRS * SIDES)
    total = tl.zeros((ROWS,), tl.float32)
    if SIDES == 2:
        other = tl.load(second + row, mask=row < M, other=0.0) * 0.6931471805599453
        other_total = total
    for p in tl.static_range(PAIRS):
        place = row.to(tl.int64) * PAIRS + p
        logit = tl.load(logits + place, mask=row < M, other=0.0)
        share = g * _sigmoid(lse - logit)
        total += share
        if SIDES == 2:
            other_share = g * _sigmoid(other - logit)
            other_total += other_share
            share += other_share
        tl.store(g_logits + place, -share, mask=row < M)
    tl.store(g_lse2 + row, total * 0.6931471805599453, mask=row < M)
    if SIDES == 2:
        tl.store(g_second + row, other_total * 0.6931471805599453, mask=row < M)


def launch_margin(lse2: Tensor, logits: Tensor, second: Tensor | None) -> Tensor:
    out, lse2, logits = torch.empty_like(lse2), lse2.contiguous(), logits.contiguous()
    sides, second = (1, None) if second is None else (2, second.contiguous())
    with on_device(lse2):
        _margin_kernel[(cdiv(len(lse2), ROWS),)](lse2, second, logits, out, len(lse2), logits.shape[1], sides, ROWS)
    return out


def launch_margin_gradient(
    gradient: Tensor, lse2: Tensor, logits: Tensor, second: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    lse2, logits, (rows, pairs) = lse2.contiguous(), logits.contiguous(), logits.shape
    sides, second = (1, None) if second is None else (2, second.contiguous())
    g_lse2, g_logits, g_second = torch.empty_like(lse2), torch.empty_like(logits), lse2.new_empty(rows * (sides - 1))
    with on_device(lse2):
        _margin_gradient_kernel[(cdiv(rows, ROWS),)](
            gradient, lse2, second, logits, g_lse2, g_second, g_logits, rows, gradient.stride(0), pairs, sides, ROWS
        )
    return g_lse2, g_logits, g_second


@torch.library.custom_op("vito_kernels::margin", mutates_args=())
def margin_op(lse2: Tensor, logits: Tensor, second: Tensor | None) -> Tensor:
    """See ``margin``."""
    if use_triton(lse2):
        return launch_margin(lse2, logits, second)
    return softplus(_over_logits(lse2, logits, second)).mean((0, 2))


@margin_op.register_fake
def _(lse2, logits, second):
    return torch.empty_like(lse2)


@torch.library.custom_op("vito_kernels::margin_backward", mutates_args=())
def margin_backward(
    gradient: Tensor, lse2: Tensor, logits: Tensor, second: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(of lse2 (M,), of the logits (M, P), of ``second`` (M,) or empty) where ``gradient`` (M,) arrives."""
    if use_triton(lse2):
        return launch_margin_gradient(gradient, lse2, logits, second)
    shares = torch.sigmoid_(_over_logits(lse2, logits, second))
    shares.mul_(gradient[:, None] / (shares.shape[0] * shares.shape[2]))
    g_lse2, g_second = (side.sum(1).div_(LOG2E) for side in (shares[0], shares[1:].flatten(0, 1)))
    return g_lse2, shares.sum(0).neg_(), g_second


@margin_backward.register_fake
def _(gradient, lse2, logits, second):
    return torch.empty_like(lse2), torch.empty_like(logits), lse2.new_empty(0 if second is None else lse2.shape)


def _over_logits(lse2: Tensor, logits: Tensor, second: Tensor | None) -> Tensor:
    """(sides, M, P): how far each log-sum-exp lies above each logit of its row."""
    sides = lse2[None] if second is None else torch.stack([lse2, second])
    return sides[:, :, None] / LOG2E - logits


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, gradient):
    lse2, logits, second = ctx.saved_tensors
    g_lse2, g_logits, g_second = apply_backward(gradient, lse2, logits, second)
    return g_lse2, g_logits, None if second is None else g_second


apply_margin = autograd_op(margin_op, _setup_context, _backward)
apply_backward = refuse_double_backward(margin_backward)


def margin(lse2: Tensor, logits: Tensor, second: Tensor | None = None) -> Tensor:
    """The margins (M,) of lse2 (M,), in units of log 2, over logits (M, P); with ``second`` (M,), another side's lse2,
    the mean of both.
    """
    return apply_margin(lse2, logits, second)


def specs() -> list[Spec]:
    """Both kernels, of one side and of two, at the nominal size of a large contrastive batch."""

    def spec(sides: int, rows: int = 32768) -> Spec:
        def launch() -> None:
            lse2, logits = torch.empty(rows, device="meta"), torch.empty(rows, 1, device="meta")
            second = lse2 if sides == 2 else None
            launch_margin(lse2, logits, second)
            launch_margin_gradient(lse2, lse2, logits, second)

        name = "margin" if sides == 1 else "margin of two sides"
        return Spec(name, launch, flops=0.0, min_bytes=(16.0 + 12.0 * sides) * rows, tensor_cores=False)

    return [spec(1), spec(2)]
