"""Images and parameters for the photometric tests."""

import torch

from vito_kernels.reference import IMAGENET_STD

IDENTITY = torch.tensor([[0.0, 1, 1, 0, -1, 0, 0, 2]])


def photographs(count, height, width, seed=0):
    """Random bytes; the first two images have flat patches, ties between channels, black and white."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, height, width, 3), dtype=torch.uint8, generator=generator)
    images[:2] = images[:2] // 128 * 255
    images[0, ..., 1] = images[0, ..., 0]
    return images


def random_params(count, seed=0, hue=0.7):
    """Wider ranges than training uses, every feature on in some rows."""
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(count, 8, generator=generator)
    low = torch.tensor([-0.5, 0.3, 0.0, -hue, -1, 0, 0.0, 0.0])
    high = torch.tensor([0.5, 1.8, 2.0, hue, 24, 2, 2.5, 1.5])
    params = low + (high - low) * uniform
    params[:, 4:6].floor_()
    params[::5, 6] = 0
    return params


def gray_levels(a, b):
    """Largest difference of two normalized batches, in 255ths of an intensity."""
    std = torch.tensor(IMAGENET_STD, device=a.device, dtype=torch.float64).view(3, 1, 1)
    return float(((a.double() - b.double()) * std).abs().max() * 255)
