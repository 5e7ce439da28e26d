"""Small losses on the CPU: the whole matrix of logits at once, one ``autograd.Function`` a loss.

    s    = scale * x @ y.T                                          (M, N), masked
    p    = s.softmax(1);  rest = p without the positive, summed     1 - p of the positive, without cancellation
    loss = log1p(rest / p of the positive)                          softplus of the logarithms where p is too small
    ds   = p, and -rest at the positive

Up to ``MOST_LOGITS`` the tiles of :mod:`.cpu` cost more Python than arithmetic. float32, bfloat16 and float16 are
computed in float32, float64 in float64; gradients are rounded once. A matrix takes at most 256 KiB (float32).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from vito_kernels._core.autograd import PLAIN, once, refuse_batched, softplus
from vito_kernels._core.checks import FLOATS, check_finite, check_reduction, check_scale, scale_tensor
from vito_kernels.contrastive import gpu

MOST_LOGITS = 1 << 16
NARROW = torch.bfloat16, torch.float16  # computed in float32
MIN_LENGTH = 1e-12  # of an embedding that is normalized

# Of logits (M, N), which it may write over: losses, their gradient. A loss beyond the logarithm of the largest float is
# inf unless ``far``.
Terms = Callable[[Tensor, bool], tuple[Tensor, Tensor]]


def is_small(x: Tensor, y: Tensor, *others: Tensor | None) -> bool:
    """Whether x (M, D) and y (N, D) pass ``check_pair`` and take this way: few logits, plain eager code, a CPU.

    ``others`` are on that CPU too.
    """
    if type(x) not in PLAIN or type(y) not in PLAIN or torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return False
    if not (x.is_cpu and y.is_cpu) or gpu.use_triton(x):
        return False
    (dtype, shape), other = (x.dtype, x.shape), y.shape
    if dtype != y.dtype or dtype not in FLOATS or not len(shape) == len(other) == 2 or shape[1] != other[1]:
        return False
    if not 0 < shape[0] * other[0] <= MOST_LOGITS or not shape[1] or not x.layout == y.layout == torch.strided:
        return False
    for z in others:
        if z is not None and (type(z) not in PLAIN or not z.is_cpu):
            return False
    if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled("cpu"):
        return False
    return torch._C._get_tracing_state() is None and not torch._C._are_functorch_transforms_active()


# ---- logits to losses


def one_positive(
    s: Tensor, far: bool = False, dim: int = 1, place: Callable[[Tensor], Tensor] = Tensor.diagonal
) -> tuple[Tensor, Tensor]:
    """Losses of the rows (dim 1) or columns (0) of s (M, N), and their gradient by s.

    ``place`` is a view of a matrix that holds the positives, of a shape that the losses take too.
    """
    p = torch.softmax(s, dim)
    own = place(p)
    inverse = own.reciprocal()
    own.zero_()
    rest = p.sum(dim)
    if own.dim() == 2:
        rest = rest.view(own.shape)
    own.sub_(rest)
    if far:
        return softplus(rest.log_().sub_(place(torch.log_softmax(s, dim)))), p
    return rest.mul_(inverse).log1p_(), p


def rows(groups: tuple[Tensor, Tensor] | None, index: Tensor | None) -> Terms:
    """InfoNCE: the positive of row i is key i, or ``index[i]`` (M, 1). Keys of the query's group are no negatives."""
    if groups is None and index is None:
        return one_positive

    def terms(s: Tensor, far: bool) -> tuple[Tensor, Tensor]:
        if groups is not None:
            masked = groups[0][:, None] == groups[1]
            if index is None:
                masked.fill_diagonal_(False)
            else:
                masked.scatter_(1, index, False)
            s.masked_fill_(masked, -math.inf)
        if index is None:
            return one_positive(s, far)
        p = torch.softmax(s, 1)
        own = p.gather(1, index)
        rest = p.scatter_(1, index, 0.0).sum(1, keepdim=True)
        p.scatter_(1, index, rest.neg())
        if far:
            return softplus(rest.log_().sub_(torch.log_softmax(s, 1).gather(1, index))).view(-1), p
        return rest.div_(own).log1p_().view(-1), p

    return terms


def key_before_queue(s: Tensor, far: bool) -> tuple[Tensor, Tensor]:
    """MoCo: the first M keys are the queries' own, and no one else's."""
    block = s[:, : s.shape[0]]
    own = block.diagonal().clone()
    block.fill_(-math.inf)
    block.diagonal().copy_(own)
    return one_positive(s, far)


def rows_and_columns(s: Tensor, far: bool) -> tuple[Tensor, Tensor]:
    """CLIP, the losses of all rows and then of all columns."""
    columns, column_grad = one_positive(s, far, 0)
    losses, grad = one_positive(s, far)
    return torch.cat([losses, columns]), grad.add_(column_grad)


