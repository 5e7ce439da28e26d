"""``lightly.loss.NTXentLoss``, fused: the same arguments, the same value, no matrix of logits."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import softplus

from vito_kernels import normalize, similarity_lse
from vito_kernels._core.checks import check_flags, check_paired, inverse_temperature, is_integer, is_number
from vito_kernels.contrastive.two_sided import ntxent_of_scale
from vito_kernels.distributed import gather_keys, global_ntxent


class NTXentLoss(nn.Module):
    """Replaces lightly's ``NTXentLoss``: ``from vito_kernels.adapters.lightly import NTXentLoss``.

    Args:
        temperature: a number; lightly takes negative ones too, but not with ``gather_distributed``.
        memory_bank_size: 0 for SimCLR, or (keys, dim) for MoCo's memory bank; a number of keys alone takes dim from the
            first batch, with a warning. As in lightly, the bank starts with random unit vectors. The normalized
            ``out1`` replaces its oldest keys if ``out0`` requires grad, and keys that pass its end are dropped. It may
            stay on the CPU.
        gather_distributed: take the batches of all ranks of the default process group, which must be equal. Under
            ``DistributedDataParallel`` gradients are those of the whole batch.

    Raises:
        ValueError, TypeError: for arguments that lightly refuses too.
    """

    bank: Tensor
    bank_ptr: Tensor

    def __init__(
        self, temperature: float = 0.5, memory_bank_size: int | Sequence[int] = 0, gather_distributed: bool = False
    ):
        super().__init__()
        if isinstance(temperature, (int, float)) and abs(temperature) < 1e-8:
            raise ValueError(f"Illegal temperature: abs({temperature}) < 1e-8")
        inverse_temperature(abs(temperature) if is_number(temperature) else temperature)
        size = tuple(memory_bank_size) if isinstance(memory_bank_size, Sequence) else (memory_bank_size,)
        if (
            not all(is_integer(x) for x in size)
            or len(size) not in (1, 2)
            or min(size) < 0
            or (size[0] and not size[-1])
        ):
            raise ValueError(f"Illegal memory bank size {memory_bank_size}, expected a (num_features, dim) tuple, or 0")
        if len(size) == 1 and size[0]:
            warnings.warn(
                f"memory_bank_size={size[0]} has no feature dimension, which the first batch will give; "
                f"pass ({size[0]}, dim)",
                stacklevel=2,
            )
        check_flags(gather_distributed=gather_distributed)
        if gather_distributed and not dist.is_available():
            raise ValueError("gather_distributed is True but torch.distributed is not available")
        self.temperature, self.memory_bank_size, self.gather_distributed = temperature, size, gather_distributed
        bank = normalize(torch.randn(size)) if len(size) == 2 and min(size) else torch.empty(0)
        self.register_buffer("bank", bank, persistent=False)
        self.register_buffer("bank_ptr", torch.zeros(1, dtype=torch.long), persistent=False)

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """The loss of (B, dim) projections of two views, which are normalized here; a float32 scalar."""
        across = self.gather_distributed and dist.is_initialized() and dist.get_world_size() > 1
        if self.memory_bank_size[0]:
            if not self.bank.numel():
                self.bank = normalize(torch.randn(self.memory_bank_size[0], out0.shape[1])).to(self.bank)
            return self._against_bank(out0, out1, across)
        if across:
            return global_ntxent(out0, out1, self.temperature, sizes=[out0.shape[0]] * dist.get_world_size())
        return ntxent_of_scale(out0, out1, 1 / self.temperature)

    def _against_bank(self, out0: Tensor, out1: Tensor, across: bool) -> Tensor:
        check_paired(out0, out1, ("out0", "out1"))
        out0, out1 = normalize(out0), normalize(out1)
        negatives = similarity_lse(out0, self.bank.to(out0), 1 / self.temperature)
        positives = (out0.to(negatives.dtype) * out1).sum(1) / self.temperature
        if out0.requires_grad:
            self._replace_oldest(out1.detach(), across)
        return softplus(negatives - positives).mean()

    def _replace_oldest(self, keys: Tensor, across: bool) -> None:
        if across:
            keys, _ = gather_keys(keys, sizes=[keys.shape[0]] * dist.get_world_size()).wait()
        size, end = self.bank.shape[0], self.bank_ptr + keys.shape[0]
        keys = keys[:size].to(self.bank)
        place = self.bank_ptr + torch.arange(keys.shape[0], device=self.bank.device)  # without a host sync
        rows = place % size  # rows past the end write back their old keys
        self.bank.index_copy_(0, rows, torch.where((place < size)[:, None], keys, self.bank[rows]))
        self.bank_ptr.copy_(torch.where(end >= size, 0, end))

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, memory_bank_size={self.memory_bank_size}"
