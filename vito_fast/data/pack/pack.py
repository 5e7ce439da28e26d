"""``vito-fast pack SRC DST``: a folder of videos becomes a store of clips that is fast to read.

A store is a folder: shards (packets end to end), ``index.bin``, ``store.json`` (options and report) and
``quarantine.jsonl`` (each file left out, with the reason). The index is written last and atomically: a store without
it is unfinished. While packing, ``DST/.pack`` records the finished files. After a kill the same command continues.
"""

import dataclasses
import json
import logging
import math
import os
import shutil
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict
from itertools import repeat
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from vito_fast.config import SamplerConfig
from vito_fast.data.loader.sampler import Sampler
from vito_fast.data.pack.clips import Clips, Entry, Journal, PackedFile, Rejected, Row, Span
from vito_fast.data.pack.encode import choose_encoder
from vito_fast.data.pack.listing import Listing, list_clips, list_videos
from vito_fast.data.pack.process_pool import Faults, FileJob, ProcessPool
from vito_fast.data.pack.upload import is_finished, staged
from vito_fast.data.store.description import (
    FORMATS,
    VERSION,
    Limits,
    PackOptions,
    Report,
    parse_options,
    read_json,
)
from vito_fast.data.store.index import DISCARD, NO_PICTURE, ClipRecord, Index, plan_packets, write_index
from vito_fast.data.store.labels import NO_LABEL, need_pyarrow, write_labels
from vito_fast.data.store.remote import is_remote
from vito_fast.data.store.store import Store
from vito_fast.errors import UserError
from vito_fast.files import atomic_write, file_lock, sync_folder

log = logging.getLogger("vito_fast.data")

Key = TypeVar("Key", str, tuple[int, int])


def pack(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    format: str = PackOptions.format,
    short_side: int = 256,
    quality: int = 90,
    crf: int = 20,
    gop: int = 8,
    encoder: str = "auto",
    clip_length: float = 10.0,
    min_length: float = 1.0,
    shot_cuts: bool = True,
    keep_still: bool = False,
    strict: bool = False,
    hdr: str = "tonemap",
    deinterlace: bool = False,
    shard_mib: int = 256,
    shard: str = "1/1",
    processes: int = 0,
    decode_timeout: float = 120.0,
    io_timeout: float = 60.0,
    skip_unreadable: bool = False,
    limits: Limits = Limits(),
    clips: Clips | None = None,
    known: Collection[str] = (),
    progress: bool = True,
) -> Report:
    """Pack every video under ``src`` into the store ``dst``, a folder or an address.

    Safe to kill at any time and to repeat. A finished store is left as it is. The clips and their order depend on the
    files and the options only. Identical files are packed once. Links that lead outside ``src`` are not followed.

    Args:
        src: A folder, searched recursively, or one file.
        dst: The store's folder, or an address, as ``s3://bucket/store``. The store is then packed into a folder beside
            the cache (see :class:`Store`) and uploaded.
        format, short_side, quality, crf, gop, clip_length, min_length, shot_cuts, keep_still, strict, hdr, deinterlace,
            shard_mib: See :class:`PackOptions`.
        encoder: ``libx264``, ``h264_nvenc`` or ``auto`` (h264). ``auto`` keeps the encoder that the store was begun
            with, else takes h264_nvenc where it works. The logger ``vito_fast.data`` states the choice.
        shard: ``i/n`` packs the i-th of n shares of the files, so that n machines can pack into one folder. The last
            to finish writes the index.
        processes: Worker processes, 0 = one per core. One of them packs a whole file.
        decode_timeout: Seconds without a decoded frame after which a file is rejected.
        io_timeout: Seconds for which a file that a disk or the network fails to deliver is tried again.
        skip_unreadable: Whether a file that still fails is rejected. Otherwise the run ends without the store, and the
            same command goes on from there.
        limits: Wall time, frames, pixels and memory after which a file is rejected.
        clips: A clip list: spans by file name relative to ``src``, as :func:`read_clip_list` reads them. They are
            packed as they are, in place of shots; ``clip_length``, ``min_length`` and ``shot_cuts`` do not apply. A
            ``copy`` store takes those of :class:`TimeSpan`. Labels, ids and groups go to ``labels.parquet``. The report
            counts rows of the list.
        known: Names of files, relative to ``src``, to pass over.
        progress: Whether to draw a progress bar.

    Returns:
        The report. ``complete`` is False while other shares are missing.

    Raises:
        UserError: No such folder, no usable video, a full disk, files that cannot be read now, or ``dst`` holds
            something else.
        ValueError: An option is out of range.
    """
    arguments = {name: value for name, value in locals().items() if name not in ("src", "dst")}
    if is_remote(dst) and not is_finished(dst):
        if shard != "1/1":
            raise ValueError(f"shard is {shard!r}: pack into a folder that all machines share, not to an address")
        with staged(dst) as folder:
            return pack(src, folder, **arguments)
    store, finished = Path(dst), is_remote(dst) or Path(dst, "index.bin").exists()
    if encoder == "auto":
        choice = format in FORMATS and FORMATS[format].encoders
        encoder = choose_store_encoder(dst, finished) if choice else PackOptions.encoder
    options = PackOptions(
        format=format, short_side=short_side, quality=quality, crf=crf, gop=gop, encoder=encoder,
        clip_length=clip_length, min_length=min_length, shot_cuts=shot_cuts, keep_still=keep_still, strict=strict,
        hdr=hdr, deinterlace=deinterlace, shard_mib=shard_mib,
    )  # fmt: skip
    part, parts = _parse_shard(shard)
    if processes < 0:
        raise ValueError(f"processes is {processes}, must be at least 0 (0 = one per core)")
    for name, value in (("decode_timeout", decode_timeout), ("io_timeout", io_timeout)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name} is {value}, must be above 0 and finite")
    exact = any(isinstance(span, Span) for rows in (clips or {}).values() for span in rows)
    if exact and not options.store_format.codec:
        raise ValueError(f"format is {format!r}: lists of frames are encoded, choose jpeg or h264")
    listing = list_videos(Path(src), known) if clips is None else list_clips(Path(src), clips, known)
    if finished:
        return _check_finished(dst, options, listing)
    if listing.rows:
        need_pyarrow(store / "labels.parquet")
    try:
        _check_folder(store)
        (store / ".pack").mkdir(parents=True, exist_ok=True)
        with file_lock(store / ".pack" / f"part-{part}.lock") as held:
            if not held:
                raise UserError(f"another process is packing into {store}; wait for it or stop it")
            _begin_or_check(store / ".pack" / "options.json", {**asdict(options), "parts": parts})
            journal = Journal(store, part, parts)
            faults = Faults(listing.root, io_timeout, skip_unreadable)
            processes = processes or len(os.sched_getaffinity(0))
            _run(listing, journal, options, processes, decode_timeout, faults, limits, progress)
            return _finish(store, options, listing, parts)
    except OSError as error:
        raise UserError(f"cannot write the store {store}: {error.strerror or error}") from None


