"""Losses in which both sides are queries: CLIP (rows and columns of one matrix of logits) and NT-Xent (one set
against itself).

    s            = scale * x @ y.T                                      (M, N), never in memory
    row, column  = s.fill_diagonal_(-inf).logsumexp(1), .logsumexp(0)
    clip_loss    = (softplus(row - s.diagonal()).mean() + softplus(column - s.diagonal()).mean()) / 2

Row and column sums come from one pass over the logits (2 M N D flops), the gradients from two more that share each
logit between both softmaxes (8 M N D; for NT-Xent, whose matrix is symmetric, one: 4 M N D). A program owns a block
of rows and keeps their sums; column sums leave it as one partial sum for each block of rows, and these are added in
order, strip after strip of at most ``STRIP_BYTES`` of them: deterministic, no atomics, no memory of order M N.

Exponents are relative to the fixed shift of ``lse``, so partial sums merge by addition. Rows and columns whose
sum left the trusted range are repeated by the online kernel of ``lse``, blocks that hold none are left at once;
the host reads no value.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vito_kernels._core.autograd import autograd_op, refuse_double_backward, register_flops
from vito_kernels._core.checks import (
    check_finite,
    check_paired,
    inverse_temperature,
    reduce,
    scale_tensor,
    without_autocast,
)
from vito_kernels._core.lazy_triton import Spec, jit, on_device, processors
from vito_kernels.contrastive import cpu, epilogue, large_dim
from vito_kernels.contrastive.backward import launch_gradient, pair_gradient, softmax_grad
from vito_kernels.contrastive.cpu import Mask, PositiveTerm
from vito_kernels.contrastive.device_functions import apply_mask, dot_rows, load_rows, plan_tiles
from vito_kernels.contrastive.forward import launch_lse, trusted_lse
from vito_kernels.contrastive.info_nce import autocast, needs_grad, to_matmul_dtype
from vito_kernels.contrastive.normalize import normalize
from vito_kernels.contrastive.softplus_loss import softplus_loss
from vito_kernels.contrastive.tile_configs import (
    Matrix,
    Operand,
    Tile,
    cdiv,
    choose_tile,
    matrices,
    on_tensor_cores,
    products,
    runs_on_triton,
)

if TYPE_CHECKING:
    import triton.language as tl

STRIP_BYTES = 1 << 29  # of sums by column, one for each block of rows and column, at a time

# ---- Triton kernel


@jit
def _two_sided_lse_fwd_step(
    t, total, x, y, y_tail, scale2, shifts, own, column_sums, M, N, y_stride, diagonal, D: tl.constexpr,
    W: tl.constexpr, TAIL: tl.constexpr, TILE: tl.constexpr, CHUNKS: tl.constexpr, CLEAN: tl.constexpr,
    DIAGONAL: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of y: its exponentials, added to ``total`` (TILE, BLOCK) and written out as sums of columns.

    The tile is computed transposed, so that the sums which leave the loop lie along what a thread holds, and those
    that stay in it cross no thread.
    """
    BLOCK: tl.constexpr = total.shape[1]
    rows = load_rows(y, y_tail, t * TILE, N, y_stride, D, W, TAIL, TILE, CLEAN, TMA, PRECISION)
    other = t * TILE + tl.arange(0, TILE)
    if x[0].dtype == tl.float32 or (TILE < 64 and BLOCK >= 64):  # no tensor cores, or few rows for their left factor
        s = tl.trans(dot_rows(x, rows, CHUNKS, PRECISION))
    else:
        s = dot_rows(rows, x, CHUNKS, PRECISION)
    s = s * scale2 - shifts[None]
    if not CLEAN:
        s = tl.trans(apply_mask(tl.trans(s), own, other, M, N, None, None, None, diagonal, False, DIAGONAL, 0, False))
    p = tl.exp2(s)
    tl.store(column_sums + other, tl.sum(p, 1), mask=other < N)
    return total + p


