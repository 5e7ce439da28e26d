"""Specification of the photometric augmentations in plain PyTorch: the color chain of BYOL and DetCon, image by image.

Formulas: ``byol/utils/augmentations.py`` of google-deepmind/deepmind-research (2020) and ``utils/augmentations.py`` of
google-deepmind/detcon (2021), which agree. Details that are easily wrong:

- every jitter operation is followed by its own clip to [0, 1], not only the whole jitter;
- brightness adds a delta;
- contrast multiplies about the mean of each channel *at that point of the order*;
- saturation and hue go through HSV, with s multiplied and clipped to [0, 1], and h shifted modulo one turn;
- gray is 0.2989 R + 0.5870 G + 0.1140 B;
- blur is separable and zero-padded ('SAME'), so borders darken;
- the radius of the blur is ``int(height / 10 / 2)`` for any sigma;
- solarize replaces x >= threshold by 1 - x; a last clip to [0, 1] precedes the normalization.
"""

from collections.abc import Sequence
from itertools import permutations

import torch
import torch.nn.functional as F
from torch import Tensor

GRAY_WEIGHTS = (0.2989, 0.5870, 0.1140)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
ORDERS = tuple(permutations(range(4)))  # lexicographic; 0 brightness, 1 contrast, 2 saturation, 3 hue


def photometric(
    images: Tensor,
    params: Tensor,
    *,
    kernel_size: int | None = None,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Jitter, gray, blur, solarize and normalize each image by its own row of parameters.

    Args:
        images: (B, H, W, 3) uint8.
        params: (B, 8), columns as in ``from vito_kernels.photometric import PARAMS``.
        kernel_size: odd number of taps of the blur; by default ``2 * int(H / 10 / 2) + 1``.
        mean, std: per-channel normalization, in units of [0, 1] intensities.
        dtype: of the result. Arithmetic is in float64 if it is float64, else in float32.

    Returns:
        (B, 3, H, W), channels_last.
    """
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    radius = (kernel_size - 1) // 2 if kernel_size is not None else int(images.shape[1] / 10 / 2)
    out = [
        _augment(image.to(compute) / 255, row.to(compute), radius) for image, row in zip(images, params, strict=True)
    ]
    x = torch.stack(out) if out else images.to(compute)
    x = (x - x.new_tensor(mean)) / x.new_tensor(std)
    return x.to(dtype).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)


def _augment(x: Tensor, row: Tensor, radius: int) -> Tensor:
    """One image (H, W, 3) in [0, 1] through everything but the normalization."""
    brightness, contrast, saturation, hue, order, gray, sigma, threshold = row
    jitter = (
        lambda x: x + brightness,
        lambda x: adjust_contrast(x, contrast),
        lambda x: adjust_saturation(x, saturation),
        lambda x: adjust_hue(x, hue),
    )
    for operation in ORDERS[int(order)] if order >= 0 else ():
        x = jitter[operation](x).clamp(0, 1)
    if gray:
        x = (x @ x.new_tensor(GRAY_WEIGHTS))[..., None].expand(x.shape).clamp(0, 1)
    if sigma > 0:
        x = gaussian_blur(x, sigma, radius)
    return torch.where(x < threshold, x, 1 - x).clamp(0, 1)


def adjust_contrast(x: Tensor, factor: Tensor) -> Tensor:
    mean = x.mean(dim=(0, 1))
    return factor * (x - mean) + mean


def adjust_saturation(x: Tensor, factor: Tensor) -> Tensor:
    h, s, v = rgb_to_hsv(x)
    return hsv_to_rgb(h, (s * factor).clamp(0, 1), v)


def adjust_hue(x: Tensor, turns: Tensor) -> Tensor:
    h, s, v = rgb_to_hsv(x)
    return hsv_to_rgb((h + turns) % 1, s, v)


def rgb_to_hsv(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(H, W, 3) to hue in turns [0, 1), saturation and value, each (H, W). A gray pixel has hue 0."""
    r, g, b = x.unbind(-1)
    v = x.amax(-1)
    chroma = v - x.amin(-1)
    s = torch.where(v > 0, chroma / v, 0)
    sixth = 1 / (6 * chroma)
    h = torch.where(r == v, sixth * (g - b), torch.where(g == v, sixth * (b - r) + 1 / 3, sixth * (r - g) + 2 / 3))
    h = torch.where(chroma > 0, h, 0)
    return torch.where(h < 0, h + 1, h), s, v


def hsv_to_rgb(h: Tensor, s: Tensor, v: Tensor) -> Tensor:
    """Inverse of :func:`rgb_to_hsv`: each channel is v minus chroma times a trapezoid of the hue."""
    chroma = s * v
    distance = [(6 * h + offset) % 6 for offset in (5, 3, 1)]  # from the hue opposite to red, green, blue
    return torch.stack([v - chroma * torch.minimum(d, 4 - d).clamp(0, 1) for d in distance], -1)


def gaussian_blur(x: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """Separable Gaussian of 2 * radius + 1 taps over the (H, W) of (H, W, 3), zeros beyond the border."""
    offsets = torch.arange(-radius, radius + 1, dtype=x.dtype, device=x.device)
    taps = torch.exp(-(offsets**2) / (2 * sigma**2))
    taps = (taps / taps.sum()).expand(3, 1, -1)
    planes = x.permute(2, 0, 1)[None]
    planes = F.conv2d(planes, taps[:, :, None, :], padding=(0, radius), groups=3)
    planes = F.conv2d(planes, taps[:, :, :, None], padding=(radius, 0), groups=3)
    return planes[0].permute(1, 2, 0)
