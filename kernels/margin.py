"""How far the negatives of a query come up to its positives: where the contrastive losses end.

    margin_i = mean over p of softplus(lse_i - logit_ip),     softplus(x) = log(1 + e^x)

which is -log of the positive's share among itself and the negatives. One kernel each way, in place of ten of PyTorch's
that take longer than the products of a few thousand rows. Elementwise, deterministic, in float32 (float64 for float64).
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
def _margin_kernel(lse2, logits, out, M, PAIRS: tl.constexpr, ROWS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    lse = tl.load(lse2 + row, mask=row < M, other=0.0) * 0.6931471805599453
    total = tl.zeros((ROWS,), tl.float32)
    for p in tl.static_range(PAIRS):
        x = lse - tl.load(logits + row.to(tl.int64) * PAIRS + p, mask=row < M, other=0.0)
        e = tl.exp(-tl.abs(x))
        u = 1.0 + e  # log(1 + e) to its last bit also where e is small: what u lost, u - 1 lost as well
        total += tl.maximum(x, 0.0) + tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))
    tl.store(out + row, total / PAIRS, mask=row < M)


@jit
def _margin_gradient_kernel(
    gradient, lse2, logits, g_lse2, g_logits, M, stride, PAIRS: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    lse = tl.load(lse2 + row, mask=row < M, other=0.0) * 0.6931471805599453
    g = tl.load(gradient + row * stride, mask=row < M, other=0.0) / PAIRS
    total = tl.zeros((ROWS,), tl.float32)
    for p in tl.static_range(PAIRS):
        place = row.to(tl.int64) * PAIRS + p
        x = lse - tl.load(logits + place, mask=row < M, other=0.0)
        e = tl.exp(-tl.abs(x))
        share = g * tl.where(x > 0.0, 1.0, e) / (1.0 + e)  # the sigmoid, which cannot overflow in this form
        tl.store(g_logits + place, -share, mask=row < M)
        total += share
    tl.store(g_lse2 + row, total * 0.6931471805599453, mask=row < M)


def launch_margin(lse2: Tensor, logits: Tensor) -> Tensor:
    out, lse2, logits = torch.empty_like(lse2), lse2.contiguous(), logits.contiguous()
    with on_device(lse2):
        _margin_kernel[(cdiv(len(lse2), ROWS),)](lse2, logits, out, len(lse2), logits.shape[1], ROWS)
    return out


def launch_margin_gradient(gradient: Tensor, lse2: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    lse2, logits = lse2.contiguous(), logits.contiguous()
    g_lse2, g_logits, (rows, pairs) = torch.empty_like(lse2), torch.empty_like(logits), logits.shape
    with on_device(lse2):
        _margin_gradient_kernel[(cdiv(rows, ROWS),)](
            gradient, lse2, logits, g_lse2, g_logits, rows, gradient.stride(0), pairs, ROWS
        )
    return g_lse2, g_logits


@torch.library.custom_op("vito_kernels::margin", mutates_args=())
def margin_op(lse2: Tensor, logits: Tensor) -> Tensor:
    """The margins (M,) of lse2 (M,), in units of log 2, over logits (M, P)."""
    if use_triton(lse2):
        return launch_margin(lse2, logits)
    return softplus(lse2[:, None] / LOG2E - logits).mean(1)


@margin_op.register_fake
def _(lse2, logits):
    return torch.empty_like(lse2)


@torch.library.custom_op("vito_kernels::margin_backward", mutates_args=())
def margin_backward(gradient: Tensor, lse2: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """(of lse2 (M,), of the logits (M, P)) where ``gradient`` (M,) of the margins arrives."""
    if use_triton(lse2):
        return launch_margin_gradient(gradient, lse2, logits)
    shares = torch.sigmoid(lse2[:, None] / LOG2E - logits).mul_(gradient[:, None] / logits.shape[1])
    return shares.sum(1).div_(LOG2E), shares.neg_()


@margin_backward.register_fake
def _(gradient, lse2, logits):
    return torch.empty_like(lse2), torch.empty_like(logits)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, gradient):
    return apply_backward(gradient, *ctx.saved_tensors)


margin = autograd_op(margin_op, _setup_context, _backward)
apply_backward = refuse_double_backward(margin_backward)


def specs() -> list[Spec]:
    """Both kernels, at the nominal size of a large contrastive batch."""
    rows = 32768

    def launch() -> None:
        lse2, logits = torch.empty(rows, device="meta"), torch.empty(rows, 1, device="meta")
        launch_margin(lse2, logits)
        launch_margin_gradient(lse2, lse2, logits)

    return [Spec("margin", launch, flops=0.0, min_bytes=28.0 * rows, tensor_cores=False)]
