"""InfoNCE over all ordered pairs of views, in one op.

    for a, b in ordered_pairs(V):                                   (0, 1), (0, 2), ..., (1, 0), ...
        logits = queries[a] @ keys[b].T / temperature               (B, N), never in memory
        loss[a, b] = cross_entropy(logits, arange(B) + offset)      groups mask further keys

queries (V, B, D), keys (V, N, D): float32, bfloat16 or float16; sums in float32. The pairs lie along one axis of the
launch grid of ``similarity_lse``, so that all V (V - 1) terms take the launches of one: two for the sums, one for the
positives and losses, one for the gradient of the queries. Deterministic.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vito_kernels._core.autograd import autograd_op, refuse_double_backward, register_flops
from vito_kernels._core.checks import (
    Reduction,
    autocast_inputs,
    check_groups,
    check_integers,
    check_pair,
    check_reduction,
    inverse_temperature,
    needs_grad,
    scale_tensor,
)
from vito_kernels.contrastive import small
from vito_kernels.contrastive.gpu import path_of
from vito_kernels.contrastive.replay import replayed
from vito_kernels.contrastive.terms import LOG2E, Mask, SoftmaxGrad, ordered_pairs

# ---- custom op


@torch.library.custom_op("vito_kernels::multi_view", mutates_args=())
def multi_view_op(
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    q_group: Tensor | None,
    k_group: Tensor | None,
    offset: int,
    compute_grad_q: bool,
    reduction: str,
    matmul_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Losses and what their gradients need. P = V (V - 1) ordered pairs.

    Args:
        q, k, scale: (V, M, D), (V, N, D), contiguous, ().
        q_group, k_group: (M,), (N,), the same for every pair.
        offset: the positive of query i is key i + offset.
        compute_grad_q: also compute ``mean``, which the gradients of q and scale need.
        reduction: "sum" over pairs of the mean over clips, "mean" over both, or "none".
        matmul_dtype: holds the values of q and k exactly, for the tensor cores.

    Returns:
        The loss () or (P, M), ``SoftmaxGrad`` as lse2 and weight (P * M,), the derivative by lse2 (P * M,) in units of
        log 2, and mean (P * M, D) or (0, D).
    """
    (views, rows), path, mask = q.shape[:2], path_of(q[0]), Mask(q_group, k_group, None, offset)
    path.check_values(scale)
    pairs = views * (views - 1)
    divisor = {"sum": float(rows), "mean": float(pairs * rows)}.get(reduction)
    found = path.multi_view_forward(q, k, scale, mask, compute_grad_q, divisor, matmul_dtype)
    loss, softmax = found.loss.view(pairs, rows) if divisor is None else found.loss, found.softmaxes[0]
    return loss, softmax.lse2, softmax.weight, found.weights[0], found.mean


@multi_view_op.register_fake
def _(q, k, scale, q_group, k_group, offset, compute_grad_q, reduction, matmul_dtype=None):
    (views, rows, width), new = q.shape, scale.new_empty
    pairs = views * (views - 1)
    loss, mean = new((pairs, rows) if reduction == "none" else ()), new(pairs * rows if compute_grad_q else 0, width)
    return loss, *(new(pairs * rows) for _ in range(3)), mean


@torch.library.custom_op("vito_kernels::multi_view_backward", mutates_args=())
def multi_view_backward_op(
    grad_loss: Tensor,
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    q_group: Tensor | None,
    k_group: Tensor | None,
    offset: int,
    lse2: Tensor,
    softmax_weight: Tensor,
    weight: Tensor,
    mean: Tensor,
    need_q: bool,
    need_k: bool,
    need_scale: bool,
    matmul_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dscale), each rounded once to its input's dtype; a gradient that is not needed is empty."""
    path, rows = path_of(q[0]), q.shape[1]
    dq, dk, dscale = q.new_empty(0), k.new_empty(0), scale.new_empty(0)
    if need_q or need_scale:
        dq, dscale = path.multi_view_grad_q(q, k, scale, mean, weight, grad_loss, offset, need_q, need_scale)
    if need_k:
        mask, grads = Mask(q_group, k_group, None, offset), scale.new_zeros(k.shape)
        tops, softmaxes, shares = (x.view(-1, rows) for x in (lse2, softmax_weight, weight * -LOG2E))
        softmaxes, shares = softmaxes * grad_loss, shares * grad_loss
        for pair, (a, b) in enumerate(ordered_pairs(len(q))):
            softmax = SoftmaxGrad(tops[pair], softmaxes[pair])
            grads[b] += path.lse_backward(q[a], k[b], scale, softmax, None, mask, False, True, matmul_dtype)[1]
            grads[b, offset : offset + rows].addcmul_(q[a].to(scale.dtype), shares[pair, :, None])
        dk = grads.mul_(scale).to(k.dtype)
    return dq, dk, dscale


