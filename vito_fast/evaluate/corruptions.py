"""Common corruptions of images, in five severities.

Source: Hendrycks & Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations" (2019),
whose parameters these are. Twelve of its corruptions are here; the others need pictures of frost or a version of
ImageMagick. Scores are comparable among encoders here. A score on ImageNet-C needs its own files, which are JPEG, 224
pixels, and made once.

The parameters are in pixels or fractions of the image as published for 224 x 224. Noise comes from the seed alone, so
the same call gives the same image on every machine.
"""

import io
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

Pixels = NDArray[np.float64]
SEVERITIES = (1, 2, 3, 4, 5)


def corrupt(image: NDArray[np.uint8], name: str, severity: int, seed: int = 0) -> NDArray[np.uint8]:
    """A corrupted copy of an image.

    Args:
        image: (H, W, 3) uint8 RGB.
        name: one of :data:`CORRUPTIONS`.
        severity: 1 to 5.
        seed: of the noise; corruptions without noise do not read it.

    Returns:
        (H, W, 3) uint8, rounded down as the published code does. Deterministic.

    Raises:
        ValueError: for another name, severity, shape or dtype.
    """
    if name not in CORRUPTIONS:
        raise ValueError(f"no corruption {name!r}; there are {', '.join(CORRUPTIONS)}")
    if severity not in SEVERITIES:
        raise ValueError(f"severity must be 1 to 5, not {severity}")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise ValueError(f"image must be (H, W, 3) uint8, not {image.shape} {image.dtype}")
    result = CORRUPTIONS[name](image / 255, severity - 1, np.random.default_rng(seed))
    return (np.clip(result, 0, 1) * 255).astype(np.uint8)


def _gaussian_noise(x: Pixels, level: int, rng: np.random.Generator) -> Pixels:
    return x + rng.normal(size=x.shape, scale=(0.08, 0.12, 0.18, 0.26, 0.38)[level])


def _shot_noise(x: Pixels, level: int, rng: np.random.Generator) -> Pixels:
    photons = (60, 25, 12, 5, 3)[level]
    return rng.poisson(x * photons) / photons


def _impulse_noise(x: Pixels, level: int, rng: np.random.Generator) -> Pixels:
    """Salt and pepper in equal parts, in each color on its own."""
    drawn = rng.random(x.shape) < (0.03, 0.06, 0.09, 0.17, 0.27)[level]
    return np.where(drawn, rng.integers(0, 2, x.shape), x)


def _speckle_noise(x: Pixels, level: int, rng: np.random.Generator) -> Pixels:
    return x + x * rng.normal(size=x.shape, scale=(0.15, 0.2, 0.35, 0.45, 0.6)[level])


def _gaussian_blur(x: Pixels, level: int, rng: np.random.Generator) -> Pixels:
    sigma = (1, 2, 3, 4, 6)[level]
    return ndimage.gaussian_filter(x, (sigma, sigma, 0), mode="nearest", truncate=4)


def _defocus_blur(x: Pixels, level: int, rng: np.random.Generator) -> Pixels:
    """A disk, its edge softened by a small Gaussian."""
    radius, sigma = ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))[level]
    reach, soft = (8, 1) if radius <= 8 else (radius, 2)
    axis = np.arange(-reach, reach + 1)
    disk = (axis[:, None] ** 2 + axis**2 <= radius**2).astype(np.float64)
    disk /= disk.sum()
    edge = np.exp(-(np.arange(-soft, soft + 1.0) ** 2) / (2 * sigma**2))
    for direction in (0, 1):
        disk = ndimage.convolve1d(disk, edge / edge.sum(), direction, mode="mirror")
    return np.stack([ndimage.convolve(x[..., c], disk, mode="mirror") for c in range(3)], 2)


def _zoom_blur(x: Pixels, level: int, rng: np.random.Generator) -> Pixels:
    """The mean of the image and of its enlargements about the center."""
    last, pace = ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03))[level]
    factors = np.arange(1, last, pace)
    return (x + sum(_enlarged(x, factor) for factor in factors)) / (len(factors) + 1)


def _enlarged(x: Pixels, factor: float) -> Pixels:
    crop = [int(np.ceil(side / factor)) for side in x.shape[:2]]
    top, left = ((side - part) // 2 for side, part in zip(x.shape[:2], crop, strict=True))
    large = ndimage.zoom(x[top : top + crop[0], left : left + crop[1]], (factor, factor, 1), order=1)
    top, left = ((big - side) // 2 for side, big in zip(x.shape[:2], large.shape[:2], strict=True))
    return large[top : top + x.shape[0], left : left + x.shape[1]]


def _contrast(x: Pixels, level: int, rng: np.random.Generator) -> Pixels:
    mean = x.mean((0, 1), keepdims=True)
    return (x - mean) * (0.4, 0.3, 0.2, 0.1, 0.05)[level] + mean


def _brightness(x: Pixels, level: int, rng: np.random.Generator) -> Pixels:
    """More of HSV's value; hue and saturation stay, so all colors scale alike."""
    value = x.max(2, keepdims=True)
    wanted = np.clip(value + (0.1, 0.2, 0.3, 0.4, 0.5)[level], 0, 1)
    return np.where(value > 0, x * wanted / np.where(value > 0, value, 1), wanted)


def _saturate(x: Pixels, level: int, rng: np.random.Generator) -> Pixels:
    """HSV's saturation scaled and shifted: each color moves along its line to the value. The hue of gray is red."""
    scale, shift = ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2))[level]
    value = x.max(2, keepdims=True)
    saturation = np.where(value > 0, (value - x.min(2, keepdims=True)) / np.where(value > 0, value, 1), 0)
    wanted = np.clip(saturation * scale + shift, 0, 1)
    colored = value - (value - x) * wanted / np.where(saturation > 0, saturation, 1)
    red = value * np.concatenate([np.ones_like(wanted), 1 - wanted, 1 - wanted], 2)
    return np.where(saturation > 0, colored, red)


def _pixelate(x: Pixels, level: int, rng: np.random.Generator) -> Pixels:
    scale = (0.6, 0.5, 0.4, 0.3, 0.25)[level]
    image = _image(x)
    small = image.resize([max(1, int(side * scale)) for side in image.size], Image.Resampling.BOX)
    return np.asarray(small.resize(image.size, Image.Resampling.BOX)) / 255


def _jpeg_compression(x: Pixels, level: int, rng: np.random.Generator) -> Pixels:
    buffer = io.BytesIO()
    _image(x).save(buffer, "JPEG", quality=(25, 18, 15, 10, 7)[level])
    return np.asarray(Image.open(buffer)) / 255


def _image(x: Pixels) -> Image.Image:
    return Image.fromarray(np.rint(x * 255).astype(np.uint8))


CORRUPTIONS: dict[str, Callable[[Pixels, int, np.random.Generator], Pixels]] = {
    "gaussian_noise": _gaussian_noise,
    "shot_noise": _shot_noise,
    "impulse_noise": _impulse_noise,
    "speckle_noise": _speckle_noise,
    "gaussian_blur": _gaussian_blur,
    "defocus_blur": _defocus_blur,
    "zoom_blur": _zoom_blur,
    "contrast": _contrast,
    "brightness": _brightness,
    "saturate": _saturate,
    "pixelate": _pixelate,
    "jpeg_compression": _jpeg_compression,
}
