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
    multi_view_loss,
    positive_logits,
    softmax_grad,
    softmax_grads,
)
from vito_kernels.contrastive.forward import launch_label_lse, launch_lse, launch_sums
from vito_kernels.contrastive.terms import Mask, PositiveTerm, SoftmaxGrad
from vito_kernels.contrastive.tile_configs import MAX_WIDTH, matrices
from vito_kernels.contrastive.two_sided_forward import launch_two_sided

__all__ = [
    "alloc_logit_cache",
    "check_values",
    "grad_epilogue",
    "grad_epilogues",
    "label_forward",
    "lse_backward",
    "lse_forward",
    "merge_splits",
    "multi_view_forward",
    "multi_view_grad_q",
    "path_of",
    "rank_forward",
    "self_backward",
    "self_forward",
    "sigmoid_forward",
    "softmax_grad",
    "softmax_grads",
    "two_sided_forward",
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
    sums = launch_lse(_cast(q, matmul_dtype), _cast(k, matmul_dtype), scale, mask, compute_grad_q)
    return *sums, positive_logits(q, k, scale, mask.positive, mask.diagonal)


def multi_view_forward(
    q: Tensor, k: Tensor, scale: Tensor, mask: Mask, compute_grad_q: bool, matmul_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    queries, keys = (_cast(x, matmul_dtype).flatten(0, 1) for x in (q, k))
    lse2, lse_residual, mean = launch_lse(queries, keys, scale, mask, compute_grad_q, views=len(q))
    loss, weight = multi_view_loss(q, k, scale, lse2, lse_residual, mask.diagonal or 0)
    return loss, weight, lse2.view_as(loss), lse_residual.view_as(loss), mean


def two_sided_forward(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    mask: Mask,
    matmul_dtype: torch.dtype | None = None,
    logit_cache: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    sums = launch_two_sided(_cast(x, matmul_dtype), _cast(y, matmul_dtype), scale, mask)
    return *sums, positive_logits(x, y, scale, None, mask.diagonal)


def self_forward(
    z: Tensor,
    scale: Tensor,
    mask: Mask,
    matmul_dtype: torch.dtype | None = None,
    logit_cache: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    side = _cast(z, matmul_dtype)
    lse2, lse_residual, _ = launch_lse(side, side, scale, mask, False)
    return lse2, lse_residual, positive_logits(z, z, scale, None, 0 if mask.width == 2 else None, adjacent=True)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    left = _cast(q, matmul_dtype)
    return launch_label_lse(left, left if one_set else _cast(k, matmul_dtype), scale, mask, label, key_label)


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
    """In a pass for each side. Lists of positives only come with ``need_y`` alone. Not summed over ``parts`` if asked
    for them, (S, M, D) and (S, N, D).
    """
    left, right = matrices(*(_cast(side, matmul_dtype) for side in (x, y)))
    gx, gy = scale.new_empty(1, 0, x.shape[1]), scale.new_empty(1, 0, y.shape[1])
    if need_x:
        assert mask.positive is None
        gx = launch_lse_backward(left, right, scale, x_softmax, y_softmax, mask.transposed(), positive_term, sigmoid)
    if need_y:
        gy = launch_lse_backward(right, left, scale, y_softmax, x_softmax, mask, positive_term, sigmoid)
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
    return launch_lse_backward(*matrices(side, side), scale, softmax, softmax, mask, positive_term)
