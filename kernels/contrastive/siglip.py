"""SigLIP: every pair of a row of x and a row of y is a yes-or-no question; no softmax, so that ranks need no sums.

    s    = scale * x @ y.T + bias                                   (M, N), never in memory
    loss = (softplus(s) off the diagonal, softplus(-s) on it).sum() / M

The forward pass (kind "sigmoid" of :mod:`.forward`) sums softplus(s) and p = sigmoid(s) by row, and with gradient
p @ y, of which the gradient of x is a scaling. That of y takes a second pass. The pairs on the diagonal are masked in
both and have a loss of their own, in which nothing cancels (:mod:`.sigmoid_loss`). 2 M N D flops without gradient,
4 M N D with that of x, 4 M N D more for that of y. Deterministic.
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
    scale_tensor,
)
from vito_kernels.contrastive import small
from vito_kernels.contrastive.gpu import path_of
from vito_kernels.contrastive.replay import replayed
from vito_kernels.contrastive.softplus_loss import divisor_of
from vito_kernels.contrastive.terms import Mask, SoftmaxGrad

# ---- custom op


@torch.library.custom_op("vito_kernels::siglip", mutates_args=())
def siglip_op(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    diagonal: int | None,
    compute_grad_x: bool,
    reduction: str,
    matmul_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Losses of the rows of x and the weights of their gradients.

    Args:
        x, y, scale, bias: (M, D), (N, D), (), ().
        diagonal: row i of x and row ``i + diagonal`` of y are a pair; None where there are no pairs.
        compute_grad_x: also compute ``mean``, which the gradients of x and the scale need.
        reduction: "mean", "sum" or "none".
        matmul_dtype: holds the values of x and y exactly, for the tensor cores.

    Returns:
        The loss () or (M,), the sigmoid's ``SoftmaxGrad`` as lse2 and weight (M,), and of ``SigmoidLosses`` the weight
        (M,), pair_weight (M, 1) or (M, 0), bias_weight () or (M,), and mean (M, D) or (0, D).
    """
    path = path_of(x)
    path.check_values(scale)
    divisor = divisor_of(reduction, len(x))
    found = path.sigmoid_loss_forward(x, y, scale, bias, diagonal, compute_grad_x, divisor, matmul_dtype)
    softmax = found.softmax
    return found.loss, softmax.lse2, softmax.weight, found.weight, found.pair_weight, found.bias_weight, found.mean


@siglip_op.register_fake
def _(x, y, scale, bias, diagonal, compute_grad_x, reduction, matmul_dtype=None):
    (rows, width), new = x.shape, scale.new_empty
    reduced, pairs, mean = rows if reduction == "none" else (), int(diagonal is not None), rows if compute_grad_x else 0
    return new(reduced), new(rows), new(rows), new(rows), new(rows, pairs), new(reduced), new(mean, width)


@torch.library.custom_op("vito_kernels::siglip_backward", mutates_args=())
def siglip_backward_op(
    gradient: Tensor,
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    diagonal: int | None,
    lse2: Tensor,
    softmax_weight: Tensor,
    weight: Tensor,
    pair_weight: Tensor,
    bias_weight: Tensor,
    mean: Tensor,
    need_x: bool,
    need_y: bool,
    need_scale: bool,
    need_bias: bool,
    matmul_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dy, dscale, dbias), each rounded once to its input's dtype; one that is not needed is empty."""
    path, mask, factor = path_of(x), Mask(diagonal=diagonal), None if gradient.dim() else gradient
    if factor is None:  # of each row
        softmax_weight, weight = softmax_weight * gradient, weight * gradient
        pair_weight = pair_weight * gradient[:, None]
    base, key_base = mean if need_x or need_scale else None, None
    if need_y:
        given = SoftmaxGrad(lse2, softmax_weight), None, mask, False, True, matmul_dtype
        _, key_base = path.lse_backward(x, y, scale, *given, sigmoid=True, parts=True)
    options = None if diagonal is None else pair_weight, diagonal or 0, weight, need_x, need_scale, factor
    dx, dscale, dy = path.grad_epilogues(base, key_base, scale, x, y, *options)
    dbias = bias_weight * gradient if need_bias else scale.new_empty(0)
    return dx, dy, dscale, dbias.sum() if need_bias and factor is None else dbias


@siglip_backward_op.register_fake
def _(
    gradient, x, y, scale, bias, diagonal, lse2, softmax_weight, weight, pair_weight, bias_weight, mean, need_x, need_y,
    need_scale, need_bias, matmul_dtype=None,
):  # fmt: skip
    return (
        x.new_empty(x.shape if need_x else 0),
        y.new_empty(y.shape if need_y else 0),
        scale.new_empty(() if need_scale else 0),
        scale.new_empty(() if need_bias else 0),
    )


def _setup_context(ctx, inputs, output):
    x, y, scale, bias, ctx.diagonal, _, _, ctx.matmul_dtype = inputs
    ctx.save_for_backward(x, y, scale, bias, *output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, gradient, *_):  # no gradient reaches the other outputs, which stay in this module
    if gradient is None:
        return (None,) * 8
    x, y, scale, bias, *more = ctx.saved_tensors
    needs, inputs = ctx.needs_input_grad[:4], (x, y, scale, bias, ctx.diagonal)
    grads = apply_siglip_backward(gradient, *inputs, *more, *needs, ctx.matmul_dtype)
    return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), *(None,) * 4


register_flops(siglip_op, lambda x, y, compute_grad_x, **_: (4 if compute_grad_x else 2) * len(x) * len(y) * x.shape[1])
register_flops(siglip_backward_op, lambda x, y, need_y, **_: 4 * len(x) * len(y) * x.shape[1] if need_y else 0)
apply_siglip = autograd_op(siglip_op, _setup_context, _backward)
apply_siglip_backward = refuse_double_backward(siglip_backward_op)

# ---- public function


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
    if not (few := small.is_small(x, y) and len(x) == len(y)):
        check_paired(x, y, ("x", "y"))
    check_reduction(reduction)
    if not isinstance(bias, Tensor):
        bias = check_scale(bias, x, "bias")
    if few:
        shift = scale_tensor(bias, x) if isinstance(bias, Tensor) else None
        return small.pairs(x, y, scale, small.all_pairs(bias if shift is None else shift), reduction, shift)
    (x, y), matmul_dtype = autocast_inputs(x, y)
    factor, shift = scale_tensor(scale, x), scale_tensor(bias, x)
    return apply_siglip(x, y, factor, shift, 0, needs_grad(x, factor), reduction, matmul_dtype)[0]
