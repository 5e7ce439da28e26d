"""``python tests/curate/studies/copies.py OUT``: recall and precision of the near-duplicate search on whole clips.

Footage and photographs under a moving camera are the originals, one clip each. Each is altered in the 17 ways of the
tests, cropped off the grid of the insets, and altered in ways that are known to be hard. Every clip is encoded,
analysed as curation does, and searched for among all others. Matches between clips of different originals are false.
``--others`` names a folder of pictures that are all different, as further clips of one frame.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFilter

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from shots import Pool, footage_scene, photo_scene, piece
from test_duplicates import ALTERATIONS, HEIGHT, WIDTH, crop

from vito_fast.curate import analyse
from vito_fast.curate.duplicates import EXACT_PAIRS, DuplicateOptions, clip_hashes, find_matches, searched_side
from vito_fast.curate.options import AnalyseOptions
from vito_fast.curate.report import wilson

FRAMES, RATE = 40, 25
TWICE = ("chessboard_RGB.png", "motorcycle_right.png")
"""Photographs of scikit-image that show what another one shows."""
OPTIONS = AnalyseOptions(clip_length=1e6, stride=1000)

Frames = list[Image.Image]


def each(alter: Callable[[Image.Image], Image.Image]) -> Callable[[Frames], Frames]:
    return lambda frames: [alter(frame) for frame in frames]


def logo(image: Image.Image) -> Image.Image:
    image = image.copy()
    ImageDraw.Draw(image).ellipse((WIDTH * 0.6, HEIGHT * 0.05, WIDTH * 0.95, HEIGHT * 0.6), fill=(220, 30, 30))
    return image


def inset(image: Image.Image) -> Image.Image:
    whole = image.filter(ImageFilter.GaussianBlur(12))
    whole.paste(image.resize((WIDTH // 2, HEIGHT // 2)), (10, 20))
    return whole


OFF_GRID = {f"crop {100 * (1 - keep):g} %": each(lambda i, k=keep: crop(i, k)) for keep in (0.975, 0.925, 0.89, 0.875)}
HARD = {
    "excerpt of half": lambda frames: frames[10:30],
    "twice the speed": lambda frames: frames[::2],
    "left tenth cut off": each(lambda i: i.crop((WIDTH // 10, 0, WIDTH, HEIGHT))),
    "left fifth cut off": each(lambda i: i.crop((WIDTH // 5, 0, WIDTH, HEIGHT))),
    "rotated 2 degrees": each(lambda i: i.rotate(2, Image.Resampling.BILINEAR)),
    "rotated 5 degrees": each(lambda i: i.rotate(5, Image.Resampling.BILINEAR)),
    "large logo": each(logo),
    "before its own blur": each(inset),
}
KINDS = {
    "17 kinds": {name: each(alter) for name, alter in ALTERATIONS.items()},
    "off-grid crops": OFF_GRID,
    "hard": HARD,
}


def encode(path: Path, frames: Frames) -> None:
    width, height = frames[0].width // 2 * 2, frames[0].height // 2 * 2
    with av.open(str(path), "w") as container:
        options = {"preset": "veryfast", "crf": "28", "threads": "1"}
        stream = container.add_stream("libx264", rate=RATE, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for frame in frames:
            picture = np.ascontiguousarray(np.asarray(frame)[:height, :width])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


def hashes(path: Path) -> list[dict]:
    """Of the file's longest clip: flat or abrupt footage may be cut."""
    row = analyse.run({"root": str(path.parent), "path": path.name, "id": path.name}, OPTIONS)
    return max(row["hashes"], key=len)


def originals(pool: Pool, count: int, seed: int) -> list[Frames]:
    """At most ``count``, one of each piece of footage and of each photograph; the last clips are photographs."""
    size, found = (HEIGHT, WIDTH), list[Frames]()
    photos = [path for path in pool.photos if path.name not in TWICE]
    for number, source in enumerate([*pool.pieces, *photos][:count]):
        rng = np.random.default_rng([seed, number])
        if isinstance(source, tuple):
            scene = footage_scene(piece(*source), 1.1, rng.random(2), size)
        else:
            scene = photo_scene(rng, Image.open(source).convert("RGB"), rng.uniform(1.0, 1.5), size, whip=False)
        pictures = [Image.fromarray(np.clip(scene(n), 0, 255).astype(np.uint8)) for n in range(FRAMES)]
        found.append(pictures)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--bases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--footage", type=Path)
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--others", type=Path)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    clips: list[tuple[int, str, list[dict]]] = []
    bases = originals(Pool(args.footage, args.photos), args.bases, args.seed)
    for number, frames in enumerate(bases):
        for name, alter in {
            "": lambda same: same,
            **{n: a for group in KINDS.values() for n, a in group.items()},
        }.items():
            path = args.out / f"{number} {name or 'original'}.mp4".replace("%", "percent")
            if not path.exists():
                encode(path, alter(frames))
            clips.append((number, name, hashes(path)))
        print(f"{number + 1} of {len(bases)} originals", flush=True)
    others = sorted(args.others.rglob("*.*")) if args.others else []
    for number, path in enumerate(path for path in others if path.suffix in (".png", ".jpg")):
        row = analyse.run({"root": str(path.parent), "path": path.name, "id": path.name}, OPTIONS)
        clips.append((len(bases) + number, "other", row["hashes"][0]))
    judge(clips, len(bases))


def judge(clips: list[tuple[int, str, list[dict]]], bases: int) -> None:
    options = DuplicateOptions()
    sides = [clip_hashes(number, rows, options.contrast) for number, (*_, rows) in enumerate(clips)]
    searched, sizes = searched_side(lambda: sides, len(clips))
    pairs = len(searched) * sum(map(len, sides))
    print(f"{len(clips)} clips of {clips[-1][0] + 1} originals, {pairs:.2g} pairs of hashes")
    for way, most in (("all pairs", pairs), ("bands", 0)):
        matches = find_matches(searched, lambda: sides, sizes, options, exact_pairs=most)
        hits, same, false = set[tuple[int, str]](), set[tuple[int, int]](), dict[tuple[int, int], int]()
        for match in matches:
            (a, one, _), (b, other, _) = clips[match.clip], clips[match.other]
            pair = min(match.clip, match.other), max(match.clip, match.other)
            if a != b:
                false[pair] = min(match.distance, false.get(pair, 256))
            else:
                same.add(pair)
                if "" in (one, other):
                    hits.add((a, one or other))
        print(f"{way} ({'the default here' if (pairs <= EXACT_PAIRS) == (most > 0) else 'not the default here'}):")
        for group, kinds in KINDS.items():
            counts = Counter(name for _, name in hits if name in kinds)
            low, high = wilson(counts.total(), bases * len(kinds))
            said = f"{counts.total()} of {bases * len(kinds)}, {counts.total() / (bases * len(kinds)):.3f}"
            print(
                f"  {group}: {said} ({low:.3f}-{high:.3f});", ", ".join(f"{n} {counts[n] / bases:.2f}" for n in kinds)
            )
        sizes_of = Counter(base for base, *_ in clips)
        negatives = (len(clips) ** 2 - sum(n * n for n in sizes_of.values())) // 2
        low, high = wilson(len(same), len(same) + len(false))
        print(f"  precision: {len(same)} of {len(same) + len(false)} matches ({low:.4f}-{high:.4f})", end=", ")
        print(f"{negatives} pairs of clips of different originals")
        originals_only = {(clips[a][0], clips[b][0]) for a, b in false}
        print(f"  false: {len(originals_only)} pairs of originals", sorted(originals_only)[:20])


if __name__ == "__main__":
    main()
