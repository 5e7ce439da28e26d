"""The CPU path of the contrastive ops: the passes of the Triton kernels, in PyTorch, over tiles that fit the cache.

A tile of logits is one matmul and an exponential in place; a second matmul reduces it. float32, bfloat16 and float16
are computed in float32, float64 in float64. Functions have the names and signatures of :mod:`.gpu`.

The bound ``max |q| max |k| scale`` on every logit costs O((M + N) D) and chooses between two variants. *direct* has no
shift, since no exponential can leave the range of float32. *online* has a running maximum.

The forward pass caches its first tiles for the gradient, up to 31 MiB (2850 x 2850 logits). Without them ``info_nce``
with its gradient takes 1.35 times as long at M = N = 2048, and ``clip_loss`` 1.27 times.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from vito_kernels._core.autograd import softplus
from vito_kernels._core.checks import check_finite, check_positive_range
from vito_kernels.contrastive.cpu_matmul import add_product, product
from vito_kernels.contrastive.terms import LOG2E, Mask, PositiveTerm, SoftmaxGrad, ordered_pairs, split_sum

ROWS, COLUMNS = 384, 512  # of a tile for each thread: float32 of 768 KiB, near the cache that a core has to itself
CACHE_BYTES = 31 << 20  # glibc maps fresh pages beyond 32 MiB; to touch those costs half as much as the product
HEADER = 16  # elements before the cached tiles: the first holds the tiles' rows, the others align what follows
DIRECT_BOUND = 96.0  # 2^96 summed over 2^30 keys stays below the largest float32, 2^-96 above the smallest

softmax_grad = SoftmaxGrad.of


def check_values(scale: Tensor, positive: Tensor | None = None, k: Tensor | None = None) -> None:
    """ValueError for a scale that is not finite or a positive that is no key; to read them from a GPU would stop the
    host.
    """
    check_finite(scale)
    if positive is not None and k is not None and positive.is_cpu:
        check_positive_range(positive, k.shape[0])


# ---- tiles


def apply_mask(mask: Mask, tile: Tensor, row: int, column: int, positives: Tensor | None = None) -> None:
    """Writes -inf over the masked elements of the tile whose first element is (row, column).

    Logits of positives go to ``positives`` (M, P) first: the key on the diagonal, or the other one of a block of two.
    """
    if mask.diagonal is not None:
        first, width = row + mask.diagonal, mask.width
        for place, peer in itertools.product(range(width), repeat=2):  # within the block: of a row, of a column
            i = (place - first) % width
            j = first + i - place + peer - column
            skipped = -(min(j, 0) // width) * width  # to the first of its columns within the tile
            masked = tile[i + skipped :: width, j + skipped :: width].diagonal()
            if positives is not None and (place != peer or width == 1):
                positives[row + i + skipped :: width, 0][: len(masked)] = masked
            masked.fill_(-math.inf)
    if mask.positive is not None:
        columns = mask.positive[row : row + tile.shape[0]] - column
        rows, p = ((columns >= 0) & (columns < tile.shape[1])).nonzero(as_tuple=True)
        if positives is not None:
            positives[row + rows, p] = tile[rows, columns[rows, p]]
        tile[rows, columns[rows, p]] = -math.inf
    if mask.q_group is not None and mask.k_group is not None:
        q_group, k_group = mask.q_group[row : row + tile.shape[0]], mask.k_group[column : column + tile.shape[1]]
        if q_group.min() <= k_group.max() and k_group.min() <= q_group.max():
            tile.masked_fill_(q_group[:, None] == k_group[None], -math.inf)


def tile_rows() -> int:
    """Rows of a tile; no tile takes more than 16 MiB, half of the cache for logits."""
    return ROWS * min(torch.get_num_threads(), 20)


def alloc_logit_cache(q: Tensor, k: Tensor, scale: Tensor, cache_logits: bool, symmetric: bool = False) -> Tensor:
    """Memory for tiles that a forward pass leaves to its gradient, or none; the size depends on shapes alone.

    Of a ``symmetric`` matrix one half is cached.
    """
    if not cache_logits:
        return scale.new_empty(0)
    logits = q.shape[0] * (torch.sym_min(k.shape[0], k.shape[0] // 2 + COLUMNS) if symmetric else k.shape[0])
    logit_cache = scale.new_empty(HEADER + torch.sym_min(logits, CACHE_BYTES // scale.itemsize))
    logit_cache[:HEADER] = 0  # nothing is cached yet
    return logit_cache


Grid = Iterator[tuple[slice, list[slice]]]  # bands of rows, and the columns of each one's tiles


def _slices(start: int, stop: int, step: int) -> list[slice]:
    return [slice(i, min(i + step, stop)) for i in range(start, stop, step)]


def _full_grid(rows: int, columns: int, step: int) -> Grid:
    for own in _slices(0, rows, step):
        yield own, _slices(0, columns, COLUMNS)


def _upper_grid(rows: int, columns: int, step: int) -> Grid:
    """Of a square matrix: in each band of rows the square on the diagonal, then the tiles right of it."""
    band, width = sorted((step, COLUMNS))
    for own in _slices(0, rows, band):
        yield own, [own, *_slices(own.stop, columns, width)]


class _Tiles:
    """(rows, columns, tile, out) for every tile of ``scale2 x y^T``, -inf where masked; exponentials if ``direct``.

    The caller may write to ``out``, which is the tile, or None if the tile is cached. ``positives`` (M, P) takes their
    logits. A forward pass fills ``logit_cache`` and notes its tile rows and variant in the header. A pass with
    ``read_cache`` over the same grid reads both, since the number of threads may have changed.
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        scale: Tensor,
        mask: Mask,
        logit_cache: Tensor | None = None,
        grid: Callable[[int, int, int], Grid] = _full_grid,
        read_cache: bool = False,
        positives: Tensor | None = None,
    ):
        self.positives = positives
        self.x, self.y, self.scale2, self.mask, self.grid = x, y, float(scale * LOG2E), mask, grid
        cache = x.new_empty(0) if logit_cache is None else logit_cache
        header = int(cache[0]) if read_cache and len(cache) else 0  # rows of a tile, negative where they are not direct
        self.read_cache, self.cached = read_cache, header != 0
        self.step = abs(header) or tile_rows()
        self.direct = header > 0 if self.cached else _is_direct(x, y, scale)
        self.cache = cache[HEADER:] if self.cached or not read_cache else cache[:0]
        if not read_cache and len(cache):
            cache[0] = self.step if self.direct else -self.step

    def __iter__(self) -> Iterator[tuple[slice, slice, Tensor, Tensor | None]]:
        used, capacity = 0, self.cache.shape[0]
        for own, others in self.grid(self.x.shape[0], self.y.shape[0], self.step):
            scaled = self.x[own] * self.scale2
            for other in others:
                shape = own.stop - own.start, other.stop - other.start
                size = shape[0] * shape[1]
                if used + size > capacity:
                    tile = self._compute(scaled, own, other)
                    yield own, other, tile, tile
                    continue
                tile = self.cache[used : used + size].view(shape)
                used += size
                if not self.cached:
                    self._compute(scaled, own, other, tile)
                yield own, other, tile, None
        if not self.read_cache:
            self.cache[used:].zero_()  # an op's outputs are the same every time

    def _compute(self, scaled: Tensor, own: slice, other: slice, out: Tensor | None = None) -> Tensor:
        if self.x is self.y and not self.direct:  # s_ij and s_ji count as one: the same to the last bit
            tile = product(self.x[own], self.y[other]).mul_(self.scale2)
        else:
            tile = product(scaled, self.y[other])
        apply_mask(self.mask, tile, own.start, other.start, self.positives)
        if self.direct:
            return torch.exp2(tile, out=tile if out is None else out)
        return tile if out is None else out.copy_(tile)