@multi_view_backward_op.register_fake
def _(
    grad_loss, q, k, scale, q_group, k_group, offset, lse2, softmax_weight, weight, mean, need_q, need_k, need_scale,
    matmul_dtype=None,
):  # fmt: skip
    return (
        q.new_empty(q.shape if need_q else 0),
        k.new_empty(k.shape if need_k else 0),
        scale.new_empty(() if need_scale else 0),
    )


def _setup_context(ctx, inputs, output):
    q, k, scale, q_group, k_group, ctx.offset, _, _, ctx.matmul_dtype = inputs
    ctx.save_for_backward(q, k, scale, q_group, k_group, *output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_loss, *_):  # no gradient reaches the other outputs, which stay in this module
    if grad_loss is None:
        return (None,) * 9
    q, k, scale, q_group, k_group, *more = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    saved = q, k, scale, q_group, k_group, ctx.offset, *more
    grads = apply_multi_view_backward(grad_loss, *saved, *needs, ctx.matmul_dtype)
    return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), *(None,) * 6


def _products(q: Tensor, k: Tensor) -> int:
    """Flops of one product over all pairs."""
    return 2 * (len(q) - 1) * q.shape[1] * k.shape[0] * k.shape[1] * k.shape[2]


register_flops(multi_view_op, lambda q, k, compute_grad_q, **_: (2 if compute_grad_q else 1) * _products(q, k))
register_flops(multi_view_backward_op, lambda q, k, need_k, **_: 2 * _products(q, k) if need_k else 0)
apply_multi_view = autograd_op(multi_view_op, _setup_context, _backward)
apply_multi_view_backward = refuse_double_backward(multi_view_backward_op)

# ---- public function


@replayed
def multi_view_info_nce(
    queries: Tensor,
    keys: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    positive_offset: int = 0,
    q_group: Tensor | None = None,
    k_group: Tensor | None = None,
    reduction: Reduction = "sum",
) -> Tensor:
    """InfoNCE of each view's queries against each other view's keys: the objective of VITO.

    Equivalent: the sum of ``info_nce(queries[a], keys[b], positive=arange(B) + positive_offset, ...)`` over a != b.

    Args:
        queries: (V, B, D), V >= 2 views of B clips: float32, bfloat16, float16, or float64, which PyTorch computes.
        keys: (V, N, D), N >= B + positive_offset, of the same dtype and device. Nothing is normalized here.
        temperature: a positive number or a tensor of one element, which may require grad.
        positive_offset: the positive of query i is key i + positive_offset, where this rank's clips begin among all.
        q_group, k_group: (B,) and (N,) int64 or int32 ids, the same in every view. A key of the query's group is no
            negative.
        reduction: "sum" over pairs of the mean over clips, "mean" over both, or "none".

    Returns:
        A float32 scalar; with "none" (V (V - 1), B), pairs in the order (0, 1), (0, 2), ..., (1, 0).

    Raises:
        ValueError, TypeError: as ``info_nce``, and for fewer than two views or a positive outside the keys.

    Costs V (V - 1) times 4 B N D flops with the gradient of the queries, 4 B N D more for that of the keys, and
    V (V - 1) B D numbers of memory. The gradient of the keys takes a launch for each pair. Deterministic. No second
    derivative: double backward raises RuntimeError.
    """
    check_reduction(reduction)
    check_integers(positive_offset=positive_offset)
    check_views(queries, keys, positive_offset)
    check_groups(q_group, k_group, queries[0], keys[0])
    scale = inverse_temperature(temperature)
    views, clips = len(queries), queries.shape[1]
    sides = queries.flatten(0, 1), keys.flatten(0, 1)
    if reduction != "none" and small.is_small(*sides, q_group, k_group):
        groups = None if q_group is None or k_group is None else (q_group, k_group)
        weight = 1 / clips if reduction == "sum" else 1 / (clips * views * (views - 1))
        return small.pairs(*sides, scale, small.all_views(views, positive_offset, groups, weight), "sum")
    (q, k), matmul_dtype = autocast_inputs(queries, keys)
    scale = scale_tensor(scale, q)
    inputs = q.contiguous(), k.contiguous(), scale, q_group, k_group, int(positive_offset)
    return apply_multi_view(*inputs, needs_grad(q, scale), reduction, matmul_dtype)[0]


def check_views(queries: Tensor, keys: Tensor, offset: int) -> None:
    """Views of one number, width, dtype and device, and positives among the keys."""
    for name, x in (("queries", queries), ("keys", keys)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.dim() != 3:
            raise ValueError(f"{name} must have shape (views, rows, width), got {tuple(x.shape)}")
    if len(queries) < 2 or len(queries) != len(keys):
        raise ValueError(f"queries and keys must have the same views, at least 2, got {len(queries)} and {len(keys)}")
    check_pair(queries[0], keys[0], ("queries", "keys"))
    if not 0 <= offset <= keys.shape[1] - queries.shape[1]:
        raise ValueError(
            f"positive_offset={offset} puts positives of {queries.shape[1]} queries outside {keys.shape[1]} keys"
        )
