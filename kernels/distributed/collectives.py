"""Rows of all ranks, whose batches may differ in size: their sizes, a gather, and the gradients back.

Rows are padded to the largest batch if sizes differ: one collective for any sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Group = Any  # torch.distributed.ProcessGroup, or None for the default one


# Newer torch deprecates the name of torch 2.11.
gather_rows: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)


def exchange_sizes(rows: int, device: torch.device, group: Group = None) -> list[int]:
    """Rows of each rank. Stops the host; pass ``sizes`` if batches are equal or known."""
    mine = torch.tensor([rows], device=device)
    sizes = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, mine, group=group)
    return [int(size) for size in sizes]


def checked_sizes(x: Tensor, sizes: list[int] | None, group: Group) -> list[int]:
    """``sizes``, or by default those that the ranks exchange. ValueError if they contradict x (B, ...) or the ranks."""
    if sizes is None:
        return exchange_sizes(x.shape[0], x.device, group)
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    counts = (
        isinstance(sizes, Sequence)
        and len(sizes) == ranks
        and all(isinstance(size, int) and size > 0 for size in sizes)
    )
    if not counts or sizes[rank] != x.shape[0]:
        raise ValueError(f"sizes must hold the rows of each of {ranks} ranks, here {x.shape[0]} at {rank}, got {sizes}")
    return sizes


def start_gather(x: Tensor, sizes: list[int], group: Group = None) -> tuple[Tensor, Any]:
    """(padded rows of all ranks, (ranks, largest size, ...), filled when the transfer ends; the transfer)."""
    padded = _padded(x, [len(x)], max(sizes))
    out = x.new_empty(len(sizes) * max(sizes), *x.shape[1:])
    return out.unflatten(0, (len(sizes), -1)), gather_rows(out, padded, group=group, async_op=True)


def without_padding(x: Tensor, sizes: list[int]) -> Tensor:
    """(N, ...) rows in the order of ranks."""
    if min(sizes) == max(sizes):
        return x.flatten(0, 1)
    return torch.cat([part[:size] for part, size in zip(x, sizes, strict=True)])


def _padded(x: Tensor, sizes: list[int], largest: int) -> Tensor:
    """Parts of ``sizes`` rows in x, each with rows of zeros up to the largest."""
    if min(sizes) == largest:
        return x.contiguous()
    out = x.new_zeros(len(sizes), largest, *x.shape[1:])
    for padded, part in zip(out, x.split(sizes), strict=True):
        padded[: len(part)] = part
    return out.flatten(0, 1)


class _Gather(torch.autograd.Function):
    """All ranks' rows. Backward sums the gradients of all ranks for this rank's rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int], group: Group) -> Tensor:
        ctx.sizes, ctx.group = sizes, group
        everyone, transfer = start_gather(x, sizes, group)
        transfer.wait()
        return without_padding(everyone, sizes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _Scatter.apply(grad, ctx.sizes, ctx.group), None, None


class _Scatter(torch.autograd.Function):
    """The sum over ranks of the values for this rank's rows: the adjoint of ``_Gather``.

    Rounded to 16 bits once, not at each addition.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int], group: Group) -> Tensor:
        ctx.sizes, ctx.group = sizes, group
        rank, wide = dist.get_rank(group), x.to(torch.promote_types(x.dtype, torch.float32))
        if x.device.type == "cpu":  # gloo's own reduce-scatter is young and saves little
            total = wide.clone(memory_format=torch.contiguous_format)
            dist.all_reduce(total, group=group)
            return total.split(sizes)[rank].to(x.dtype)
        padded = _padded(wide, sizes, max(sizes))
        mine = padded.new_empty(max(sizes), *padded.shape[1:])
        reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        reduce_scatter(mine, padded, group=group)
        return mine[: sizes[rank]].to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _Gather.apply(grad, ctx.sizes, ctx.group), None, None


def gather_with_grad(x: Tensor, *, group: Group = None, sizes: list[int] | None = None) -> Tensor:
    """x (B, ...) of all ranks, (N, ...) in the order of ranks, needs_grad."""
    return _Gather.apply(x, checked_sizes(x, sizes, group), group)
