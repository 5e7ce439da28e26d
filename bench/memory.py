"""Costs of a call other than time: peak memory and matrix-multiplication flops, counted rather than sampled.

On the CPU both come from PyTorch's profiler. It reports every allocation and release of the CPU allocator, so the peak
is exact and the same on every run. On CUDA the caching allocator records the peak. Flops are not counted there, because
PyTorch does not see those of a Triton kernel.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler otherwise complains about the missing GPU on every use
from torch.profiler import ProfilerActivity, profile, record_function


@dataclass(frozen=True)
class Cost:
    """Memory in bytes above the level before the call, and flops of its matmuls and convolutions (None on CUDA)."""

    peak_bytes: int
    flops: int | None


def cost(call: Callable[[], object], device: torch.device) -> Cost:
    """Runs ``call``, under the profiler on the CPU, and counts its allocations and multiplications.

    It runs once before it counts.

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
        call()  # the profiler must see the allocation of all that the next call releases, such as old gradients
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
