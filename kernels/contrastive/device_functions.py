"""Device functions of the contrastive kernels: load rows in column chunks, multiply, mask.

D is cut into chunks of W columns and one narrower TAIL, as :mod:`.tile_configs` lays them out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vito_kernels._core.lazy_triton import jit

if TYPE_CHECKING:
    import triton.language as tl


@jit
def load_rows(
    x,
    x_tail,
    row,
    rows,
    stride,
    D: tl.constexpr,
    W: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK: tl.constexpr,
    CLEAN: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Rows ``row .. row + BLOCK`` as a tuple of column chunks, part after part, zero beyond the matrix.

    CLEAN promises that no row lies beyond it.
    """
    chunks = ()  # type: tuple
    index = tl.arange(0, BLOCK)
    if not TMA:  # one 64-bit address for the tile, 32-bit offsets within it
        x += tl.cast(row, tl.int64) * stride
    PARTS: tl.constexpr = 3 if PRECISION == "bf16x6" else 2 if PRECISION == "bf16x3" else 1
    for part in tl.static_range(PARTS):
        first = part * (D // W * W + TAIL)
        for c in tl.static_range(D // W):
            if TMA:
                chunks += (x.load([row, first + c * W]),)
            else:
                pointers = x + index[:, None] * stride + (first + c * W + tl.arange(0, W))[None]
                if CLEAN:
                    chunks += (tl.load(pointers),)
                else:
                    chunks += (tl.load(pointers, mask=(index < rows - row)[:, None], other=0.0),)
        if TAIL > 0:
            if TMA:
                chunks += (x_tail.load([row, first + D // W * W]),)
            else:
                column = D // W * W + tl.arange(0, TAIL)
                pointers = x + index[:, None] * stride + first + column[None]
                if CLEAN and D % W == TAIL:
                    chunks += (tl.load(pointers),)
                else:
                    chunks += (tl.load(pointers, mask=(index < rows - row)[:, None] & (column < D)[None], other=0.0),)
    return chunks


@jit
def product(a, b, acc, PRECISION: tl.constexpr):
    """a @ b + acc in float32. The interpreter multiplies the bits of bfloat16, so there both are widened (exactly)."""
    if PRECISION == "widened":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision="ieee")


@jit
def dot_rows(a, b, CHUNKS: tl.constexpr, PRECISION: tl.constexpr):
    """a (A, D) times the transpose of b (B, D), chunk by chunk, the smallest products of parts first."""
    PARTS: tl.constexpr = 3 if PRECISION == "bf16x6" else 2 if PRECISION == "bf16x3" else 1
    s = None
    for i in tl.static_range(PARTS):
        for j in tl.static_range(PARTS - i):
            for c in tl.static_range(CHUNKS):
                s = product(a[(PARTS - 1 - i - j) * CHUNKS + c], tl.trans(b[j * CHUNKS + c]), s, PRECISION)
    return s


@jit
def add_product(accs, p, b, CHUNKS: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, PRECISION: tl.constexpr):
    """accs + p @ b for the column chunks FIRST .. LAST of b; p is rounded to the dtype of b, or split as b is.

    Tensor cores truncate long sums: over 3000 keys by 1e-5 of a mean. So the products of parts get a sum of their own
    for each tile, largest last, and that is added with rounding.
    """
    PARTS: tl.constexpr = 3 if PRECISION == "bf16x6" else 2 if PRECISION == "bf16x3" else 1
    parts = ()  # type: tuple
    for _ in tl.static_range(PARTS):
        part = p.to(b[0].dtype)
        parts += (part,)
        p -= part.to(tl.float32)
    sums = ()  # type: tuple
    for c in tl.static_range(FIRST, LAST):
        if PARTS == 1:
            sums += (product(parts[0], b[c], accs[c - FIRST], PRECISION),)
        else:
            acc = None
            for i in tl.static_range(PARTS):
                for j in tl.static_range(PARTS - i):
                    acc = product(parts[PARTS - 1 - i - j], b[j * CHUNKS + c], acc, PRECISION)
            sums += (accs[c - FIRST] + acc,)
    return sums


@jit
def row_sums(p, LANES: tl.constexpr):
    """Sums of a tile's rows in LANES parts, within a thread: no shuffle in the loop."""
    return tl.sum(tl.reshape(p, (p.shape[0], p.shape[1] // LANES, LANES)), 1)


@jit
def zero_sums(BLOCK: tl.constexpr, D: tl.constexpr, W: tl.constexpr, TAIL: tl.constexpr, FIRST: tl.constexpr, LAST:
tl.constexpr):  # fmt: skip
    sums = ()  # type: tuple
    for c in tl.static_range(FIRST, LAST):
        sums += (tl.zeros((BLOCK, W if c < D // W else TAIL), tl.float32),)
    return sums


@jit
def store_sums(out, sums, row, rows, D: tl.constexpr, W: tl.constexpr, TAIL: tl.constexpr, BLOCK: tl.constexpr, FIRST:
tl.constexpr, LAST: tl.constexpr):  # fmt: skip
    """Writes column chunks FIRST .. LAST of rows ``row ..`` of a contiguous (rows, D) matrix."""
    index = tl.arange(0, BLOCK)
    out += tl.cast(row, tl.int64) * D
    for c in tl.static_range(FIRST, LAST):
        column = c * W + tl.arange(0, W if c < D // W else TAIL)
        inside = (index < rows - row)[:, None] & (column < D)[None]
        tl.store(out + index[:, None] * D + column[None], sums[c - FIRST], mask=inside)


@jit
def apply_mask(
    s,
    own,
    other,
    owns,
    others,
    own_group,
    other_group,
    positive,
    diagonal,
    GROUPS: tl.constexpr,
    DIAGONAL: tl.constexpr,
    POSITIVES: tl.constexpr,
    FLIPPED: tl.constexpr,
):
    """-inf for the masked pairs of ``own`` rows and ``other`` columns. With FLIPPED the queries are the columns.

    DIAGONAL is the width of the masked blocks on the diagonal, 0 for none.
    """
    seen = (other < others)[None]
    if DIAGONAL > 0:
        seen = seen & (((own + diagonal) // DIAGONAL)[:, None] != (other // DIAGONAL)[None])
    if GROUPS:
        own_id = tl.load(own_group + own, mask=own < owns, other=0)
        other_id = tl.load(other_group + other, mask=other < others, other=0)
        seen = seen & (own_id[:, None] != other_id[None])
    for p in tl.static_range(POSITIVES if POSITIVES <= 8 else 0):
        seen = seen & _no_positive(own, other, owns, others, positive, p, POSITIVES, FLIPPED)
    s = tl.where(seen, s, -float("inf"))
    if POSITIVES > 8:  # unrolled they spill
        for p in tl.range(0, POSITIVES, num_stages=1):
            s = tl.where(_no_positive(own, other, owns, others, positive, p, POSITIVES, FLIPPED), s, -float("inf"))
    return s


@jit
def _no_positive(own, other, owns, others, positive, p, POSITIVES: tl.constexpr, FLIPPED: tl.constexpr):
    """Whether a pair is not a query and its p-th positive."""
    if FLIPPED:
        key = tl.load(positive + tl.cast(other, tl.int64) * POSITIVES + p, mask=other < others, other=-1)
        return key[None] != own[:, None]
    else:
        key = tl.load(positive + tl.cast(own, tl.int64) * POSITIVES + p, mask=own < owns, other=-1)
        return key[:, None] != other[None]


@jit
def plan_tiles(own, others, first, last, diagonal, BLOCK: tl.constexpr, TILE: tl.constexpr, DIAGONAL: tl.constexpr):
    """Tiles among ``first .. last`` that need a mask: (start and count of those on the diagonal, end of the full ones).

    The diagonal of rows ``own .. own + BLOCK`` crosses few tiles, and only the last tile can be ragged.
    """
    full = tl.minimum(last, others // TILE)
    crossed = first
    crossing = 0
    if DIAGONAL > 0:
        crossed = tl.minimum(tl.maximum(tl.maximum(own + diagonal, 0) // TILE, first), full)
        beyond = tl.maximum(own + BLOCK - 1 + diagonal + TILE, 0) // TILE
        crossing = tl.maximum(tl.minimum(beyond, full) - crossed, 0)
    return crossed, crossing, full


@jit
def softplus(x):
    e = tl.exp(-tl.abs(x))
    u = 1.0 + e  # log(1 + e) to its last bit also where e is small: u - 1 has lost what u lost
    return tl.maximum(x, 0.0) + tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))


@jit
def softplus2(x):
    """log2(1 + 2^x) to 2e-7 of itself, by a polynomial: log2(1 + e) would forget a small e."""
    e = tl.exp2(-tl.abs(x))
    series = 0.007366149686276913 * e - 0.04182654991745949
    series = series * e + 0.11163681000471115
    series = series * e - 0.19607090950012207
    series = series * e + 0.2751408517360687
    series = series * e - 0.3582780957221985
    series = series * e + 0.48067617416381836
    series = series * e - 0.7213394045829773
    series = series * e + 1.4426950216293335
    return tl.maximum(x, 0.0) + e * series


@jit
def probability(over, SIGMOID: tl.constexpr):
    """Of a logit over its log-sum-exp, or with SIGMOID over the opposite of its offset; in units of log 2."""
    if SIGMOID:
        return 1.0 / (1.0 + tl.exp2(-over))
    else:
        return tl.exp2(over)


@jit
def sigmoid(x):
    e = tl.exp(-tl.abs(x))  # cannot overflow
    return tl.where(x > 0.0, 1.0, e) / (1.0 + e)


@jit
def merged_lse(lse2, lse_residual, row, M, splits):
    """(lse2, its residual) of those of splits (S, M), over disjoint sets of keys, as ``cpu.merge_splits``.

    Also (the largest, the sum relative to it), for ``merged_mean``.
    """
    top = tl.full(row.shape, -float("inf"), tl.float32)
    for s in range(splits):
        top = tl.maximum(top, tl.load(lse2 + tl.cast(s, tl.int64) * M + row, mask=row < M, other=-float("inf")))
    top = tl.where(top == -float("inf"), 0.0, top)
    total = tl.zeros(row.shape, tl.float32)
    for s in range(splits):
        total += _split_share(lse2, lse_residual, top, tl.cast(s, tl.int64) * M + row, row < M)
    log_total = tl.log2(total)
    whole = log_total + top
    return whole, tl.where(total == 0.0, 0.0, top - whole + log_total), top, total


@jit
def merged_mean(mean, lse2, lse_residual, top, total, row, column, inside, M, D, splits):
    """The mean of those of splits (S, M, D)."""
    acc = tl.zeros(inside.shape, tl.float32)
    for s in range(splits):
        part = tl.cast(s, tl.int64) * M + row
        share = _split_share(lse2, lse_residual, top, part, row < M)
        acc += share[:, None] * tl.load(mean + part[:, None] * D + column[None], mask=inside, other=0.0)
    return acc / tl.where(total == 0.0, 1.0, total)[:, None]


@jit
def _split_share(lse2, lse_residual, top, part, inside):
    own = tl.load(lse2 + part, mask=inside, other=-float("inf"))
    return tl.exp2(own - top + tl.load(lse_residual + part, mask=inside, other=0.0))


@jit
def ends_last(done):
    """Whether every other program has come here, so that what they stored is visible.

    An earlier kernel has zeroed the counter ``done``. Whichever program ends last, ``ordered_sum`` gives the same.
    """
    return tl.atomic_add(done, 1, sem="acq_rel") == tl.num_programs(0) - 1


@jit
def ordered_sum(parts, count):
    """Of numbers that other programs of this kernel stored."""
    total = tl.zeros((256,), tl.float32)
    for first in range(0, count, 256):
        index = first + tl.arange(0, 256)
        total += tl.load(parts + index, mask=index < count, other=0.0, cache_modifier=".cg")
    return tl.sum(total, 0)


@jit
def store_total(value, divisor, out, parts, done):
    """Stores the sum of every program's ``value`` over ``divisor``."""
    tl.store(parts + tl.program_id(0), value)
    if ends_last(done):
        tl.store(out, ordered_sum(parts, tl.num_programs(0)) / divisor)
