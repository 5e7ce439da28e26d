"""SupCon: each query against all keys; its positives are the keys of its label.

    s    = scale * q @ k.T                                          (M, N), never in memory; of one set without i = j
    loss = s.logsumexp(1) - mean over its positives of s_ij         0 for a query without positives

The forward pass sums the positives' logits in the loop of the log-sum-exp (kind "labels" of :mod:`.forward`), as
distances from the largest possible logit, of which tight classes leave little. The CPU takes one product with the sum
of the embeddings of a label, O(M D). In the gradient positives are subtracted from the softmax before either is
rounded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vito_kernels._core.autograd import autograd_op, refuse_double_backward, register_flops
from vito_kernels._core.checks import (
    Reduction,
    autocast_inputs,
    check_ids,
    check_pair,
    check_reduction,
    inverse_temperature,
    needs_grad,
    scale_tensor,
)
from vito_kernels._core.lazy_triton import cdiv, jit, on_device
from vito_kernels.contrastive import cpu, small
from vito_kernels.contrastive.device_functions import ends_last, merged_lse, ordered_sum
from vito_kernels.contrastive.gpu import path_of
from vito_kernels.contrastive.normalize import normalize
from vito_kernels.contrastive.replay import replayed
from vito_kernels.contrastive.softplus_loss import new_counter
from vito_kernels.contrastive.terms import LOG2E, Mask, PositiveTerm, SoftmaxGrad

if TYPE_CHECKING:
    import triton.language as tl

ROWS = 256  # of a program

# ---- Triton kernel


@jit
def supcon_fwd_kernel(
    lse2, lse_residual, distances, counts, scale, loss, parts, done, factor, top, weight, pull, M, splits,
    ROWS: tl.constexpr, REDUCTION: tl.constexpr,
):  # fmt: skip
    """Losses of the rows, or their sum or mean, and the weights of the gradient, which times ``factor`` are its own."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    count = tl.zeros((ROWS,), tl.float32)
    distance = tl.zeros((ROWS,), tl.float32)
    for s in range(splits):
        part = tl.cast(s, tl.int64) * M + row
        count += tl.load(counts + part, mask=row < M, other=0.0)
        distance += tl.load(distances + part, mask=row < M, other=0.0)
    one = tl.where(count > 0.0, 1.0 / tl.maximum(count, 1.0), 0.0)
    lse, lost, _, _ = merged_lse(lse2, lse_residual, row, M, splits)
    over = lse - tl.abs(tl.load(scale)) * 1.4426950408889634 - distance * one + lost
    value = tl.where(count > 0.0, over * 0.6931471805599453, 0.0)
    tl.store(top + row, tl.where(lse == -float("inf"), 0.0, lse), mask=row < M)
    tl.store(weight + row, tl.where(count > 0.0, tl.exp2(-lost), 0.0), mask=row < M)
    tl.store(pull + row, -one, mask=row < M)
    if REDUCTION == "none":
        tl.store(loss + row, value, mask=row < M)
    else:
        programs = tl.num_programs(0)
        tl.store(parts + tl.program_id(0), tl.sum(value, 0))
        tl.store(parts + programs + tl.program_id(0), tl.sum(tl.where(count > 0.0, 1.0, 0.0), 0))
        if ends_last(done):
            rows = 1.0
            if REDUCTION == "mean":
                rows = tl.maximum(ordered_sum(parts + programs, programs), 1.0)
            tl.store(loss, ordered_sum(parts, programs) / rows)
            tl.store(factor, 1.0 / rows)


def launch_losses(
    lse2: Tensor,
    lse_residual: Tensor,
    distances: Tensor,
    counts: Tensor,
    scale: Tensor,
    reduction: str,
    done: Tensor,
) -> tuple[Tensor, SoftmaxGrad, Tensor, Tensor]:
    """(loss, softmax, pull (M,), factor) of sums (S, M) of splits; ``done`` is a counter, zeroed."""
    (splits, M), new, none = counts.shape, lse2.new_empty, reduction == "none"
    loss, softmax, pull, factor = new(M if none else ()), SoftmaxGrad(new(M), new(M)), new(M), new(0 if none else ())
    grid = cdiv(M, ROWS)
    with on_device(lse2):
        supcon_fwd_kernel[(grid,)](
            lse2, lse_residual, distances, counts, scale, loss, new(0 if none else 2 * grid), done, factor,
            softmax.lse2, softmax.weight, pull, M, splits, ROWS, reduction,
        )  # fmt: skip
    return loss, softmax, pull, factor


# ---- custom op


