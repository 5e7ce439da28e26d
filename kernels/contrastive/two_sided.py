"""Losses in which both sides are queries: CLIP (rows and columns of one matrix of logits), NT-Xent (a set itself).

    s            = scale * x @ y.T                                      (M, N), never in memory
    row, column  = s.fill_diagonal_(-inf).logsumexp(1), .logsumexp(0)
    clip_loss    = (softplus(row - s.diagonal()).mean() + softplus(column - s.diagonal()).mean()) / 2

x (M, D) and y (N, D) are float32, bfloat16 or float16, with sums in float32. One pass over the logits gives row and
column sums (2 M N D flops). The gradients take two more, each of which shares a logit between both softmaxes (8 M N D).
NT-Xent has a symmetric matrix and takes one (4 M M D). Deterministic, no atomics, no memory of order M N.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vito_kernels._core.autograd import autograd_op, refuse_double_backward, register_flops
from vito_kernels._core.checks import (
    Reduction,
    autocast_inputs,
    check_flags,
    check_paired,
    inverse_temperature,
    needs_grad,
    scale_tensor,
    without_autocast,
)
from vito_kernels.contrastive import small
from vito_kernels.contrastive.gpu import path_of
from vito_kernels.contrastive.normalize import normalize, normalize_pair
from vito_kernels.contrastive.replay import replayed
from vito_kernels.contrastive.softplus_loss import softplus_loss
from vito_kernels.contrastive.terms import Mask

# ---- custom op: rows and columns


@torch.library.custom_op("vito_kernels::two_sided_lse", mutates_args=())
def two_sided_lse_op(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    diagonal: int,
    matmul_dtype: torch.dtype | None = None,
    cache_logits: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Log-sum-exps of rows and columns, where row i and column i + diagonal are a pair and masked for each other.

    Returns:
        row lse2 (M,), column lse2 (N,), logits of the pairs (M, 1), the residuals of both lse2, and the logit cache.
        ``matmul_dtype`` and ``cache_logits`` as for ``similarity_lse_op``.
    """
    path = path_of(x)
    path.check_values(scale)
    cache = path.alloc_logit_cache(x, y, scale, cache_logits)
    sums = path.two_sided_forward(x, y, scale, Mask(diagonal=diagonal), matmul_dtype, cache)
    row, row_residual, column, column_residual, pairs = sums
    return row, column, pairs, row_residual, column_residual, cache


@two_sided_lse_op.register_fake
def _(x, y, scale, diagonal, matmul_dtype=None, cache_logits=False):
    m, n = x.shape[0], y.shape[0]
    cache = path_of(x).alloc_logit_cache(x, y, scale, cache_logits)
    return *(scale.new_empty(shape) for shape in (m, n, (m, 1), m, n)), cache


