"""Batch norm with its residual sum and ReLU, statistics of single views and over ranks, and passes that move none."""

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


def set_batch_norms(module: nn.Module, *, groups: int = 1, sync: bool = False) -> nn.Module:
    """Sets the statistics of every batch norm of a network, in place; parameters, buffers and names stay.

    Args:
        module: The network.
        groups: Consecutive equal shares of a batch with statistics of their own, as in a forward pass of each.
        sync: Whether statistics span all ranks.

    Returns:
        The network.

    Raises:
        UserError: a batch norm that is neither torch's nor timm's with its activation.
    """
    for norm in module.modules():
        if not isinstance(norm, _BatchNorm):
            continue
        if type(norm) in (nn.BatchNorm1d, nn.BatchNorm2d, BatchNorm, SyncBatchNorm):
            kind: type = SyncBatchNorm if sync else BatchNorm
        elif hasattr(norm, "act") and hasattr(norm, "drop"):
            kind = _SyncBatchNormAct if sync else _BatchNormAct
        else:
            raise UserError(
                f"{type(norm).__name__} of this network takes no statistics over ranks or of single views: train on "
                "one GPU with --model.batch-norm joint, or choose another model.backbone"
            )
        norm.__class__ = kind  # only the forward pass differs
        norm.groups = groups  # type: ignore[assignment]
    return module


class BatchNorm(nn.BatchNorm2d):
    """torch's BatchNorm1d and 2d, with the residual sum and ReLU that follow: ``relu(norm(x) + residual)``.

    Input (B,C) or (B,C,H,W). In training on a GPU all of it is one op (``vito_kernels.batch_norm``).
    """

    groups: int = 1
    """Shares of the batch with statistics of their own."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() not in (2, 4):
            raise ValueError(f"expected (B,C) or (B,C,H,W), got {tuple(input.shape)}")

    def forward(self, x: Tensor, residual: Tensor | None = None, relu: nn.ReLU | None = None) -> Tensor:
        given = x, self.weight, self.bias, self.running_mean, self.running_var
        fused = self.training and self.momentum is not None and can_fuse(*given, residual, self.groups)
        if not fused and (self.groups == 1 or not self.training):
            return _finish(super().forward(x), residual, relu)
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(self.groups)
        options: Any = {"momentum": self.momentum, "eps": self.eps, "groups": self.groups}
        if fused:
            return batch_norm(*given, **options, residual=residual, relu=relu is not None)  # type: ignore[arg-type]
        return _finish(batch_norm(*given, **options), residual, relu)  # type: ignore[arg-type]


def _finish(out: Tensor, residual: Tensor | None, relu: nn.ReLU | None) -> Tensor:
    if residual is not None:
        out += residual
    return out if relu is None else relu(out)


class SyncBatchNorm(BatchNorm):
    """BatchNorm over the concatenation of all ranks' batches, which may be unequal but not empty."""

    def forward(self, x: Tensor, residual: Tensor | None = None, relu: nn.ReLU | None = None) -> Tensor:
        if not self.training:
            return super().forward(x, residual, relu)
        assert self.momentum is not None
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(self.groups)
        options: Any = {"momentum": self.momentum, "eps": self.eps, "residual": residual, "relu": relu is not None}
        running = self.running_mean, self.running_var
        return sync_batch_norm(x, self.weight, self.bias, *running, **options, groups=self.groups)


class _BatchNormAct(BatchNorm):
    """timm's ``BatchNormAct2d``, which many of its networks have."""

    drop: nn.Module
    act: nn.Module

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]  # no caller has a residual
        out: Tensor = self.act(self.drop(super().forward(x)))
        return out


class _SyncBatchNormAct(SyncBatchNorm):
    """``_BatchNormAct`` over ranks."""

    drop: nn.Module
    act: nn.Module

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]  # no caller has a residual
        out: Tensor = self.act(self.drop(super().forward(x)))
        return out