def other_view(x: Tensor) -> Tensor:
    """Of a matrix of two views' rows (2 B, 2 B), the entries (2, B) of each row with its other view."""
    half = x.shape[0] // 2
    return x.as_strided((2, half), (2 * half * half - half, 2 * half + 1), half)


def two_views(s: Tensor, far: bool) -> tuple[Tensor, Tensor]:
    """NT-Xent: the first half of the rows are the first views."""
    s.diagonal().fill_(-math.inf)
    losses, grad = one_positive(s, far, 1, other_view)
    return losses.flatten(), grad


def decoupled_views(s: Tensor, far: bool) -> tuple[Tensor, Tensor]:
    """``two_views`` without the positive in the denominator; a sample alone has loss 0."""
    half = s.shape[0] // 2
    if half == 1:
        return s.new_zeros(2), s.zero_()
    s.diagonal().fill_(-math.inf)
    own = other_view(s)
    positives = own.clone()
    own.fill_(-math.inf)
    losses = s.logsumexp(1).view(2, half).sub_(positives)
    grad = torch.softmax(s, 1)
    other_view(grad).fill_(-1)
    return losses.flatten(), grad


def same_label(labels: Tensor, key_labels: Tensor | None, reduction: str) -> Terms:
    """SupCon of one set, or against keys; with "mean", losses whose mean is that of the rows that have a positive."""
    one_set = key_labels is None

    def terms(s: Tensor, far: bool) -> tuple[Tensor, Tensor]:
        same = labels.unsqueeze(1) == (labels if key_labels is None else key_labels)
        if one_set:
            s.diagonal().fill_(-math.inf)
            same.diagonal().zero_()
        log_p, grad = torch.log_softmax(s, 1), torch.softmax(s, 1)
        count = same.sum(1, keepdim=True, dtype=s.dtype)
        lonely = count.min().item() == 0
        share = same / (count.clamp(min=1) if lonely else count)
        if one_set:
            log_p.diagonal().zero_()
        losses = log_p.mul_(share).sum(1).neg_()
        grad.sub_(share)
        if lonely:
            grad.masked_fill_(count == 0, 0.0)
            if reduction == "mean":
                factor = len(s) / max(1, count.count_nonzero().item())
                return losses.mul_(factor), grad.mul_(factor)
        return losses, grad

    return terms


def all_pairs(bias: float | Tensor) -> Terms:
    """SigLIP: the sigmoid of every logit, pairs on the diagonal."""

    def terms(s: Tensor, far: bool) -> tuple[Tensor, Tensor]:
        own = s.add_(bias).diagonal()
        own.neg_()
        losses, grad = softplus(s).sum(1), s.sigmoid_()
        grad.diagonal().neg_()
        return losses, grad

    return terms


def all_views(views: int, offset: int, groups: tuple[Tensor, Tensor] | None, weight: float) -> Terms:
    """InfoNCE of each view's rows over each other view's columns, times ``weight``; losses (views, views, M)."""

    def terms(s: Tensor, far: bool) -> tuple[Tensor, Tensor]:
        rows = s.shape[0] // views
        grid = s.view(views, rows, views, -1)
        if groups is not None:
            masked = groups[0][:, None] == groups[1]
            masked.diagonal(offset)[:rows].fill_(False)
            grid.masked_fill_(masked[:, None], -math.inf)
        log_p, p = torch.log_softmax(grid, 3), torch.softmax(grid, 3)
        own, log_own = (x.diagonal(offset, 1, 3)[..., :rows] for x in (p, log_p))
        own.zero_()
        rest = p.sum(3).transpose(1, 2)
        torch.neg(rest, out=own)
        losses = softplus(rest.log().sub_(log_own))
        p.diagonal(0, 0, 2).zero_()
        losses.diagonal().zero_()
        return losses.mul_(weight), p.view(s.shape).mul_(weight)

    return terms


# ---- the loss


def finite_scale(scale: float | Tensor, like: Tensor) -> float | Tensor:
    """The inverse temperature, checked: a number as it is, a tensor as ``scale_tensor``."""
    if not isinstance(scale, Tensor):
        return check_scale(scale, like)
    scale = scale_tensor(scale, like)
    check_finite(scale)
    return scale


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in NARROW else x


