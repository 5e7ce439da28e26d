"""Products of the CPU path: by oneDNN where MKL would leave half of the processor idle.

``torch.mm`` of float32 is MKL's, which runs AVX-512 on Intel's processors only, and AVX2 on all others. PyTorch's
oneDNN uses the abilities of any processor. It takes less than half of the time on an AMD EPYC of the Zen 5 generation.
Both add in float32.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor


@cache
def _mkl_is_slow() -> bool:
    """Whether this processor has AVX-512 that MKL does not run."""
    cpuinfo = Path("/proc/cpuinfo")
    return (
        hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and torch.backends.mkl.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and cpuinfo.exists()
        and "GenuineIntel" not in cpuinfo.read_text()
    )


def _by_onednn(x: Tensor) -> bool:
    return x.dtype == torch.float32 and x.device.type == "cpu" and _mkl_is_slow()


def _linear(x: Tensor, y: Tensor) -> Tensor:
    """oneDNN has no fast path for a second matrix whose rows lie apart, in either direction: it may take 1000 times as
    long.
    """
    y = y if y.T.is_contiguous() else y.contiguous()
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), y, None, "none", [], "")


def product(x: Tensor, y: Tensor) -> Tensor:
    """``x @ y.T`` (M, N) of x (M, K) and y (N, K), which autocast does not round: it leaves ops with ``out`` alone."""
    return _linear(x, y) if _by_onednn(x) else torch.mm(x, y.T, out=x.new_empty(len(x), len(y)))


def add_product(onto: Tensor, x: Tensor, y: Tensor) -> None:
    """``onto += x @ y.T``."""
    if _by_onednn(x):
        onto.add_(_linear(x, y))
    else:
        onto.addmm_(x, y.T)
