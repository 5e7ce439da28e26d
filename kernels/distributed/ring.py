"""Log-sum-exps, and sums of sigmoids, over all ranks with keys that pass round a ring: no rank ever holds all of them.

A block of rows visits the ranks one after the other. The next block is in transfer during the work on this one, so a
rank holds two visiting blocks beside its own. That is O(B D) memory instead of O(N D) for gathered keys. Results for
the owner of a block (its gradient, the sums of its columns) follow one hop behind and arrive at the end.

Keys without gradient travel once. Keys with gradient travel again in the backward pass, and their gradients behind
them, in float32. Sums are merged in the order of the visits: deterministic.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vito_kernels._core.autograd import once
from vito_kernels._core.checks import autocast_inputs, needs_grad, scale_tensor
from vito_kernels.contrastive.gpu import path_of
from vito_kernels.contrastive.sigmoid_loss import sigmoid_losses
from vito_kernels.contrastive.terms import LOG2E, Mask, SoftmaxGrad
from vito_kernels.distributed.collectives import Group

Rows = tuple[Tensor, ...]  # each with the rows of one rank


@dataclass
class _Transfer:
    """Rows in transfer to the next rank, and from the previous one."""

    sent: Rows  # held until it is done
    received: Rows
    works: list[Any]

    def wait(self) -> Rows:
        for work in self.works:
            work.wait()
        return self.received


@dataclass
class _Ring:
    sizes: list[int]
    rank: int
    group: Group

    @classmethod
    def of(cls, sizes: list[int], group: Group) -> _Ring:
        return cls(sizes, dist.get_rank(group), group)

    def _send_recv(self, rows: Rows, coming: int, tag: int) -> _Transfer:
        """Starts to send ``rows`` to the next rank, and to receive tensors of ``coming`` rows from the previous one.

        ``tag`` keeps blocks apart from the results that follow them.
        """
        ranks = len(self.sizes)
        if ranks == 1 or not rows:
            return _Transfer(rows, rows, [])
        sent = tuple(x.contiguous() for x in rows)
        received = tuple(x.new_empty(coming, *x.shape[1:]) for x in rows)
        following, previous = (self.rank + 1) % ranks, (self.rank - 1) % ranks
        out = [
            dist.P2POp(dist.isend, x, group=self.group, tag=tag + i, group_peer=following) for i, x in enumerate(sent)
        ]
        into = [
            dist.P2POp(dist.irecv, x, group=self.group, tag=tag + i, group_peer=previous)
            for i, x in enumerate(received)
        ]
        return _Transfer(sent, received, dist.batch_isend_irecv(out + into))

    def rotate(
        self, block: Rows, visit: Callable[[Rows, bool], Rows], merge: Callable[[Rows, Rows], Rows] | None = None
    ) -> Rows:
        """Calls ``visit(block, own)`` with the block of every rank, this rank's first.

        Returns the results of all visits to this rank's block, combined by ``merge``; without ``merge`` nothing.
        """
        ranks = len(self.sizes)
        results = None
        for hop in range(ranks):
            coming = self.sizes[(self.rank - hop - 1) % ranks]  # after the last hop, this rank's own results
            following = self._send_recv(block, coming, 0) if hop < ranks - 1 else None
            found = visit(block, hop == 0)
            if merge is not None:
                results = self._send_recv(found if results is None else merge(results.wait(), found), coming, 16)
            if following is not None:
                block = following.wait()
        return () if results is None else results.wait()


def _add(first: Rows, second: Rows) -> Rows:
    return tuple(x.add_(y) for x, y in zip(first, second, strict=True))


def _merge(path: Any, first: Rows, second: Rows) -> Rows:
    """One (lse2, residual, mean) of two over different keys, or one (lse2, residual)."""
    parts = [torch.stack(both) for both in zip(first, second, strict=True)]
    if len(parts) == 3:
        return path.merge_splits(*parts)
    return path.merge_splits(*parts, first[0].new_empty(2, 0, 0))[:2]


class _OneSided(torch.autograd.Function):
    """(lse2 (B,), logits of the positives (B, 1), residual of lse2 (B,)) of q (B, D) over the keys of all ranks.

    The positive of query i is its own rank's key i. Neither pass stores the keys of other ranks.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        scale: Tensor,
        q_group: Tensor | None,
        k_group: Tensor | None,
        ring: _Ring,
        compute_grad_q: bool,
        matmul_dtype: torch.dtype | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        path = path_of(q)
        path.check_values(scale)
        sums: Rows = ()
        logits = k.new_empty(0)

        def visit(block: Rows, own: bool) -> Rows:
            nonlocal sums, logits
            mask = Mask(q_group, block[1] if len(block) > 1 else None, diagonal=0 if own else None)
            *found, positives = path.lse_forward(q, block[0], scale, mask, compute_grad_q, matmul_dtype)
            sums, logits = (tuple(found), positives) if own else (_merge(path, sums, tuple(found)), logits)
            return ()

        ring.rotate((k,) if k_group is None else (k, k_group), visit)
        ctx.ring, ctx.matmul_dtype = ring, matmul_dtype
        ctx.save_for_backward(q, k, scale, q_group, k_group, *sums)
        ctx.mark_non_differentiable(sums[1])
        return sums[0], logits, sums[1]

    @staticmethod
    @once
    def backward(ctx: Any, g_lse2: Tensor, g_positive: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, k, scale, q_group, k_group, lse2, lse_residual, mean = ctx.saved_tensors
        need_q, need_k, need_scale = ctx.needs_input_grad[:3]
        path, dq, dscale = path_of(q), None, None
        if need_q or need_scale:  # with the mean of all ranks' keys, the gradients of one process
            pairs = {"pair_weight": g_positive, "k": k, "other": q if need_scale else None}
            dq, dscale = path.grad_epilogue(mean, scale, q.dtype, store=need_q, weight=g_lse2, **pairs)
        dk = None
        if need_k:
            softmax = path.softmax_grad(lse2, lse_residual, g_lse2)

            def visit(block: Rows, own: bool) -> Rows:
                mask = Mask(q_group, block[1] if len(block) > 1 else None, diagonal=0 if own else None)
                _, grad = path.lse_backward(q, block[0], scale, softmax, None, mask, False, True, ctx.matmul_dtype)
                if own:
                    grad.addcmul_(q.to(grad.dtype), g_positive, value=LOG2E)
                return (grad.mul_(scale),)

            dk = ctx.ring.rotate((k,) if k_group is None else (k, k_group), visit, _add)[0].to(k.dtype)
        return dq if need_q else None, dk, dscale if need_scale else None, *(None,) * 5


def lse_and_positives(
    q: Tensor,
    k: Tensor,
    scale: float | Tensor,
    q_group: Tensor | None,
    k_group: Tensor | None,
    sizes: list[int],
    group: Group,
) -> tuple[Tensor, Tensor, Tensor]:
    """``info_nce.lse_and_positives`` of q (B, D) against all ranks' keys, of which k (B, D) are this rank's."""
    (q, k), matmul_dtype = autocast_inputs(q, k)
    scale = scale_tensor(scale, q)
    compute_grad_q = needs_grad(q, scale)
    return _OneSided.apply(q, k, scale, q_group, k_group, _Ring.of(sizes, group), compute_grad_q, matmul_dtype)


class _TwoSided(torch.autograd.Function):
    """The two-sided log-sum-exp over all ranks; blocks of y travel.

    Returns row lse2 (B,) of x (B, D) against all ranks' y, and column lse2 (B,) of this rank's y against all ranks' x.
    Logits of the pairs (B, 1) follow, and the residuals of both lse2. A pair is masked.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, scale: Tensor, ring: _Ring, matmul_dtype: torch.dtype | None
    ) -> tuple[Tensor, ...]:
        path = path_of(x)
        path.check_values(scale)
        rows: Rows = ()
        pairs = x.new_empty(0)

        def visit(block: Rows, own: bool) -> Rows:
            nonlocal rows, pairs
            mask = Mask(diagonal=0 if own else None)
            *row, column, column_residual, logits = path.two_sided_forward(x, block[0], scale, mask, matmul_dtype)
            rows, pairs = (tuple(row), logits) if own else (_merge(path, rows, tuple(row)), pairs)
            return column, column_residual

        columns = ring.rotate((y,), visit, partial(_merge, path))
        ctx.ring, ctx.matmul_dtype = ring, matmul_dtype
        ctx.save_for_backward(x, y, scale, *rows, *columns)
        ctx.mark_non_differentiable(rows[1], columns[1])
        return rows[0], columns[0], pairs, rows[1], columns[1]

    @staticmethod
    @once
    def backward(ctx: Any, g_row: Tensor, g_column: Tensor, g_pair: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, y, scale, row, row_residual, column, column_residual = ctx.saved_tensors
        need_x, need_y, need_scale = ctx.needs_input_grad[:3]
        path, side = path_of(x), need_x or need_scale
        x_softmax = path.softmax_grad(row, row_residual, g_row)
        y_softmax = path.softmax_grad(column, column_residual, g_column)
        gx = torch.zeros_like(x, dtype=scale.dtype)

        def visit(block: Rows, own: bool) -> Rows:
            mask, other = Mask(diagonal=0 if own else None), SoftmaxGrad(block[1], block[2])
            mine, theirs = path.lse_backward(x, block[0], scale, x_softmax, other, mask, side, need_y, ctx.matmul_dtype)
            if side:
                gx.add_(mine)
            if need_y and own:
                theirs.addcmul_(x.to(theirs.dtype), g_pair, value=LOG2E)
            return (theirs.mul_(scale),) if need_y else ()

        gy = ctx.ring.rotate((y, y_softmax.lse2, y_softmax.weight), visit, _add)
        gx.addcmul_(y.to(gx.dtype), g_pair, value=LOG2E)
        dscale = (gx * x).sum() if need_scale else None
        dx = gx.mul_(scale).to(x.dtype) if need_x else None
        return dx, gy[0].to(y.dtype) if need_y else None, dscale, None, None


def two_sided_lse(x: Tensor, y: Tensor, scale: float | Tensor, sizes: list[int], group: Group) -> tuple[Tensor, ...]:
    """``two_sided.two_sided_lse`` over all ranks: of this rank's rows of x (B, D) and of its y (B, D)."""
    (x, y), matmul_dtype = autocast_inputs(x, y)
    return _TwoSided.apply(x, y, scale_tensor(scale, x), _Ring.of(sizes, group), matmul_dtype)


class _Sigmoid(torch.autograd.Function):
    """The sum of the losses of this rank's rows of x (B, D) against all ranks' y.

    Blocks of y travel; as nothing is normalized, sums over blocks are added.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor,
        scale: Tensor,
        bias: Tensor,
        ring: _Ring,
        compute_grad_x: bool,
        matmul_dtype: torch.dtype | None,
    ) -> Tensor:
        path = path_of(x)
        path.check_values(scale)
        sums: Rows = ()
        pairs = x.new_empty(0)

        def visit(block: Rows, own: bool) -> Rows:
            nonlocal sums, pairs
            mask = Mask(diagonal=0 if own else None)
            total, logits, *more = path.sigmoid_forward(x, block[0], scale, bias, mask, compute_grad_x, matmul_dtype)
            found = total, *more
            sums, pairs = (found, logits) if own else (_add(sums, found), pairs)
            return ()

        ring.rotate((y,), visit)
        ctx.ring, ctx.matmul_dtype = ring, matmul_dtype
        total, shares, mean = sums
        found = sigmoid_losses(total, shares, pairs, bias)
        weights = found.softmax.lse2, found.softmax.weight, found.weight, found.pair_weight, found.bias_weight
        ctx.save_for_backward(x, y, scale, bias, *weights, mean)
        return found.loss.sum()

    @staticmethod
    @once
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, y, scale, _, lse2, *weights, mean = ctx.saved_tensors
        need_x, need_y, need_scale, need_bias = ctx.needs_input_grad[:4]
        path, dx, dscale = path_of(x), None, None
        softmax_weight, weight, pair, part = (gradient * part for part in weights)
        share = SoftmaxGrad(lse2, softmax_weight)
        if need_x or need_scale:
            mine = {"pair_weight": pair, "k": y, "other": x if need_scale else None}
            dx, dscale = path.grad_epilogue(mean, scale, x.dtype, store=need_x, weight=weight, **mine)
        dy = None
        if need_y:

            def visit(block: Rows, own: bool) -> Rows:
                given = share, None, Mask(diagonal=0 if own else None), False, True, ctx.matmul_dtype
                _, grad = path.lse_backward(x, block[0], scale, *given, sigmoid=True)
                if own:
                    grad.addcmul_(x.to(grad.dtype), pair, value=LOG2E)
                return (grad.mul_(scale),)

            dy = ctx.ring.rotate((y,), visit, _add)[0].to(y.dtype)
        dbias = part.sum() if need_bias else None
        return dx if need_x else None, dy, dscale if need_scale else None, dbias, None, None, None


def siglip(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, sizes: list[int], group: Group) -> Tensor:
    """The sum of the losses of this rank's rows of x (B, D) against the y of all ranks."""
    (x, y), matmul_dtype = autocast_inputs(x, y)
    return _Sigmoid.apply(x, y, scale, bias, _Ring.of(sizes, group), needs_grad(x, scale), matmul_dtype)
