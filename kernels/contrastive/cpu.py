"""The CPU path of the contrastive ops: the passes of the Triton kernels, in PyTorch, over tiles that fit the cache.

A tile of logits (:mod:`.cpu_tiles`) is one matmul and an exponential in place; a second matmul reduces it. float32,
bfloat16 and float16 are computed in float32, float64 in float64. Functions have the names and signatures of
:mod:`.gpu`.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from vito_kernels._core.autograd import softplus
from vito_kernels._core.checks import check_finite, check_positive_range
from vito_kernels.contrastive.cpu_epilogue import (
    grad_epilogue,
    grad_epilogues,
    multi_view_grad_q,
    positive_keys,
    views_epilogue,
)
from vito_kernels.contrastive.cpu_matmul import add_product
from vito_kernels.contrastive.cpu_tiles import Tiles, alloc_logit_cache, to_compute_dtype, upper_grid
from vito_kernels.contrastive.sigmoid_loss import SigmoidLosses, torch_sigmoid_loss
from vito_kernels.contrastive.softplus_loss import RowLosses, torch_softplus_loss
from vito_kernels.contrastive.terms import LOG2E, Mask, PositiveTerm, SoftmaxGrad, ordered_pairs, split_sum

# The other functions of the path are defined here.
__all__ = ["alloc_logit_cache", "grad_epilogue", "grad_epilogues", "multi_view_grad_q", "views_epilogue"]

softmax_grad = SoftmaxGrad.of


def softmax_grads(*sides: tuple[Tensor, Tensor, Tensor]) -> list[SoftmaxGrad]:
    return [softmax_grad(*side) for side in sides]


def check_values(scale: Tensor, positive: Tensor | None = None, k: Tensor | None = None) -> None:
    """ValueError for a scale that is not finite or a positive that is no key; to read them from a GPU would stop the
    host.
    """
    check_finite(scale)
    if positive is not None and k is not None and positive.is_cpu:
        check_positive_range(positive, k.shape[0])


# ---- forward


class _Sums:
    """Sums (M,) of exponentials over rows or columns: direct, or relative to a running maximum."""

    def __init__(self, like: Tensor, direct: bool):
        self.total = like.new_zeros(len(like))
        self.max = None if direct else like.new_full((len(like),), -math.inf)

    def add(self, own: slice, tile: Tensor, dim: int, out: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Adds a tile over ``dim``. Returns its exponentials, in ``out`` if given, and the factor on earlier sums."""
        rescale = None
        if self.max is not None:
            new_max = torch.maximum(self.max[own], tile.amax(dim))
            shift = new_max.masked_fill(new_max == -math.inf, 0)  # fully masked so far: exp2(-inf - 0) = 0
            rescale = torch.exp2(self.max[own] - shift)
            self.max[own] = new_max
            self.total[own].mul_(rescale)
            tile = torch.sub(tile, shift.unsqueeze(dim), out=out).exp2_()
        self.total[own].add_(tile.sum(dim))
        return tile, rescale

    def lse2(self) -> tuple[Tensor, Tensor]:
        """Log-sum-exp and its residual."""
        small = self.total.log2()
        if self.max is None:
            return small, torch.zeros_like(small)
        lse2, residual = torch.empty_like(small), torch.empty_like(small)
        split_sum(small, self.max.masked_fill(self.max == -math.inf, 0), lse2, residual)
        return lse2, residual


