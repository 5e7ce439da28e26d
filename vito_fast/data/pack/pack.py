"""``vito-fast pack SRC DST``: any folder of videos into a store of clips that is fast to read.

The store is a directory of shards (packets end to end), ``index.bin`` (written last, atomically: a store without it is
not finished), ``store.json`` (options and report) and ``quarantine.jsonl`` (every file left out, with the reason).
While packing, finished files are recorded in ``DST/.pack``; after a crash or a kill the same command takes up from
there.
"""

import dataclasses
import json
import logging
import math
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vito_fast.data.pack.encode import PackOptions, choose_encoder
from vito_fast.data.pack.journal import Entry, Journal, Rejected
from vito_fast.data.pack.listing import Listing, list_videos
from vito_fast.data.pack.process_pool import Crew
from vito_fast.data.store.index import DISCARD, NO_PICTURE, ClipRecord, Index, plan_packets, write_index
from vito_fast.errors import UserError
from vito_fast.files import locked, sync_folder, whole

log = logging.getLogger("vito_fast.data")

VERSION = 1


@dataclass
class Report:
    """What packing did; also the ``report`` of ``store.json``."""

    clips: int = 0
    videos: int = 0
    frames: int = 0
    hours: float = 0.0
    bytes: int = 0
    frame_rates: dict[str, int] = field(default_factory=dict)
    """Videos by frames a second."""
    short_shots: int = 0
    rejected: dict[str, int] = field(default_factory=dict)
    """Files by reason (its first words; the full reasons are in quarantine.jsonl)."""
    packets_per_frame: float = 0.0
    """Packets decoded per frame used (d/u), as planned for pairs within 2.56 s."""
    complete: bool = True
    """False after one part of several: the store has no index yet."""

    def lines(self) -> list[str]:
        """What to tell the user; nothing after one part of several."""
        if not self.complete:
            return []
        rates = ", ".join(f"{rate} fps: {count}" for rate, count in self.frame_rates.items())
        result = [
            f"{self.clips} clips of {self.videos} videos, {self.hours:.2f} hours, "
            f"{self.frames} frames, {self.bytes / 1e6:.1f} MB",
            f"frame rates: {rates}; packets decoded per frame used: {self.packets_per_frame:.2f}",
        ]
        if self.short_shots:
            result.append(f"left out: {self.short_shots} shots shorter than the shortest clip")
        result += [f"rejected {count}: {reason}" for reason, count in self.rejected.items()]
        return result


def pack(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    format: str = "jpeg",
    short_side: int = 256,
    quality: int = 90,
    crf: int = 20,
    gop: int = 8,
    encoder: str = "auto",
    clip_length: float = 10.0,
    min_length: float = 1.0,
    shot_cuts: bool = True,
    shard_mib: int = 256,
    part: str = "1/1",
    processes: int = 0,
    patience: float = 120.0,
    progress: bool = True,
) -> Report:
    """Packs every video under ``src`` (a folder, or one file) into the store ``dst``.

    format: ``jpeg`` (every frame a JPEG, any frame in one read), ``h264`` (short groups of pictures), ``copy`` (no
    re-encoding). encoder: of h264 stores, ``libx264``, ``h264_nvenc`` or ``auto``: what this store was begun with, or
    h264_nvenc where it works and libx264 elsewhere (one line on the logger ``vito_fast.data`` says which and why).
    part: ``i/n`` packs the i-th of n shares, so that machines can work side by side into one folder; the last one to
    finish writes the index. processes: 0 = one per core; a file, however long, is packed by one of them. patience:
    seconds without a decoded frame after which a file is given up. The other options are those of
    :class:`PackOptions`.

    Links that lead outside ``src`` are not followed; identical files are packed once. Safe to kill at any time and to
    repeat: a finished store is left as it is. The clips and their order depend on the files and options only, not on
    the processes.

    Raises UserError for what the user can mend: no such folder, no usable video in it, a full disk, ``dst`` not
    writable or holding another store; ValueError for options out of range.
    """
    store = Path(dst)
    if encoder == "auto":
        encoder = _encoder(store) if format == "h264" else "libx264"
    options = PackOptions(
        format=format, short_side=short_side, quality=quality, crf=crf, gop=gop, encoder=encoder,
        clip_length=clip_length, min_length=min_length, shot_cuts=shot_cuts, shard_mib=shard_mib,
    )  # fmt: skip
    number, parts = _parse_part(part)
    if processes < 0:
        raise ValueError(f"processes is {processes}, must be at least 0 (0 = one per core)")
    if not 0 < patience < math.inf:
        raise ValueError(f"patience is {patience}, must be above 0 and finite")
    listing = list_videos(Path(src))
    if (store / "index.bin").exists():
        return _finished(store, options, listing)
    try:
        _same_place(store)
        (store / ".pack").mkdir(parents=True, exist_ok=True)
        with locked(store / ".pack" / f"part-{number}.lock") as mine:
            if not mine:
                raise UserError(f"another process is packing into {store}; wait for it or stop it")
            _same_options(store / ".pack" / "options.json", {**asdict(options), "parts": parts})
            journal = Journal(store, number, parts)
            _run(listing, journal, options, processes or len(os.sched_getaffinity(0)), patience, progress)
            return _finish(store, options, listing, parts)
    except OSError as error:
        raise UserError(f"cannot write the store {store}: {error.strerror or error}") from None


