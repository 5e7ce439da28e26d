"""Row-wise work of the contrastive ops beside their matrix products, one kernel each.

PyTorch takes four to a dozen launches for each of these, which at a few thousand rows cost more than the products.

    merge_splits     one lse, residual and mean of those over disjoint sets of keys
    finalize_lse     the log of summed exponentials, and its validity
    softmax_grad     a softmax's share in a gradient
    positive_logits  scale * q_i . k_j for the positives j of query i
    grad_epilogue    the positives' part of a gradient, its factors, one rounding
    grad_epilogues   that of queries and of keys at once
    views_epilogue   that of two views, through their length
    multi_view_grad_q    the gradient of all ordered pairs of views

A program owns ROWS rows of WIDTH columns, D rounded up to a power of two. Sums are float32, in a fixed order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vito_kernels._core.lazy_triton import cdiv, jit, on_device, program_shape, rows_contiguous
from vito_kernels.contrastive import cpu_epilogue
from vito_kernels.contrastive.device_functions import merged_lse, merged_mean
from vito_kernels.contrastive.normalize import MIN_LENGTH, load_in_turns, store_in_turns, through_length
from vito_kernels.contrastive.terms import SoftmaxGrad

if TYPE_CHECKING:
    import triton.language as tl

# ------------------------------------------------------------------------------------------------------------- kernels


@jit
def merge_splits_kernel(
    lse2, lse_residual, mean, whole, lost, merged, M, splits, D, WIDTH: tl.constexpr, ROWS: tl.constexpr, MEAN:
    tl.constexpr
):  # fmt: skip
    """One lse2, lse_residual and mean out of those over disjoint sets of keys; formulas of ``cpu.merge_splits``."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    inside = (row < M)[:, None] & (column < D)[None]
    whole_lse, residual, top, total = merged_lse(lse2, lse_residual, row, M, splits)
    tl.store(whole + row, whole_lse, mask=row < M)
    tl.store(lost + row, residual, mask=row < M)
    if MEAN:
        acc = merged_mean(mean, lse2, lse_residual, top, total, row, column, inside, M, D, splits)
        tl.store(merged + row.to(tl.int64)[:, None] * D + column[None], acc, mask=inside)


@jit
def finalize_lse_kernel(
    sums, scale, lse2, lse_residual, trusted, M, splits, HEADROOM: tl.constexpr, ROWS: tl.constexpr
):
    """The log of sums of 2^(s - shift) in two parts, and whether it is to be trusted."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((ROWS,), tl.float32)
    for s in range(splits):
        total += tl.load(sums + tl.cast(s, tl.int64) * M + row, mask=row < M, other=0.0)
    shift = tl.abs(tl.load(scale)) * 1.4426950408889634 - HEADROOM
    log_total = tl.log2(total)
    whole = log_total + shift
    tl.store(lse2 + row, whole, mask=row < M)
    tl.store(lse_residual + row, tl.where(total == 0.0, 0.0, shift - whole + log_total), mask=row < M)
    safe = (total > 2.0**-64) & (total < 2.0**120)
    tl.store(trusted + row, safe.to(tl.int8), mask=row < M)


@jit
def _softmax_share(gradient, lse2, lse_residual, top, weight, row, M):
    own = tl.load(lse2 + row, mask=row < M, other=0.0)
    g = tl.load(gradient + row, mask=row < M, other=0.0) * 1.4426950408889634
    g *= tl.exp2(-tl.load(lse_residual + row, mask=row < M, other=0.0))
    tl.store(top + row, tl.where(own == -float("inf"), 0.0, own), mask=row < M)
    tl.store(weight + row, tl.where(own == -float("inf"), 0.0, g), mask=row < M)


@jit
def softmax_grad_kernel(
    gradient, lse2, lse_residual, top, weight, M, second_gradient, second, second_residual, second_top, second_weight,
    second_M, ROWS: tl.constexpr, SIDES: tl.constexpr,
):  # fmt: skip
    """The share of a softmax in a gradient: none for a fully masked row (lse = -inf). Of one side or of two."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    _softmax_share(gradient, lse2, lse_residual, top, weight, row, M)
    if SIDES == 2:
        _softmax_share(second_gradient, second, second_residual, second_top, second_weight, row, second_M)


