"""Losses in which both sides are queries: CLIP (rows and columns of one matrix of logits), NT-Xent (a set itself).

    s            = scale * x @ y.T                                      (M, N), never in memory
    row, column  = s.fill_diagonal_(-inf).logsumexp(1), .logsumexp(0)
    clip_loss    = (softplus(row - s.diagonal()).mean() + softplus(column - s.diagonal()).mean()) / 2

x (M, D) and y (N, D) are float32, bfloat16 or float16, with sums in float32. One pass over the logits gives row and
column sums (2 M N D flops). The gradients take two more, in one launch, each of which shares a logit between both
softmaxes (8 M N D). NT-Xent has a symmetric matrix and takes one (4 M M D). Deterministic, no memory of order M N.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vito_kernels._core.autograd import autograd_op, refuse_double_backward, register_flops
from vito_kernels._core.checks import (
    Reduction,
    autocast_enabled,
    autocast_inputs,
    check_flags,
    check_paired,
    check_reduction,
    inverse_temperature,
    needs_grad,
    scale_tensor,
    without_autocast,
)
from vito_kernels.contrastive import small
from vito_kernels.contrastive.gpu import path_of
from vito_kernels.contrastive.normalize import normalize, normalize_pair, unit_in_turns
from vito_kernels.contrastive.replay import replayed
from vito_kernels.contrastive.softplus_loss import divisor_of
from vito_kernels.contrastive.terms import Mask, SoftmaxGrad

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
    sides = (row, row_residual, g_row), (column, column_residual, g_column)
    x_softmax, y_softmax = path_of(x).softmax_grads(*sides)
    given = x, y, scale, diagonal, logit_cache, need_x, need_y, need_scale, matmul_dtype
    return _two_sided_gradients(None, x_softmax, y_softmax, g_pair, *given)


def _two_sided_gradients(
    gradient: Tensor | None,
    x_softmax: SoftmaxGrad,
    y_softmax: SoftmaxGrad,
    pair_weight: Tensor,
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    diagonal: int,
    logit_cache: Tensor,
    need_x: bool,
    need_y: bool,
    need_scale: bool,
    matmul_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dy, dscale), ``gradient`` times those of the weights."""
    path, mask, side = path_of(x), Mask(diagonal=diagonal), need_x or need_scale
    given = x_softmax, y_softmax, mask, side, need_y, matmul_dtype, logit_cache
    gx, gy = path.lse_backward(x, y, scale, *given, parts=True)
    bases = gx if side else None, gy if need_y else None
    dx, dscale, dy = path.grad_epilogues(*bases, scale, x, y, pair_weight, diagonal, None, need_x, need_scale, gradient)
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


def _forward_flops(x: Tensor, y: Tensor, **_: Any) -> int:
    return 2 * len(x) * len(y) * x.shape[1]


def _backward_flops(x: Tensor, y: Tensor, need_x: bool, need_y: bool, need_scale: bool, **_: Any) -> int:
    return 4 * ((need_x or need_scale) + need_y) * len(x) * len(y) * x.shape[1]


register_flops(two_sided_lse_op, _forward_flops)
register_flops(two_sided_lse_backward_op, _backward_flops)
apply_two_sided_lse = autograd_op(two_sided_lse_op, _two_sided_setup, _two_sided_backward)
apply_two_sided_lse_backward = refuse_double_backward(two_sided_lse_backward_op)

# ---- custom op: CLIP


