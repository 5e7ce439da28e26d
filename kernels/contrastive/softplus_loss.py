"""The end of the contrastive losses: softplus of the negatives' log-sum-exp minus the positive's logit.

    loss_i = mean over p of softplus(lse_i - logit_ip),     softplus(x) = log(1 + e^x)
    loss_i = mean over p of lse_i - logit_ip                with ``decoupled``; 0 without negatives

That is -log of the positive's share among itself and the negatives. A two-sided loss takes the mean over the pair's row
and its column. lse comes in two parts (``terms.split_sum``), since a difference of large logits may be small. lse and
logits are in units of log 2.

One kernel ends a forward pass. It merges the key splits, takes the positives' logits, and writes the losses and their
derivatives, the weights of the backward pass, which therefore starts with its products. The program that ends last adds
the parts of a sum or a mean in order (``device_functions.store_total``): deterministic, float32 (float64 for float64).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vito_kernels._core.autograd import autograd_op, refuse_double_backward, register_flops, softplus
from vito_kernels._core.lazy_triton import cdiv, jit, on_device, program_shape, rows_contiguous, use_triton
from vito_kernels.contrastive.device_functions import merged_lse, merged_mean, sigmoid, store_total
from vito_kernels.contrastive.device_functions import softplus as device_softplus
from vito_kernels.contrastive.terms import LOG2E, SoftmaxGrad

if TYPE_CHECKING:
    import triton.language as tl

# ---- Triton kernel


@jit
def _term(x, lse, DECOUPLED: tl.constexpr):
    """The loss of a row whose log-sum-exp is x above its positive."""
    if DECOUPLED:
        return tl.where(lse == -float("inf"), 0.0, x)
    else:
        return device_softplus(x)


@jit
def _term_grad(x, lse, DECOUPLED: tl.constexpr):
    if DECOUPLED:
        return tl.where(lse == -float("inf"), 0.0, 1.0)
    else:
        return sigmoid(x)


@jit
def _store_weights(total, lse, lost, weight, top, softmax, row, M):
    """The derivative by lse2, and ``terms.SoftmaxGrad`` of it."""
    empty = lse == -float("inf")
    tl.store(weight + row, total * 0.6931471805599453, mask=row < M)
    tl.store(top + row, tl.where(empty, 0.0, lse), mask=row < M)
    tl.store(softmax + row, tl.where(empty, 0.0, total * tl.exp2(-lost)), mask=row < M)


@jit
def softplus_loss_kernel(
    q, k, positive, scale, logits, lse2, lse_residual, mean, second, second_residual, loss, parts, done, weight, top,
    softmax, second_weight, second_top, second_softmax, pair_weight, merged, M, N, D, splits, divisor, q_stride,
    k_stride, diagonal, WIDTH: tl.constexpr, ROWS: tl.constexpr, LISTED: tl.constexpr, PAIRS: tl.constexpr,
    ADJACENT: tl.constexpr, VIEWS: tl.constexpr, GIVEN: tl.constexpr, SIDES: tl.constexpr, MERGE: tl.constexpr,
    MEAN: tl.constexpr, REDUCED: tl.constexpr, DECOUPLED: tl.constexpr,
):  # fmt: skip
    """The losses of rows, or their sum over ``divisor``, and the derivative by each lse2 and logit.

    The positives of row i are the keys in ``positive``, or ``i + diagonal``, or with ADJACENT the other row of a pair.
    An index that is no key makes NaN. With VIEWS > 1, rows are those of ordered pairs of views, as in ``launch_lse``.
    With GIVEN their logits are known.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    inside = (row < M)[:, None] & (column < D)[None]
    if MERGE:
        lse, lost, largest, sums = merged_lse(lse2, lse_residual, row, M, splits)
        if MEAN:
            acc = merged_mean(mean, lse2, lse_residual, largest, sums, row, column, inside, M, D, splits)
            tl.store(merged + row.to(tl.int64)[:, None] * D + column[None], acc, mask=inside)
    else:
        lse = tl.load(lse2 + row, mask=row < M, other=0.0)
        lost = tl.load(lse_residual + row, mask=row < M, other=0.0)
    total = tl.zeros((ROWS,), tl.float32)
    losses = tl.zeros((ROWS,), tl.float32)
    if SIDES == 2:
        other_lse = tl.load(second + row, mask=row < M, other=0.0)
        other_lost = tl.load(second_residual + row, mask=row < M, other=0.0)
        other_total = total
    query, next_key = row, row ^ ADJACENT
    if VIEWS > 1:
        clips = M // (VIEWS * (VIEWS - 1))
        pair = row // clips
        view, other_view = pair // (VIEWS - 1), pair % (VIEWS - 1)
        other_view += (other_view >= view).to(tl.int32)
        query, next_key = view * clips + row % clips, other_view * (N // VIEWS) + row % clips
    if not GIVEN:
        own = tl.load(q + query.to(tl.int64)[:, None] * q_stride + column[None], mask=inside, other=0.0).to(tl.float32)
        factor = tl.load(scale) * 1.4426950408889634
    each = 1.0 / (divisor * PAIRS * SIDES)
    for p in range(PAIRS):
        place = row.to(tl.int64) * PAIRS + p
        if GIVEN:
            logit = tl.load(logits + place, mask=row < M, other=0.0)
        else:
            key = next_key.to(tl.int64) + diagonal
            if LISTED:
                key = tl.load(positive + place, mask=row < M, other=0)
            known = (key >= 0) & (key < N)
            keys = tl.load(k + key[:, None] * k_stride + column[None], mask=inside & known[:, None], other=0.0)
            logit = tl.where(known, tl.sum(own * keys.to(tl.float32), 1) * factor, float("nan"))
        x = (lse - logit + lost) * 0.6931471805599453
        losses += _term(x, lse, DECOUPLED)
        share = each * _term_grad(x, lse, DECOUPLED)
        total += share
        if SIDES == 2:
            other_x = (other_lse - logit + other_lost) * 0.6931471805599453
            losses += _term(other_x, other_lse, DECOUPLED)
            other_share = each * _term_grad(other_x, other_lse, DECOUPLED)
            other_total += other_share
            share += other_share
        tl.store(pair_weight + place, -share * 0.6931471805599453, mask=row < M)
    losses /= PAIRS * SIDES
    _store_weights(total, lse, lost, weight, top, softmax, row, M)
    if SIDES == 2:
        _store_weights(other_total, other_lse, other_lost, second_weight, second_top, second_softmax, row, M)
    if REDUCED:
        store_total(tl.sum(tl.where(row < M, losses, 0.0), 0), divisor, loss, parts, done)
    else:
        tl.store(loss + row, losses, mask=row < M)


# ---- launcher

Side = tuple[Tensor, Tensor]  # lse2 and its residual, (M,), or (S, M) of splits of the keys


@dataclass(frozen=True)
class Positives:
    """The positives of q (M, D) are rows of k (N, D): those in ``positive`` (M, P), or ``i + diagonal``.

    With ``adjacent`` and ``diagonal`` 0 the positive is the other row of the pair 2 i, 2 i + 1. With ``views`` > 1, q
    and k hold views, and losses are those of their pairs, in the order of ``terms.ordered_pairs``.
    """

    q: Tensor
    k: Tensor
    scale: Tensor
    positive: Tensor | None = None
    diagonal: int = 0
    adjacent: bool = False
    views: int = 1


@dataclass(frozen=True)
class RowLosses:
    """Losses, () or (M,), and their derivatives.

    ``weights``, of each side (M,), are by lse2, and ``pair_weight`` (M, P) by the positives' logits. Both are those of
    the sum or mean of the losses. ``mean`` is that of all splits.
    """

    loss: Tensor
    weights: list[Tensor]
    softmaxes: list[SoftmaxGrad]
    pair_weight: Tensor
    mean: Tensor


def new_counter(like: Tensor) -> Tensor:
    """() for the kernel that zeroes it and the later one that counts its programs."""
    return torch.empty((), dtype=torch.int32, device=like.device)


def launch_softplus_loss(
    sides: list[Side],
    positives: Positives | Tensor,
    divisor: float | None,
    decoupled: bool,
    mean: Tensor | None = None,
    done: Tensor | None = None,
) -> RowLosses:
    """The losses of one side or two.

    Args:
        sides: of splits only where there is one.
        positives: or their logits (M, P).
        divisor: of the sum of the losses; None for the losses themselves.
        mean: (S, M, D) or (S, 0, D), of the splits.
        done: a counter that an earlier kernel has zeroed, for a sum or a mean.
    """
    (lse2, residual), (second, second_residual) = sides[0], sides[1] if len(sides) == 2 else (None, None)
    splits, M, new = lse2.shape[0] if lse2.dim() == 2 else 1, lse2.shape[-1], lse2.new_empty
    given, reduced = isinstance(positives, Tensor), divisor is not None
    q, k, scale, positive, diagonal, logits, D, adjacent, views = None, None, None, None, 0, None, 1, 0, 1
    if isinstance(positives, Tensor):
        logits, pairs = positives.contiguous(), positives.shape[1]
        width, rows = 1, 256
    else:
        q, k, scale = rows_contiguous(positives.q), rows_contiguous(positives.k), positives.scale
        positive, diagonal, D = positives.positive, positives.diagonal, q.shape[1]
        adjacent, views = int(positives.adjacent), positives.views
        pairs = 1 if positive is None else positive.shape[1]
        width, rows = program_shape(D)
    merged = mean = new(1, 0, D) if mean is None else mean
    if splits > 1:
        merged = new(1, *mean.shape[1:])
    weights, softmaxes = [new(M) for _ in sides], [SoftmaxGrad(new(M), new(M)) for _ in sides]
    outputs: list[Any] = [x for w, s in zip(weights, softmaxes, strict=True) for x in (w, s.lse2, s.weight)]
    loss, pair_weight, grid = new(() if reduced else M), new(M, pairs), cdiv(M, rows)
    with on_device(lse2):
        softplus_loss_kernel[(grid,)](
            q, k, positive, scale, logits, lse2, residual, mean, second, second_residual, loss,
            new(grid) if reduced else None, done, *outputs, *[None] * (6 - len(outputs)), pair_weight, merged, M,
            0 if k is None else k.shape[0], D, splits, divisor or 1.0, 0 if q is None else q.stride(0),
            0 if k is None else k.stride(0), diagonal, width, rows, positive is not None, pairs,
            adjacent, views, given, len(sides), splits > 1, mean.shape[1] > 0, reduced, decoupled,
        )  # fmt: skip
    return RowLosses(loss, weights, softmaxes, pair_weight, merged[0])


def torch_softplus_loss(sides: list[Side], logits: Tensor, divisor: float | None, decoupled: bool) -> RowLosses:
    """As ``launch_softplus_loss`` of logits, in PyTorch; there is no mean."""
    over = torch.stack([(lse2[:, None] - logits).add_(residual[:, None]) for lse2, residual in sides]).div_(LOG2E)
    loss = (over.masked_fill(over == -torch.inf, 0) if decoupled else softplus(over)).mean((0, 2))
    shares = (over != -torch.inf).to(over.dtype) if decoupled else over.sigmoid_()
    shares.div_(shares.shape[0] * shares.shape[2] * LOG2E * (divisor or 1.0))
    weights = [share.sum(1) for share in shares]
    softmaxes = [SoftmaxGrad.of(*side, weight) for side, weight in zip(sides, weights, strict=True)]
    loss = loss if divisor is None else loss.sum() / divisor
    return RowLosses(loss, weights, softmaxes, shares.sum(0).neg_(), logits.new_empty(0))


def divisor_of(reduction: str, rows: int) -> float | None:
    """Of the sum of the losses; None for "none"."""
    return {"mean": float(rows), "sum": 1.0}.get(reduction)


# ---- custom op, of logits that are known


def _sides(lse2: Tensor, lse_residual: Tensor, second: Tensor | None, second_residual: Tensor | None) -> list[Side]:
    sides = [(lse2.contiguous(), lse_residual.contiguous())]
    if second is not None and second_residual is not None:
        sides.append((second.contiguous(), second_residual.contiguous()))
    return sides


@torch.library.custom_op("vito_kernels::softplus_loss", mutates_args=())
def softplus_loss_op(
    lse2: Tensor,
    lse_residual: Tensor,
    second: Tensor | None,
    second_residual: Tensor | None,
    logits: Tensor,
    decoupled: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The losses of the rows (M,), and their derivatives by lse2 (M,), by ``second``, (M,) or (0,), and by logits."""
    sides = _sides(lse2, lse_residual, second, second_residual)
    if use_triton(lse2):
        found = launch_softplus_loss(sides, logits, None, decoupled)
    else:
        found = torch_softplus_loss(sides, logits, None, decoupled)
    weight, second_weight = (*found.weights, lse2.new_empty(0))[:2]
    return found.loss, weight, second_weight, found.pair_weight


@softplus_loss_op.register_fake
def _(lse2, lse_residual, second, second_residual, logits, decoupled):
    new = lse2.new_empty
    return new(lse2.shape), new(lse2.shape), new(0 if second is None else lse2.shape), new(logits.shape)


@torch.library.custom_op("vito_kernels::softplus_loss_backward", mutates_args=())
def softplus_loss_backward_op(
    gradient: Tensor, weight: Tensor, second_weight: Tensor, pair_weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of lse2 (M,), of ``second``, (M,) or (0,), and of the logits (M, P)."""
    other = gradient * second_weight if len(second_weight) else second_weight.clone()
    return gradient * weight, other, gradient[:, None] * pair_weight


@softplus_loss_backward_op.register_fake
def _(gradient, weight, second_weight, pair_weight):
    return tuple(torch.empty_like(x) for x in (weight, second_weight, pair_weight))


def _setup_context(ctx, inputs, output):
    ctx.two_sided = inputs[2] is not None
    ctx.save_for_backward(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, gradient, *_):  # no gradient reaches the other outputs, which stay in this module
    if gradient is None:
        return (None,) * 6
    g_lse2, g_second, g_logits = apply_backward(gradient, *ctx.saved_tensors)
    return g_lse2, None, g_second if ctx.two_sided else None, None, g_logits, None


register_flops(softplus_loss_op)
register_flops(softplus_loss_backward_op)
apply_softplus_loss = autograd_op(softplus_loss_op, _setup_context, _backward)
apply_backward = refuse_double_backward(softplus_loss_backward_op)


def softplus_loss(
    lse2: Tensor,
    lse_residual: Tensor,
    logits: Tensor,
    second: Tensor | None = None,
    second_residual: Tensor | None = None,
    *,
    decoupled: bool = False,
) -> Tensor:
    """The losses of rows (M,) in natural units, of one side or of two.

    Args:
        lse2, lse_residual: (M,), the log-sum-exp of the negatives and its rounding residual, in units of log 2.
        logits: (M, P), of the positives, in units of log 2.
        second, second_residual: (M,), the log-sum-exp of another side; the result is the mean over both.
        decoupled: leave the positive out of the denominator.
    """
    return apply_softplus_loss(lse2, lse_residual, second, second_residual, logits, decoupled)[0]
