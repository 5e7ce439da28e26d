"""The CPU path: the same passes as the Triton kernels, in PyTorch, over tiles that stay in the cache.

A tile of logits is one matmul into a buffer that is reused, an exponential in place, and a second matmul that takes
it away; memory is O(tile), whatever M and N. Logits are in units of log 2 throughout (``exp2`` costs less than
``exp``), so ``scale2`` is scale * log2(e). float32, bfloat16 and float16 are computed in float32, float64 in float64.

Two variants, chosen by ``max |q| max |k| scale2``, a bound on every logit that costs O((M + N) D) to know:
*direct*, where no exponential can leave the range of float32 and none is shifted, and *online*, with a running maximum.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

LOG2E = math.log2(math.e)
ROWS, COLUMNS = 384, 512  # of a tile for each thread: float32 of 768 KiB, near the cache that a core has to itself
DIRECT_BOUND = 96.0  # 2^96 summed over 2^30 keys stays below the largest float32, 2^-96 above the smallest


@dataclass(frozen=True)
class Exclusion:
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

    def flipped(self) -> Exclusion:
        """The same pairs with queries and keys exchanged, for the layouts that both sides share."""
        assert self.positive is None
        return Exclusion(
            self.k_group, self.q_group, None, None if self.diagonal is None else -self.diagonal, self.width
        )

    def apply(self, tile: Tensor, row: int, column: int) -> None:
        """Writes -inf over the excluded elements of the tile whose first element is (row, column)."""
        rows, columns = tile.shape
        if self.diagonal is not None:
            offset = row + self.diagonal - column
            if self.width == 1 and -rows < offset < columns:
                tile.diagonal(offset).fill_(-math.inf)
            elif self.width > 1 and -rows - self.width < offset < columns + self.width:
                own = torch.arange(offset + column, offset + column + rows, device=tile.device) // self.width
                block = torch.arange(self.width, device=tile.device)
                _exclude(tile, (own * self.width - column)[:, None] + block)
        if self.positive is not None:
            _exclude(tile, self.positive[row : row + rows] - column)
        if self.q_group is not None and self.k_group is not None:
            q_group, k_group = self.q_group[row : row + rows], self.k_group[column : column + columns]
            if q_group.min() <= k_group.max() and k_group.min() <= q_group.max():
                tile.masked_fill_(q_group[:, None] == k_group[None], -math.inf)


def _exclude(tile: Tensor, columns: Tensor) -> None:
    """-inf into the given columns (rows, P) of each row; those outside the tile belong to others."""
    i, p = ((columns >= 0) & (columns < tile.shape[1])).nonzero(as_tuple=True)
    tile[i, columns[i, p]] = -math.inf


def _computed(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _is_direct(q: Tensor, k: Tensor, scale2: Tensor) -> bool:
    """Whether every logit is known to fit; a NaN anywhere says no, and then travels through the online variant."""
    norms = torch.linalg.vector_norm(q, dim=1).max() * torch.linalg.vector_norm(k, dim=1).max()
    return bool(norms * scale2.abs() <= DIRECT_BOUND)


def tile_rows() -> int:
    """On two cores with busy neighbours, 2048 rows took up to 10 % longer, on quiet ones 3 % less."""
    return ROWS * torch.get_num_threads()


def _buffer(q: Tensor, k: Tensor) -> Tensor:
    return q.new_empty(min(tile_rows(), q.shape[0]) * min(COLUMNS, k.shape[0]))


def _logits(q: Tensor, k: Tensor, buffer: Tensor) -> Tensor:
    return torch.mm(q, k.T, out=buffer[: q.shape[0] * k.shape[0]].view(q.shape[0], k.shape[0]))


def forward(
    q: Tensor, k: Tensor, scale: Tensor, exclusion: Exclusion, bring_mean: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(lse2 (M,), mean (M, D)): log-sum-exp of each row's logits and the keys' mean under its softmax; mean (0, D)
    unless asked.
    """
    q, k = _computed(q), _computed(k)
    scale2 = scale * LOG2E
    lse2, rest = q.new_empty(q.shape[0]), q.new_empty(q.shape[0])
    mean = q.new_empty(q.shape if bring_mean else (0, q.shape[1]))
    rows = _direct_rows if _is_direct(q, k, scale2) else _online_rows
    buffer = _buffer(q, k)
    step = tile_rows()
    for row in range(0, q.shape[0], step):
        tile = slice(row, row + step)
        rows(q[tile] * scale2, k, row, exclusion, buffer, lse2[tile], rest[tile], mean[tile] if bring_mean else None)
    return lse2, rest, mean


