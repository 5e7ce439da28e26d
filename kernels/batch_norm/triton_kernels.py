"""Triton kernels of batch norm over R rows of C channels, channels next to each other, read in place.

All are bound by memory. Channels come in blocks of up to 128, so that a warp reads whole lines of 128 bytes, 16 of them
a thread. Statistics and sums take two steps, each program's part and then all parts, and so need no atomics. The rows
of a program do not depend on the GPU. A part of the statistics has 2 C + 1 numbers: means, squared deviations, count.

The rows may be several groups, each with statistics of its own: G consecutive shares of R rows. A grid's second axis is
the group, so that groups take no more launches.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vito_kernels._core.lazy_triton import arch, jit

if TYPE_CHECKING:
    import triton.language as tl

TILE, UNROLL = 4096, 4  # elements whose loads are under way together, and how many such tiles in a row
REDUCING, MAPPING, MERGING = 8, 4, 4  # warps: a reduction has two float32 sums for each element of its tile
PROGRAMS = 512  # that share the rows and channels of a reduction: some four for each processor of a GPU
PARTS_BLOCK, CHANNELS_BLOCK = 64, 8  # a merge has its channels' parts in registers: this many, or all

# ------------------------------------------------------------------------------------------------------------- kernels


@jit
def batch_norm_stats_kernel(
    x, parts, rows, C, part_count,
    UNROLL: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A program's part: BLOCK_C channels, every part_count-th span of its group's rows. parts (P, G, 2 C + 1).

    Each place of the tile has a mean and a sum of squared deviations of its own (Welford), so nothing cancels if a mean
    is far from zero.
    """
    channel_blocks = tl.cdiv(C, BLOCK_C)
    group = tl.program_id(1)
    x += group.to(tl.int64) * rows * C
    part = tl.program_id(0) // channel_blocks
    block = tl.program_id(0) % channel_blocks
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    mean = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    squares = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    count = tl.zeros((BLOCK_R,), tl.float32)
    tiles = 0.0
    for start in range(part * UNROLL * BLOCK_R, rows, part_count * UNROLL * BLOCK_R):
        for i in tl.static_range(UNROLL):
            r = start + i * BLOCK_R + tl.arange(0, BLOCK_R)
            inside = (r < rows)[:, None] & (c < C)[None, :]
            v = tl.load(x + r.to(tl.int64)[:, None] * C + c[None, :], mask=inside, other=0.0).to(tl.float32)
            tiles += 1.0
            apart = tl.where(inside, v - mean, 0.0)
            mean += apart * (1.0 / tiles)  # places beyond the last row stay as they are
            squares += apart * (v - mean)
            count += tl.where(r < rows, 1.0, 0.0)
    total = tl.sum(count, 0)
    average = tl.sum(mean * count[:, None], 0) / total
    apart = mean - average[None, :]
    target = parts + (part * tl.num_programs(1) + group) * (2 * C + 1)
    tl.store(target + c, average, mask=c < C)
    tl.store(target + C + c, tl.sum(squares + count[:, None] * apart * apart, 0), mask=c < C)
    if block == 0:
        tl.store(target + 2 * C, total)


