"""A small numpy renderer: rigid objects that turn under a moving light while the scene behind them passes by.

An object is a compound of superquadrics with colors and patterns of its own, sampled as points with normals. A clip is
an orbit shot: the camera circles the object, so its side, the light on it and the background all change, and nothing
but the object stays. The background is a strip of photographs, recolored and blended into each other, that the window
of the camera crosses. Everything follows from a seed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

Floats = npt.NDArray[np.float32]
Pixels = npt.NDArray[np.uint8]

POINTS = 14_000
"""Samples of an object's surface; half of them face the camera."""
EXPONENTS = (0.25, 0.5, 1.0, 1.6)
"""Shapes of a superquadric: a box, a rounded box, an ellipsoid, nearly an octahedron."""
CAMERA = 3.5
"""Distance of the camera from the object's center, in radii of the object."""
SEAM = 24
"""Columns over which two photographs of a background blend."""


@dataclass(frozen=True)
class Object:
    """Points of a surface within the unit ball, (N, 3) each."""

    points: Floats
    normals: Floats
    albedo: Floats
    """Color in [0, 1]."""


@dataclass(frozen=True)
class Shot:
    """What a clip varies, and how far."""

    side: int = 96
    """Height and width of a frame in pixels."""
    frames: int = 12
    pan: tuple[float, float] = (70, 110)
    """Pixels that the background moves from frame to frame."""
    turn: tuple[float, float] = (2.5, 5.0)
    """Radians that the object turns in a clip."""
    size: tuple[float, float] = (0.6, 0.85)
    """Diameter of the object's ball as a share of the frame."""
    wander: float = 0.2
    """Largest distance of the object from the middle of the frame, as a share of the frame."""
    light: tuple[float, float] = (0.7, 1.2)
    """Gain of the light in each color channel."""


def make_object(seed: int) -> Object:
    """Three to five superquadrics, each attached to one before it, in one or two colors."""
    rng = np.random.default_rng([1, seed])
    radii = [rng.uniform(0.15, 0.6, 3) for _ in range(rng.integers(3, 6))]
    radii[0] = rng.uniform(0.35, 0.8, 3)
    areas = np.array([a * b + b * c + a * c for a, b, c in radii])
    counts = np.maximum(300, POINTS * areas / areas.sum()).astype(int)
    palette = rng.uniform(0.05, 1, (3, 3))
    points: list[npt.NDArray[Any]] = []
    normals, albedo = [], []
    for size, count in zip(radii, counts, strict=True):
        vertical, horizontal = rng.choice(EXPONENTS, 2)
        local, normal = superquadric(size, vertical, horizontal, int(count))
        turned = rotation(rng)
        host = points[rng.integers(len(points))] if points else np.zeros((1, 3))
        points.append(local @ turned.T + host[rng.integers(len(host))])
        normals.append(normal @ turned.T)
        albedo.append(pattern(rng, local, palette))
    whole = np.concatenate(points)
    whole -= (whole.max(0) + whole.min(0)) / 2
    whole /= np.linalg.norm(whole, axis=1).max()
    return Object(*(part.astype(np.float32) for part in (whole, np.concatenate(normals), np.concatenate(albedo))))


