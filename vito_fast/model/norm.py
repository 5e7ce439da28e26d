"""Batch norm's statistics: over all ranks, and left alone where a forward pass is repeated."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Inside, batch norms in training mode normalise by their batch but do not move their running statistics.

    For the second forward of a pass that is computed twice (cached gradients, recomputed activations), so that the
    buffers equal those of computing it once.
    """
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    counts = [norm.num_batches_tracked for norm in norms if norm.num_batches_tracked is not None]
    before = [count.clone() for count in counts]
    for norm in norms:
        norm.momentum = 0.0  # and not track_running_stats = False: a recomputation must save the same tensors
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for count, value in zip(counts, before, strict=True):
            count.copy_(value)


def convert_sync_batchnorm(module: nn.Module, device: torch.device) -> nn.Module:
    """``module`` with each BatchNorm taking its statistics over all ranks: torch's on CUDA, ``CpuSyncBatchNorm``
    elsewhere."""
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
        module.__class__ = CpuSyncBatchNorm  # type: ignore[assignment]  # same parameters, buffers and names; only forward differs
    for child in module.children():
        convert_sync_batchnorm(child, device)
    return module


class CpuSyncBatchNorm(_BatchNorm):
    """Batch norm over the concatenation of all ranks' batches (unequal ones too), which torch offers on CUDA alone.

    Input (B,C) or (B,C,H,W). Means and squared deviations are reduced one after the other, so nothing cancels.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() not in (2, 4):
            raise ValueError(f"expected (B,C) or (B,C,H,W), got {tuple(input.shape)}")

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        axes = [d for d in range(x.dim()) if d != 1]
        shape = [-1 if d == 1 else 1 for d in range(x.dim())]
        sums = torch.cat([x.sum(axes), x.new_tensor([x.numel() / x.shape[1]])])
        sums = all_reduce_sum(sums)
        count = sums[-1].detach()
        mean = sums[:-1] / count
        centred = x - mean.view(shape)
        variance = all_reduce_sum(centred.square().sum(axes)) / count
        if self.track_running_stats:
            self._track(mean.detach(), variance.detach() * (count / (count - 1).clamp(min=1)))
        scale = (variance + self.eps).rsqrt() * self.weight
        return centred * scale.view(shape) + self.bias.view(shape)

    @torch.no_grad()
    def _track(self, mean: Tensor, unbiased: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.momentum is not None
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(unbiased, self.momentum)
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)


class _AllReduceSum(torch.autograd.Function):
    """Sum over ranks, differentiable: each rank's input reaches every rank's loss, so the gradient is the sum as
    well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total


def all_reduce_sum(x: Tensor) -> Tensor:
    """The sum of ``x`` over all ranks, differentiable; ``x`` itself in a single process."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return x
    result: Tensor = _AllReduceSum.apply(x)
    return result
