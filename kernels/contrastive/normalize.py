"""Rows to unit length, one kernel each way: the step before a contrastive loss.

    u  = x / max(|x|, 1e-12)                                        torch.nn.functional.normalize(x, dim=1)
    dx = (g - u (u . g)) / |x|,  g / 1e-12 if |x| is smaller

x (M, D) float32, bfloat16 or float16. PyTorch takes three kernels forward and fourteen back, at a few thousand rows
longer than the loss itself, and rounds bfloat16 lengths before it divides. Here everything between input and output is
float32 (float64 for float64). A program owns whole rows: deterministic.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vito_kernels._core.autograd import autograd_op, refuse_double_backward, register_flops
from vito_kernels._core.checks import check_pair
from vito_kernels._core.lazy_triton import cdiv, jit, on_device, program_shape, rows_contiguous, use_triton

if TYPE_CHECKING:
    import triton.language as tl

MIN_LENGTH = 1e-12


@jit
def load_in_turns(x, second, stride, second_stride, row, column, inside, PAIRED: tl.constexpr):
    """Rows of x in float32; of a pair, x has the even rows and ``second`` the odd ones."""
    if PAIRED:
        own = tl.load(x + row // 2 * stride + column, mask=inside & (row % 2 == 0), other=0.0).to(tl.float32)
        other = second + row // 2 * second_stride + column
        return own + tl.load(other, mask=inside & (row % 2 == 1), other=0.0).to(tl.float32)
    else:
        return tl.load(x + row * stride + column, mask=inside, other=0.0).to(tl.float32)


@jit
def normalize_fwd_kernel(
    x, second, out, M, D, stride, second_stride, MIN_LENGTH: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    PAIRED: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = tl.arange(0, WIDTH)[None]
    inside = (row < M) & (column < D)
    own = load_in_turns(x, second, stride, second_stride, row, column, inside, PAIRED)
    length = tl.maximum(tl.sqrt_rn(tl.sum(own * own, 1)), MIN_LENGTH)[:, None]
    tl.store(out + row * D + column, tl.div_rn(own, length).to(out.dtype.element_ty), mask=inside)


@jit
def through_length(own, g, MIN_LENGTH: tl.constexpr):
    """The gradient of rows whose normalized rows have the gradient g."""
    length = tl.sqrt_rn(tl.sum(own * own, 1))[:, None]
    divisor = tl.maximum(length, MIN_LENGTH)
    unit = tl.div_rn(own, divisor)
    along = tl.where(length < MIN_LENGTH, 0.0, tl.sum(unit * g, 1)[:, None])
    return (g - unit * along) / divisor


@jit
def store_in_turns(out, second, rows, row, column, D, inside):
    tl.store(out + row // 2 * D + column, rows, mask=inside & (row % 2 == 0))
    tl.store(second + row // 2 * D + column, rows, mask=inside & (row % 2 == 1))


@jit
def normalize_bwd_kernel(
    gradient, x, second, out, second_out, M, D, g_stride, x_stride, second_stride, MIN_LENGTH: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, PAIRED: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = tl.arange(0, WIDTH)[None]
    inside = (row < M) & (column < D)
    own = load_in_turns(x, second, x_stride, second_stride, row, column, inside, PAIRED)
    g = tl.load(gradient + row * g_stride + column, mask=inside, other=0.0).to(tl.float32)
    dx = through_length(own, g, MIN_LENGTH).to(out.dtype.element_ty)
    if PAIRED:
        store_in_turns(out, second_out, dx, row, column, D, inside)
    else:
        tl.store(out + row * D + column, dx, mask=inside)


def launch_normalize(x: Tensor, second: Tensor | None = None) -> Tensor:
    """(M, D), or of two (2 M, D) in turns."""
    sides, D = [rows_contiguous(side) for side in (x, second) if side is not None], x.shape[1]
    out = torch.empty(len(x) * len(sides), D, dtype=x.dtype, device=x.device)
    width, rows = program_shape(D)
    with on_device(x):
        normalize_fwd_kernel[(cdiv(len(out), rows),)](
            sides[0], sides[-1], out, len(out), D, sides[0].stride(0), sides[-1].stride(0), MIN_LENGTH, width, rows,
            len(sides) == 2,
        )  # fmt: skip
    return out


def launch_normalize_backward(gradient: Tensor, x: Tensor, second: Tensor | None = None) -> list[Tensor]:
    gradient, D = rows_contiguous(gradient), x.shape[1]
    sides = [rows_contiguous(side) for side in (x, second) if side is not None]
    out = [torch.empty(side.shape, dtype=x.dtype, device=x.device) for side in sides]
    width, rows = program_shape(D)
    with on_device(x):
        normalize_bwd_kernel[(cdiv(len(gradient), rows),)](
            gradient, sides[0], sides[-1], out[0], out[-1], len(gradient), D, gradient.stride(0), sides[0].stride(0),
            sides[-1].stride(0), MIN_LENGTH, width, rows, len(sides) == 2,
        )  # fmt: skip
    return out


@torch.library.custom_op("vito_kernels::normalize", mutates_args=())
def normalize_op(x: Tensor) -> Tensor:
    """x (M, D) with rows of unit length."""
    if use_triton(x):
        return launch_normalize(x)
    return torch.nn.functional.normalize(_wide(x), dim=1).to(x.dtype).contiguous()


@normalize_op.register_fake
def _(x):
    return x.new_empty(x.shape)


@torch.library.custom_op("vito_kernels::normalize_backward", mutates_args=())
def normalize_backward_op(gradient: Tensor, x: Tensor) -> Tensor:
    if use_triton(x):
        return launch_normalize_backward(gradient, x)[0]
    return torch_normalize_backward(gradient, x)


@normalize_backward_op.register_fake
def _(gradient, x):
    return x.new_empty(x.shape)


def torch_normalize_backward(gradient: Tensor, x: Tensor) -> Tensor:
    g, wide = _wide(gradient), _wide(x)
    length = torch.linalg.vector_norm(wide, dim=1, keepdim=True)
    short = length < MIN_LENGTH
    unit = wide / length.clamp_(min=MIN_LENGTH)
    along = (unit * g).sum(1, keepdim=True).masked_fill_(short, 0)
    return unit.mul_(along.neg_()).add_(g).div_(length).to(x.dtype).contiguous()


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, gradient):
    return apply_backward(gradient, *ctx.saved_tensors)


register_flops(normalize_op)
register_flops(normalize_backward_op)
apply_normalize = autograd_op(normalize_op, _setup_context, _backward)
apply_backward = refuse_double_backward(normalize_backward_op)


def normalize(x: Tensor) -> Tensor:
    """Rows of x divided by their Euclidean length, or by 1e-12 if that is larger.

    Equivalent: ``torch.nn.functional.normalize(x, dim=1)``, rounded once.

    Args:
        x: (M, D) float32, bfloat16, float16 or float64; rows may be strided.

    Returns:
        (M, D) in the dtype of x.

    Raises:
        ValueError: a wrong shape.
        TypeError: a wrong dtype.
        RuntimeError: in double backward.

    Deterministic.
    """
    check_pair(x, x, ("x", "x"))
    return apply_normalize(x)


# ---- of two views, in turns


@torch.library.custom_op("vito_kernels::normalize_pair", mutates_args=())
def normalize_pair_op(x: Tensor, second: Tensor) -> Tensor:
    """As ``unit_in_turns``."""
    return unit_in_turns(x, second)


@normalize_pair_op.register_fake
def _(x, second):
    return x.new_empty(2 * x.shape[0], x.shape[1])


def unit_in_turns(x: Tensor, second: Tensor) -> Tensor:
    """Rows of x (M, D) and of ``second`` in turns, (2 M, D), of unit length."""
    if use_triton(x):
        return launch_normalize(x, second)
    return torch.nn.functional.normalize(torch.stack([_wide(x), _wide(second)], 1).flatten(0, 1), dim=1).to(x.dtype)


@torch.library.custom_op("vito_kernels::normalize_pair_backward", mutates_args=())
def normalize_pair_backward_op(gradient: Tensor, x: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    if use_triton(x):
        first, other = launch_normalize_backward(gradient, x, second)
        return first, other
    return normalize_backward_op(gradient[::2], x), normalize_backward_op(gradient[1::2], second)


@normalize_pair_backward_op.register_fake
def _(gradient, x, second):
    return x.new_empty(x.shape), second.new_empty(second.shape)


register_flops(normalize_pair_op)
register_flops(normalize_pair_backward_op)
apply_pair_backward = refuse_double_backward(normalize_pair_backward_op)
normalize_pair = autograd_op(
    normalize_pair_op, _setup_context, lambda ctx, gradient: apply_pair_backward(gradient, *ctx.saved_tensors)
)
