"""What a call costs besides time: peak memory and matrix-multiplication flops, counted rather than sampled; and the
allocator that all candidates share.

On the CPU both come from PyTorch's profiler: it reports every allocation and release of the CPU allocator, so the
peak is exact and the same on every run, which the resident set size is not. On CUDA the caching allocator keeps the
peak itself, and flops are not counted: nothing sees those of a Triton kernel.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler otherwise complains about the missing GPU on every use
from torch.profiler import ProfilerActivity, profile, record_function

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
LARGEST_KEPT = 1 << 25  # bytes; glibc takes no larger threshold


_held: list[int] = []


class _Usage(ctypes.Structure):
    """glibc's ``struct mallinfo2``; ``hblks`` counts the blocks that are mappings of their own."""

    _fields_ = [("before", 3 * ctypes.c_size_t), ("hblks", ctypes.c_size_t), ("after", 6 * ctypes.c_size_t)]


def settle_malloc() -> bool:
    """Puts glibc's malloc where its moving thresholds end, and gives back what lies free; False where the C library is
    another.

    By default a block goes back to the system when it is freed, and is faulted in again page by page, if it is larger
    than a threshold that grows with what was freed before, up to 32 MiB. How far it had grown, and how much lay free
    below it, differed by process, and with it the time of all that makes matrices of a few MiB: supcon's reference
    took up to twice as long. Larger blocks are faulted in anew by every call, here as in any program, unless a
    stretch of the heap lies free that holds them: those that the races before left are taken out of the way, for with
    one of them pooling took a third of the time.
    """
    libc = ctypes.CDLL(None)
    try:
        libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
        libc.free.restype, libc.free.argtypes = None, [ctypes.c_void_p]
        libc.mallinfo2.restype = _Usage
        while _held:
            libc.free(_held.pop())
        kept = libc.mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT) and libc.mallopt(M_TRIM_THRESHOLD, -1)
        libc.malloc_trim(0)
        mappings = libc.mallinfo2().hblks
        while libc.mallinfo2().hblks == mappings:
            _held.append(libc.malloc(LARGEST_KEPT + 1))
        libc.free(_held.pop())  # the first that found no stretch
    except AttributeError:
        return False
    return bool(kept)


@dataclass(frozen=True)
class Cost:
    """``peak_bytes`` above what was allocated before the call;

    ``flops`` of the matmuls and convolutions that it ran, None on CUDA, where PyTorch does not see those of kernels.
    """

    peak_bytes: int
    flops: int | None


def cost(call: Callable[[], object], device: torch.device, *, warm: bool = True) -> Cost:
    """Runs ``call``, under the profiler on the CPU, and says what it allocated and multiplied.

    Once before it counts, unless ``warm`` is False: for calls that release nothing of the call before.

    Memory outside PyTorch's allocators (numpy, decoders, MKL's scratch) and in threads that PyTorch did not start is
    not seen. The call's result counts as allocated.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return Cost(torch.cuda.max_memory_allocated(device) - before, None)
    options = {"profile_memory": True, "with_flops": True, "record_shapes": True}
    with profile(activities=[ProfilerActivity.CPU], **options) as recorded:
        if warm:
            call()  # what it releases, a step's old gradients say, the profiler must have seen allocated
        with record_function("counted"):
            kept = call()
    del kept
    events = recorded.profiler.kineto_results.events()
    start = next(event.start_ns() for event in events if event.name() == "counted")
    events = [event for event in events if event.start_ns() >= start]
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    current = peak = 0
    for _, change in changes:
        current += change
        peak = max(peak, current)
    return Cost(peak, sum(map(_flops, events)))


def _flops(event: Any) -> int:
    # The profiler has no formula for these two.
    if event.name() == "mkldnn::_linear_pointwise":
        (m, k), (n, _) = event.shapes()[:2]
        return 2 * m * k * n
    if event.name() == "aten::addmm_":
        (m, k), (_, n) = event.shapes()[1:3]
        return 2 * m * k * n
    # Elementwise products and sums have a flop count there too; they are bandwidth, and would blur the comparison.
    return 0 if event.name() in ("aten::mul", "aten::add") else int(event.flops() or 0)
