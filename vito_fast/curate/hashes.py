"""A 256-bit perceptual hash of a frame, and its variants by which mirrored, cropped and framed copies are found.

The hash is the sign of the low-frequency cosine transform of the frame's luma, relative to its median (Zauner 2010,
"Implementation and benchmarking of perceptual image hash functions", at 16 x 16 in place of 8 x 8). Crop, resampling
and transform are one matrix for each axis, so a variant costs two small matrix products.
"""

import functools

import numpy as np
import numpy.typing as npt

Gray = npt.NDArray[np.uint8]
Box = tuple[int, int, int, int]
"""Top, bottom, left, right, in pixels; bottom and right are exclusive."""

SIDE = 16
"""Frequencies for each axis; SIDE * SIDE bits."""
BYTES = SIDE * SIDE // 8
SAMPLES = 64
"""Points for each axis at which the transform samples a frame."""

INSETS = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)
"""Shares of height and width kept by the inset variants, by which symmetric crops are found."""
VARIANTS = ("plain", "whole", "caption", "mirror", *(f"inset {round(100 * (1 - keep))} %" for keep in INSETS))
"""Names of the variants, by number: without bars; with them; without captions on bars; mirrored; cropped."""
SEARCHED = 3
"""The first of ``VARIANTS`` are what is searched; all are searched for."""
SEARCHED_EVERY = 3
"""Of the hashed frames, one of so many is searched."""

BARS = (6, 0.995)
"""Levels by which a bar's pixels may differ from its color, and the least share of a line's pixels that do not."""
CAPTION = (14, 0.4)
"""The same for bars with captions on them."""
LEAST = 0.3
"""Least share of a side that is left within bars."""


def strip_bars(gray: Gray, rule: tuple[int, float] = BARS) -> Box:
    """The frame without letterbox and pillarbox, of any one level.

    A box below 30 % of a side, or without contrast, is the whole frame.
    """
    height, width = gray.shape
    top, bottom = _run(gray, rule), _run(gray[::-1], rule)
    if top + bottom >= height:
        return 0, height, 0, width
    lines = gray[top : height - bottom].T
    left, right = _run(lines, BARS), _run(lines[::-1], BARS)
    box = top, height - bottom, left, width - right
    inside = gray[box[0] : box[1], box[2] : box[3]]
    large = inside.shape[0] >= LEAST * height and inside.shape[1] >= LEAST * width
    return box if large and inside.std() > 4 else (0, height, 0, width)


def _run(lines: Gray, rule: tuple[int, float]) -> int:
    """Lines of a bar at the beginning. The first is flat, so that a smooth sky is none."""
    tolerance, share = rule
    level = int(np.median(lines[0]))
    low, high = max(0, level - tolerance), min(255, level + tolerance)
    for number, line in enumerate(lines):
        if np.count_nonzero((line >= low) & (line <= high)) < (share if number else BARS[1]) * len(line):
            return number
    return len(lines)


@functools.lru_cache(maxsize=512)
def _basis(size: int, start: float, stop: float) -> npt.NDArray[np.float32]:
    """(SIDE, size): area sampling of [start, stop) at SAMPLES points, then the first cosines without the constant."""
    edges = np.linspace(start, stop, SAMPLES + 1)
    cells = np.arange(size)
    overlap = np.minimum(edges[1:, None], cells + 1) - np.maximum(edges[:-1, None], cells)
    sampling = np.clip(overlap, 0, None) * SAMPLES / (stop - start)
    points = (np.arange(SAMPLES) + 0.5) * np.pi / SAMPLES
    cosines = np.cos(np.arange(SIDE)[:, None] * points)
    return (cosines @ sampling / SAMPLES).astype(np.float32)


_ODD = np.where(np.arange(SIDE) % 2, -1, 1).astype(np.float32)


def frame_hashes(gray: Gray) -> tuple[npt.NDArray[np.uint8], float]:
    """All variants of one frame.

    Args:
        gray: (H, W) uint8 luma; a short side of 64 to 160 pixels is enough.

    Returns:
        (len(VARIANTS), BYTES) uint8, packed bits; and the contrast, the standard deviation of the luma inside the
        bars in levels. Deterministic on one machine's BLAS; coefficients near the median may differ on another's.
    """
    whole = (0, gray.shape[0], 0, gray.shape[1])
    box, caption = strip_bars(gray), strip_bars(gray, CAPTION)
    luma = gray.astype(np.float32)
    contrast = float(luma[box[0] : box[1], box[2] : box[3]].std())
    plain = _transform(luma, box, 1.0)
    stack = [plain, *(plain if other == box else _transform(luma, other, 1.0) for other in (whole, caption))]
    stack += [plain * _ODD, *(_transform(luma, box, keep) for keep in INSETS)]
    flat = np.stack(stack).reshape(len(stack), -1)
    flat[:, 0] = 0  # the mean level; its bit says nothing
    return np.packbits(flat > np.median(flat[:, 1:], axis=1, keepdims=True), axis=1), contrast


def _transform(luma: npt.NDArray[np.float32], box: Box, keep: float) -> npt.NDArray[np.float32]:
    top, bottom, left, right = box
    dy, dx = (bottom - top) * (1 - keep) / 2, (right - left) * (1 - keep) / 2
    rows, columns = _basis(luma.shape[0], top + dy, bottom - dy), _basis(luma.shape[1], left + dx, right - dx)
    return np.asarray(rows @ luma @ columns.T)
