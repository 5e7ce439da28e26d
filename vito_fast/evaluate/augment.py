"""Augmentations of fine-tuning, each a pure function of its images and a generator."""

import math

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as T


def random_resized_crop(images: Tensor, rng: np.random.Generator, size: int, min_area: float) -> Tensor:
    """(...,3,H,W) -> (...,3,size,size): area U(min_area, 1), aspect log-U(3/4, 4/3), bilinear; the whole after ten
    tries that do not fit."""
    height, width = images.shape[-2:]
    for _ in range(10):
        area = height * width * rng.uniform(min_area, 1)
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top, left = (int(rng.integers(0, whole - part + 1)) for whole, part in ((height, h), (width, w)))
            return T.resized_crop(images, top, left, h, w, [size, size], antialias=True)
    return resize_center_crop(images, size)


def resize_center_crop(images: Tensor, size: int) -> Tensor:
    """Short side to ``size`` x 8 / 7, then the center (...,3,size,size)."""
    return T.center_crop(T.resize(images, [round(size * 8 / 7)], antialias=True), [size, size])


def color_jitter(images: Tensor, rng: np.random.Generator, strength: tuple[float, float, float, float]) -> Tensor:
    """Brightness, contrast, saturation factors U(1 - s, 1 + s) and a hue shift U(-s, s), in random order."""
    brightness, contrast, saturation, hue = strength
    factors = [rng.uniform(max(0, 1 - s), 1 + s) for s in (brightness, contrast, saturation)] + [rng.uniform(-hue, hue)]
    steps = [T.adjust_brightness, T.adjust_contrast, T.adjust_saturation, T.adjust_hue]
    for number in rng.permutation(4):
        if strength[number]:
            images = steps[number](images, factors[number])
    return images


def photometric_distortion(image: Tensor, rng: np.random.Generator) -> Tensor:
    """SSD's, with mmsegmentation's strengths: brightness +-32, contrast and saturation .5 to 1.5, hue +-18 of 180.

    Each with probability 1/2; contrast comes before or after saturation and hue with equal chance. uint8 in and out.
    """
    first = rng.random() < 0.5
    if rng.random() < 0.5:
        image = (image.float() + float(rng.uniform(-32, 32))).clamp(0, 255).round().to(torch.uint8)
    contrast = float(rng.uniform(0.5, 1.5)) if rng.random() < 0.5 else 1.0
    if first:
        image = _scaled(image, contrast)
    if rng.random() < 0.5:
        image = T.adjust_saturation(image, float(rng.uniform(0.5, 1.5)))
    if rng.random() < 0.5:
        image = T.adjust_hue(image, float(rng.uniform(-0.1, 0.1)))
    return image if first else _scaled(image, contrast)


def _scaled(image: Tensor, factor: float) -> Tensor:
    return image if factor == 1.0 else (image.float() * factor).clamp(0, 255).round().to(torch.uint8)
