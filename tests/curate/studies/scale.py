"""``python tests/curate/studies/scale.py STEP``: peak memory and CPU time of a step on a million simulated candidates.

``manifest`` resolves a CSV of N rows. ``balance`` decides on N candidates of a clip each, balances them and writes the
table of decisions. ``duplicates`` matches N clips of 8 hashes, of which a tenth are copies with 24 bits turned.
"""

import argparse
import csv
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from vito_fast.curate import decide, duplicates, graph, manifest
from vito_fast.curate.hashes import BYTES
from vito_fast.curate.options import CurateOptions, digest
from vito_fast.curate.taxonomy import taxonomy

FRAMES = 8
"""Searched hashes of a clip."""


def run_manifest(count: int, folder: Path) -> str:
    names = [entry.name for entry in taxonomy().classes]
    with open(folder / "heap.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("path", "query", "title"))
        rows.writerows((f"{n % 997}/{n}.mp4", names[n % len(names)], f"video {n}") for n in range(count))
    manifest.write_candidates(folder / "heap.csv", folder / "candidates.parquet")
    return f"{(folder / 'candidates.parquet').stat().st_size / 1e6:.0f} MB of candidates"


def run_balance(count: int, folder: Path) -> str:
    rng, ledger = np.random.default_rng(0), decide.Ledger()
    kept: dict[str, graph.Kept] = {}
    for number, (label, score) in enumerate(zip(rng.integers(0, 1000, count), rng.random(count), strict=True)):
        clip = digest("clip", number)
        verdict, reason = ("kept", "") if score > 0.4 else ("rejected", "its query is not seen")
        ledger.decide(digest("candidate", number), clip, decide.State("decide", verdict, reason, int(label), score))
        if verdict == "kept":
            kept[clip] = graph.Kept(f"{number % 997}/{number}.mp4", 921600, 0, 250, number, 10.0)
    found = decide.apply_balance(ledger, {clip: values.path for clip, values in kept.items()}, None, CurateOptions())
    graph._write_table(folder / "decisions.parquet", ledger.rows(), decide.SCHEMA)
    return f"{len(found.chosen)} clips chosen"


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
    steps = {"manifest": run_manifest, "balance": run_balance, "duplicates": run_duplicates}
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