def _as(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype else x.to(dtype)


_ANY = {dtype: torch.zeros((), dtype=dtype, device="cpu") for dtype in (torch.float32, torch.float64)}


def _product(x: Tensor, y: Tensor, factor: float) -> Tensor:
    """``factor * x @ y``."""
    return torch.addmm(_ANY[x.dtype], x, y, beta=0, alpha=factor)


@functools.lru_cache(16)
def _weights(size: int, value: float, dtype: torch.dtype) -> Tensor:
    return torch.full((size,), value, dtype=dtype, device="cpu")


def _losses(ctx: Any, x: Tensor, y: Tensor, scale: float | Tensor, terms: Terms, reduction: str) -> Tensor:
    scale = scale.item() if isinstance(scale, Tensor) else scale
    y = y.t()
    losses, ds = terms(_product(x, y, scale), False)
    factor = 1 / losses.numel() if reduction == "mean" else 1.0
    weights = _weights(losses.numel(), factor, losses.dtype)
    total = torch.dot(losses.flatten(), weights)
    if total.item() == math.inf:
        losses, ds = terms(_product(x, y, scale), True)
        total = torch.dot(losses.flatten(), weights)
    reduced = reduction != "none"
    ctx.found = ds, scale, factor, reduced
    return total if reduced else losses


def _logit_grad(ctx: Any, grad: Tensor) -> tuple[Tensor, float, float]:
    """The gradient by the logits is the product of the first two; the third is the scale."""
    if is_legacy_batchedtensor(grad):
        refuse_batched("loss", grad)
    ds, scale, factor, reduced = ctx.found
    return (ds, grad.item() * factor, scale) if reduced else (ds * grad[:, None], factor, scale)


class _Pairs(torch.autograd.Function):
    """Losses of x (M, D) against y (N, D), with a bias of all logits that ``terms`` has added."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, scale: float | Tensor, bias: Tensor | None, terms: Terms, reduction: str
    ) -> Tensor:
        ctx.save_for_backward(x, y)
        return _losses(ctx, _wide(x), _wide(y), scale, terms, reduction)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, y), (need_x, need_y, need_scale, need_bias, _, _) = ctx.saved_tensors, ctx.needs_input_grad
        ds, factor, scale = _logit_grad(ctx, grad)
        dtype, dx, dy, dscale = x.dtype, None, None, None
        dbias = ds.sum().mul_(factor) if need_bias else None
        if dtype in NARROW:
            x, y = x.float(), y.float()
        if need_scale:
            dscale = (_product(ds, y, factor) * x).sum()
        if need_x:
            dx = _product(ds, y, factor * scale)
        if need_y:
            dy = _product(ds.t(), x, factor * scale)
        if dtype in NARROW:
            dx, dy = (None if grad is None else grad.to(dtype) for grad in (dx, dy))
        return dx, dy, dscale, dbias, None, None


class _UnitSet(torch.autograd.Function):
    """Losses of the normalized rows of one or two tensors (B, D) against each other."""

    @staticmethod
    def forward(ctx: Any, scale: float | Tensor, terms: Terms, reduction: str, *tensors: Tensor) -> Tensor:
        z = _wide(tensors[0] if len(tensors) == 1 else torch.cat(tensors))
        length = torch.linalg.vector_norm(z, dim=1, keepdim=True).clamp_(min=MIN_LENGTH)
        unit = z / length
        ctx.dtypes = [x.dtype for x in tensors]
        ctx.save_for_backward(unit, length, *tensors)  # these for ``once``
        return _losses(ctx, unit, unit, scale, terms, reduction)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (unit, length, *_), (ds, factor, scale) = ctx.saved_tensors, _logit_grad(ctx, grad)
        du = _product(ds + ds.t(), unit, factor * scale)
        along = (du * unit).sum(1, keepdim=True)
        dscale = along.sum() / (2 * scale) if ctx.needs_input_grad[0] else None
        along.masked_fill_(length == MIN_LENGTH, 0)
        dz = du.addcmul_(unit, along, value=-1).div_(length)
        parts = dz.chunk(len(ctx.dtypes))
        needs = zip(parts, ctx.dtypes, ctx.needs_input_grad[3:], strict=True)
        return dscale, None, None, *(_as(part, dtype) if need else None for part, dtype, need in needs)


_Pairs.backward = staticmethod(once(_Pairs.backward, "loss"))  # type: ignore[method-assign]
_UnitSet.backward = staticmethod(once(_UnitSet.backward, "loss"))  # type: ignore[method-assign]


def pairs(
    x: Tensor, y: Tensor, scale: float | Tensor, terms: Terms, reduction: str, bias: Tensor | None = None
) -> Tensor:
    """The mean, the sum or ("none") the losses that ``terms`` makes of the logits of x (M, D) and y (N, D).

    ``bias`` is the tensor () that ``terms`` adds to them.
    """
    check_reduction(reduction)
    return _Pairs.apply(x, y, finite_scale(scale, x), bias, terms, reduction)


def unit_set(tensors: tuple[Tensor, ...], scale: float | Tensor, terms: Terms, reduction: str) -> Tensor:
    """``pairs`` of the rows of tensors (B, D) with themselves, all of unit length."""
    check_reduction(reduction)
    return _UnitSet.apply(finite_scale(scale, tensors[0]), terms, reduction, *tensors)
