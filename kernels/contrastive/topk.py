"""Retrieval: how many keys are more similar to a query than its positive.

    s    = q @ k.T                                                  (M, N), never in memory
    rank = (s > s of the positive).sum(1)                           0 where the positive is the most similar key

One pass of kind "rank" of :mod:`.forward`, 2 M N D flops. Nothing here has a gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vito_kernels._core.autograd import direct_call, register_flops
from vito_kernels._core.checks import (
    autocast_inputs,
    check_groups,
    check_integers,
    check_pair,
    positive_columns,
    scale_tensor,
)
from vito_kernels.contrastive.gpu import path_of
from vito_kernels.contrastive.terms import Mask


@torch.library.custom_op("vito_kernels::positive_rank", mutates_args=())
def positive_rank_op(
    q: Tensor,
    k: Tensor,
    one: Tensor,
    q_group: Tensor | None,
    k_group: Tensor | None,
    positive: Tensor | None,
    matmul_dtype: torch.dtype | None = None,
) -> Tensor:
    """(M,) float32 of q (M, D), k (N, D), one () and ``positive`` (M, 1), or None where it is key i of query i."""
    path, mask = path_of(q), Mask(q_group, k_group, positive, 0 if positive is None else None)
    path.check_values(one, positive, k)
    return path.rank_forward(q, k, one, mask, matmul_dtype)


@positive_rank_op.register_fake
def _(q, k, one, q_group, k_group, positive, matmul_dtype=None):
    return one.new_empty(q.shape[0])


register_flops(positive_rank_op, lambda q, k, **_: 2 * len(q) * len(k) * q.shape[1])
positive_rank = direct_call(positive_rank_op)


@torch.no_grad()
def topk_accuracy(
    q: Tensor,
    k: Tensor,
    topk: Sequence[int] = (1, 5),
    *,
    positive: Tensor | None = None,
    q_group: Tensor | None = None,
    k_group: Tensor | None = None,
) -> Tensor:
    """How often a query's positive is among its most similar keys, without the matrix of similarities.

    Equivalent: ``[(s.topk(n).indices == positive[:, None]).any(1).float().mean() for n in topk]`` with ``s = q @ k.T``.

    Args:
        q, k: (M, D) and (N, D), as for ``similarity_lse``. Nothing is normalized here.
        topk: numbers of keys, each at least 1.
        positive: (M,) key indices, by default ``arange(M)``.
        q_group, k_group: (M,) and (N,) ids. A key of the query's group other than the positive does not count.

    Returns:
        (len(topk),) shares in [0, 1], float32 (float64 for float64), without gradient and on the device of q. Of keys
        as similar as the positive, none is counted before it; rounding may part them.

    Raises:
        ValueError, TypeError: as ``info_nce``, for several positives of a query, and for a number below 1.

    Costs 2 M N D flops. Deterministic.
    """
    check_pair(q, k)
    check_groups(q_group, k_group, q, k)
    columns = positive_columns(positive, q, k)
    if columns is not None and columns.shape[1] > 1:
        raise ValueError(f"topk_accuracy takes one positive for each query, got {columns.shape[1]}")
    check_integers(**{f"topk[{i}]": n for i, n in enumerate(topk)})
    if len(topk) == 0 or min(topk) < 1:
        raise ValueError(f"topk must hold numbers of keys, each at least 1, got {topk}")
    (q, k), matmul_dtype = autocast_inputs(q, k)
    rank = positive_rank(q, k, scale_tensor(1.0, q), q_group, k_group, columns, matmul_dtype)
    return torch.stack([(rank < n).to(rank.dtype).mean() for n in topk])
