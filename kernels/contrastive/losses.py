"""The losses by name, on the ops of ``info_nce``, ``two_sided`` and ``supcon``: functions, then modules.

All return float32 (float64 for float64), never build the matrix of logits, and raise ValueError or TypeError that names
the wrong value. Only NT-Xent and SupCon normalize their embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vito_kernels._core.checks import (
    Reduction,
    autocast_inputs,
    check_flags,
    check_ids,
    check_integers,
    check_no_grad,
    check_options,
    check_pair,
    check_paired,
    check_reduction,
    inverse_temperature,
)
from vito_kernels.contrastive.info_nce import against_negatives, info_nce
from vito_kernels.contrastive.normalize import normalize
from vito_kernels.contrastive.replay import replayed
from vito_kernels.contrastive.supcon import supcon_loss, supcon_of_unit
from vito_kernels.contrastive.two_sided import clip_loss, ntxent


@replayed
def moco_loss(
    q: Tensor, k: Tensor, queue: Tensor, *, temperature: float | Tensor = 0.07, reduction: Reduction = "mean"
) -> Tensor:
    """MoCo: query i finds its key k_i among the keys of a queue. Neither keys nor queue get a gradient.

    Equivalent: ``cross_entropy(cat([(q * k).sum(1, keepdim=True), q @ queue.T], 1) / temperature, zeros(M))``.

    Args:
        q, k: (M, D), as for ``similarity_lse``. Nothing is normalized here.
        queue: (N, D).
        temperature: a positive number or a tensor of one element, which may require grad.
        reduction: "mean", "sum" or "none".

    Returns:
        A float32 scalar, or (M,) with "none".

    Raises:
        ValueError, TypeError: as ``similarity_lse``, and where k or the queue requires grad.

    Cost and determinism as for ``similarity_lse``.
    """
    check_paired(q, k, ("q", "k"))
    check_pair(q, queue, ("q", "queue"))
    check_no_grad("k", k)
    check_no_grad("queue", queue)
    return against_negatives(q, k, queue, inverse_temperature(temperature), reduction)


def lit_loss(locked: Tensor, y: Tensor, scale: float | Tensor) -> Tensor:
    """LiT: ``clip_loss`` with a locked first tower, which saves 4 M M D flops.

    Args:
        locked: (M, D) embeddings without gradient.
        y: (M, D).
        scale: the inverse temperature.

    Returns:
        A float32 scalar.

    Raises:
        ValueError, TypeError: as ``clip_loss``, and where ``locked`` requires grad.
    """
    check_no_grad("locked", locked)
    return clip_loss(locked, y, scale)


def matryoshka_loss(
    loss: Callable[..., Tensor],
    embeddings: Sequence[Tensor],
    widths: Sequence[int],
    *,
    weights: Sequence[float] | None = None,
) -> Tensor:
    """Sum of a loss over the first columns of its embeddings (Kusupati et al., arXiv 2205.13147).

    Equivalent: ``sum(w * loss(*[normalize(x[:, :n]) for x in embeddings]) for n, w in zip(widths, weights))``.

    Args:
        loss: takes as many unit embeddings, such as ``functools.partial(info_nce, temperature=0.1)``.
        embeddings: (M, D) tensors, not normalized.
        widths: numbers of columns, each in [1, D].
        weights: one for each width, by default 1.

    Returns:
        The sum of what ``loss`` returns.

    Raises:
        ValueError: no width, a width outside the columns, or another number of weights.

    Prefixes are read where they are. The cost is that of the loss at each width: with halves down from D, twice that at
    D alone.
    """
    check_integers(**{f"widths[{i}]": n for i, n in enumerate(widths)})
    columns = min((x.shape[-1] for x in embeddings), default=0)
    if not widths or min(widths) < 1 or max(widths) > columns:
        raise ValueError(f"widths must hold numbers in [1, {columns}], got {list(widths)}")
    if weights is not None and len(weights) != len(widths):
        raise ValueError(f"weights must be as many as widths, got {len(weights)} and {len(widths)}")
    losses = [loss(*(normalize(x[:, :n]) for x in embeddings)) for n in widths]
    total = losses[0] if weights is None else losses[0] * weights[0]
    for i, value in enumerate(losses[1:], 1):
        total = total + (value if weights is None else value * weights[i])
    return total


def _listed(**options: Any) -> str:
    return ", ".join(f"{name}={value}" for name, value in options.items())


class InfoNCELoss(nn.Module):
    """``info_nce`` as a module. With groups it is the loss of VITO and MoCLR; with positives (M, P) that of DetCon-B.

    Args:
        temperature, label_smoothing, hard_negatives, debias, decoupled, reduction: as for ``info_nce``.

    ``forward(q (M, D), k (N, D), positive=None, q_group=None, k_group=None)``.
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        *,
        label_smoothing: float = 0.0,
        hard_negatives: float = 0.0,
        debias: float = 0.0,
        decoupled: bool = False,
        reduction: Reduction = "mean",
    ):
        super().__init__()
        inverse_temperature(temperature)
        check_options(label_smoothing, hard_negatives, debias, None, None, decoupled)
        check_reduction(reduction)
        self.temperature, self.reduction = temperature, reduction
        self.options: dict[str, Any] = {"label_smoothing": label_smoothing, "hard_negatives": hard_negatives}
        self.options |= {"debias": debias, "decoupled": decoupled}

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        positive: Tensor | None = None,
        q_group: Tensor | None = None,
        k_group: Tensor | None = None,
    ) -> Tensor:
        return info_nce(
            q,
            k,
            temperature=self.temperature,
            positive=positive,
            q_group=q_group,
            k_group=k_group,
            reduction=self.reduction,
            **self.options,
        )

    def extra_repr(self) -> str:
        return _listed(temperature=self.temperature, **self.options, reduction=self.reduction)


