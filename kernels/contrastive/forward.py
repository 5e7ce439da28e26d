"""Forward pass: log-sum-exp over keys with the keys' mean under the softmax, and other sums over keys.

    s           = scale * q @ k.T, -inf where masked                (M, N), never in memory (but see ``large_dim``)
    lse         = s.logsumexp(1)                                    similarity_lse_fwd_kernel
    mean        = s.softmax(1) @ k                                  (M, D), only with ``compute_grad_q``

q (M, D), k (N, D) float32, bfloat16 or float16; sums and outputs float32. One program owns a block of queries.

*Fixed shift*: exponents are relative to a constant, |scale| log2(e) - 100. Nothing is rescaled and no maximum is taken.
The largest term of unit vectors is 2^100, so 2^27 keys cannot overflow; terms that underflow are 226 powers of two
below the largest possible. For other inputs it may fail, and it detects that. A row is not trusted if its sum left
[2^-64, 2^120] or its mean is not finite. *Online* takes a running maximum, right for every input.

*Kinds*: "lse" as above; :mod:`.other_sums` launches the others. "labels" also sums the logits of the pairs of one
label, and counts them. "sigmoid" sums log2(1 + 2^s), p = 1 / (1 + 2^-s) and p k, "rank" counts the logits above a
number of the row: neither can overflow.

float32 runs online, since a shift of 100 would round its exponents to 2^-18, and so does float16 with the mean, as its
P cannot hold 2^100. Otherwise the fixed shift runs first. The online kernel behind it repeats the blocks that were not
trusted and returns at once from the others, so the host reads no value.

Deterministic: no atomics, every sum in a fixed order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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
    row_sums,
    softplus2,
    store_sums,
    zero_sums,
)
from vito_kernels.contrastive.terms import Mask, ordered_pairs
from vito_kernels.contrastive.tile_configs import Matrix, Operand, Tile, choose_tile, matrices, output_chunks

if TYPE_CHECKING:
    import triton.language as tl

# ---- Triton kernels


@jit
def _shared_labels(s, scale2, own, other, own_label, other_label, M, N, diagonal, CLEAN: tl.constexpr, DIAGONAL:
tl.constexpr):  # fmt: skip
    """Whether row and column are a pair of one label, and the distance of such a logit from the largest possible."""
    mine = tl.load(own_label + own, mask=own < M, other=0)
    theirs = tl.load(other_label + other, mask=other < N, other=0)
    shared = mine[:, None] == theirs[None]
    if not CLEAN:
        shared = shared & (other < N)[None]
        if DIAGONAL > 0:
            shared = shared & ((own + diagonal)[:, None] != other[None])
    return shared.to(tl.float32), tl.where(shared, s - tl.abs(scale2), 0.0)


@jit
def _similarity_lse_fwd_step(
    t, q, accs, totals, top, k, k_tail, k_first, scale2, shift, own, own_group, other_group, positive, M, N, k_stride,
    diagonal, D: tl.constexpr, W: tl.constexpr, TAIL: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
    TILE: tl.constexpr, LANES: tl.constexpr, CHUNKS: tl.constexpr, CLEAN: tl.constexpr, GROUPS: tl.constexpr,
    DIAGONAL: tl.constexpr, POSITIVES: tl.constexpr, ONLINE: tl.constexpr, HEADROOM: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """One tile of keys: s = q k^T, p = 2^(s - shift), sums of p by row and of p k by row and column; see the module."""
    keys = load_rows(k, k_tail, k_first + t * TILE, k_first + N, k_stride, D, W, TAIL, TILE, CLEAN, TMA, PRECISION)
    s = dot_rows(q, keys, CHUNKS, PRECISION) * scale2
    more = ()  # type: tuple
    if KIND == "labels":
        other = t * TILE + tl.arange(0, TILE)
        shared, distance = _shared_labels(
            s, scale2, own, other, own_group, other_group, M, N, diagonal, CLEAN, DIAGONAL
        )
        more = (totals[1] + row_sums(distance, LANES), totals[2] + row_sums(shared, LANES))
    if not ONLINE:
        s -= shift
    if not CLEAN:
        other = t * TILE + tl.arange(0, TILE)
        s = apply_mask(
            s, own, other, M, N, own_group, other_group, positive, diagonal, GROUPS, DIAGONAL, POSITIVES, False
        )
    total = totals[0]
    if KIND == "sigmoid":
        terms = softplus2(s)
        p = tl.exp2(s - terms)  # none where masked
        more = (totals[1] + row_sums(p, LANES),)
    elif KIND == "rank":
        p = s
        terms = tl.where(s > 0.0, 1.0, 0.0)
    elif ONLINE:
        new_top = tl.maximum(top, tl.max(s, 1))
        old = tl.exp2(top - new_top)
        p = tl.exp2(s - (new_top - HEADROOM)[:, None])
        top = new_top
        total *= old[:, None]
        scaled = ()  # type: tuple
        for c in tl.static_range(FIRST, LAST):
            scaled += (accs[c - FIRST] * old[:, None],)
        accs = scaled
        terms = p
    else:
        p = tl.exp2(s)
        terms = p
    total += row_sums(terms, LANES)
    totals = (total,) + more  # noqa: RUF005 (Triton unpacks nothing)
    return add_product(accs, p, keys, CHUNKS, FIRST, LAST, PRECISION), totals, top


@jit
def _similarity_lse_fwd_program(
    q, q_tail, k, k_tail, scale, lse2, lse_residual, mean, trusted, offset, distances, counts, q_group, k_group,
    positive, row, split, M, N, q_stride, k_stride, diagonal, split_tiles, D: tl.constexpr, W: tl.constexpr,
    TAIL: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
    LANES: tl.constexpr, STAGES: tl.constexpr, GROUPS: tl.constexpr, DIAGONAL: tl.constexpr, POSITIVES: tl.constexpr,
    ONLINE: tl.constexpr, HEADROOM: tl.constexpr, Q_TMA: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    VIEWS: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """The block of rows from ``row`` over the keys of one split."""
    CHUNKS: tl.constexpr = D // W + (TAIL > 0)
    # An excluded key may be anywhere; and beside a second loop, ptxas keeps too much of q in registers and spills.
    WIDE: tl.constexpr = (D > 512 and (ONLINE or FIRST == LAST)) or (D > 64 and PRECISION == "bf16x6")
    MASKED: tl.constexpr = GROUPS or POSITIVES > 0 or WIDE
    own = row + tl.arange(0, BLOCK)
    out = tl.cast(split, tl.int64) * M  # first output row of this split
    q_first, k_first = 0, 0
    if VIEWS > 1:
        pair = split % (VIEWS * (VIEWS - 1))
        split = split // (VIEWS * (VIEWS - 1))
        view, other_view = pair // (VIEWS - 1), pair % (VIEWS - 1)
        q_first = view * M
        k_first = (other_view + (other_view >= view).to(tl.int32)) * N
    scale2 = tl.load(scale) * 1.4426950408889634
    shift = tl.abs(scale2) - HEADROOM
    if KIND == "sigmoid":
        shift = -tl.load(offset) * 1.4426950408889634
    elif KIND == "rank":
        shift = tl.load(offset + own, mask=own < M, other=0.0)[:, None]
    queries = load_rows(q, q_tail, q_first + row, q_first + M, q_stride, D, W, TAIL, BLOCK, False, Q_TMA, PRECISION)
    accs = zero_sums(BLOCK, D, W, TAIL, FIRST, LAST)
    totals = (tl.zeros((BLOCK, LANES), tl.float32),)  # type: tuple
    if KIND == "labels":
        totals = (totals[0], totals[0], totals[0])
    elif KIND == "sigmoid":
        totals = (totals[0], totals[0])
    top = tl.full((BLOCK,), -3.4028234663852886e38, tl.float32)  # the lowest float32: -inf - -inf would be NaN

    first = split * split_tiles
    last = tl.minimum(first + split_tiles, tl.cdiv(N, TILE))
    crossed, crossing, full = plan_tiles(row, N, first, last, diagonal, BLOCK, TILE, DIAGONAL)
    if MASKED:
        crossed, crossing, full = first, last - first, last
    else:
        for i in tl.range(first, full - crossing, num_stages=STAGES):
            t = tl.where(i < crossed, i, i + crossing)
            accs, totals, top = _similarity_lse_fwd_step(
                t, queries, accs, totals, top, k, k_tail, k_first, scale2, shift, own, q_group, k_group, positive, M, N,
                k_stride, diagonal, D, W, TAIL, FIRST, LAST, TILE, LANES, CHUNKS, True, GROUPS, DIAGONAL, POSITIVES,
                ONLINE, HEADROOM, TMA, PRECISION, KIND,
            )  # fmt: skip
    # Not pipelined, this loop runs once or twice; addresses of its products, hoisted out of it, only spilled.
    for i in tl.range(0, crossing + last - full, num_stages=STAGES if MASKED else 1, disable_licm=True):
        t = tl.where(i < crossing, crossed + i, full)
        accs, totals, top = _similarity_lse_fwd_step(
            t, queries, accs, totals, top, k, k_tail, k_first, scale2, shift, own, q_group, k_group, positive, M, N,
            k_stride, diagonal, D, W, TAIL, FIRST, LAST, TILE, LANES, CHUNKS, False, GROUPS, DIAGONAL, POSITIVES,
            ONLINE, HEADROOM, TMA, PRECISION, KIND,
        )  # fmt: skip

    z = tl.sum(totals[0], 1)
    means = ()  # type: tuple
    if KIND == "sigmoid" or KIND == "rank":
        whole = z
        lost = tl.sum(totals[-1], 1)
        means = accs
    else:
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
        for c in tl.static_range(FIRST, LAST):
            means += (accs[c - FIRST] / tl.where(z == 0.0, 1.0, z)[:, None],)
    tl.store(lse2 + out + own, whole, mask=own < M)
    if KIND != "rank":
        tl.store(lse_residual + out + own, lost, mask=own < M)
    if KIND == "labels":
        tl.store(distances + out + own, tl.sum(totals[1], 1), mask=own < M)
        tl.store(counts + out + own, tl.sum(totals[2], 1), mask=own < M)
    if FIRST < LAST:
        store_sums(mean + out * D, means, row, M, D, W, TAIL, BLOCK, FIRST, LAST)


@jit
def similarity_lse_fwd_kernel(
    q, q_tail, k, k_tail, scale, lse2, lse_residual, mean, trusted, offset, distances, counts, done, q_group, k_group,
    positive, M, N, q_stride, k_stride, diagonal, split_tiles, D: tl.constexpr, W: tl.constexpr,
    TAIL: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
    LANES: tl.constexpr, STAGES: tl.constexpr, GROUPS: tl.constexpr, DIAGONAL: tl.constexpr,
    POSITIVES: tl.constexpr, ONLINE: tl.constexpr, REPEAT: tl.constexpr, HEADROOM: tl.constexpr, Q_TMA: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr, VIEWS: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """lse2, lse_residual (splits, M) and, in column chunks FIRST .. LAST, mean (splits, M, D): one program per block
    of rows and split.

    With VIEWS > 1, q (VIEWS * M, D) and k (VIEWS * N, D) hold views, and each split of the outputs has a slice for each
    ordered pair of views (a, b), in the order (0, 1), (0, 2), ..., (1, 0): the rows of a over the keys of b.

    The counter ``done`` is zeroed for ``device_functions.store_total``.
    """
    row, split = tl.program_id(0) * BLOCK, tl.program_id(1)
    if done is not None:
        tl.store(done, 0)
    if REPEAT:
        own = row + tl.arange(0, BLOCK)
        if tl.min(tl.load(trusted + tl.cast(split, tl.int64) * M + own, mask=own < M, other=1).to(tl.int32), 0) > 0:
            return
    _similarity_lse_fwd_program(
        q, q_tail, k, k_tail, scale, lse2, lse_residual, mean, trusted, offset, distances, counts, q_group, k_group,
        positive, row, split, M, N, q_stride, k_stride, diagonal, split_tiles, D, W, TAIL, FIRST, LAST, BLOCK, TILE,
        LANES, STAGES, GROUPS, DIAGONAL, POSITIVES, ONLINE, HEADROOM, Q_TMA, TMA, PRECISION, VIEWS, KIND,
    )  # fmt: skip


@jit
def _summed_lse_rows(
    sums, q, q_tail, k, k_tail, scale, lse2, lse_residual, q_group, k_group, positive, M, N, parts, q_stride, k_stride,
    diagonal, split_tiles, D: tl.constexpr, W: tl.constexpr, TAIL: tl.constexpr, BLOCK: tl.constexpr,
    TILE: tl.constexpr, LANES: tl.constexpr, STAGES: tl.constexpr, GROUPS: tl.constexpr, DIAGONAL: tl.constexpr,
    POSITIVES: tl.constexpr, SUMS_HEADROOM: tl.constexpr, HEADROOM: tl.constexpr, Q_TMA: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK
    own = row + tl.arange(0, BLOCK)
    known = tl.zeros((BLOCK,), tl.float32)
    for part in range(parts):
        known += tl.load(sums + tl.cast(part, tl.int64) * M + own, mask=own < M, other=0.0)
    log_known = tl.log2(known)
    bottom = tl.abs(tl.load(scale)) * 1.4426950408889634 - SUMS_HEADROOM
    found = log_known + bottom
    fits = ((known > 2.0**-64) & (known < 2.0**120)) | (own >= M)
    if tl.min(fits.to(tl.int32), 0) > 0:
        tl.store(lse2 + own, found, mask=own < M)
        tl.store(lse_residual + own, tl.where(known == 0.0, 0.0, bottom - found + log_known), mask=own < M)
    else:
        _similarity_lse_fwd_program(
            q, q_tail, k, k_tail, scale, lse2, lse_residual, None, None, None, None, None, q_group, k_group, positive,
            row, 0, M, N, q_stride, k_stride, diagonal, split_tiles, D, W, TAIL, 0, 0, BLOCK, TILE, LANES, STAGES,
            GROUPS, DIAGONAL, POSITIVES, True, HEADROOM, Q_TMA, TMA, PRECISION, 1, "lse",
        )  # fmt: skip


@jit
def summed_lse_fwd_kernel(
    sums, q, q_tail, k, k_tail, lse2, lse_residual, parts, k_sums, k_own, k_own_tail, q_other, q_other_tail, k_lse2,
    k_lse_residual, k_parts, scale, done, q_group, k_group, positive, M, N, q_stride, k_stride, diagonal,
    split_tiles, k_split_tiles, D: tl.constexpr, W: tl.constexpr, TAIL: tl.constexpr, BLOCK: tl.constexpr,
    TILE: tl.constexpr, LANES: tl.constexpr, STAGES: tl.constexpr, GROUPS: tl.constexpr, DIAGONAL: tl.constexpr,
    POSITIVES: tl.constexpr, SUMS_HEADROOM: tl.constexpr, HEADROOM: tl.constexpr, Q_TMA: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr, SIDES: tl.constexpr,
):  # fmt: skip
    """lse2 and lse_residual (M,) of sums (parts, M) relative to the fixed shift; the blocks that these fail, online.

    With SIDES == 2, a second row of programs does the same for the keys, of ``k_sums`` (k_parts, N).
    """
    if done is not None:
        tl.store(done, 0)
    if SIDES == 2 and tl.program_id(1) == 1:
        if tl.program_id(0) * BLOCK < N:
            _summed_lse_rows(
                k_sums, k_own, k_own_tail, q_other, q_other_tail, scale, k_lse2, k_lse_residual, q_group, k_group,
                positive, N, M, k_parts, k_stride, q_stride, -diagonal, k_split_tiles, D, W, TAIL, BLOCK, TILE,
                LANES, STAGES, GROUPS, DIAGONAL, POSITIVES, SUMS_HEADROOM, HEADROOM, TMA, Q_TMA, PRECISION,
            )  # fmt: skip
    else:
        if tl.program_id(0) * BLOCK < M:
            _summed_lse_rows(
                sums, q, q_tail, k, k_tail, scale, lse2, lse_residual, q_group, k_group, positive, M, N, parts,
                q_stride, k_stride, diagonal, split_tiles, D, W, TAIL, BLOCK, TILE, LANES, STAGES, GROUPS, DIAGONAL,
                POSITIVES, SUMS_HEADROOM, HEADROOM, Q_TMA, TMA, PRECISION,
            )  # fmt: skip


# ---- launchers

VARIANTS = ("fixed", "online")


def launch_lse(
    q: Tensor, k: Tensor, scale: Tensor, mask: Mask, compute_grad_q: bool, views: int = 1, done: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(lse2 (S, M), lse_residual (S, M), mean (S, M, D) or (S, 0, D)); few queries split the keys among programs.

    With ``views`` > 1, q (views * M, D) and k (views * N, D) hold views, and M in the outputs becomes the rows of all
    ordered pairs of views, views (views - 1) M, in one launch. The mask is that of each pair.
    """
    M, N, D, (left, right) = q.shape[0] // views, k.shape[0] // views, q.shape[1], matrices(q, k)
    pairs = max(1, views * (views - 1))
    rows = M * pairs  # of the outputs
    if large_dim.supports("mean" if compute_grad_q else "lse", D, q.dtype):
        if views > 1:
            qs, ks = q.unflatten(0, (views, M)), k.unflatten(0, (views, N))
            parts = [launch_lse(qs[a], ks[b], scale, mask, compute_grad_q) for a, b in ordered_pairs(views)]
            lse2, lse_residual, mean = (torch.cat(part, 1) for part in zip(*parts, strict=True))
            return lse2, lse_residual, mean
        dense = left.tensor, right.tensor
        sums, _, mean = large_dim.exponentials(*dense, scale, mask, 100.0, gather=compute_grad_q, columns=False)
        if not compute_grad_q:
            ((lse2, lse_residual),) = trusted_lse(left, right, scale, mask, [sums], 100.0, done)
            return lse2[None], lse_residual[None], mean[None]
        return *_trusted_mean(left, right, scale, mask, sums, mean, done), mean[None]
    tiles = [lse_tile(variant, D, q.dtype, mask, compute_grad_q) for variant in VARIANTS]
    split_keys, splits = split_of(pairs * cdiv(M, tiles[0].block_m), N, tiles, q)
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
        given = left, right, scale, mask, lse2, lse_residual, mean, trusted, chunks, split_keys, views
        run_lse("online", *given, done=done)
    return lse2, lse_residual, mean


