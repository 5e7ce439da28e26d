"""Tiles of logits on the CPU, each near the cache that a core has to itself.

The bound ``max |q| max |k| scale`` on every logit costs O((M + N) D) and chooses between two variants. *direct* has no
shift, since no exponential can leave the range of float32. *online* has a running maximum.

A forward pass caches its first tiles for the gradient, up to 31 MiB (2850 x 2850 logits). Without them ``info_nce``
with its gradient takes 1.35 times as long at M = N = 2048, and ``clip_loss`` 1.27 times.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from vito_kernels.contrastive.cpu_matmul import product
from vito_kernels.contrastive.terms import LOG2E, Mask

ROWS, COLUMNS = 384, 512  # of a tile for each thread: float32 of 768 KiB
CACHE_BYTES = 31 << 20  # glibc maps fresh pages beyond 32 MiB; to touch those costs half as much as the product
HEADER = 16  # elements before the cached tiles: the first holds the tiles' rows, the others align what follows
DIRECT_BOUND = 96.0  # 2^96 summed over 2^30 keys stays below the largest float32, 2^-96 above the smallest


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


def upper_grid(rows: int, columns: int, step: int) -> Grid:
    """Of a square matrix: in each band of rows the square on the diagonal, then the tiles right of it."""
    band, width = sorted((step, COLUMNS))
    for own in _slices(0, rows, band):
        yield own, [own, *_slices(own.stop, columns, width)]


class Tiles:
    """(rows, columns, tile, out) for every tile of ``scale2 x y^T``, -inf where masked; exponentials if ``direct``.

    The caller may write to ``out``, which is the tile, or None if the tile is cached. ``positives`` (M, P) takes their
    logits. A forward pass fills ``logit_cache`` and notes its tile rows and variant in the header. A pass with
    ``read_cache`` over the same grid reads both, since the number of threads may have changed. ``direct`` False asks
    for logits.
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
        direct: bool | None = None,
    ):
        self.positives = positives
        self.x, self.y, self.scale2, self.mask, self.grid = x, y, float(scale * LOG2E), mask, grid
        cache = x.new_empty(0) if logit_cache is None else logit_cache
        header = int(cache[0]) if read_cache and len(cache) else 0  # rows of a tile, negative where they are not direct
        self.read_cache, self.cached = read_cache, header != 0
        self.step = abs(header) or tile_rows()
        self.direct = header > 0 if self.cached else _is_direct(x, y, scale) if direct is None else direct
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


def to_compute_dtype(x: Tensor) -> Tensor:
    return (x if x.dtype in (torch.float32, torch.float64) else x.float()).contiguous()


def _is_direct(q: Tensor, k: Tensor, scale: Tensor) -> bool:
    """Whether every logit is known to fit. A NaN says no, and reaches the result through the online variant."""
    q_norm = float(torch.linalg.vector_norm(q, dim=1).max())
    k_norm = q_norm if k is q else float(torch.linalg.vector_norm(k, dim=1).max())
    return q_norm * k_norm * abs(float(scale)) * LOG2E <= DIRECT_BOUND
