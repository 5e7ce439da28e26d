"""The Triton path of the contrastive ops, and the one place that chooses between it and the CPU path.

Functions have the names and signatures of :mod:`.cpu`.

``matmul_dtype`` is a dtype that holds the values of the embeddings exactly, for the tensor cores; None keeps theirs.
``logit_cache`` stays empty: on a GPU a product costs less than to read it back.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from vito_kernels._core.lazy_triton import use_triton
from vito_kernels.contrastive import cpu
from vito_kernels.contrastive.backward import launch_lse_backward
from vito_kernels.contrastive.epilogue import (
    grad_epilogue,
    grad_epilogues,
    merge_splits,
    multi_view_grad_q,
    positive_logits,
    softmax_grad,
    softmax_grads,
    views_epilogue,
)
from vito_kernels.contrastive.forward import launch_lse
from vito_kernels.contrastive.other_sums import launch_label_lse, launch_sums
from vito_kernels.contrastive.sigmoid_loss import SigmoidLosses, launch_sigmoid_loss
from vito_kernels.contrastive.softplus_loss import Positives, RowLosses, launch_softplus_loss, new_counter
from vito_kernels.contrastive.terms import Mask, PositiveTerm, SoftmaxGrad
from vito_kernels.contrastive.tile_configs import MAX_WIDTH, matrices
from vito_kernels.contrastive.two_sided_forward import launch_two_sided

__all__ = [
    "alloc_logit_cache",
    "check_values",
    "grad_epilogue",
    "grad_epilogues",
    "label_forward",
    "loss_forward",
    "lse_backward",
    "lse_forward",
    "merge_splits",
    "multi_view_forward",
    "multi_view_grad_q",
    "path_of",
    "rank_forward",
    "self_backward",
    "self_loss_forward",
    "sigmoid_forward",
    "sigmoid_loss_forward",
    "softmax_grad",
    "softmax_grads",
    "two_sided_forward",
    "two_sided_loss_forward",
    "views_epilogue",
]


def path_of(x: Tensor) -> Any:
    """The module that computes on rows x (M, D): this one, or :mod:`.cpu`.

    Beyond D = 1024 the rows that must stay in shared memory do not fit every GPU: there PyTorch computes, on the GPU.
    """
    return sys.modules[__name__] if use_triton(x) and x.shape[1] <= MAX_WIDTH else cpu


def _cast(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    return x if dtype is None else x.to(dtype)


def check_values(*_: Any) -> None:
    """The host does not read a GPU's values: a scale that is not finite or a positive that is no key makes NaN."""


def alloc_logit_cache(q: Tensor, k: Tensor, scale: Tensor, *_: Any, **__: Any) -> Tensor:
    return scale.new_empty(0)


