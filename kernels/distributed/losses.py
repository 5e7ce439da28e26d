"""Contrastive losses over the batches of all ranks; gradients are those of one process with the whole batch.

Each function takes a rank's rows and returns ``ranks / rows of the whole batch * sum over the rank's rows``. The *mean
over ranks* of these shares is the loss, and the mean of their gradients, which ``DistributedDataParallel`` computes, is
its gradient. Ranks may hold different numbers of rows.

Keys without gradient are gathered asynchronously. Call ``gather_keys`` as soon as the target network has made them, run
the online network, and pass the handle to ``global_info_nce``. Keys with gradient are gathered when they are used, and
their gradients return summed over ranks.

``exchange`` chooses how keys reach the ranks, with the same result. ``"gather"`` is one collective, which can overlap
the online network. Every rank then holds all N keys, N D numbers. ``"ring"`` passes blocks of keys from rank to rank
during the work on the previous block. A rank holds two blocks beside its own, 2 B D, and runs many small passes.
Forward traffic is the same; for keys with gradient the ring sends them again in the backward pass. Choose the ring if
the gathered keys do not fit.

Dtypes, errors and autocast as for ``info_nce``, ``clip_loss`` and ``ntxent``. Deterministic if the collectives are:
sums are in the order of the ranks. Double backward raises RuntimeError.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vito_kernels._core.checks import (
    Exchange,
    autocast_inputs,
    check_exchange,
    check_flags,
    check_groups,
    check_ids,
    check_no_grad,
    check_pair,
    check_paired,
    inverse_temperature,
    needs_grad,
    scale_tensor,
)
from vito_kernels.contrastive.multi_view import check_views, multi_view_info_nce
from vito_kernels.contrastive.normalize import normalize
from vito_kernels.contrastive.one_sided import one_sided_loss
from vito_kernels.contrastive.siglip import apply_siglip
from vito_kernels.contrastive.softplus_loss import softplus_loss
from vito_kernels.contrastive.supcon import supcon_of_unit
from vito_kernels.contrastive.terms import LOG2E
from vito_kernels.contrastive.two_sided import two_sided_lse, unit_views
from vito_kernels.distributed import ring
from vito_kernels.distributed.collectives import Group, checked_sizes, gather_with_grad, start_gather, without_padding


@dataclass
class PendingKeys:
    """The handle of ``gather_keys``: keys of all ranks, in transfer until ``wait``."""

    padded: Tensor
    padded_ids: Tensor | None
    sizes: list[int]
    rank: int
    handles: list[Any]

    def wait(self) -> tuple[Tensor, Tensor | None]:
        """(keys (N, D), ids (N,) or None) of all ranks, in the order of ranks."""
        for handle in self.handles:
            handle.wait()
        ids = None if self.padded_ids is None else without_padding(self.padded_ids, self.sizes)
        return without_padding(self.padded, self.sizes), ids

    @property
    def offset(self) -> int:
        """Number of the first of this rank's keys."""
        return sum(self.sizes[: self.rank])


def gather_keys(
    k: Tensor, ids: Tensor | None = None, *, group: Group = None, sizes: list[int] | None = None
) -> PendingKeys:
    """Starts to gather keys without gradient, and returns at once.

    Args:
        k: (B, D), this rank's keys.
        ids: (B,) int64 or int32, an id for each key, such as its video.
        group: the process group, by default the default one.
        sizes: rows of every rank. Without it the ranks exchange them first, which stops the host.

    Returns:
        A handle; its ``wait()`` gives keys (N, D) and ids (N,) or None, in the order of ranks.

    Raises:
        ValueError: the keys require grad (pass them to ``global_info_nce``), or ``sizes`` contradicts k.
    """
    check_pair(k, k, ("k", "k"))
    check_no_grad("k", k)
    if ids is not None:
        check_ids("ids", ids, k.shape[0], k)
    sizes = checked_sizes(k, sizes, group)
    padded, handle = start_gather(k, sizes, group)
    handles, padded_ids = [handle], None
    if ids is not None:
        padded_ids, handle = start_gather(ids, sizes, group)
        handles.append(handle)
    return PendingKeys(padded, padded_ids, sizes, dist.get_rank(group), handles)