def choose_store_encoder(store: str | os.PathLike[str], finished: bool) -> str:
    """The encoder that the store was begun with, so that all its clips are of one kind, or the best one here."""
    if finished:
        return str(Store(store).description["options"]["encoder"])
    options = Path(store, ".pack", "options.json")
    if options.exists():
        values = read_json(options)
        values.pop("parts", None)
        return parse_options(options, values).encoder
    encoder, line = choose_encoder()
    log.info(line)
    return encoder


def _check_folder(store: Path) -> None:
    """Refuse a folder with files that packing did not write, so that no other file is touched."""
    if store.is_dir() and not (store / ".pack").is_dir():
        others = sorted(path.name for path in store.iterdir() if path.name != "quarantine.jsonl")
        if others:
            raise UserError(f"{store} holds other files ({others[0]}, ...): pack into a new folder")


def _parse_shard(shard: str) -> tuple[int, int]:
    try:
        part, parts = (int(text) for text in shard.split("/"))
    except ValueError:
        part = parts = 0
    if not 1 <= part <= parts:
        raise ValueError(f"shard is {shard!r}, must be i/n with 1 <= i <= n, as 2/8")
    return part, parts


def _begin_or_check(path: Path, ours: dict[str, Any]) -> None:
    """Write the options of a new store, or compare those of one that was begun."""
    if not path.exists():
        with atomic_write(path) as partial:
            partial.write_text(json.dumps(ours, indent=1))
        return
    theirs = read_json(path)
    for key, value in ours.items():
        if theirs.get(key) != value:
            raise UserError(
                f"{path.parent.parent} was begun with {key}={theirs.get(key)}, not {value}: "
                "repeat that or pack into a new folder"
            )