def lse_forward(
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    mask: Mask,
    compute_grad_q: bool,
    matmul_dtype: torch.dtype | None = None,
    logit_cache: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    splits = launch_lse(_cast(q, matmul_dtype), _cast(k, matmul_dtype), scale, mask, compute_grad_q)
    return *merge_splits(*splits), positive_logits(q, k, scale, mask.positive, mask.diagonal)


def loss_forward(
    q: Tensor,
    k: Tensor,
    own_key: Tensor | None,
    scale: Tensor,
    mask: Mask,
    compute_grad_q: bool,
    divisor: float | None,
    decoupled: bool,
    matmul_dtype: torch.dtype | None = None,
    logit_cache: Tensor | None = None,
) -> RowLosses:
    done = new_counter(q)
    sides = _cast(q, matmul_dtype), _cast(k, matmul_dtype)
    lse2, lse_residual, mean = launch_lse(*sides, scale, mask, compute_grad_q, done=done)
    positives = Positives(q, k if own_key is None else own_key, scale, mask.positive, mask.diagonal or 0)
    return launch_softplus_loss([(lse2, lse_residual)], positives, divisor, decoupled, mean, done)


def multi_view_forward(
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    mask: Mask,
    compute_grad_q: bool,
    divisor: float | None,
    matmul_dtype: torch.dtype | None = None,
) -> RowLosses:
    done, (queries, keys) = new_counter(q), (_cast(x, matmul_dtype).flatten(0, 1) for x in (q, k))
    lse2, lse_residual, mean = launch_lse(queries, keys, scale, mask, compute_grad_q, len(q), done)
    positives = Positives(q.flatten(0, 1), k.flatten(0, 1), scale, diagonal=mask.diagonal or 0, views=len(q))
    return launch_softplus_loss([(lse2, lse_residual)], positives, divisor, False, mean, done)


def two_sided_forward(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    mask: Mask,
    matmul_dtype: torch.dtype | None = None,
    logit_cache: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    row, column = launch_two_sided(_cast(x, matmul_dtype), _cast(y, matmul_dtype), scale, mask)
    return *row, *column, positive_logits(x, y, scale, None, mask.diagonal)


def two_sided_loss_forward(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    matmul_dtype: torch.dtype | None = None,
    logit_cache: Tensor | None = None,
) -> RowLosses:
    done, sides = new_counter(x), (_cast(x, matmul_dtype), _cast(y, matmul_dtype))
    sums = launch_two_sided(*sides, scale, Mask(diagonal=0), done)
    return launch_softplus_loss(sums, Positives(x, y, scale), float(len(x)), False, done=done)


def self_loss_forward(
    z: Tensor, scale: Tensor, mask: Mask, divisor: float | None, decoupled: bool, logit_cache: Tensor | None = None
) -> RowLosses:
    done = new_counter(z)
    lse2, lse_residual, _ = launch_lse(z, z, scale, mask, False, done=done)
    positives = Positives(z, z, scale, adjacent=True)
    return launch_softplus_loss([(lse2, lse_residual)], positives, divisor, decoupled, done=done)


def label_forward(
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    mask: Mask,
    label: Tensor,
    key_label: Tensor,
    one_set: bool,
    matmul_dtype: torch.dtype | None = None,
    logit_cache: Tensor | None = None,
    done: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    left = _cast(q, matmul_dtype)
    return launch_label_lse(left, left if one_set else _cast(k, matmul_dtype), scale, mask, label, key_label, done)


def sigmoid_forward(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    mask: Mask,
    compute_grad_x: bool,
    matmul_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sides = _cast(x, matmul_dtype), _cast(y, matmul_dtype)
    total, shares, mean = launch_sums("sigmoid", *sides, scale, bias, mask, compute_grad_x)
    return _summed(total), positive_logits(x, y, scale, None, mask.diagonal), _summed(shares), _summed(mean)


def sigmoid_loss_forward(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    diagonal: int | None,
    compute_grad_x: bool,
    divisor: float | None,
    matmul_dtype: torch.dtype | None = None,
) -> SigmoidLosses:
    done, sides, mask = new_counter(x), (_cast(x, matmul_dtype), _cast(y, matmul_dtype)), Mask(diagonal=diagonal)
    sums = launch_sums("sigmoid", *sides, scale, bias, mask, compute_grad_x, done)
    pairs = None if diagonal is None else Positives(x, y, scale, diagonal=diagonal)
    return launch_sigmoid_loss(*sums, pairs, bias, divisor, done)


def rank_forward(q: Tensor, k: Tensor, scale: Tensor, mask: Mask, matmul_dtype: torch.dtype | None = None) -> Tensor:
    sides = _cast(q, matmul_dtype), _cast(k, matmul_dtype)
    logits = positive_logits(q, k, scale, mask.positive, mask.diagonal)
    return _summed(launch_sums("rank", *sides, scale, logits, mask, False)[0])


def lse_backward(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    x_softmax: SoftmaxGrad | None,
    y_softmax: SoftmaxGrad | None,
    mask: Mask,
    need_x: bool,
    need_y: bool,
    matmul_dtype: torch.dtype | None = None,
    logit_cache: Tensor | None = None,
    *,
    positive_term: PositiveTerm | None = None,
    sigmoid: bool = False,
    parts: bool = False,
) -> tuple[Tensor, Tensor]:
    """In a launch for both sides. Lists of positives only come with ``need_y`` alone. Not summed over ``parts`` if
    asked for them, (S, M, D) and (S, N, D).
    """
    left, right = matrices(*(_cast(side, matmul_dtype) for side in (x, y)))
    gx, gy = scale.new_empty(1, 0, x.shape[1]), scale.new_empty(1, 0, y.shape[1])
    options = positive_term, sigmoid
    if need_x:
        assert mask.positive is None
        gx, *other = launch_lse_backward(left, right, scale, x_softmax, y_softmax, mask.transposed(), *options, need_y)
        gy = other[0] if other else gy
    elif need_y:
        (gy,) = launch_lse_backward(right, left, scale, y_softmax, x_softmax, mask, *options)
    return (gx, gy) if parts else (_summed(gx), _summed(gy))


def _summed(x: Tensor) -> Tensor:
    """Of splits (S, ...)."""
    return x[0] if x.shape[0] == 1 else x.sum(0)


def self_backward(
    z: Tensor,
    scale: Tensor,
    softmax: SoftmaxGrad,
    mask: Mask,
    positive_term: PositiveTerm | None = None,
    matmul_dtype: torch.dtype | None = None,
    logit_cache: Tensor | None = None,
) -> Tensor:
    """Of splits (S, M, D), to be added up."""
    side = _cast(z, matmul_dtype)
    return launch_lse_backward(*matrices(side, side), scale, softmax, softmax, mask, positive_term)[0]
