"""Log-sum-exp over keys and InfoNCE on it, without ever building the M x N matrix of logits.

    logits = scale * q @ k.T                                        (M, N), never in memory
    lse    = logits.masked_fill(excluded, -inf).logsumexp(1)        similarity_lse
    loss   = softplus(lse - scale * (q * k[positive]).sum(1))       info_nce: excluded holds the positive

q (M, D), k (N, D): float32, bfloat16 or float16; sums in float32. The forward pass keeps the keys' mean under the
softmax,

    mean   = logits.masked_fill(excluded, -inf).softmax(1) @ k      (M, D), d lse / d q = scale * mean

which makes it FlashAttention's forward with V = K, and the backward pass of q a scaling: 4 M N D flops for both. Every
output row is owned by one program and summed in a fixed order: deterministic, no atomics.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from vito_kernels._core.autograd import autograd_op, refuse_double_backward, register_flops, softplus
from vito_kernels._core.checks import (
    autocasts,
    check_finite,
    check_groups,
    check_options,
    check_pair,
    check_positive_range,
    inverse_temperature,
    positive_columns,
    reduce,
    scale_tensor,
)
from vito_kernels.contrastive import cpu, epilogue, options
from vito_kernels.contrastive.backward import pair_gradient, softmax_grad
from vito_kernels.contrastive.cpu import Mask
from vito_kernels.contrastive.forward import launch_lse
from vito_kernels.contrastive.softplus_loss import softplus_loss
from vito_kernels.contrastive.tile_configs import runs_on_triton

# ---- custom op


@torch.library.custom_op("vito_kernels::contrast", mutates_args=())
def contrast(
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    q_group: Tensor | None,
    k_group: Tensor | None,
    positive: Tensor | None,
    diagonal: int | None,
    compute_grad_q: bool,
    matmul_dtype: torch.dtype | None = None,
    cache_logits: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(lse2 (M,) over the keys that a query may see, logits of its positives (M, P), mean (M, D) of the keys under the
    softmax, what lse2 rounds away (M,), logit_cache); lse2 and logits in units of log 2.

    Keys of the query's group, its positives, and key ``i + diagonal`` are not seen; the latter counts as its only
    positive. ``mean`` is what the gradient of q needs: with ``compute_grad_q`` forward and backward together cost 4 M
    N D
    flops. ``matmul_dtype`` is a dtype that holds the values of q and k exactly (see ``autocast``), for the tensor
    cores. With
    ``cache_logits`` the CPU path leaves tiles for the keys' gradient in the last output.
    """
    if positive is not None and not positive.is_cuda:
        check_positive_range(positive, k.shape[0])
    check_finite(scale)
    mask = Mask(q_group, k_group, positive, diagonal)
    logit_cache = cpu.alloc_logit_cache(q, k, scale, cache_logits and not runs_on_triton(q))
    if runs_on_triton(q):
        lse2, lse_residual, mean = launch_lse(
            to_matmul_dtype(q, matmul_dtype), to_matmul_dtype(k, matmul_dtype), scale, mask, compute_grad_q
        )
        logits = epilogue.positive_logits(q, k, scale, positive, diagonal)
    else:
        logits = scale.new_full((q.shape[0], _count(positive, diagonal)), math.nan)  # of a positive that is no key
        lse2, lse_residual, mean = cpu.forward(q, k, scale, mask, compute_grad_q, logit_cache, logits)
    return lse2, logits, mean, lse_residual, logit_cache


@contrast.register_fake
def _(q, k, scale, q_group, k_group, positive, diagonal, compute_grad_q, matmul_dtype=None, cache_logits=False):
    rows, width = q.shape
    new = lambda *shape: scale.new_empty(shape)  # noqa: E731
    logit_cache = cpu.alloc_logit_cache(q, k, scale, cache_logits and not runs_on_triton(q))
    return (
        new(rows),
        new(rows, _count(positive, diagonal)),
        new(rows if compute_grad_q else 0, width),
        new(rows),
        logit_cache,
    )