def _to_compute_dtype(x: Tensor) -> Tensor:
    return (x if x.dtype in (torch.float32, torch.float64) else x.float()).contiguous()


def _is_direct(q: Tensor, k: Tensor, scale: Tensor) -> bool:
    """Whether every logit is known to fit. A NaN says no, and reaches the result through the online variant."""
    q_norm = float(torch.linalg.vector_norm(q, dim=1).max())
    k_norm = q_norm if k is q else float(torch.linalg.vector_norm(k, dim=1).max())
    return q_norm * k_norm * abs(float(scale)) * LOG2E <= DIRECT_BOUND


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
    q, k = _to_compute_dtype(q), _to_compute_dtype(k)
    mean = q.new_zeros(q.shape if compute_grad_q else (0, q.shape[1]))
    tiles = _Tiles(q, k, scale, mask, logit_cache, positives=positives)
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


def multi_view_forward(
    q: Tensor, k: Tensor, scale: Tensor, mask: Mask, compute_grad_q: bool, matmul_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, weight, lse2, its residual), each (P, M), and the keys' means (P * M, D) or (0, D).

    q (V, M, D) and k (V, N, D) make P = V (V - 1) ordered pairs of views, each under ``mask``, whose diagonal holds the
    positives. ``weight`` is the derivative of the loss by lse, a sigmoid.
    """
    parts = [lse_forward(q[a], k[b], scale, mask, compute_grad_q) for a, b in ordered_pairs(len(q))]
    lse2, lse_residual, mean, logits = (torch.stack(part) for part in zip(*parts, strict=True))
    over = (lse2 - logits[:, :, 0]).add_(lse_residual).div_(LOG2E)
    return softplus(over), torch.sigmoid(over), lse2, lse_residual, mean.flatten(0, 1)


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
    x, y = _to_compute_dtype(x), _to_compute_dtype(y)
    tiles = _Tiles(x, y, scale, mask, logit_cache, positives=pairs)
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
    z = _to_compute_dtype(z)
    tiles = _Tiles(z, z, scale, mask, logit_cache, _upper_grid, positives=adjacent if mask.width == 2 else None)
    sums = _Sums(z, tiles.direct)
    for own, other, tile, out in tiles:
        if own != other:
            sums.add(other, tile, 0)
        sums.add(own, tile, 1, out)
    return *sums.lse2(), adjacent


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
) -> tuple[Tensor, Tensor]:
    """(W y (M, D), W^T x (N, D)) for W_ij = x_weight_i 2^(s_ij - x_lse2_i) + y_weight_j 2^(s_ij - y_lse2_j).

    Either softmax may be absent; an output not needed has no rows. Multiply by ``scale`` for the gradient.
    """
    x, y = _to_compute_dtype(x), _to_compute_dtype(y)
    gx = x.new_zeros(x.shape if need_x else (0, x.shape[1]))
    gy = y.new_zeros(y.T.shape if need_y else (y.shape[1], 0))
    tiles = _Tiles(x, y, scale, mask, logit_cache, read_cache=True)
    gain = _gain(x_softmax, y_softmax)
    rows, columns = (_prepare(softmax, tiles.direct, gain) for softmax in (x_softmax, y_softmax))
    for own, other, tile, out in tiles:
        parts = rows and rows.part((own, None)), columns and columns.part((None, other))
        weights = _weights(tile, out, tiles.direct, *parts)
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
    z = _to_compute_dtype(z)
    gz = z.new_zeros(z.shape)
    tiles = _Tiles(z, z, scale, mask, logit_cache, _upper_grid, read_cache=True)
    gain = _gain(softmax)
    both = _prepare(softmax, tiles.direct, gain)
    assert both is not None
    for own, other, tile, out in tiles:
        weights = _weights(tile, out, tiles.direct, both.part((own, None)), both.part((None, other)))
        if positive_term:
            _add_positive_term(weights, positive_term, own, other, gain)
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
    tile: Tensor, out: Tensor | None, direct: bool, rows: SoftmaxGrad | None, columns: SoftmaxGrad | None
) -> Tensor:
    """The tile of W, of one softmax or two that broadcast to it; ``out`` may be written over."""
    if direct:  # exp2(s) * (row_i + column_j): one exponential serves both
        return torch.mul(tile, sum(softmax.weight for softmax in (rows, columns) if softmax), out=out)
    parts = [torch.sub(tile, softmax.lse2).exp2_().mul_(softmax.weight) for softmax in (rows, columns) if softmax]
    return parts[0].add_(parts[1]) if len(parts) == 2 else parts[0]


def _add_positive_term(tile: Tensor, term: PositiveTerm, own: slice, other: slice, gain: float) -> None:
    rows, columns = term.group[own], term.group[other]
    if rows.min() <= columns.max() and columns.min() <= rows.max():
        both = torch.add(term.weight[own][:, None], term.weight[other]).mul_(gain)
        both.masked_fill_(rows[:, None] != columns, 0)
        tile.add_(both.fill_diagonal_(0) if own == other else both)


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
    adjacent: bool = False,
    other: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As ``epilogue.grad_epilogue``. May write over ``base``."""
    grad = base if weight is None else base * (weight * LOG2E)[:, None]
    if pair_weight is not None and k is not None:
        if adjacent:
            share = (pair_weight[::2] + pair_weight[1::2]) * LOG2E
            grad[::2].addcmul_(k[1::2].to(grad.dtype), share)
            grad[1::2].addcmul_(k[::2].to(grad.dtype), share)
        elif by_key:
            grad[-diagonal : len(k) - diagonal].addcmul_(k.to(grad.dtype), pair_weight, value=LOG2E)
        else:
            for p, keys in enumerate(_positive_keys(len(base), k, positive, diagonal)):
                grad.addcmul_(k[keys].to(grad.dtype), pair_weight[:, p, None], value=LOG2E)
    dscale = scale.new_empty(0) if other is None else (grad * other).sum()
    return grad.mul_(scale).to(dtype) if store else base.new_empty(0, dtype=dtype), dscale


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
    """The gradients of q (V, M, D) and of the scale (); empty where not needed. mean (P * M, D), grad_loss (P, M)."""
    share, views = (weight * grad_loss)[:, :, None], len(q)
    pull = (mean.view(views, views - 1, *q.shape[1:]) * share.unflatten(0, (views, views - 1))).sum(1)
    for pair, (a, b) in enumerate(ordered_pairs(views)):
        pull[a].addcmul_(k[b, offset : offset + q.shape[1]].to(pull.dtype), share[pair], value=-1)
    grad_scale = (pull * q).sum() if need_scale else mean.new_empty(0)
    return pull.mul_(scale).to(q.dtype) if need_q else q.new_empty(0), grad_scale


def _positive_keys(queries: int, k: Tensor, positive: Tensor | None, diagonal: int) -> list[Any]:
    """The positive keys of all queries, one entry for each column of positives."""
    if positive is None:
        return [slice(diagonal, diagonal + queries)]
    if positive.is_cuda:  # unchecked there; one that is no key made the loss NaN
        positive = positive.clamp(0, len(k) - 1)
    return list(positive.unbind(1))
