"""The machine's limits, measured in the same rounds as the races: bare matrix products and bare copies."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bench.harness import Candidate, Result

TILE_BYTES = 16 * 2**20


def matmuls(rows: Tensor, columns: Tensor, products: int) -> Candidate:
    """``products`` matrix products of 2 M N D flops each, by row tiles into buffers that are reused: no softmax, no loss.

    Products alternate between q-tile x k^T and its mate P-tile x k, the two shapes that the losses need. The tile is what a CPU
    keeps in its last cache, or the whole matrix on a GPU when it fits.
    """
    m, d = rows.shape
    n = columns.shape[0]
    tile = m if rows.is_cuda and m * n <= 2**28 else max(1, min(m, TILE_BYTES // (n * rows.element_size())))
    rows, columns = rows.detach(), columns.detach()
    logits, out = rows.new_empty(tile, n), rows.new_empty(m, d)

    def call() -> Result:
        for start in range(0, m, tile):
            part = rows[start : start + tile]
            buffer = logits[: len(part)]
            for product in range(products):
                if product % 2 == 0:
                    torch.mm(part, columns.T, out=buffer)
                else:
                    torch.mm(buffer, columns, out=out[start : start + tile])
        return (out,)

    logits.zero_()
    return Candidate("bare matmuls", call, "limit", f"{products} x 2MND flops, tiles of {tile} rows")


def traffic(reads: Sequence[Tensor], writes: Sequence[tuple[Tensor, Tensor]]) -> Candidate:
    """Reads ``reads`` once by a sum, and copies each ``(from, to)``, converting where the types differ."""

    def call() -> Result:
        for tensor in reads:
            torch.sum(tensor)
        for source, target in writes:
            target.copy_(source)
        return ()

    return Candidate("bare copy", call, "limit", "the least traffic that the task allows")


def flat(tensor: Tensor) -> Tensor:
    """A contiguous view or copy, so that a limit never pays for strides."""
    return tensor.detach().contiguous()


def call_only(function: Callable[[], object]) -> Callable[[], Result]:
    """Drops the result: a limit's is not compared."""

    def call() -> Result:
        function()
        return ()

    return call


__all__ = ["call_only", "flat", "matmuls", "traffic"]
