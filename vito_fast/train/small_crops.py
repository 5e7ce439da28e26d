"""Multi-crop (SwAV, 2006.09882): small crops of each view, which make queries and no keys.

They are cut from the views on the device, so that they cost no decoding. A crop shares the colors of its view, and is
only compared with the keys of the other views. The crops are a function of seed, step and clip.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from vito_fast.config import SamplerConfig


def small_crops(
    views: tuple[Tensor, ...], config: SamplerConfig, seed: int, step: int, first: int, total: int
) -> tuple[Tensor, ...]:
    """The small crops of a step.

    Args:
        views: V views (B,3,H,W).
        config: Their number, size, area, aspect and flips.
        seed: The run's.
        step: The step's number.
        first: Place of this rank's first clip among those of all ranks.
        total: Clips of all ranks.

    Returns:
        V * ``config.small_crops`` tensors (B,3,S,S) of the views' dtype, channels-last; those of view 0 come first.
    """
    count, size, clips = config.small_crops, config.small_size, len(views[0])
    generator = torch.Generator().manual_seed(hash((seed, step)) % 2**63)
    draws = torch.rand(len(views), count, total, 5, generator=generator)[:, :, first : first + clips]
    low, high = config.small_area
    area = low + (high - low) * draws[..., 0]
    narrow, wide = map(math.log, config.crop_aspect)
    aspect = torch.exp(narrow + (wide - narrow) * draws[..., 1])
    width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    x, y = (1 - width) * (2 * draws[..., 2] - 1), (1 - height) * (2 * draws[..., 3] - 1)
    mirror = torch.where(draws[..., 4] < config.flip, -1.0, 1.0)
    none = torch.zeros_like(x)
    places = torch.stack([torch.stack([width * mirror, none, x], -1), torch.stack([none, height, y], -1)], -2)
    crops = []
    for view, own in zip(views, places.to(views[0].device, non_blocking=True), strict=True):
        pixels = view.float() if view.dtype == torch.bfloat16 else view
        for place in own:
            grid = F.affine_grid(place.to(pixels.dtype), [clips, 3, size, size], align_corners=False)
            crop = F.grid_sample(pixels, grid, mode="bilinear", padding_mode="border", align_corners=False)
            crops.append(crop.to(view.dtype).contiguous(memory_format=torch.channels_last))
    return tuple(crops)
