"""Common corruptions of images, in five severities.

Source: Hendrycks & Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations" (2019),
whose parameters these are. All nineteen are here: the fifteen of ImageNet-C's mean and its four extra ones. One is ours
in part: ``frost`` blends a drawn picture, since the six published photographs are not ours to ship. Scores are
comparable among encoders here. A score on ImageNet-C needs its own files, which are JPEG, 224 pixels, and made once.

Traps, kept as published: glass blur copies pixels and swaps none, so colors are lost; the constants of the elastic
transform are for 244 pixels; the blurs of ImageMagick are one-sided and round to 8 bits.

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
    return _blurred(x, (1, 2, 3, 4, 6)[level])


def _blurred(x: Pixels, sigma: float) -> Pixels:
    return np.asarray(ndimage.gaussian_filter(x, sigma, mode="nearest", truncate=4, axes=(0, 1)))


def _glass_blur(x: Pixels, level: int, rng: np.random.Generator) -> Pixels:
    """From the lower right on, each pixel takes the color of one near it, between two blurs."""
    sigma, reach, rounds = ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2))[level]
    colors = np.floor(_blurred(x, sigma) * 255).reshape(-1, 3)
    height, width = x.shape[:2]
    place = np.arange(height * width).reshape(height, width)
    inner = place[reach + 1 : height - reach + 1, reach + 1 : width - reach + 1]
    for _ in range(rounds):
        down, right = rng.integers(-reach, reach, (2, *inner.shape))
        taken = place.ravel().copy()
        taken[inner] += down * width + right
        # A pixel taken from further on has itself changed before: follow such links, in jumps, to their ends.
        moves = np.isin(place, inner).ravel()
        link = np.where(moves[taken] & (taken > place.ravel()), taken, place.ravel())
        while not np.array_equal(link, link[link]):
            link = link[link]
        colors = colors[taken[link]]
    return _blurred(colors.reshape(x.shape) / 255, sigma)


def _motion_blur(x: Pixels, level: int, rng: np.random.Generator) -> Pixels:
    radius, sigma = ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))[level]
    return _moved(x, radius, sigma, rng.uniform(-45, 45))


def _moved(x: Pixels, radius: int, sigma: float, angle: float) -> Pixels:
    """ImageMagick's motion blur: half a Gaussian along ``angle`` in degrees, in whole pixels, to 8 bits."""
    steps = np.arange(2 * radius + 1)
    weights = np.exp(-(steps**2) / (2 * sigma**2))
    angle = np.deg2rad(angle)
    down, right = (np.ceil(steps * part - 0.5).astype(int) for part in (np.sin(angle), np.cos(angle)))
    rows, columns = (np.arange(side) for side in x.shape[:2])
    total = np.zeros_like(x)
    for weight, dy, dx in zip(weights / weights.sum(), down, right, strict=True):
        shifted = x[(rows + dy).clip(0, len(rows) - 1)][:, (columns + dx).clip(0, len(columns) - 1)]
        total += weight * shifted
    return np.rint(total * 255) / 255


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


def _snow(x: Pixels, level: int, rng: np.random.Generator) -> Pixels:
    """Blurred flakes, once and turned by half a circle, over a picture that is bleached."""
    mean, zoom, least, radius, sigma, kept = (
        (0.1, 3, 0.5, 10, 4, 0.8),
        (0.2, 2, 0.5, 12, 4, 0.7),
        (0.55, 4, 0.9, 12, 8, 0.7),
        (0.55, 4.5, 0.85, 12, 8, 0.65),
        (0.55, 2.5, 0.85, 12, 12, 0.55),
    )[level]
    flakes = _enlarged(rng.normal(mean, 0.3, (*x.shape[:2], 1)), zoom)
    flakes = np.floor(np.where(flakes < least, 0, flakes).clip(0, 1) * 255) / 255
    flakes = _moved(flakes, radius, sigma, rng.uniform(-135, -45))
    gray = x @ np.array([0.299, 0.587, 0.114])
    bleached = kept * x + (1 - kept) * np.maximum(x, gray[..., None] * 1.5 + 0.5)
    return bleached + flakes + np.rot90(flakes, 2)


