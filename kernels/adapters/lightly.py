"""lightly's contrastive losses, fused: the same arguments, the same value, no matrix of logits."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vito_kernels import normalize, ntxent, supcon_loss
from vito_kernels._core.autograd import PLAIN
from vito_kernels._core.checks import check_flags, check_paired, inverse_temperature, is_integer, is_number, needs_grad
from vito_kernels.contrastive.info_nce import against_negatives
from vito_kernels.contrastive.replay import replayed
from vito_kernels.contrastive.two_sided import ntxent_of_scale
from vito_kernels.distributed import gather_keys, global_ntxent, global_supcon_loss
from vito_kernels.distributed.losses import global_ntxent_of_scale

WeightFn = Callable[[Tensor, Tensor], Tensor]


class MemoryBankModule(nn.Module):
    """Replaces lightly's ``MemoryBankModule``: the newest vectors of earlier batches, random unit vectors at first.

    Args:
        size: (keys, dim), or 0 for no bank. A number of keys alone takes dim from the first batch, with a warning.
        gather_distributed: an update takes the batches of all ranks of the default process group, which must be equal.
        feature_dim_first: return the bank as (dim, keys).

    Raises:
        ValueError: for another size.
        TypeError: a flag is no boolean.

    ``forward(output (B, dim), labels=None, update=False)`` returns ``output`` and a copy of the bank, None for size 0.
    An update then replaces the oldest keys by ``output``; keys that pass the end of the bank are dropped.
    """

    bank: Tensor
    bank_ptr: Tensor

    def __init__(self, size: int | Sequence[int], gather_distributed: bool = False, feature_dim_first: bool = True):
        super().__init__()
        given: Sequence[Any] = size if isinstance(size, Sequence) and not isinstance(size, str) else (size,)
        sizes = tuple(given)
        if not all(is_integer(x) for x in sizes) or len(sizes) not in (1, 2) or (sizes[0] and not sizes[-1]):
            raise ValueError(f"Illegal memory bank size {size}, expected a (num_features, dim) tuple, or 0")
        if min(sizes) < 0:
            raise ValueError(f"Illegal memory bank size {size}, all entries must be non-negative.")
        check_flags(gather_distributed=gather_distributed, feature_dim_first=feature_dim_first)
        if len(sizes) == 1 and size:
            warnings.warn(
                f"Memory bank size 'size={sizes[0]}' does not specify feature dimension. It is recommended to set the "
                "feature dimension with 'size=(n, dim)' when creating the memory bank. Distributed training might fail "
                f"if the feature dimension is not set. The first batch gives it here; pass ({sizes[0]}, dim).",
                stacklevel=3,
            )
        self.size, self.gather_distributed, self.feature_dim_first = sizes, gather_distributed, feature_dim_first
        bank = normalize(torch.randn(sizes)) if len(sizes) == 2 and sizes[0] else torch.empty(0)
        self.register_buffer("bank", bank, persistent=False)
        self.register_buffer("bank_ptr", torch.zeros(1, dtype=torch.long), persistent=False)
        self._known: list[Any] = [None, 0, 0]

    def forward(
        self, output: Tensor, labels: Tensor | None = None, update: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        if not self.size[0]:
            return output, None
        bank = self.keys(output.shape[1]).clone()
        if update:
            self.replace_oldest(output.detach())
        return output, bank.t() if self.feature_dim_first else bank

    def keys(self, width: int) -> Tensor:
        """The bank itself, (keys, width)."""
        bank = self.bank
        if not bank.numel():
            self.bank = bank = normalize(torch.randn(self.size[0], width)).to(bank)
        return bank

    def replace_oldest(self, keys: Tensor) -> None:
        """Replaces the oldest keys by ``keys`` (B, dim), which have no gradient."""
        if (ranks := _ranks(self.gather_distributed)) > 1:
            keys, _ = gather_keys(keys, sizes=[keys.shape[0]] * ranks).wait()
        bank, ptr, size, count = self.bank, self.bank_ptr, self.size[0], keys.shape[0]
        if _is_readable(ptr):
            known, version, start = self._known
            if known is not ptr or version != ptr._version:  # to read it makes the host wait for a GPU
                start = int(ptr)
            bank[start : start + count] = keys[: size - start]
            start = 0 if start + count >= size else start + count
            ptr.fill_(start)
            self._known[:] = ptr, ptr._version, start
            return
        keys = keys[:size].to(bank)
        place = ptr + torch.arange(keys.shape[0], device=bank.device)
        rows = place % size  # rows past the end write back their old keys
        bank.index_copy_(0, rows, torch.where((place < size)[:, None], keys, bank[rows]))
        end = ptr + count
        ptr.copy_(torch.where(end >= size, 0, end))

    def extra_repr(self) -> str:
        return f"size={self.size}, gather_distributed={self.gather_distributed}"


def _is_readable(ptr: Tensor) -> bool:
    """Whether the host may know ``ptr``: no graph is traced or captured."""
    if type(ptr) not in PLAIN or ptr.is_meta or torch.compiler.is_compiling():
        return False
    return ptr.is_cpu or not torch.cuda.is_current_stream_capturing()


@replayed
def _bank_loss(q: Tensor, unit_k: Tensor, bank: Tensor, scale: float | Tensor) -> Tensor:
    return against_negatives(normalize(q), unit_k, bank, scale, "mean")


class NTXentLoss(nn.Module):
    """Replaces lightly's ``NTXentLoss``: ``from vito_kernels.adapters.lightly import NTXentLoss``.

    Args:
        temperature: a number; lightly takes negative ones too.
        memory_bank_size: 0 for SimCLR, or (keys, dim) for MoCo's ``memory_bank``, as for ``MemoryBankModule``. Its
            oldest keys are replaced by the normalized ``out1`` if ``out0`` requires grad. It may stay on the CPU.
        gather_distributed: take the batches of all ranks of the default process group, which must be equal. Under
            ``DistributedDataParallel`` gradients are those of the whole batch.

    Raises:
        ValueError, TypeError: for arguments that lightly refuses too.
    """

    def __init__(
        self, temperature: float = 0.5, memory_bank_size: int | Sequence[int] = 0, gather_distributed: bool = False
    ):
        super().__init__()
        _check_options(temperature, gather_distributed)
        self.temperature, self.gather_distributed = temperature, gather_distributed
        self.memory_bank = MemoryBankModule(memory_bank_size, gather_distributed)

    @property  # an older lightly's loss is a bank itself
    def bank(self) -> Tensor:
        return self.memory_bank.bank

    @property
    def bank_ptr(self) -> Tensor:
        return self.memory_bank.bank_ptr

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """The loss of (B, dim) projections of two views, which are normalized here; a float32 scalar."""
        scale = 1 / self.temperature
        if self.memory_bank.size[0]:
            check_paired(out0, out1, ("out0", "out1"))
            keys = normalize(out1)
            loss = _bank_loss(out0, keys, self.memory_bank.keys(out0.shape[1]).to(out0), scale)
            if needs_grad(out0):
                self.memory_bank.replace_oldest(keys.detach())
            return loss
        if (ranks := _ranks(self.gather_distributed)) > 1:
            return global_ntxent_of_scale(out0, out1, scale, sizes=[out0.shape[0]] * ranks)
        return ntxent_of_scale(out0, out1, scale)

    def extra_repr(self) -> str:
        options = f"memory_bank_size={self.memory_bank.size}, gather_distributed={self.gather_distributed}"
        return f"temperature={self.temperature}, {options}"


class DCLLoss(nn.Module):
    """Replaces lightly's ``DCLLoss``, the decoupled contrastive loss.

    Args:
        temperature: a positive number.
        weight_fn: takes the normalized views (B, dim) and returns weights (B,) of the positive logits.
        gather_distributed: as for ``NTXentLoss``.

    Raises:
        ValueError, TypeError: for arguments that lightly refuses too, and a temperature that is not positive.

    A batch of one sample has no negatives and the loss 0.
    """

    def __init__(self, temperature: float = 0.1, weight_fn: WeightFn | None = None, gather_distributed: bool = False):
        super().__init__()
        inverse_temperature(temperature)
        _check_options(temperature, gather_distributed)
        self.temperature, self.weight_fn, self.gather_distributed = temperature, weight_fn, gather_distributed

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """The loss of (B, dim) projections of two views, which are normalized here; a float32 scalar."""
        if (ranks := _ranks(self.gather_distributed)) > 1:
            loss = global_ntxent(out0, out1, self.temperature, decoupled=True, sizes=[out0.shape[0]] * ranks)
        else:
            loss = ntxent(out0, out1, self.temperature, decoupled=True)
        if self.weight_fn is None:
            return loss
        z0, z1 = normalize(out0), normalize(out1)
        positives = (z0.to(loss.dtype) * z1).sum(1) / self.temperature
        weights = (self.weight_fn(z0, z1) + self.weight_fn(z1, z0)) / 2
        return loss + ((1 - weights) * positives).mean()

    def extra_repr(self) -> str:
        options = f"weight_fn={self.weight_fn}, gather_distributed={self.gather_distributed}"
        return f"temperature={self.temperature}, {options}"


def negative_mises_fisher_weights(out0: Tensor, out1: Tensor, sigma: float = 0.5) -> Tensor:
    """2 - B softmax(out0 . out1 / sigma), (B,): less weight for similar views (Yeh et al., arXiv 2110.06848)."""
    similarity = (out0.detach() * out1.detach()).sum(1) / sigma
    return 2 - len(out0) * similarity.softmax(0)


class DCLWLoss(DCLLoss):
    """Replaces lightly's ``DCLWLoss``: ``DCLLoss`` with ``negative_mises_fisher_weights`` of width ``sigma``."""

    def __init__(self, temperature: float = 0.1, sigma: float = 0.5, gather_distributed: bool = False):
        super().__init__(temperature, partial(negative_mises_fisher_weights, sigma=sigma), gather_distributed)


