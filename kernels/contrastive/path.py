"""The one place that chooses between the Triton and the CPU path of a contrastive op."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vito_kernels._core.lazy_triton import use_triton
from vito_kernels.contrastive import cpu, gpu
from vito_kernels.contrastive.tile_configs import MAX_WIDTH


def path_of(x: Tensor) -> Any:
    """The module that computes on rows x (M, D): :mod:`.gpu` or :mod:`.cpu`, whose functions have the same names.

    Beyond D = 1024 the rows that must stay in shared memory do not fit every GPU: there PyTorch computes, on the GPU.
    """
    return gpu if use_triton(x) and x.shape[1] <= MAX_WIDTH else cpu