def _encoder(store: Path) -> str:
    """Of the store if it has been begun, so that all its clips are of one kind; else the best that works here."""
    begun = store / ".pack" / "options.json"
    if begun.exists():
        return str(_options(begun, _read_json(begun))["encoder"])
    if (store / "index.bin").exists():
        return str(read_description(store)["options"]["encoder"])
    encoder, line = choose_encoder()
    log.info(line)
    return encoder


def _same_place(store: Path) -> None:
    """Only a new folder, an empty one, or one that packing has begun is written to: nobody's files are touched."""
    if store.is_dir() and not (store / ".pack").is_dir():
        others = sorted(path.name for path in store.iterdir() if path.name != "quarantine.jsonl")
        if others:
            raise UserError(f"{store} holds other files ({others[0]}, ...): pack into a new folder")


def _parse_part(part: str) -> tuple[int, int]:
    try:
        number, parts = (int(text) for text in part.split("/"))
    except ValueError:
        number = parts = 0
    if not 1 <= number <= parts:
        raise ValueError(f"part is {part!r}, must be i/n with 1 <= i <= n, as 2/8")
    return number, parts


def _same_options(path: Path, mine: dict[str, Any]) -> None:
    if path.exists():
        theirs = _read_json(path)
        for key, value in mine.items():
            if theirs.get(key) != value:
                raise UserError(
                    f"{path.parent.parent} was begun with {key}={theirs.get(key)}, not {value}: "
                    "repeat that or pack into a new folder"
                )
    else:
        with whole(path) as partial:
            partial.write_text(json.dumps(mine, indent=1))


def _finished(store: Path, options: PackOptions, listing: Listing) -> Report:
    described = read_description(store)
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
    for name, size in open_index(store).shards:
        path = store / name
        if not path.is_file():
            raise damaged(path, "it is missing")
        if path.stat().st_size != size:
            raise damaged(path, f"it has {path.stat().st_size} bytes, not {size}")
    return Report(**described["report"])


def damaged(path: Path, what: str) -> UserError:
    """For a file of a store that is not as packing left it; the index says the same of itself."""
    return UserError(f"{path} is damaged: {what}; delete the store and pack again")


def open_index(store: Path) -> Index:
    """UserError if it cannot be used."""
    try:
        return Index(store / "index.bin")
    except ValueError as error:
        raise UserError(str(error)) from None
    except OSError as error:
        raise UserError(f"cannot read {store / 'index.bin'}: {error.strerror or error}") from None


