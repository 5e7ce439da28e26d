"""Photometric augmentation: jitter, grey, blur, solarise and normalise, in the ancestors' semantics."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .reference.photometric import IMAGENET_MEAN, IMAGENET_STD
from .reference.photometric import photometric as reference

PARAMS = ("brightness", "contrast", "saturation", "hue", "order", "grey", "sigma", "solarise")


def photometric(
    images: Tensor,
    params: Tensor,
    *,
    kernel_size: int | None = None,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """See :func:`vito_kernels.reference.photometric`."""
    return reference(images, params, kernel_size=kernel_size, mean=mean, std=std, dtype=dtype)
