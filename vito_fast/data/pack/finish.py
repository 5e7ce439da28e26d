"""The end of packing: the journal's entries become the index, the description and the quarantine list."""

import dataclasses
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from vito_fast.config import SamplerConfig
from vito_fast.data.loader.sampler import Sampler
from vito_fast.data.pack.clips import PackedFile, Span
from vito_fast.data.pack.journal import Entry, Journal, Rejected
from vito_fast.data.pack.listing import Listing
from vito_fast.data.store.description import VERSION, PackOptions, Report
from vito_fast.data.store.index import DISCARD, NO_PICTURE, ClipRecord, Index, plan_packets, write_index
from vito_fast.errors import UserError
from vito_fast.files import atomic_write, sync_folder


def finish_store(store: Path, options: PackOptions, listing: Listing, parts: int) -> Report:
    """Write the files that complete a store, the index last.

    Returns:
        The report. ``complete`` is False, and nothing is written, while another share is being packed.

    Raises:
        UserError: No clip was packed. The store's folder is then as empty as before.
    """
    entries = Journal.all_entries(store, parts)
    if entries is None:
        return Report(complete=False)
    shards = sorted(store.glob("shard-*.bin"))
    tally = _Tally({int(path.stem.split("-")[1]): place for place, path in enumerate(shards)})
    index = store / ".pack" / "index.bin"
    sizes = [(path.name, path.stat().st_size) for path in shards]
    write_index(
        index, tally.records(entries, video_numbers(entries, listing.spans)), format=options.format, shards=sizes
    )
    lines = [json.dumps({"file": name, "reason": reason}) for name, reason in sorted(tally.rejected.items())]
    with atomic_write(store / "quarantine.jsonl") as partial:
        partial.write_text("".join(line + "\n" for line in lines))
    report = tally.report(sum(size for _, size in sizes))
    if not report.clips:
        shutil.rmtree(store / ".pack")
        for shard in shards:
            shard.unlink()
        reasons = "; ".join(f"{name}: {reason}" for name, reason in sorted(tally.rejected.items())[:3])
        raise UserError(
            f"no usable video in {listing.root}: "
            + (reasons or f"{report.short_shots} shots, all shorter than {options.min_length} s")
        )
    report.packets_per_frame = expected_packets(Index(index))
    description = {
        "version": VERSION,
        "options": asdict(options),
        "sources": listing.fingerprint,
        "report": asdict(report),
    }
    with atomic_write(store / "store.json") as partial:
        partial.write_text(json.dumps(description, indent=1))
    os.replace(index, store / "index.bin")
    sync_folder(store)
    shutil.rmtree(store / ".pack")
    return report


def video_numbers(entries: Mapping[str, Entry], spans: Mapping[str, Sequence[Span]]) -> dict[str, int]:
    """The store's video of each packed file. Files that share a group are one video, directly or over others."""
    root: dict[str, str] = {}

    def find(name: str) -> str:
        while root.setdefault(name, name) != name:
            name = root[name]
        return name

    packed = [name for name in sorted(entries) if isinstance(entry := entries[name], PackedFile) and entry.clips]
    first: dict[str, str] = {}
    for name in packed:
        find(name)
        for group in {span.group for span in spans.get(name, ()) if span.group}:
            pair = find(name), find(first.setdefault(group, name))
            root[max(pair)] = min(pair)
    numbers: dict[str, int] = {}
    return {name: numbers.setdefault(find(name), len(numbers)) for name in packed}


class _Tally:
    """Converts the journal's entries to index records, one at a time, and sums up the report."""

    def __init__(self, shards: dict[int, int]):
        self._shards = shards
        self._report = Report()
        self._rates: Counter[str] = Counter()
        self.rejected: dict[str, str] = {}

    def records(self, entries: Mapping[str, Entry], videos: Mapping[str, int]) -> Iterator[ClipRecord]:
        for name in sorted(entries, key=lambda name: (videos.get(name, -1), name)):
            entry = entries[name]
            if isinstance(entry, Rejected):
                self.rejected[name] = entry.reason
                continue
            self._rates[f"{entry.rate:.3f}".rstrip("0").rstrip(".")] += 1
            self._report.short_shots += entry.too_short
            for clip in entry.clips:
                self._report.clips += 1
                self._report.frames += int(np.count_nonzero(clip.flags & (DISCARD | NO_PICTURE) == 0))
                self._report.hours += float((clip.end - clip.pts.min()) * clip.time_base) / 3600
                values = {f.name: getattr(clip, f.name) for f in dataclasses.fields(clip)}
                yield ClipRecord(video=videos[name], source=name, **{**values, "shard": self._shards[clip.shard]})
        self._report.videos = len(set(videos.values()))

    def report(self, size: int) -> Report:
        self._report.bytes = size
        self._report.frame_rates = dict(self._rates.most_common())
        self._report.rejected = dict(Counter(reason.split(":")[0] for reason in self.rejected.values()).most_common())
        return self._report


def expected_packets(index: Index, frame_window: float = 2.56, draws: int = 512) -> float:
    """Packets decoded per distinct frame used, in software, for ``draws`` pairs of the sampler. Deterministic."""
    samples = Sampler(index, SamplerConfig(views=2, frame_window=frame_window), seed=0).sample(np.arange(draws))
    decoded = used = 0
    for clip, frames in zip(samples.clip, samples.frame, strict=True):
        decoded += len(plan_packets(index, int(clip), frames, single_stream=False).packets)
        used += len(set(frames.tolist()))
    return decoded / used
