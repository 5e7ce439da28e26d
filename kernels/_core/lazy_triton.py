"""Triton on first use, and the few things that every launch needs.

``jit`` stands for ``triton.jit``. A decorated function becomes a Triton kernel at its first launch, when ``tl`` and
``triton`` appear in its module. Importing this package never imports triton, so a machine without it can import every
module and use the CPU paths.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, cached_property, partial
from typing import Any

import torch


class LazyKernel:
    """A kernel (launched as ``kernel[grid](...)``) or a device function, compiled by Triton on first use."""

    def __init__(self, function: Callable[..., Any]):
        self.function = function
        self.__name__ = function.__name__
        self.__doc__ = function.__doc__

    @cached_property
    def compiled(self) -> Any:
        import triton
        import triton.language as tl

        # The kernel's names must resolve to Triton objects, also device functions of other modules.
        names = self.function.__globals__
        names.update(triton=triton, tl=tl)
        kernel = triton.jit(self.function)
        self.__dict__["compiled"] = kernel
        for name in self.function.__code__.co_names:
            if isinstance(value := names.get(name), LazyKernel):
                names[name] = value.compiled
        return kernel

    def __getitem__(self, grid: Any) -> Any:
        recorder = getattr(_recorders, "launch", None)
        return self.compiled[grid] if recorder is None else partial(recorder, self, grid)


_recorders = threading.local()


@contextmanager
def record_launches(launch: Callable[..., None]) -> Iterator[None]:
    """Inside, this thread's ``kernel[grid](...)`` is ``launch(kernel, grid, ...)``."""
    _recorders.launch = launch
    try:
        yield
    finally:
        _recorders.launch = None


def recording_launches() -> bool:
    return getattr(_recorders, "launch", None) is not None


def jit(function: Callable[..., Any]) -> Any:
    """Declares a Triton kernel or device function without importing triton."""
    return LazyKernel(function)


@cache
def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors (``TRITON_INTERPRET=1`` before the first)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def use_triton(tensor: torch.Tensor) -> bool:
    """Whether an op on this tensor runs its Triton kernels rather than PyTorch.

    float64 never does, nor does a GPU without bfloat16 tensor cores (before sm_80).
    """
    if not (tensor.is_cuda or interpreting()) or tensor.dtype == torch.float64:
        return False
    return interpreting() or _has_bf16_tensor_cores(tensor.device.index)


@cache
def _has_bf16_tensor_cores(device: int | None) -> bool:
    """True also for fake tensors, traced for a GPU that is not there."""
    return not torch.cuda.is_available() or torch.cuda.get_device_capability(device) >= (8, 0)


def arch() -> int:
    """Compute capability of Triton's active driver, as 80, 90 or 100; 0 in the interpreter."""
    if interpreting():
        return 0
    import triton

    return _arch_of(triton.runtime.driver.active.get_current_device())


@cache
def _arch_of(device: int) -> int:
    """Cached: a launch asks ten times, and the driver takes as long to answer as a small kernel runs."""
    import triton

    return int(triton.runtime.driver.active.get_current_target().arch)


def active_driver() -> Any:
    """Triton's; None in the interpreter."""
    return None if interpreting() else _triton_drivers().active


@cache
def _triton_drivers() -> Any:
    import triton

    return triton.runtime.driver


def current_stream() -> int:
    """The stream that launches on the current device go to; 0 in the interpreter."""
    driver = active_driver()
    return 0 if driver is None else driver.get_current_stream(driver.get_current_device())


def shared_limit() -> int:
    """Bytes of shared memory that a program may take on the active driver's GPU."""
    import triton

    driver = triton.runtime.driver.active
    return int(driver.utils.get_device_properties(driver.get_current_device())["max_shared_mem"])


def num_sms(device: torch.device) -> int:
    """Streaming multiprocessors of the device; 4 in the interpreter, which runs programs in turn."""
    if interpreting():
        return 4
    if device.type == "cuda":
        return _num_sms_of(torch.cuda.current_device() if device.index is None else device.index)
    import triton

    return int(triton.runtime.driver.active.utils.get_device_properties(0)["multiprocessor_count"])


@cache
def _num_sms_of(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def on_device(tensor: torch.Tensor) -> AbstractContextManager[Any]:
    """Launches inside go to the tensor's GPU. No context if it is current: to enter one takes half a launch."""
    elsewhere = tensor.is_cuda and tensor.device.index != torch.cuda.current_device()
    return torch.cuda.device(tensor.device) if elsewhere else nullcontext()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def rows_contiguous(x: torch.Tensor) -> torch.Tensor:
    """x with contiguous rows at any stride, so that a tile spans less than 2^31 elements; a copy if need be."""
    return x if x.stride(1) == 1 and 0 <= x.stride(0) < 2**23 else x.contiguous()


def program_shape(D: int) -> tuple[int, int]:
    """(WIDTH, ROWS) of a program of row-wise kernels over D columns: 16 elements for each of 128 threads."""
    width = 1 << max(D - 1, 1).bit_length()
    return width, max(1, 2048 // width)
