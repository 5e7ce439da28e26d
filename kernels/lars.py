"""LARS on lists of tensors in two launches: the norms, then weight decay, trust ratio, momentum and update.

    u = g + weight_decay * w    r = trust_coefficient * |w| / |u|     of the adapted tensors; r = 1 if a norm is 0
    u = g                       r = 1                                 of the others
    m <- momentum * m + r * u
    w <- w - lr * m

w, g and m are lists of float32 tensors; w and m change in place. A program takes a chunk of a tensor, which it finds by
a table of addresses. The norms read w and g of the adapted tensors. The update reads w, g and m, and writes w and m.
Deterministic: no atomics, sums in a fixed order that does not depend on the GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from vito_kernels._core.autograd import register_flops
from vito_kernels._core.lazy_triton import cdiv, jit, on_device, use_triton

if TYPE_CHECKING:
    import triton.language as tl

CHUNK = 16384  # elements of a program
BLOCK, WARPS = 2048, 8  # elements whose loads are under way together
PARTS = 1024  # partial sums of a tensor that a program adds at a time

# ------------------------------------------------------------------------------------------------------------- kernels


@jit
def float_pointer(addresses, tensor, start, ALIGNED: tl.constexpr):
    """To element ``start`` of a tensor. Aligned tensors are read 16 bytes at a time."""
    pointer = tl.load(addresses + tensor).to(tl.pointer_type(tl.float32))
    return (tl.multiple_of(pointer, 16) if ALIGNED else pointer) + start


@jit
def add_squares(weight, gradient, inside, weight_decay, of_weight, of_update):
    if inside is None:
        w, g = tl.load(weight), tl.load(gradient)
    else:
        w, g = tl.load(weight, mask=inside, other=0.0), tl.load(gradient, mask=inside, other=0.0)
    u = g + weight_decay * w
    return of_weight + w * w, of_update + u * u


@jit
def lars_norms_kernel(
    addresses, chunks, partials, finite, tensors, weight_decay,
    ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums of squares over a chunk of w and of u, to ``partials`` (2, chunks). Nothing if not finite."""
    if finite is not None and tl.load(finite) == 0:
        return
    chunk = tl.program_id(0)
    row = chunks + 4 * chunk
    tensor, start, size = tl.load(row), tl.load(row + 1).to(tl.int64) * CHUNK, tl.load(row + 2)
    weight = float_pointer(addresses, tensor, start, ALIGNED)
    gradient = float_pointer(addresses + tensors, tensor, start, ALIGNED)
    lane = tl.arange(0, BLOCK)
    of_weight = tl.zeros((BLOCK,), tl.float32)
    of_update = tl.zeros((BLOCK,), tl.float32)
    whole = size // BLOCK * BLOCK
    for i in range(0, whole, BLOCK):
        at = i + lane
        of_weight, of_update = add_squares(weight + at, gradient + at, None, weight_decay, of_weight, of_update)
    if whole < size:
        at = whole + lane
        of_weight, of_update = add_squares(weight + at, gradient + at, at < size, weight_decay, of_weight, of_update)
    tl.store(partials + chunk, tl.sum(of_weight, 0))
    tl.store(partials + tl.num_programs(0) + chunk, tl.sum(of_update, 0))


@jit
def update_block(weight, gradient, average, inside, ratio, weight_decay, momentum, lr):
    w, g, m = tl.load(weight, mask=inside), tl.load(gradient, mask=inside), tl.load(average, mask=inside)
    m = momentum * m + ratio * (g + weight_decay * w)
    tl.store(weight, w - lr * m, mask=inside)
    tl.store(average, m, mask=inside)