@torch.library.custom_op("vito_kernels::contrast_backward", mutates_args=())
def contrast_backward(
    g_lse2: Tensor,
    g_positive: Tensor,
    q: Tensor,
    k: Tensor | None,
    scale: Tensor,
    q_group: Tensor | None,
    k_group: Tensor | None,
    positive: Tensor | None,
    diagonal: int | None,
    lse2: Tensor,
    lse_residual: Tensor,
    mean: Tensor,
    logit_cache: Tensor,
    need_q: bool,
    need_k: bool,
    need_scale: bool,
    matmul_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dscale) of ``contrast``, each rounded once to its input's dtype; what is not needed comes back empty."""
    dq, dk, dscale = q.new_empty(0), q.new_empty(0), scale.new_empty(0)
    pairs: dict[str, Any] = {"pair_weight": g_positive, "positive": positive} if g_positive.shape[1] else {}
    fused = runs_on_triton(q)
    if not pairs:  # lse itself was asked for, and anything may arrive at the -inf of a query that sees no key
        g_lse2 = g_lse2.masked_fill(lse2 == -math.inf, 0)
    if fused and (need_q or need_scale):
        own = pairs | {"k": k, "diagonal": diagonal or 0} if pairs else {}
        other = q if need_scale else None
        dq, dscale = epilogue.pull(mean, scale, q.dtype, store=need_q, weight=g_lse2, other=other, **own)
    elif need_q or need_scale:
        pull = mean * (g_lse2 * cpu.LOG2E)[:, None]
        for p, keys in enumerate(_positive_keys(q, k, positive, diagonal)):
            assert k is not None
            pull.addcmul_(k[keys].to(pull.dtype), g_positive[:, p, None], value=cpu.LOG2E)
        if need_scale:
            dscale = (pull * q).sum()
        if need_q:
            dq = pull.mul_(scale).to(q.dtype)
    if need_k and k is not None:
        mask = Mask(q_group, k_group, positive, diagonal)
        sides = to_matmul_dtype(q, matmul_dtype), to_matmul_dtype(k, matmul_dtype)
        role = softmax_grad(lse2, lse_residual, g_lse2)
        _, push = pair_gradient(*sides, scale, role, None, mask, need_x=False, need_y=True, logit_cache=logit_cache)
        if fused and positive is None:
            theirs = pairs | {"k": q, "diagonal": -(diagonal or 0), "by_key": True} if pairs else {}
            return dq, epilogue.pull(push, scale, k.dtype, **theirs)[0], dscale
        for p, keys in enumerate(_positive_keys(q, k, positive, diagonal)):
            part = q.to(push.dtype) * (g_positive[:, p, None] * cpu.LOG2E)
            if isinstance(keys, slice):
                push[keys] += part
            elif push.is_cuda:
                push.index_put_((keys,), part, accumulate=True)  # sorts there: no atomics, the same sum every time
            else:
                push.index_add_(0, keys, part)  # in order, where the other adds float32 atomically from every thread
        dk = push.mul_(scale).to(k.dtype)
    return dq, dk, dscale


@contrast_backward.register_fake
def _(
    g_lse2, g_positive, q, k, scale, q_group, k_group, positive, diagonal, lse2, lse_residual, mean, logit_cache,
    need_q, need_k,
    need_scale, matmul_dtype=None,
):  # fmt: skip
    return (
        q.new_empty(q.shape if need_q else 0),
        q.new_empty(k.shape if need_k else 0),
        scale.new_empty(() if need_scale else 0),
    )


def _count(positive: Tensor | None, diagonal: int | None) -> int:
    return int(diagonal is not None) if positive is None else positive.shape[1]


def _positive_keys(q: Tensor, k: Tensor | None, positive: Tensor | None, diagonal: int | None) -> list[slice | Tensor]:
    """The positive keys of all queries, one entry for each column of positives."""
    if diagonal is not None:
        return [slice(diagonal, diagonal + len(q))]
    if positive is not None and k is not None and positive.is_cuda:  # unchecked; one that is no key made the loss NaN
        positive = positive.clamp(0, len(k) - 1)
    return [] if positive is None else list(positive.unbind(1))


def _setup_context(ctx, inputs, output):
    q, k, scale, q_group, k_group, positive, ctx.diagonal, _, ctx.matmul_dtype, _ = inputs
    lse2, _, mean, lse_residual, logit_cache = output
    # Locked keys without positives are not saved: a queue may take new keys before the backward pass.
    cache_logits = k.requires_grad or positive is not None or ctx.diagonal is not None
    ctx.save_for_backward(
        q, k if cache_logits else None, scale, q_group, k_group, positive, lse2, lse_residual, mean, logit_cache
    )
    ctx.set_materialize_grads(False)


