"""Color, blur, solarize and normalize of a batch of views, with parameters drawn as the sampler draws them."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import vito_kernels
from bench.harness import Candidate, Result, Work
from bench.limits import traffic
from bench.peers import not_compiled
from vito_kernels import reference
from vito_kernels.photometric.op import IMAGENET_MEAN, IMAGENET_STD

FULL = pytest.mark.full


def pictures(count: int, size: int) -> Tensor:
    """Colored waves of all sizes with some grain, as smooth and as saturated as photographs, (B, S, S, 3) uint8."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:size, :size] / size
    waves = np.zeros((count, size, size, 3))
    for scale in (1, 2, 4, 8, 16):
        along, phase = rng.normal(0, 6 * scale, (count, 2, 1, 1, 1)), rng.uniform(0, 6.28, (count, 1, 1, 3))
        waves += np.sin(along[:, 0] * y[..., None] + along[:, 1] * x[..., None] + phase) / scale
    pixels = 128 + 60 * waves + rng.normal(0, 4, waves.shape)
    return torch.from_numpy(pixels.clip(0, 255).astype(np.uint8))


def parameters(count: int, view: int) -> Tensor:
    """(B, 8): the distribution of view 1 (always blurred) or view 2 (seldom blurred, sometimes solarized)."""
    rng = np.random.default_rng(view)
    chance = rng.random((count, 4))
    rows = np.tile(np.array([0, 1, 1, 0, -1, 0, 0, 2], np.float32), (count, 1))
    jitter = chance[:, 0] < 0.8
    rows[:, :4] += (rng.uniform(-1, 1, (count, 4)) * [0.4, 0.4, 0.2, 0.1]) * jitter[:, None]
    rows[jitter, 4] = rng.integers(0, 24, jitter.sum())
    rows[:, 5] = chance[:, 1] < 0.2
    rows[:, 6] = rng.uniform(0.1, 2, count) * (chance[:, 2] < (1.0 if view == 1 else 0.1))
    rows[:, 7] = np.where((chance[:, 3] < 0.2) & (view == 2), 0.5, 2)
    return torch.from_numpy(rows)


def gray_levels(got: Result, truth: Result) -> float:
    """The largest distance in gray levels of 255, but for the one pixel in ten thousand that lies on solarize's
    threshold.
    """
    if got[0].shape != truth[0].shape or not got[0].isfinite().all():
        return float("inf")
    std = torch.tensor(IMAGENET_STD, device=got[0].device).double()[:, None, None]
    distance = ((got[0].double() - truth[0].double()).abs() * std * 255).flatten()
    return distance.kthvalue(int(0.9999 * len(distance)))[0].item()


def torchvision_chain(images: Tensor, params: Tensor, kernel_size: int) -> Tensor:
    """torchvision's operators of the same names (their formulas differ), each image by its parameters, in their
    order.
    """
    from torchvision.transforms.v2 import functional as F

    done = []
    for image, row in zip(images.permute(0, 3, 1, 2), params.tolist(), strict=True):
        steps = (
            lambda x, row=row: F.adjust_brightness(x, 1 + row[0]),
            lambda x, row=row: F.adjust_contrast(x, row[1]),
            lambda x, row=row: F.adjust_saturation(x, row[2]),
            lambda x, row=row: F.adjust_hue(x, row[3]),
        )
        for step in list(permutations(steps))[int(row[4])] if row[4] >= 0 else ():
            image = step(image)
        if row[5]:
            image = F.rgb_to_grayscale(image, 3)
        if row[6] > 0:
            image = F.gaussian_blur(image, [kernel_size, kernel_size], [row[6], row[6]])
        if row[7] <= 1:
            image = F.solarize(image, row[7] * 255)
        done.append(F.normalize(F.to_dtype(image, torch.float32, scale=True), list(IMAGENET_MEAN), list(IMAGENET_STD)))
    return torch.stack(done).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("b", "view"),
    [(16, 1), pytest.param(16, 2, marks=FULL), pytest.param(64, 1, marks=FULL), pytest.param(4, 1, marks=FULL)],
)
def test_photometric(race: Any, device: torch.device, b: int, view: int) -> None:
    size = 224
    if device.type == "cpu":
        b = min(b, 48)  # maps of 27.6 MiB: of more, a call waits for fresh pages
    images, params = pictures(b, size).to(device), parameters(b, view).to(device)
    candidates = [
        Candidate("vito_kernels", lambda: (vito_kernels.photometric(images, params),), "ours"),
        Candidate("reference", lambda: (reference.photometric(images, params),), "reference"),
        not_compiled("takes most of a minute to compile"),
        Candidate(
            "torchvision v2 operators",
            lambda: (torchvision_chain(images, params, 23),),
            "context",
            "formulas of its own: multiplicative brightness, contrast about mid-gray",
        ),
    ]
    if device.type == "cuda":  # on a CPU it is arithmetic: copies take a hundredth of the time
        candidates.append(traffic([], [(images, torch.empty(b, size, size, 3, device=device))]))
    amount = Work(bytes=5.0 * images.numel(), items=b, unit="views")
    race(
        "photometric",
        {"B": b, "view": view, "size": size},
        candidates,
        truth=lambda: (reference.photometric(images, params, dtype=torch.float64),),
        agree=gray_levels,
        bound=1.0,
        work=amount,
    )
