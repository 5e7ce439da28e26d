"""The specification of a view's geometry, in NumPy and float64. The DALI pipeline is tested against it.

Order: crop, bicubic resize, round and clip to a byte, rotate upright, flip. The resize is that of BYOL and DetCon
(TensorFlow's ``resize(method="bicubic")``): Keys' cubic with a = -1/2, pixel centers at half integers, no antialiasing
filter. Beyond the border of the crop its outermost pixels repeat. DALI differs by at most one gray level, by rounding.
"""

import numpy as np
import numpy.typing as npt


def cubic_weights(source: int, target: int) -> npt.NDArray[np.float64]:
    """Weights of bicubic interpolation from ``source`` to ``target`` pixels.

    Keys (1981), "Cubic convolution interpolation for digital image processing", with a = -1/2 (Catmull-Rom).

    Returns:
        (target, source) float64. Row i weights the source pixels of target pixel i.
    """
    center = (np.arange(target) + 0.5) * source / target - 0.5
    first = np.floor(center).astype(int) - 1
    weights = np.zeros((target, source))
    for tap in range(4):
        place = first + tap
        np.add.at(weights, (np.arange(target), np.clip(place, 0, source - 1)), _keys(np.abs(center - place)))
    return weights


def _keys(x: npt.NDArray[np.float64], a: float = -0.5) -> npt.NDArray[np.float64]:
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def view(
    picture: npt.NDArray[np.uint8],
    crop: tuple[int, int, int, int],
    flip: bool,
    size: int,
    rotation: int = 0,
    mirror: bool = False,
) -> npt.NDArray[np.uint8]:
    """Make one view. Deterministic.

    Args:
        picture: (H, W, 3) uint8 RGB, as decoded.
        crop: y, x, height, width of the window in pixels.
        flip: Whether to mirror the upright view horizontally.
        size: Side of the view in pixels.
        rotation: Degrees clockwise from the decoded to the upright frame.
        mirror: Whether the decoded frame is mirrored left to right before that.

    Returns:
        (size, size, 3) uint8, upright.

    Raises:
        ValueError: The window is not inside the picture.
    """
    y, x, h, w = crop
    if not (0 <= y <= y + h <= picture.shape[0] and 0 <= x <= x + w <= picture.shape[1] and h > 0 and w > 0):
        raise ValueError(f"crop {crop} is not inside a picture of {picture.shape[0]} x {picture.shape[1]}")
    window = picture[y : y + h, x : x + w].astype(np.float64)
    square = np.einsum("ih,hwc,jw->ijc", cubic_weights(h, size), window, cubic_weights(w, size), optimize=True)
    pixels = np.clip(np.rint(square), 0, 255).astype(np.uint8)
    upright = np.rot90(pixels[:, ::-1] if mirror else pixels, -rotation // 90)
    return upright[:, ::-1] if flip else upright
