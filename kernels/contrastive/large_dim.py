"""Wide embeddings of 16 bits: exponentials go through memory, a strip of keys at a time.

A program that owns rows of 1024 columns has no room left beside them. On sm_90 it would take 16 keys at a time and
compute the logits again for each 256 columns of output: 10 M N D flops instead of 4. Here each strip of C keys takes
two plain matrix products (for each 32768 rows of x, if there are more):

    P     = 2^(scale log2(e) x @ y.T - shift)   (M, C) in 16 bits, its sums by row and column in float32
    out  += P @ y                                (M, D) in float32

P takes at most ``STRIP_BYTES`` for any M and N. So do the sums of a strip's tiles, which are added up behind it. The
gradient is the same with weights instead of exponentials. Programs own rows and columns; strips and partial sums are
added in order. Deterministic, no atomics.

On an H200, info_nce at M = N = 4096, D = 1024 took 891 us before and 234 us so. At D = 512 the gradient of keys gains a
tenth or two, a two-sided loss a seventh, and the forward pass nothing: hence ``WIDER_THAN``.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vito_kernels._core.lazy_triton import cdiv, interpreting, jit, num_sms, on_device
from vito_kernels.contrastive.device_functions import apply_mask, probability, product, softplus2
from vito_kernels.contrastive.terms import Mask, SoftmaxGrad
from vito_kernels.contrastive.tile_configs import family

if TYPE_CHECKING:
    import triton.language as tl

WIDER_THAN = {"mean": 512, "lse": 512, "gradient": 256, "two_sided": 256}
STRIP_BYTES, STRIP_ROWS = 1 << 28, 1 << 15
TILE, DEPTH, WARPS, STAGES = 128, 64, 8, 4  # square tiles of output, and how much of the inner dimension at a time


@jit
def _place(M, N, TILE: tl.constexpr):
    """(row, column) tile of this program: eight rows of tiles go together along the columns, which keeps both
    matrices' parts in the L2 cache.
    """
    rows, columns = tl.cdiv(M, TILE), tl.cdiv(N, TILE)
    band = tl.program_id(0) // (8 * columns)
    height = tl.minimum(rows - 8 * band, 8)
    inside = tl.program_id(0) - band * 8 * columns
    return 8 * band + inside % height, inside // height


@jit
def large_dim_weights_kernel(
    x, y, scale, offset, weights, row_sums, column_sums, shares, x_lse2, x_weight, y_lse2, y_weight, x_group, y_group,
    positive, M, N, D, begin, end, first, last, x_stride, y_stride, w_stride, diagonal, TILE: tl.constexpr,
    DEPTH: tl.constexpr, RAGGED: tl.constexpr, STAGES: tl.constexpr, GROUPS: tl.constexpr, DIAGONAL: tl.constexpr,
    POSITIVES: tl.constexpr, X_SOFTMAX: tl.constexpr, Y_SOFTMAX: tl.constexpr, HEADROOM: tl.constexpr,
    STORE: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr, SIGMOID: tl.constexpr,
):  # fmt: skip
    """weights of the rows ``begin .. end`` of x for the rows ``first .. last`` of y; without roles, their exponentials
    relative to the fixed shift, with sums by row and column. With SIGMOID they are sigmoids of the logits plus
    ``offset``, with sums by row of their log2(1 + 2^s) and of themselves (``shares``).
    """
    row_tile, strip_tile = _place(end - begin, last - first, TILE)
    own = begin + row_tile * TILE + tl.arange(0, TILE)
    other = first + strip_tile * TILE + tl.arange(0, TILE)
    depth = tl.arange(0, DEPTH)
    xs = x + tl.minimum(own, M - 1).to(tl.int64)[:, None] * x_stride + depth[None]
    ys = y + tl.minimum(other, N - 1).to(tl.int64)[None] * y_stride + depth[:, None]
    acc = tl.zeros((TILE, TILE), tl.float32)
    for d in tl.range(0, D, DEPTH, num_stages=STAGES):
        if RAGGED:
            left = tl.load(xs + d, mask=(depth < D - d)[None], other=0.0)
            acc = product(left, tl.load(ys + d, mask=(depth < D - d)[:, None], other=0.0), acc, PRECISION)
        else:
            acc = product(tl.load(xs + d), tl.load(ys + d), acc, PRECISION)
    scale2 = tl.load(scale) * 1.4426950408889634
    s = acc * scale2
    FLIPPED: tl.constexpr = X_SOFTMAX or Y_SOFTMAX
    s = apply_mask(s, own, other, M, last, x_group, y_group, positive, diagonal, GROUPS, DIAGONAL, POSITIVES, FLIPPED)
    if X_SOFTMAX or Y_SOFTMAX:
        w = tl.zeros((TILE, TILE), tl.float32)
        if X_SOFTMAX:
            top = tl.load(x_lse2 + own, mask=own < M, other=0.0)
            w += probability(s - top[:, None], SIGMOID) * tl.load(x_weight + own, mask=own < M, other=0.0)[:, None]
        if Y_SOFTMAX:
            top = tl.load(y_lse2 + other, mask=other < N, other=0.0)
            w += probability(s - top[None], SIGMOID) * tl.load(y_weight + other, mask=other < N, other=0.0)[None]
    else:
        sums = row_sums + tl.cast(strip_tile, tl.int64) * M
        if SIGMOID:
            s += tl.load(offset) * 1.4426950408889634
            terms = softplus2(s)
            w = tl.exp2(s - terms)
            tl.store(shares + tl.cast(strip_tile, tl.int64) * M + own, tl.sum(w, 1), mask=own < M)
        else:
            w = tl.exp2(s - (tl.abs(scale2) - HEADROOM))
            w = tl.where((own < M)[:, None], w, 0.0)
            terms = w
        tl.store(sums + own, tl.sum(terms, 1), mask=own < M)
        if COLUMNS:
            sums = column_sums + tl.cast(row_tile, tl.int64) * N
            tl.store(sums + other, tl.sum(w, 0), mask=other < N)
    if STORE:
        column = strip_tile * TILE + tl.arange(0, TILE)
        place = weights + (own - begin).to(tl.int64)[:, None] * w_stride + column[None]
        tl.store(place, w.to(weights.dtype.element_ty), mask=(own < end)[:, None])


@jit
def large_dim_weighted_sum_kernel(
    weights, y, out, M, N, D, begin, end, first, last, y_stride, w_stride, split_keys, TILE: tl.constexpr,
    DEPTH: tl.constexpr, STAGES: tl.constexpr, MORE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows ``begin .. end`` of out (splits, M, D): weights @ rows ``first .. last`` of y, added to them if MORE."""
    row_tile, column_tile = _place(end - begin, D, TILE)
    split = tl.program_id(1)
    own, column = begin + row_tile * TILE + tl.arange(0, TILE), column_tile * TILE + tl.arange(0, TILE)
    depth = tl.arange(0, DEPTH)
    ws = weights + (tl.minimum(own, end - 1) - begin).to(tl.int64)[:, None] * w_stride + depth[None]
    ys = y + column[None]
    acc = tl.zeros((TILE, TILE), tl.float32)
    stop = tl.minimum(split * split_keys + split_keys, last - first)
    for key in tl.range(split * split_keys, stop, DEPTH, num_stages=STAGES):
        rows = tl.minimum(first + key + depth, N - 1)  # past the strip, weights are zero
        theirs = tl.load(ys + rows.to(tl.int64)[:, None] * y_stride, mask=(column < D)[None], other=0.0)
        acc = product(tl.load(ws + key), theirs, acc, PRECISION)
    place = out + tl.cast(split, tl.int64) * M * D + own.to(tl.int64)[:, None] * D + column[None]
    inside = (own < end)[:, None] & (column < D)[None]
    if MORE:
        acc += tl.load(place, mask=inside, other=0.0)
    tl.store(place, acc, mask=inside)


