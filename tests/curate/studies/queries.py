"""``python tests/curate/studies/queries.py OUT STAMPS``: are true queries kept, and false ones not?

``STAMPS`` is the folder of Debian's package tuxpaint-stamps-default, usr/share/tuxpaint/stamps. ``stamps.csv`` lists
the photographs whose subject is one of the 1,000 classes, chosen by eye, with its name. Each stands before another
photograph, blurred, and becomes a clip of ten seconds of a slow zoom. Each clip is a candidate with its true query, and
with others drawn at random among the other classes.
"""

import argparse
import csv
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image, ImageFilter

from vito_fast.curate.demo import RATE, film, photograph
from vito_fast.curate.engine import Engine
from vito_fast.curate.graph import Run, curate
from vito_fast.curate.options import CurateOptions, DecideOptions
from vito_fast.curate.report import wilson
from vito_fast.curate.taxonomy import taxonomy

SIZE = 640, 360
BACKGROUNDS = ("coffee.png", "motorcycle_left.png", "rocket.jpg", "chelsea.png")
LOST = "another query of its video has it"


def picture(path: Path, rng: np.random.Generator) -> Image.Image:
    """The subject at 60 to 95 % of the frame's height or width, anywhere in the frame."""
    stamp = Image.open(path).convert("RGBA")
    stamp = stamp.crop(stamp.getchannel("A").getbbox())
    scale = min(SIZE[0] / stamp.width, SIZE[1] / stamp.height) * rng.uniform(0.6, 0.95)
    stamp = stamp.resize((max(1, round(stamp.width * scale)), max(1, round(stamp.height * scale))))
    whole = photograph(str(rng.choice(BACKGROUNDS))).resize(SIZE).filter(ImageFilter.GaussianBlur(25))
    room = SIZE[0] - stamp.width, SIZE[1] - stamp.height
    whole.paste(stamp, (round(room[0] * rng.uniform(0.2, 0.8)), round(room[1] * rng.uniform(0.2, 0.8))), stamp)
    return whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("stamps", type=Path)
    parser.add_argument("--preset", default="videonet")
    parser.add_argument("--false", type=int, default=20, help="false queries of each clip")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)
    rows: list[tuple[str, str, str]] = []
    with open(Path(__file__).with_name("stamps.csv"), newline="") as file:
        listed = list(csv.DictReader(file))
    for number, entry in enumerate(listed):
        query, name = entry["query"], f"videos/{number} {entry['query']}.mp4"
        shown, zoom = picture(args.stamps / entry["path"], rng), rng.uniform(0.0002, 0.001)
        if not (args.out / name).exists():
            film(args.out / name, shown, 10 * RATE, zoom=zoom)
        others = [n for n in range(1000) if n not in taxonomy().resolve(query).classes]
        rows.append((name, query, "true"))
        rows += [(name, taxonomy().classes[n].wnid, "false") for n in rng.permutation(others)[: args.false]]
    with open(args.out / "heap.csv", "w", newline="") as file:
        csv.writer(file).writerows([("path", "query", "title"), *rows])
    options, out = CurateOptions(decide=DecideOptions.preset(args.preset)), args.out / "curated"
    curate(Run(args.out / "heap.csv", out, args.out.resolve(), options, Engine()), until="decide")
    candidates = {row["candidate_id"]: row for row in pq.read_table(out / "candidates.parquet").to_pylist()}
    kept, counts = Counter[str](), Counter[str]()
    for row in pq.read_table(out / "decisions.parquet").to_pylist():
        if row["clip_id"] is None:
            own = candidates[row["candidate_id"]]
            good = row["verdict"] == "kept" or row["reason"] == LOST
            kept[own["title"]] += good
            counts[own["title"]] += 1
            if good != (own["title"] == "true"):
                seen = taxonomy().classes[row["label"]].name if row["label"] >= 0 else ""
                print(f"{own['title']} query {own['query']} of {own['path']}: {row['reason'] or 'kept'} {seen}")
    for name, count in counts.items():
        low, high = wilson(kept[name], count)
        print(f"{name} queries kept: {kept[name]} of {count}, {kept[name] / count:.3f} ({low:.3f}-{high:.3f})")


if __name__ == "__main__":
    main()
