"""Terms that the Triton and the CPU path share: masks, softmax gradients, positive terms, split sums.

Logits and log-sum-exps are in units of log 2, ``lse2 = lse * LOG2E``, since ``exp2`` costs less than ``exp``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

LOG2E = math.log2(math.e)


def ordered_pairs(views: int) -> list[tuple[int, int]]:
    """(a, b) with a != b, in the order (0, 1), (0, 2), ..., (1, 0)."""
    return [(a, b) for a in range(views) for b in range(views) if a != b]


@dataclass(frozen=True)
class Mask:
    """Pairs of a query (row) and a key (column) that do not count.

    Args:
        q_group, k_group: (M,) and (N,) ids; pairs of equal ids are masked.
        positive: (M, P) key indices, masked for their query.
        diagonal: key ``i + diagonal`` is masked for query i, and with ``width`` its whole block of that many keys.
    """

    q_group: Tensor | None = None
    k_group: Tensor | None = None
    positive: Tensor | None = None
    diagonal: int | None = None
    width: int = 1

    def __post_init__(self) -> None:
        for name in ("q_group", "k_group", "positive"):  # kernels read them as dense
            ids = getattr(self, name)
            object.__setattr__(self, name, ids if ids is None else ids.contiguous())

    @property
    def diagonal_width(self) -> int:
        """Width of the masked blocks on the diagonal, 0 for none."""
        return 0 if self.diagonal is None else self.width

    @property
    def num_positives(self) -> int:
        """Columns of ``positive``, 0 for none."""
        return 0 if self.positive is None else self.positive.shape[1]

    def transposed(self) -> Mask:
        """The same pairs with queries and keys exchanged; ``positive`` stays a list for each query."""
        diagonal = None if self.diagonal is None else -self.diagonal
        return Mask(self.k_group, self.q_group, self.positive, diagonal, self.width)


@dataclass(frozen=True)
class SoftmaxGrad:
    """One side's softmax in a gradient: row i weighs its logits by ``weight_i * 2^(s_ij - lse2_i)``.

    ``weight`` (M,) is the incoming gradient of each ``lse2`` (M,). A fully masked row has lse2 = weight = 0.
    """

    lse2: Tensor
    weight: Tensor

    @classmethod
    def of(cls, lse2: Tensor, lse_residual: Tensor, grad: Tensor) -> SoftmaxGrad:
        """Of the gradient (M,) with respect to lse2. The rounding residual of lse2 goes into the weight."""
        empty = lse2 == -math.inf
        weight = grad * LOG2E * torch.exp2(-lse_residual)
        return cls(lse2.masked_fill(empty, 0), weight.masked_fill(empty, 0))

    def part(self, index: tuple[slice | None, ...]) -> SoftmaxGrad:
        return SoftmaxGrad(self.lse2[index], self.weight[index])


@dataclass(frozen=True)
class PositiveTerm:
    """Adds ``weight_i`` to W_ij where query i and key j share a label and the mask leaves the pair; of one set, whose
    rows are both, ``weight_i + weight_j``.

    Args:
        label, weight: (M,), of the queries.
        other_label: (N,), of the keys, for one set ``label``.

    Inside W a positive of probability p keeps 1 - p to the last bit of p. As two rounded sums of embeddings, the
    softmax and its positives would cancel.
    """

    label: Tensor
    other_label: Tensor
    weight: Tensor


def split_sum(small: Tensor, large: Tensor, total: Tensor, residual: Tensor) -> None:
    """``small + large`` as the float ``total`` and its rounding error ``residual`` (Dekker).

    A log-sum-exp in the hundreds is rounded by more than its softmax may be off.
    """
    torch.add(small, large, out=total)
    torch.add(large - total, small, out=residual).nan_to_num_(nan=0.0)