class MoCoLoss(nn.Module):
    """``moco_loss`` with its queue, a buffer of unit vectors.

    In training mode ``forward(q (M, width), k (M, width))`` replaces the oldest keys by k after the loss. k must be
    normalized and have at most ``queue_size`` rows.

    Args:
        width: D.
        queue_size: keys in the queue, random at first.
        temperature, reduction: as for ``moco_loss``.
        gather_distributed: the queue takes the keys of all ranks of the default process group, whose batches are equal.
    """

    queue: Tensor
    oldest: Tensor

    def __init__(
        self,
        width: int,
        queue_size: int = 65536,
        temperature: float | Tensor = 0.07,
        *,
        reduction: Reduction = "mean",
        gather_distributed: bool = False,
    ):
        super().__init__()
        check_integers(width=width, queue_size=queue_size)
        check_flags(gather_distributed=gather_distributed)
        if width < 1 or queue_size < 1:
            raise ValueError(f"width and queue_size must be positive, got {width} and {queue_size}")
        inverse_temperature(temperature)
        check_reduction(reduction)
        self.temperature, self.reduction, self.gather_distributed = temperature, reduction, gather_distributed
        self.register_buffer("queue", normalize(torch.randn(queue_size, width)))
        self.register_buffer("oldest", torch.zeros((), dtype=torch.long))

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        check_paired(q, k, ("q", "k"))
        loss = moco_loss(q, k, self.queue.to(q.dtype), temperature=self.temperature, reduction=self.reduction)
        if self.training:
            self.enqueue(k)
        return loss

    @torch.no_grad()
    def enqueue(self, k: Tensor) -> None:
        """Replaces the oldest keys by k (B, width), B <= queue_size."""
        check_pair(k, self.queue[:1].to(k.dtype) if isinstance(k, Tensor) else k, ("k", "queue"))
        if self.gather_distributed and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            from vito_kernels.distributed import gather_keys  # which builds on this module

            k, _ = gather_keys(k.detach(), sizes=[k.shape[0]] * dist.get_world_size()).wait()
        size = self.queue.shape[0]
        if k.shape[0] > size:
            raise ValueError(f"k has {k.shape[0]} rows, more than the queue of {size}")
        rows = (self.oldest + torch.arange(k.shape[0], device=k.device)) % size
        self.queue.index_copy_(0, rows, k.to(self.queue.dtype))
        self.oldest.copy_((self.oldest + k.shape[0]) % size)

    def extra_repr(self) -> str:
        return _listed(queue=tuple(self.queue.shape), temperature=self.temperature, reduction=self.reduction)


class CLIPLoss(nn.Module):
    """``clip_loss`` as a module: ``forward(x (M, D), y (M, D), scale)``."""

    def forward(self, x: Tensor, y: Tensor, scale: float | Tensor) -> Tensor:
        return clip_loss(x, y, scale)


class LiTLoss(nn.Module):
    """``lit_loss`` as a module: ``forward(locked (M, D), y (M, D), scale)``."""

    def forward(self, locked: Tensor, y: Tensor, scale: float | Tensor) -> Tensor:
        return lit_loss(locked, y, scale)


