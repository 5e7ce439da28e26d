"""Batch norm with what follows it in one op; its statistics over all ranks, or left alone where a forward pass is
repeated.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from vito_fast.errors import UserError
from vito_kernels import batch_norm
from vito_kernels._core.autograd import once
from vito_kernels.batch_norm.op import as_rows, fuses, gradient_sums, input_gradient, merge_parts, normalize, part_of
from vito_kernels.distributed.collectives import gather_rows


@contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Inside, batch norms in training mode normalize by their batch but do not move their running statistics.

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
    """``module`` with each BatchNorm taking its statistics over all ranks (``SyncBatchNorm``). UserError for one that
    does more than torch's, but for timm's with its activation.
    """
    if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):  # same parameters, buffers and names; only forward differs
        if type(module) in (nn.BatchNorm1d, nn.BatchNorm2d, BatchNorm2d):
            module.__class__ = SyncBatchNorm  # type: ignore[assignment]
        elif hasattr(module, "act") and hasattr(module, "drop"):
            module.__class__ = _SyncBatchNormAct  # type: ignore[assignment]
        else:
            raise UserError(
                f"{type(module).__name__} of this network takes no statistics over ranks: train on one GPU, or choose "
                "another model.backbone"
            )
    for child in module.children():
        convert_sync_batchnorm(child)
    return module


class BatchNorm2d(nn.BatchNorm2d):
    """torch's, and with it what a block does next: ``relu(norm(x) + residual)``. In training on a GPU all of it is one
    op (``vito_kernels.batch_norm``); elsewhere the sum and ``relu`` come after, in place.
    """

    def forward(self, x: Tensor, residual: Tensor | None = None, relu: nn.ReLU | None = None) -> Tensor:
        statistics = self.running_mean, self.running_var
        if not self.training or self.momentum is None or not fuses(x, self.weight, self.bias, *statistics, residual):
            return _finish(super().forward(x), residual, relu)
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        options: Any = {"momentum": self.momentum, "eps": self.eps, "residual": residual, "relu": relu is not None}
        return batch_norm(x, self.weight, self.bias, *statistics, **options)  # type: ignore[arg-type]  # not None here


def _finish(out: Tensor, residual: Tensor | None, relu: nn.ReLU | None) -> Tensor:
    if residual is not None:
        out += residual
    return out if relu is None else relu(out)


class SyncBatchNorm(_BatchNorm):
    """Batch norm over the concatenation of all ranks' batches, unequal ones too but none empty; then, as BatchNorm2d,
    sum and ReLU.

    Input (B,C) or (B,C,H,W). torch has it for CUDA alone, and there looks for empty batches, for which the host waits
    in every layer. On the CPU means and squared deviations are reduced one after the other, so nothing cancels.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() not in (2, 4):
            raise ValueError(f"expected (B,C) or (B,C,H,W), got {tuple(input.shape)}")

    def forward(self, x: Tensor, residual: Tensor | None = None, relu: nn.ReLU | None = None) -> Tensor:
        if not self.training:
            return _finish(super().forward(x), residual, relu)
        if x.is_cuda:
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
            running = self.running_mean, self.running_var, self.momentum
            joined = residual if residual is None or residual.dtype == x.dtype else residual.to(x.dtype)
            return _RanksNorm.apply(x, self.weight, self.bias, joined, *running, self.eps, relu is not None)
        given = x.dtype
        x = x.to(torch.promote_types(given, torch.float32))  # in bfloat16 a sum is no statistic
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
        return _finish((centred * scale.view(shape) + self.bias.view(shape)).to(given), residual, relu)

    @torch.no_grad()
    def _track(self, mean: Tensor, unbiased: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.momentum is not None
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(unbiased, self.momentum)
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)


class _SyncBatchNormAct(SyncBatchNorm):
    """timm's ``BatchNormAct2d``, which many of its networks have, over ranks."""

    drop: nn.Module
    act: nn.Module

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]  # nobody hands it a residual
        out: Tensor = self.act(self.drop(super().forward(x)))
        return out


class _RanksNorm(torch.autograd.Function):
    """``vito_kernels.batch_norm`` in its steps: between them the ranks gather their statistics (R, 2 C + 1), and back
    go two sums of C numbers. Moves ``running_mean`` and ``running_var``.
    """

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
    ) -> Tensor:
        x, residual = as_rows(x), None if residual is None else as_rows(residual)
        part = part_of(x)
        everyone = part.new_empty(dist.get_world_size(), part.shape[1])
        gather_rows(everyone, part)  # waited for: of a transfer under way torch.compile cannot make a graph
        statistics = merge_parts(everyone, running_mean, running_var, momentum, eps)
        y: Tensor = normalize(x, weight, bias, residual, *statistics, relu)
        ctx.relu, ctx.has_residual = relu, residual is not None
        ctx.save_for_backward(x, weight, bias, *statistics, y if relu and ctx.has_residual else None)
        return y

    @staticmethod
    @once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, invstd, count, y = ctx.saved_tensors
        sums, g_weight, g_bias, masked = gradient_sums(grad, x, y, weight, bias, mean, invstd, ctx.relu)
        grad = grad if y is None else masked
        dist.all_reduce(sums)
        gx = input_gradient(grad, x, weight, bias, mean, invstd, count, sums, ctx.relu and y is None)
        return gx, g_weight, g_bias, grad if ctx.has_residual else None, None, None, None, None, None


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
