"""Forward pass of two-sided losses: the log-sum-exps of rows and of columns in one pass over the logits.

    s           = scale * x @ y.T, -inf where masked                (M, N), never in memory (but see ``large_dim``)
    row, column = s.logsumexp(1), s.logsumexp(0)                    two_sided_lse_fwd_kernel

x (M, D), y (N, D) float32, bfloat16 or float16; sums and outputs float32. Fixed shift and repeats as in
:mod:`.forward`. Column sums leave a program as one partial sum for each block of rows. They are added in order, strip
after strip of at most ``STRIP_BYTES``. Deterministic: no atomics, every sum in a fixed order.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vito_kernels._core.lazy_triton import cdiv, jit, num_sms, on_device
from vito_kernels.contrastive import large_dim
from vito_kernels.contrastive.device_functions import apply_mask, dot_rows, load_rows, plan_tiles
from vito_kernels.contrastive.forward import trusted_lse
from vito_kernels.contrastive.terms import Mask
from vito_kernels.contrastive.tile_configs import Matrix, Operand, Tile, choose_tile, matrices

if TYPE_CHECKING:
    import triton.language as tl

STRIP_BYTES = 1 << 29  # of column sums, one for each block of rows and column, at a time

# ---- Triton kernels


@jit
def _two_sided_lse_fwd_step(
    t, total, x, y, y_tail, scale2, shifts, own, column_sums, M, N, y_stride, diagonal, D: tl.constexpr,
    W: tl.constexpr, TAIL: tl.constexpr, TILE: tl.constexpr, CHUNKS: tl.constexpr, CLEAN: tl.constexpr,
    DIAGONAL: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of y: its exponentials, added to ``total`` (TILE, BLOCK) and written out as sums of columns.

    The tile is computed transposed. So a thread holds the values of the sums that leave the loop, and the other sums
    cross no thread.
    """
    BLOCK: tl.constexpr = total.shape[1]
    rows = load_rows(y, y_tail, t * TILE, N, y_stride, D, W, TAIL, TILE, CLEAN, TMA, PRECISION)
    other = t * TILE + tl.arange(0, TILE)
    if x[0].dtype == tl.float32 or (TILE < 64 and BLOCK >= 64):  # no tensor cores, or few rows for their left factor
        s = tl.trans(dot_rows(x, rows, CHUNKS, PRECISION))
    else:
        s = dot_rows(rows, x, CHUNKS, PRECISION)
    s = s * scale2 - shifts[None]
    if not CLEAN:
        s = tl.trans(apply_mask(tl.trans(s), own, other, M, N, None, None, None, diagonal, False, DIAGONAL, 0, False))
    p = tl.exp2(s)
    tl.store(column_sums + other, tl.sum(p, 1), mask=other < N)
    return total + p


