"""Batch norm in training, with the residual sum and ReLU in the pass that normalizes.

    z = (x - mean) / sqrt(var + eps) * weight + bias [+ residual]      mean, biased var of each channel over all rows
    y = max(z, 0), or z without ReLU                                   rows are B, or B * H * W

x (B, C) or (B, C, H, W) channels_last, float32, bfloat16 or float16; statistics float32. Passes over memory count:
forward reads x twice and writes y once, backward reads x and the gradient twice and writes dx once. The mask of a ReLU
alone is computed again from x. After a residual it comes from y. The first backward pass then writes the masked
gradient, which is the residual's, and the second pass reads it.

With G groups, each of G consecutive shares of the batch has its own statistics, in the same launches. A pair of views
is then normalized as by two forward passes. Statistics are (G, C), or (C) for one group.

The steps are ops of their own, so that ranks can merge their statistics between them by Chan's formula
(:mod:`vito_kernels.distributed.sync_batch_norm`). Deterministic: no atomics, sums in a fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vito_kernels._core.autograd import autograd_op, direct_call, refuse_double_backward, register_flops
from vito_kernels._core.checks import FLOATS
from vito_kernels._core.lazy_triton import on_device, use_triton
from vito_kernels.batch_norm.triton_kernels import (
    launch_backward,
    launch_forward,
    launch_merge_stats,
    launch_stats,
    launch_sums,
)

# ---------------------------------------------------------------------------------------------------------- custom ops


@torch.library.custom_op("vito_kernels::batch_norm_local_stats", mutates_args=())
def local_stats_op(x: Tensor, groups: int = 1) -> Tensor:
    """Statistics of x for ranks to exchange, (1, 2 C + 1) float32 or float64: means, squared deviations, count.

    (1, G, 2 C + 1) of more groups than one.
    """
    if use_triton(x):
        with on_device(x):
            parts = launch_stats(x, groups)
            merged = parts.new_empty((1, *parts.shape[1:]))
            nothing = (None, None, None)
            launch_merge_stats(parts, merged, nothing, nothing[:2], 0.0, 0.0)
            return merged
    mean, squares, count = _moments(x, groups)
    part = torch.cat([mean, squares, count[:, None]], 1)
    return part if groups == 1 else part[None]


@local_stats_op.register_fake
def _(x: Tensor, groups: int = 1) -> Tensor:
    shape = (1, 2 * x.shape[1] + 1) if groups == 1 else (1, groups, 2 * x.shape[1] + 1)
    return x.new_empty(shape, dtype=_compute_dtype(x))


@torch.library.custom_op("vito_kernels::batch_norm_merge_stats", mutates_args=("running_mean", "running_var"))
def merge_stats_op(
    parts: Tensor, running_mean: Tensor | None, running_var: Tensor | None, momentum: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Of parts (P, 2 C + 1): mean (C), 1 / deviation (C), count (1). Moves the running statistics.

    Of parts (P, G, 2 C + 1): (G, C), (G, C), (G); the running statistics move by one group after the other.
    """
    parts = parts.contiguous()
    if use_triton(parts):
        with on_device(parts):
            return _launch_merge(parts, running_mean, running_var, momentum, eps)
    parts = parts if parts.dim() == 3 else parts[:, None]
    means, squares, counts = parts.tensor_split((parts.shape[2] // 2, parts.shape[2] - 1), 2)
    count = counts.sum(0)
    mean = (means * counts).sum(0) / count
    squares = (squares + counts * (means - mean).square()).sum(0)
    return _finish(mean, squares, count[:, 0], running_mean, running_var, momentum, eps)


@merge_stats_op.register_fake
def _(
    parts: Tensor, running_mean: Tensor | None, running_var: Tensor | None, momentum: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_stats(parts)


@torch.library.custom_op("vito_kernels::batch_norm_stats", mutates_args=("running_mean", "running_var"))
def stats_op(
    x: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float, eps: float, groups: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Of x alone: as :func:`merge_stats_op` of its parts, float32 or float64."""
    if use_triton(x):
        with on_device(x):
            return _launch_merge(launch_stats(x, groups), running_mean, running_var, momentum, eps)
    return _finish(*_moments(x, groups), running_mean, running_var, momentum, eps)


@stats_op.register_fake
def _(
    x: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float, eps: float, groups: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (1, 2 * x.shape[1] + 1) if groups == 1 else (1, groups, 2 * x.shape[1] + 1)
    return _empty_stats(x.new_empty(shape, dtype=_compute_dtype(x)))


@torch.library.custom_op("vito_kernels::batch_norm", mutates_args=())
def forward_op(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, mean: Tensor, invstd: Tensor, count: Tensor,
    relu: bool,
) -> Tensor:  # fmt: skip
    """y, like x. Its gradient takes mean and invstd as functions of the ``count`` rows of x."""
    if use_triton(x):
        with on_device(x):
            return launch_forward(x, weight, bias, residual, mean, invstd, relu)
    z = _normalized(x, weight, bias, mean, invstd).flatten(0, 1)
    z = z if residual is None else z + residual
    return torch.empty_like(x).copy_(z.masked_fill(z <= 0, 0.0) if relu else z)


@forward_op.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, mean: Tensor, invstd: Tensor, count: Tensor,
    relu: bool,
) -> Tensor:  # fmt: skip
    return torch.empty_like(x)


@torch.library.custom_op("vito_kernels::batch_norm_sums", mutates_args=())
def sums_op(
    grad: Tensor, x: Tensor, y: Tensor | None, weight: Tensor, bias: Tensor, mean: Tensor, invstd: Tensor, relu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The two sums (2, C) over rows that dx needs, the gradients of weight and bias, and with y that of the residual.

    (G, 2, C) of more groups than one. ``y`` is given if a ReLU follows a residual, else the fourth result is empty.
    """
    grad = to_rows(grad)
    if use_triton(x):
        with on_device(x):
            return launch_sums(grad, x, y, weight, bias, mean, invstd, relu)
    axes = [d for d in range(x.dim() + 1) if d not in (0, 2)]
    g = _relu_grad(grad, x, y, weight, bias, mean, invstd, relu)
    sums = torch.stack([g.sum(axes), (g * (_grouped(x, mean) - _per_channel(mean, x))).sum(axes)], 1)
    d_weight, d_bias = (sums[:, 1] * invstd.view(len(sums), -1)).sum(0), sums[:, 0].sum(0)
    masked = x.new_empty(0) if y is None else torch.empty_like(x).copy_(g.flatten(0, 1))
    return sums.view(*mean.shape[:-1], 2, -1), d_weight.to(weight.dtype), d_bias.to(bias.dtype), masked


@sums_op.register_fake
def _(
    grad: Tensor, x: Tensor, y: Tensor | None, weight: Tensor, bias: Tensor, mean: Tensor, invstd: Tensor, relu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    masked = x.new_empty(0) if y is None else torch.empty_like(x)
    sums = mean.new_empty((*mean.shape[:-1], 2, mean.shape[-1]))
    return sums, torch.empty_like(weight), torch.empty_like(bias), masked


@torch.library.custom_op("vito_kernels::batch_norm_input_grad", mutates_args=())
def input_grad_op(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, invstd: Tensor, count: Tensor, sums: Tensor,
    relu: bool,
) -> Tensor:  # fmt: skip
    """dx, like x, from the sums over all ``count`` rows. ``relu``: the gradient is not yet masked."""
    grad = to_rows(grad)
    if use_triton(x):
        with on_device(x):
            return launch_backward(grad, x, weight, bias, mean, invstd, count, sums, relu)
    g = _relu_grad(grad, x, None, weight, bias, mean, invstd, relu)
    average, product = (sums.view(len(count), 2, -1) / count[:, None, None]).unbind(1)
    slope = _per_channel(product * invstd.view(len(count), -1).square(), x)
    dx = g - _per_channel(average, x) - (_grouped(x, mean) - _per_channel(mean, x)) * slope
    return torch.empty_like(x).copy_((dx * _per_channel(invstd * weight, x)).flatten(0, 1))


@input_grad_op.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, invstd: Tensor, count: Tensor, sums: Tensor,
    relu: bool,
) -> Tensor:  # fmt: skip
    return torch.empty_like(x)


def _launch_merge(
    parts: Tensor, running_mean: Tensor | None, running_var: Tensor | None, momentum: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    finished = _empty_stats(parts)
    launch_merge_stats(parts, None, finished, (running_mean, running_var), momentum, eps)
    return finished


def _empty_stats(parts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, 1 / deviation and count of parts, not filled in."""
    shape = (*parts.shape[1:-1], parts.shape[-1] // 2)
    return parts.new_empty(shape), parts.new_empty(shape), parts.new_empty(shape[0] if len(shape) == 2 else 1)


def _finish(
    mean: Tensor, squares: Tensor, count: Tensor,
    running_mean: Tensor | None, running_var: Tensor | None, momentum: float, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Of (G, C), (G, C), (G)."""
    if running_mean is not None and running_var is not None:
        for average, square, n in zip(mean, squares, count, strict=True):
            running_mean.lerp_(average.to(running_mean.dtype), momentum)
            running_var.lerp_((square / (n - 1).clamp(min=1)).to(running_var.dtype), momentum)
    invstd = (squares / count[:, None] + eps).rsqrt()
    return (mean, invstd, count) if len(mean) > 1 else (mean[0], invstd[0], count.clone())


def _moments(x: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Means (G, C), squared deviations (G, C), counts (G)."""
    axes = [d for d in range(x.dim() + 1) if d not in (0, 2)]
    wide = x.to(_compute_dtype(x)).unflatten(0, (groups, -1))
    mean = wide.mean(axes)
    count = mean.new_full((groups,), x.numel() // x.shape[1] // groups)
    return mean, (wide - _per_channel(mean, x)).square().sum(axes), count


def _relu_grad(
    grad: Tensor, x: Tensor, y: Tensor | None, weight: Tensor, bias: Tensor, mean: Tensor, invstd: Tensor, relu: bool
) -> Tensor:
    """The masked gradient by groups, (G, B / G, C, ...)."""
    grad = _grouped(grad.to(mean.dtype), mean)
    if y is not None:
        return grad.masked_fill(_grouped(y, mean) <= 0, 0.0)
    z = _normalized(x, weight, bias, mean, invstd).to(x.dtype)
    return grad.masked_fill(z <= 0, 0.0) if relu else grad


def _normalized(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, invstd: Tensor) -> Tensor:
    centered = _grouped(x.to(mean.dtype), mean) - _per_channel(mean, x)
    return centered * _per_channel(invstd * weight, x) + _per_channel(bias, x)


def _grouped(x: Tensor, mean: Tensor) -> Tensor:
    """(B, C, ...) by groups, (G, B / G, C, ...), of statistics (C) or (G, C)."""
    return x.unflatten(0, (1 if mean.dim() == 1 else len(mean), -1))


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    """Values (C) or (G, C) beside x by groups."""
    return values.view(-1, 1, x.shape[1], *[1] * (x.dim() - 2))


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _has_rows(x: Tensor) -> bool:
    """Whether the memory of x is (R, C)."""
    return x.is_contiguous() if x.dim() == 2 else x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)


def to_rows(x: Tensor) -> Tensor:
    """x with (R, C) memory, which every kernel here expects; a copy if need be."""
    return x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.contiguous_format)


for op in (local_stats_op, merge_stats_op, stats_op, forward_op, sums_op, input_grad_op):
    register_flops(op)
local_stats, merge_stats = direct_call(local_stats_op), direct_call(merge_stats_op)
apply_norm, grad_sums, input_grad = (direct_call(op) for op in (forward_op, sums_op, input_grad_op))
_statistics = direct_call(stats_op)


def _setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
    x, weight, bias, residual, mean, invstd, count, relu = inputs
    ctx.set_materialize_grads(False)
    ctx.relu, ctx.has_residual = relu, residual is not None
    y = output if relu and ctx.has_residual else None
    ctx.save_for_backward(x, weight, bias, mean, invstd, count, y)


def _backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 8
    x, weight, bias, mean, invstd, count, y = ctx.saved_tensors
    sums, d_weight, d_bias, masked = _grad_sums(grad, x, y, weight, bias, mean, invstd, ctx.relu)
    grad = grad if y is None else masked
    dx = _input_grad(grad, x, weight, bias, mean, invstd, count, sums, ctx.relu and y is None)
    return dx, d_weight, d_bias, grad if ctx.has_residual else None, None, None, None, None


_apply = autograd_op(forward_op, _setup_context, _backward)
_grad_sums, _input_grad = refuse_double_backward(sums_op), refuse_double_backward(input_grad_op)

# ------------------------------------------------------------------------------------------------------ public function


def can_fuse(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None,
    residual: Tensor | None = None, groups: int = 1,
) -> bool:  # fmt: skip
    """Whether :func:`batch_norm` runs its own kernels on these tensors; otherwise it is torch's ops.

    Compiled code uses torch's ops, because Inductor fuses them with the ops around them.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    if not use_triton(x) or x.dtype not in FLOATS or not _has_rows(x) or not x.numel() > x.shape[1] * groups:
        return False
    channels = all(
        t is not None and (t.dtype, t.device, t.shape) == (torch.float32, x.device, x.shape[1:2]) and t.is_contiguous()
        for t in (weight, bias, running_mean, running_var)
    )
    return channels and (
        residual is None
        or ((residual.dtype, residual.device, residual.shape) == (x.dtype, x.device, x.shape) and _has_rows(residual))
    )


def batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    *,
    momentum: float,
    eps: float,
    residual: Tensor | None = None,
    relu: bool = False,
    groups: int = 1,
) -> Tensor:
    """Batch norm in training mode with the usual sum and ReLU: ``relu(batch_norm(x) + residual)``.

    Equivalent to ``torch.nn.functional.batch_norm(..., training=True)``, the sum and ``torch.relu``, rounded once.

    Args:
        x: (B, C), or (B, C, H, W) in channels_last, of at least two rows. The kernels take float32, bfloat16 or
            float16 on a GPU. torch computes all other devices, dtypes and memory formats.
        weight, bias: (C,), float32.
        running_mean, running_var: (C,), float32; moved by ``momentum`` towards the mean and the unbiased variance.
        residual: added before the ReLU; shape, dtype and memory format of x.
        relu: whether negative results become 0.
        groups: consecutive equal shares of the batch with statistics of their own, as in a call for each. The running
            statistics move by one after the other.

    Returns:
        y with shape, dtype and strides of x. Carries gradients to x, weight, bias and residual; a second derivative
        raises RuntimeError. Keeps x for it, and y where ``relu`` and ``residual`` are given.

    Raises:
        ValueError: ``residual`` has another shape than x, x has one row, or B is no multiple of ``groups``. Errors of
            torch's function pass.

    Deterministic.
    """
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual must have x's shape {tuple(x.shape)}, got {tuple(residual.shape)}")
    if groups < 1 or len(x) % groups:
        raise ValueError(f"{len(x)} rows do not divide into {groups} groups")
    if not can_fuse(x, weight, bias, running_mean, running_var, residual, groups):
        shares = [
            F.batch_norm(s, running_mean, running_var, weight, bias, True, momentum, eps) for s in x.chunk(groups)
        ]
        y = shares[0] if groups == 1 else torch.cat(shares)
        y = y if residual is None else y + residual
        return torch.relu(y) if relu else y
    statistics = _statistics(x.detach(), running_mean, running_var, momentum, eps, groups)
    result: Tensor = _apply(x, weight, bias, residual, *statistics, relu)
    return result