@jit
def batch_norm_merge_stats_kernel(
    parts, merged, mean, invstd, count, running_mean, running_var, momentum, eps, C, part_count, groups,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """All parts of BLOCK_C channels to one (``merged``), or to final statistics, with the running ones moved.

    The running statistics move by one group after the other, as in a forward pass of each.
    """
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    p = tl.arange(0, BLOCK_P)
    inside = (p < part_count)[:, None] & (c < C)[None, :]
    moved_mean = tl.zeros((BLOCK_C,), tl.float32)
    moved_var = tl.zeros((BLOCK_C,), tl.float32)
    if running_mean is not None:
        moved_mean = tl.load(running_mean + c, mask=c < C, other=0.0)
        moved_var = tl.load(running_var + c, mask=c < C, other=0.0)
    for group in range(groups):
        first = parts + group * (2 * C + 1)
        n = tl.load(first + p * groups * (2 * C + 1) + 2 * C, mask=p < part_count, other=0.0)
        source = first + p[:, None] * groups * (2 * C + 1) + c[None, :]
        means = tl.load(source, mask=inside, other=0.0)
        squares = tl.load(source + C, mask=inside, other=0.0)
        total = tl.sum(n, 0)
        average = tl.sum(means * n[:, None], 0) / total
        apart = means - average[None, :]
        deviations = tl.sum(squares + n[:, None] * apart * apart, 0)
        if merged is not None:
            target = merged + group * (2 * C + 1)
            tl.store(target + c, average, mask=c < C)
            tl.store(target + C + c, deviations, mask=c < C)
            if tl.program_id(0) == 0:
                tl.store(target + 2 * C, total)
        else:
            tl.store(mean + group * C + c, average, mask=c < C)
            tl.store(invstd + group * C + c, 1.0 / tl.sqrt(deviations / total + eps), mask=c < C)
            if tl.program_id(0) == 0:
                tl.store(count + group, total)
            unbiased = deviations / tl.maximum(total - 1.0, 1.0)
            moved_mean += momentum * (average - moved_mean)
            moved_var += momentum * (unbiased - moved_var)
    if running_mean is not None:
        tl.store(running_mean + c, moved_mean, mask=c < C)
        tl.store(running_var + c, moved_var, mask=c < C)


@jit
def batch_norm_fwd_kernel(
    x, residual, y, weight, bias, mean, invstd, rows, C,
    RELU: tl.constexpr, UNROLL: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A program's rows and channels of y. The last rows come first: the statistics may have left them in the cache."""
    channel_blocks = tl.cdiv(C, BLOCK_C)
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    group = tl.num_programs(1) - 1 - tl.program_id(1)
    x += group.to(tl.int64) * rows * C
    y += group.to(tl.int64) * rows * C
    if residual is not None:
        residual += group.to(tl.int64) * rows * C
    mean += group * C
    invstd += group * C
    c = (program % channel_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    start = (program // channel_blocks) * UNROLL * BLOCK_R
    multiplier = tl.load(invstd + c, mask=c < C, other=0.0) * tl.load(weight + c, mask=c < C, other=0.0)
    center = tl.load(mean + c, mask=c < C, other=0.0)
    shift = tl.load(bias + c, mask=c < C, other=0.0)
    for i in tl.static_range(UNROLL):
        r = start + i * BLOCK_R + tl.arange(0, BLOCK_R)
        inside = (r < rows)[:, None] & (c < C)[None, :]
        at = r.to(tl.int64)[:, None] * C + c[None, :]
        z = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        z = (z - center[None, :]) * multiplier[None, :] + shift[None, :]
        if residual is not None:
            z += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
        if RELU:
            z = tl.where(z <= 0, 0.0, z)  # NaN stays, as in torch
        tl.store(y + at, z.to(y.dtype.element_ty), mask=inside)


@jit
def batch_norm_sums_kernel(
    grad, x, y, masked, weight, bias, mean, invstd, parts, rows, C, part_count,
    RELU: tl.constexpr, UNROLL: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A program's part (2, C) of the sums of g and of g (x - mean), where g is the gradient before the ReLU. parts (P,
    G, 2, C).

    With y the mask is y's, and g goes to ``masked``; otherwise it is computed as in the forward pass.
    """
    channel_blocks = tl.cdiv(C, BLOCK_C)
    group = tl.program_id(1)
    grad += group.to(tl.int64) * rows * C
    x += group.to(tl.int64) * rows * C
    if y is not None:
        y += group.to(tl.int64) * rows * C
        masked += group.to(tl.int64) * rows * C
    mean += group * C
    invstd += group * C
    part = tl.program_id(0) // channel_blocks
    c = (tl.program_id(0) % channel_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    multiplier = tl.load(invstd + c, mask=c < C, other=0.0) * tl.load(weight + c, mask=c < C, other=0.0)
    center = tl.load(mean + c, mask=c < C, other=0.0)
    shift = tl.load(bias + c, mask=c < C, other=0.0)
    sums = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    products = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for start in range(part * UNROLL * BLOCK_R, rows, part_count * UNROLL * BLOCK_R):
        for i in tl.static_range(UNROLL):
            r = start + i * BLOCK_R + tl.arange(0, BLOCK_R)
            inside = (r < rows)[:, None] & (c < C)[None, :]
            at = r.to(tl.int64)[:, None] * C + c[None, :]
            g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
            v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) - center[None, :]
            if y is not None:
                z = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
                g = tl.where(z <= 0, 0.0, g)
                tl.store(masked + at, g.to(masked.dtype.element_ty), mask=inside)
            elif RELU:
                z = (v * multiplier[None, :] + shift[None, :]).to(x.dtype.element_ty).to(tl.float32)
                g = tl.where(z <= 0, 0.0, g)
            sums += g
            products += g * v
    target = parts + (part * tl.num_programs(1) + group) * 2 * C + c
    tl.store(target, tl.sum(sums, 0), mask=c < C)
    tl.store(target + C, tl.sum(products, 0), mask=c < C)


@jit
def batch_norm_merge_sums_kernel(
    parts, sums, d_weight, d_bias, invstd, C, part_count, groups,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """All parts of both sums of BLOCK_C channels, and the gradients of weight and bias."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    p = tl.arange(0, BLOCK_P)
    inside = (p < part_count)[:, None] & (c < C)[None, :]
    of_weight = tl.zeros((BLOCK_C,), tl.float32)
    of_bias = tl.zeros((BLOCK_C,), tl.float32)
    for group in range(groups):
        source = parts + (p[:, None] * groups + group) * 2 * C + c[None, :]
        plain = tl.sum(tl.load(source, mask=inside, other=0.0), 0)
        product = tl.sum(tl.load(source + C, mask=inside, other=0.0), 0)
        tl.store(sums + group * 2 * C + c, plain, mask=c < C)
        tl.store(sums + group * 2 * C + C + c, product, mask=c < C)
        of_weight += product * tl.load(invstd + group * C + c, mask=c < C, other=0.0)
        of_bias += plain
    tl.store(d_weight + c, of_weight, mask=c < C)
    tl.store(d_bias + c, of_bias, mask=c < C)


@jit
def batch_norm_bwd_kernel(
    grad, x, dx, weight, bias, mean, invstd, count, sums, rows, C,
    RELU: tl.constexpr, UNROLL: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A program's rows and channels of dx; the last rows first, as forward."""
    channel_blocks = tl.cdiv(C, BLOCK_C)
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    group = tl.num_programs(1) - 1 - tl.program_id(1)
    grad += group.to(tl.int64) * rows * C
    x += group.to(tl.int64) * rows * C
    dx += group.to(tl.int64) * rows * C
    mean += group * C
    invstd += group * C
    sums += group * 2 * C
    c = (program % channel_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    start = (program // channel_blocks) * UNROLL * BLOCK_R
    inverse = tl.load(invstd + c, mask=c < C, other=0.0)
    multiplier = inverse * tl.load(weight + c, mask=c < C, other=0.0)
    center = tl.load(mean + c, mask=c < C, other=0.0)
    shift = tl.load(bias + c, mask=c < C, other=0.0)
    total = tl.load(count + group)
    average = tl.load(sums + c, mask=c < C, other=0.0) / total
    slope = tl.load(sums + C + c, mask=c < C, other=0.0) / total * inverse * inverse
    for i in tl.static_range(UNROLL):
        r = start + i * BLOCK_R + tl.arange(0, BLOCK_R)
        inside = (r < rows)[:, None] & (c < C)[None, :]
        at = r.to(tl.int64)[:, None] * C + c[None, :]
        g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) - center[None, :]
        if RELU:
            z = (v * multiplier[None, :] + shift[None, :]).to(x.dtype.element_ty).to(tl.float32)
            g = tl.where(z <= 0, 0.0, g)
        d = (g - average[None, :] - v * slope[None, :]) * multiplier[None, :]
        tl.store(dx + at, d.to(dx.dtype.element_ty), mask=inside)


# ----------------------------------------------------------------------------------------------------------- launchers


def _groups(mean: Tensor) -> int:
    """How many groups have statistics: (C) of one, or (G, C)."""
    return 1 if mean.dim() == 1 else len(mean)


def _tile(x: Tensor, groups: int, warps: int) -> tuple[int, int, int, dict[str, int]]:
    """(rows of a group, channel blocks, spans of rows, constants of the kernel)."""
    channels = x.shape[1]
    block_c = min(128, max(16, 1 << (channels - 1).bit_length()))
    rows, block_r = x.numel() // channels // groups, TILE // block_c
    constants = {"UNROLL": UNROLL, "BLOCK_R": block_r, "BLOCK_C": block_c, "num_warps": warps}
    return rows, -(-channels // block_c), -(-rows // (UNROLL * block_r)), constants


def _merge_tile(part_count: int) -> dict[str, int]:
    most = PARTS_BLOCK if part_count <= PARTS_BLOCK else max(PROGRAMS, 1 << (part_count - 1).bit_length())
    return {"BLOCK_P": most, "BLOCK_C": CHANNELS_BLOCK, "num_warps": MERGING}


def launch_stats(x: Tensor, groups: int = 1) -> Tensor:
    """The parts of x, (P, 2 C + 1) float32, or (P, G, 2 C + 1) of more groups than one."""
    rows, channel_blocks, spans, constants = _tile(x, groups, REDUCING if arch() >= 90 else 4)  # 8 warps spill there
    part_count = min(max(1, PROGRAMS // (channel_blocks * groups)), spans)
    shape = (part_count, 2 * x.shape[1] + 1) if groups == 1 else (part_count, groups, 2 * x.shape[1] + 1)
    parts = x.new_empty(shape, dtype=torch.float32)
    batch_norm_stats_kernel[(part_count * channel_blocks, groups)](x, parts, rows, x.shape[1], part_count, **constants)
    return parts


def launch_merge_stats(
    parts: Tensor, merged: Tensor | None, finished: tuple[Tensor | None, ...], running: tuple[Tensor | None, ...],
    momentum: float, eps: float,
) -> None:  # fmt: skip
    """To ``merged`` (1, 2 C + 1), or to ``finished``: mean (C), 1 / deviation (C) and count (1).

    Of parts by groups: (1, G, 2 C + 1), (G, C), (G, C) and (G).
    """
    part_count, channels, groups = len(parts), parts.shape[-1] // 2, parts.shape[1] if parts.dim() == 3 else 1
    batch_norm_merge_stats_kernel[(-(-channels // CHANNELS_BLOCK),)](
        parts, merged, *finished, *running, momentum, eps, channels, part_count, groups, **_merge_tile(part_count)
    )  # fmt: skip


def launch_forward(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, mean: Tensor, invstd: Tensor, relu: bool
) -> Tensor:
    rows, channel_blocks, spans, constants = _tile(x, _groups(mean), MAPPING)
    y = torch.empty_like(x)
    batch_norm_fwd_kernel[(spans * channel_blocks, _groups(mean))](
        x, residual, y, weight, bias, mean, invstd, rows, x.shape[1], RELU=relu, **constants
    )  # fmt: skip
    return y


def launch_sums(
    grad: Tensor, x: Tensor, y: Tensor | None, weight: Tensor, bias: Tensor, mean: Tensor, invstd: Tensor, relu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    channels, groups = x.shape[1], _groups(mean)
    rows, channel_blocks, spans, constants = _tile(x, groups, REDUCING)
    part_count = min(max(1, PROGRAMS // (channel_blocks * groups)), spans)
    parts = mean.new_empty((part_count, groups, 2 * channels))
    masked = x.new_empty(0) if y is None else torch.empty_like(x)
    batch_norm_sums_kernel[(part_count * channel_blocks, groups)](
        grad, x, y, masked, weight, bias, mean, invstd, parts, rows, channels, part_count, RELU=relu, **constants
    )  # fmt: skip
    sums = mean.new_empty((*mean.shape[:-1], 2, channels))
    d_weight, d_bias = torch.empty_like(weight), torch.empty_like(bias)
    batch_norm_merge_sums_kernel[(-(-channels // CHANNELS_BLOCK),)](
        parts, sums, d_weight, d_bias, invstd, channels, part_count, groups, **_merge_tile(part_count)
    )  # fmt: skip
    return sums, d_weight, d_bias, masked


def launch_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, invstd: Tensor, count: Tensor, sums: Tensor,
    relu: bool,
) -> Tensor:  # fmt: skip
    rows, channel_blocks, spans, constants = _tile(x, _groups(mean), MAPPING)
    dx = torch.empty_like(x)
    batch_norm_bwd_kernel[(spans * channel_blocks, _groups(mean))](
        grad, x, dx, weight, bias, mean, invstd, count, sums, rows, x.shape[1], RELU=relu, **constants
    )  # fmt: skip
    return dx