def read_description(store: Path) -> dict[str, Any]:
    """``store.json``; UserError if ``store`` is no finished store, one of another version or damaged."""
    path = store / "store.json"
    if not (store / "index.bin").exists():
        unfinished = (store / ".pack").exists()
        raise UserError(f"{store} is no {'finished ' if unfinished else ''}store: run `vito-fast pack SRC {store}`")
    described = _read_json(path)
    version = described.get("version")
    if type(version) is not int:
        raise damaged(path, "it has no version")
    if version != VERSION:
        raise UserError(
            f"{store} is a store of version {version}, this program reads version {VERSION}: "
            "delete the store and pack again"
        )
    if not isinstance(described.get("sources"), str):
        raise damaged(path, "it has no sources")
    return {
        **described,
        "options": _options(path, described.get("options")),
        "report": _report(path, described.get("report")),
    }


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object; UserError if the file does not hold one."""
    try:
        found = json.loads(path.read_text()) if path.is_file() else None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise damaged(path, "it is missing or holds no JSON object")
    return found


def _options(path: Path, values: Any) -> dict[str, Any]:
    """``PackOptions`` read from ``path``, where ``parts`` may stand beside them."""
    try:
        return asdict(PackOptions(**{name: value for name, value in values.items() if name != "parts"}))
    except (AttributeError, TypeError, ValueError):
        raise damaged(path, "its options make no sense") from None


def _report(path: Path, values: Any) -> dict[str, Any]:
    try:
        report = asdict(Report(**values))
    except TypeError:
        raise damaged(path, "its report makes no sense") from None
    for name, example in asdict(Report()).items():
        value = report[name]
        counts = value.values() if isinstance(value, dict) else []
        kinds = (int, float) if isinstance(example, float) else (type(example),)
        if type(value) not in kinds or any(type(count) is not int for count in counts):
            raise damaged(path, f"its report's {name} makes no sense")
    return report


def _run(
    listing: Listing, journal: Journal, options: PackOptions, processes: int, patience: float, progress: bool
) -> None:
    for name, reason in listing.rejected.items():
        if journal.mine(name) and name not in journal.entries:
            journal.add(name, Rejected(reason))
    todo = [name for name in listing.videos if journal.mine(name) and name not in journal.entries]
    crew = Crew(listing, journal, options, min(processes, max(1, len(todo))), patience)
    crew.run(todo, progress)
    if forgotten := [name for name in todo if name not in journal.entries]:
        raise RuntimeError(f"{len(forgotten)} files are neither packed nor rejected, {forgotten[0]!r} for one")
    journal.mark_done()


def _finish(store: Path, options: PackOptions, listing: Listing, parts: int) -> Report:
    entries = Journal.all_entries(store, parts)
    if entries is None:
        return Report(complete=False)
    shards = sorted(store.glob("shard-*.bin"))
    tally = _Tally({int(path.stem.split("-")[1]): place for place, path in enumerate(shards)})
    temporary = store / ".pack" / "index.bin"
    sizes = [(path.name, path.stat().st_size) for path in shards]
    write_index(temporary, tally.records(entries), format=options.format, shards=sizes)
    _write_quarantine(store, tally.rejected)
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
    report.packets_per_frame = expected_packets(Index(temporary))
    description = {
        "version": VERSION,
        "options": asdict(options),
        "sources": listing.fingerprint,
        "report": asdict(report),
    }
    with whole(store / "store.json") as partial:
        partial.write_text(json.dumps(description, indent=1))
    os.replace(temporary, store / "index.bin")
    sync_folder(store)
    shutil.rmtree(store / ".pack")
    return report


class _Tally:
    """Turns the journal's entries into the index's records, one at a time, and sums them up on the way."""

    def __init__(self, shards: dict[int, int]):
        self._shards = shards
        self._report = Report()
        self._rates: Counter[str] = Counter()
        self.rejected: dict[str, str] = {}

    def records(self, entries: Mapping[str, Entry]) -> Iterator[ClipRecord]:
        video = 0
        for name in sorted(entries):
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
                yield ClipRecord(video=video, source=name, **{**values, "shard": self._shards[clip.shard]})
            video += bool(entry.clips)
        self._report.videos = video

    def report(self, size: int) -> Report:
        self._report.bytes = size
        self._report.frame_rates = dict(self._rates.most_common())
        self._report.rejected = dict(Counter(reason.split(":")[0] for reason in self.rejected.values()).most_common())
        return self._report


def expected_packets(index: Index, window: float = 2.56, draws: int = 512) -> float:
    """Packets decoded per distinct frame used, decoding in software pairs drawn as the sampler does (fixed seed)."""
    from vito_fast.data.loader.sampler import Sampler, SamplerConfig

    samples = Sampler(index, SamplerConfig(window=window), seed=0).sample(np.arange(draws))
    decoded = used = 0
    for clip, frames in zip(samples.clip, samples.frame, strict=True):
        decoded += len(plan_packets(index, int(clip), frames, single_stream=False).packets)
        used += len(set(frames.tolist()))
    return decoded / used


def _write_quarantine(store: Path, rejected: dict[str, str]) -> None:
    lines = [json.dumps({"file": name, "reason": reason}) for name, reason in sorted(rejected.items())]
    with whole(store / "quarantine.jsonl") as partial:
        partial.write_text("".join(line + "\n" for line in lines))
