"""Synthetic videos of known shots: hard cuts, dissolves and fades; flashes, flicker and fast motion are none."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

HEIGHT, WIDTH = 90, 160

Scene = Callable[[int], np.ndarray]
"""Frame number to float32 picture (HEIGHT, WIDTH, 3), 0 to 255."""


@dataclass(frozen=True)
class Transition:
    """``first`` is the first frame after the shot before, ``last`` the first frame of the new shot alone."""

    kind: str
    first: int
    last: int


def texture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A photograph's statistics (1/f spectrum) in a palette of its own, with hard-edged shapes."""
    fy, fx = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    amplitude = 1 / np.maximum(np.hypot(fy, fx), 1 / max(height, width)) ** rng.uniform(1.0, 1.5)
    layers = []
    for _ in range(3):
        phase = rng.uniform(0, 2 * np.pi, amplitude.shape)
        layer = np.fft.irfft2(amplitude * np.exp(1j * phase), (height, width))
        layers.append(layer / layer.std())
    mix = rng.normal(0, 0.35, (3, 3)) + np.full((3, 3), 1.0) * np.array([1.0, 0.2, 0.1])
    image = np.stack(layers, -1) @ mix * rng.uniform(20, 50) + rng.uniform(40, 200, 3)
    y, x = np.mgrid[:height, :width]
    for _ in range(rng.integers(0, 8)):
        cy, cx, ry, rx = rng.uniform(0, height), rng.uniform(0, width), rng.uniform(5, 40), rng.uniform(5, 40)
        inside = (np.abs((y - cy) / ry) ** 4 + np.abs((x - cx) / rx) ** 4) < 1
        image[inside] = image[inside] * 0.2 + rng.uniform(0, 255, 3) * 0.8
    return np.clip(image, 0, 255).astype(np.float32)


def make_scene(
    rng: np.random.Generator,
    image: np.ndarray | None = None,
    speed: float | None = None,
    size: tuple[int, int] = (HEIGHT, WIDTH),
    whip: bool = False,
) -> Scene:
    """A camera that pans, zooms and shakes over a still picture, and things that move before it.

    ``speed`` is the pan in 90ths of the height a frame; by default most scenes are slow and a few fast. ``whip`` turns
    the camera once by up to two widths within a few frames, which blurs them.
    """
    height, width = size
    unit = height / 90
    if image is None:
        image = texture(rng, height * 3, width * 3)
    speed = float(rng.choice([0, 0.3, 1, 2, 4], p=[0.2, 0.3, 0.25, 0.15, 0.1])) if speed is None else speed
    angle, zoom = rng.uniform(0, 2 * np.pi), 1 + rng.choice([0, 0, 0.002, -0.002, 0.006])
    shake, noise = rng.choice([0, 0, 0.5, 1.5]), rng.choice([0, 2, 5])
    start = rng.uniform([0, 0], [image.shape[0], image.shape[1]])
    things = [
        (rng.uniform(0, 1, 2), rng.normal(0, 0.012, 2), rng.uniform(0.05, 0.25, 2), rng.uniform(0, 255, 3))
        for _ in range(rng.integers(0, 4))
    ]
    seed = int(rng.integers(2**31))
    gain = rng.choice([1, 1, 1, 0.45])
    turn = (int(rng.integers(8, 30)), int(rng.integers(4, 11)), width * rng.uniform(0.5, 2)) if whip else (0, 1, 0.0)

    def turned(moment: float) -> float:
        return turn[2] * float(np.interp(moment, [turn[0], turn[0] + turn[1]], [0, 1]))

    def view(moment: float, shift: np.ndarray) -> np.ndarray:
        scale = zoom**moment
        cy = start[0] + unit * (speed * moment * np.sin(angle) + shift[0])
        cx = start[1] + unit * (speed * moment * np.cos(angle) + shift[1]) + turned(moment)
        rows = _mirror(cy + (np.arange(height) - height / 2) * scale, image.shape[0])
        columns = _mirror(cx + (np.arange(width) - width / 2) * scale, image.shape[1])
        return image[rows][:, columns].astype(np.float32)

    def frame(number: int) -> np.ndarray:
        local = np.random.default_rng([seed, number + 1000])
        shift = local.normal(0, 1, 2) * shake
        blurred = whip and turn[0] - 1 <= number < turn[0] + turn[1]
        views = [view(number + part / 6, shift) for part in (range(6) if blurred else (0,))]
        picture = np.mean(views, axis=0) if blurred else views[0]
        for place, velocity, extent, color in things:
            y, x = (place + velocity * number) % 1.4 - 0.2
            top, left = max(0, int((y - extent[0] / 2) * height)), max(0, int((x - extent[1] / 2) * width))
            bottom, right = max(0, int((y + extent[0] / 2) * height)), max(0, int((x + extent[1] / 2) * width))
            picture[top:bottom, left:right] = color
        if noise:
            picture += noise * local.standard_normal((*picture.shape[:2], 1), np.float32)
        return picture * gain

    return frame


