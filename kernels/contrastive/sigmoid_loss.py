"""The end of SigLIP's forward pass: the losses of rows from their sums over keys.

    loss_i = sum over other rows j of softplus(s_ij) + softplus(-s_ii)

One kernel adds the key splits, takes the pairs' logits, and writes the losses and the weights of the backward pass, as
:mod:`.softplus_loss` does. Sums and logits are in units of log 2. float32 (float64 for float64), deterministic.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vito_kernels._core.autograd import softplus as plain_softplus
from vito_kernels._core.lazy_triton import cdiv, jit, on_device, program_shape, rows_contiguous, use_triton
from vito_kernels.contrastive.device_functions import ends_last, ordered_sum, sigmoid, softplus
from vito_kernels.contrastive.softplus_loss import Positives
from vito_kernels.contrastive.terms import LOG2E, SoftmaxGrad

if TYPE_CHECKING:
    import triton.language as tl


@jit
def sigmoid_loss_kernel(
    x, y, scale, logits, bias, sums, shares, mean, loss, parts, done, below, weight, weight2, pair_weight, bias_weight,
    merged, M, N, D, splits, divisor, x_stride, y_stride, diagonal, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    PAIRED: tl.constexpr, GIVEN: tl.constexpr, MERGE: tl.constexpr, REDUCED: tl.constexpr,
):  # fmt: skip
    """Of sums and shares (splits, M) and mean (splits, M, D). The outputs are those of ``SigmoidLosses``."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    inside = (row < M)[:, None] & (column < D)[None]
    offset = tl.load(bias)
    total = tl.zeros((ROWS,), tl.float32)
    share = tl.zeros((ROWS,), tl.float32)
    for s in range(splits):
        part = tl.cast(s, tl.int64) * M + row
        total += tl.load(sums + part, mask=row < M, other=0.0)
        share += tl.load(shares + part, mask=row < M, other=0.0)
    if MERGE:
        acc = tl.zeros((ROWS, WIDTH), tl.float32)
        for s in range(splits):
            place = (tl.cast(s, tl.int64) * M + row)[:, None] * D + column[None]
            acc += tl.load(mean + place, mask=inside, other=0.0)
        tl.store(merged + row.to(tl.int64)[:, None] * D + column[None], acc, mask=inside)
    each = 1.0 / divisor
    value = total * 0.6931471805599453
    share *= each
    if PAIRED:
        if GIVEN:
            logit = tl.load(logits + row, mask=row < M, other=0.0) * 0.6931471805599453
        else:
            key = row.to(tl.int64)[:, None] + diagonal
            own = tl.load(x + row.to(tl.int64)[:, None] * x_stride + column[None], mask=inside, other=0.0)
            other = tl.load(y + key * y_stride + column[None], mask=inside & (key < N), other=0.0)
            logit = tl.sum(own.to(tl.float32) * other.to(tl.float32), 1) * tl.load(scale)
        value += softplus(-(logit + offset))
        pull = -each * sigmoid(-(logit + offset))
        tl.store(pair_weight + row, pull * 0.6931471805599453, mask=row < M)
        share += pull
    tl.store(below + row, offset * -1.4426950408889634 + tl.zeros((ROWS,), tl.float32), mask=row < M)
    tl.store(weight + row, each + tl.zeros((ROWS,), tl.float32), mask=row < M)
    tl.store(weight2 + row, each * 0.6931471805599453 + tl.zeros((ROWS,), tl.float32), mask=row < M)
    if REDUCED:
        programs = tl.num_programs(0)
        tl.store(parts + tl.program_id(0), tl.sum(tl.where(row < M, value, 0.0), 0))
        tl.store(parts + programs + tl.program_id(0), tl.sum(tl.where(row < M, share, 0.0), 0))
        if ends_last(done):
            tl.store(loss, ordered_sum(parts, programs) / divisor)
            tl.store(bias_weight, ordered_sum(parts + programs, programs))
    else:
        tl.store(loss + row, value, mask=row < M)
        tl.store(bias_weight + row, share, mask=row < M)


