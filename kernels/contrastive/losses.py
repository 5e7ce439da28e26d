"""The losses by name, on the ops of ``info_nce``, ``two_sided`` and ``supcon``: functions, then modules.

All return float32 (float64 for float64), never build the matrix of logits, and raise ValueError or TypeError that names
the wrong value. Only NT-Xent and SupCon normalize their embeddings.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vito_kernels._core.checks import (
    Reduction,
    check_flags,
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
from vito_kernels.contrastive.supcon import supcon_loss
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