@torch.library.custom_op("vito_kernels::supcon", mutates_args=())
def supcon_op(
    q: Tensor,
    k: Tensor | None,
    scale: Tensor,
    label: Tensor,
    key_label: Tensor | None,
    diagonal: int | None,
    reduction: str,
    matmul_dtype: torch.dtype | None = None,
    cache_logits: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Losses and what their gradients need.

    Args:
        q, k, scale: (M, D), (N, D), (). Without k the keys are q itself.
        label, key_label: (M,), (N,).
        diagonal: key ``i + diagonal`` is query i itself; None where no key is a query. Without k it is 0.
        reduction: "mean" over the rows that have a positive, "sum" or "none".
        matmul_dtype, cache_logits: as for ``similarity_lse_op``.

    Returns:
        The loss () or (M,), ``SoftmaxGrad`` as lse2 and weight (M,), and ``pull`` (M,), the weight of each positive,
        minus one over their number. ``factor`` () or (0,) is the derivative of the result by each loss. Last comes the
        logit cache.
    """
    path, one_set = path_of(q), k is None
    path.check_values(scale)
    keys, key_label = (q, label) if k is None or key_label is None else (k, key_label)
    cache = path.alloc_logit_cache(q, keys, scale, cache_logits, symmetric=one_set)
    mask = Mask(diagonal=diagonal)
    done = new_counter(q)
    found = path.label_forward(q, keys, scale, mask, label, key_label, one_set, matmul_dtype, cache, done)
    make: Callable[..., tuple[Tensor, SoftmaxGrad, Tensor, Tensor]] = _losses if path is cpu else launch_losses
    loss, softmax, pull, factor = make(*found, scale, reduction, done)
    return loss, softmax.lse2, softmax.weight, pull, factor, cache


@supcon_op.register_fake
def _(q, k, scale, label, key_label, diagonal, reduction, matmul_dtype=None, cache_logits=False):
    rows, new = q.shape[0], scale.new_empty
    cache = path_of(q).alloc_logit_cache(q, q if k is None else k, scale, cache_logits, symmetric=k is None)
    none = reduction == "none"
    return new(rows if none else ()), new(rows), new(rows), new(rows), new(0 if none else ()), cache


def _losses(
    lse2: Tensor, lse_residual: Tensor, distances: Tensor, counts: Tensor, scale: Tensor, reduction: str, _: Tensor
) -> tuple[Tensor, SoftmaxGrad, Tensor, Tensor]:
    """As ``launch_losses``, of lse2 (M,) and sums (1, M)."""
    count = counts[0]
    share = torch.where(count > 0, 1 / count.clamp(min=1), 0)
    over = lse2 - scale.abs() * LOG2E - distances[0] * share + lse_residual
    loss = torch.where(count > 0, over / LOG2E, 0)
    softmax, pull = SoftmaxGrad.of(lse2, lse_residual, (count > 0).to(loss.dtype) / LOG2E), -share
    if reduction == "none":
        return loss, softmax, pull, loss.new_empty(0)
    rows = (count > 0).sum().clamp(min=1).to(loss.dtype) if reduction == "mean" else loss.new_ones(())
    return loss.sum() / rows, softmax, pull, rows.reciprocal()


@torch.library.custom_op("vito_kernels::supcon_backward", mutates_args=())
def supcon_backward_op(
    gradient: Tensor,
    q: Tensor,
    k: Tensor | None,
    scale: Tensor,
    label: Tensor,
    key_label: Tensor | None,
    diagonal: int | None,
    lse2: Tensor,
    weight: Tensor,
    pull: Tensor,
    factor: Tensor,
    logit_cache: Tensor,
    need_q: bool,
    need_k: bool,
    need_scale: bool,
    matmul_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dscale), each rounded once to its input's dtype; a gradient that is not needed is empty."""
    path, mask, side = path_of(q), Mask(diagonal=diagonal), need_q or need_scale
    factors: list[Tensor | None] = [gradient, factor]
    if gradient.dim():  # of each row
        weight, pull, factors = weight * gradient, pull * gradient, [None, None]
    softmax, other = SoftmaxGrad(lse2, weight), None
    if k is None or key_label is None:
        term = PositiveTerm(label, label, pull)
        base = path.self_backward(q, scale, softmax, mask, term, matmul_dtype, logit_cache)
    else:
        options = {"positive_term": PositiveTerm(label, key_label, pull), "parts": True}
        given = softmax, None, mask, side, need_k, matmul_dtype, logit_cache
        base, other = path.lse_backward(q, k, scale, *given, **options)
    bases, keys = (base if side else None, other if need_k else None), q if k is None else k
    dq, dscale, dk = path.grad_epilogues(*bases, scale, q, keys, None, 0, None, need_q, need_scale, *factors)
    # A logit of one set serves both of its ends, so that the gradient of the scale meets it twice.
    return dq, dk, dscale / 2 if need_scale and k is None else dscale


@supcon_backward_op.register_fake
def _(
    gradient, q, k, scale, label, key_label, diagonal, lse2, weight, pull, factor, logit_cache, need_q, need_k,
    need_scale, matmul_dtype=None,
):  # fmt: skip
    return (
        q.new_empty(q.shape if need_q else 0),
        q.new_empty(k.shape if need_k and k is not None else 0),
        scale.new_empty(() if need_scale else 0),
    )


def _setup_context(ctx, inputs, output):
    q, k, scale, label, key_label, ctx.diagonal, _, ctx.matmul_dtype, _ = inputs
    ctx.save_for_backward(q, k, scale, label, key_label, *output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, gradient, *_):  # no gradient reaches the other outputs, which stay in this module
    if gradient is None:
        return (None,) * 9
    q, k, scale, label, key_label, *more = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    inputs = q, k, scale, label, key_label, ctx.diagonal
    grads = apply_supcon_backward(gradient, *inputs, *more, *needs, ctx.matmul_dtype)
    return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), *(None,) * 6


