"""Videos for the decoding races: a photograph under a moving camera, coded with a chosen GOP, and stores packed from
them.

Everything is made once and kept under ``build/bench-data``; the same on every machine, but for the encoder's version.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np

FOLDER = Path(__file__).resolve().parent.parent / "build/bench-data/3"
FRAMES, RATE = 250, 25
SIZES = {256: (256, 456), 720: (720, 1280)}  # short side: height, width
PHOTOGRAPHS = ("astronaut", "coffee", "rocket", "chelsea")  # a video repeats one of them under another motion


@dataclass(frozen=True)
class Request:
    """One pair of frames of one file."""

    video: int
    frames: tuple[int, int]


def requests(videos: int, count: int, seed: int = 0) -> list[Request]:
    """Pairs within 64 frames of each other, placed uniformly, as training asks for them."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        start = rng.integers(0, FRAMES - 64)
        first, second = sorted(int(start + offset) for offset in rng.choice(64, 2, replace=False))
        found.append(Request(int(rng.integers(videos)), (first, second)))
    return found


def _scene(name: str, height: int, width: int) -> np.ndarray:
    """A picture larger than the frame for the camera to move over, with the grain that real sensors add."""
    from PIL import Image
    from skimage import data

    scale = 1.5
    picture = Image.fromarray(getattr(data, name)()).resize(
        (int(width * scale), int(height * scale)), Image.Resampling.BICUBIC
    )
    grain = np.random.default_rng(0).normal(0, 3, (picture.height, picture.width, 1))
    return (np.asarray(picture) + grain).clip(0, 255).astype(np.uint8)


def _write(path: Path, number: int, side: int, gop: int, frames: int) -> None:
    height, width = SIZES[side]
    scene = _scene(PHOTOGRAPHS[number % len(PHOTOGRAPHS)], height, width)
    down, right = scene.shape[0] - height, scene.shape[1] - width
    # Tagged, since readers disagree about the colors of 720 lines without a tag.
    options = {"preset": "veryfast", "crf": "21", "threads": "1"}
    options["x264-params"] = f"keyint={gop}:scenecut=0:colormatrix=smpte170m"
    temporary = path.with_suffix(".part.mp4")
    with av.open(str(temporary), "w") as out:
        stream = out.add_stream("libx264", rate=RATE, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for time in range(frames):
            turn = 2 * np.pi * time / FRAMES + number
            y, x = int(down * (0.5 + 0.5 * np.sin(turn))), int(right * (0.5 + 0.5 * np.cos(1.7 * turn)))
            frame = np.ascontiguousarray(scene[y : y + height, x : x + width])
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        out.mux(stream.encode(None))
    temporary.rename(path)


def originals(side: int, gop: int, count: int, frames: int = FRAMES) -> list[Path]:
    """``count`` H.264 files with B-frames, of ``frames`` frames at 25 a second."""
    folder = FOLDER / f"{side}p-gop{gop}-{count}x{frames}"
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number:02}.mp4" for number in range(count)]
    for number, path in enumerate(paths):
        if not path.exists():
            _write(path, number, side, gop, frames)
    return paths


def store(files: Sequence[Path], format: str) -> Path:
    """A store packed from exactly these files, one clip each."""
    from vito_fast.data.pack.pack import pack

    folder = files[0].parent
    if len(list(folder.glob("*.mp4"))) != len(files):
        raise ValueError(f"{folder} holds other files too")
    target = FOLDER / f"{folder.name}-{format}"
    if not (target / "index.bin").exists():
        pack(folder, target, format=format, clip_length=60, shot_cuts=False, progress=False)
    return target


def exported(store: Path) -> dict[str, Path]:
    """The clips of a store as files of their own, with the store's bytes, by the name of the original."""
    from vito_fast.data.pack.export import export

    target = store.with_name(f"{store.name}-exported")
    if not target.exists():
        export(store, target)
    with open(target / "clips.csv", newline="") as file:
        return {row["origin"]: target / row["path"] for row in csv.DictReader(file)}


def sequential(path: Path) -> np.ndarray:
    """All frames by plain decoding from the start, (n, H, W, 3) uint8. Every reader must deliver them."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
