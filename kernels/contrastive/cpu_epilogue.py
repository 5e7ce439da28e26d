"""The ends of the gradients on the CPU path, as in :mod:`.epilogue`: positives, factors, one rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vito_kernels.contrastive.normalize import torch_normalize_backward
from vito_kernels.contrastive.terms import LOG2E, ordered_pairs


def grad_epilogue(
    base: Tensor,
    scale: Tensor,
    dtype: torch.dtype,
    *,
    store: bool = True,
    weight: Tensor | None = None,
    pair_weight: Tensor | None = None,
    k: Tensor | None = None,
    positive: Tensor | None = None,
    diagonal: int = 0,
    by_key: bool = False,
    other: Tensor | None = None,
    gradient: Tensor | None = None,
    factor: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As ``epilogue.grad_epilogue``. May write over ``base``."""
    grad = base if weight is None else base * (weight * LOG2E)[:, None]
    if pair_weight is not None and k is not None:
        if by_key:
            grad[-diagonal : len(k) - diagonal].addcmul_(k.to(grad.dtype), pair_weight, value=LOG2E)
        else:
            for p, keys in enumerate(positive_keys(len(base), k, positive, diagonal)):
                grad.addcmul_(k[keys].to(grad.dtype), pair_weight[:, p, None], value=LOG2E)
    for x in (gradient, factor):
        grad = grad if x is None else grad * x
    dscale = scale.new_empty(0) if other is None else (grad * other).sum()
    return grad.mul_(scale).to(dtype) if store else base.new_empty(0, dtype=dtype), dscale


def grad_epilogues(
    base: Tensor | None,
    key_base: Tensor | None,
    scale: Tensor,
    q: Tensor,
    k: Tensor,
    pair_weight: Tensor | None,
    diagonal: int,
    weight: Tensor | None,
    store: bool,
    dots: bool,
    gradient: Tensor | None = None,
    factor: Tensor | None = None,
    one: Callable[..., tuple[Tensor, Tensor]] = grad_epilogue,
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``epilogue.grad_epilogues``, by ``one`` epilogue after the other. A base that is not there makes no gradient.

    May write over the bases.
    """
    dq, dscale, dk = q.new_empty(0), scale.new_empty(0), k.new_empty(0)
    factors = {"gradient": gradient, "factor": factor}
    if base is not None:
        pairs = {"pair_weight": pair_weight, "k": k, "diagonal": diagonal, **factors}
        dq, dscale = one(base, scale, q.dtype, store=store, weight=weight, other=q if dots else None, **pairs)
    if key_base is not None:
        pairs = {"pair_weight": pair_weight, "k": q, "diagonal": -diagonal, **factors}
        dk, _ = one(key_base, scale, k.dtype, by_key=True, **pairs)
    return dq, dscale, dk


def views_epilogue(
    base: Tensor,
    pair_weight: Tensor,
    z: Tensor,
    z1: Tensor,
    z2: Tensor,
    scale: Tensor,
    gradient: Tensor | None,
    need_z: bool,
    need_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``epilogue.views_epilogue``. May write over ``base``."""
    share = (pair_weight[::2] + pair_weight[1::2]) * LOG2E
    base[::2].addcmul_(z[1::2].to(base.dtype), share)
    base[1::2].addcmul_(z[::2].to(base.dtype), share)
    dz, dscale = grad_epilogue(base, scale, base.dtype, other=z if need_scale else None, gradient=gradient)
    if not need_z:
        return z1.new_empty(0), z2.new_empty(0), dscale
    return torch_normalize_backward(dz[::2], z1), torch_normalize_backward(dz[1::2], z2), dscale


def multi_view_grad_q(
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    mean: Tensor,
    weight: Tensor,
    grad_loss: Tensor,
    offset: int,
    need_q: bool,
    need_scale: bool,
) -> tuple[Tensor, Tensor]:
    """As ``epilogue.multi_view_grad_q``."""
    views, rows = q.shape[:2]
    share = (weight.view(-1, rows) * grad_loss * LOG2E)[:, :, None]
    pull = (mean.view(views, views - 1, *q.shape[1:]) * share.unflatten(0, (views, views - 1))).sum(1)
    for pair, (a, b) in enumerate(ordered_pairs(views)):
        pull[a].addcmul_(k[b, offset : offset + rows].to(pull.dtype), share[pair], value=-1)
    grad_scale = (pull * q).sum() if need_scale else mean.new_empty(0)
    return pull.mul_(scale).to(q.dtype) if need_q else q.new_empty(0), grad_scale


def positive_keys(queries: int, k: Tensor, positive: Tensor | None, diagonal: int) -> list[Any]:
    """The positive keys of all queries, one entry for each column of positives."""
    if positive is None:
        return [slice(diagonal, diagonal + queries)]
    if positive.is_cuda:  # unchecked there; one that is no key made the loss NaN
        positive = positive.clamp(0, len(k) - 1)
    return list(positive.unbind(1))