def _product(q: Tensor, k: Tensor | None) -> int:
    return 2 * q.shape[0] * (q if k is None else k).shape[0] * q.shape[1]


register_flops(supcon_op, lambda q, k, **_: _product(q, k))
register_flops(
    supcon_backward_op,
    lambda q, k, need_q, need_k, need_scale, **_: (
        2 * _product(q, k) * (1 if k is None else need_k + (need_q or need_scale))
    ),
)
apply_supcon = autograd_op(supcon_op, _setup_context, _backward)
apply_supcon_backward = refuse_double_backward(supcon_backward_op)

# ---- public function


@replayed
def supcon_loss(
    z: Tensor,
    labels: Tensor,
    *,
    keys: Tensor | None = None,
    key_labels: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    reduction: Reduction = "mean",
) -> Tensor:
    """SupCon (L_out): each normalized row of z against all others. Its positives are the other rows of its label.

    Equivalent, with ``z = normalize(z)``, ``s = (z @ z.T / temperature).fill_diagonal_(-inf)`` and
    ``same = (labels[:, None] == labels).fill_diagonal_(False)``:
    ``-(s.log_softmax(1).masked_fill(~same, 0).sum(1) / same.sum(1))``.

    Args:
        z: (M, D), dtypes as for ``similarity_lse``.
        labels: (M,) int64 or int32.
        keys, key_labels: (N, D) and (N,), another set or a queue, normalized here too: the rows of z are compared with
            these alone, none of which is masked.
        temperature: a positive number or a tensor of one element, which may require grad.
        reduction: "mean" over the rows that have a positive, "sum" or "none".

    Returns:
        A float32 scalar, or (M,) with "none". A row without positives has loss 0.

    Raises:
        ValueError, TypeError: as ``similarity_lse``, and for keys without labels or labels without keys.

    In the gradient the positives are subtracted from the softmax before either is rounded, so likely positives leave a
    difference as exact as float32, in 16 bits too. Costs 2 M M D flops forward and 4 M M D backward; of two sets
    2 M N D forward, and 4 M N D for each side that requires grad. Autocast and determinism as for ``similarity_lse``.
    """
    others = z if keys is None else keys
    if not (few := small.is_small(z, others, labels, key_labels)):
        check_pair(z, others, ("z", "keys"))
    check_ids("labels", labels, z.shape[0], z)
    check_reduction(reduction)
    if (keys is None) != (key_labels is None):
        missing = "keys" if keys is None else "key_labels"
        raise ValueError(f"keys and key_labels go together, but {missing} is None")
    if keys is not None and key_labels is not None:
        check_ids("key_labels", key_labels, keys.shape[0], z)
    scale = inverse_temperature(temperature)
    if few:
        terms = small.same_label(labels, key_labels, reduction)
        if keys is None:
            return small.unit_set((z,), scale, terms, reduction)
        return small.pairs(normalize(z), normalize(keys), scale, terms, reduction)
    sides, matmul_dtype = autocast_inputs(*(normalize(x) for x in (z, keys) if x is not None))
    return supcon_of_unit(
        sides[0], sides[1] if keys is not None else None, scale, labels, key_labels, matmul_dtype, reduction
    )[0]


def supcon_of_unit(
    q: Tensor,
    k: Tensor | None,
    scale: float | Tensor,
    labels: Tensor,
    key_labels: Tensor | None,
    matmul_dtype: torch.dtype | None,
    reduction: str,
    diagonal: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(loss, minus one over the number of positives of each row) of unit vectors that autocast has rounded."""
    factor = scale_tensor(scale, q)
    cache_logits = needs_grad(q, factor) or (k is not None and needs_grad(k))
    ids = labels.contiguous(), None if key_labels is None else key_labels.contiguous()
    diagonal = 0 if k is None else diagonal
    loss, _, _, pull, *_ = apply_supcon(q, k, factor, *ids, diagonal, reduction, matmul_dtype, cache_logits)
    return loss, pull
