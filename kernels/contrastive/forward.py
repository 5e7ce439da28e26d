"""Forward pass: log-sum-exp over keys with the keys' mean under the softmax, and the two-sided log-sum-exp.

    s           = scale * q @ k.T, -inf where masked                (M, N), never in memory (but see ``large_dim``)
    lse         = s.logsumexp(1)                                    similarity_lse_fwd_kernel
    mean        = s.softmax(1) @ k                                  (M, D), only with ``compute_grad_q``
    row, column = s.logsumexp(1), s.logsumexp(0)                    two_sided_lse_fwd_kernel

q (M, D), k (N, D) float32, bfloat16 or float16; sums and outputs float32. One program owns a block of queries.

*Fixed shift*: exponents are relative to a constant, |scale| log2(e) - 100. Nothing is rescaled and no maximum is taken.
The largest term of unit vectors is 2^100, so 2^27 keys cannot overflow; terms that underflow are 226 powers of two
below the largest possible. For other inputs it may fail, and it detects that. A row is not trusted if its sum left
[2^-64, 2^120] or its mean is not finite. *Online* takes a running maximum, right for every input.

float32 runs online, since a shift of 100 would round its exponents to 2^-18, and so does float16 with the mean, as its
P cannot hold 2^100. Otherwise the fixed shift runs first. The online kernel behind it repeats the blocks that were not
trusted and returns at once from the others, so the host reads no value.

Two-sided column sums leave a program as one partial sum for each block of rows. They are added in order, strip after
strip of at most ``STRIP_BYTES``. Deterministic: no atomics, every sum in a fixed order.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vito_kernels._core.lazy_triton import cdiv, jit, num_sms, on_device
from vito_kernels.contrastive import epilogue, large_dim
from vito_kernels.contrastive.device_functions import (
    add_product,
    apply_mask,
    dot_rows,
    load_rows,
    plan_tiles,
    store_sums,
    zero_sums,
)
from vito_kernels.contrastive.terms import Mask, ordered_pairs
from vito_kernels.contrastive.tile_configs import Matrix, Operand, Tile, choose_tile, matrices, output_chunks

if TYPE_CHECKING:
    import triton.language as tl

STRIP_BYTES = 1 << 29  # of column sums, one for each block of rows and column, at a time

# ---- Triton kernels


@jit
def _similarity_lse_fwd_step(
    t, q, accs, total, top, k, k_tail, k_first, scale2, shift, own, own_group, other_group, positive, M, N, k_stride,
    diagonal, D: tl.constexpr, W: tl.constexpr, TAIL: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
    TILE: tl.constexpr, LANES: tl.constexpr, CHUNKS: tl.constexpr, CLEAN: tl.constexpr, GROUPS: tl.constexpr,
    DIAGONAL: tl.constexpr, POSITIVES: tl.constexpr, ONLINE: tl.constexpr, HEADROOM: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of keys: s = q k^T, p = 2^(s - shift), sums of p by row and of p k by row and column."""
    BLOCK: tl.constexpr = total.shape[0]
    keys = load_rows(k, k_tail, k_first + t * TILE, k_first + N, k_stride, D, W, TAIL, TILE, CLEAN, TMA, PRECISION)
    s = dot_rows(q, keys, CHUNKS, PRECISION) * scale2
    if not ONLINE:
        s -= shift
    if not CLEAN:
        other = t * TILE + tl.arange(0, TILE)
        s = apply_mask(
            s, own, other, M, N, own_group, other_group, positive, diagonal, GROUPS, DIAGONAL, POSITIVES, False
        )
    if ONLINE:
        new_top = tl.maximum(top, tl.max(s, 1))
        old = tl.exp2(top - new_top)
        p = tl.exp2(s - (new_top - HEADROOM)[:, None])
        top = new_top
        total *= old[:, None]
        scaled = ()  # type: tuple
        for c in tl.static_range(FIRST, LAST):
            scaled += (accs[c - FIRST] * old[:, None],)
        accs = scaled
    else:
        p = tl.exp2(s)
    total += tl.sum(tl.reshape(p, (BLOCK, TILE // LANES, LANES)), 1)  # within a thread: no shuffle in the loop
    return add_product(accs, p, keys, CHUNKS, FIRST, LAST, PRECISION), total, top


@jit
def similarity_lse_fwd_kernel(
    q, q_tail, k, k_tail, scale, lse2, lse_residual, mean, trusted, q_group, k_group, positive, M, N, q_stride,
    k_stride,
    diagonal, split_tiles, D: tl.constexpr, W: tl.constexpr, TAIL: tl.constexpr, FIRST: tl.constexpr, LAST:
    tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, LANES: tl.constexpr, STAGES: tl.constexpr, GROUPS:
    tl.constexpr, DIAGONAL: tl.constexpr, POSITIVES: tl.constexpr, ONLINE: tl.constexpr, REPEAT: tl.constexpr,
    HEADROOM: tl.constexpr, Q_TMA: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr, VIEWS: tl.constexpr,
):  # fmt: skip
    """lse2, lse_residual (splits, M) and, in column chunks FIRST .. LAST, mean (splits, M, D): one program per block
    of rows and split.

    With VIEWS > 1, q (VIEWS * M, D) and k (VIEWS * N, D) hold views, and each split of the outputs has a slice for each
    ordered pair of views (a, b), in the order (0, 1), (0, 2), ..., (1, 0): the rows of a over the keys of b.
    """
    CHUNKS: tl.constexpr = D // W + (TAIL > 0)
    # An excluded key may be anywhere; and beside a second loop, ptxas keeps too much of q in registers and spills.
    WIDE: tl.constexpr = (D > 512 and (ONLINE or FIRST == LAST)) or (D > 64 and PRECISION == "bf16x6")
    MASKED: tl.constexpr = GROUPS or POSITIVES > 0 or WIDE
    row, split = tl.program_id(0) * BLOCK, tl.program_id(1)
    own = row + tl.arange(0, BLOCK)
    out = tl.cast(split, tl.int64) * M  # first output row of this split
    if REPEAT:  # noqa: SIM102 (one is decided when compiling, the other when running)
        if tl.min(tl.load(trusted + out + own, mask=own < M, other=1).to(tl.int32), 0) > 0:
            return
    q_first, k_first = 0, 0
    if VIEWS > 1:
        pair = split % (VIEWS * (VIEWS - 1))
        split = split // (VIEWS * (VIEWS - 1))
        view, other_view = pair // (VIEWS - 1), pair % (VIEWS - 1)
        q_first = view * M
        k_first = (other_view + (other_view >= view).to(tl.int32)) * N
    scale2 = tl.load(scale) * 1.4426950408889634
    shift = tl.abs(scale2) - HEADROOM
    queries = load_rows(q, q_tail, q_first + row, q_first + M, q_stride, D, W, TAIL, BLOCK, False, Q_TMA, PRECISION)
    accs = zero_sums(BLOCK, D, W, TAIL, FIRST, LAST)
    total = tl.zeros((BLOCK, LANES), tl.float32)
    top = tl.full((BLOCK,), -3.4028234663852886e38, tl.float32)  # the lowest float32: -inf - -inf would be NaN

    first = split * split_tiles
    last = tl.minimum(first + split_tiles, tl.cdiv(N, TILE))
    crossed, crossing, full = plan_tiles(row, N, first, last, diagonal, BLOCK, TILE, DIAGONAL)
    if MASKED:
        crossed, crossing, full = first, last - first, last
    else:
        for i in tl.range(first, full - crossing, num_stages=STAGES):
            t = tl.where(i < crossed, i, i + crossing)
            accs, total, top = _similarity_lse_fwd_step(
                t, queries, accs, total, top, k, k_tail, k_first, scale2, shift, own, q_group, k_group, positive, M, N,
                k_stride, diagonal, D, W, TAIL, FIRST, LAST, TILE, LANES, CHUNKS, True, GROUPS, DIAGONAL, POSITIVES,
                ONLINE, HEADROOM, TMA, PRECISION,
            )  # fmt: skip
    # Not pipelined, this loop runs once or twice; addresses of its products, hoisted out of it, only spilled.
    for i in tl.range(0, crossing + last - full, num_stages=STAGES if MASKED else 1, disable_licm=True):
        t = tl.where(i < crossing, crossed + i, full)
        accs, total, top = _similarity_lse_fwd_step(
            t, queries, accs, total, top, k, k_tail, k_first, scale2, shift, own, q_group, k_group, positive, M, N,
            k_stride, diagonal, D, W, TAIL, FIRST, LAST, TILE, LANES, CHUNKS, False, GROUPS, DIAGONAL, POSITIVES,
            ONLINE, HEADROOM, TMA, PRECISION,
        )  # fmt: skip

    z = tl.sum(total, 1)
    if ONLINE:
        shift = top - HEADROOM
    else:
        safe = (z > 2.0**-64) & (z < 2.0**120)
        for c in tl.static_range(FIRST, LAST):
            finite = tl.abs(accs[c - FIRST]) < float("inf")  # false of a NaN, which a maximum would pass over
            safe &= tl.min(finite.to(tl.int32), 1) > 0
        tl.store(trusted + out + own, safe.to(tl.int8), mask=own < M)
    log_z = tl.log2(z)
    whole = log_z + shift
    lost = tl.where(z == 0.0, 0.0, shift - whole + log_z)  # as ``terms.split_sum``
    tl.store(lse2 + out + own, whole, mask=own < M)
    tl.store(lse_residual + out + own, lost, mask=own < M)
    means = ()  # type: tuple
    for c in tl.static_range(FIRST, LAST):
        means += (accs[c - FIRST] / tl.where(z == 0.0, 1.0, z)[:, None],)
    store_sums(mean + out * D, means, row, M, D, W, TAIL, BLOCK, FIRST, LAST)


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

VARIANTS = ("fixed", "online")


def launch_lse(
    q: Tensor, k: Tensor, scale: Tensor, mask: Mask, compute_grad_q: bool, views: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """(lse2 (M,), lse_residual (M,), mean (M, D) or (0, D)); few queries split the keys among programs.

    With ``views`` > 1, q (views * M, D) and k (views * N, D) hold views, and M in the outputs becomes the rows of all
    ordered pairs of views, views (views - 1) M, in one launch. The mask is that of each pair.
    """
    M, N, D, (left, right) = q.shape[0] // views, k.shape[0] // views, q.shape[1], matrices(q, k)
    rows = M * max(1, views * (views - 1))  # of the outputs
    if large_dim.supports("mean" if compute_grad_q else "lse", D, q.dtype):
        if views > 1:
            qs, ks = q.unflatten(0, (views, M)), k.unflatten(0, (views, N))
            parts = [launch_lse(qs[a], ks[b], scale, mask, compute_grad_q) for a, b in ordered_pairs(views)]
            lse2, lse_residual, mean = (torch.cat(part) for part in zip(*parts, strict=True))
            return lse2, lse_residual, mean
        dense = left.tensor, right.tensor
        sums, _, mean = large_dim.exponentials(*dense, scale, mask, 100.0, gather=compute_grad_q, columns=False)
        return *trusted_lse(left, right, scale, mask, sums, 100.0, mean), mean
    tiles = [lse_tile(variant, D, q.dtype, mask, compute_grad_q) for variant in VARIANTS]
    split_keys = cdiv(N, max(1, min(num_sms(q.device) // (rows // M * cdiv(M, tiles[0].block_m)), N // 256)))
    widest = max(tile.block_n for tile in tiles)  # powers of two: a split is whole tiles of both variants
    split_keys = cdiv(split_keys, widest) * widest
    splits = cdiv(N, split_keys)
    lse2, lse_residual = scale.new_empty(splits, rows), scale.new_empty(splits, rows)
    mean = scale.new_empty(splits, rows if compute_grad_q else 0, D)
    online_only = online_only_dtype(q.dtype, compute_grad_q)
    trusted = None if online_only else torch.empty(splits, rows, dtype=torch.int8, device=q.device)
    fixed, online = ([(0, 0)] if not compute_grad_q else output_chunks(D, tile) for tile in tiles)
    assert online_only or {first for first, _ in fixed} <= {first for first, _ in online}
    for chunks in online:  # one launch of the fixed variant may cover the columns of several online ones
        for wider in fixed:
            if not online_only and wider[0] == chunks[0]:
                run_lse("fixed", left, right, scale, mask, lse2, lse_residual, mean, trusted, wider, split_keys, views)
        run_lse("online", left, right, scale, mask, lse2, lse_residual, mean, trusted, chunks, split_keys, views)
    return epilogue.merge_splits(lse2, lse_residual, mean)


def trusted_lse(
    q: Matrix, k: Matrix, scale: Tensor, mask: Mask, sums: Tensor, headroom: float, mean: Tensor
) -> tuple[Tensor, Tensor]:
    """(lse2 (M,), lse_residual (M,)) of sums (parts, M) of exponentials relative to |scale| log2(e) - ``headroom``.

    ``mean`` (M, D) or (0, D) comes as the sum of the keys with those exponentials, and is divided in place. The online
    kernel repeats the rows that are not trusted.
    """
    lse2, lse_residual, trusted = epilogue.finalize_lse(sums, scale, headroom)
    compute_grad_q, D = mean.shape[0] > 0, q.tensor.shape[1]
    if compute_grad_q:
        mean.div_(sums.sum(0).clamp_(min=2.0**-100)[:, None])
        trusted.mul_(mean.sum(1).isfinite())
    tile = lse_tile("online", D, q.tensor.dtype, mask, compute_grad_q)
    every_key = cdiv(k.tensor.shape[0], tile.block_n) * tile.block_n  # one split, of whole tiles
    for chunks in output_chunks(D, tile) if compute_grad_q else [(0, 0)]:
        run_lse("online", q, k, scale, mask, lse2, lse_residual, mean[None], trusted, chunks, every_key)
    return lse2[0], lse_residual[0]


def lse_tile(variant: str, D: int, dtype: torch.dtype, mask: Mask, compute_grad_q: bool) -> Tile:
    """The tile of a variant; "masked" is the fixed one where any tile may hold a masked key."""
    masked = mask.q_group is not None or mask.positive is not None
    kind = "mean" if compute_grad_q else "lse"
    return choose_tile(f"{kind} {'masked' if masked and variant == 'fixed' else variant}", D, dtype)


def online_only_dtype(dtype: torch.dtype, compute_grad_q: bool) -> bool:
    """Whether the fixed shift cannot serve this dtype."""
    return dtype == torch.float32 or (dtype == torch.float16 and compute_grad_q)


def run_lse(
    variant: str,
    q: Matrix,
    k: Matrix,
    scale: Tensor,
    mask: Mask,
    lse2: Tensor,
    lse_residual: Tensor,
    mean: Tensor,
    trusted: Tensor | None,
    chunks: tuple[int, int],
    split_keys: int,
    views: int = 1,
) -> None:
    """Fills lse2 (S, M) and the column ``chunks`` of mean (S, M, D); with ``views`` > 1, M rows for each pair of views.

    The fixed variant writes ``trusted`` (S, M); the online one repeats the rest, or without it computes every row.
    """
    M, N, D, dtype = q.tensor.shape[0] // views, k.tensor.shape[0] // views, q.tensor.shape[1], q.tensor.dtype
    tile = lse_tile(variant, D, dtype, mask, mean.shape[1] > 0)
    left, right = Operand(q, tile.block_m, tile), Operand(k, tile.block_n, tile)
    online = variant == "online"
    headroom = 100.0 if not online else 14.0 if dtype == torch.float16 else 0.0  # float16: P from 2^14 down to 2^-24
    with on_device(q.tensor):
        similarity_lse_fwd_kernel[(cdiv(M, tile.block_m), lse2.numel() // M)](
            left.source, left.tail_source, right.source, right.tail_source, scale, lse2, lse_residual, mean, trusted,
            mask.q_group, mask.k_group, mask.positive, M, N, left.stride, right.stride, mask.diagonal or 0,
            split_keys // tile.block_n, D, left.chunk, left.tail, *chunks, tile.block_m, tile.block_n,
            tile.lanes or tile.block_n, tile.stages, GROUPS=mask.q_group is not None, DIAGONAL=mask.diagonal_width,
            POSITIVES=mask.num_positives,
            ONLINE=online, REPEAT=online and trusted is not None, HEADROOM=headroom, Q_TMA=left.tma, TMA=right.tma,
            PRECISION=left.precision, VIEWS=views, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip


def _headroom(dtype: torch.dtype) -> float:
    """Powers of two between the largest exponential and 1: few for float32, whose exponents keep their last bits."""
    return 20.0 if dtype == torch.float32 else 100.0


def launch_two_sided(x: Tensor, y: Tensor, scale: Tensor, mask: Mask) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(row lse2 (M,), its residual, column lse2 (N,), its residual)."""
    left, right = matrices(x, y)
    headroom, no_mean = _headroom(x.dtype), scale.new_empty(0, x.shape[1])
    if large_dim.supports("two_sided", x.shape[1], x.dtype):
        dense = left.tensor, right.tensor
        rows, columns, _ = large_dim.exponentials(*dense, scale, mask, headroom, gather=False, columns=True)
    else:
        rows, columns = _launch_sums(left, right, scale, mask)
    side = trusted_lse(left, right, scale, mask, rows, headroom, no_mean)
    return *side, *trusted_lse(right, left, scale, mask.transposed(), columns, headroom, no_mean)


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