def _backward(ctx, g_lse2, g_positive, *_):  # the others do not leave this module: no gradient comes to them
    *sets, positive, lse2, lse_residual, mean, logit_cache = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    g_lse2 = torch.zeros_like(lse2) if g_lse2 is None else g_lse2
    g_positive = lse2.new_zeros(lse2.shape[0], _count(positive, ctx.diagonal)) if g_positive is None else g_positive
    hidden, sums = (positive, ctx.diagonal), (lse2, lse_residual, mean, logit_cache)
    found = apply_contrast_backward(g_lse2, g_positive, *sets, *hidden, *sums, *needs, ctx.matmul_dtype)
    return *(grad if need else None for grad, need in zip(found, needs, strict=True)), *(None,) * 7


register_flops(
    contrast, lambda q, k, compute_grad_q, **_: (4 if compute_grad_q else 2) * q.shape[0] * k.shape[0] * q.shape[1]
)
register_flops(
    contrast_backward,
    lambda q, k, need_k, **_: 4 * q.shape[0] * k.shape[0] * q.shape[1] if need_k and k is not None else 0,
)
apply_contrast = autograd_op(contrast, _setup_context, _backward)
apply_contrast_backward = refuse_double_backward(contrast_backward)

# ---- public functions


def autocast(*tensors: Tensor) -> tuple[list[Tensor], torch.dtype | None]:
    """As autocast does for a matmul: embeddings take the values of its dtype, which comes second (else None), if they
    are float32 or of several types. Those of one narrower type, or of float64, are left as they are.

    All are float32 tensors then, with the gradient of the identity: no gradient is rounded to 16 bits on its way.
    """
    dtypes = {x.dtype for x in tensors}
    if not autocasts(tensors[0]) or (len(dtypes) == 1 and torch.float32 not in dtypes):
        return list(tensors), None
    dtype, wide = torch.get_autocast_dtype(tensors[0].device.type), [x.float() for x in tensors]
    return [x + (x.to(dtype) - x).detach() for x in wide], dtype