@jit
def lars_update_kernel(
    addresses, chunks, partials, finite, tensors, adapted, lr, momentum, weight_decay, trust_coefficient,
    ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """A chunk of w and m. The last chunks come first: the norms may have left them in the cache."""
    if finite is not None and tl.load(finite) == 0:
        return
    chunk = tl.num_programs(0) - 1 - tl.program_id(0)
    row = chunks + 4 * chunk
    tensor, number, size, count = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    ratio, decay = 1.0, 0.0
    if chunk < adapted:
        first = partials + chunk - number
        of_weight = tl.zeros((PARTS,), tl.float32)
        of_update = tl.zeros((PARTS,), tl.float32)
        for i in range(0, count, PARTS):
            at = i + tl.arange(0, PARTS)
            of_weight += tl.load(first + at, mask=at < count, other=0.0)
            of_update += tl.load(first + adapted + at, mask=at < count, other=0.0)
        weight_norm, update_norm = tl.sqrt(tl.sum(of_weight, 0)), tl.sqrt(tl.sum(of_update, 0))
        if (weight_norm > 0) & (update_norm > 0):
            ratio = trust_coefficient * weight_norm / update_norm
        decay = weight_decay
    start = number.to(tl.int64) * CHUNK
    weight = float_pointer(addresses, tensor, start, ALIGNED)
    gradient = float_pointer(addresses + tensors, tensor, start, ALIGNED)
    average = float_pointer(addresses + 2 * tensors, tensor, start, ALIGNED)
    lane = tl.arange(0, BLOCK)
    whole = size // BLOCK * BLOCK
    for i in range(0, whole, BLOCK):
        at = i + lane
        update_block(weight + at, gradient + at, average + at, None, ratio, decay, momentum, lr)
    if whole < size:
        at = whole + lane
        update_block(weight + at, gradient + at, average + at, at < size, ratio, decay, momentum, lr)


# ----------------------------------------------------------------------------------------------------------- launchers


@dataclass(frozen=True)
class Table:
    """The tensors' places, on their device."""

    addresses: Tensor
    """(3, tensors) int64, of weights, gradients and momentum. The adapted tensors come first."""
    aligned: bool
    """Whether all addresses are multiples of 16 bytes."""
    chunks: Tensor
    """(chunks, 4) int32: each chunk's tensor, its number in the tensor, its size, and how many the tensor has."""
    adapted: int
    """How many chunks are of adapted tensors."""


def make_table(weights: list[Tensor], gradients: list[Tensor], momentum: list[Tensor], adapted: int) -> Table:
    """Of tensors of which the first ``adapted`` are so. Waits for no device."""
    addresses = [t.data_ptr() for t in (*weights, *gradients, *momentum)]
    return Table(*place(addresses, weights[0].device), *divide(weights, adapted))


def place(addresses: list[int], device: torch.device) -> tuple[Tensor, bool]:
    """The first two fields of a table."""
    return _on_device(addresses, torch.int64, device).view(3, -1), all(a % 16 == 0 for a in addresses)


def divide(weights: list[Tensor], adapted: int) -> tuple[Tensor, int]:
    """The last two fields of a table."""
    counts = [cdiv(w.numel(), CHUNK) for w in weights]
    rows = [
        (i, number, min(CHUNK, w.numel() - number * CHUNK), count)
        for i, (w, count) in enumerate(zip(weights, counts, strict=True))
        for number in range(count)
    ]
    return _on_device(rows, torch.int32, weights[0].device), sum(counts[:adapted])


def _on_device(values: list[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def launch_norms(table: Table, finite: Tensor | None, weight_decay: float) -> Tensor:
    """Sums of squares of w and u of each adapted chunk, (2, chunks) float32."""
    partials = torch.empty((2, table.adapted), dtype=torch.float32, device=table.chunks.device)
    if table.adapted:
        lars_norms_kernel[(table.adapted,)](
            table.addresses, table.chunks, partials, finite, table.addresses.shape[1], weight_decay,
            ALIGNED=table.aligned, CHUNK=CHUNK, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return partials


def launch_update(
    table: Table, partials: Tensor, finite: Tensor | None,
    lr: float, momentum: float, weight_decay: float, trust_coefficient: float,
) -> None:  # fmt: skip
    lars_update_kernel[(len(table.chunks),)](
        table.addresses, table.chunks, partials, finite, table.addresses.shape[1], table.adapted,
        lr, momentum, weight_decay, trust_coefficient,
        ALIGNED=table.aligned, CHUNK=CHUNK, BLOCK=BLOCK, PARTS=PARTS, num_warps=WARPS,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- custom ops


@torch.library.custom_op("vito_kernels::lars_norms", mutates_args=())
def norms_op(weights: list[Tensor], gradients: list[Tensor], finite: Tensor | None, weight_decay: float) -> Tensor:
    """:func:`launch_norms` of tensors that are all adapted."""
    with on_device(weights[0]):
        return launch_norms(make_table(weights, gradients, gradients, len(weights)), finite, weight_decay)


@norms_op.register_fake
def _(weights: list[Tensor], gradients: list[Tensor], finite: Tensor | None, weight_decay: float) -> Tensor:
    return weights[0].new_empty((2, sum(cdiv(w.numel(), CHUNK) for w in weights)))


@torch.library.custom_op("vito_kernels::lars_update", mutates_args=("weights", "momentum"))
def update_op(
    weights: list[Tensor], gradients: list[Tensor], momentum: list[Tensor], partials: Tensor, finite: Tensor | None,
    adapted: int, lr: float, keep: float, weight_decay: float, trust_coefficient: float,
) -> None:  # fmt: skip
    """:func:`launch_update`."""
    with on_device(weights[0]):
        table = make_table(weights, gradients, momentum, adapted)
        launch_update(table, partials, finite, lr, keep, weight_decay, trust_coefficient)


@update_op.register_fake
def _(
    weights: list[Tensor], gradients: list[Tensor], momentum: list[Tensor], partials: Tensor, finite: Tensor | None,
    adapted: int, lr: float, keep: float, weight_decay: float, trust_coefficient: float,
) -> None:  # fmt: skip
    return None


register_flops(norms_op)
register_flops(update_op)

# ------------------------------------------------------------------------------------------------------ public function


class FusedLars:
    """Updates the same tensors step after step. Their table is made again only if an address has changed.

    Args:
        adapted: The first this many tensors have weight decay and trust ratio.
        momentum, weight_decay, trust_coefficient: LARS's constants.
    """

    def __init__(self, adapted: int, momentum: float, weight_decay: float, trust_coefficient: float) -> None:
        self.adapted = adapted
        self.constants = momentum, weight_decay, trust_coefficient
        self._table: Table | None = None
        self._addresses: list[int] = []
        self._kept: Any = None  # addresses of weights and momentum, formats of gradients
        self._captured: list[Table] = []  # CUDA graphs read these

    def step(
        self, weights: list[Tensor], gradients: list[Tensor], momentum: list[Tensor], lr: float, finite: Tensor | None
    ) -> bool:
        """Updates weights and momentum in place.

        Args:
            weights, gradients, momentum: Lists of tensors of the same shapes.
            lr: Learning rate.
            finite: Bool tensor (). False leaves all as it is.

        Returns:
            False, with nothing done, for tensors that the kernels do not take: on a CPU, of other dtypes than float32,
            with gradients in another memory format, in compiled code, or where a CUDA graph captures new addresses.
        """
        if torch.compiler.is_compiling() or not use_triton(weights[0]):
            return False
        lists, constants = (weights, gradients, momentum), (lr, *self.constants)
        if is_in_torch_dispatch_mode():  # which counts ops, and whose tensors may have no memory
            if not _fusible(*lists):
                return False
            adapted = weights[: self.adapted], gradients[: self.adapted]
            partials = norms_op(*adapted, finite, self.constants[1]) if self.adapted else weights[0].new_empty((2, 0))
            update_op(*lists, partials, finite, self.adapted, *constants)
            return True
        with on_device(weights[0]):
            table = self._current_table(*lists)
            if table is None:
                return False
            launch_update(table, launch_norms(table, finite, self.constants[1]), finite, *constants)
        torch.autograd.graph.increment_version([*weights, *momentum])
        return True

    def _current_table(self, weights: list[Tensor], gradients: list[Tensor], momentum: list[Tensor]) -> Table | None:
        """None if the kernels do not take these tensors, or may not learn of them now."""
        addresses = [t.data_ptr() for t in (*weights, *gradients, *momentum)]
        formats = [(g.stride(), g.dtype) for g in gradients]
        kept = addresses[: len(weights)], addresses[-len(weights) :], formats
        table = self._table if kept == self._kept else None
        capturing = weights[0].is_cuda and torch.cuda.is_current_stream_capturing()
        if table is None or addresses != self._addresses:
            if capturing or (table is None and not _fusible(weights, gradients, momentum)):
                return None  # a graph would copy addresses from host memory that is gone when it is replayed
            rest = (table.chunks, table.adapted) if table else divide(weights, self.adapted)
            table = Table(*place(addresses, weights[0].device), *rest)
            self._table, self._addresses, self._kept = table, addresses, kept
        if capturing:
            self._captured.append(table)
        return table


def _fusible(weights: list[Tensor], gradients: list[Tensor], momentum: list[Tensor]) -> bool:
    """Whether all are float32 on one device, dense, and each three alike in memory."""
    return all(
        (t.dtype, t.device, t.shape) == (torch.float32, weights[0].device, w.shape) and _strides(t) == _strides(w)
        for w, *others in zip(weights, gradients, momentum, strict=True)
        for t in (w, *others)
    ) and all(w.is_contiguous() or w.is_contiguous(memory_format=torch.channels_last) for w in weights)


def _strides(x: Tensor) -> list[int]:
    """Of the dimensions whose stride matters."""
    return [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1]