def _mirror(places: np.ndarray, size: int) -> np.ndarray:
    """Integer indices that run back and forth over ``size`` pixels."""
    folded = np.abs((np.round(places).astype(np.int64) + size - 1) % (2 * size - 2) - (size - 1))
    return np.clip(folded, 0, size - 1)


def make_video(
    rng: np.random.Generator,
    kinds: tuple[str, ...],
    *,
    events: bool = True,
    scenes: Callable[[np.random.Generator], Scene] = make_scene,
) -> tuple[Iterator[np.ndarray], list[Transition]]:
    """Frames (uint8) of one shot more than ``kinds`` (``hard``, ``dissolve``, ``fade``), and the transitions.

    With ``events`` shots also hold flashes, flicker and whip pans, which are no transitions.
    """
    lengths = rng.integers(35, 90, len(kinds) + 1)
    shots = [scenes(rng) for _ in lengths]
    effects = [_effect(rng, int(length)) if events else None for length in lengths]
    truth: list[Transition] = []
    plan: list[Callable[[], np.ndarray]] = []
    for place, length in enumerate(lengths):
        plan += [_plain(shots[place], number, effects[place]) for number in range(int(length))]
        if place == len(kinds):
            break
        after, count, now = shots[place + 1], int(length), len(plan)
        if kinds[place] == "hard":
            truth.append(Transition("hard", now, now))
        elif kinds[place] == "dissolve":
            span = int(rng.integers(8, 41))
            plan += [_mix(shots[place], count + step, after, step - span, step / span) for step in range(1, span)]
            truth.append(Transition("dissolve", now, len(plan)))
        else:
            out, hold, back = int(rng.integers(5, 25)), int(rng.integers(0, 12)), int(rng.integers(5, 25))
            level = float(rng.choice([0, 0, 0, 255]))
            plan += [_fade(shots[place], count + step, 1 - step / out, level) for step in range(1, out + 1)]
            plan += [_fade(after, 0, 0.0, level)] * hold
            plan += [_fade(after, step - back, step / back, level) for step in range(1, back)]
            truth.append(Transition("fade", now, len(plan)))
    return (np.clip(render(), 0, 255).astype(np.uint8) for render in plan), truth


def _effect(rng: np.random.Generator, length: int) -> Callable[[int, np.ndarray], np.ndarray] | None:
    kind = rng.choice(["none", "flash", "flicker", "blackout", "strobe"], p=[0.4, 0.3, 0.1, 0.1, 0.1])
    start, span = int(rng.integers(8, length - 12)), int(rng.integers(1, 5))
    strength = rng.uniform(60, 255)

    def apply(number: int, picture: np.ndarray) -> np.ndarray:
        if kind == "flicker":
            return picture * (0.75 + 0.25 * np.cos(number * 2.1))
        if kind == "strobe" and start <= number < start + 12:
            return picture * 0.2 if number // span % 2 else picture + strength / 2
        if not start <= number < start + span:
            return picture
        decay = 1 - (number - start) / (span + 1)
        return picture + strength * decay if kind == "flash" else picture * (0.0 if kind == "blackout" else 1.0)

    return None if kind == "none" else apply


def _plain(scene: Scene, number: int, effect: Callable[[int, np.ndarray], np.ndarray] | None):
    return lambda: scene(number) if effect is None else effect(number, scene(number))


def _mix(before: Scene, i: int, after: Scene, j: int, weight: float):
    return lambda: before(i) * (1 - weight) + after(j) * weight


def _fade(scene: Scene, number: int, weight: float, level: float):
    return lambda: scene(number) * weight + level * (1 - weight)
