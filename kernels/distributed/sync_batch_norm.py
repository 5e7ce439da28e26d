"""Batch norm whose statistics span the batches of all ranks, with the residual sum and ReLU that follow.

    y = relu(batch_norm(cat of all ranks' x) + residual)            this rank's rows

x (B, C) or (B, C, H, W); the ranks' batches may differ in size, but none is empty. On a GPU the ranks gather one part
of (2 C + 1) numbers each, and the backward pass reduces two sums of C. The op of torch exists for CUDA alone, and stops
the host in every layer to look for empty batches. On the CPU means and squared deviations are reduced one after the
other, so nothing cancels. Deterministic where the collectives are.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vito_kernels._core.autograd import once
from vito_kernels.batch_norm.op import apply_norm, grad_sums, input_grad, local_stats, merge_stats, to_rows
from vito_kernels.distributed.collectives import gather_rows

# ---- autograd


class SyncBatchNormFunction(torch.autograd.Function):
    """``vito_kernels.batch_norm`` in its steps, with a collective between them. Moves the running statistics."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        residual: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
        relu: bool,
        groups: int = 1,
    ) -> Tensor:
        x, residual = to_rows(x), None if residual is None else to_rows(residual)
        part = local_stats(x, groups)
        parts = part.new_empty(dist.get_world_size(), *part.shape[1:])
        gather_rows(parts, part)  # not asynchronous, which torch.compile cannot trace
        stats = merge_stats(parts, running_mean, running_var, momentum, eps)
        y: Tensor = apply_norm(x, weight, bias, residual, *stats, relu)
        ctx.relu, ctx.has_residual = relu, residual is not None
        ctx.save_for_backward(x, weight, bias, *stats, y if relu and ctx.has_residual else None)
        return y

    @staticmethod
    @once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, invstd, count, y = ctx.saved_tensors
        sums, d_weight, d_bias, masked = grad_sums(grad, x, y, weight, bias, mean, invstd, ctx.relu)
        grad = grad if y is None else masked
        dist.all_reduce(sums)
        dx = input_grad(grad, x, weight, bias, mean, invstd, count, sums, ctx.relu and y is None)
        return dx, d_weight, d_bias, grad if ctx.has_residual else None, None, None, None, None, None, None


class _AllReduceSum(torch.autograd.Function):
    """Sum over ranks. Each rank's input reaches every rank's loss, so the gradient is summed too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _all_reduce(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _all_reduce(grad)


def _all_reduce(x: Tensor) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


def all_reduce_sum(x: Tensor) -> Tensor:
    """The differentiable sum of ``x`` over all ranks; ``x`` itself in a single process."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return x
    result: Tensor = _AllReduceSum.apply(x)
    return result


# ---- public function


def sync_batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    momentum: float,
    eps: float,
    residual: Tensor | None = None,
    relu: bool = False,
    groups: int = 1,
) -> Tensor:
    """Batch norm in training over the concatenation of all ranks' batches, then the residual sum and ReLU.

    Args:
        x: (B, C) or (B, C, H, W), any float dtype, of the default process group.
        weight, bias: (C,) float32.
        running_mean, running_var: (C,) float32 or None; moved by ``momentum`` towards the mean and unbiased variance.
        momentum, eps: as for ``torch.nn.BatchNorm2d``.
        residual: added before the ReLU, in x's shape.
        relu: whether negative results become 0.
        groups: consecutive equal shares of each rank's batch. Each has statistics of its own, over the same share of
            all ranks.

    Returns:
        y in the shape and dtype of x, with gradients to x, weight, bias and residual. On a GPU a second derivative
        raises RuntimeError.

    Raises:
        ValueError: x has another number of dimensions, or B is no multiple of ``groups``.
    """
    if x.dim() not in (2, 4):
        raise ValueError(f"expected (B, C) or (B, C, H, W), got {tuple(x.shape)}")
    if len(x) % groups:
        raise ValueError(f"{len(x)} rows do not divide into {groups} groups")
    if x.is_cuda:
        residual = residual if residual is None or residual.dtype == x.dtype else residual.to(x.dtype)
        running = running_mean, running_var, momentum
        result: Tensor = SyncBatchNormFunction.apply(x, weight, bias, residual, *running, eps, relu, groups)
        return result
    dtype, x = x.dtype, x.to(torch.promote_types(x.dtype, torch.float32))  # in bfloat16 a sum is no statistic
    channels, beyond = x.shape[1], [1] * (x.dim() - 2)
    x = x.unflatten(0, (groups, -1))
    axes = [d for d in range(x.dim()) if d not in (0, 2)]
    sums = all_reduce_sum(torch.cat([x.sum(axes).flatten(), x.new_tensor([x.numel() / channels / groups])]))
    count = sums[-1].detach()
    mean = sums[:-1].view(groups, 1, channels, *beyond) / count
    centered = x - mean
    variance = all_reduce_sum(centered.square().sum(axes)) / count
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            for average, spread in zip(mean.view(groups, channels), variance, strict=True):
                running_mean.lerp_(average, momentum)
                running_var.lerp_(spread * (count / (count - 1).clamp(min=1)), momentum)
    factor = ((variance + eps).rsqrt() * weight).view(mean.shape)
    y = (centered * factor + bias.view(channels, *beyond)).flatten(0, 1).to(dtype)
    if residual is not None:
        y += residual
    return torch.relu_(y) if relu else y
