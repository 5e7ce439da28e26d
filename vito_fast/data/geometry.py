"""The geometry of a view in plain numpy, in float64: the specification that the DALI pipeline is tested against.

crop -> bicubic resize -> round and clip to a byte -> flip. The resize is the ancestors' (BYOL, DetCon: TensorFlow's
``resize(method="bicubic")``): Keys' cubic with a = -1/2, pixel centres at half integers, no antialiasing filter. Beyond the crop's
border its outermost pixels are repeated.
"""

import numpy as np


def cubic_weights(source: int, target: int) -> np.ndarray:
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


def _keys(distance: np.ndarray, a: float = -0.5) -> np.ndarray:
    x = distance
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def view(picture: np.ndarray, crop: tuple[int, int, int, int], flip: bool, size: int) -> np.ndarray:
    """(H, W, 3) uint8 and a window y, x, h, w inside it -> (size, size, 3) uint8. Deterministic."""
    y, x, h, w = crop
    if not (0 <= y <= y + h <= picture.shape[0] and 0 <= x <= x + w <= picture.shape[1] and h > 0 and w > 0):
        raise ValueError(f"crop {crop} is not inside a picture of {picture.shape[0]} x {picture.shape[1]}")
    window = picture[y : y + h, x : x + w].astype(np.float64)
    square = np.einsum("ih,hwc,jw->ijc", cubic_weights(h, size), window, cubic_weights(w, size), optimize=True)
    result = np.clip(np.rint(square), 0, 255).astype(np.uint8)
    return result[:, ::-1] if flip else result