def _share(loss: Tensor, sizes: list[int], samples: int) -> Tensor:
    return loss.sum() * (len(sizes) / samples)


def global_info_nce(
    q: Tensor,
    k: Tensor | PendingKeys,
    *,
    temperature: float | Tensor = 0.1,
    q_group: Tensor | None = None,
    k_group: Tensor | None = None,
    group: Group = None,
    sizes: list[int] | None = None,
    exchange: Exchange = "gather",
) -> Tensor:
    """This rank's share of ``info_nce`` over all ranks; the positive of query i is this rank's key i.

    Args:
        q: (B, D).
        k: (B, D), with or without gradient, or the handle of ``gather_keys``, whose ids are ``k_group``.
        temperature: as for ``info_nce``.
        q_group, k_group: (B,) as for ``info_nce``. A video must have the same number on every rank.
        group, sizes: as for ``gather_keys``.
        exchange: "gather" or "ring" (see the module); a handle is gathered already.

    Returns:
        A float32 scalar.

    Raises:
        ValueError, TypeError: as ``info_nce``, and for ``k_group``, ``group`` or ``sizes`` beside a handle.
    """
    check_exchange(exchange)
    scale = inverse_temperature(temperature)
    if isinstance(k, PendingKeys):
        for name, value in (("k_group", k_group), ("group", group), ("sizes", sizes)):
            if value is not None:
                raise ValueError(f"{name} belongs to gather_keys where k is its handle, got {name}={value} here")
        if exchange == "ring":
            raise ValueError("exchange='ring' passes keys on itself: give it k, not the handle of gather_keys")
        check_pair(q, k.padded.flatten(0, 1))
        if q.shape[0] != k.sizes[k.rank]:
            raise ValueError(f"q has {q.shape[0]} rows and this rank's keys {k.sizes[k.rank]}")
    else:
        check_paired(q, k, ("q", "k"))
        check_groups(q_group, k_group, q, k)
        sizes = checked_sizes(k, sizes, group)
        if exchange == "ring":
            lse2, positives, lse_residual = ring.lse_and_positives(q, k, scale, q_group, k_group, sizes, group)
            return _share(softplus_loss(lse2, lse_residual, positives), sizes, sum(sizes))
    if isinstance(k, Tensor) and k.requires_grad:
        assert sizes is not None
        offset = sum(sizes[: dist.get_rank(group)])
        keys = gather_with_grad(k, group=group, sizes=sizes)
        ids = None if k_group is None else gather_with_grad(k_group, group=group, sizes=sizes)
    else:
        pending = k if isinstance(k, PendingKeys) else gather_keys(k, k_group, group=group, sizes=sizes)
        sizes, offset = pending.sizes, pending.offset
        keys, ids = pending.wait()
        check_groups(q_group, ids, q, keys)
    return _share(one_sided_loss(q, keys, scale, None, offset, q_group, ids, reduction="sum"), sizes, sum(sizes))


