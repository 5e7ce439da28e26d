"""The first pass: log-sum-exp over keys, and the keys' mean under the softmax, one program per block of queries.

    s    = scale * q @ k.T, -inf where excluded                     (M, N), never in memory (but see ``large_dim``)
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
from vito_kernels.contrastive import epilogue, large_dim
from vito_kernels.contrastive.cpu import Mask
from vito_kernels.contrastive.device_functions import (
    LISTED,
    add_product,
    apply_mask,
    dot_rows,
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
    output_chunks,
    products,
)

if TYPE_CHECKING:
    import triton.language as tl


@jit
def _similarity_lse_fwd_step(
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
    HEADROOM: tl.constexpr, Q_TMA: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """lse2 and lse_residual (splits, M) and, in column chunks FIRST .. LAST, mean (splits, M, D): one program per
    block of
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
            accs, total, top = _similarity_lse_fwd_step(
                t, queries, accs, total, top, k, k_tail, scale2, shift, own, q_group, k_group, positive, M, N, k_stride,
                diagonal, D, W, TAIL, FIRST, LAST, TILE, LANES, CHUNKS, True, GROUPS, DIAGONAL, POSITIVES, ONLINE,
                HEADROOM, TMA, PRECISION,
            )  # fmt: skip
    # Not pipelined, this loop runs once or twice; addresses of its products, hoisted out of it, only spilled.
    for i in tl.range(0, crossing + last - full, num_stages=STAGES if MASKED else 1, disable_licm=True):
        t = tl.where(i < crossing, crossed + i, full)
        accs, total, top = _similarity_lse_fwd_step(
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
    lost = tl.where(z == 0.0, 0.0, shift - whole + log_z)  # what the sum rounds away, as ``cpu.split_sum``
    part = tl.cast(split, tl.int64) * M + own
    tl.store(lse2 + part, whole, mask=own < M)
    tl.store(lse_residual + part, lost, mask=own < M)
    means = ()  # type: tuple
    for c in tl.static_range(FIRST, LAST):
        means += (accs[c - FIRST] / tl.where(z == 0.0, 1.0, z)[:, None],)
    store_sums(mean + tl.cast(split, tl.int64) * M * D, means, row, M, D, W, TAIL, BLOCK, FIRST, LAST)


# ---- launcher

VARIANTS = ("fixed", "online")


def launch_lse(q: Tensor, k: Tensor, scale: Tensor, mask: Mask, compute_grad_q: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(lse2 (M,), lse_residual (M,), mean (M, D) or (0, D)) by the kernels above; keys are split among programs where
    queries
    are few.
    """
    (M, D), (left, right) = q.shape, matrices(q, k)
    if large_dim.supports("mean" if compute_grad_q else "lse", D, q.dtype):
        dense = left.tensor, right.tensor
        sums, _, mean = large_dim.exponentials(*dense, scale, mask, 100.0, gather=compute_grad_q, columns=False)
        return *trusted_lse(left, right, scale, mask, sums, 100.0, mean), mean
    tiles = [lse_tile(variant, D, q.dtype, mask, compute_grad_q) for variant in VARIANTS]
    split_keys = cdiv(k.shape[0], max(1, min(processors(q.device) // cdiv(M, tiles[0].own), k.shape[0] // 256)))
    widest = max(tile.other for tile in tiles)  # powers of two: a split is whole tiles of both variants
    split_keys = cdiv(split_keys, widest) * widest
    splits = cdiv(k.shape[0], split_keys)
    lse2, lse_residual = scale.new_empty(splits, M), scale.new_empty(splits, M)
    mean = scale.new_empty(splits, M if compute_grad_q else 0, D)
    online_only = _online_only(q.dtype, compute_grad_q)
    trusted = None if online_only else torch.empty(splits, M, dtype=torch.int8, device=q.device)
    fixed, online = ([(0, 0)] if not compute_grad_q else output_chunks(D, tile) for tile in tiles)
    assert online_only or {first for first, _ in fixed} <= {first for first, _ in online}
    for span in online:  # one launch of the fixed variant may has_mean the columns that take several of the online one
        for wider in fixed:
            if not online_only and wider[0] == span[0]:
                run_lse("fixed", left, right, scale, mask, lse2, lse_residual, mean, trusted, wider, split_keys)
        run_lse("online", left, right, scale, mask, lse2, lse_residual, mean, trusted, span, split_keys)
    return epilogue.merge_splits(lse2, lse_residual, mean)


def trusted_lse(
    q: Matrix, k: Matrix, scale: Tensor, mask: Mask, sums: Tensor, headroom: float, mean: Tensor
) -> tuple[Tensor, Tensor]:
    """(lse2 (M,), lse_residual (M,)) of sums (parts, M) of exponentials relative to |scale| log2(e) - ``headroom``,
    repeated by
    the online kernel where they are not to be trusted. So is ``mean`` (M, D) or (0, D), which is given as the sum of
    the keys with those exponentials and divided in place.
    """
    lse2, lse_residual, trusted = epilogue.finalize_lse(sums, scale, headroom)
    compute_grad_q, D = mean.shape[0] > 0, q.tensor.shape[1]
    if compute_grad_q:
        mean.div_(sums.sum(0).clamp_(min=2.0**-100)[:, None])
        trusted.mul_(mean.sum(1).isfinite())
    tile = lse_tile("online", D, q.tensor.dtype, mask, compute_grad_q)
    every_key = cdiv(k.tensor.shape[0], tile.other) * tile.other  # one split, of whole tiles
    for span in output_chunks(D, tile) if compute_grad_q else [(0, 0)]:
        run_lse("online", q, k, scale, mask, lse2, lse_residual, mean[None], trusted, span, every_key)
    return lse2[0], lse_residual[0]


def lse_tile(variant: str, D: int, dtype: torch.dtype, mask: Mask, compute_grad_q: bool) -> Tile:
    """The tile of a variant; "masked" is the fixed one where any tile may hold an excluded key."""
    masked = mask.q_group is not None or mask.positive is not None
    kind = "mean" if compute_grad_q else "lse"
    return choose_tile(f"{kind} {'masked' if masked and variant == 'fixed' else variant}", D, dtype)


def _online_only(dtype: torch.dtype, compute_grad_q: bool) -> bool:
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
    span: tuple[int, int],
    split_keys: int,
) -> None:
    """Fills lse2 (S, M) and the column chunks ``span`` of mean (S, M, D). ``trusted`` (S, M): written by the fixed
    variant, obeyed by the online one, which without it does every row.
    """
    (M, D), N, dtype = q.tensor.shape, k.tensor.shape[0], q.tensor.dtype
    tile = lse_tile(variant, D, dtype, mask, mean.shape[1] > 0)
    left, right = Operand(q, tile.own, tile), Operand(k, tile.other, tile)
    online = variant == "online"
    headroom = 100.0 if not online else 14.0 if dtype == torch.float16 else 0.0  # float16: P from 2^14 down to 2^-24
    with on_device(q.tensor):
        similarity_lse_fwd_kernel[(cdiv(M, tile.own), lse2.shape[0])](
            left.source, left.tail_source, right.source, right.tail_source, scale, lse2, lse_residual, mean, trusted,
            mask.q_group,
            mask.k_group, mask.positive, M, N, left.stride, right.stride, mask.diagonal or 0,
            split_keys // tile.other, D, left.chunk, left.tail, *span, tile.own, tile.other, tile.lanes or tile.other,
            tile.stages,
            GROUPS=mask.q_group is not None, DIAGONAL=mask.blocks, POSITIVES=columns_of(mask.positive),
            ONLINE=online, REPEAT=online and trusted is not None, HEADROOM=headroom, Q_TMA=left.tma, TMA=right.tma,
            PRECISION=left.precision, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip


def specs(device: str = "meta") -> list[Spec]:
    """Every shipped launch of this file, at the nominal size of a large contrastive batch."""
    return [
        _spec(width, dtype, compute_grad_q, layout, device)
        for width in (64, 128, 192, 256, 512, 1024)
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
        for compute_grad_q in (True, False)
        for layout in ("none", "diagonal", "groups", "positive")
    ] + [_spec(width, torch.bfloat16, True, "many positives", device) for width in (128, 256)]


def _spec(
    width: int, dtype: torch.dtype, compute_grad_q: bool, layout: str, device: str = "meta", rows: int = 32768
) -> Spec:
    ids = torch.arange(rows, device=device)
    group = ids if layout == "groups" else None
    positive = ids[:, None].repeat(1, LISTED[layout]) if layout in LISTED else None
    mask = Mask(group, group, positive, 0 if layout == "diagonal" else None)

    def launch() -> None:
        x = torch.randn(rows, width, dtype=dtype, device=device) / width**0.5
        launch_lse(x, x, torch.full((), 10.0, device=device), mask, compute_grad_q)

    def flops() -> float:
        """Of the variant that does the work; a launch for other columns of the mean computes the logits again."""
        if large_dim.supports("mean" if compute_grad_q else "lse", width, dtype):
            return (2.0 + 2.0 * compute_grad_q) * rows * rows * width
        variant = VARIANTS[_online_only(dtype, compute_grad_q)]
        launches = len(output_chunks(width, lse_tile(variant, width, dtype, mask, True))) if compute_grad_q else 1
        return (2.0 * launches + 2.0 * compute_grad_q) * products(dtype, width) * rows * rows * width

    return Spec(
        f"similarity_lse {'with mean' if compute_grad_q else 'alone'} D={width} {str(dtype)[6:]} {layout}",
        launch,
        flops,
        min_bytes=2.0 * rows * width * dtype.itemsize + rows * 4 + (rows * width * 4 if compute_grad_q else 0),
        tensor_cores=partial(on_tensor_cores, dtype, width),
        rare=dtype != torch.bfloat16
        or width not in (128, 256, 512)
        or layout not in (("none", "diagonal", "groups") if compute_grad_q else ("none",)),
    )
