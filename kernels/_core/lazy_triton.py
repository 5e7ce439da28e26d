"""Triton on first use: kernels are declared where they are read, and importing this package never imports triton.

``jit`` stands for ``triton.jit``; a decorated function becomes a real Triton kernel when it is first launched, which
is also when ``tl`` and ``triton`` appear in its module. A machine without triton can therefore import every module
and use the CPU paths.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, cached_property
from typing import Any

import torch


class LazyKernel:
    """A function to be compiled by Triton: a kernel (launched as ``kernel[grid](...)``) or a device function it
    calls.
    """

    def __init__(self, function: Callable[..., Any]):
        self.function = function
        self.__name__ = function.__name__
        self.__doc__ = function.__doc__

    @cached_property
    def compiled(self) -> Any:
        import triton
        import triton.language as tl

        # The kernel's names must resolve to real Triton objects, device functions of other modules included.
        names = self.function.__globals__
        names.update(triton=triton, tl=tl)
        kernel = triton.jit(self.function)
        self.__dict__["compiled"] = kernel
        for name, value in list(names.items()):
            if isinstance(value, LazyKernel):
                names[name] = value.compiled
        return kernel

    def __getitem__(self, grid: Any) -> Any:
        return self.compiled[grid]


def jit(function: Callable[..., Any]) -> Any:
    """Declares a Triton kernel or device function without importing triton."""
    return LazyKernel(function)


@cache
def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter (``TRITON_INTERPRET=1`` before the first), and so on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def use_triton(tensor: torch.Tensor) -> bool:
    """Whether an op on this tensor runs its Triton kernels rather than its CPU path. float64 never does, nor anything
    on a GPU without bfloat16 tensor cores (before sm_80), where that path computes instead.
    """
    if interpreting():
        return tensor.dtype != torch.float64
    return tensor.dtype != torch.float64 and tensor.is_cuda and _recent(tensor.device.index)


@cache
def _recent(device: int | None) -> bool:
    """Also where fake tensors are traced for a GPU that is not there."""
    return not torch.cuda.is_available() or torch.cuda.get_device_capability(device) >= (8, 0)


def arch() -> int:
    """Compute capability that kernels compile for, as 80, 90 or 100; 0 in the interpreter. Asked of Triton's active
    driver.
    """
    if interpreting():
        return 0
    import triton

    return _arch_of(triton.runtime.driver.active.get_current_device())


@cache
def _arch_of(device: int) -> int:
    """Of the driver's device: a launch asks ten times, and the driver takes as long as a small kernel to answer."""
    import triton

    return int(triton.runtime.driver.active.get_current_target().arch)


def shared_limit() -> int:
    """Bytes of shared memory that a program may take on the GPU that kernels compile for."""
    import triton

    driver = triton.runtime.driver.active
    return int(driver.utils.get_device_properties(driver.get_current_device())["max_shared_mem"])


def num_sms(device: torch.device) -> int:
    """Streaming multiprocessors of the device that kernels launch on; few in the interpreter, where programs run in
    turn.
    """
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
    """Launches go to the tensor's own GPU, whichever is current. Mostly it is: to enter it would take as long as half a
    launch.
    """
    elsewhere = tensor.is_cuda and tensor.device.index != torch.cuda.current_device()
    return torch.cuda.device(tensor.device) if elsewhere else nullcontext()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def rows_contiguous(x: torch.Tensor) -> torch.Tensor:
    """Rows may lie anywhere; the elements of one must be neighbors, and a tile must out_columns less than 2^31
    elements."""
    return x if x.stride(1) == 1 and 0 <= x.stride(0) < 2**23 else x.contiguous()


def program_shape(D: int) -> tuple[int, int]:
    """(WIDTH, ROWS) of a program of row-wise kernels over D columns: 16 elements for each of 128 threads."""
    width = 1 << max(D - 1, 1).bit_length()
    return width, max(1, 2048 // width)