@jit
def two_sided_lse_fwd_kernel(
    x, y, y_tail, scale, row_sums, column_sums, M, N, x_stride, y_stride, diagonal, split_tiles, D: tl.constexpr,
    W: tl.constexpr, TAIL: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
    DIAGONAL: tl.constexpr, HEADROOM: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """row_sums (splits, M) and column_sums (blocks of rows, N) of 2^(s log2(e) - shift)."""
    CHUNKS: tl.constexpr = D // W + (TAIL > 0)
    block, split = tl.program_id(0), tl.program_id(1)
    own = block * BLOCK + tl.arange(0, BLOCK)
    column_sums += tl.cast(block, tl.int64) * N
    scale2 = tl.load(scale) * 1.4426950408889634
    shifts = tl.where(own < M, tl.abs(scale2) - HEADROOM, float("inf"))  # rows beyond the matrix add nothing to columns
    rows = load_rows(x, x, block * BLOCK, M, x_stride, D, W, TAIL, BLOCK, False, False, PRECISION)
    total = tl.zeros((TILE, BLOCK), tl.float32)

    first = split * split_tiles
    last = tl.minimum(first + split_tiles, tl.cdiv(N, TILE))
    crossed, crossing, full = plan_tiles(block * BLOCK, N, first, last, diagonal, BLOCK, TILE, DIAGONAL)
    for i in tl.range(first, full - crossing, num_stages=STAGES):
        t = tl.where(i < crossed, i, i + crossing)
        total = _two_sided_lse_fwd_step(
            t, total, rows, y, y_tail, scale2, shifts, own, column_sums, M, N, y_stride, diagonal, D, W, TAIL, TILE,
            CHUNKS, True, DIAGONAL, TMA, PRECISION,
        )  # fmt: skip
    for i in tl.range(0, crossing + last - full, num_stages=1, disable_licm=D > 512):  # as above, where it pays
        t = tl.where(i < crossing, crossed + i, full)
        total = _two_sided_lse_fwd_step(
            t, total, rows, y, y_tail, scale2, shifts, own, column_sums, M, N, y_stride, diagonal, D, W, TAIL, TILE,
            CHUNKS, False, DIAGONAL, TMA, PRECISION,
        )  # fmt: skip
    tl.store(row_sums + tl.cast(split, tl.int64) * M + own, tl.sum(total, 0), mask=own < M)


# ---- launchers


def _headroom(dtype: torch.dtype) -> float:
    """Powers of two between the largest exponential and 1: few for float32, whose exponents keep their last bits."""
    return 20.0 if dtype == torch.float32 else 100.0


def launch_two_sided(
    x: Tensor, y: Tensor, scale: Tensor, mask: Mask, done: Tensor | None = None
) -> list[tuple[Tensor, Tensor]]:
    """(row lse2 (M,), its residual), (column lse2 (N,), its residual)."""
    left, right = matrices(x, y)
    headroom = _headroom(x.dtype)
    if large_dim.supports("two_sided", x.shape[1], x.dtype):
        dense = left.tensor, right.tensor
        rows, columns, _ = large_dim.exponentials(*dense, scale, mask, headroom, gather=False, columns=True)
    else:
        rows, columns = _launch_sums(left, right, scale, mask)
    return trusted_lse(left, right, scale, mask, [rows, columns], headroom, done)


def _launch_sums(x: Matrix, y: Matrix, scale: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
    """(row_sums (parts, M), column_sums (parts, N)), strip of rows after strip where one is not enough."""
    (M, D), N = x.tensor.shape, y.tensor.shape[0]
    tile = choose_tile("two_sided", D, x.tensor.dtype)
    right, strip = Operand(y, tile.block_n, tile), max(1, STRIP_BYTES // (4 * N)) * tile.block_m
    if strip >= M:
        return _strip_sums(x, right, N, scale, mask, tile)
    row_sums, column_sums = [], scale.new_zeros(1, N)
    for begin in range(0, M, strip):
        diagonal = None if mask.diagonal is None else mask.diagonal + begin
        seen, part = replace(mask, diagonal=diagonal), Matrix(x.tensor[begin : begin + strip])
        rows, columns = (sums.sum(0) for sums in _strip_sums(part, right, N, scale, seen, tile))
        row_sums.append(rows)
        column_sums += columns
    return torch.cat(row_sums)[None], column_sums


def _strip_sums(x: Matrix, right: Operand, N: int, scale: Tensor, mask: Mask, tile: Tile) -> tuple[Tensor, Tensor]:
    """(row_sums (splits, M), column_sums (blocks of rows, N))."""
    (M, D), dtype, device = x.tensor.shape, x.tensor.dtype, x.tensor.device
    left = Operand(x, tile.block_m, tile)
    blocks, tiles = cdiv(M, tile.block_m), cdiv(N, tile.block_n)
    split_tiles = cdiv(tiles, max(1, min(num_sms(device) // blocks, tiles // 4)))
    row_sums = scale.new_empty(cdiv(tiles, split_tiles), M)
    column_sums = scale.new_empty(blocks, N)
    with on_device(x.tensor):
        two_sided_lse_fwd_kernel[(blocks, row_sums.shape[0])](
            left.matrix, right.source, right.tail_source, scale, row_sums, column_sums, M, N, left.stride, right.stride,
            mask.diagonal or 0, split_tiles, D, left.chunk, left.tail, tile.block_m, tile.block_n, tile.stages,
            DIAGONAL=mask.diagonal_width, HEADROOM=_headroom(dtype), TMA=right.tma, PRECISION=left.precision,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return row_sums, column_sums