class SupConLoss(nn.Module):
    """Replaces lightly's ``SupConLoss``.

    Args:
        temperature: a positive number.
        gather_distributed: as for ``NTXentLoss``.
        rescale: multiply the loss by the temperature.

    Raises:
        ValueError, TypeError: for arguments that lightly refuses too, and a temperature that is not positive.
    """

    def __init__(self, temperature: float = 0.5, gather_distributed: bool = False, rescale: bool = True):
        super().__init__()
        inverse_temperature(temperature)
        _check_options(temperature, gather_distributed)
        check_flags(rescale=rescale)
        self.temperature, self.gather_distributed, self.rescale = temperature, gather_distributed, rescale

    def forward(self, out0: Tensor, out1: Tensor, labels: Tensor | None = None) -> Tensor:
        """The loss of (B, dim) projections of two views, with labels (B,) of any dtype, by default all different."""
        t, ranks = self.temperature, _ranks(self.gather_distributed)
        if labels is None:
            across = ranks > 1
            loss = global_ntxent(out0, out1, t, sizes=[len(out0)] * ranks) if across else ntxent(out0, out1, t)
        else:
            if labels.dtype not in (torch.int64, torch.int32):
                labels = (labels.double() + 0).view(torch.int64)  # the sum makes -0.0 a 0
            z, labels = torch.cat([out0, out1]), labels.repeat(2)
            if ranks > 1:
                loss = global_supcon_loss(z, labels, temperature=t, sizes=[len(z)] * ranks)
            else:
                loss = supcon_loss(z, labels, temperature=t)
        return loss * t if self.rescale else loss

    def extra_repr(self) -> str:
        options = f"gather_distributed={self.gather_distributed}, rescale={self.rescale}"
        return f"temperature={self.temperature}, {options}"


def _check_options(temperature: float, gather_distributed: bool) -> None:
    if isinstance(temperature, (int, float)) and abs(temperature) < 1e-8:
        raise ValueError(f"Illegal temperature: abs({temperature}) < 1e-8")
    inverse_temperature(abs(temperature) if is_number(temperature) else temperature)
    check_flags(gather_distributed=gather_distributed)
    if gather_distributed and not dist.is_available():
        raise ValueError("gather_distributed is True but torch.distributed is not available")


def _ranks(gather_distributed: bool) -> int:
    """Ranks whose batches are gathered."""
    return dist.get_world_size() if gather_distributed and dist.is_initialized() else 1