@torch.library.custom_op("vito_kernels::two_sided_loss", mutates_args=())
def two_sided_loss_op(
    x: Tensor, y: Tensor, scale: Tensor, matmul_dtype: torch.dtype | None = None, cache_logits: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss of x (M, D) and y (M, D), and the weights of its gradients.

    Returns:
        The loss (), ``SoftmaxGrad`` of the rows and of the columns as lse2 and weight (M,), the derivative by the
        pairs' logits (M, 1) in units of log 2, and the logit cache.
    """
    path = path_of(x)
    path.check_values(scale)
    cache = path.alloc_logit_cache(x, y, scale, cache_logits)
    found = path.two_sided_loss_forward(x, y, scale, matmul_dtype, cache)
    row, column = found.softmaxes
    return found.loss, row.lse2, row.weight, column.lse2, column.weight, found.pair_weight, cache


@two_sided_loss_op.register_fake
def _(x, y, scale, matmul_dtype=None, cache_logits=False):
    m, cache = x.shape[0], path_of(x).alloc_logit_cache(x, y, scale, cache_logits)
    return *(scale.new_empty(shape) for shape in ((), m, m, m, m, (m, 1))), cache


@torch.library.custom_op("vito_kernels::two_sided_loss_backward", mutates_args=())
def two_sided_loss_backward_op(
    gradient: Tensor,
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    row: Tensor,
    row_weight: Tensor,
    column: Tensor,
    column_weight: Tensor,
    pair_weight: Tensor,
    logit_cache: Tensor,
    need_x: bool,
    need_y: bool,
    need_scale: bool,
    matmul_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dy, dscale), each rounded once; a gradient that is not needed is empty."""
    softmaxes, needs = (SoftmaxGrad(row, row_weight), SoftmaxGrad(column, column_weight)), (need_x, need_y, need_scale)
    return _two_sided_gradients(gradient, *softmaxes, pair_weight, x, y, scale, 0, logit_cache, *needs, matmul_dtype)


@two_sided_loss_backward_op.register_fake
def _(
    gradient, x, y, scale, row, row_weight, column, column_weight, pair_weight, logit_cache, need_x, need_y, need_scale,
    matmul_dtype=None,
):  # fmt: skip
    return (
        x.new_empty(x.shape if need_x else 0),
        y.new_empty(y.shape if need_y else 0),
        scale.new_empty(() if need_scale else 0),
    )


def _loss_setup(ctx, inputs, output):
    x, y, scale, ctx.matmul_dtype, _ = inputs
    ctx.save_for_backward(x, y, scale, *output[1:])
    ctx.set_materialize_grads(False)


def _loss_backward(ctx, gradient, *_):  # no gradient reaches the other outputs, which stay in this module
    if gradient is None:
        return (None,) * 5
    needs = ctx.needs_input_grad[:3]
    grads = apply_two_sided_loss_backward(gradient, *ctx.saved_tensors, *needs, ctx.matmul_dtype)
    return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), None, None


register_flops(two_sided_loss_op, _forward_flops)
register_flops(two_sided_loss_backward_op, _backward_flops)
apply_two_sided_loss = autograd_op(two_sided_loss_op, _loss_setup, _loss_backward)
apply_two_sided_loss_backward = refuse_double_backward(two_sided_loss_backward_op)

# ---- custom op: NT-Xent

OTHER_SAMPLES = Mask(diagonal=0, width=2)