def _frost(x: Pixels, level: int, rng: np.random.Generator) -> Pixels:
    kept, added = ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75))[level]
    return kept * x + added * _drawn_frost(x.shape[0], x.shape[1], rng)


def _drawn_frost(height: int, width: int, rng: np.random.Generator) -> Pixels:
    """Patches and needles of ice, in the mean colors and contrasts of the published photographs."""
    tone = rng.uniform()
    color = (1 - tone) * np.array([90, 140, 155]) + tone * np.array([200, 205, 214])
    ice = _plasma(max(height, width), 1.6, rng)[:height, :width, None] - 0.5
    needles = [_moved(rng.uniform(size=ice.shape), 8, 4, rng.uniform(-180, 180)) - 0.5 for _ in range(3)]
    texture = 0.6 * ice + np.max(needles, 0)
    return np.asarray((color + 27 * (texture - texture.mean()) / (texture.std() + 1e-9)).clip(0, 255) / 255)


def _fog(x: Pixels, level: int, rng: np.random.Generator) -> Pixels:
    amount, decay = ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4))[level]
    fog = _plasma(max(x.shape[:2]), decay, rng)[: x.shape[0], : x.shape[1], None]
    return (x + amount * fog) * x.max() / (x.max() + amount)


def _plasma(side: int, decay: float, rng: np.random.Generator) -> Pixels:
    """Diamond-square heights in [0, 1] on a torus, at least ``side`` wide: a power of two. Midpoints are means of four
    neighbors and noise, whose amplitude falls by the square of ``decay`` with each halving."""
    step = max(2, 1 << (side - 1).bit_length())
    heights, wobble = np.zeros((step, step)), 100.0

    def middle(total: Pixels) -> Pixels:
        return total / 4 + wobble * rng.uniform(-wobble, wobble, total.shape)

    while step > 1:
        half = step // 2
        corners = heights[::step, ::step]
        pairs = corners + np.roll(corners, -1, 0)
        centers = middle(pairs + np.roll(pairs, -1, 1))
        heights[half::step, half::step] = centers
        heights[::step, half::step] = middle(corners + np.roll(corners, -1, 1) + centers + np.roll(centers, 1, 0))
        heights[half::step, ::step] = middle(corners + np.roll(corners, -1, 0) + centers + np.roll(centers, 1, 1))
        step, wobble = half, wobble / decay
    heights -= heights.min()
    return heights / heights.max()


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


def _spatter(x: Pixels, level: int, rng: np.random.Generator) -> Pixels:
    """Drops of water that shine at their edges, or blots of mud."""
    mean, deviation, sigma, least, strength = (
        (0.65, 0.3, 4, 0.69, 0.6),
        (0.65, 0.3, 3, 0.68, 0.6),
        (0.65, 0.3, 2, 0.68, 0.5),
        (0.65, 0.3, 1, 0.65, 1.5),
        (0.67, 0.4, 1, 0.65, 1.5),
    )[level]
    liquid = _blurred(rng.normal(mean, deviation, x.shape[:2]), sigma)
    if level >= 3:
        mud = _blurred((liquid > least).astype(np.float64), strength)[..., None]
        mud = np.where(mud < 0.8, 0, mud)
        return x * (1 - mud) + mud * np.array([63, 42, 20]) / 255
    liquid = np.where(liquid < least, 0, np.floor(liquid * 255))
    water = liquid * _relief(liquid)
    water *= strength / max(water.max(), 1e-9)
    return x + water[..., None] * np.array([175, 238, 238]) / 255


