"""Triton kernels of batch norm over R rows of C channels, channels next to each other, read in place.

All are bound by memory. Channels come in blocks of up to 128, so that a warp reads whole lines of 128 bytes, 16 of them
a thread. Statistics and sums take two steps, each program's part and then all parts, and so need no atomics. The rows
of a program do not depend on the GPU. A part of the statistics has 2 C + 1 numbers: means, squared deviations, count.
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
    """A program's part: BLOCK_C channels, every part_count-th span of rows.

    Each place of the tile has a mean and a sum of squared deviations of its own (Welford), so nothing cancels if a mean
    is far from zero.
    """
    channel_blocks = tl.cdiv(C, BLOCK_C)
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
    target = parts + part * (2 * C + 1)
    tl.store(target + c, average, mask=c < C)
    tl.store(target + C + c, tl.sum(squares + count[:, None] * apart * apart, 0), mask=c < C)
    if block == 0:
        tl.store(target + 2 * C, total)


@jit
def batch_norm_merge_stats_kernel(
    parts, merged, mean, invstd, count, running_mean, running_var, momentum, eps, C, part_count,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """All parts of BLOCK_C channels to one (``merged``), or to final statistics, with the running ones moved."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    p = tl.arange(0, BLOCK_P)
    inside = (p < part_count)[:, None] & (c < C)[None, :]
    n = tl.load(parts + p * (2 * C + 1) + 2 * C, mask=p < part_count, other=0.0)
    source = parts + p[:, None] * (2 * C + 1) + c[None, :]
    means = tl.load(source, mask=inside, other=0.0)
    squares = tl.load(source + C, mask=inside, other=0.0)
    total = tl.sum(n, 0)
    average = tl.sum(means * n[:, None], 0) / total
    apart = means - average[None, :]
    deviations = tl.sum(squares + n[:, None] * apart * apart, 0)
    if merged is not None:
        tl.store(merged + c, average, mask=c < C)
        tl.store(merged + C + c, deviations, mask=c < C)
        if tl.program_id(0) == 0:
            tl.store(merged + 2 * C, total)
    else:
        tl.store(mean + c, average, mask=c < C)
        tl.store(invstd + c, 1.0 / tl.sqrt(deviations / total + eps), mask=c < C)
        if tl.program_id(0) == 0:
            tl.store(count, total)
        if running_mean is not None:
            before = tl.load(running_mean + c, mask=c < C, other=0.0)
            tl.store(running_mean + c, before + momentum * (average - before), mask=c < C)
            before = tl.load(running_var + c, mask=c < C, other=0.0)
            unbiased = deviations / tl.maximum(total - 1.0, 1.0)
            tl.store(running_var + c, before + momentum * (unbiased - before), mask=c < C)