def _direct_rows(
    q: Tensor,
    k: Tensor,
    row: int,
    exclusion: Exclusion,
    buffer: Tensor,
    lse2: Tensor,
    rest: Tensor,
    mean: Tensor | None,
) -> None:
    total = torch.zeros_like(lse2)
    for column in range(0, k.shape[0], COLUMNS):
        keys = k[column : column + COLUMNS]
        tile = _logits(q, keys, buffer)
        exclusion.apply(tile, row, column)
        tile.exp2_()
        total += tile.sum(1)
        if mean is not None:
            torch.addmm(mean, tile, keys, beta=float(column > 0), out=mean)
    torch.log2(total, out=lse2)
    rest.zero_()
    if mean is not None:
        mean.div_(total.masked_fill_(total == 0, 1)[:, None])


def _online_rows(
    q: Tensor,
    k: Tensor,
    row: int,
    exclusion: Exclusion,
    buffer: Tensor,
    lse2: Tensor,
    rest: Tensor,
    mean: Tensor | None,
) -> None:
    total, top = torch.zeros_like(lse2), torch.full_like(lse2, -math.inf)
    if mean is not None:
        mean.zero_()
    for column in range(0, k.shape[0], COLUMNS):
        keys = k[column : column + COLUMNS]
        tile = _logits(q, keys, buffer)
        exclusion.apply(tile, row, column)
        new_top = torch.maximum(top, tile.amax(1))
        shift = new_top.masked_fill(new_top == -math.inf, 0)  # a row that has seen no key yet: exp2(-inf - 0) = 0
        old = torch.exp2(top - shift)
        top = new_top
        tile.sub_(shift[:, None]).exp2_()
        total.mul_(old).add_(tile.sum(1))
        if mean is not None:
            torch.addmm(mean.mul_(old[:, None]), tile, keys, out=mean)
    split_sum(total.log2(), top.masked_fill_(top == -math.inf, 0), lse2, rest)
    if mean is not None:
        mean.div_(total.masked_fill_(total == 0, 1)[:, None])


def split_sum(small: Tensor, large: Tensor, total: Tensor, rest: Tensor) -> None:
    """``small + large`` as the float ``total`` and what it rounds away (Dekker); a log-sum-exp in the hundreds is
    rounded by more than its softmax may be.
    """
    torch.add(small, large, out=total)
    torch.add(large - total, small, out=rest).nan_to_num_(nan=0.0)