def to_matmul_dtype(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """x in ``dtype`` for the Triton kernels; the CPU path computes in float32 anyway."""
    return x if dtype is None or not runs_on_triton(x) else x.to(dtype)


def needs_grad(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def similarity_lse(
    q: Tensor, k: Tensor, scale: float | Tensor, *, q_group: Tensor | None = None, k_group: Tensor | None = None
) -> Tensor:
    """Log-sum-exp of ``scale * q_i . k_j`` over the keys j whose group differs from the query's; (M,) float32.

    Equivalent: ``(scale * q @ k.T).masked_fill(q_group[:, None] == k_group[None], -inf).logsumexp(1)``.

    q (M, D) and k (N, D) share a dtype (float32, bfloat16, float16; float64 runs in PyTorch; under autocast the first
    three may mix) and a device; rows may be strided. ``scale`` is a number or a tensor of one
    element, which may require grad. Groups are int64 or int32, (M,) and (N,); without them every key counts. A query
    that sees no key has lse = -inf and no gradient.

    Sums are in float32 (float64 for float64, and so is the result). On a GPU float32 products are taken on the tensor
    cores in bfloat16 parts: three, as exact as float32, or by ``torch.set_float32_matmul_precision`` fewer; beyond a
    width of 256 (128 on sm_80, 0 on sm_100) on the plain units. Under autocast float32 and mixed embeddings are rounded
    to its dtype, their gradients are not, and stay exact to about 5e-4 however likely the positive; a bfloat16 tensor
    has a bfloat16 gradient, which that one rounding moves by 1.7e-3 (Frobenius norms).
    The gradient of q comes with the forward pass: 4 M N D flops for both together, 2 M N D without a gradient; keys
    that require grad cost 4 M N D more (on the CPU, which keeps the first 31 MiB of logits for them, half of that up
    to 2850 x 2850). Of 16-bit embeddings wider than 512 (256 where keys require grad, or in a loss of two sides) a GPU
    keeps up to 256 MiB of exponentials at a time.
    Deterministic. No second derivative: double backward raises RuntimeError.

    Raises ValueError or TypeError for a wrong shape, dtype, device, number of groups or a scale that is not finite.
    """
    check_pair(q, k)
    check_groups(q_group, k_group, q, k)
    return lse_and_positives(q, k, scale, None, None, q_group, k_group)[0] / cpu.LOG2E


def info_nce(
    q: Tensor,
    k: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    positive: Tensor | None = None,
    q_group: Tensor | None = None,
    k_group: Tensor | None = None,
    label_smoothing: float = 0.0,
    hard_negatives: float = 0.0,
    debias: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """InfoNCE of queries against keys: each query's positive against its negatives, ``softplus(lse_negatives -
    logit_positive)``.

    Equivalent, for one positive and no groups: ``cross_entropy(q @ k.T / temperature, positive)``. In this form the
    positive is not part of the sum, so the gradient does not cancel when its probability is close to one.

    q (M, D), k (N, D): as for ``similarity_lse``; nothing is normalized here. ``positive`` (M,) or (M, P) holds key
    indices, default ``arange(M)``; with P positives the loss of a query is the mean over them, each against the same
    negatives (on a GPU each logit is compared with P indices, which beyond some 8 costs more than its product). The
    negatives are the keys that are no positive of the query and, given groups, whose ``k_group``
    differs from its ``q_group``. ``temperature`` is a positive number or a tensor of one element, which may require
    grad.

    ``label_smoothing`` in [0, 1) is that of ``cross_entropy``, and needs one positive and no groups.
    ``hard_negatives`` >= 0 weights each negative by ``exp(hard_negatives * logit)``, normalized to mean 1 (Robinson
    et al., arXiv 2010.04592), at twice the cost; ``debias`` in [0, 1) is the share of the positive's class among the
    negatives, which is subtracted (Chuang et al., arXiv 2007.00224; for unit vectors). Both count the negatives as n
    of them, in a pass over 16 columns.

    Returns a float32 scalar, or (M,) with ``reduction="none"``; a query without negatives has loss 0. Dtypes, cost,
    errors and determinism as for ``similarity_lse``.
    """
    check_pair(q, k)
    check_groups(q_group, k_group, q, k)
    check_options(label_smoothing, hard_negatives, debias, positive, q_group)
    columns = positive_columns(positive, q, k)
    scale = inverse_temperature(temperature)
    groups = (q_group, k_group)
    hard_negatives = float(hard_negatives)  # NumPy's would round the scales
    harder = scale * (1 + hard_negatives) if hard_negatives else scale
    lse2, positives, lse_residual = lse_and_positives(
        q, k, harder, columns, 0, *groups, cache_logits=not hard_negatives
    )
    logits = positives / cpu.LOG2E
    if hard_negatives or debias:
        negatives = lse2 / cpu.LOG2E

        def over_negatives(scale: float | Tensor, width: int = q.shape[1]) -> Tensor:
            sides = q[:, :width], k[:, :width]
            return lse_and_positives(*sides, scale, columns, 0, *groups, cache_logits=False)[0] / cpu.LOG2E

        with torch.no_grad():  # at a scale of zero, the logarithm of how many keys are seen
            log_count = over_negatives(0.0, 16)
        if hard_negatives:
            logits = logits / (1 + hard_negatives)
            average = negatives - over_negatives(scale * hard_negatives) + log_count
            negatives = torch.where(negatives == -torch.inf, negatives, average)
        sums = options.debiased(negatives, logits, log_count, scale, debias) if debias else negatives[:, None]
        loss = softplus(sums - logits).mean(1)
    else:
        loss = softplus_loss(lse2, lse_residual, positives)
    if label_smoothing:
        (left, right), _ = autocast(q, k)
        loss = loss + label_smoothing * (logits[:, 0] - options.mean_logit(left, right, scale))
    return reduce(loss, reduction)


def lse_and_positives(
    q: Tensor,
    k: Tensor,
    scale: float | Tensor,
    positive: Tensor | None,
    diagonal: int | None,
    q_group: Tensor | None = None,
    k_group: Tensor | None = None,
    cache_logits: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """(lse2 over the negatives (M,), logits of the positives (M, P), lse_residual of lse2 (M,)): what every loss here
    is made
    of, by ``softplus_loss``.

    ``positive`` (M, P), or None where the positive of query i is key ``i + diagonal``: that layout needs no mask
    elsewhere. Where both are None, no query has a positive. Without ``cache_logits`` the CPU path leaves no tiles for
    the keys'
    gradient: where passes add up.
    """
    (q, k), matmul_dtype = autocast(q, k)
    scale = scale_tensor(scale, q)
    shift = None if positive is not None else diagonal
    compute_grad_q, cache_logits = needs_grad(q, scale), cache_logits and needs_grad(k)
    lse2, logits, _, lse_residual, _ = apply_contrast(
        q, k, scale, q_group, k_group, positive, shift, compute_grad_q, matmul_dtype, cache_logits
    )
    return lse2, logits, lse_residual
