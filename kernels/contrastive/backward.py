"""Backward pass: gradients that gather over the other side's softmax, one program per block of owned rows.

    s   = scale * x @ y.T                                       (M, N), never in memory (but see ``large_dim``)
    W   = x_weight[:, None] * exp(s - x_lse[:, None]) + y_weight * exp(s - y_lse)      either term may be absent
          (+ the side's term where both rows share a label; the sigmoid instead of exp with ``sigmoid``)
    out = W @ y                                                                (M, D) float32

x (M, D), y (N, D) float32, bfloat16 or float16. The log-sum-exps are known, so every exponential is a probability: no
maximum, no rescaling, no overflow, 4 M N D flops. With x the keys and y the queries this is the key gradient of a
one-sided loss (the second term alone). Both terms give one side of a two-sided loss, or all of a self-similarity, whose
p_ij and p_ji share a logit. Deterministic: partial sums over splits are added in order, nothing is atomic.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vito_kernels._core.lazy_triton import cdiv, jit, num_sms, on_device
from vito_kernels.contrastive import large_dim
from vito_kernels.contrastive.device_functions import (
    add_product,
    apply_mask,
    dot_rows,
    load_rows,
    plan_tiles,
    probability,
    store_sums,
    zero_sums,
)
from vito_kernels.contrastive.terms import Mask, PositiveTerm, SoftmaxGrad
from vito_kernels.contrastive.tile_configs import Matrix, Operand, choose_tile, output_chunks

if TYPE_CHECKING:
    import triton.language as tl

# ---- Triton kernel


@jit
def _positive_weights(own, other, M, N, x_label, y_label, x_term, y_term, diagonal, DIAGONAL: tl.constexpr, X_SOFTMAX:
tl.constexpr, Y_SOFTMAX: tl.constexpr):  # fmt: skip
    """As ``terms.PositiveTerm``."""
    own_id = tl.load(x_label + own, mask=own < M, other=-1)
    other_id = tl.load(y_label + other, mask=other < N, other=-1)
    shared = own_id[:, None] == other_id[None]
    if DIAGONAL > 0:
        shared = shared & ((own + diagonal)[:, None] != other[None])
    term = 0.0
    if X_SOFTMAX:
        term += tl.load(x_term + own, mask=own < M, other=0.0)[:, None]
    if Y_SOFTMAX:
        term += tl.load(y_term + other, mask=other < N, other=0.0)[None]
    return tl.where(shared, term, 0.0)


@jit
def _similarity_lse_bwd_step(
    t, x, accs, y, y_tail, scale2, own, x_lse2, x_weight, y_lse2, y_weight, x_group, y_group, positive, x_label,
    y_label, x_term, y_term, M, N, y_stride, diagonal, D: tl.constexpr, W: tl.constexpr, TAIL: tl.constexpr,
    FIRST: tl.constexpr, LAST: tl.constexpr, TILE: tl.constexpr, CHUNKS: tl.constexpr, CLEAN: tl.constexpr,
    GROUPS: tl.constexpr, DIAGONAL: tl.constexpr, POSITIVES: tl.constexpr, POSITIVE_TERM: tl.constexpr,
    X_SOFTMAX: tl.constexpr, Y_SOFTMAX: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr, SIGMOID: tl.constexpr,
):  # fmt: skip
    """One tile of y: the weights of its rows for each row of x, and their sum of y."""
    rows = load_rows(y, y_tail, t * TILE, N, y_stride, D, W, TAIL, TILE, CLEAN, TMA, PRECISION)
    other = t * TILE + tl.arange(0, TILE)
    s = dot_rows(x, rows, CHUNKS, PRECISION) * scale2
    if not CLEAN:
        s = apply_mask(s, own, other, M, N, x_group, y_group, positive, diagonal, GROUPS, DIAGONAL, POSITIVES, True)
    if Y_SOFTMAX:
        lse2 = tl.load(y_lse2 + other, mask=other < N, other=0.0)
        weights = probability(s - lse2[None], SIGMOID) * tl.load(y_weight + other, mask=other < N, other=0.0)[None]
        if X_SOFTMAX:
            weights += probability(s - x_lse2[:, None], SIGMOID) * x_weight[:, None]
    else:
        weights = probability(s - x_lse2[:, None], SIGMOID) * x_weight[:, None]
    if POSITIVE_TERM:
        weights += _positive_weights(
            own, other, M, N, x_label, y_label, x_term, y_term, diagonal, DIAGONAL, X_SOFTMAX, Y_SOFTMAX
        )
    return add_product(accs, weights, rows, CHUNKS, FIRST, LAST, PRECISION)


@jit
def _similarity_lse_bwd_program(
    x, x_tail, y, y_tail, scale, out, x_lse2, x_weight, y_lse2, y_weight, x_group, y_group, positive, x_label,
    y_label, x_term, y_term, M, N, x_stride, y_stride, diagonal, split_tiles, D: tl.constexpr, W: tl.constexpr,
    TAIL: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
    STAGES: tl.constexpr, GROUPS: tl.constexpr, DIAGONAL: tl.constexpr, POSITIVES: tl.constexpr,
    POSITIVE_TERM: tl.constexpr, X_SOFTMAX: tl.constexpr, Y_SOFTMAX: tl.constexpr, X_TMA: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr, SIGMOID: tl.constexpr,
):  # fmt: skip
    CHUNKS: tl.constexpr = D // W + (TAIL > 0)
    MASKED: tl.constexpr = (
        GROUPS or POSITIVES > 0 or POSITIVE_TERM or (D > 128 and PRECISION == "bf16x6")
    )  # as in the forward pass
    row, split = tl.program_id(0) * BLOCK, tl.program_id(1)
    own = row + tl.arange(0, BLOCK)
    scale2 = tl.load(scale) * 1.4426950408889634
    top = own
    weight = own
    if X_SOFTMAX:
        top = tl.load(x_lse2 + own, mask=own < M, other=0.0)
        weight = tl.load(x_weight + own, mask=own < M, other=0.0)
    rows = load_rows(x, x_tail, row, M, x_stride, D, W, TAIL, BLOCK, False, X_TMA, PRECISION)
    accs = zero_sums(BLOCK, D, W, TAIL, FIRST, LAST)

    first = split * split_tiles
    last = tl.minimum(first + split_tiles, tl.cdiv(N, TILE))
    crossed, crossing, full = plan_tiles(row, N, first, last, diagonal, BLOCK, TILE, DIAGONAL)
    if MASKED:
        crossed, crossing, full = first, last - first, last
    else:
        for i in tl.range(first, full - crossing, num_stages=STAGES):
            t = tl.where(i < crossed, i, i + crossing)
            accs = _similarity_lse_bwd_step(
                t, rows, accs, y, y_tail, scale2, own, top, weight, y_lse2, y_weight, x_group, y_group, positive,
                x_label, y_label, x_term, y_term, M, N, y_stride, diagonal, D, W, TAIL, FIRST, LAST, TILE, CHUNKS, True,
                GROUPS, DIAGONAL, POSITIVES, POSITIVE_TERM, X_SOFTMAX, Y_SOFTMAX, TMA, PRECISION, SIGMOID,
            )  # fmt: skip
    # As in the forward pass; of wide embeddings under SupCon, hoisted addresses spill on sm_80 and sm_100.
    HOISTED: tl.constexpr = MASKED and not (POSITIVE_TERM and D > 256)
    for i in tl.range(0, crossing + last - full, num_stages=STAGES if MASKED else 1, disable_licm=not HOISTED):
        t = tl.where(i < crossing, crossed + i, full)
        accs = _similarity_lse_bwd_step(
            t, rows, accs, y, y_tail, scale2, own, top, weight, y_lse2, y_weight, x_group, y_group, positive,
            x_label, y_label, x_term, y_term, M, N, y_stride, diagonal, D, W, TAIL, FIRST, LAST, TILE, CHUNKS, False,
            GROUPS, DIAGONAL, POSITIVES, POSITIVE_TERM, X_SOFTMAX, Y_SOFTMAX, TMA, PRECISION, SIGMOID,
        )  # fmt: skip
    store_sums(out + tl.cast(split, tl.int64) * M * D, accs, row, M, D, W, TAIL, BLOCK, FIRST, LAST)


@jit
def similarity_lse_bwd_kernel(
    x, x_tail, y, y_tail, out, split_tiles, y_own, y_own_tail, x_other, x_other_tail, y_out, y_split_tiles, scale,
    x_lse2, x_weight, y_lse2, y_weight, x_group, y_group, positive, x_label, y_label, x_term, y_term, M, N, x_stride,
    y_stride, diagonal, D: tl.constexpr, W: tl.constexpr, TAIL: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
    BLOCK: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr, GROUPS: tl.constexpr, DIAGONAL: tl.constexpr,
    POSITIVES: tl.constexpr, POSITIVE_TERM: tl.constexpr, X_SOFTMAX: tl.constexpr, Y_SOFTMAX: tl.constexpr,
    X_TMA: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr, SIGMOID: tl.constexpr, SIDES: tl.constexpr,
):  # fmt: skip
    """Column chunks FIRST .. LAST of out (splits, M, D): one program per block of rows of x and split of y.

    With SIDES == 2, a second layer of programs does the same for y, into ``y_out`` (splits, N, D).
    """
    if SIDES == 2 and tl.program_id(2) == 1:
        if (tl.program_id(0) * BLOCK < N) & (tl.program_id(1) * y_split_tiles * TILE < M):
            _similarity_lse_bwd_program(
                y_own, y_own_tail, x_other, x_other_tail, scale, y_out, y_lse2, y_weight, x_lse2, x_weight, y_group,
                x_group, positive, y_label, x_label, y_term, x_term, N, M, y_stride, x_stride, -diagonal, y_split_tiles,
                D, W, TAIL, FIRST, LAST, BLOCK, TILE, STAGES, GROUPS, DIAGONAL, POSITIVES, POSITIVE_TERM, Y_SOFTMAX,
                X_SOFTMAX, TMA, X_TMA, PRECISION, SIGMOID,
            )  # fmt: skip
    else:
        inside = True  # of one side, all programs are
        if SIDES == 2:
            inside = (tl.program_id(0) * BLOCK < M) & (tl.program_id(1) * split_tiles * TILE < N)
        if inside:
            _similarity_lse_bwd_program(
                x, x_tail, y, y_tail, scale, out, x_lse2, x_weight, y_lse2, y_weight, x_group, y_group, positive,
                x_label, y_label, x_term, y_term, M, N, x_stride, y_stride, diagonal, split_tiles, D, W, TAIL, FIRST,
                LAST, BLOCK, TILE, STAGES, GROUPS, DIAGONAL, POSITIVES, POSITIVE_TERM, X_SOFTMAX, Y_SOFTMAX, X_TMA, TMA,
                PRECISION, SIGMOID,
            )  # fmt: skip


# ---- launcher


def launch_lse_backward(
    x: Matrix,
    y: Matrix,
    scale: Tensor,
    x_softmax: SoftmaxGrad | None,
    y_softmax: SoftmaxGrad | None,
    mask: Mask,
    positive_term: PositiveTerm | None = None,
    sigmoid: bool = False,
    both: bool = False,
) -> list[Tensor]:
    """``W @ y`` (S, M, D) float32 of splits of y, not yet times ``scale``. The queries of ``mask`` are the rows of y.

    With ``both`` also ``W.T @ x`` (S, N, D), in the same launch for 16 bits without a positive term. Other
    kernels of two branches spill or do not fit.

    float16 takes W times a gain, without which it would lose the small gradients of a mean over a batch.
    """
    gain = _gain(x.tensor, x_softmax, y_softmax)
    if gain is not None:
        x_softmax, y_softmax = (s and SoftmaxGrad(s.lse2, s.weight * gain) for s in (x_softmax, y_softmax))
        positive_term = positive_term and replace(positive_term, weight=positive_term.weight * gain)
    wide = positive_term is None and large_dim.supports("gradient", x.tensor.shape[1], x.tensor.dtype)

    def one(x: Matrix, y: Matrix, first: SoftmaxGrad | None, second: SoftmaxGrad | None, mask: Mask) -> Tensor:
        if wide:
            return large_dim.gradient(x.tensor, y.tensor, scale, first, second, mask, sigmoid)[None]
        return _launch_tiles(x, y, scale, first, second, mask, positive_term, sigmoid)[0]

    if both and not wide and positive_term is None and x.tensor.dtype != torch.float32:
        found = _launch_tiles(x, y, scale, x_softmax, y_softmax, mask, None, sigmoid, both)
    else:
        found = [one(x, y, x_softmax, y_softmax, mask)]
        if both:
            found.append(one(y, x, y_softmax, x_softmax, mask.transposed()))
    return found if gain is None else [total.div_(gain) for total in found]


def _launch_tiles(
    x: Matrix,
    y: Matrix,
    scale: Tensor,
    x_softmax: SoftmaxGrad | None,
    y_softmax: SoftmaxGrad | None,
    mask: Mask,
    term: PositiveTerm | None,
    sigmoid: bool,
    both: bool = False,
) -> list[Tensor]:
    (M, D), N, device = x.tensor.shape, y.tensor.shape[0], x.tensor.device
    tile = choose_tile("gradient both" if x_softmax and y_softmax else "gradient one", D, x.tensor.dtype)
    sizes = [(M, N), (N, M)] if both else [(M, N)]
    blocks, tiles = [cdiv(own, tile.block_m) for own, _ in sizes], [cdiv(other, tile.block_n) for _, other in sizes]
    wanted = num_sms(device) // sum(blocks)
    split_tiles = [cdiv(count, max(1, min(wanted, count // 4))) for count in tiles]
    splits = [cdiv(count, step) for count, step in zip(tiles, split_tiles, strict=True)]
    outs = [scale.new_empty(count, own, D) for count, (own, _) in zip(splits, sizes, strict=True)]
    left, right = Operand(x, tile.block_m, tile), Operand(y, tile.block_n, tile)
    second: list[Any] = [None] * 6
    if both:
        operands = Operand(y, tile.block_m, tile), Operand(x, tile.block_n, tile)
        second = [part for operand in operands for part in (operand.source, operand.tail_source)]
        second += [outs[1], split_tiles[1]]
    labels: tuple[Tensor | None, Tensor | None] = None, None
    if term:  # of one set, or of queries x or y
        labels = (term.label, term.other_label) if x_softmax else (term.other_label, term.label)
    weight = term and term.weight
    with on_device(x.tensor):
        for first, last in output_chunks(D, tile):
            similarity_lse_bwd_kernel[(max(blocks), max(splits), len(sizes))](
                left.source, left.tail_source, right.source, right.tail_source, outs[0], split_tiles[0], *second, scale,
                x_softmax and x_softmax.lse2, x_softmax and x_softmax.weight, y_softmax and y_softmax.lse2,
                y_softmax and y_softmax.weight, mask.k_group, mask.q_group, mask.positive, *labels,
                x_softmax and weight, y_softmax and weight, M, N, left.stride, right.stride, -(mask.diagonal or 0),
                D, left.chunk, left.tail, first, last, tile.block_m, tile.block_n, tile.stages,
                GROUPS=mask.q_group is not None, DIAGONAL=mask.diagonal_width, POSITIVES=mask.num_positives,
                POSITIVE_TERM=term is not None, X_SOFTMAX=x_softmax is not None, Y_SOFTMAX=y_softmax is not None,
                X_TMA=left.tma, TMA=right.tma, PRECISION=left.precision, SIGMOID=sigmoid, SIDES=len(sizes),
                num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
    return outs


def _gain(x: Tensor, *softmaxes: SoftmaxGrad | None) -> Tensor | None:
    """The factor that brings the largest weight to 2^14, or as close as a float can; None for other dtypes."""
    if x.dtype != torch.float16:
        return None
    largest = torch.stack([softmax.weight.abs().max() for softmax in softmaxes if softmax is not None]).max()
    return torch.where(largest > 0, (2.0**14 / largest).clamp(max=2.0**126), 1.0)
