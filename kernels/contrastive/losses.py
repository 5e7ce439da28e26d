"""The losses people know by name, on the primitives of ``info_nce`` and ``two_sided``: functions, then modules.

All return float32, take float32, bfloat16, float16 or float64, never build the matrix of logits, and raise ValueError
or TypeError that names what is wrong. Only NT-Xent and SupCon normalize their embeddings.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vito_kernels._core.checks import (
    autocast_inputs,
    check_ids,
    check_integers,
    check_no_grad,
    check_options,
    check_pair,
    check_paired,
    check_reduction,
    inverse_temperature,
    needs_grad,
    reduce,
    scale_tensor,
)
from vito_kernels.contrastive.info_nce import apply_similarity_lse, info_nce
from vito_kernels.contrastive.normalize import normalize
from vito_kernels.contrastive.softplus_loss import softplus_loss
from vito_kernels.contrastive.terms import LOG2E
from vito_kernels.contrastive.two_sided import apply_self_lse, clip_loss, ntxent


def moco_loss(
    q: Tensor, k: Tensor, queue: Tensor, *, temperature: float | Tensor = 0.07, reduction: str = "mean"
) -> Tensor:
    """MoCo: query i (M, D) finds its key k_i (M, D) among the keys of a queue (N, D). Keys and queue are locked.

    Equivalent: ``cross_entropy(cat([(q * k).sum(1, keepdim=True), q @ queue.T], 1) / temperature, zeros(M))``.
    Nothing is normalized here. float32, or (M,) with ``reduction="none"``; dtypes, errors and determinism as for
    ``similarity_lse``, and ValueError where k or the queue requires grad.
    """
    check_paired(q, k, ("q", "k"))
    check_pair(q, queue, ("q", "queue"))
    check_no_grad("k", k)
    check_no_grad("queue", queue)
    (q, k, queue), matmul_dtype = autocast_inputs(q, k, queue)
    scale = scale_tensor(inverse_temperature(temperature), q)
    compute_grad_q, cache_logits = needs_grad(q, scale), False
    lse2, _, _, lse_residual, _ = apply_similarity_lse(
        q, queue, scale, None, None, None, None, compute_grad_q, matmul_dtype, cache_logits
    )
    positives = (q.to(scale.dtype) * k).sum(1, keepdim=True) * (scale * LOG2E)
    return reduce(softplus_loss(lse2, lse_residual, positives), reduction)


def lit_loss(locked: Tensor, y: Tensor, scale: float | Tensor) -> Tensor:
    """LiT: ``clip_loss`` of locked (M, D) and y (M, D) whose first tower gets no gradient: 4 M M D flops less.

    As ``clip_loss``, and ValueError where ``locked`` requires grad.
    """
    check_no_grad("locked", locked)
    return clip_loss(locked, y, scale)


def supcon_loss(z: Tensor, labels: Tensor, *, temperature: float | Tensor = 0.1, reduction: str = "mean") -> Tensor:
    """SupCon (L_out): each row of z (M, D), normalized, against all others; its positives are the rows of its label
    (M,).

    Equivalent, with ``z = normalize(z)``, ``s = (z @ z.T / temperature).fill_diagonal_(-inf)`` and
    ``same = (labels[:, None] == labels).fill_diagonal_(False)``:
    ``-(s.log_softmax(1).masked_fill(~same, 0).sum(1) / same.sum(1))``. The mean is over the rows that have a
    positive; the others have loss 0. The logits of all positives of a row sum to one product with the sum of their
    embeddings, so they cost O(M D) however many there are. In the gradient they are taken off the softmax before either
    is rounded: what likely positives leave of it is as exact as a softmax in float32, in 16 bits too. Labels are int64
    or int32; dtypes, errors, autocast and determinism as for ``similarity_lse``.
    """
    check_pair(z, z, ("z", "z"))
    check_ids("labels", labels, z.shape[0], z)
    check_reduction(reduction)
    (z,), matmul_dtype = autocast_inputs(normalize(z))
    scale = scale_tensor(inverse_temperature(temperature), z)
    # A label goes by where it starts among the sorted ones, and has as many rows as lie before the next: no host sync.
    ordered = labels.sort().values
    first, past = (torch.searchsorted(ordered, labels.contiguous(), right=right) for right in (False, True))
    count = past - first - 1
    cache_logits = needs_grad(z, scale)
    lse2, positives, lse_residual, _ = apply_self_lse(z, scale, first, count, matmul_dtype, cache_logits)
    loss = torch.where(count > 0, (lse2 - positives[:, 0] + lse_residual) / LOG2E, 0)
    return loss.sum() / (count > 0).sum().clamp(min=1) if reduction == "mean" else reduce(loss, reduction)


class InfoNCELoss(nn.Module):
    """``info_nce`` with its options: the loss of VITO and MoCLR (groups: the same video is no negative), of
    DetCon-B (positives (M, P) among the regions of both views), of any queries against any keys.

    ``forward(q (M, D), k (N, D), positive=None, q_group=None, k_group=None)``.
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        *,
        label_smoothing: float = 0.0,
        hard_negatives: float = 0.0,
        debias: float = 0.0,
        reduction: str = "mean",
    ):
        super().__init__()
        inverse_temperature(temperature)
        check_options(label_smoothing, hard_negatives, debias, None, None)
        check_reduction(reduction)
        self.temperature, self.reduction = temperature, reduction
        self.options = {"label_smoothing": label_smoothing, "hard_negatives": hard_negatives, "debias": debias}

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