def _check_finished(store: str | os.PathLike[str], options: PackOptions, listing: Listing) -> Report:
    """The report of a finished store of equal files and options. UserError if they differ or a shard is damaged."""
    described = Store(store).description
    for key, value in asdict(options).items():
        if described["options"].get(key) != value:
            raise UserError(
                f"{store} is a finished store with {key}={described['options'].get(key)}, not {value}: "
                "pack into a new folder"
            )
    if described["sources"] != listing.fingerprint:
        raise UserError(
            f"{store} is a finished store of other files than those now in {listing.root}: pack into a new folder"
        )
    return Report(**described["report"])


def _run(
    listing: Listing,
    journal: Journal,
    options: PackOptions,
    processes: int,
    decode_timeout: float,
    faults: Faults,
    limits: Limits,
    progress: bool,
) -> None:
    """Pack all files of this share that the journal does not know yet."""
    for name, reason in listing.rejected.items():
        if journal.mine(name) and name not in journal.entries:
            journal.add(name, Rejected(reason))
    todo = [name for name in listing.videos if journal.mine(name) and name not in journal.entries]
    pool = ProcessPool(journal, options, min(processes, max(1, len(todo))), decode_timeout, faults, limits)
    pool.run({name: FileJob(listing.path(name), listing.spans(name)) for name in todo}, progress)
    if lost := [name for name in todo if name not in journal.entries]:
        raise RuntimeError(f"{len(lost)} files are neither packed nor rejected, {lost[0]!r} for one")
    journal.mark_done()


def _finish(store: Path, options: PackOptions, listing: Listing, parts: int) -> Report:
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
    tally = _Tally({int(path.stem.split("-")[1]): place for place, path in enumerate(shards)}, listing)
    index = store / ".pack" / "index.bin"
    sizes = [(path.name, path.stat().st_size) for path in shards]
    records = tally.records(entries, video_numbers(entries, listing.rows))
    write_index(index, records, format=options.format, shards=sizes)
    with atomic_write(store / "quarantine.jsonl") as partial:
        partial.write_text("".join(json.dumps(entry) + "\n" for entry in tally.quarantine(listing.skipped)))
    report = tally.report(sum(size for _, size in sizes), listing.skipped)
    if not report.clips:
        shutil.rmtree(store / ".pack")
        for shard in shards:
            shard.unlink()
        first = "; ".join(f"{name}: {reason}" for (name, _), reason in sorted(tally.rejected.items())[:3])
        raise UserError(f"no usable video in {listing.root}: {first}")
    report.packets_per_frame = expected_packets(Index(index))
    description = {
        "version": VERSION,
        "options": asdict(options),
        "sources": listing.fingerprint,
        "report": asdict(report),
    }
    with atomic_write(store / "store.json") as partial:
        partial.write_text(json.dumps(description, indent=1))
    if tally.labels:
        write_labels(store, tally.labels)
    os.replace(index, store / "index.bin")
    sync_folder(store)
    shutil.rmtree(store / ".pack")
    return report


def joined(groups: Mapping[Key, Collection[str]]) -> dict[Key, Key]:
    """The least of the keys that share a group with each key, directly or over others.

    Args:
        groups: The groups of each key, in ascending order of the keys.
    """
    root = {key: key for key in groups}

    def find(key: Key) -> Key:
        while root[key] != key:
            key = root[key]
        return key

    first: dict[str, Key] = {}
    for key, own in groups.items():
        for group in own:
            pair = find(key), find(first.setdefault(group, key))
            root[max(pair)] = min(pair)
    return {key: find(key) for key in groups}


def video_numbers(entries: Mapping[str, Entry], rows: Clips) -> dict[str, int]:
    """The store's video of each packed file. Files that share a group are one video, directly or over others."""
    packed = [name for name in sorted(entries) if isinstance(entry := entries[name], PackedFile) and entry.clips]
    first = joined({name: {row.group for row in rows.get(name, ()) if row.group} for name in packed})
    numbers: dict[str, int] = {}
    return {name: numbers.setdefault(first[name], len(numbers)) for name in packed}


LABELS = ("clip", "clip_id", "label", "class", "group", "text", "video", "path")
"""Columns of ``labels.parquet`` as pack writes it."""