def global_multi_view_info_nce(
    queries: Tensor,
    keys: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    q_group: Tensor | None = None,
    k_group: Tensor | None = None,
    group: Group = None,
    sizes: list[int] | None = None,
) -> Tensor:
    """This rank's share of ``multi_view_info_nce`` over all ranks' clips, keys gathered in one collective.

    Args:
        queries, keys: (V, B, D), this rank's clips; the keys with or without gradient.
        temperature: as ``multi_view_info_nce``.
        q_group, k_group: (B,) ids; the group of a video is the same number on every rank.
        group, sizes: the process group, and every rank's B where they differ.

    Returns:
        A float32 scalar. Its mean over ranks is the loss of one process with all clips, summed over pairs of views.

    Raises:
        ValueError, TypeError: as ``multi_view_info_nce``.
    """
    check_views(queries, keys, 0)
    check_groups(q_group, k_group, queries[0], keys[0])
    rows = keys.transpose(0, 1).flatten(1)  # (B, V * D): a clip's keys travel together
    sizes = checked_sizes(rows, sizes, group)
    everyone = gather_with_grad(rows, group=group, sizes=sizes).unflatten(1, (len(keys), -1)).transpose(0, 1)
    ids = None if k_group is None else gather_with_grad(k_group, group=group, sizes=sizes)
    losses = multi_view_info_nce(
        queries,
        everyone,
        temperature=temperature,
        positive_offset=sum(sizes[: dist.get_rank(group)]),
        q_group=q_group,
        k_group=ids,
        reduction="none",
    )
    return _share(losses, sizes, sum(sizes))


def global_clip_loss(
    x: Tensor,
    y: Tensor,
    scale: float | Tensor,
    *,
    group: Group = None,
    sizes: list[int] | None = None,
    exchange: Exchange = "gather",
) -> Tensor:
    """This rank's share of ``clip_loss`` over all ranks' pairs.

    Args:
        x, y: (B, D), row i of one belongs to row i of the other.
        scale: the inverse temperature.
        group, sizes: as for ``gather_keys``.
        exchange: "gather" or "ring" (see the module), of y.

    Returns:
        A float32 scalar.

    Raises:
        ValueError, TypeError: as ``clip_loss``.

    A rank takes its rows of the matrix of logits against y of all ranks: 1 / ranks of the work of one process. A
    log-sum-exp over ranks, of one number a column, finishes its columns.
    """
    check_paired(x, y, ("x", "y"))
    check_exchange(exchange)
    scale = scale_tensor(scale, x)
    sizes = checked_sizes(x, sizes, group)
    if exchange == "ring":
        row, column, pair, *lse_residuals = ring.two_sided_lse(x, y, scale, sizes, group)
        return _share(softplus_loss(row, lse_residuals[0], pair, column, lse_residuals[1]), sizes, sum(sizes))
    rank = dist.get_rank(group)
    offset = sum(sizes[:rank])
    columns = slice(offset, offset + x.shape[0])
    keys = gather_with_grad(y, group=group, sizes=sizes)
    row, part, pair, lse_residual, _ = two_sided_lse(x, keys, scale, offset)
    column = _logsumexp(gather_with_grad(part[None], group=group, sizes=[1] * len(sizes))[:, columns])
    return _share(softplus_loss(row, lse_residual, pair, column, torch.zeros_like(column)), sizes, sum(sizes))


def global_siglip_loss(
    x: Tensor,
    y: Tensor,
    scale: float | Tensor,
    bias: float | Tensor = 0.0,
    *,
    group: Group = None,
    sizes: list[int] | None = None,
    exchange: Exchange = "gather",
) -> Tensor:
    """This rank's share of ``siglip_loss`` over all ranks' pairs.

    Args:
        x, y: (B, D), row i of one belongs to row i of the other.
        scale, bias: as for ``siglip_loss``.
        group, sizes: as for ``gather_keys``.
        exchange: "gather" or "ring" (see the module), of y. SigLIP itself takes the ring.

    Returns:
        A float32 scalar.

    Raises:
        ValueError, TypeError: as ``siglip_loss``.
    """
    check_paired(x, y, ("x", "y"))
    check_exchange(exchange)
    scale, bias = scale_tensor(scale, x), scale_tensor(bias, x)
    sizes = checked_sizes(x, sizes, group)
    if exchange == "ring":
        loss = ring.siglip(x, y, scale, bias, sizes, group)
    else:
        offset = sum(sizes[: dist.get_rank(group)])
        (x, keys), matmul_dtype = autocast_inputs(x, gather_with_grad(y, group=group, sizes=sizes))
        loss = apply_siglip(x, keys, scale, bias, offset, needs_grad(x, scale), "sum", matmul_dtype)[0]
    return loss * (len(sizes) / sum(sizes))


