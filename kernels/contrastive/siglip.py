"""SigLIP: every pair of a row of x and a row of y is a yes-or-no question; no softmax, so that ranks need no sums.

    s    = scale * x @ y.T + bias                                   (M, N), never in memory
    loss = (softplus(s) off the diagonal, softplus(-s) on it).sum() / M

The forward pass (kind "sigmoid" of :mod:`.forward`) sums softplus(s) and p = sigmoid(s) by row, and with gradient
p @ y, of which the gradient of x is a scaling. That of y takes a second pass. The pairs on the diagonal are masked in
both and have a loss of their own, in which nothing cancels. 2 M N D flops without gradient, 4 M N D with that of x,
4 M N D more for that of y. Deterministic, no atomics.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vito_kernels._core.autograd import autograd_op, refuse_double_backward, register_flops
from vito_kernels._core.checks import (
    Reduction,
    autocast_inputs,
    check_paired,
    check_reduction,
    check_scale,
    needs_grad,
    reduce,
    scale_tensor,
)
from vito_kernels.contrastive import small
from vito_kernels.contrastive.gpu import path_of
from vito_kernels.contrastive.replay import replayed
from vito_kernels.contrastive.softplus_loss import softplus_loss
from vito_kernels.contrastive.terms import LOG2E, Mask, SoftmaxGrad

# ---- custom op


@torch.library.custom_op("vito_kernels::siglip", mutates_args=())
def siglip_op(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    diagonal: int | None,
    compute_grad_x: bool,
    matmul_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums over the pairs of each row of x with other rows of y.

    Args:
        x, y, scale, bias: (M, D), (N, D), (), ().
        diagonal: row i of x and row ``i + diagonal`` of y are a pair, and left out; None where there are no pairs.
        compute_grad_x: also compute ``mean``, which the gradients of x and the scale need.
        matmul_dtype: holds the values of x and y exactly, for the tensor cores.

    Returns:
        The sums (M,) of softplus(s), the logits of the pairs (M, 1) or (M, 0) without bias, in units of log 2, the sums
        (M,) of p = sigmoid(s), and mean = p @ y, (M, D) or (0, D).
    """
    path = path_of(x)
    path.check_values(scale)
    return path.sigmoid_forward(x, y, scale, bias, Mask(diagonal=diagonal), compute_grad_x, matmul_dtype)


@siglip_op.register_fake
def _(x, y, scale, bias, diagonal, compute_grad_x, matmul_dtype=None):
    (rows, width), new = x.shape, scale.new_empty
    return new(rows), new(rows, int(diagonal is not None)), new(rows), new(rows if compute_grad_x else 0, width)


