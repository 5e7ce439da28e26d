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
    merge_splits,
    multi_view_grad_q,
    multi_view_loss,
    positive_logits,
    softmax_grad,
)
from vito_kernels.contrastive.forward import launch_lse, launch_two_sided
from vito_kernels.contrastive.terms import Mask, PositiveTerm, SoftmaxGrad
from vito_kernels.contrastive.tile_configs import MAX_WIDTH, matrices

__all__ = [
    "alloc_logit_cache",
    "check_values",
    "grad_epilogue",
    "lse_backward",
    "lse_forward",
    "merge_splits",
    "multi_view_forward",
    "multi_view_grad_q",
    "path_of",
    "self_backward",
    "self_forward",
    "softmax_grad",
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
) -> tuple[Tensor, Tensor]:
    """In a pass for each side. Lists of positives only come with ``need_y`` alone."""
    left, right = matrices(*(_cast(side, matmul_dtype) for side in (x, y)))
    gx, gy = scale.new_empty(0, x.shape[1]), scale.new_empty(0, y.shape[1])
    if need_x:
        assert mask.positive is None
        gx = launch_lse_backward(left, right, scale, x_softmax, y_softmax, mask.transposed())
    if need_y:
        gy = launch_lse_backward(right, left, scale, y_softmax, x_softmax, mask)
    return gx, gy


def self_backward(
    z: Tensor,
    scale: Tensor,
    softmax: SoftmaxGrad,
    mask: Mask,
    positive_term: PositiveTerm | None = None,
    matmul_dtype: torch.dtype | None = None,
    logit_cache: Tensor | None = None,
) -> Tensor:
    side = _cast(z, matmul_dtype)
    return launch_lse_backward(*matrices(side, side), scale, softmax, softmax, mask, positive_term)
