"""The geometry of a view in plain numpy, in float64: the specification that the DALI pipeline is tested against.

crop -> bicubic resize -> round and clip to a byte -> turn upright -> flip. The resize is the ancestors' (BYOL, DetCon:
TensorFlow's ``resize(method="bicubic")``): Keys' cubic with a = -1/2, pixel centres at half integers, no antialiasing
filter. Beyond the crop's border its outermost pixels are repeated. DALI's result differs by at most one grey level,
where rounding falls the other way.
"""

from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

Square = TypeVar("Square", npt.NDArray[np.uint8], torch.Tensor)


def cubic_weights(source: int, target: int) -> npt.NDArray[np.float64]:
    """(target, source) float64: row i weighs the source pixels that make target pixel i.

    Keys (1981), "Cubic convolution interpolation for digital image processing", with a = -1/2 (Catmull-Rom).
    """
    centre = (np.arange(target) + 0.5) * source / target - 0.5
    first = np.floor(centre).astype(int) - 1
    weights = np.zeros((target, source))
    for tap in range(4):
        place = first + tap
        np.add.at(weights, (np.arange(target), np.clip(place, 0, source - 1)), _keys(np.abs(centre - place)))
    return weights


def _keys(x: npt.NDArray[np.float64], a: float = -0.5) -> npt.NDArray[np.float64]:
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def view(
    picture: npt.NDArray[np.uint8], crop: tuple[int, int, int, int], flip: bool, size: int, rotation: int = 0
) -> npt.NDArray[np.uint8]:
    """(H, W, 3) uint8 as decoded and a window y, x, h, w inside it -> (size, size, 3) uint8, upright. Deterministic.

    ``rotation`` is in degrees clockwise, ``flip`` mirrors the upright view. Raises ValueError for a window that is not
    inside the picture.
    """
    y, x, h, w = crop
    if not (0 <= y <= y + h <= picture.shape[0] and 0 <= x <= x + w <= picture.shape[1] and h > 0 and w > 0):
        raise ValueError(f"crop {crop} is not inside a picture of {picture.shape[0]} x {picture.shape[1]}")
    window = picture[y : y + h, x : x + w].astype(np.float64)
    square = np.einsum("ih,hwc,jw->ijc", cubic_weights(h, size), window, cubic_weights(w, size), optimize=True)
    upright = turn(np.clip(np.rint(square), 0, 255).astype(np.uint8), rotation)
    return upright[:, ::-1] if flip else upright


def turn(square: Square, rotation: int) -> Square:
    """(S, S, 3) turned clockwise by ``rotation`` degrees, a multiple of 90."""
    quarters = -rotation // 90
    return torch.rot90(square, quarters) if isinstance(square, torch.Tensor) else np.rot90(square, quarters)


def mirrors(flip: npt.NDArray[np.uint8], rotation: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """(N, V, 2) whether to mirror top to bottom, and left to right, *before* turning, so that the views of samples of
    ``rotation``, (N,) degrees, are flipped as ``flip``, (N, V), says: a quarter turn swaps the two."""
    sideways = (rotation % 180 != 0)[:, None]
    flipped = flip.astype(bool)
    return np.stack([flipped & sideways, flipped & ~sideways], -1)