@torch.library.custom_op("vito_kernels::siglip_backward", mutates_args=())
def siglip_backward_op(
    gradient: Tensor,
    g_pair: Tensor,
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    diagonal: int | None,
    shares: Tensor,
    mean: Tensor,
    need_x: bool,
    need_y: bool,
    need_scale: bool,
    need_bias: bool,
    matmul_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dy, dscale, dbias) for the gradients of the sums (M,) and of the pairs; one that is not needed is empty."""
    path, mask, gradient = path_of(x), Mask(diagonal=diagonal), gradient.contiguous()
    pair_weight, offset = g_pair if g_pair.shape[1] else None, diagonal or 0
    dx, dy, dscale, dbias = x.new_empty(0), y.new_empty(0), scale.new_empty(0), scale.new_empty(0)
    if need_x or need_scale:
        pairs = {"pair_weight": pair_weight, "k": y, "diagonal": offset, "other": x if need_scale else None}
        dx, dscale = path.grad_epilogue(mean, scale, x.dtype, store=need_x, weight=gradient / LOG2E, **pairs)
    if need_y:
        softmax = SoftmaxGrad((bias * -LOG2E).expand_as(shares).contiguous(), gradient)
        options = {"sigmoid": True, "parts": True}
        _, grad = path.lse_backward(x, y, scale, softmax, None, mask, False, True, matmul_dtype, **options)
        pairs = {"pair_weight": pair_weight, "k": x, "diagonal": -offset, "by_key": True}
        dy, _ = path.grad_epilogue(grad, scale, y.dtype, **pairs)
    if need_bias:
        dbias = (gradient * shares).sum()
    return dx, dy, dscale, dbias


@siglip_backward_op.register_fake
def _(
    gradient, g_pair, x, y, scale, bias, diagonal, shares, mean, need_x, need_y, need_scale, need_bias,
    matmul_dtype=None,
):  # fmt: skip
    return (
        x.new_empty(x.shape if need_x else 0),
        y.new_empty(y.shape if need_y else 0),
        scale.new_empty(() if need_scale else 0),
        scale.new_empty(() if need_bias else 0),
    )


def _setup_context(ctx, inputs, output):
    x, y, scale, bias, ctx.diagonal, _, ctx.matmul_dtype = inputs
    ctx.save_for_backward(x, y, scale, bias, *output[2:])
    ctx.set_materialize_grads(False)


def _backward(ctx, gradient, g_pair, *_):  # no gradient reaches the other outputs, which stay in this module
    x, y, scale, bias, shares, mean = ctx.saved_tensors
    needs = ctx.needs_input_grad[:4]
    gradient = torch.zeros_like(shares) if gradient is None else gradient
    g_pair = shares.new_zeros(len(shares), int(ctx.diagonal is not None)) if g_pair is None else g_pair.contiguous()
    inputs = x, y, scale, bias, ctx.diagonal, shares, mean
    grads = apply_siglip_backward(gradient, g_pair, *inputs, *needs, ctx.matmul_dtype)
    return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), None, None, None


register_flops(siglip_op, lambda x, y, compute_grad_x, **_: (4 if compute_grad_x else 2) * len(x) * len(y) * x.shape[1])
register_flops(siglip_backward_op, lambda x, y, need_y, **_: 4 * len(x) * len(y) * x.shape[1] if need_y else 0)
apply_siglip = autograd_op(siglip_op, _setup_context, _backward)
apply_siglip_backward = refuse_double_backward(siglip_backward_op)

# ---- public function


def siglip_of_sums(sums: Tensor, logits: Tensor, bias: Tensor, reduction: str) -> Tensor:
    """The losses of rows: their sums (M,) of softplus(s) and softplus(-s) of their pair, of logits (M, 1)."""
    below = (bias * -LOG2E).expand_as(sums)
    return softplus_loss(below, torch.zeros_like(sums), logits, reduction=reduction) + reduce(sums, reduction)


@replayed
def siglip_loss(
    x: Tensor, y: Tensor, scale: float | Tensor, bias: float | Tensor = 0.0, *, reduction: Reduction = "mean"
) -> Tensor:
    """The sigmoid loss of SigLIP (Zhai et al., arXiv 2303.15343), where row i of x belongs to row i of y.

    Equivalent, with ``s = scale * x @ y.T + bias`` and ``sign = 2 * eye(M) - 1``:
    ``-logsigmoid(sign * s).sum(1).mean()``.

    Args:
        x, y: (M, D), as q and k of ``similarity_lse``. Nothing is normalized here.
        scale, bias: numbers or tensors of one element, which may require grad. SigLIP starts at 10 and -10.
        reduction: "mean" or "sum" over the rows of x, or "none".

    Returns:
        A float32 scalar, or (M,) with "none".

    Raises:
        ValueError, TypeError: as ``similarity_lse``.

    Costs 2 M M D flops without gradient, 4 M M D with that of x, and 4 M M D more for that of y. Autocast and
    determinism as for ``similarity_lse``. Across ranks: ``vito_kernels.distributed.global_siglip_loss``.
    """
    check_paired(x, y, ("x", "y"))
    check_reduction(reduction)
    if not isinstance(bias, Tensor):
        bias = check_scale(bias, x, "bias")
    if not isinstance(bias, Tensor) and small.is_small(len(x), len(y), x, y):
        return small.pairs(x, y, scale, small.all_pairs(bias), reduction)
    (x, y), matmul_dtype = autocast_inputs(x, y)
    factor, shift = scale_tensor(scale, x), scale_tensor(bias, x)
    sums, logits, *_ = apply_siglip(x, y, factor, shift, 0, needs_grad(x, factor), matmul_dtype)
    return siglip_of_sums(sums, logits, shift, reduction)