def global_supcon_loss(
    z: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    group: Group = None,
    sizes: list[int] | None = None,
) -> Tensor:
    """This rank's share of ``supcon_loss`` over all ranks' rows, gathered.

    Args:
        z, labels: (B, D) and (B,), this rank's.
        temperature: as for ``supcon_loss``.
        group, sizes: as for ``gather_keys``.

    Returns:
        A float32 scalar: the mean over ranks is the mean over all rows that have a positive on any rank.

    Raises:
        ValueError, TypeError: as ``supcon_loss``.
    """
    check_pair(z, z, ("z", "z"))
    check_ids("labels", labels, z.shape[0], z)
    sizes = checked_sizes(z, sizes, group)
    (unit,), matmul_dtype = autocast_inputs(normalize(z))
    keys = gather_with_grad(unit, group=group, sizes=sizes)
    ids, offset = gather_with_grad(labels, group=group, sizes=sizes), sum(sizes[: dist.get_rank(group)])
    scale = inverse_temperature(temperature)
    losses, pull = supcon_of_unit(unit, keys, scale, labels, ids, matmul_dtype, "none", offset)
    rows = (pull.detach() < 0).sum().to(losses.dtype)
    dist.all_reduce(rows, group=group)
    return losses.sum() * len(sizes) / rows.clamp(min=1)


def _logsumexp(parts: Tensor) -> Tensor:
    """Over the first dimension, in units of log 2; -inf, without gradient, where all parts are."""
    empty = (parts == -torch.inf).all(0)
    return (parts.masked_fill(empty, 0) / LOG2E).logsumexp(0).masked_fill(empty, -torch.inf) * LOG2E


def global_ntxent(
    z1: Tensor,
    z2: Tensor,
    temperature: float | Tensor,
    *,
    decoupled: bool = False,
    group: Group = None,
    sizes: list[int] | None = None,
) -> Tensor:
    """This rank's share of ``ntxent`` over all ranks' samples, gathered.

    Args:
        z1, z2: (B, D).
        temperature, decoupled: as for ``ntxent``.
        group, sizes: as for ``gather_keys``.

    Returns:
        A float32 scalar.

    Raises:
        ValueError, TypeError: as ``ntxent``.
    """
    check_flags(decoupled=decoupled)
    return global_ntxent_of_scale(z1, z2, inverse_temperature(temperature), decoupled, group, sizes)


def global_ntxent_of_scale(
    z1: Tensor,
    z2: Tensor,
    scale: float | Tensor,
    decoupled: bool = False,
    group: Group = None,
    sizes: list[int] | None = None,
) -> Tensor:
    """``global_ntxent`` at an inverse temperature, of any sign."""
    check_paired(z1, z2, ("z1", "z2"))
    scale = scale_tensor(scale, z1)
    sizes = checked_sizes(z1, sizes, group)
    z = unit_views(z1, z2).unflatten(0, (-1, 2))
    everyone = gather_with_grad(z, group=group, sizes=sizes).flatten(0, 1)
    first = sum(sizes[: dist.get_rank(group)])
    sample = torch.arange(sum(sizes), device=z.device).repeat_interleave(2)
    own = sample[2 * first : 2 * (first + z.shape[0])]
    partner = torch.arange(2 * first, 2 * first + own.shape[0], device=z.device)
    partner = partner + 1 - 2 * (partner % 2)
    masks = partner[:, None], None, own, sample
    total = one_sided_loss(z.flatten(0, 1), everyone, scale, *masks, reduction="sum", decoupled=decoupled)
    return _share(total, sizes, 2 * sum(sizes))