@jit
def two_sided_lse_fwd_kernel(
    x, y, y_tail, scale, row_sums, column_sums, M, N, x_stride, y_stride, diagonal, split_tiles, D: tl.constexpr,
    W: tl.constexpr, TAIL: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
    DIAGONAL: tl.constexpr, HEADROOM: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """row_sums (splits, M) and column_sums (blocks of rows, N) of 2^(s log2(e) - shift)."""
    CHUNKS: tl.constexpr = D // W + (TAIL > 0)
    block, split = tl.program_id(0), tl.program_id(1)
    own = block * BLOCK + tl.arange(0, BLOCK)
    column_sums += tl.cast(block, tl.int64) * N
    scale2 = tl.load(scale) * 1.4426950408889634
    shifts = tl.where(own < M, tl.abs(scale2) - HEADROOM, float("inf"))  # rows beyond the matrix add nothing to columns
    rows = load_rows(x, x, block * BLOCK, M, x_stride, D, W, TAIL, BLOCK, False, False, PRECISION)
    total = tl.zeros((TILE, BLOCK), tl.float32)

    first = split * split_tiles
    last = tl.minimum(first + split_tiles, tl.cdiv(N, TILE))
    crossed, crossing, full = plan_tiles(block * BLOCK, N, first, last, diagonal, BLOCK, TILE, DIAGONAL)
    for i in tl.range(first, full - crossing, num_stages=STAGES):
        t = tl.where(i < crossed, i, i + crossing)
        total = _two_sided_lse_fwd_step(
            t, total, rows, y, y_tail, scale2, shifts, own, column_sums, M, N, y_stride, diagonal, D, W, TAIL, TILE,
            CHUNKS, True, DIAGONAL, TMA, PRECISION,
        )  # fmt: skip
    for i in tl.range(0, crossing + last - full, num_stages=1, disable_licm=D > 512):  # as in ``lse``, where it pays
        t = tl.where(i < crossing, crossed + i, full)
        total = _two_sided_lse_fwd_step(
            t, total, rows, y, y_tail, scale2, shifts, own, column_sums, M, N, y_stride, diagonal, D, W, TAIL, TILE,
            CHUNKS, False, DIAGONAL, TMA, PRECISION,
        )  # fmt: skip
    tl.store(row_sums + tl.cast(split, tl.int64) * M + own, tl.sum(total, 0), mask=own < M)


# ---- launcher


def headroom(dtype: torch.dtype) -> float:
    """Powers of two between the largest exponential and 1: the exponents of float32 shall keep their last
    bits."""
    return 20.0 if dtype == torch.float32 else 100.0


def launch_two_sided(x: Tensor, y: Tensor, scale: Tensor, mask: Mask) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(row lse2 (M,), its lse_residual, column lse2 (N,), its lse_residual), as ``cpu.two_sided``."""
    left, right = matrices(x, y)
    above, no_mean = headroom(x.dtype), scale.new_empty(0, x.shape[1])
    if large_dim.supports("two_sided", x.shape[1], x.dtype):
        dense = left.tensor, right.tensor
        rows, columns, _ = large_dim.exponentials(*dense, scale, mask, above, gather=False, columns=True)
    else:
        rows, columns = _launch_sums(left, right, scale, mask)
    side = trusted_lse(left, right, scale, mask, rows, above, no_mean)
    return *side, *trusted_lse(right, left, scale, mask.transposed(), columns, above, no_mean)


def _launch_sums(x: Matrix, y: Matrix, scale: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
    """(row_sums (parts, M), column_sums (parts, N)) by the kernel above, of all blocks of rows, or of strips of them
    one after the other.
    """
    (M, D), N = x.tensor.shape, y.tensor.shape[0]
    tile = choose_tile("two_sided", D, x.tensor.dtype)
    right, strip = Operand(y, tile.other, tile), max(1, STRIP_BYTES // (4 * N)) * tile.own
    if strip >= M:
        return _strip_sums(x, right, N, scale, mask, tile)
    row_sums, column_sums = [], scale.new_zeros(1, N)
    for begin in range(0, M, strip):
        diagonal = None if mask.diagonal is None else mask.diagonal + begin
        seen, part = replace(mask, diagonal=diagonal), Matrix(x.tensor[begin : begin + strip])
        rows, columns = (sums.sum(0) for sums in _strip_sums(part, right, N, scale, seen, tile))
        row_sums.append(rows)
        column_sums += columns
    return torch.cat(row_sums)[None], column_sums


def _strip_sums(x: Matrix, right: Operand, N: int, scale: Tensor, mask: Mask, tile: Tile) -> tuple[Tensor, Tensor]:
    """(row_sums (splits, M), column_sums (blocks of rows, N))."""
    (M, D), dtype, device = x.tensor.shape, x.tensor.dtype, x.tensor.device
    left = Operand(x, tile.own, tile)
    blocks, tiles = cdiv(M, tile.own), cdiv(N, tile.other)
    split_tiles = cdiv(tiles, max(1, min(processors(device) // blocks, tiles // 4)))
    row_sums = scale.new_empty(cdiv(tiles, split_tiles), M)
    column_sums = scale.new_empty(blocks, N)
    with on_device(x.tensor):
        two_sided_lse_fwd_kernel[(blocks, row_sums.shape[0])](
            left.matrix, right.source, right.tail_source, scale, row_sums, column_sums, M, N, left.stride, right.stride,
            mask.diagonal or 0, split_tiles, D, left.chunk, left.tail, tile.own, tile.other, tile.stages,
            DIAGONAL=mask.blocks, HEADROOM=headroom(dtype), TMA=right.tma, PRECISION=left.precision,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return row_sums, column_sums


def specs(device: str = "meta") -> list[Spec]:
    """The two-sided forward pass; its gradients are those of ``vito_kernels.contrastive.backward``."""
    return [
        _spec(width, dtype, diagonal, device)
        for width in (64, 128, 192, 256, 512, 1024)
        for dtype in (torch.bfloat16, torch.float32)
        for diagonal in (0, None)
    ]


def _spec(width: int, dtype: torch.dtype, diagonal: int | None, device: str = "meta", rows: int = 32768) -> Spec:
    """``diagonal`` is None where a block of another rank visits: no row has its pair there."""

    def launch() -> None:
        x = torch.randn(rows, width, dtype=dtype, device=device) / width**0.5
        launch_two_sided(x, x, torch.full((), 10.0, device=device), Mask(diagonal=diagonal))

    return Spec(
        f"two-sided lse D={width} {str(dtype)[6:]}" + (" visiting" if diagonal is None else ""),
        launch,
        flops=lambda: 2.0 * products(dtype, width) * rows * rows * width,
        min_bytes=2.0 * rows * width * dtype.itemsize + rows * 8,
        tensor_cores=partial(on_tensor_cores, dtype, width),
        rare=dtype != torch.bfloat16 or width not in (128, 256, 512),
    )


# ---- custom ops: rows and columns


def sums_and_pairs(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    diagonal: int | None,
    matmul_dtype: torch.dtype | None,
    logit_cache: Tensor | None = None,
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """(row lse2 (M,), its lse_residual, column lse2 (N,), its lse_residual), and the logits of pairs (M, 1), or (M, 0)
    without a
    diagonal.
    """
    mask = Mask(diagonal=diagonal)
    if runs_on_triton(x):
        sums = launch_two_sided(to_matmul_dtype(x, matmul_dtype), to_matmul_dtype(y, matmul_dtype), scale, mask)
        return sums, epilogue.positive_logits(x, y, scale, None, diagonal)
    pairs = scale.new_empty(x.shape[0], int(diagonal is not None))
    return cpu.two_sided(x, y, scale, mask, logit_cache, pairs), pairs


@torch.library.custom_op("vito_kernels::two_sided", mutates_args=())
def two_sided(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    diagonal: int,
    matmul_dtype: torch.dtype | None = None,
    cache_logits: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(row lse2 (M,), column lse2 (N,), logits of the pairs (M, 1), the lse_residuals of both, logit_cache): row i and
    column i +
    diagonal are a pair, and do not see each other. ``matmul_dtype`` and ``cache_logits`` as for ``contrast``.
    """
    check_finite(scale)
    logit_cache = cpu.alloc_logit_cache(x, y, scale, cache_logits and not runs_on_triton(x))
    (row, row_residual, column, column_residual), pairs = sums_and_pairs(
        x, y, scale, diagonal, matmul_dtype, logit_cache
    )
    return row, column, pairs, row_residual, column_residual, logit_cache


@two_sided.register_fake
def _(x, y, scale, diagonal, matmul_dtype=None, cache_logits=False):
    m, n = x.shape[0], y.shape[0]
    logit_cache = cpu.alloc_logit_cache(x, y, scale, cache_logits and not runs_on_triton(x))
    return *(scale.new_empty(shape) for shape in (m, n, (m, 1), m, n)), logit_cache


@torch.library.custom_op("vito_kernels::two_sided_backward", mutates_args=())
def two_sided_backward(
    g_row: Tensor,
    g_column: Tensor,
    g_pair: Tensor,
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    diagonal: int,
    row: Tensor,
    column: Tensor,
    row_residual: Tensor,
    column_residual: Tensor,
    logit_cache: Tensor,
    need_x: bool,
    need_y: bool,
    need_scale: bool,
    matmul_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dy, dscale), each rounded once; what is not needed comes back empty."""
    side, pairs = need_x or need_scale, slice(diagonal, diagonal + x.shape[0])
    mask = Mask(diagonal=diagonal)
    x_softmax, y_softmax = softmax_grad(row, row_residual, g_row), softmax_grad(column, column_residual, g_column)
    sides = to_matmul_dtype(x, matmul_dtype), to_matmul_dtype(y, matmul_dtype)
    gx, gy = pair_gradient(*sides, scale, x_softmax, y_softmax, mask, side, need_y, logit_cache)
    dx, dy, dscale = x.new_empty(0), y.new_empty(0), scale.new_empty(0)
    if runs_on_triton(x):
        if side:
            other = x if need_scale else None
            dx, dscale = epilogue.pull(
                gx, scale, x.dtype, store=need_x, pair_weight=g_pair, k=y, diagonal=diagonal, other=other
            )
        if need_y:
            dy, _ = epilogue.pull(gy, scale, y.dtype, pair_weight=g_pair, k=x, diagonal=-diagonal, by_key=True)
        return dx, dy, dscale
    if side:
        gx.addcmul_(y[pairs].to(gx.dtype), g_pair, value=cpu.LOG2E)
        dscale = (gx * x).sum() if need_scale else dscale
        dx = gx.mul_(scale).to(x.dtype) if need_x else dx
    if need_y:
        gy[pairs].addcmul_(x.to(gy.dtype), g_pair, value=cpu.LOG2E)
        dy = gy.mul_(scale).to(y.dtype)
    return dx, dy, dscale


@two_sided_backward.register_fake
def _(
    g_row, g_column, g_pair, x, y, scale, diagonal, row, column, row_residual, column_residual, logit_cache, need_x,
    need_y,
    need_scale, matmul_dtype=None,
):  # fmt: skip
    return (
        x.new_empty(x.shape if need_x else 0),
        y.new_empty(y.shape if need_y else 0),
        scale.new_empty(() if need_scale else 0),
    )


def _two_sided_setup(ctx, inputs, output):
    x, y, scale, ctx.diagonal, ctx.matmul_dtype, _ = inputs
    row, column, _, *more = output
    ctx.save_for_backward(x, y, scale, row, column, *more)
    ctx.set_materialize_grads(False)


def _two_sided_backward(ctx, g_row, g_column, g_pair, *_):
    x, y, scale, *sums = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    like = sums[0], sums[1], sums[0][:, None]
    grads = [
        torch.zeros_like(x) if g is None else g.contiguous()
        for g, x in zip((g_row, g_column, g_pair), like, strict=True)
    ]
    found = apply_two_sided_backward(*grads, x, y, scale, ctx.diagonal, *sums, *needs, ctx.matmul_dtype)
    return *(grad if need else None for grad, need in zip(found, needs, strict=True)), None, None, None


register_flops(two_sided, lambda x, y, **_: 2 * len(x) * len(y) * x.shape[1])
register_flops(
    two_sided_backward,
    lambda x, y, need_x, need_y, need_scale, **_: 4 * ((need_x or need_scale) + need_y) * len(x) * len(y) * x.shape[1],
)
apply_two_sided = autograd_op(two_sided, _two_sided_setup, _two_sided_backward)
apply_two_sided_backward = refuse_double_backward(two_sided_backward)

# ---- custom ops: one set against itself


@torch.library.custom_op("vito_kernels::self_contrast", mutates_args=())
def self_contrast(
    z: Tensor,
    scale: Tensor,
    group: Tensor | None,
    count: Tensor | None,
    matmul_dtype: torch.dtype | None = None,
    cache_logits: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(lse2 (M,), logits (M, 1) of positives, lse_residual (M,)) of each embedding over those of other samples.

    A sample is two neighboring rows, each the other's positive. Given ``group`` (M,), ids in [0, M), and the
    ``count`` (M,) of others in the same group, it is one row, and the logit the mean of theirs, 0 where there are none.
    ``matmul_dtype``, ``cache_logits``: as for ``contrast``.
    """
    check_finite(scale)
    side, mask = to_matmul_dtype(z, matmul_dtype), _others(group)
    logit_cache = cpu.alloc_logit_cache(z, z, scale, cache_logits and not runs_on_triton(z), half=True)
    if runs_on_triton(z):
        lse2, lse_residual, _ = launch_lse(side, side, scale, mask, False)
        logits = epilogue.positive_logits(z, z, scale, None, 0 if group is None else None, adjacent=True)
    else:
        logits = scale.new_empty(len(z), int(group is None))
        lse2, lse_residual = cpu.self_forward(side, scale, mask, logit_cache, logits if group is None else None)
    if group is not None and count is not None:
        logits = _group_logits(z, scale, group, count)
    return lse2, logits, lse_residual, logit_cache


def _others(group: Tensor | None) -> Mask:
    """What a row does not see: itself, and without groups its twin."""
    return Mask(diagonal=0, width=2 if group is None else 1)


def _group_logits(z: Tensor, scale: Tensor, group: Tensor, count: Tensor) -> Tensor:
    """All positives of a row at once, by the sum of their embeddings: O(M D). In float64, as thousands are added up and
    what the log-sum-exp leaves of them may be small.
    """
    wide = z.double()
    sums = torch.zeros_like(wide).index_put_((group,), wide, accumulate=True)[group].sub_(wide)
    return (wide * sums).sum(1, keepdim=True).div_(count.clamp(min=1)[:, None]).mul_(scale * cpu.LOG2E).to(scale.dtype)


@self_contrast.register_fake
def _(z, scale, group, count, matmul_dtype=None, cache_logits=False):
    logit_cache, rows = (
        cpu.alloc_logit_cache(z, z, scale, cache_logits and not runs_on_triton(z), half=True),
        z.shape[0],
    )
    return scale.new_empty(rows), scale.new_empty(rows, 1), scale.new_empty(rows), logit_cache


@torch.library.custom_op("vito_kernels::self_contrast_backward", mutates_args=())
def self_contrast_backward(
    g_lse2: Tensor,
    g_positive: Tensor,
    z: Tensor,
    scale: Tensor,
    group: Tensor | None,
    count: Tensor | None,
    lse2: Tensor,
    lse_residual: Tensor,
    logit_cache: Tensor,
    need_z: bool,
    need_scale: bool,
    matmul_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """(dz, dscale). p_ij and p_ji come from one logit: z is the owner and the other side at once, and so the gradient
    of the scale meets each logit from both of its ends.
    """
    role, pull = softmax_grad(lse2, lse_residual, g_lse2), None
    if group is not None and count is not None:
        pull = PositiveTerm(group.int(), g_positive[:, 0] / count.clamp(min=1) * cpu.LOG2E)
    side, mask = to_matmul_dtype(z, matmul_dtype), _others(group)
    if runs_on_triton(z):
        gz = launch_gradient(*matrices(side, side), scale, role, role, mask, pull)
        pairs: dict[str, Any] = {"pair_weight": g_positive, "k": z, "adjacent": True} if group is None else {}
        dz, dscale = epilogue.pull(gz, scale, z.dtype, store=need_z, other=z if need_scale else None, **pairs)
        return dz, dscale / 2 if need_scale else dscale
    gz = cpu.self_gradient(side, scale, role, mask, logit_cache, pull)
    if group is None:
        share = (g_positive[::2] + g_positive[1::2]) * cpu.LOG2E
        gz[::2].addcmul_(z[1::2].to(gz.dtype), share)
        gz[1::2].addcmul_(z[::2].to(gz.dtype), share)
    dscale = (gz * z).sum() / 2 if need_scale else scale.new_empty(0)
    return gz.mul_(scale).to(z.dtype) if need_z else z.new_empty(0), dscale


@self_contrast_backward.register_fake
def _(
    g_lse2, g_positive, z, scale, group, count, lse2, lse_residual, logit_cache, need_z, need_scale, matmul_dtype=None
):
    return z.new_empty(z.shape if need_z else 0), scale.new_empty(() if need_scale else 0)


def _self_setup(ctx, inputs, output):
    z, scale, group, count, ctx.matmul_dtype, _ = inputs
    lse2, _, *more = output
    ctx.save_for_backward(z, scale, group, count, lse2, *more)
    ctx.set_materialize_grads(False)


def _self_backward(ctx, g_lse2, g_positive, *_):
    z, scale, group, count, lse2, *more = ctx.saved_tensors
    need_z, need_scale = needs = ctx.needs_input_grad[:2]
    g_lse2 = torch.zeros_like(lse2) if g_lse2 is None else g_lse2.contiguous()
    g_positive = lse2.new_zeros(len(lse2), 1) if g_positive is None else g_positive.contiguous()
    sets = z, scale, group, count
    dz, dscale = apply_self_backward(g_lse2, g_positive, *sets, lse2, *more, *needs, ctx.matmul_dtype)
    return dz if need_z else None, dscale if need_scale else None, *(None,) * 4


register_flops(self_contrast, lambda z, **_: 2 * len(z) ** 2 * z.shape[1])
register_flops(self_contrast_backward, lambda z, **_: 4 * len(z) ** 2 * z.shape[1])
apply_self = autograd_op(self_contrast, _self_setup, _self_backward)
apply_self_backward = refuse_double_backward(self_contrast_backward)

# ---- public functions


def clip_loss(x: Tensor, y: Tensor, scale: float | Tensor) -> Tensor:
    """The symmetric loss of CLIP: x (M, D) and y (M, D), row i of one belongs to row i of the other. A float32 scalar.

    Equivalent, with ``s = scale * x @ y.T`` and ``labels = arange(M)``:
    ``(cross_entropy(s, labels) + cross_entropy(s.T, labels)) / 2``.

    Nothing is normalized here. 2 M M D flops forward and 8 M M D backward; on the CPU, which keeps the first
    logits, at most 6. ``scale`` is a number or a tensor of one element, which may require grad. Dtypes, errors,
    autocast and determinism as for ``similarity_lse``.
    """
    check_paired(x, y, ("x", "y"))
    rows, columns, pairs, *lse_residuals = two_sided_lse(x, y, scale)
    return softplus_loss(rows, lse_residuals[0], pairs, columns, lse_residuals[1]).mean()


def two_sided_lse(x: Tensor, y: Tensor, scale: float | Tensor, diagonal: int = 0) -> tuple[Tensor, ...]:
    """(lse2 of each row over the other rows of y, of each column over the other rows of x, logits of the pairs (M, 1),
    the lse_residuals of both lse2).
    """
    (x, y), matmul_dtype = autocast(x, y)
    scale = scale_tensor(scale, x)
    cache_logits = needs_grad(x, y, scale)
    return apply_two_sided(x, y, scale, diagonal, matmul_dtype, cache_logits)[:5]


def interleave(z1: Tensor, z2: Tensor) -> Tensor:
    """Rows of both in turns (2B, D), in a dtype that holds either: under autocast ``stack`` refuses some."""
    with without_autocast(z1):
        return torch.stack([z1, z2], 1).flatten(0, 1)


def ntxent(z1: Tensor, z2: Tensor, temperature: float | Tensor, *, reduction: str = "mean") -> Tensor:
    """NT-Xent (SimCLR): each of the 2B embeddings, normalized, finds the other view of its sample among the 2B - 1
    others.

    Equivalent: ``z = normalize(cat([z1, z2]))``, ``s = (z @ z.T / temperature).fill_diagonal_(-inf)``,
    ``cross_entropy(s, arange(2 * B).roll(B))``.

    z1, z2 (B, D). The matrix is symmetric, so one backward pass supports both roles of an embedding: 8 B B D flops
    forward, 16 B B D backward. The CPU path takes each tile of logits for both its rows and its columns and keeps the
    first of them: 4 and at most 12.
    ``reduction="none"`` gives (2B,), z1's rows first. Dtypes, errors, autocast and determinism as for
    ``similarity_lse``; embeddings are normalized in their own dtype, before autocast rounds them.
    """
    check_paired(z1, z2, ("z1", "z2"))
    scale = inverse_temperature(temperature)
    (z,), matmul_dtype = autocast(normalize(interleave(z1, z2)))
    factor = scale_tensor(scale, z)
    cache_logits = needs_grad(z, factor)
    lse2, logits, lse_residual, _ = apply_self(z, factor, None, None, matmul_dtype, cache_logits)
    loss = softplus_loss(lse2, lse_residual, logits)
    return reduce(loss.view(-1, 2).T.flatten() if reduction == "none" else loss, reduction)