@torch.library.custom_op("vito_kernels::ntxent", mutates_args=())
def ntxent_op(
    z1: Tensor,
    z2: Tensor,
    scale: Tensor,
    reduction: str,
    decoupled: bool,
    matmul_dtype: torch.dtype | None = None,
    cache_logits: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss of views z1 and z2 (B, D) of one dtype, and what its gradient needs.

    Returns:
        The loss () or (2B,), the normalized rows of both in turns (2B, D), in ``matmul_dtype`` if that is given,
        ``SoftmaxGrad`` as lse2 and weight (2B,), the derivative by the logits of positives (2B, 1) in units of log 2,
        and the logit cache.
    """
    path = path_of(z1)
    path.check_values(scale)
    z = unit_in_turns(z1, z2)
    z = z if matmul_dtype is None else z.to(matmul_dtype)
    cache = path.alloc_logit_cache(z, z, scale, cache_logits, symmetric=True)
    found = path.self_loss_forward(z, scale, OTHER_SAMPLES, divisor_of(reduction, len(z)), decoupled, cache)
    softmax = found.softmaxes[0]
    return found.loss, z, softmax.lse2, softmax.weight, found.pair_weight, cache


@ntxent_op.register_fake
def _(z1, z2, scale, reduction, decoupled, matmul_dtype=None, cache_logits=False):
    rows = 2 * z1.shape[0]
    z, new = z1.new_empty(rows, z1.shape[1], dtype=matmul_dtype), scale.new_empty
    cache = path_of(z).alloc_logit_cache(z, z, scale, cache_logits, symmetric=True)
    return new(rows if reduction == "none" else ()), z, new(rows), new(rows), new(rows, 1), cache


@torch.library.custom_op("vito_kernels::ntxent_backward", mutates_args=())
def ntxent_backward_op(
    gradient: Tensor,
    z1: Tensor,
    z2: Tensor,
    scale: Tensor,
    z: Tensor,
    lse2: Tensor,
    softmax_weight: Tensor,
    pair_weight: Tensor,
    logit_cache: Tensor,
    need_z: bool,
    need_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dz1, dz2, dscale). A logit serves p_ij and p_ji, so the gradient of the scale meets each from both ends."""
    path, factor = path_of(z), None if gradient.dim() else gradient
    if factor is None:  # of each row
        softmax_weight, pair_weight = softmax_weight * gradient, pair_weight * gradient[:, None]
    softmax = SoftmaxGrad(lse2, softmax_weight)
    base = path.self_backward(z, scale, softmax, OTHER_SAMPLES, None, None, logit_cache)
    dz1, dz2, dscale = path.views_epilogue(base, pair_weight, z, z1, z2, scale, factor, need_z, need_scale)
    return dz1, dz2, dscale / 2 if need_scale else dscale


@ntxent_backward_op.register_fake
def _(gradient, z1, z2, scale, z, lse2, softmax_weight, pair_weight, logit_cache, need_z, need_scale):
    sides = (x.new_empty(x.shape if need_z else 0) for x in (z1, z2))
    return *sides, scale.new_empty(() if need_scale else 0)


def _ntxent_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3], *output[1:])
    ctx.set_materialize_grads(False)


def _ntxent_backward(ctx, gradient, *_):  # no gradient reaches the other outputs, which stay in this module
    if gradient is None:
        return (None,) * 7
    need_first, need_second, need_scale = needs = ctx.needs_input_grad[:3]
    wanted = need_first or need_second, need_scale
    grads = apply_ntxent_backward(gradient, *ctx.saved_tensors, *wanted)
    return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), *(None,) * 4


def _ntxent_flops(z1: Tensor, **_: Any) -> int:
    return 8 * len(z1) ** 2 * z1.shape[1]


register_flops(ntxent_op, _ntxent_flops)
register_flops(ntxent_backward_op, lambda z1, **_: 2 * _ntxent_flops(z1))
apply_ntxent = autograd_op(ntxent_op, _ntxent_setup, _ntxent_backward)
apply_ntxent_backward = refuse_double_backward(ntxent_backward_op)

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
    (x, y), matmul_dtype = autocast_inputs(x, y)
    scale = scale_tensor(scale, x)
    return apply_two_sided_loss(x, y, scale, matmul_dtype, needs_grad(x, y, scale))[0]


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
    check_reduction(reduction)
    dtype, factor = torch.promote_types(z1.dtype, z2.dtype), scale_tensor(scale, z1)
    rounds = autocast_enabled(z1) and dtype == torch.float32
    options = torch.get_autocast_dtype(z1.device.type) if rounds else None, needs_grad(z1, z2, factor)
    loss, *_ = apply_ntxent(z1.to(dtype), z2.to(dtype), factor, reduction, decoupled, *options)
    return loss.view(-1, 2).T.flatten() if reduction == "none" else loss
