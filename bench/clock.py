"""Clocks and CUDA helpers: one interface for timing a call on either device.

A clock is a callable without arguments that returns seconds; the time of a call is ``clock()`` after it minus
``clock()`` before it. That is all pytest-benchmark asks of a timer, so the same clock serves it and the harness.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

wall_clock = time.perf_counter


class CudaClock:
    """Time on the device between two calls, by CUDA events.

    The first call of a pair records an event and returns at once. So the host runs ahead, and launch latency overlaps
    as it does in training. The second call records another event, waits for it and adds the difference to the total.
    """

    def __init__(self) -> None:
        self._total = 0.0
        self._start: torch.cuda.Event | None = None

    def __call__(self) -> float:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        if self._start is None:
            self._start = event
        else:
            event.synchronize()
            self._total += self._start.elapsed_time(event) / 1e3
            self._start = None
        return self._total


class ColdCache:
    """Empties the device's L2 before a sample by writing a buffer of twice its size."""

    def __init__(self, device: torch.device) -> None:
        size = torch.cuda.get_device_properties(device).L2_cache_size
        self._buffer = torch.empty(2 * size, dtype=torch.uint8, device=device)

    def __call__(self) -> None:
        self._buffer.zero_()


def graphed(call: Callable[[], object], repeats: int = 1) -> Callable[[], None]:
    """``repeats`` runs of ``call`` as one CUDA graph: the work of the device, without Python and launches.

    Warm-up happens on a side stream, as capture asks for, so that lazy initialization and autotuning are over by then.

    Raises:
        RuntimeError: A graph forbids an operation of the call, as a host synchronization.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            call()
    return graph.replay