@dataclass(frozen=True)
class SigmoidLosses:
    """Losses, () or (M,), and their derivatives.

    ``softmax`` holds the sigmoid of other pairs. Weights are those of the sum or mean of the losses: ``weight`` (M,) of
    ``mean`` and ``pair_weight`` (M, 1) or (M, 0) of the pairs' logits, in units of log 2, and ``bias_weight``, () or
    (M,), of the bias.
    """

    loss: Tensor
    softmax: SoftmaxGrad
    weight: Tensor
    pair_weight: Tensor
    bias_weight: Tensor
    mean: Tensor


def launch_sigmoid_loss(
    sums: Tensor,
    shares: Tensor,
    mean: Tensor,
    pairs: Positives | Tensor | None,
    bias: Tensor,
    divisor: float | None,
    done: Tensor | None = None,
) -> SigmoidLosses:
    """Of sums and shares (S, M) and mean (S, M, D) or (S, 0, D) of key splits.

    Args:
        pairs: row i of q and ``i + diagonal`` of k, or their logits (M, 1), or None where no row has its pair.
        divisor: of the sum of the losses; None for the losses themselves.
        done: a counter that an earlier kernel has zeroed, for a sum or a mean.
    """
    (splits, M), D, new, reduced = sums.shape, mean.shape[2], sums.new_empty, divisor is not None
    merge, paired = mean.shape[0] > 1 and mean.shape[1] > 0, pairs is not None
    x, y, scale, logits, diagonal = None, None, None, None, 0
    if isinstance(pairs, Positives):
        x, y, scale, diagonal = rows_contiguous(pairs.q), rows_contiguous(pairs.k), pairs.scale, pairs.diagonal
    elif pairs is not None:
        logits = pairs.contiguous()
    width, rows = program_shape(D) if x is not None or merge else (1, 256)
    found = SigmoidLosses(
        new(() if reduced else M), SoftmaxGrad(new(M), new(M)), new(M), new(M, int(paired)), new(() if reduced else M),
        new(mean.shape[1:]) if merge else mean[0],
    )  # fmt: skip
    grid = cdiv(M, rows)
    with on_device(sums):
        sigmoid_loss_kernel[(grid,)](
            x, y, scale, logits, bias, sums, shares, mean, found.loss, new(2 * grid) if reduced else None, done,
            found.softmax.lse2, found.softmax.weight, found.weight, found.pair_weight, found.bias_weight, found.mean, M,
            0 if y is None else y.shape[0], D, splits, divisor or 1.0, 0 if x is None else x.stride(0),
            0 if y is None else y.stride(0), diagonal, width, rows, paired, logits is not None, merge, reduced,
        )  # fmt: skip
    return found


def torch_sigmoid_loss(
    sums: Tensor, shares: Tensor, mean: Tensor, logits: Tensor, bias: Tensor, divisor: float | None
) -> SigmoidLosses:
    """As ``launch_sigmoid_loss`` in PyTorch, of sums (M,), mean (M, D) and the logits of pairs (M, 1) or (M, 0)."""
    loss, weight = sums / LOG2E, torch.full_like(sums, 1 / (divisor or 1.0))
    share, pair_weight = shares * weight, logits.new_empty(logits.shape)
    if logits.shape[1]:
        over = logits[:, 0] / LOG2E + bias
        loss, pull = loss + plain_softplus(-over), -weight * torch.sigmoid(-over)
        share, pair_weight = share + pull, (pull / LOG2E)[:, None]
    softmax = SoftmaxGrad((bias * -LOG2E).expand(len(sums)).contiguous(), weight)
    loss, bias_weight = (loss, share) if divisor is None else (loss.sum() / divisor, share.sum())
    return SigmoidLosses(loss, softmax, weight / LOG2E, pair_weight, bias_weight, mean)


def sigmoid_losses(sums: Tensor, shares: Tensor, logits: Tensor, bias: Tensor) -> SigmoidLosses:
    """The losses (M,) of sums and shares (M,) over all keys, with the logits of pairs (M, 1)."""
    no_mean = sums.new_empty(1, 0, 1)
    if use_triton(sums):
        return launch_sigmoid_loss(sums[None], shares[None], no_mean, logits, bias, None)
    return torch_sigmoid_loss(sums, shares, no_mean[0], logits, bias, None)