def superquadric(
    radii: npt.NDArray[Any], vertical: float, horizontal: float, count: int
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """``count`` points of a superquadric and their outward unit normals, (count, 3) float64 each.

    The surface is F(x) = 1 with F = ((x/a)^(2/h) + (y/b)^(2/h))^(h/v) + (z/c)^(2/v) (Barr, "Superquadrics and
    angle-preserving transformations", 1981). A direction d of a Fibonacci sphere meets it at d F(d)^(-v/2).
    """
    steps = np.arange(count) + 0.5
    z = 1 - 2 * steps / count
    angle = steps * math.pi * (3 - math.sqrt(5))
    directions = np.stack([np.sqrt(1 - z * z) * np.cos(angle), np.sqrt(1 - z * z) * np.sin(angle), z], 1)

    def terms(at: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        ratio = np.abs(at / radii) + 1e-6
        return ratio, ratio[:, 0] ** (2 / horizontal) + ratio[:, 1] ** (2 / horizontal)

    ratio, flat = terms(directions)
    level = flat ** (horizontal / vertical) + ratio[:, 2] ** (2 / vertical)
    points = directions * (level ** (-vertical / 2))[:, None]
    ratio, flat = terms(points)
    slope = flat ** (horizontal / vertical - 1)
    gradient = np.stack(
        [
            slope * ratio[:, 0] ** (2 / horizontal - 1),
            slope * ratio[:, 1] ** (2 / horizontal - 1),
            ratio[:, 2] ** (2 / vertical - 1),
        ],
        1,
    )
    gradient *= np.sign(points) / radii
    return points, gradient / (np.linalg.norm(gradient, axis=1, keepdims=True) + 1e-9)


def rotation(rng: np.random.Generator) -> npt.NDArray[Any]:
    """A rotation matrix, uniform over all of them: QR of a Gaussian matrix with the signs fixed."""
    q, r = np.linalg.qr(rng.normal(size=(3, 3)))
    q *= np.sign(np.diag(r))
    q[:, 0] *= np.linalg.det(q)
    return np.asarray(q)


def pattern(rng: np.random.Generator, local: npt.NDArray[Any], palette: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Plain, striped or checked in colors of the palette: (N, 3) for the points ``local`` (N, 3) of one part."""
    colors = palette[rng.permutation(len(palette))[:2]]
    frequency, axis, kind = rng.uniform(5, 14), rng.normal(size=3), rng.random()
    if kind < 0.3:
        second = np.sin(frequency * local @ (axis / np.linalg.norm(axis))) > 0
    elif kind < 0.6:
        second = (np.sin(frequency * local) > 0).sum(1) % 2 == 0
    else:
        second = np.zeros(len(local), bool)
    return np.where(second[:, None], colors[1], colors[0])


def smooth(rng: np.random.Generator, low: float, high: float, time: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A curve over ``time`` in [0, 1] from one value in [low, high] to another, with a slow swing on the way."""
    first, last = rng.uniform(low, high, 2)
    swing, turns, offset = rng.uniform(-0.15, 0.15), rng.uniform(0.5, 1.5), rng.random()
    ease = time * time * (3 - 2 * time)
    wave = np.sin(2 * math.pi * (turns * time + offset))
    return np.asarray(first + ease * (last - first) + swing * (high - low) * wave)


def render(
    thing: Object, photographs: Sequence[Pixels], seed: int, shot: Shot | None = None
) -> tuple[Pixels, npt.NDArray[np.bool_]]:
    """One clip of ``thing`` before ``photographs``: frames (T, S, S, 3) uint8 and the object's masks (T, S, S)."""
    shot = shot or Shot()
    rng = np.random.default_rng([2, seed])
    time = np.linspace(0, 1, shot.frames)
    frames = background(rng, photographs, time, shot)
    turns = orientations(rng, time, shot)
    points, normals = (array @ turns.transpose(0, 2, 1) for array in (thing.points, thing.normals))  # (T, N, 3)
    side = shot.side
    zoom = (smooth(rng, *shot.size, time)[:, None] * side / 2) * CAMERA / (CAMERA - points[..., 2])
    center = [(0.5 + smooth(rng, -shot.wander, shot.wander, time)[:, None]) * side for _ in range(2)]
    x, y = ((center[axis] + points[..., axis] * zoom - 1).astype(np.int32) for axis in range(2))
    facing = CAMERA * normals[..., 2] > (normals * points).sum(2)
    frame, point = np.nonzero(facing & (x >= 0) & (y >= 0) & (x < side - 2) & (y < side - 2))
    far_first = np.argsort(4 * frame + points[frame, point, 2], kind="stable")
    frame, point = frame[far_first], point[far_first]
    # A splat of 3 x 3 pixels leaves no holes. The last write wins: the nearest point.
    corner = (frame * side + y[frame, point]) * side + x[frame, point]
    splat = (np.arange(3)[:, None] * side + np.arange(3)).ravel()
    nearest = np.full(shot.frames * side * side, -1, np.int32)
    nearest[(corner[:, None] + splat).ravel()] = np.repeat(np.arange(len(corner), dtype=np.int32), len(splat))
    mask = nearest >= 0
    seen = np.unique(nearest[mask])  # only these are shaded
    color = np.zeros((len(corner), 3), np.float32)
    color[seen] = shade(rng, time, shot, normals[frame[seen], point[seen]], thing.albedo[point[seen]], frame[seen])
    frames.reshape(-1, 3)[mask] = color[nearest[mask]]
    return (frames.clip(0, 1) * 255 + 0.5).astype(np.uint8), mask.reshape(frames.shape[:3])


def orientations(rng: np.random.Generator, time: npt.NDArray[Any], shot: Shot) -> Floats:
    """(T, 3, 3): the camera goes round the object, a little up and down, and rolls a little."""
    turn = rng.uniform(0, 2 * math.pi) + time * rng.uniform(*shot.turn) * rng.choice([-1, 1])
    result = np.eye(3)
    for axis, angle in ((1, turn), (0, smooth(rng, -0.3, 0.8, time)), (2, smooth(rng, -0.3, 0.3, time))):
        i, j = (axis + 1) % 3, (axis + 2) % 3
        step = np.zeros((len(time), 3, 3))
        step[:, axis, axis] = 1
        step[:, i, i] = step[:, j, j] = np.cos(angle)
        step[:, i, j], step[:, j, i] = -np.sin(angle), np.sin(angle)
        result = step @ result
    return result.astype(np.float32)


def shade(
    rng: np.random.Generator,
    time: npt.NDArray[Any],
    shot: Shot,
    normals: Floats,
    albedo: Floats,
    frame: npt.NDArray[Any],
) -> Floats:
    """Colors (M, 3) of points under a colored light that moves: ambient, Lambert's and Blinn's terms."""
    around = rng.uniform(0, 2 * math.pi) + time * rng.uniform(-2.5, 2.5)
    above = smooth(rng, 0.1, 1.2, time)
    light = np.stack([np.cos(around), -np.tan(above), np.abs(np.sin(around)) + 0.2], 1)
    light /= np.linalg.norm(light, axis=1, keepdims=True)
    half = light + np.array([0, 0, 1])
    half /= np.linalg.norm(half, axis=1, keepdims=True)
    phase = rng.uniform(1, 2, 3) * time[:, None] + rng.random(3)
    low, high = shot.light
    tint = low + (high - low) * (0.5 + 0.5 * np.sin(2 * math.pi * phase))
    ambient = rng.uniform(0.25, 0.5)
    lambert = np.maximum((normals * light[frame]).sum(1, keepdims=True), 0)
    gloss = np.maximum((normals * half[frame]).sum(1, keepdims=True), 0) ** 24
    return (albedo * (ambient + (1.15 - ambient) * lambert) * tint[frame] + 0.35 * gloss).astype(np.float32)


def background(rng: np.random.Generator, photographs: Sequence[Pixels], time: npt.NDArray[Any], shot: Shot) -> Floats:
    """(T, S, S, 3) in [0, 1]: a window that crosses a strip of photographs, one way or the other."""
    side, slack = shot.side, shot.side // 6
    pan = rng.uniform(*shot.pan)
    strip = panorama(rng, photographs, side + slack, math.ceil(pan * (len(time) - 1)) + side + 1)
    left = (pan * np.arange(len(time))).astype(int)
    top = smooth(rng, 0, slack, time).clip(0, slack).astype(int)
    if rng.random() < 0.5:
        left = left[::-1]
    return np.stack([strip[y : y + side, x : x + side] for x, y in zip(left, top, strict=True)])


def panorama(rng: np.random.Generator, photographs: Sequence[Pixels], height: int, length: int) -> Floats:
    """(height, length, 3): pieces of photographs side by side, blended over ``SEAM`` columns."""
    strip = np.zeros((height, length + SEAM, 3), np.float32)
    start = 0
    while start < length:
        width = int(rng.uniform(0.75, 1.5) * height)
        photograph = photographs[int(rng.integers(len(photographs)))]
        piece = recolor(rng, crop(rng, photograph, height, width + SEAM))[:, : strip.shape[1] - start]
        weight = np.clip((np.arange(piece.shape[1]) + 0.5) / SEAM, float(start == 0), 1)[:, None]
        covered = strip[:, start : start + piece.shape[1]]
        covered += weight.astype(np.float32) * (piece - covered)
        start += width
    return strip[:, :length]


def crop(rng: np.random.Generator, photograph: Pixels, height: int, width: int) -> Pixels:
    """A random part of a photograph, resized by a factor between 1/4 and 1.6, and mirrored half of the time."""
    largest = min(photograph.shape[0] / height, photograph.shape[1] / width)
    scale = rng.uniform(min(0.6, largest), min(4.0, largest))
    size = int(width * scale), int(height * scale)
    x, y = (int(rng.integers(whole - part + 1)) for whole, part in zip(photograph.shape[1::-1], size, strict=True))
    part = Image.fromarray(photograph[y : y + size[1], x : x + size[0]])
    resized = np.asarray(part.resize((width, height), Image.Resampling.BOX if scale > 1 else Image.Resampling.BILINEAR))
    return resized[:, ::-1] if rng.random() < 0.5 else resized


def recolor(rng: np.random.Generator, picture: Pixels) -> Floats:
    """Two mixtures of the channels between random colors: backgrounds are as colorful as objects."""
    values = picture.astype(np.float32) / 255 @ rng.dirichlet(np.ones(3), 2).T.astype(np.float32)
    dark, light, third = rng.uniform(0, 1, (3, 3)).astype(np.float32)
    result = dark + values[..., :1] * (light - dark) + (values[..., 1:] - 0.5) * (third - 0.5)
    return np.asarray(result.clip(0, 1))