def lse_forward(
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    mask: Mask,
    compute_grad_q: bool,
    matmul_dtype: torch.dtype | None = None,
    logit_cache: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(lse2 (M,), its residual, the keys' mean under each row's softmax (M, D) or (0, D), logits of positives (M, P)).

    Positives have logits of the same products as the other keys. NaN is left where a positive is no key.
    """
    positives = scale.new_full((len(q), mask.num_positives or int(mask.diagonal is not None)), math.nan)
    q, k = to_compute_dtype(q), to_compute_dtype(k)
    mean = q.new_zeros(q.shape if compute_grad_q else (0, q.shape[1]))
    tiles = Tiles(q, k, scale, mask, logit_cache, positives=positives)
    sums = _Sums(q, tiles.direct)
    for own, other, tile, out in tiles:
        tile, rescale = sums.add(own, tile, 1, out)
        if compute_grad_q:
            if rescale is not None:
                mean[own].mul_(rescale[:, None])
            add_product(mean[own], tile, k[other].T)
    if compute_grad_q:
        mean.div_(sums.total.masked_fill(sums.total == 0, 1)[:, None])
    return *sums.lse2(), mean, positives


def loss_forward(
    q: Tensor,
    k: Tensor,
    own_key: Tensor | None,
    scale: Tensor,
    mask: Mask,
    compute_grad_q: bool,
    divisor: float | None,
    decoupled: bool,
    matmul_dtype: torch.dtype | None = None,
    logit_cache: Tensor | None = None,
) -> RowLosses:
    """``lse_forward`` and the losses. The positive of query i may be ``own_key_i`` (M, D), which is no key."""
    lse2, lse_residual, mean, logits = lse_forward(q, k, scale, mask, compute_grad_q, matmul_dtype, logit_cache)
    if own_key is not None:
        logits = (to_compute_dtype(q) * own_key).sum(1, keepdim=True) * (scale * LOG2E)
    return replace(torch_softplus_loss([(lse2, lse_residual)], logits, divisor, decoupled), mean=mean)


def multi_view_forward(
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    mask: Mask,
    compute_grad_q: bool,
    divisor: float | None,
    matmul_dtype: torch.dtype | None = None,
) -> RowLosses:
    """The losses of P = V (V - 1) ordered pairs of views (P * M,), and the keys' means (P * M, D) or (0, D).

    q (V, M, D) and k (V, N, D). Each pair is under ``mask``, whose diagonal holds the positives.
    """
    parts = [lse_forward(q[a], k[b], scale, mask, compute_grad_q) for a, b in ordered_pairs(len(q))]
    lse2, lse_residual, mean, logits = (torch.cat(part) for part in zip(*parts, strict=True))
    return replace(torch_softplus_loss([(lse2, lse_residual)], logits, divisor, False), mean=mean)


def two_sided_forward(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    mask: Mask,
    matmul_dtype: torch.dtype | None = None,
    logit_cache: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(row lse2 (M,), its residual, column lse2 (N,), its residual, logits of pairs (M, 1)) in one pass.

    The gradient takes the very same logits for both; rounded in another way, a logit of thousands would be off by more
    than its softmax may be.
    """
    pairs = scale.new_empty(len(x), int(mask.diagonal is not None))
    x, y = to_compute_dtype(x), to_compute_dtype(y)
    tiles = Tiles(x, y, scale, mask, logit_cache, positives=pairs)
    rows, columns = _Sums(x, tiles.direct), _Sums(y, tiles.direct)
    for own, other, tile, out in tiles:
        columns.add(other, tile, 0)
        rows.add(own, tile, 1, out)
    return *rows.lse2(), *columns.lse2(), pairs


def self_forward(
    z: Tensor,
    scale: Tensor,
    mask: Mask,
    matmul_dtype: torch.dtype | None = None,
    logit_cache: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(lse2 (M,), its residual, logits of the adjacent row (M, 1), or (M, 0)) of z against itself: M M D flops."""
    adjacent = scale.new_empty(len(z), int(mask.width == 2))
    z = to_compute_dtype(z)
    tiles = Tiles(z, z, scale, mask, logit_cache, upper_grid, positives=adjacent if mask.width == 2 else None)
    sums = _Sums(z, tiles.direct)
    for own, other, tile, out in tiles:
        if own != other:
            sums.add(other, tile, 0)
        sums.add(own, tile, 1, out)
    return *sums.lse2(), adjacent


def two_sided_loss_forward(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    matmul_dtype: torch.dtype | None = None,
    logit_cache: Tensor | None = None,
) -> RowLosses:
    """``two_sided_forward`` and its mean loss, where row i of either belongs to row i of the other."""
    given = x, y, scale, Mask(diagonal=0), matmul_dtype, logit_cache
    row, row_residual, column, column_residual, pairs = two_sided_forward(*given)
    return torch_softplus_loss([(row, row_residual), (column, column_residual)], pairs, float(len(x)), False)


def self_loss_forward(
    z: Tensor, scale: Tensor, mask: Mask, divisor: float | None, decoupled: bool, logit_cache: Tensor | None = None
) -> RowLosses:
    """``self_forward`` and the losses, where adjacent rows are each other's positives."""
    lse2, lse_residual, logits = self_forward(z, scale, mask, None, logit_cache)
    return torch_softplus_loss([(lse2, lse_residual)], logits, divisor, decoupled)


def label_forward(
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    mask: Mask,
    label: Tensor,
    key_label: Tensor,
    one_set: bool,
    matmul_dtype: torch.dtype | None = None,
    logit_cache: Tensor | None = None,
    done: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(lse2 (M,), its residual, and as (1, M) the sum of the positives' logits less |scale| log2(e), their number).

    Positives are the keys of the query's label that the mask leaves: one product with their sum, in float64, since
    thousands are added up. The group of a label is its first place among the sorted ones, found without a host sync.
    """
    if one_set:
        lse2, lse_residual, _ = self_forward(q, scale, mask, matmul_dtype, logit_cache)
    else:
        lse2, lse_residual, *_ = lse_forward(q, k, scale, mask, False, matmul_dtype, logit_cache)
    ids, key_ids = label.long(), key_label.long()
    ordered = key_ids.sort().values
    first, past = (torch.searchsorted(ordered, ids, right=right) for right in (False, True))
    wide = q.double()
    keys = wide if one_set else k.double()
    sums = torch.zeros_like(keys).index_put_((torch.searchsorted(ordered, key_ids),), keys, accumulate=True)
    count, others = past - first, sums[first.clamp(max=len(k) - 1)]
    del sums
    if mask.diagonal is not None:  # the query is a key, and none of its own positives
        others.sub_(keys[mask.diagonal : mask.diagonal + len(q)])
        count = count - 1
    total = others.mul_(wide).sum(1)
    distances = LOG2E * (total * scale - count * scale.abs())
    return lse2, lse_residual, distances.masked_fill_(count == 0, 0)[None].to(scale.dtype), count[None].to(scale.dtype)


def sigmoid_forward(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    mask: Mask,
    compute_grad_x: bool,
    matmul_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums over the columns j that the mask leaves, of s_ij = scale x_i . y_j + bias.

    Of log2(1 + e^s) (M,), the logits of pairs (M, 1) or (M, 0), of the sigmoid p (M,), of p_ij y_j (M, D) or (0, D).
    """
    pairs = scale.new_empty(len(x), int(mask.diagonal is not None))
    x, y = to_compute_dtype(x), to_compute_dtype(y)
    total, shares = x.new_zeros(len(x)), x.new_zeros(len(x))
    mean, offset = x.new_zeros(x.shape if compute_grad_x else (0, x.shape[1])), bias.to(x.dtype) * LOG2E
    for own, other, tile, _ in Tiles(x, y, scale, mask, positives=pairs, direct=False):
        tile = tile.add_(offset).mul_(1 / LOG2E)
        total[own].add_(softplus(tile).sum(1))
        shares[own].add_(tile.sigmoid_().sum(1))
        if compute_grad_x:
            add_product(mean[own], tile, y[other].T)
    return total.mul_(LOG2E), pairs, shares, mean


def sigmoid_loss_forward(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    diagonal: int | None,
    compute_grad_x: bool,
    divisor: float | None,
    matmul_dtype: torch.dtype | None = None,
) -> SigmoidLosses:
    """``sigmoid_forward`` and the losses, where row i of x and row ``i + diagonal`` of y are a pair."""
    given = x, y, scale, bias, Mask(diagonal=diagonal), compute_grad_x, matmul_dtype
    sums, logits, shares, mean = sigmoid_forward(*given)
    return torch_sigmoid_loss(sums, shares, mean, logits, bias, divisor)


def rank_forward(q: Tensor, k: Tensor, scale: Tensor, mask: Mask, matmul_dtype: torch.dtype | None = None) -> Tensor:
    """How many keys that the mask leaves have a logit above that of the query's one positive; (M,) of scale's dtype."""
    q, k = to_compute_dtype(q), to_compute_dtype(k)
    (keys,) = positive_keys(len(q), k, mask.positive, mask.diagonal or 0)
    logits, count = (q * k[keys]).sum(1).mul_(scale * LOG2E), scale.new_zeros(len(q))
    for own, _, tile, _ in Tiles(q, k, scale, mask, direct=False):
        count[own] += (tile > logits[own, None]).sum(1)
    return count


def merge_splits(lse2: Tensor, lse_residual: Tensor, mean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One lse2 (M,), residual (M,) and mean (M, D) of those over disjoint sets of keys (S, ...), in a fixed order."""
    top = lse2.amax(0)
    top = top.masked_fill_(top == -torch.inf, 0)
    shares = torch.exp2(lse2 - top + lse_residual)
    total = shares.sum(0)
    merged, residual = torch.empty_like(top), torch.empty_like(top)
    split_sum(total.log2(), top, merged, residual)
    if mean.shape[1] == 0:
        return merged, residual, mean[0]
    return merged, residual, (mean * shares[:, :, None]).sum(0).div_(total.masked_fill(total == 0, 1)[:, None])


# ---- backward


def lse_backward(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    x_softmax: SoftmaxGrad | None,
    y_softmax: SoftmaxGrad | None,
    mask: Mask,
    need_x: bool,
    need_y: bool,
    matmul_dtype: torch.dtype | None = None,
    logit_cache: Tensor | None = None,
    *,
    positive_term: PositiveTerm | None = None,
    sigmoid: bool = False,
    parts: bool = False,
) -> tuple[Tensor, Tensor]:
    """(W y (M, D), W^T x (N, D)) for W_ij = x_weight_i 2^(s_ij - x_lse2_i) + y_weight_j 2^(s_ij - y_lse2_j).

    Either softmax may be absent; an output not needed has no rows. Multiply by ``scale`` for the gradient. With
    ``sigmoid`` W is that of ``weight_i / (1 + 2^(lse2_i - s_ij))``. There is one of the ``parts``.
    """
    x, y = to_compute_dtype(x), to_compute_dtype(y)
    gx = x.new_zeros(x.shape if need_x else (0, x.shape[1]))
    gy = y.new_zeros(y.T.shape if need_y else (y.shape[1], 0))
    tiles = Tiles(x, y, scale, mask, logit_cache, read_cache=True, direct=False if sigmoid else None)
    gain = _gain(x_softmax, y_softmax)
    rows, columns = (_prepare(softmax, tiles.direct, gain) for softmax in (x_softmax, y_softmax))
    for own, other, tile, out in tiles:
        sides = rows and rows.part((own, None)), columns and columns.part((None, other))
        weights = _weights(tile, out, tiles.direct, *sides, sigmoid)
        if positive_term:
            _add_positive_term(weights, positive_term, own, other, gain, mask)
        if need_x:
            add_product(gx[own], weights, y[other].T)
        if need_y:
            if other.start == 0:
                across = x[own].T.contiguous()
            add_product(gy[:, other], across, weights.T)
    return gx.div_(gain), gy.div_(gain).T.contiguous()


def self_backward(
    z: Tensor,
    scale: Tensor,
    softmax: SoftmaxGrad,
    mask: Mask,
    positive_term: PositiveTerm | None = None,
    matmul_dtype: torch.dtype | None = None,
    logit_cache: Tensor | None = None,
) -> Tensor:
    """W z (M, D) of ``lse_backward(z, z)`` with one softmax on both sides: W is symmetric, 3 M M D flops."""
    z = to_compute_dtype(z)
    gz = z.new_zeros(z.shape)
    tiles = Tiles(z, z, scale, mask, logit_cache, upper_grid, read_cache=True)
    gain = _gain(softmax)
    both = _prepare(softmax, tiles.direct, gain)
    assert both is not None
    for own, other, tile, out in tiles:
        weights = _weights(tile, out, tiles.direct, both.part((own, None)), both.part((None, other)))
        if positive_term:
            _add_positive_term(weights, positive_term, own, other, gain, mask, one_set=True)
        add_product(gz[own], weights, z[other].T)
        if own == other:
            across = z[own].T.contiguous()
        else:
            add_product(gz[other].T, across, weights.T)
    return gz.div_(gain)


def _gain(*softmaxes: SoftmaxGrad | None) -> float:
    """The power of two that brings the largest weight to 1, or as close as a float can.

    A weight may be the share of one row in a mean over millions; times 2^-lse it shall stay above the smallest float.
    """
    weights = [softmax.weight for softmax in softmaxes if softmax is not None]
    largest, most = max(float(weight.abs().max()) for weight in weights), torch.finfo(weights[0].dtype).max
    return 2.0 ** min(-math.frexp(largest)[1], math.frexp(most)[1] - 2) if 0 < largest < math.inf else 1.0


def _prepare(softmax: SoftmaxGrad | None, direct: bool, gain: float) -> SoftmaxGrad | None:
    """As ``_weights`` takes it: of direct exponentials, 2^-lse2 is part of the weight."""
    if softmax is None:
        return None
    weight = softmax.weight * gain
    return SoftmaxGrad(softmax.lse2, weight * torch.exp2(-softmax.lse2) if direct else weight)


def _weights(
    tile: Tensor,
    out: Tensor | None,
    direct: bool,
    rows: SoftmaxGrad | None,
    columns: SoftmaxGrad | None,
    sigmoid: bool = False,
) -> Tensor:
    """The tile of W, of one softmax or two that broadcast to it; ``out`` may be written over."""
    if direct:  # exp2(s) * (row_i + column_j): one exponential serves both
        return torch.mul(tile, sum(softmax.weight for softmax in (rows, columns) if softmax), out=out)
    over = [(torch.sub(tile, softmax.lse2), softmax.weight) for softmax in (rows, columns) if softmax]
    parts = [(x.mul_(1 / LOG2E).sigmoid_() if sigmoid else x.exp2_()).mul_(weight) for x, weight in over]
    return parts[0].add_(parts[1]) if len(parts) == 2 else parts[0]


def _add_positive_term(
    tile: Tensor, term: PositiveTerm, own: slice, other: slice, gain: float, mask: Mask, one_set: bool = False
) -> None:
    rows, columns = term.label[own], term.other_label[other]
    if rows.min() <= columns.max() and columns.min() <= rows.max():
        weight = term.weight[own, None]
        both = torch.add(weight, term.weight[other]) if one_set else weight.expand(tile.shape).contiguous()
        both.mul_(gain).masked_fill_(rows[:, None] != columns, 0)
        if mask.diagonal is not None:
            _diagonal(both, own.start + mask.diagonal - other.start).zero_()
        tile.add_(both)


def _diagonal(x: Tensor, offset: int) -> Tensor:
    """Of x (M, N), where the columns of the diagonal begin at ``offset``; empty beyond x."""
    return x.diagonal(offset) if -x.shape[0] < offset < x.shape[1] else x[:0, 0]
