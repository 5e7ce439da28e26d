"""``python -m vito_fast.evaluate.demo DEMO OUT``: the demo's held-out clips in the layouts that the tasks read.

``OUT/objects`` has ``train`` and ``val``: three shots each of every held-out object. ``OUT/masks`` has DAVIS's layout:
the first shot of each object with its masks. ``OUT/scenes`` has it too: two objects that turn and move slowly before a
background that moves, so that neither places nor colors alone tell them apart. ``OUT/stereo`` is scikit-image's real
stereo pair with true disparity.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vito_fast.data.demo import HELD_OUT_PHOTOGRAPHS, photograph, wheel_folder
from vito_fast.data.objects import Shot, make_object, render
from vito_fast.errors import UserError
from vito_fast.evaluate.data import read_labels
from vito_fast.evaluate.davis_task import save_masks
from vito_fast.evaluate.ucf101 import decode

SCENES = 12
SCENE = Shot(side=160, frames=12, pan=(3, 8), turn=(0.8, 2.0), size=(0.38, 0.5), wander=0.3)
"""Slower than the clips to train on: labels can only follow what is still there in the next frame."""
STEREO = ("motorcycle_left.png", "motorcycle_right.png", "motorcycle_disp.npz")


def prepare(demo: Path, out: Path) -> None:
    """Writes ``out/objects``, ``out/masks`` and ``out/stereo`` where they are missing.

    Raises:
        UserError: if the demo's held-out clips are not there.
    """
    annotations, clips = demo / "Annotations", demo / "heldout"
    if not annotations.is_dir() or not clips.is_dir():
        raise UserError(f"{demo} has no held-out clips: python -m vito_fast.data.demo {demo} (make pretrain does it)")
    for folder in sorted(p for p in clips.iterdir() if p.is_dir()):
        for number, clip in enumerate(sorted(folder.glob("*.mp4"))):
            place = out / "objects" / ("val" if number % 2 == 0 else "train") / folder.name / clip.name
            if not place.is_file():
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(clip, place)
    for source in sorted(p for p in annotations.iterdir() if p.is_dir()):
        if not (out / "masks" / "Annotations" / "480p" / source.name).is_dir():
            frames = decode(clips / source.name / "shot-0.mp4")[0].permute(0, 2, 3, 1).numpy()
            masks = [read_labels(path).numpy() for path in sorted(source.glob("*.png"))]
            write_sequence(out / "masks", source.name, frames, np.stack(masks))
    record = json.loads((demo / "demo.json").read_text(encoding="utf-8"))
    objects = sorted({clip["object"] for clip in record["clips"] if clip["held_out"]})
    for number, pair in enumerate(zip(objects[::2], objects[1::2], strict=False)):
        if number < SCENES and not (out / "scenes" / "Annotations" / "480p" / f"scene-{number:02d}").is_dir():
            write_sequence(out / "scenes", f"scene-{number:02d}", *scene(pair, number))
    pictures = wheel_folder("skimage", "data")
    (out / "stereo").mkdir(parents=True, exist_ok=True)
    for name in STEREO:
        if not (out / "stereo" / name).is_file():
            shutil.copyfile(pictures / name, out / "stereo" / name)


def scene(pair: tuple[int, int], seed: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Two objects, the second before the first: frames (T,S,S,3) and ids (T,S,S), 0 for the background."""
    photographs = [photograph(name) for name in HELD_OUT_PHOTOGRAPHS]
    (frames, behind), (front, before) = (
        render(make_object(thing), photographs, 2 * seed + at, SCENE) for at, thing in enumerate(pair)
    )
    frames = np.where(before[..., None], front, frames)
    return frames, np.where(before, 2, behind).astype(np.uint8)


def write_sequence(root: Path, name: str, frames: NDArray[np.uint8], masks: NDArray[np.uint8]) -> None:
    """Writes frames (T,H,W,3) and ids (T,H,W) in DAVIS's layout, the masks last."""
    images = root / "JPEGImages" / "480p" / name
    images.mkdir(parents=True, exist_ok=True)
    for number, frame in enumerate(frames):
        Image.fromarray(frame).save(images / f"{number:05d}.jpg", quality=95)
    save_masks(root / "Annotations" / "480p", name, list(masks))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m vito_fast.evaluate.demo", description=__doc__.partition("\n")[0])
    parser.add_argument("demo", type=Path, help="folder that vito_fast.data.demo wrote")
    parser.add_argument("out", type=Path, help="folder to write")
    arguments = parser.parse_args()
    try:
        prepare(arguments.demo, arguments.out)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"prepared: {arguments.out}")


if __name__ == "__main__":
    main()