@jit
def batch_norm_fwd_kernel(
    x, residual, y, weight, bias, mean, invstd, rows, C,
    RELU: tl.constexpr, UNROLL: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A program's rows and channels of y. The last rows come first: the statistics may have left them in the cache."""
    channel_blocks = tl.cdiv(C, BLOCK_C)
    program = tl.num_programs(0) - 1 - tl.program_id(0)
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
    """A program's part (2, C) of the sums of g and of g (x - mean), where g is the gradient before the ReLU.

    With y the mask is y's, and g goes to ``masked``; otherwise it is computed as in the forward pass.
    """
    channel_blocks = tl.cdiv(C, BLOCK_C)
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
    target = parts + part * 2 * C + c
    tl.store(target, tl.sum(sums, 0), mask=c < C)
    tl.store(target + C, tl.sum(products, 0), mask=c < C)


@jit
def batch_norm_merge_sums_kernel(
    parts, sums, d_weight, d_bias, invstd, C, part_count,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """All parts of both sums of BLOCK_C channels, and the gradients of weight and bias."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    p = tl.arange(0, BLOCK_P)
    inside = (p < part_count)[:, None] & (c < C)[None, :]
    source = parts + p[:, None] * 2 * C + c[None, :]
    plain = tl.sum(tl.load(source, mask=inside, other=0.0), 0)
    product = tl.sum(tl.load(source + C, mask=inside, other=0.0), 0)
    tl.store(sums + c, plain, mask=c < C)
    tl.store(sums + C + c, product, mask=c < C)
    tl.store(d_bias + c, plain, mask=c < C)
    tl.store(d_weight + c, product * tl.load(invstd + c, mask=c < C, other=0.0), mask=c < C)


@jit
def batch_norm_bwd_kernel(
    grad, x, dx, weight, bias, mean, invstd, count, sums, rows, C,
    RELU: tl.constexpr, UNROLL: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A program's rows and channels of dx; the last rows first, as forward."""
    channel_blocks = tl.cdiv(C, BLOCK_C)
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    c = (program % channel_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    start = (program // channel_blocks) * UNROLL * BLOCK_R
    inverse = tl.load(invstd + c, mask=c < C, other=0.0)
    multiplier = inverse * tl.load(weight + c, mask=c < C, other=0.0)
    center = tl.load(mean + c, mask=c < C, other=0.0)
    shift = tl.load(bias + c, mask=c < C, other=0.0)
    total = tl.load(count)
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


def _tile(x: Tensor, warps: int) -> tuple[int, int, int, dict[str, int]]:
    """(rows, channel blocks, spans of rows, constants of the kernel)."""
    channels = x.shape[1]
    block_c = min(128, max(16, 1 << (channels - 1).bit_length()))
    rows, block_r = x.numel() // channels, TILE // block_c
    constants = {"UNROLL": UNROLL, "BLOCK_R": block_r, "BLOCK_C": block_c, "num_warps": warps}
    return rows, -(-channels // block_c), -(-rows // (UNROLL * block_r)), constants


def _merge_tile(part_count: int) -> dict[str, int]:
    most = PARTS_BLOCK if part_count <= PARTS_BLOCK else max(PROGRAMS, 1 << (part_count - 1).bit_length())
    return {"BLOCK_P": most, "BLOCK_C": CHANNELS_BLOCK, "num_warps": MERGING}


def launch_stats(x: Tensor) -> Tensor:
    """The parts of x, (parts, 2 C + 1) float32."""
    rows, channel_blocks, spans, constants = _tile(x, REDUCING if arch() >= 90 else 4)  # 8 warps spill there
    part_count = min(max(1, PROGRAMS // channel_blocks), spans)
    parts = x.new_empty((part_count, 2 * x.shape[1] + 1), dtype=torch.float32)
    batch_norm_stats_kernel[(part_count * channel_blocks,)](x, parts, rows, x.shape[1], part_count, **constants)
    return parts


def launch_merge_stats(
    parts: Tensor, merged: Tensor | None, finished: tuple[Tensor | None, ...], running: tuple[Tensor | None, ...],
    momentum: float, eps: float,
) -> None:  # fmt: skip
    """To ``merged`` (1, 2 C + 1), or to ``finished``: mean (C), 1 / deviation (C) and count (1)."""
    part_count, channels = len(parts), parts.shape[1] // 2
    batch_norm_merge_stats_kernel[(-(-channels // CHANNELS_BLOCK),)](
        parts, merged, *finished, *running, momentum, eps, channels, part_count, **_merge_tile(part_count)
    )  # fmt: skip


def launch_forward(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, mean: Tensor, invstd: Tensor, relu: bool
) -> Tensor:
    rows, channel_blocks, spans, constants = _tile(x, MAPPING)
    y = torch.empty_like(x)
    batch_norm_fwd_kernel[(spans * channel_blocks,)](
        x, residual, y, weight, bias, mean, invstd, rows, x.shape[1], RELU=relu, **constants
    )  # fmt: skip
    return y


def launch_sums(
    grad: Tensor, x: Tensor, y: Tensor | None, weight: Tensor, bias: Tensor, mean: Tensor, invstd: Tensor, relu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, channel_blocks, spans, constants = _tile(x, REDUCING)
    channels = x.shape[1]
    part_count = min(max(1, PROGRAMS // channel_blocks), spans)
    parts = mean.new_empty((part_count, 2 * channels))
    masked = x.new_empty(0) if y is None else torch.empty_like(x)
    batch_norm_sums_kernel[(part_count * channel_blocks,)](
        grad, x, y, masked, weight, bias, mean, invstd, parts, rows, channels, part_count, RELU=relu, **constants
    )  # fmt: skip
    sums, d_weight, d_bias = mean.new_empty((2, channels)), torch.empty_like(weight), torch.empty_like(bias)
    batch_norm_merge_sums_kernel[(-(-channels // CHANNELS_BLOCK),)](
        parts, sums, d_weight, d_bias, invstd, channels, part_count, **_merge_tile(part_count)
    )  # fmt: skip
    return sums, d_weight, d_bias, masked


def launch_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, invstd: Tensor, count: Tensor, sums: Tensor,
    relu: bool,
) -> Tensor:  # fmt: skip
    rows, channel_blocks, spans, constants = _tile(x, MAPPING)
    dx = torch.empty_like(x)
    batch_norm_bwd_kernel[(spans * channel_blocks,)](
        grad, x, dx, weight, bias, mean, invstd, count, sums, rows, x.shape[1], RELU=relu, **constants
    )  # fmt: skip
    return dx