def split_of(programs: int, N: int, tiles: list[Tile], q: Tensor) -> tuple[int, int]:
    """(keys of a split, splits), where all keys would take this many programs. A split is whole tiles of all tiles."""
    split_keys = cdiv(N, max(1, min(num_sms(q.device) // programs, N // 256)))
    widest = max(tile.block_n for tile in tiles)  # powers of two
    split_keys = cdiv(split_keys, widest) * widest
    return split_keys, cdiv(N, split_keys)


def trusted_lse(
    q: Matrix,
    k: Matrix,
    scale: Tensor,
    mask: Mask,
    sums: list[Tensor],
    headroom: float,
    done: Tensor | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """(lse2 (M,), lse_residual (M,)) of sums (parts, M) of exponentials relative to |scale| log2(e) - ``headroom``.

    With the ``sums`` of columns too, (parts, N), also those of the keys, for 16 bits in the same launch; the mask is a
    diagonal then. The online variant repeats the rows that are not trusted.
    """
    if len(sums) == 2 and q.tensor.dtype == torch.float32:
        rows = trusted_lse(q, k, scale, mask, sums[:1], headroom, done)
        return rows + trusted_lse(k, q, scale, mask.transposed(), sums[1:], headroom, done)
    M, N, D = q.tensor.shape[0], k.tensor.shape[0], q.tensor.shape[1]
    tile = lse_tile("summed", D, q.tensor.dtype, mask, False)
    found = [(part.new_empty(part.shape[1]), part.new_empty(part.shape[1])) for part in sums]
    (queries, keys), second = _operands(q, k, tile), list[Any]([None] * 7 + [0])
    if len(sums) == 2:
        sources = [source for x in _operands(k, q, tile) for source in (x.source, x.tail_source)]
        second = [sums[1], *sources, *found[1], len(sums[1])]
    with on_device(q.tensor):
        summed_lse_fwd_kernel[(cdiv(max(part.shape[1] for part in sums), tile.block_m), len(sums))](
            sums[0], queries.source, queries.tail_source, keys.source, keys.tail_source, *found[0], len(sums[0]),
            *second, scale, done, mask.q_group, mask.k_group, mask.positive, M, N, queries.stride, keys.stride,
            mask.diagonal or 0, cdiv(N, tile.block_n), cdiv(M, tile.block_n), D, queries.chunk, queries.tail,
            tile.block_m, tile.block_n, tile.lanes or tile.block_n, tile.stages, GROUPS=mask.q_group is not None,
            DIAGONAL=mask.diagonal_width, POSITIVES=mask.num_positives, SUMS_HEADROOM=headroom,
            HEADROOM=_online_headroom(q.tensor.dtype), Q_TMA=queries.tma, TMA=keys.tma, PRECISION=queries.precision,
            SIDES=len(sums), num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return found


def _trusted_mean(
    q: Matrix, k: Matrix, scale: Tensor, mask: Mask, sums: Tensor, mean: Tensor, done: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(lse2, lse_residual), each (1, M), as ``trusted_lse``.

    ``mean`` (M, D) comes as the sum of the keys with those exponentials, and is divided in place.
    """
    D, dtype = q.tensor.shape[1], q.tensor.dtype
    tile = lse_tile("online", D, dtype, mask, True)
    every_key = cdiv(k.tensor.shape[0], tile.block_n) * tile.block_n  # one split, of whole tiles
    lse2, lse_residual, trusted = epilogue.finalize_lse(sums, scale, 100.0)
    mean.div_(sums.sum(0).clamp_(min=2.0**-100)[:, None])
    trusted.mul_(mean.sum(1).isfinite())
    for chunks in output_chunks(D, tile):
        run_lse("online", q, k, scale, mask, lse2, lse_residual, mean[None], trusted, chunks, every_key, done=done)
    return lse2, lse_residual


def _operands(q: Matrix, k: Matrix, tile: Tile) -> tuple[Operand, Operand]:
    return Operand(q, tile.block_m, tile), Operand(k, tile.block_n, tile)


def _online_headroom(dtype: torch.dtype) -> float:
    return 14.0 if dtype == torch.float16 else 0.0  # float16: P from 2^14 down to 2^-24


def lse_tile(variant: str, D: int, dtype: torch.dtype, mask: Mask, compute_grad_q: bool, kind: str = "lse") -> Tile:
    """The tile of a variant; "masked" is the fixed one where any tile may hold a masked key, or one of another kind."""
    masked = mask.q_group is not None or mask.positive is not None
    fixed = kind if kind != "lse" else "masked" if masked else "fixed"
    return choose_tile(f"{'mean' if compute_grad_q else 'lse'} {fixed if variant == 'fixed' else variant}", D, dtype)


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
    *,
    kind: str = "lse",
    offset: Tensor | None = None,
    labels: tuple[Tensor | None, Tensor | None] = (None, None),
    distances: Tensor | None = None,
    counts: Tensor | None = None,
    done: Tensor | None = None,
) -> None:
    """Fills lse2 (S, M) and the column ``chunks`` of mean (S, M, D); with ``views`` > 1, M rows for each pair of views.

    The fixed variant writes ``trusted`` (S, M); the online one repeats the rest, or without it computes every row.
    """
    M, N, D, dtype = q.tensor.shape[0] // views, k.tensor.shape[0] // views, q.tensor.shape[1], q.tensor.dtype
    tile = lse_tile(variant, D, dtype, mask, mean.shape[1] > 0, kind)
    left, right = _operands(q, k, tile)
    online, ids = variant == "online", labels if kind == "labels" else (mask.q_group, mask.k_group)
    shift = _online_headroom(dtype) if online else 100.0
    with on_device(q.tensor):
        similarity_lse_fwd_kernel[(cdiv(M, tile.block_m), lse2.numel() // M)](
            left.source, left.tail_source, right.source, right.tail_source, scale, lse2, lse_residual, mean, trusted,
            offset, distances, counts, done, *ids, mask.positive, M, N, left.stride, right.stride, mask.diagonal or 0,
            split_keys // tile.block_n, D, left.chunk, left.tail, *chunks, tile.block_m, tile.block_n,
            tile.lanes or tile.block_n, tile.stages, GROUPS=mask.q_group is not None, DIAGONAL=mask.diagonal_width,
            POSITIVES=mask.num_positives, ONLINE=online, REPEAT=online and trusted is not None, HEADROOM=shift,
            Q_TMA=left.tma, TMA=right.tma, PRECISION=left.precision, VIEWS=views, KIND=kind,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
