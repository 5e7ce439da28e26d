"""The CPU path: the same passes as the Triton kernels, in PyTorch, over tiles that stay in the cache.

A tile of logits is one matmul, an exponential in place, and a second matmul that takes it away. The first tiles are
kept for the gradient, which computes the others again: up to 31 MiB, 2850 x 2850 logits. They are in units of
log 2
throughout (``exp2`` costs less than ``exp``), so ``scale2`` is scale * log2(e). float32, bfloat16 and float16 are
computed in float32, float64 in float64.

Two variants, chosen by ``max |q| max |k| scale2``, a bound on every logit that costs O((M + N) D) to know:
*direct*, where no exponential can leave the range of float32 and none is shifted, and *online*, with a running maximum.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vito_kernels.contrastive.cpu_matmul import add_product, product

LOG2E = math.log2(math.e)
ROWS, COLUMNS = 384, 512  # of a tile for each thread: float32 of 768 KiB, near the cache that a core has to itself
KEPT = 31 << 20  # bytes that a forward pass leaves for its gradient: see ``alloc_logit_cache`` ...
HEADER = 16  # ... after the first elements, of which one says how it went, and the others align what follows
DIRECT_BOUND = 96.0  # 2^96 summed over 2^30 keys stays below the largest float32, 2^-96 above the smallest


@dataclass(frozen=True)
class Mask:
    """Which keys (columns) a query (row) does not see: those of its group, its positives, and the one on the
    diagonal.
    """

    q_group: Tensor | None = None
    k_group: Tensor | None = None
    positive: Tensor | None = None  # (M, P) columns
    diagonal: int | None = None  # row i does not see column i + diagonal ...
    width: int = 1  # ... nor any other of its block of so many columns

    def __post_init__(self) -> None:
        for name in ("q_group", "k_group", "positive"):  # kernels read them as dense
            ids = getattr(self, name)
            object.__setattr__(self, name, ids if ids is None else ids.contiguous())

    @property
    def blocks(self) -> int:
        """Width of the excluded blocks on the diagonal, 0 for none."""
        return 0 if self.diagonal is None else self.width

    def transposed(self) -> Mask:
        """The same pairs with queries and keys exchanged, for the layouts that both sides share."""
        assert self.positive is None
        return Mask(self.k_group, self.q_group, None, None if self.diagonal is None else -self.diagonal, self.width)

    def apply(self, tile: Tensor, row: int, column: int, positives: Tensor | None = None) -> None:
        """Writes -inf over the excluded elements of the tile whose first element is (row, column), after those that are
        positives went to ``positives`` (M, P): the key on the diagonal, or the other of a block of two.
        """
        if self.diagonal is not None:
            first, width = row + self.diagonal, self.width
            for place, other in itertools.product(range(width), repeat=2):  # within the block: of a row, of a column
                i = (place - first) % width
                j = first + i - place + other - column
                skipped = -(min(j, 0) // width) * width  # to the first of its columns within the tile
                excluded = tile[i + skipped :: width, j + skipped :: width].diagonal()
                if positives is not None and (place != other or width == 1):
                    positives[row + i + skipped :: width, 0][: len(excluded)] = excluded
                excluded.fill_(-math.inf)
        if self.positive is not None:
            rows = slice(row, row + tile.shape[0])
            _exclude(tile, self.positive[rows] - column, None if positives is None else positives[rows])
        if self.q_group is not None and self.k_group is not None:
            q_group, k_group = self.q_group[row : row + tile.shape[0]], self.k_group[column : column + tile.shape[1]]
            if q_group.min() <= k_group.max() and k_group.min() <= q_group.max():
                tile.masked_fill_(q_group[:, None] == k_group[None], -math.inf)


def _exclude(tile: Tensor, columns: Tensor, found: Tensor | None) -> None:
    """-inf into the given columns (rows, P) of each row; those outside the tile belong to others."""
    i, p = ((columns >= 0) & (columns < tile.shape[1])).nonzero(as_tuple=True)
    if found is not None:
        found[i, p] = tile[i, columns[i, p]]
    tile[i, columns[i, p]] = -math.inf


def _computed(x: Tensor) -> Tensor:
    return (x if x.dtype in (torch.float32, torch.float64) else x.float()).contiguous()


def _is_direct(q: Tensor, k: Tensor, scale: Tensor) -> bool:
    """Whether every logit is known to fit; a NaN anywhere says no, and then travels through the online variant."""
    longest = float(torch.linalg.vector_norm(q, dim=1).max())
    other = longest if k is q else float(torch.linalg.vector_norm(k, dim=1).max())
    return longest * other * abs(float(scale)) * LOG2E <= DIRECT_BOUND


def tile_rows() -> int:
    """On two cores with busy neighbors, 2048 rows took up to 10 % longer, on quiet ones 3 % less. No tile takes more
    than 16 MiB: see ``alloc_logit_cache``.
    """
    return ROWS * min(torch.get_num_threads(), 20)


def alloc_logit_cache(q: Tensor, k: Tensor, scale: Tensor, cache_logits: bool, half: bool = False) -> Tensor:
    """Memory in which a pass may keep tiles for another, or none; its size depends on shapes alone. ``half``
    of the
    matrix is enough where it is symmetric.

    What glibc gives beyond 32 MiB are fresh pages each time, and to touch those of a tile for the first time takes more
    than half as long as its product (D = 256): keeping more gained nothing at D <= 256, and 10 % at D = 1024.
    """
    if not cache_logits:
        return scale.new_empty(0)
    tiles = q.shape[0] * (torch.sym_min(k.shape[0], k.shape[0] // 2 + COLUMNS) if half else k.shape[0])
    logit_cache = scale.new_empty(HEADER + torch.sym_min(tiles, KEPT // scale.itemsize))
    logit_cache[:HEADER] = 0  # nothing is cached yet
    return logit_cache


Grid = Iterator[tuple[slice, list[slice]]]  # bands of rows, and the columns of each one's tiles


def _slices(start: int, stop: int, step: int) -> list[slice]:
    return [slice(i, min(i + step, stop)) for i in range(start, stop, step)]


def _whole(rows: int, columns: int, step: int) -> Grid:
    for own in _slices(0, rows, step):
        yield own, _slices(0, columns, COLUMNS)


def _upper(rows: int, columns: int, step: int) -> Grid:
    """Of a square matrix: in each band of rows the square on the diagonal, and then what is right of it."""
    band, wide = sorted((step, COLUMNS))
    for own in _slices(0, rows, band):
        yield own, [own, *_slices(own.stop, columns, wide)]


class _Tiles:
    """(rows, columns, tile, out) for every tile of ``scale2 x y^T``, -inf where excluded; where ``direct``, of its
    exponentials. ``out`` is where to write what is made of the tile: over it, or None if it is logit_cache.
    ``positives``
    (M, P) takes their logits.

    While there is room in ``logit_cache``, tiles stay there, and a pass with ``find`` over the same grid takes them as
    it
    finds them. They come first, and a header tells the later pass how the earlier one went about it.
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        scale: Tensor,
        mask: Mask,
        logit_cache: Tensor | None = None,
        grid: Callable[[int, int, int], Grid] = _whole,
        find: bool = False,
        positives: Tensor | None = None,
    ):
        self.positives = positives
        self.x, self.y, self.scale2, self.mask, self.grid = x, y, float(scale * LOG2E), mask, grid
        logit_cache = x.new_empty(0) if logit_cache is None else logit_cache
        header = (
            int(logit_cache[0]) if find and len(logit_cache) else 0
        )  # rows of a tile, negative where they are not direct
        self.find, self.found = find, header != 0
        self.step = abs(header) or tile_rows()
        self.direct = header > 0 if self.found else _is_direct(x, y, scale)
        self.logit_cache = logit_cache[HEADER:] if self.found or not find else logit_cache[:0]
        if not find and len(logit_cache):
            logit_cache[0] = self.step if self.direct else -self.step

    def __iter__(self) -> Iterator[tuple[slice, slice, Tensor, Tensor | None]]:
        used, capacity = 0, self.logit_cache.shape[0]
        for own, others in self.grid(self.x.shape[0], self.y.shape[0], self.step):
            scaled = self.x[own] * self.scale2
            for other in others:
                shape = own.stop - own.start, other.stop - other.start
                size = shape[0] * shape[1]
                if used + size > capacity:
                    tile = self._made(scaled, own, other)
                    yield own, other, tile, tile
                    continue
                logit_cache = self.logit_cache[used : used + size].view(shape)
                used += size
                if not self.found:
                    self._made(scaled, own, other, logit_cache)
                yield own, other, logit_cache, None
        if not self.find:
            self.logit_cache[used:].zero_()  # an op's outputs are the same every time

    def _made(self, scaled: Tensor, own: slice, other: slice, out: Tensor | None = None) -> Tensor:
        if self.x is self.y and not self.direct:  # s_ij and s_ji count as one: the same to the last bit
            tile = product(self.x[own], self.y[other]).mul_(self.scale2)
        else:
            tile = product(scaled, self.y[other])
        self.mask.apply(tile, own.start, other.start, self.positives)
        if self.direct:
            return torch.exp2(tile, out=tile if out is None else out)
        return tile if out is None else out.copy_(tile)