# ---- launchers


def supports(kernel: str, D: int, dtype: torch.dtype) -> bool:
    """Whether a pass takes this way: "mean" or "lse" (the forward pass with and without the keys' mean), "gradient",
    "two_sided". Float32 does not, nor float16 whose P cannot hold the fixed shift.
    """
    if dtype not in (torch.bfloat16, torch.float16) or (kernel == "mean" and dtype == torch.float16):
        return False
    narrowest = WIDER_THAN[kernel]
    # Of a mean of 512 columns, sm_100's tensor memory holds half; beside rows of 512, sm_89 has no room.
    if (kernel == "mean" and family() == 100) or family() == 89:
        narrowest = min(narrowest, 256)
    return narrowest < D


def _sizes() -> tuple[int, int, str]:
    """(TILE, DEPTH, PRECISION); small in the interpreter, where small matrices shall have several tiles."""
    return (16, 16, "widened") if interpreting() else (TILE, DEPTH, "native")


def exponentials(
    x: Tensor, y: Tensor, scale: Tensor, mask: Mask, headroom: float, *, gather: bool, columns: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(row_sums (parts, M), column_sums (parts, N), out (M, D)) of the exponentials P of queries x.

    P is relative to |scale| log2(e) - ``headroom``. The second is empty without ``columns``, the third without
    ``gather``.
    """
    sums, column_sums, out, _ = _run(x, y, scale, mask, headroom, None, None, gather, columns)
    return sums, column_sums, out


def sigmoids(
    x: Tensor, y: Tensor, scale: Tensor, offset: Tensor, mask: Mask, *, gather: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(sums (parts, M) of log2(1 + 2^s), of p = 1 / (1 + 2^-s), and p @ y (M, D) or (0, D)), s with ``offset`` ()."""
    sums, _, out, shares = _run(x, y, scale, mask, 0.0, None, None, gather, False, offset)
    return sums, shares, out


def gradient(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    x_softmax: SoftmaxGrad | None,
    y_softmax: SoftmaxGrad | None,
    mask: Mask,
    sigmoid: bool = False,
) -> Tensor:
    """``W @ y`` (M, D) of :mod:`.backward`. The queries of ``mask`` are the rows of y."""
    return _run(x, y, scale, mask.transposed(), 0.0, x_softmax, y_softmax, True, False, sigmoid=sigmoid)[2]


def _run(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    mask: Mask,
    headroom: float,
    x_softmax: SoftmaxGrad | None,
    y_softmax: SoftmaxGrad | None,
    gather: bool,
    columns: bool,
    offset: Tensor | None = None,
    sigmoid: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (M, D), N = x.shape, y.shape[0]
    tile, depth, precision = _sizes()
    keys = cdiv(N, tile) * tile
    height = min(M, STRIP_ROWS, max(1, STRIP_BYTES // (4 * N)) * tile if columns else M)
    widest = STRIP_BYTES // (2 * height) // tile if gather else STRIP_BYTES // (4 * M)
    strip = min(keys, max(1, widest) * tile)
    splits = max(1, min(num_sms(x.device) // (cdiv(M, tile) * cdiv(D, tile)), strip // 1024))
    split_keys = cdiv(cdiv(strip, splits), depth) * depth
    summed = not (x_softmax or y_softmax)
    row_sums = scale.new_empty(strip // tile if summed else 0, M)
    column_sums = scale.new_empty(cdiv(height, tile) if columns else 0, N)
    shares = scale.new_empty(strip // tile if offset is not None else 0, M)
    row_total = scale.new_zeros(1, M if summed and strip < N else 0)  # if it takes several strips
    share_total = scale.new_zeros(1, M if offset is not None and strip < N else 0)
    column_total = scale.new_zeros(1, N if columns and height < M else 0)
    weights = x.new_empty(height, strip if gather else 0)
    out = scale.new_empty(cdiv(strip, split_keys), M if gather else 0, D)
    with on_device(x):
        for begin, first in itertools.product(range(0, M, height), range(0, N, strip)):
            end, last = min(begin + height, M), min(first + strip, N)
            rows = cdiv(end - begin, tile)
            large_dim_weights_kernel[(rows * cdiv(last - first, tile),)](
                x, y, scale, offset, weights, row_sums, column_sums, shares, x_softmax and x_softmax.lse2,
                x_softmax and x_softmax.weight, y_softmax and y_softmax.lse2, y_softmax and y_softmax.weight,
                mask.q_group, mask.k_group, mask.positive, M, N, D, begin, end, first, last, x.stride(0), y.stride(0),
                strip, mask.diagonal or 0, tile, depth, D % depth > 0, STAGES, GROUPS=mask.q_group is not None,
                DIAGONAL=mask.diagonal_width, POSITIVES=mask.num_positives, X_SOFTMAX=x_softmax is not None,
                Y_SOFTMAX=y_softmax is not None, HEADROOM=headroom, STORE=gather, COLUMNS=columns,
                PRECISION=precision, SIGMOID=sigmoid or offset is not None, num_warps=WARPS, num_stages=STAGES,
            )  # fmt: skip
            if gather:
                large_dim_weighted_sum_kernel[(rows * cdiv(D, tile), out.shape[0])](
                    weights, y, out, M, N, D, begin, end, first, last, y.stride(0), strip, split_keys, tile, depth,
                    STAGES, MORE=first > 0, PRECISION=precision, num_warps=WARPS, num_stages=STAGES,
                )  # fmt: skip
            if row_total.numel():
                row_total[0, begin:end] += row_sums[: cdiv(last - first, tile), begin:end].sum(0)
            if share_total.numel():
                share_total[0, begin:end] += shares[: cdiv(last - first, tile), begin:end].sum(0)
            if column_total.numel() and last == N:
                column_total[0] += column_sums[:rows].sum(0)
    row_sums = row_total if row_total.numel() else row_sums
    column_sums = column_total if column_total.numel() else column_sums
    shares = share_total if share_total.numel() else shares
    return row_sums, column_sums, out[0] if out.shape[0] == 1 else out.sum(0), shares
