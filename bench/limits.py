"""The machine's limits, measured in the same rounds as the races: bare matrix products and bare copies."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bench.harness import Candidate, Result
from vito_kernels.contrastive.cpu_matmul import add_product, product

TILE = 1024  # rows and columns: on CPUs the fastest of 64..8192
CUDA_TILE = 16384  # a GPU's library wants the whole matrix, as far as it fits


def matmuls(rows: Tensor, columns: Tensor, products: int) -> Candidate:
    """``products`` matrix products of 2 M N D flops each, tile by tile: no softmax, no loss. On a CPU by the library
    that our own take.

    They alternate between q-tile x k^T and its mate, logits-tile x k, the two shapes that the losses are made of.
    """
    m, n = rows.shape[0], columns.shape[0]
    tall, wide = (min(side, CUDA_TILE if rows.is_cuda else TILE) for side in (m, n))
    rows, columns = rows.detach(), columns.detach()
    out = torch.zeros_like(rows)

    def call() -> Result:
        out.zero_()
        for row in range(0, m, tall):
            part, sums = rows[row : row + tall], out[row : row + tall]
            for column in range(0, n, wide):
                keys = columns[column : column + wide]
                for index in range(products):
                    if index % 2 == 0:
                        logits = product(part, keys)
                    else:
                        add_product(sums, logits, keys.T)
        return (out,)

    return Candidate("bare matmuls", call, "limit", f"{products} x 2MND flops in tiles of {tall} x {wide}")


def traffic(
    reads: Sequence[Tensor] = (),
    writes: Sequence[tuple[Tensor, Tensor]] = (),
    updates: Sequence[tuple[Tensor, Tensor]] = (),
) -> Candidate:
    """Moves the least bytes of a task.

    Reads ``reads`` once by a sum, copies each ``(from, to)`` with conversion, and adds to each ``(target, other)`` in
    place. A copy is no limit for a task in place, because a CPU first reads the line that it writes.
    """

    def call() -> Result:
        for tensor in reads:
            torch.sum(tensor)
        for source, target in writes:
            target.copy_(source)
        for target, other in updates:
            target.add_(other)
        return ()

    name = "bare sum in place" if updates else "bare copy"
    return Candidate(name, call, "limit", "the least traffic that the task allows")


def bare(name: str, call: Callable[[], Result], note: str) -> Candidate:
    """Any other unavoidable part of a task."""
    return Candidate(name, call, "limit", note)