def merge_splits(lse2: Tensor, rest: Tensor, mean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One lse2 (M,), rest (M,) and mean (M, D) out of those over disjoint sets of keys (S, ...), in a fixed order."""
    if lse2.shape[0] == 1:
        return lse2[0], rest[0], mean[0]
    top = lse2.amax(0)
    top = top.masked_fill_(top == -torch.inf, 0)
    shares = torch.exp2(lse2 - top + rest)
    total = shares.sum(0)
    whole, lost = torch.empty_like(top), torch.empty_like(top)
    split_sum(total.log2(), top, whole, lost)
    if mean.shape[1] == 0:
        return whole, lost, mean[0]
    return whole, lost, (mean * shares[:, :, None]).sum(0).div_(total.masked_fill(total == 0, 1)[:, None])


@dataclass(frozen=True)
class Role:
    """One side's softmax in a gradient: ``weight`` is what arrives at each log-sum-exp ``lse2`` (log 2 units), both
    (rows,). ``seen``: rows that see nothing have lse2 = weight = 0 already.
    """

    lse2: Tensor
    weight: Tensor
    seen: bool = False

    @classmethod
    def of(cls, lse2: Tensor, rest: Tensor, weight: Tensor) -> Role:
        """With a log-sum-exp in two parts: p = 2^(s - lse2 - rest), and the second part goes with the weight."""
        return cls(lse2, weight * torch.exp2(-rest))


def gradient(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    x_role: Role | None,
    y_role: Role | None,
    exclusion: Exclusion,
    need_x: bool,
    need_y: bool,
) -> tuple[Tensor, Tensor]:
    """(W y (M, D), W^T x (N, D)) for W_ij = x_weight_i exp(s_ij - x_lse_i) + y_weight_j exp(s_ij - y_lse_j), in one
    pass over s.

    Either role may be absent; what is not needed comes back with no rows. Multiply by ``scale`` for the gradient.
    """
    x, y = _computed(x), _computed(y)
    scale2 = scale * LOG2E
    direct = _is_direct(x, y, scale2)
    gx = x.new_zeros(x.shape if need_x else (0, x.shape[1]))
    gy = y.new_zeros(y.shape if need_y else (0, y.shape[1]))
    buffer, second = _buffer(x, y), _buffer(x, y)
    step = tile_rows()
    for row in range(0, x.shape[0], step):
        own = slice(row, row + step)
        scaled = x[own] * scale2
        for column in range(0, y.shape[0], COLUMNS):
            other = slice(column, column + COLUMNS)
            tile = _logits(scaled, y[other], buffer)
            exclusion.apply(tile, row, column)
            weights = _weights(tile, second, direct, _part(x_role, own), _part(y_role, other))
            if need_x:
                gx[own].addmm_(weights, y[other])
            if need_y:
                gy[other].addmm_(weights.T, x[own])
    return gx, gy


def _part(role: Role | None, part: slice) -> tuple[Tensor, Tensor] | None:
    """The role's (lse in log 2 units, weight) for a slice of rows; a row that sees no key (lse = -inf) has no
    weight.
    """
    if role is None:
        return None
    lse2, weight = role.lse2[part], role.weight[part]
    empty = lse2 == -math.inf
    return lse2.masked_fill(empty, 0), weight.masked_fill(empty, 0)


def _weights(
    tile: Tensor,
    buffer: Tensor,
    direct: bool,
    rows: tuple[Tensor, Tensor] | None,
    columns: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """The tile of W in place of the tile of logits."""
    if direct:  # exp2(s) * (weight_i 2^-lse_i + weight_j 2^-lse_j): one exponential serves both roles
        tile.exp2_()
        row = rows[1] * torch.exp2(-rows[0]) if rows else None
        column = columns[1] * torch.exp2(-columns[0]) if columns else None
        if row is not None and column is not None:
            factor = buffer[: tile.numel()].view(tile.shape)
            return tile.mul_(torch.add(row[:, None], column[None], out=factor))
        return (
            tile.mul_(row[:, None])
            if row is not None
            else tile.mul_(column[None])
            if column is not None
            else tile.zero_()
        )
    other = buffer[: tile.numel()].view(tile.shape).copy_(tile) if rows and columns else tile
    if rows:
        tile.sub_(rows[0][:, None]).exp2_().mul_(rows[1][:, None])
    if columns:
        other.sub_(columns[0][None]).exp2_().mul_(columns[1][None])
    return tile.add_(other) if rows and columns else tile


def two_sided(x: Tensor, y: Tensor, scale: Tensor, exclusion: Exclusion) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(row lse2 (M,), its rest, column lse2 (N,), its rest) in one pass over the logits."""
    x, y = _computed(x), _computed(y)
    scale2 = scale * LOG2E
    if not _is_direct(x, y, scale2):
        return *forward(x, y, scale, exclusion, False)[:2], *forward(y, x, scale, exclusion.flipped(), False)[:2]
    rows, columns = x.new_zeros(x.shape[0]), y.new_zeros(y.shape[0])
    buffer = _buffer(x, y)
    step = tile_rows()
    for row in range(0, x.shape[0], step):
        own = slice(row, row + step)
        scaled = x[own] * scale2
        for column in range(0, y.shape[0], COLUMNS):
            other = slice(column, column + COLUMNS)
            tile = _logits(scaled, y[other], buffer)
            exclusion.apply(tile, row, column)
            tile.exp2_()
            rows[own] += tile.sum(1)
            columns[other] += tile.sum(0)
    return rows.log2_(), torch.zeros_like(rows), columns.log2_(), torch.zeros_like(columns)


def _upper(rows: int) -> Iterator[tuple[slice, slice]]:
    """Tiles of a square matrix: in each band of rows the square on the diagonal, and then what is right of it."""
    band, wide = sorted((tile_rows(), COLUMNS))
    for start in range(0, rows, band):
        middle = min(start + band, rows)
        yield slice(start, middle), slice(start, middle)
        for column in range(middle, rows, wide):
            yield slice(start, middle), slice(column, min(column + wide, rows))


def self_forward(z: Tensor, scale: Tensor, exclusion: Exclusion) -> tuple[Tensor, Tensor]:
    """(lse2 (M,), its rest) of ``forward(z, z)``; a logit right of the diagonal is computed once, for both its rows:
    M M D flops.
    """
    z, scale2 = _computed(z), scale * LOG2E
    if not _is_direct(z, z, scale2):
        return forward(z, z, scale, exclusion, False)[:2]
    total, buffer = z.new_zeros(z.shape[0]), _buffer(z, z)
    for own, other in _upper(z.shape[0]):
        tile = _logits(z[own] * scale2, z[other], buffer)
        exclusion.apply(tile, own.start, other.start)
        tile.exp2_()
        total[own] += tile.sum(1)
        if own != other:
            total[other] += tile.sum(0)
    return total.log2_(), torch.zeros_like(total)


def self_gradient(z: Tensor, scale: Tensor, role: Role, exclusion: Exclusion) -> Tensor:
    """W z (M, D) of ``gradient(z, z)`` with one role on both sides, which makes W symmetric: 3 M M D flops."""
    z, scale2 = _computed(z), scale * LOG2E
    direct = _is_direct(z, z, scale2)
    gz, buffer, second = torch.zeros_like(z), _buffer(z, z), _buffer(z, z)
    for own, other in _upper(z.shape[0]):
        tile = _logits(z[own] * scale2, z[other], buffer)
        exclusion.apply(tile, own.start, other.start)
        weights = _weights(tile, second, direct, _part(role, own), _part(role, other))
        gz[own].addmm_(weights, z[other])
        if own != other:
            gz[other].addmm_(weights.T, z[own])
    return gz