def _relief(liquid: Pixels) -> Pixels:
    """The distance to the drops' edges, up to 20 pixels, equalized and lit from the upper left; in 0 to 255."""
    edges = _edges(liquid, 50, 150)
    distance = ndimage.distance_transform_edt(~edges) if edges.any() else np.full(liquid.shape, 20.0)
    distance = ndimage.uniform_filter(np.minimum(distance, 20), 3, mode="mirror").astype(np.uint8)
    counts = np.bincount(distance.ravel(), minlength=256)
    counts[distance.min()] = 0
    equalized = np.rint(np.cumsum(counts) * 255 / max(counts.sum(), 1))[distance]
    light = np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]])
    lit = ndimage.correlate(equalized, light, mode="mirror").clip(0, 255)
    return np.asarray(np.rint(ndimage.uniform_filter(lit, 3, mode="mirror")))


def _edges(gray: Pixels, low: float, high: float) -> NDArray[np.bool_]:
    """Canny's edges by the L1 norm of Sobel's gradient: ridges above ``low`` that touch one above ``high``."""
    dy, dx = (ndimage.sobel(gray, axis, mode="nearest") for axis in (0, 1))
    size = np.abs(dx) + np.abs(dy)
    padded = np.pad(size, 1)

    def at(down: int, right: int) -> Pixels:
        return padded[1 + down : 1 + down + size.shape[0], 1 + right : 1 + right + size.shape[1]]

    flat, steep = np.abs(dy) < np.tan(np.pi / 8) * np.abs(dx), np.abs(dy) > np.tan(3 * np.pi / 8) * np.abs(dx)
    falling = (size > at(-1, -1)) & (size > at(1, 1))
    rising = (size > at(-1, 1)) & (size > at(1, -1))
    across = [(size > at(0, -1)) & (size >= at(0, 1)), (size > at(-1, 0)) & (size >= at(1, 0))]
    ridge = np.select([flat, steep, dx * dy >= 0], [*across, falling], rising) & (size > low)
    pieces, _ = ndimage.label(ridge, np.ones((3, 3)))
    return np.isin(pieces, np.unique(pieces[ridge & (size > high)]))


def _elastic_transform(x: Pixels, level: int, rng: np.random.Generator) -> Pixels:
    """A random affine map, then smooth random displacements."""
    alpha, sigma, shift = 244 * np.array(
        ((2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02))[level]
    )
    height, width = x.shape[:2]
    third = max(1, min(height, width) // 3)
    corners = np.array([height // 2, width // 2]) + third * np.array([[1, 1], [1, -1], [-1, -1]])
    moved = corners + rng.uniform(-shift, shift, (3, 2))
    back = np.linalg.solve(np.column_stack([moved, np.ones(3)]), corners)
    rows, columns = np.mgrid[:height, :width].astype(np.float64)
    from_x, from_y = np.moveaxis(np.stack([columns, rows, np.ones_like(rows)], 2) @ back, 2, 0)
    right, down = (
        alpha * ndimage.gaussian_filter(rng.uniform(-1, 1, (height, width)), sigma, mode="reflect", truncate=3)
        for _ in range(2)
    )
    return _sampled(_sampled(x, from_y, from_x, "mirror"), rows + down, columns + right, "reflect")


def _sampled(x: Pixels, rows: Pixels, columns: Pixels, mode: str) -> Pixels:
    return np.stack([ndimage.map_coordinates(x[..., c], (rows, columns), order=1, mode=mode) for c in range(3)], 2)


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
    "defocus_blur": _defocus_blur,
    "glass_blur": _glass_blur,
    "motion_blur": _motion_blur,
    "zoom_blur": _zoom_blur,
    "snow": _snow,
    "frost": _frost,
    "fog": _fog,
    "brightness": _brightness,
    "contrast": _contrast,
    "elastic_transform": _elastic_transform,
    "pixelate": _pixelate,
    "jpeg_compression": _jpeg_compression,
    "speckle_noise": _speckle_noise,
    "gaussian_blur": _gaussian_blur,
    "spatter": _spatter,
    "saturate": _saturate,
}
"""The fifteen of ImageNet-C's mean in its order, then the four extra ones."""