class NTXentLoss(nn.Module):
    """``ntxent`` as a module: ``forward(z1 (B, D), z2 (B, D))``.

    Args:
        temperature, decoupled, reduction: as for ``ntxent``.
    """

    def __init__(self, temperature: float | Tensor = 0.5, *, decoupled: bool = False, reduction: Reduction = "mean"):
        super().__init__()
        inverse_temperature(temperature)
        check_flags(decoupled=decoupled)
        check_reduction(reduction)
        self.temperature, self.decoupled, self.reduction = temperature, decoupled, reduction

    def forward(self, z1: Tensor, z2: Tensor) -> Tensor:
        return ntxent(z1, z2, self.temperature, decoupled=self.decoupled, reduction=self.reduction)

    def extra_repr(self) -> str:
        return _listed(temperature=self.temperature, decoupled=self.decoupled, reduction=self.reduction)


class SupConLoss(nn.Module):
    """``supcon_loss`` as a module: ``forward(z (M, D), labels (M,), keys=None, key_labels=None)``.

    Args:
        temperature, reduction: as for ``supcon_loss``.
    """

    def __init__(self, temperature: float | Tensor = 0.1, *, reduction: Reduction = "mean"):
        super().__init__()
        inverse_temperature(temperature)
        check_reduction(reduction)
        self.temperature, self.reduction = temperature, reduction

    def forward(
        self, z: Tensor, labels: Tensor, keys: Tensor | None = None, key_labels: Tensor | None = None
    ) -> Tensor:
        keyed = {"keys": keys, "key_labels": key_labels}
        return supcon_loss(z, labels, **keyed, temperature=self.temperature, reduction=self.reduction)

    def extra_repr(self) -> str:
        return _listed(temperature=self.temperature, reduction=self.reduction)


class CrossBatchMemory(nn.Module):
    """SupCon of a batch against itself and the batches before it (Wang et al., arXiv 1912.06798).

    ``forward(z (M, width), labels (M,))``: each normalized row against all others of the batch and of the memory. In
    training mode the batch then replaces the oldest rows of the memory, which is empty at first and has no gradient.

    Args:
        width: D.
        memory_size: rows in the memory, at least those of a batch.
        temperature, reduction: as for ``supcon_loss``.
    """

    memory: Tensor
    memory_labels: Tensor

    def __init__(
        self,
        width: int,
        memory_size: int = 8192,
        temperature: float | Tensor = 0.1,
        *,
        reduction: Reduction = "mean",
    ):
        super().__init__()
        check_integers(width=width, memory_size=memory_size)
        if width < 1 or memory_size < 1:
            raise ValueError(f"width and memory_size must be positive, got {width} and {memory_size}")
        inverse_temperature(temperature)
        check_reduction(reduction)
        self.temperature, self.reduction, self.filled, self.oldest = temperature, reduction, 0, 0
        self.register_buffer("memory", torch.zeros(memory_size, width))
        self.register_buffer("memory_labels", torch.zeros(memory_size, dtype=torch.long))

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        check_pair(z, self.memory[:1].to(z.dtype) if isinstance(z, Tensor) else z, ("z", "memory"))
        check_ids("labels", labels, z.shape[0], z)
        unit = normalize(z)
        before = self.memory[: self.filled].to(unit.dtype)
        keys, ids = torch.cat([unit, before]), torch.cat([labels, self.memory_labels[: self.filled].to(labels.dtype)])
        (q, k), matmul_dtype = autocast_inputs(unit, keys)
        scale = inverse_temperature(self.temperature)
        loss, _ = supcon_of_unit(q, k, scale, labels, ids, matmul_dtype, self.reduction, diagonal=0)
        if self.training:
            self._remember(unit.detach(), labels)
        return loss

    @torch.no_grad()
    def _remember(self, unit: Tensor, labels: Tensor) -> None:
        rows, size = len(unit), len(self.memory)
        if rows > size:
            raise ValueError(f"z has {rows} rows, more than the memory of {size}")
        places = (self.oldest + torch.arange(rows, device=unit.device)) % size
        self.memory.index_copy_(0, places, unit.to(self.memory.dtype))
        self.memory_labels.index_copy_(0, places, labels.long())
        self.filled, self.oldest = min(self.filled + rows, size), (self.oldest + rows) % size

    def get_extra_state(self) -> dict[str, int]:
        return {"filled": self.filled, "oldest": self.oldest}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.filled, self.oldest = state["filled"], state["oldest"]

    def extra_repr(self) -> str:
        return _listed(memory=tuple(self.memory.shape), temperature=self.temperature, reduction=self.reduction)