@torch.library.custom_op("vito_kernels::two_sided_lse_backward", mutates_args=())
def two_sided_lse_backward_op(
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
    """(dx, dy, dscale), each rounded once; a gradient that is not needed is empty."""
    path, mask, side = path_of(x), Mask(diagonal=diagonal), need_x or need_scale
    softmaxes = path.softmax_grads((row, row_residual, g_row), (column, column_residual, g_column))
    gx, gy = path.lse_backward(x, y, scale, *softmaxes, mask, side, need_y, matmul_dtype, logit_cache, parts=True)
    bases = gx if side else None, gy if need_y else None
    dx, dscale, dy = path.grad_epilogues(*bases, scale, x, y, g_pair, diagonal, None, need_x, need_scale)
    return dx, dy, dscale


@two_sided_lse_backward_op.register_fake
def _(
    g_row, g_column, g_pair, x, y, scale, diagonal, row, column, row_residual, column_residual, logit_cache, need_x,
    need_y, need_scale, matmul_dtype=None,
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
    grads = apply_two_sided_lse_backward(*grads, x, y, scale, ctx.diagonal, *sums, *needs, ctx.matmul_dtype)
    return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), None, None, None


register_flops(two_sided_lse_op, lambda x, y, **_: 2 * len(x) * len(y) * x.shape[1])
register_flops(
    two_sided_lse_backward_op,
    lambda x, y, need_x, need_y, need_scale, **_: 4 * ((need_x or need_scale) + need_y) * len(x) * len(y) * x.shape[1],
)
apply_two_sided_lse = autograd_op(two_sided_lse_op, _two_sided_setup, _two_sided_backward)
apply_two_sided_lse_backward = refuse_double_backward(two_sided_lse_backward_op)

# ---- custom op: one set against itself

OTHER_SAMPLES = Mask(diagonal=0, width=2)


@torch.library.custom_op("vito_kernels::self_lse", mutates_args=())
def self_lse_op(
    z: Tensor,
    scale: Tensor,
    matmul_dtype: torch.dtype | None = None,
    cache_logits: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-sum-exp of each embedding over those of other samples, and the logit of its positive.

    A sample is two adjacent rows, each the other's positive.

    Returns:
        lse2 (M,), logits (M, 1), the residual of lse2 (M,), and the logit cache. ``matmul_dtype`` and ``cache_logits``
        as for ``similarity_lse_op``.
    """
    path = path_of(z)
    path.check_values(scale)
    cache = path.alloc_logit_cache(z, z, scale, cache_logits, symmetric=True)
    lse2, lse_residual, logits = path.self_forward(z, scale, OTHER_SAMPLES, matmul_dtype, cache)
    return lse2, logits, lse_residual, cache


@self_lse_op.register_fake
def _(z, scale, matmul_dtype=None, cache_logits=False):
    cache, rows = path_of(z).alloc_logit_cache(z, z, scale, cache_logits, symmetric=True), z.shape[0]
    return scale.new_empty(rows), scale.new_empty(rows, 1), scale.new_empty(rows), cache


@torch.library.custom_op("vito_kernels::self_lse_backward", mutates_args=())
def self_lse_backward_op(
    g_lse2: Tensor,
    g_positive: Tensor,
    z: Tensor,
    scale: Tensor,
    lse2: Tensor,
    lse_residual: Tensor,
    logit_cache: Tensor,
    need_z: bool,
    need_scale: bool,
    matmul_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """(dz, dscale). A logit serves p_ij and p_ji, so the gradient of the scale meets each logit from both ends."""
    path, pairs = path_of(z), {"pair_weight": g_positive, "k": z, "adjacent": True}
    softmax = path.softmax_grad(lse2, lse_residual, g_lse2)
    grad = path.self_backward(z, scale, softmax, OTHER_SAMPLES, None, matmul_dtype, logit_cache)
    other = z if need_scale else None
    dz, dscale = path.grad_epilogue(grad, scale, z.dtype, store=need_z, other=other, **pairs)
    return dz, dscale / 2 if need_scale else dscale


@self_lse_backward_op.register_fake
def _(g_lse2, g_positive, z, scale, lse2, lse_residual, logit_cache, need_z, need_scale, matmul_dtype=None):
    return z.new_empty(z.shape if need_z else 0), scale.new_empty(() if need_scale else 0)


def _self_setup(ctx, inputs, output):
    z, scale, ctx.matmul_dtype, _ = inputs
    lse2, _, *more = output
    ctx.save_for_backward(z, scale, lse2, *more)
    ctx.set_materialize_grads(False)


def _self_backward(ctx, g_lse2, g_positive, *_):
    z, scale, lse2, *more = ctx.saved_tensors
    need_z, need_scale = needs = ctx.needs_input_grad[:2]
    g_lse2 = torch.zeros_like(lse2) if g_lse2 is None else g_lse2.contiguous()
    g_positive = lse2.new_zeros(len(lse2), 1) if g_positive is None else g_positive.contiguous()
    dz, dscale = apply_self_lse_backward(g_lse2, g_positive, z, scale, lse2, *more, *needs, ctx.matmul_dtype)
    return dz if need_z else None, dscale if need_scale else None, None, None


register_flops(self_lse_op, lambda z, **_: 2 * len(z) ** 2 * z.shape[1])
register_flops(self_lse_backward_op, lambda z, **_: 4 * len(z) ** 2 * z.shape[1])
apply_self_lse = autograd_op(self_lse_op, _self_setup, _self_backward)
apply_self_lse_backward = refuse_double_backward(self_lse_backward_op)

# ---- public functions


@replayed
def clip_loss(x: Tensor, y: Tensor, scale: float | Tensor) -> Tensor:
    """The symmetric loss of CLIP, where row i of x belongs to row i of y.

    Equivalent, with ``s = scale * x @ y.T`` and ``labels = arange(M)``:
    ``(cross_entropy(s, labels) + cross_entropy(s.T, labels)) / 2``.

    Args:
        x, y: (M, D), as q and k of ``similarity_lse``. Nothing is normalized here.
        scale: the inverse temperature, a number or a tensor of one element, which may require grad.

    Returns:
        A float32 scalar.

    Raises:
        ValueError, TypeError: as ``similarity_lse``.

    Costs 2 M M D flops forward and 8 M M D backward; the CPU, which caches the first logits, at most 6 backward.
    Autocast and determinism as for ``similarity_lse``.
    """
    if small.is_small(x, y) and len(x) == len(y):
        return small.pairs(x, y, scale, small.rows_and_columns, "mean")
    check_paired(x, y, ("x", "y"))
    rows, columns, pairs, row_residual, column_residual = two_sided_lse(x, y, scale)
    return softplus_loss(rows, row_residual, pairs, columns, column_residual, reduction="mean")


def two_sided_lse(x: Tensor, y: Tensor, scale: float | Tensor, diagonal: int = 0) -> tuple[Tensor, ...]:
    """(lse2 of each row without its pair, of each column, logits of the pairs (M, 1), the residuals of both lse2)."""
    (x, y), matmul_dtype = autocast_inputs(x, y)
    scale = scale_tensor(scale, x)
    cache_logits = needs_grad(x, y, scale)
    return apply_two_sided_lse(x, y, scale, diagonal, matmul_dtype, cache_logits)[:5]


def unit_views(z1: Tensor, z2: Tensor) -> Tensor:
    """Normalized rows of both in turns (2B, D), in a dtype that holds either."""
    if z1.dtype == z2.dtype:
        return normalize_pair(z1, z2)
    with without_autocast(z1):  # under which ``stack`` refuses some
        return normalize(torch.stack([z1, z2], 1).flatten(0, 1))


def ntxent(
    z1: Tensor, z2: Tensor, temperature: float | Tensor, *, decoupled: bool = False, reduction: Reduction = "mean"
) -> Tensor:
    """NT-Xent (SimCLR): each embedding, normalized, finds its sample's other view among the 2B - 1 others.

    Equivalent: ``z = normalize(cat([z1, z2]))``, ``s = (z @ z.T / temperature).fill_diagonal_(-inf)``,
    ``cross_entropy(s, arange(2 * B).roll(B))``.

    Args:
        z1, z2: (B, D), dtypes as for ``similarity_lse``. Normalized in their own dtype, before autocast.
        temperature: a positive number or a tensor of one element, which may require grad.
        decoupled: leave the positive out of the denominator: the decoupled contrastive loss (Yeh et al., arXiv
            2110.06848).
        reduction: "mean", "sum" or "none".

    Returns:
        A float32 scalar, or (2B,) with "none", z1's rows first.

    Raises:
        ValueError, TypeError: as ``similarity_lse``.

    The matrix is symmetric, so one backward pass serves both roles of an embedding: 8 B B D flops forward, 16 B B D
    backward. The CPU takes each tile for its rows and its columns and caches the first: 4 and at most 12. Autocast and
    determinism as for ``similarity_lse``. Unit vectors of 16 bits are rounded to them, as in a matmul of PyTorch: at a
    temperature of .01 that moves the gradient of bfloat16 by 3e-2. Pass float32 embeddings there.
    """
    check_flags(decoupled=decoupled)
    return ntxent_of_scale(z1, z2, inverse_temperature(temperature), reduction, decoupled)


@replayed
def ntxent_of_scale(
    z1: Tensor, z2: Tensor, scale: float | Tensor, reduction: Reduction = "mean", decoupled: bool = False
) -> Tensor:
    """``ntxent`` at an inverse temperature, of any sign."""
    if small.is_small(z1, z2) and len(z1) == len(z2) and 4 * len(z1) ** 2 <= small.MOST_LOGITS:
        terms = small.decoupled_views if decoupled else small.two_views
        return small.unit_set((z1, z2), scale, terms, reduction)
    check_paired(z1, z2, ("z1", "z2"))
    (z,), matmul_dtype = autocast_inputs(unit_views(z1, z2))
    factor = scale_tensor(scale, z)
    lse2, logits, lse_residual, _ = apply_self_lse(z, factor, matmul_dtype, needs_grad(z, factor))
    loss = softplus_loss(lse2, lse_residual, logits, reduction=reduction, decoupled=decoupled)
    return loss.view(-1, 2).T.flatten() if reduction == "none" else loss
