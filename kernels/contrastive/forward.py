"""The first pass: log-sum-exp over keys, and the keys' mean under the softmax, one program per block of queries.

    s    = scale * q @ k.T, -inf where excluded                     (M, N), never in memory (but see ``wide``)
    lse  = s.logsumexp(1)
    mean = s.softmax(1) @ k                                         (M, D), only if it is asked for

Two variants. *Fixed shift*: exponents are relative to a constant, |scale| log2(e) - 100, so that nothing is rescaled
and no maximum is taken. For unit vectors every logit is at most |scale|, so the largest term is 2^100 and 2^27 keys
cannot overflow; what underflows is 226 powers of two below the largest possible. For other inputs it may fail, and it
says so: a row whose sum left [2^-64, 2^120] or whose mean is not finite is not trusted, as terms lost below 2^-126
are negligible in any other. *Online*: a running maximum, right for every input. The rule: float32 runs online (a
shift of 100 would round its exponents to 2^-18), and so does float16 with the mean (its P cannot hold 2^100);
otherwise the fixed shift runs first, and the online kernel behind it repeats the blocks that were not trusted and
leaves the others at once. No value is read by the host.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vito_kernels._core.lazy_triton import Spec, jit, on_device, processors
from vito_kernels.contrastive import epilogue as rowwise
from vito_kernels.contrastive import large_dim as wide
from vito_kernels.contrastive.cpu import Exclusion
from vito_kernels.contrastive.device_functions import (
    LISTED,
    add_product,
    dot_rows,
    hide,
    load_rows,
    plan_tiles,
    store_sums,
    zero_sums,
)
from vito_kernels.contrastive.tile_configs import (
    Matrix,
    Operand,
    Tile,
    cdiv,
    choose_tile,
    columns_of,
    matrices,
    on_tensor_cores,
    products,
    spans,
)

if TYPE_CHECKING:
    import triton.language as tl


@jit
def _lse_step(
    t, q, accs, total, top, k, k_tail, scale2, shift, own, own_group, other_group, positive, M, N, k_stride, diagonal,
    D: tl.constexpr, W: tl.constexpr, TAIL: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, TILE: tl.constexpr,
    LANES: tl.constexpr, CHUNKS: tl.constexpr, CLEAN: tl.constexpr, GROUPS: tl.constexpr, DIAGONAL: tl.constexpr,
    POSITIVES: tl.constexpr, ONLINE: tl.constexpr, HEADROOM: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of keys: s = q k^T, p = 2^(s - shift), sums of p by row and of p k by row and column."""
    BLOCK: tl.constexpr = total.shape[0]
    keys = load_rows(k, k_tail, t * TILE, N, k_stride, D, W, TAIL, TILE, CLEAN, TMA, PRECISION)
    s = dot_rows(q, keys, CHUNKS, PRECISION) * scale2
    if not ONLINE:
        s -= shift
    if not CLEAN:
        other = t * TILE + tl.arange(0, TILE)
        s = hide(s, own, other, M, N, own_group, other_group, positive, diagonal, GROUPS, DIAGONAL, POSITIVES, False)
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
def _lse_kernel(
    q, q_tail, k, k_tail, scale, lse2, rest, mean, trusted, q_group, k_group, positive, M, N, q_stride, k_stride,
    diagonal, split_tiles, D: tl.constexpr, W: tl.constexpr, TAIL: tl.constexpr, FIRST: tl.constexpr, LAST:
    tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, LANES: tl.constexpr, STAGES: tl.constexpr, GROUPS:
    tl.constexpr, DIAGONAL: tl.constexpr, POSITIVES: tl.constexpr, ONLINE: tl.constexpr, REPEAT: tl.constexpr,
    HEADROOM: tl.constexpr, Q_TMA: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """lse2 and rest (splits, M) and, in column chunks FIRST .. LAST, mean (splits, M, D): one program per block of
    rows and split.
    """
    CHUNKS: tl.constexpr = D // W + (TAIL > 0)
    # An excluded key may be anywhere; and beside a second loop, ptxas keeps too much of q in registers and spills.
    WIDE: tl.constexpr = (D > 512 and (ONLINE or FIRST == LAST)) or (D > 64 and PRECISION == "bf16x6")
    MASKED: tl.constexpr = GROUPS or POSITIVES > 0 or WIDE
    row, split = tl.program_id(0) * BLOCK, tl.program_id(1)
    own = row + tl.arange(0, BLOCK)
    if REPEAT:  # noqa: SIM102 (one is decided when compiling, the other when running)
        if tl.min(tl.load(trusted + tl.cast(split, tl.int64) * M + own, mask=own < M, other=1).to(tl.int32), 0) > 0:
            return
    scale2 = tl.load(scale) * 1.4426950408889634
    shift = tl.abs(scale2) - HEADROOM
    queries = load_rows(q, q_tail, row, M, q_stride, D, W, TAIL, BLOCK, False, Q_TMA, PRECISION)
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
            accs, total, top = _lse_step(
                t, queries, accs, total, top, k, k_tail, scale2, shift, own, q_group, k_group, positive, M, N, k_stride,
                diagonal, D, W, TAIL, FIRST, LAST, TILE, LANES, CHUNKS, True, GROUPS, DIAGONAL, POSITIVES, ONLINE,
                HEADROOM, TMA, PRECISION,
            )  # fmt: skip
    # Not pipelined, this loop runs once or twice; addresses of its products, hoisted out of it, only spilled.
    for i in tl.range(0, crossing + last - full, num_stages=STAGES if MASKED else 1, disable_licm=True):
        t = tl.where(i < crossing, crossed + i, full)
        accs, total, top = _lse_step(
            t, queries, accs, total, top, k, k_tail, scale2, shift, own, q_group, k_group, positive, M, N, k_stride,
            diagonal, D, W, TAIL, FIRST, LAST, TILE, LANES, CHUNKS, False, GROUPS, DIAGONAL, POSITIVES, ONLINE,
            HEADROOM, TMA, PRECISION,
        )  # fmt: skip

    z = tl.sum(total, 1)
    if ONLINE:
        shift = top - HEADROOM
    else:
        safe = (z > 2.0**-64) & (z < 2.0**120)
        for c in tl.static_range(FIRST, LAST):
            finite = tl.abs(accs[c - FIRST]) < float("inf")  # false of a NaN, which a maximum would pass over
            safe &= tl.min(finite.to(tl.int32), 1) > 0
        tl.store(trusted + tl.cast(split, tl.int64) * M + own, safe.to(tl.int8), mask=own < M)
    log_z = tl.log2(z)
    whole = log_z + shift
    lost = tl.where(z == 0.0, 0.0, shift - whole + log_z)  # what the sum rounds away, as ``tiled.split_sum``
    part = tl.cast(split, tl.int64) * M + own
    tl.store(lse2 + part, whole, mask=own < M)
    tl.store(rest + part, lost, mask=own < M)
    means = ()  # type: tuple
    for c in tl.static_range(FIRST, LAST):
        means += (accs[c - FIRST] / tl.where(z == 0.0, 1.0, z)[:, None],)
    store_sums(mean + tl.cast(split, tl.int64) * M * D, means, row, M, D, W, TAIL, BLOCK, FIRST, LAST)


# ---- launcher

VARIANTS = ("fixed", "online")


def launch_lse(
    q: Tensor, k: Tensor, scale: Tensor, exclusion: Exclusion, bring_mean: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(lse2 (M,), rest (M,), mean (M, D) or (0, D)) by the kernels above; keys are split among programs where queries
    are few.
    """
    (M, D), (left, right) = q.shape, matrices(q, k)
    if wide.serves("mean" if bring_mean else "lse", D, q.dtype):
        dense = left.tensor, right.tensor
        sums, _, mean = wide.exponentials(*dense, scale, exclusion, 100.0, gather=bring_mean, columns=False)
        return *trusted_lse(left, right, scale, exclusion, sums, 100.0, mean), mean
    tiles = [lse_tile(variant, D, q.dtype, exclusion, bring_mean) for variant in VARIANTS]
    split_keys = cdiv(k.shape[0], max(1, min(processors(q.device) // cdiv(M, tiles[0].own), k.shape[0] // 256)))
    widest = max(tile.other for tile in tiles)  # powers of two: a split is whole tiles of both variants
    split_keys = cdiv(split_keys, widest) * widest
    splits = cdiv(k.shape[0], split_keys)
    lse2, rest = scale.new_empty(splits, M), scale.new_empty(splits, M)
    mean = scale.new_empty(splits, M if bring_mean else 0, D)
    online_only = _online_only(q.dtype, bring_mean)
    trusted = None if online_only else torch.empty(splits, M, dtype=torch.int8, device=q.device)
    fixed, online = ([(0, 0)] if not bring_mean else spans(D, tile) for tile in tiles)
    assert online_only or {first for first, _ in fixed} <= {first for first, _ in online}
    for span in online:  # one launch of the fixed variant may bring the columns that take several of the online one
        for wider in fixed:
            if not online_only and wider[0] == span[0]:
                run_lse("fixed", left, right, scale, exclusion, lse2, rest, mean, trusted, wider, split_keys)
        run_lse("online", left, right, scale, exclusion, lse2, rest, mean, trusted, span, split_keys)
    return rowwise.merge_splits(lse2, rest, mean)


def trusted_lse(
    q: Matrix, k: Matrix, scale: Tensor, exclusion: Exclusion, sums: Tensor, headroom: float, mean: Tensor
) -> tuple[Tensor, Tensor]:
    """(lse2 (M,), rest (M,)) of sums (parts, M) of exponentials relative to |scale| log2(e) - ``headroom``, repeated by
    the online kernel where they are not to be trusted. So is ``mean`` (M, D) or (0, D), which is given as the sum of
    the keys with those exponentials and divided in place.
    """
    lse2, rest, trusted = rowwise.settle(sums, scale, headroom)
    bring_mean, D = mean.shape[0] > 0, q.tensor.shape[1]
    if bring_mean:
        mean.div_(sums.sum(0).clamp_(min=2.0**-100)[:, None])
        trusted.mul_(mean.sum(1).isfinite())
    tile = lse_tile("online", D, q.tensor.dtype, exclusion, bring_mean)
    every_key = cdiv(k.tensor.shape[0], tile.other) * tile.other  # one split, of whole tiles
    for span in spans(D, tile) if bring_mean else [(0, 0)]:
        run_lse("online", q, k, scale, exclusion, lse2, rest, mean[None], trusted, span, every_key)
    return lse2[0], rest[0]


def lse_tile(variant: str, D: int, dtype: torch.dtype, exclusion: Exclusion, bring_mean: bool) -> Tile:
    """The tile of a variant; "masked" is the fixed one where any tile may hold an excluded key."""
    masked = exclusion.q_group is not None or exclusion.positive is not None
    kind = "mean" if bring_mean else "lse"
    return choose_tile(f"{kind} {'masked' if masked and variant == 'fixed' else variant}", D, dtype)


def _online_only(dtype: torch.dtype, bring_mean: bool) -> bool:
    return dtype == torch.float32 or (dtype == torch.float16 and bring_mean)


def run_lse(
    variant: str,
    q: Matrix,
    k: Matrix,
    scale: Tensor,
    exclusion: Exclusion,
    lse2: Tensor,
    rest: Tensor,
    mean: Tensor,
    trusted: Tensor | None,
    span: tuple[int, int],
    split_keys: int,
) -> None:
    """Fills lse2 (S, M) and the column chunks ``span`` of mean (S, M, D). ``trusted`` (S, M): written by the fixed
    variant, obeyed by the online one, which without it does every row.
    """
    (M, D), N, dtype = q.tensor.shape, k.tensor.shape[0], q.tensor.dtype
    tile = lse_tile(variant, D, dtype, exclusion, mean.shape[1] > 0)
    left, right = Operand(q, tile.own, tile), Operand(k, tile.other, tile)
    online = variant == "online"
    headroom = 100.0 if not online else 14.0 if dtype == torch.float16 else 0.0  # float16: P from 2^14 down to 2^-24
    with on_device(q.tensor):
        _lse_kernel[(cdiv(M, tile.own), lse2.shape[0])](
            left.wide, left.narrow, right.wide, right.narrow, scale, lse2, rest, mean, trusted, exclusion.q_group,
            exclusion.k_group, exclusion.positive, M, N, left.stride, right.stride, exclusion.diagonal or 0,
            split_keys // tile.other, D, left.chunk, left.tail, *span, tile.own, tile.other, tile.lanes or tile.other,
            tile.stages,
            GROUPS=exclusion.q_group is not None, DIAGONAL=exclusion.blocks, POSITIVES=columns_of(exclusion.positive),
            ONLINE=online, REPEAT=online and trusted is not None, HEADROOM=headroom, Q_TMA=left.tma, TMA=right.tma,
            PRECISION=left.precision, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip


def specs(device: str = "meta") -> list[Spec]:
    """Every shipped launch of this file, at the nominal size of a large contrastive batch."""
    return [
        _spec(width, dtype, bring_mean, layout, device)
        for width in (64, 128, 192, 256, 512, 1024)
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
        for bring_mean in (True, False)
        for layout in ("none", "diagonal", "groups", "positive")
    ] + [_spec(width, torch.bfloat16, True, "many positives", device) for width in (128, 256)]


def _spec(
    width: int, dtype: torch.dtype, bring_mean: bool, layout: str, device: str = "meta", rows: int = 32768
) -> Spec:
    ids = torch.arange(rows, device=device)
    group = ids if layout == "groups" else None
    positive = ids[:, None].repeat(1, LISTED[layout]) if layout in LISTED else None
    exclusion = Exclusion(group, group, positive, 0 if layout == "diagonal" else None)

    def launch() -> None:
        x = torch.randn(rows, width, dtype=dtype, device=device) / width**0.5
        launch_lse(x, x, torch.full((), 10.0, device=device), exclusion, bring_mean)

    def flops() -> float:
        """Of the variant that does the work; a launch for other columns of the mean computes the logits again."""
        if wide.serves("mean" if bring_mean else "lse", width, dtype):
            return (2.0 + 2.0 * bring_mean) * rows * rows * width
        variant = VARIANTS[_online_only(dtype, bring_mean)]
        launches = len(spans(width, lse_tile(variant, width, dtype, exclusion, True))) if bring_mean else 1
        return (2.0 * launches + 2.0 * bring_mean) * products(dtype, width) * rows * rows * width

    return Spec(
        f"similarity_lse {'with mean' if bring_mean else 'alone'} D={width} {str(dtype)[6:]} {layout}",
        launch,
        flops,
        min_bytes=2.0 * rows * width * dtype.itemsize + rows * 4 + (rows * width * 4 if bring_mean else 0),
        tensor_cores=partial(on_tensor_cores, dtype, width),
        rare=dtype != torch.bfloat16
        or width not in (128, 256, 512)
        or layout not in (("none", "diagonal", "groups") if bring_mean else ("none",)),
    )