@jit
def positive_logits_kernel(
    q, k, positive, scale, out, M, N, D, q_stride, k_stride, diagonal, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    LISTED: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """scale log2(e) q_i . k_j for the positives j of each i; NaN for an index that is no key."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    inside = (row < M)[:, None] & (column < D)[None]
    own = tl.load(q + row.to(tl.int64)[:, None] * q_stride + column[None], mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(scale) * 1.4426950408889634
    for p in range(PAIRS):
        key = row.to(tl.int64) + diagonal
        if LISTED:
            key = tl.load(positive + row.to(tl.int64) * PAIRS + p, mask=row < M, other=0)
        known = (key >= 0) & (key < N)
        other = tl.load(k + key[:, None] * k_stride + column[None], mask=inside & known[:, None], other=0.0)
        logit = tl.sum(own * other.to(tl.float32), 1) * factor
        place = out + row.to(tl.int64) * PAIRS + p
        tl.store(place, tl.where(known, logit, float("nan")), mask=row < M)


@jit
def _grad_rows(
    base, weight, pair_weight, k, positive, other, scale, gradient, factor, out, dots, M, N, D, splits, k_stride,
    other_stride, diagonal, WIDTH: tl.constexpr, ROWS: tl.constexpr, LISTED: tl.constexpr, PAIRS: tl.constexpr,
    WEIGHTED: tl.constexpr, BY_KEY: tl.constexpr, DOTS: tl.constexpr, STORE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    inside = (row < M)[:, None] & (column < D)[None]
    place = row.to(tl.int64)[:, None]
    acc = tl.load(base + place * D + column[None], mask=inside, other=0.0)
    for s in range(1, splits):
        acc += tl.load(base + (tl.cast(s, tl.int64) * M + place) * D + column[None], mask=inside, other=0.0)
    if WEIGHTED:
        acc *= (tl.load(weight + row, mask=row < M, other=0.0) * 1.4426950408889634)[:, None]
    if PAIRS > 0:  # a loop of no turns is compiled all the same, and has no pairs to load
        for p in range(PAIRS):
            key = row.to(tl.int64) + diagonal
            if LISTED:
                key = tl.load(positive + row.to(tl.int64) * PAIRS + p, mask=row < M, other=0)
            known = (row < M) & (key >= 0) & (key < N)
            pair = key if BY_KEY else row.to(tl.int64) * PAIRS + p
            share = tl.load(pair_weight + pair, mask=known, other=0.0)
            keys = tl.load(k + key[:, None] * k_stride + column[None], mask=inside & known[:, None], other=0.0)
            acc += (share * 1.4426950408889634)[:, None] * keys.to(tl.float32)
    if gradient is not None:
        acc *= tl.load(gradient)
    if factor is not None:
        acc *= tl.load(factor)
    if DOTS:
        theirs = tl.load(other + place * other_stride + column[None], mask=inside, other=0.0)
        tl.store(dots + row, tl.sum(acc * theirs.to(tl.float32), 1), mask=row < M)
    if STORE:
        acc *= tl.load(scale)
        tl.store(out + place * D + column[None], acc.to(out.dtype.element_ty), mask=inside)


@jit
def grad_epilogue_kernel(
    base, weight, pair_weight, k, positive, other, scale, gradient, factor, out, dots, M, N, D, splits, k_stride,
    other_stride, diagonal, key_base, q, key_out, key_splits, q_stride, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    LISTED: tl.constexpr, PAIRS: tl.constexpr, WEIGHTED: tl.constexpr, BY_KEY: tl.constexpr, DOTS: tl.constexpr,
    STORE: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """factors scale (weight_i base_i + sum over pairs of pair_weight k_j), weights times log2(e), rounded once; before
    the scale, its product with ``other``. With KEYS a second row of programs does the same for the keys of the pairs.
    """
    if KEYS and tl.program_id(1) == 1:
        _grad_rows(
            key_base, weight, pair_weight, q, positive, other, scale, gradient, factor, key_out, dots, N, M, D,
            key_splits, q_stride, other_stride, -diagonal, WIDTH, ROWS, False, PAIRS, False, True, False, True,
        )  # fmt: skip
    else:
        _grad_rows(
            base, weight, pair_weight, k, positive, other, scale, gradient, factor, out, dots, M, N, D, splits,
            k_stride, other_stride, diagonal, WIDTH, ROWS, LISTED, PAIRS, WEIGHTED, BY_KEY, DOTS, STORE,
        )  # fmt: skip


@jit
def views_epilogue_kernel(
    base, pair_weight, z, scale, gradient, x, second, out, second_out, dots, M, D, splits, x_stride, second_stride,
    MIN_LENGTH: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, DOTS: tl.constexpr, STORE: tl.constexpr,
):  # fmt: skip
    """gradient scale (base_i + w_i z_j + w_j z_j) of adjacent rows i and j, through their length; before the scale, its
    product with z.
    """
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = tl.arange(0, WIDTH)[None]
    inside = (row < M) & (column < D)
    acc = tl.load(base + row * D + column, mask=inside, other=0.0)
    for s in range(1, splits):
        acc += tl.load(base + (tl.cast(s, tl.int64) * M + row) * D + column, mask=inside, other=0.0)
    share = tl.load(pair_weight + row, mask=row < M, other=0.0)
    share += tl.load(pair_weight + (row ^ 1), mask=row < M, other=0.0)
    theirs = tl.load(z + (row ^ 1) * D + column, mask=inside, other=0.0).to(tl.float32)
    acc += share * 1.4426950408889634 * theirs
    if gradient is not None:
        acc *= tl.load(gradient)
    if DOTS:
        own = tl.load(z + row * D + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(dots + row, tl.sum(acc * own, 1)[:, None], mask=row < M)
    if STORE:
        rows = load_in_turns(x, second, x_stride, second_stride, row, column, inside, True)
        dx = through_length(rows, acc * tl.load(scale), MIN_LENGTH)
        store_in_turns(out, second_out, dx.to(out.dtype.element_ty), row, column, D, inside)


@jit
def multi_view_grad_q_kernel(
    q, k, scale, mean, weight, grad_loss, grad_q, dots, M, N, D, offset, pair_stride, row_stride, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, VIEWS: tl.constexpr, DOTS: tl.constexpr, STORE: tl.constexpr,
):  # fmt: skip
    """For rows of one view, scale times the sum over the other views of grad_loss weight (mean - positive key), weights
    times log2(e).
    """
    view = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    inside = (row < M)[:, None] & (column < D)[None]
    acc = tl.zeros((ROWS, WIDTH), tl.float32)
    for i in range(VIEWS - 1):
        pair = view * (VIEWS - 1) + i
        other_view = i + (i >= view).to(tl.int32)
        out = tl.cast(pair, tl.int64) * M + row
        share = tl.load(weight + out, mask=row < M, other=0.0) * 1.4426950408889634
        share *= tl.load(grad_loss + pair * pair_stride + row.to(tl.int64) * row_stride, mask=row < M, other=0.0)
        other = (tl.cast(other_view, tl.int64) * N + row + offset)[:, None] * D + column[None]
        pull = tl.load(mean + out[:, None] * D + column[None], mask=inside, other=0.0)
        pull -= tl.load(k + other, mask=inside, other=0.0).to(tl.float32)
        acc += share[:, None] * pull
    own_row = tl.cast(view, tl.int64) * M + row
    own = own_row[:, None] * D + column[None]
    if DOTS:
        queries = tl.load(q + own, mask=inside, other=0.0).to(tl.float32)
        tl.store(dots + own_row, tl.sum(acc * queries, 1), mask=row < M)
    if STORE:
        acc *= tl.load(scale)
        tl.store(grad_q + own, acc.to(grad_q.dtype.element_ty), mask=inside)


# ----------------------------------------------------------------------------------------------------------- launchers


def merge_splits(lse2: Tensor, lse_residual: Tensor, mean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(S, M), (S, M) and (S, M, D) or (S, 0, D) to (M,), (M,) and (M, D) or (0, D)."""
    splits, M = lse2.shape
    if splits == 1:
        return lse2[0], lse_residual[0], mean[0]
    has_mean = mean.shape[1] > 0
    width, rows = program_shape(mean.shape[2] if has_mean else 1)
    whole, lost, merged = lse2.new_empty(M), lse2.new_empty(M), mean.new_empty(mean.shape[1:])
    with on_device(lse2):
        merge_splits_kernel[(cdiv(M, rows),)](
            lse2, lse_residual, mean, whole, lost, merged, M, splits, mean.shape[2], width, rows, has_mean
        )
    return whole, lost, merged


def finalize_lse(sums: Tensor, scale: Tensor, headroom: float) -> tuple[Tensor, Tensor, Tensor]:
    """(lse2, lse_residual, trusted), each (1, M), of partial sums (S, M) relative to the fixed shift of
    ``two_sided``."""
    splits, M = sums.shape
    lse2, lse_residual = sums.new_empty(1, M), sums.new_empty(1, M)
    trusted = torch.empty(1, M, dtype=torch.int8, device=sums.device)
    rows = 128
    with on_device(sums):
        finalize_lse_kernel[(cdiv(M, rows),)](sums, scale, lse2, lse_residual, trusted, M, splits, headroom, rows)
    return lse2, lse_residual, trusted


def softmax_grad(lse2: Tensor, lse_residual: Tensor, gradient: Tensor) -> SoftmaxGrad:
    """As ``SoftmaxGrad.of``."""
    return softmax_grads((lse2, lse_residual, gradient))[0]


def softmax_grads(*sides: tuple[Tensor, Tensor, Tensor]) -> list[SoftmaxGrad]:
    """``softmax_grad`` of one side or of two, in one launch."""
    rows, found, given = 256, list[SoftmaxGrad](), list[Any]()
    for lse2, lse_residual, gradient in sides:
        found.append(SoftmaxGrad(torch.empty_like(lse2), torch.empty_like(lse2)))
        given += [gradient.contiguous(), lse2, lse_residual, found[-1].lse2, found[-1].weight, len(lse2)]
    with on_device(sides[0][0]):
        grid = cdiv(max(len(side[0]) for side in sides), rows)
        softmax_grad_kernel[(grid,)](*given, *[None] * (12 - len(given)), rows, len(sides))
    return found


def positive_logits(q: Tensor, k: Tensor, scale: Tensor, positive: Tensor | None, diagonal: int | None) -> Tensor:
    """scale log2(e) q_i . k_j (M, P) for the positives j of query i.

    The positives are columns of ``positive`` (M, P), or i + ``diagonal``, or none.
    """
    (M, D), pairs = q.shape, positive.shape[1] if positive is not None else int(diagonal is not None)
    q, k, out = rows_contiguous(q), rows_contiguous(k), scale.new_empty(M, pairs)
    positive = None if positive is None else positive.contiguous()
    width, rows = program_shape(D)
    if pairs:
        with on_device(q):
            positive_logits_kernel[(cdiv(M, rows),)](
                q, k, positive, scale, out, M, k.shape[0], D, q.stride(0), k.stride(0), diagonal or 0, width, rows,
                positive is not None, pairs,
            )  # fmt: skip
    return out


def grad_epilogue(
    base: Tensor,
    scale: Tensor,
    dtype: torch.dtype,
    *,
    store: bool = True,
    weight: Tensor | None = None,
    pair_weight: Tensor | None = None,
    k: Tensor | None = None,
    positive: Tensor | None = None,
    diagonal: int = 0,
    by_key: bool = False,
    other: Tensor | None = None,
    gradient: Tensor | None = None,
    factor: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradient ``scale log2(e) (weight_i base_i + sum over i's pairs of pair_weight k_j)``, rounded once.

    Without ``weight`` the base counts as it is. Without ``pair_weight`` or k no row has a pair.

    Args:
        base: (M, D) or (S, M, D) float32, whose S parts are added up.
        scale: float32 scalar.
        dtype: of the gradient.
        store: False leaves the gradient out.
        weight: (M,).
        pair_weight: (M, P) for ``positive``, (M, 1) for the diagonal, (N, 1) with ``by_key``.
        k: (N, D), the keys of the pairs.
        positive: (M, P) indices of each row's pairs; by default its pair is row ``i + diagonal`` of k, if that exists.
        by_key: row i of base is a key, and k are the queries.
        other: (M, D); its product with the gradient before the scale, summed, is the gradient of the scale.
        gradient, factor: (), factors on all of it: the incoming gradient of a sum or a mean, and another one.

    Returns:
        The gradient (M, D) or (0,), and the gradient of the scale, () or without ``other`` (0,).
    """
    if pair_weight is None:
        k = None
    M, D = base.shape[-2:]
    width, rows = program_shape(D)
    k, other = (None if x is None else rows_contiguous(x) for x in (k, other))
    weight, pair_weight, positive = (None if x is None else x.contiguous() for x in (weight, pair_weight, positive))
    pairs = 0 if k is None else 1 if positive is None else positive.shape[1]
    out = torch.empty((M, D) if store else 0, dtype=dtype, device=base.device)
    dots = base.new_empty(0 if other is None else M)
    strides = [0 if x is None else x.stride(0) for x in (k, other)]
    with on_device(base):
        grad_epilogue_kernel[(cdiv(M, rows),)](
            base, weight, pair_weight, k, positive, other, scale, gradient, factor, out, dots, M,
            0 if k is None else k.shape[0], D, _parts(base), *strides, diagonal, None, None, None, 0, 0, width, rows,
            positive is not None, pairs, weight is not None, by_key, other is not None, store, False,
        )  # fmt: skip
    return out, dots if other is None else dots.sum()


def _parts(base: Tensor) -> int:
    return base.shape[0] if base.dim() == 3 else 1


def grad_epilogues(
    base: Tensor | None,
    key_base: Tensor | None,
    scale: Tensor,
    q: Tensor,
    k: Tensor,
    pair_weight: Tensor | None,
    diagonal: int,
    weight: Tensor | None,
    store: bool,
    dots: bool,
    gradient: Tensor | None = None,
    factor: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dscale, dk): ``grad_epilogue`` of q (M, D) with ``weight`` and, by key, of k (N, D), in one launch.

    A base that is not there makes no gradient. ``store`` and ``dots``: whether dq and dscale are wanted.
    ``pair_weight`` (M, 1) is that of i and ``i + diagonal``.
    """
    if base is None or key_base is None:
        given = scale, q, k, pair_weight, diagonal, weight, store, dots, gradient, factor
        return cpu_epilogue.grad_epilogues(base, key_base, *given, grad_epilogue)
    (M, D), N = q.shape, k.shape[0]
    width, rows = program_shape(D)
    q, k = rows_contiguous(q), rows_contiguous(k)
    weight, pair_weight = (None if x is None else x.contiguous() for x in (weight, pair_weight))
    dq = torch.empty((M, D) if store else 0, dtype=q.dtype, device=q.device)
    dk = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    products = base.new_empty(M if dots else 0)
    with on_device(base):
        grad_epilogue_kernel[(cdiv(max(M, N), rows), 2)](
            base, weight, pair_weight, k, None, q, scale, gradient, factor, dq, products, M, N, D, _parts(base),
            k.stride(0), q.stride(0), diagonal, key_base, q, dk, _parts(key_base), q.stride(0), width, rows, False,
            int(pair_weight is not None), weight is not None, False, dots, store, True,
        )  # fmt: skip
    return dq, products.sum() if dots else products, dk


def views_epilogue(
    base: Tensor,
    pair_weight: Tensor,
    z: Tensor,
    z1: Tensor,
    z2: Tensor,
    scale: Tensor,
    gradient: Tensor | None,
    need_z: bool,
    need_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dz1, dz2, dscale), from the gradient (S, 2B, D) of the softmax by z (2B, D), the normalized rows in turns.

    ``pair_weight`` (2B, 1) is by the logit of each row and its sample's other one. A logit reaches dscale twice.
    """
    M, D = z.shape
    x, second = rows_contiguous(z1), rows_contiguous(z2)
    dz1, dz2 = (torch.empty(side.shape if need_z else 0, dtype=side.dtype, device=side.device) for side in (x, second))
    dots, (width, rows) = base.new_empty(M if need_scale else 0), program_shape(D)
    with on_device(z):
        views_epilogue_kernel[(cdiv(M, rows),)](
            base, pair_weight.contiguous(), z, scale, gradient, x, second, dz1, dz2, dots, M, D, base.shape[0],
            x.stride(0), second.stride(0), MIN_LENGTH, width, rows, need_scale, need_z,
        )  # fmt: skip
    return dz1, dz2, dots.sum() if need_scale else dots


def multi_view_grad_q(
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    mean: Tensor,
    weight: Tensor,
    grad_loss: Tensor,
    offset: int,
    need_q: bool,
    need_scale: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients of q (V, M, D) and of the scale (); empty where not needed.

    mean (P * M, D), weight (P * M,), grad_loss (P, M) or ().
    """
    (views, M, D), N = q.shape, k.shape[1]
    strides = grad_loss.stride() if grad_loss.dim() else (0, 0)
    grad_q, dots = torch.empty_like(q) if need_q else q.new_empty(0), mean.new_empty(views * M if need_scale else 0)
    width, rows = program_shape(D)
    with on_device(q):
        multi_view_grad_q_kernel[(cdiv(M, rows), views)](
            q, k, scale, mean, weight, grad_loss, grad_q, dots, M, N, D, offset, *strides, width, rows,
            views, need_scale, need_q,
        )  # fmt: skip
    return grad_q, dots.sum() if need_scale else dots