class MoCoLoss(nn.Module):
    """``moco_loss`` with its queue, a buffer (``queue_size``, ``width``) of unit vectors. In training mode
    ``forward(q (M, width), k (M, width))`` puts the keys (already normalized, at most ``queue_size`` of them) in place
    of the oldest ones, after the loss.
    """

    queue: Tensor
    oldest: Tensor

    def __init__(
        self, width: int, queue_size: int = 65536, temperature: float | Tensor = 0.07, *, reduction: str = "mean"
    ):
        super().__init__()
        check_integers(width=width, queue_size=queue_size)
        if width < 1 or queue_size < 1:
            raise ValueError(f"width and queue_size must be positive, got {width} and {queue_size}")
        inverse_temperature(temperature)
        check_reduction(reduction)
        self.temperature, self.reduction = temperature, reduction
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
        """Puts keys (B, width), B <= queue_size, in place of the oldest ones."""
        check_pair(k, self.queue[:1].to(k.dtype) if isinstance(k, Tensor) else k, ("k", "queue"))
        size = self.queue.shape[0]
        if k.shape[0] > size:
            raise ValueError(f"k has {k.shape[0]} rows, more than the queue of {size}")
        rows = (self.oldest + torch.arange(k.shape[0], device=k.device)) % size
        self.queue.index_copy_(0, rows, k.to(self.queue.dtype))
        self.oldest.copy_((self.oldest + k.shape[0]) % size)


class CLIPLoss(nn.Module):
    """``clip_loss``: ``forward(x (M, D), y (M, D), scale)``."""

    def forward(self, x: Tensor, y: Tensor, scale: float | Tensor) -> Tensor:
        return clip_loss(x, y, scale)


class LiTLoss(nn.Module):
    """``lit_loss``: ``forward(locked (M, D), y (M, D), scale)``."""

    def forward(self, locked: Tensor, y: Tensor, scale: float | Tensor) -> Tensor:
        return lit_loss(locked, y, scale)


class NTXentLoss(nn.Module):
    """``ntxent``: ``forward(z1 (B, D), z2 (B, D))``."""

    def __init__(self, temperature: float | Tensor = 0.5, *, reduction: str = "mean"):
        super().__init__()
        inverse_temperature(temperature)
        check_reduction(reduction)
        self.temperature, self.reduction = temperature, reduction

    def forward(self, z1: Tensor, z2: Tensor) -> Tensor:
        return ntxent(z1, z2, self.temperature, reduction=self.reduction)


class SupConLoss(nn.Module):
    """``supcon_loss``: ``forward(z (M, D), labels (M,))``."""

    def __init__(self, temperature: float | Tensor = 0.1, *, reduction: str = "mean"):
        super().__init__()
        inverse_temperature(temperature)
        check_reduction(reduction)
        self.temperature, self.reduction = temperature, reduction

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        return supcon_loss(z, labels, temperature=self.temperature, reduction=self.reduction)
