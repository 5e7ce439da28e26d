"""Batch norm with what follows it in one op; its statistics over all ranks, or left alone where a forward pass is
repeated.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from vito_fast.errors import UserError
from vito_kernels import batch_norm
from vito_kernels.batch_norm.op import can_fuse
from vito_kernels.distributed.sync_batch_norm import sync_batch_norm


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
        if not self.training or self.momentum is None or not can_fuse(x, self.weight, self.bias, *statistics, residual):
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
        assert self.momentum is not None
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        options: Any = {"momentum": self.momentum, "eps": self.eps, "residual": residual, "relu": relu is not None}
        return sync_batch_norm(x, self.weight, self.bias, self.running_mean, self.running_var, **options)


class _SyncBatchNormAct(SyncBatchNorm):
    """timm's ``BatchNormAct2d``, which many of its networks have, over ranks."""

    drop: nn.Module
    act: nn.Module

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]  # nobody hands it a residual
        out: Tensor = self.act(self.drop(super().forward(x)))
        return out
