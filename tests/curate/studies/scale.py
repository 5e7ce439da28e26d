"""``python tests/curate/studies/scale.py STEP``: peak memory and CPU time of a step on a million simulated candidates.

``decide`` resolves a CSV of N rows, writes the tables that decoding and classifying N files of a clip each would write,
then decides, balances and writes the decisions. ``duplicates`` matches N clips of 8 hashes, of which a tenth are copies
with 24 bits turned.
"""

import argparse
import csv
import itertools
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from vito_fast.curate import analyse, classify, decide, duplicates, engine, graph, manifest, probe
from vito_fast.curate.hashes import BYTES
from vito_fast.curate.options import CurateOptions, digest
from vito_fast.curate.taxonomy import taxonomy

FRAMES = 8
"""Searched hashes of a clip."""
UNIT = 1024
"""Files of a simulated unit."""


def simulate(work: graph.Run) -> None:
    """The units of media, clips and scores. A tenth of the files are bad, a third show another class than asked for."""
    rng = np.random.default_rng(0)
    candidates, steps = work.candidates(["path", "class_ids"]), (work.media, work.clips, work.scores())
    schemas = (probe.SCHEMA, analyse.SCHEMA, classify.SCHEMA)
    for folder in steps:
        (work.out / folder.name).mkdir()
    files = work.files()
    while batch := list(itertools.islice(candidates, UNIT)):
        found: list[list[dict[str, Any]]] = [[], [], []]
        for row in batch:
            item, clip = files[row["path"]], digest(row["path"])
            head = {"item_id": item, "path": row["path"], "status": "ok", "reason": ""}
            if rng.random() < 0.1:
                found[0].append({**head, "status": "rejected", "reason": "no video"})
                continue
            label = row["class_ids"][0] if rng.random() < 2 / 3 else int(rng.integers(1000))
            times = {"first_frame": 0, "end_frame": 250, "start": 0, "end": 128000, "seconds": 10.0, "flat_share": 0.0}
            score = {"frame": 0, "ids": [label] * classify.TOP, "probabilities": [float(rng.random())] * classify.TOP}
            found[0].append({**head, "width": 1280, "height": 720})
            found[1].append({**head, "clips": [{"clip_id": clip, **times}], "frames": [[]], "hashes": [[]]})
            found[2].append({**head, "clip_ids": [clip], "scores": [[score, {**score, "frame": 4}]]})
        for step, schema, rows in zip(steps, schemas, found, strict=True):
            ids = [row["item_id"] for row in rows]
            path = work.out / step.name / f"{digest(ids)}.parquet"
            engine.write_unit(path, pa.Table.from_pylist(rows, schema=schema), step.key, ids)


def run_decide(count: int, folder: Path) -> str:
    names = [entry.name for entry in taxonomy().classes]
    with open(folder / "heap.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("path", "query", "title"))
        rows.writerows((f"{n % 997}/{n}.mp4", names[n % len(names)], f"video {n}") for n in range(count))
    manifest.write_candidates(folder / "heap.csv", folder / "candidates.parquet")
    work = graph.Run(folder / "heap.csv", folder, folder, CurateOptions(), engine.Engine())
    simulate(work)
    ledger, kept = work.decide()
    work.balance(ledger, kept, summary := graph.Summary())
    graph._write_table(folder / "decisions.parquet", ledger.rows(), decide.SCHEMA)
    return f"{len(kept)} clips passed, {len(ledger.kept)} chosen for {len(summary.classes)} classes"


def clip_bits(numbers: np.ndarray) -> np.ndarray:
    """(clips, FRAMES, BYTES): random by clip; every tenth is the clip before it with 24 bits of each hash turned."""
    rng = np.random.default_rng(int(numbers[0]))
    bits = rng.integers(0, 256, (len(numbers), FRAMES, BYTES), np.uint8)
    copies = np.flatnonzero(numbers % 10 == 9)
    turned = np.argsort(rng.random((len(copies), FRAMES, 8 * BYTES), np.float32), axis=-1)[..., :24]
    flips = np.zeros((len(copies), FRAMES, 8 * BYTES), np.uint8)
    np.put_along_axis(flips, turned, 1, -1)
    bits[copies] = bits[copies - 1] ^ np.packbits(flips, axis=-1)
    return bits


def run_duplicates(count: int, folder: Path) -> str:
    step = 10_000
    path = folder / "bits.npy"
    bits = np.lib.format.open_memmap(path, "w+", np.uint8, (count, FRAMES, BYTES))
    for start in range(0, count, step):
        bits[start : start + step] = clip_bits(np.arange(start, min(count, start + step)))
    bits.flush()
    del bits

    def hashes(start: int, end: int) -> duplicates.ClipHashes:
        with open(path, "rb") as file:
            file.seek(path.stat().st_size - (count - start) * FRAMES * BYTES)
            part = np.frombuffer(file.read((end - start) * FRAMES * BYTES), np.uint8).reshape(-1, BYTES)
        clip = np.repeat(np.arange(start, end, dtype=np.int32), FRAMES)
        frame = np.tile(np.arange(FRAMES, dtype=np.int32), end - start)
        return duplicates.ClipHashes(clip, frame, np.zeros(len(clip), np.uint8), part)

    def batches() -> Iterator[duplicates.ClipHashes]:
        for start in range(0, count, step):
            yield hashes(start, min(count, start + step))

    sizes = np.full(count, FRAMES, np.int32)
    matches = duplicates.find_matches(hashes(0, count), batches, sizes, duplicates.DuplicateOptions())
    stars = duplicates.star_groups(count, matches)
    copies = range(9, count, 10)
    joined = sum(stars[clip].representative == clip - 1 for clip in copies)
    false = sum(star.match is not None for star in stars) - joined
    return f"{joined} of {len(copies)} copies found, {false} false"


def main() -> None:
    steps = {"decide": run_decide, "duplicates": run_duplicates}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=steps)
    parser.add_argument("--clips", type=int, default=1_000_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        said = steps[args.step](args.clips, Path(folder))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"{args.step}, {args.clips} clips: {said}; peak {peak:.2f} GB, {time.process_time():.0f} CPU s")


if __name__ == "__main__":
    main()
