"""``python -m vito_fast.evaluate.demo DEMO OUT``: the demo's held-out clips in the layouts that the tasks read.

``OUT/objects`` has ``train`` and ``val``: three shots each of every held-out object. ``OUT/masks`` has DAVIS's layout:
the first shot of each object with its masks. ``OUT/stereo`` is scikit-image's real stereo pair with true disparity.
"""

import argparse
import shutil
import sys
from pathlib import Path

from PIL import Image

from vito_fast.data.demo import wheel_folder
from vito_fast.errors import UserError
from vito_fast.evaluate.ucf101 import decode

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
        images = out / "masks" / "JPEGImages" / "480p" / source.name
        labels = out / "masks" / "Annotations" / "480p" / source.name
        if labels.is_dir():
            continue
        images.mkdir(parents=True, exist_ok=True)
        for number, frame in enumerate(decode(clips / source.name / "shot-0.mp4")[0]):
            Image.fromarray(frame.permute(1, 2, 0).numpy()).save(images / f"{number:05d}.jpg", quality=95)
        shutil.copytree(source, labels)
    pictures = wheel_folder("skimage", "data")
    (out / "stereo").mkdir(parents=True, exist_ok=True)
    for name in STEREO:
        if not (out / "stereo" / name).is_file():
            shutil.copyfile(pictures / name, out / "stereo" / name)


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
