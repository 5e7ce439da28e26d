"""Batch norm's statistics: over all ranks, and left alone where a forward pass is repeated."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from vito_kernels.collectives import start_gather


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


def convert_sync_batchnorm(module: nn.Module) -> nn.Module:
    """``module`` with each BatchNorm taking its statistics over all ranks (``SyncBatchNorm``)."""
    if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
        module.__class__ = SyncBatchNorm  # type: ignore[assignment]  # same parameters, buffers and names; only forward differs
    for child in module.children():
        convert_sync_batchnorm(child)
    return module


class SyncBatchNorm(_BatchNorm):
    """Batch norm over the concatenation of all ranks' batches, unequal ones too but none empty.

    Input (B,C) or (B,C,H,W). torch has it for CUDA alone, and there looks for empty batches, for which the host waits
    in every layer. On the CPU means and squared deviations are reduced one after the other, so nothing cancels.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() not in (2, 4):
            raise ValueError(f"expected (B,C) or (B,C,H,W), got {tuple(input.shape)}")

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        if x.is_cuda:
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
            running = self.running_mean, self.running_var, self.momentum
            return _CudaNorm.apply(x, self.weight, self.bias, *running, self.eps)
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


class _CudaNorm(torch.autograd.Function):
    """By torch's CUDA kernels for the purpose: the ranks gather (mean, 1 / deviation, count), (R, 2 C + 1); back go two
    sums of C numbers. Moves ``running_mean`` and ``running_var``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
    ) -> Tensor:
        x = _dense(x)
        mean, invstd = torch.batch_norm_stats(x, eps)
        count = mean.new_full((1,), x.numel() // x.shape[1])
        everyone, transfer = start_gather(torch.cat([mean, invstd, count])[None], [1] * dist.get_world_size())
        transfer.wait()
        means, invstds, counts = (part.contiguous() for part in everyone[:, 0].split([len(mean), len(mean), 1], 1))
        mean, invstd = torch.batch_norm_gather_stats_with_counts(
            x, means, invstds, running_mean, running_var, momentum, eps, counts.flatten()
        )
        ctx.save_for_backward(x, weight, mean, invstd, counts.to(torch.int32))
        return torch.batch_norm_elemt(x, weight, bias, mean, invstd, eps)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, invstd, counts = ctx.saved_tensors
        grad = _dense(grad)
        sums = torch.batch_norm_backward_reduce(grad, x, mean, invstd, weight, True, True, True)
        sum_dy, sum_dy_xmu, g_weight, g_bias = sums
        total = torch.stack([sum_dy, sum_dy_xmu])
        dist.all_reduce(total)
        gx = torch.batch_norm_backward_elemt(grad, x, mean, invstd, weight, total[0], total[1], counts)
        return gx, g_weight, g_bias, None, None, None, None


def _dense(x: Tensor) -> Tensor:
    return x if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()


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