class _Tally:
    """Converts the journal's entries to index records, one at a time, and sums up labels, quarantine and report."""

    def __init__(self, shards: dict[int, int], listing: Listing):
        self._shards, self._rows = shards, listing.rows
        self._report = Report(listed=listing.from_list)
        self._rates: Counter[str] = Counter()
        self._kinds: Counter[str] = Counter()
        self._traits: Counter[str] = Counter()
        self.rejected: dict[tuple[str, int], str] = {}
        """Reasons, by file and row of it."""
        self.salvaged: dict[str, str] = {}
        self._labels: dict[str, list[Any]] = {name: [] for name in LABELS}

    @property
    def labels(self) -> dict[str, list[Any]] | None:
        """Columns of ``labels.parquet``, None if no row says anything."""
        rows = (row for own in self._rows.values() for row in own)
        return self._labels if any(row.label != NO_LABEL or row.id or row.group or row.text for row in rows) else None

    def records(self, entries: Mapping[str, Entry], videos: Mapping[str, int]) -> Iterator[ClipRecord]:
        for name in sorted(entries, key=lambda name: (videos.get(name, -1), name)):
            entry, rows = entries[name], self._rows.get(name, (Row(),))
            if isinstance(entry, Rejected):
                self.rejected.update({(name, place): entry.reason for place in range(len(rows))})
                continue
            self._report.short_shots += entry.too_short
            self._report.still_clips += entry.still
            self.rejected.update({(name, place): reason for place, reason in entry.refused})
            if not entry.clips:
                self.rejected.setdefault((name, 0), entry.why_empty())
                continue
            self._report.packed += len(rows) - len(entry.refused)
            self._rates[f"{entry.rate:.3f}".rstrip("0").rstrip(".")] += 1
            self._kinds.update(entry.kinds)
            self._traits.update(entry.traits)
            if entry.damage:
                self.salvaged[name] = f"{entry.damage}; {entry.lost} frames left out"
                self._report.lost_frames += entry.lost
            for clip, place in zip(entry.clips, entry.rows or repeat(0), strict=False):
                self._label(rows[place], videos[name], name)
                self._report.clips += 1
                shown = clip.flags & (DISCARD | NO_PICTURE) == 0
                self._report.frames += int(np.count_nonzero(shown))
                self._report.hours += float((clip.end - clip.pts[shown].min()) * clip.time_base) / 3600
                values = {f.name: getattr(clip, f.name) for f in dataclasses.fields(clip)}
                yield ClipRecord(video=videos[name], source=name, **{**values, "shard": self._shards[clip.shard]})
        self._report.videos = len(set(videos.values()))

    def _label(self, row: Row, video: int, name: str) -> None:
        values = (self._report.clips, row.id, row.label, row.class_name or None, row.group, row.text, video, name)
        for column, value in zip(self._labels.values(), values, strict=True):
            column.append(value)

    def quarantine(self, skipped: Mapping[str, str]) -> Iterator[dict[str, Any]]:
        """Entries of ``quarantine.jsonl``."""
        for (name, place), reason in sorted(self.rejected.items()):
            rows = self._rows.get(name, ())
            line = {"line": rows[place].line} if rows and rows[place].line else {}
            yield {"file": name, **line, "state": "rejected", "reason": reason}
        for state, reasons in (("salvaged", self.salvaged), ("skipped", skipped)):
            for name, reason in sorted(reasons.items()):
                yield {"file": name, "state": state, "reason": reason}

    def report(self, size: int, skipped: Mapping[str, str]) -> Report:
        self._report.bytes = size
        self._report.frame_rates = dict(self._rates.most_common())
        self._report.kinds = dict(self._kinds.most_common())
        self._report.traits = dict(self._traits.most_common(100))
        self._report.salvaged = len(self.salvaged)
        self._report.rejected = dict(Counter(reason.split(":")[0] for reason in self.rejected.values()).most_common())
        self._report.skipped = dict(Counter(skipped.values()).most_common())
        self._report.found = self._report.packed + len(self.rejected) + len(skipped)
        return self._report


def expected_packets(index: Index, frame_window: float = 2.56, draws: int = 512) -> float:
    """Packets decoded per distinct frame used, in software, for ``draws`` pairs of the sampler. Deterministic."""
    samples = Sampler(index, SamplerConfig(views=2, frame_window=frame_window), seed=0).sample(np.arange(draws))
    decoded = used = 0
    for clip, frames in zip(samples.clip, samples.frame, strict=True):
        decoded += len(plan_packets(index, int(clip), frames, single_stream=False).packets)
        used += len(set(frames.tolist()))
    return decoded / used