def forward(
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    mask: Mask,
    compute_grad_q: bool,
    logit_cache: Tensor | None = None,
    positives: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(lse2 (M,), its lse_residual, mean (M, D)): log-sum-exp of each row's logits and the keys' mean under its
    softmax; mean
    (0, D) unless asked. ``logit_cache`` is filled for ``gradient``, ``positives`` (M, P) with their logits: of the same
    products as the others, from which they may differ by little.
    """
    q, k = _computed(q), _computed(k)
    mean = q.new_zeros(q.shape if compute_grad_q else (0, q.shape[1]))
    tiles = _Tiles(q, k, scale, mask, logit_cache, positives=positives)
    sums = _Sums(q, tiles.direct)
    for own, other, tile, out in tiles:
        tile, old = sums.add(own, tile, 1, out)
        if compute_grad_q:
            if old is not None:
                mean[own].mul_(old[:, None])
            add_product(mean[own], tile, k[other].T)
    if compute_grad_q:
        mean.div_(sums.total.masked_fill(sums.total == 0, 1)[:, None])
    return *sums.lse2(), mean


class _Sums:
    """Sums (M,) of exponentials, one for each row or column of the matrix: as the tiles has_mean them where ``direct``,
    else relative to a running maximum.
    """

    def __init__(self, like: Tensor, direct: bool):
        self.total = like.new_zeros(len(like))
        self.top = None if direct else like.new_full((len(like),), -math.inf)

    def add(self, own: slice, tile: Tensor, dim: int, out: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Adds a tile over its ``dim``. Returns its exponentials, in ``out`` if given where they are new, and by what
        earlier sums were multiplied.
        """
        old = None
        if self.top is not None:
            new_top = torch.maximum(self.top[own], tile.amax(dim))
            shift = new_top.masked_fill(new_top == -math.inf, 0)  # what has seen nothing: exp2(-inf - 0) = 0
            old = torch.exp2(self.top[own] - shift)
            self.top[own] = new_top
            self.total[own].mul_(old)
            tile = torch.sub(tile, shift.unsqueeze(dim), out=out).exp2_()
        self.total[own].add_(tile.sum(dim))
        return tile, old

    def lse2(self) -> tuple[Tensor, Tensor]:
        """Log-sum-exp and its lse_residual."""
        small = self.total.log2()
        if self.top is None:
            return small, torch.zeros_like(small)
        lse2, lse_residual = torch.empty_like(small), torch.empty_like(small)
        split_sum(small, self.top.masked_fill(self.top == -math.inf, 0), lse2, lse_residual)
        return lse2, lse_residual


def split_sum(small: Tensor, large: Tensor, total: Tensor, lse_residual: Tensor) -> None:
    """``small + large`` as the float ``total`` and what it rounds away (Dekker); a log-sum-exp in the hundreds is
    rounded by more than its softmax may be.
    """
    torch.add(small, large, out=total)
    torch.add(large - total, small, out=lse_residual).nan_to_num_(nan=0.0)


def merge_splits(lse2: Tensor, lse_residual: Tensor, mean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One lse2 (M,), lse_residual (M,) and mean (M, D) out of those over disjoint sets of keys (S, ...), in a fixed
    order."""
    if lse2.shape[0] == 1:
        return lse2[0], lse_residual[0], mean[0]
    top = lse2.amax(0)
    top = top.masked_fill_(top == -torch.inf, 0)
    shares = torch.exp2(lse2 - top + lse_residual)
    total = shares.sum(0)
    whole, lost = torch.empty_like(top), torch.empty_like(top)
    split_sum(total.log2(), top, whole, lost)
    if mean.shape[1] == 0:
        return whole, lost, mean[0]
    return whole, lost, (mean * shares[:, :, None]).sum(0).div_(total.masked_fill(total == 0, 1)[:, None])


@dataclass(frozen=True)
class SoftmaxGrad:
    """One side's softmax in a gradient: ``weight`` is what arrives at each log-sum-exp ``lse2`` (log 2 units), both
    (rows,). ``seen``: rows that see nothing have lse2 = weight = 0 already.
    """

    lse2: Tensor
    weight: Tensor
    seen: bool = False

    @classmethod
    def of(cls, lse2: Tensor, lse_residual: Tensor, weight: Tensor) -> SoftmaxGrad:
        """With a log-sum-exp in two parts: p = 2^(s - lse2 - lse_residual), and the second part goes with the
        weight."""
        return cls(lse2, weight * torch.exp2(-lse_residual))

    def settled(self) -> SoftmaxGrad:
        """A row that sees nothing (lse = -inf) has no share in any gradient, whatever arrives at it."""
        if self.seen:
            return self
        empty = self.lse2 == -math.inf
        return SoftmaxGrad(self.lse2.masked_fill(empty, 0), self.weight.masked_fill(empty, 0), seen=True)

    def part(self, index: tuple[slice | None, ...]) -> SoftmaxGrad:
        return SoftmaxGrad(self.lse2[index], self.weight[index], self.seen)


@dataclass(frozen=True)
class PositiveTerm:
    """Of a set against itself: what W gains where i and j != i have one ``group`` (M,), ``weight`` (M,) of i and of j.

    Within W a positive of probability p keeps 1 - p to the last bit of p; as sums of embeddings, each rounded, the two
    would cancel.
    """

    group: Tensor
    weight: Tensor

    def add_to(self, tile: Tensor, own: slice, other: slice) -> None:
        """To the tile of W at these rows and columns, which are the same rows where it lies on the diagonal."""
        rows, columns = self.group[own], self.group[other]
        if rows.min() <= columns.max() and columns.min() <= rows.max():
            both = torch.add(self.weight[own][:, None], self.weight[other])
            both.masked_fill_(rows[:, None] != columns, 0)
            tile.add_(both.fill_diagonal_(0) if own == other else both)


def gradient(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    x_softmax: SoftmaxGrad | None,
    y_softmax: SoftmaxGrad | None,
    mask: Mask,
    need_x: bool,
    need_y: bool,
    logit_cache: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(W y (M, D), W^T x (N, D)) for W_ij = x_weight_i exp(s_ij - x_lse_i) + y_weight_j exp(s_ij - y_lse_j), in one
    pass over s.

    Either role may be absent; what is not needed comes back with no rows. Multiply by ``scale`` for the gradient.
    ``logit_cache`` is what the forward pass over the same x, y and mask left.
    """
    x, y = _computed(x), _computed(y)
    gx = x.new_zeros(x.shape if need_x else (0, x.shape[1]))
    gy = y.new_zeros(y.T.shape if need_y else (y.shape[1], 0))
    tiles = _Tiles(x, y, scale, mask, logit_cache, find=True)
    gain = _gain(x_softmax, y_softmax)
    rows, columns = (_prepared(role, tiles.direct, gain) for role in (x_softmax, y_softmax))
    for own, other, tile, out in tiles:
        roles = rows and rows.part((own, None)), columns and columns.part((None, other))
        weights = _weights(tile, out, tiles.direct, *roles)
        if need_x:
            add_product(gx[own], weights, y[other].T)
        if need_y:
            if other.start == 0:
                across = x[own].T.contiguous()
            add_product(gy[:, other], across, weights.T)
    return gx.div_(gain), gy.div_(gain).T.contiguous()


def _gain(*roles: SoftmaxGrad | None) -> float:
    """The power of two that brings the largest weight to 1, which may be the share of one row in a mean over millions:
    2^-lse of it shall not fall below the smallest float. Or as close to 1 as a float can has_mean it.
    """
    weights = [role.weight for role in roles if role is not None]
    largest, most = max(float(weight.abs().max()) for weight in weights), torch.finfo(weights[0].dtype).max
    return 2.0 ** min(-math.frexp(largest)[1], math.frexp(most)[1] - 2) if 0 < largest < math.inf else 1.0


def _prepared(role: SoftmaxGrad | None, direct: bool, gain: float) -> SoftmaxGrad | None:
    """The role as ``_weights`` takes it: where exponentials are direct, 2^-lse is part of the weight."""
    if role is None:
        return None
    role = role.settled()
    weight = role.weight * gain
    return SoftmaxGrad(role.lse2, weight * torch.exp2(-role.lse2) if direct else weight)


def _weights(
    tile: Tensor, out: Tensor | None, direct: bool, rows: SoftmaxGrad | None, columns: SoftmaxGrad | None
) -> Tensor:
    """The tile of W, of one role or two that broadcast to it; ``out`` may be written over."""
    if direct:  # exp2(s) * (row_i + column_j): one exponential supports both roles
        return torch.mul(tile, sum(role.weight for role in (rows, columns) if role), out=out)
    parts = [torch.sub(tile, role.lse2).exp2_().mul_(role.weight) for role in (rows, columns) if role]
    return parts[0].add_(parts[1]) if len(parts) == 2 else parts[0]


def two_sided(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    mask: Mask,
    logit_cache: Tensor | None = None,
    positives: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(row lse2 (M,), its lse_residual, column lse2 (N,), its lse_residual) in one pass over the logits: ``gradient``
    takes
    the very same for both, and rounded in another way, one of thousands would be off by more than its softmax may be.
    ``logit_cache`` is filled for it, ``positives`` (M, 1) as by ``forward``.
    """
    x, y = _computed(x), _computed(y)
    tiles = _Tiles(x, y, scale, mask, logit_cache, positives=positives)
    rows, columns = _Sums(x, tiles.direct), _Sums(y, tiles.direct)
    for own, other, tile, out in tiles:
        columns.add(other, tile, 0)
        rows.add(own, tile, 1, out)
    return *rows.lse2(), *columns.lse2()


def self_forward(
    z: Tensor, scale: Tensor, mask: Mask, logit_cache: Tensor | None = None, positives: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(lse2 (M,), its lse_residual) of ``forward(z, z)``; a logit right of the diagonal is computed once, for both its
    rows:
    M M D flops. ``logit_cache`` is filled for ``self_gradient``, ``positives`` (M, 1) as by ``forward``.
    """
    z = _computed(z)
    tiles = _Tiles(z, z, scale, mask, logit_cache, _upper, positives=positives)
    sums = _Sums(z, tiles.direct)
    for own, other, tile, out in tiles:
        if own != other:
            sums.add(other, tile, 0)
        sums.add(own, tile, 1, out)
    return sums.lse2()


def self_gradient(
    z: Tensor,
    scale: Tensor,
    role: SoftmaxGrad,
    mask: Mask,
    logit_cache: Tensor | None = None,
    pull: PositiveTerm | None = None,
) -> Tensor:
    """W z (M, D) of ``gradient(z, z)`` with one role on both sides, which makes W symmetric: 3 M M D flops."""
    z = _computed(z)
    gz = z.new_zeros(z.shape)
    tiles = _Tiles(z, z, scale, mask, logit_cache, _upper, find=True)
    gain = _gain(role)
    both, pull = _prepared(role, tiles.direct, gain), pull and PositiveTerm(pull.group, pull.weight * gain)
    assert both is not None
    for own, other, tile, out in tiles:
        weights = _weights(tile, out, tiles.direct, both.part((own, None)), both.part((None, other)))
        if pull:
            pull.add_to(weights, own, other)
        add_product(gz[own], weights, z[other].T)
        if own == other:
            across = z[own].T.contiguous()
        else:
            add_product(gz[other].T, across, weights.T)
    return gz.div_(gain)
