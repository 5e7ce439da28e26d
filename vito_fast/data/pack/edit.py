"""Stores made of stores: ``vito-fast store append | merge | subset``.

Clips are never encoded again. They are ordered as packing all their files at once would order them.
"""

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from vito_fast.config import ClipFilter
from vito_fast.data.pack.clips import Clips, ShardWriter
from vito_fast.data.pack.pack import expected_packets, joined, pack
from vito_fast.data.store import labels
from vito_fast.data.store.description import VERSION, Limits, Report
from vito_fast.data.store.index import ClipRecord, Index, write_index
from vito_fast.data.store.remote import is_remote
from vito_fast.data.store.selection import select
from vito_fast.data.store.store import Store
from vito_fast.errors import UserError
from vito_fast.files import atomic_write, file_lock, sync_folder

Video = tuple[int, int]
"""Number of a store, and of a video in it."""
Clip = tuple[int, int, Video]
"""Number of a store, and of a clip in it, and the video that it becomes part of."""


def merge(dst: str | os.PathLike[str], stores: Sequence[str | os.PathLike[str]]) -> Report:
    """Make one store of several. Their shards are linked, or copied to another file system.

    A clip that several stores have, by source, start and checksums, is taken once.

    Args:
        dst: Folder of the new store. It must not exist.
        stores: Folders or addresses of at least two stores of equal options.

    Returns:
        The report of the new store: the sum of theirs.

    Raises:
        UserError: A store cannot be read, options differ, or ``dst`` exists.
    """
    _check_local("merge", dst)
    parts = [Store(path) for path in stores]
    if len(parts) < 2:
        raise UserError(f"merge needs at least two stores, got {len(parts)}")
    _check_options(parts)
    parts.sort(key=lambda part: labels.count_labels(part.path) == 0)  # of common clips, those with labels are taken
    with new_store(Path(dst)) as folder:
        shards: list[tuple[str, int]] = []
        for part in parts:
            for number, (_, size) in enumerate(part.index.shards):
                shards.append((f"shard-{len(shards):05d}.bin", size))
                part.copy_shard(number, folder / shards[-1][0])
        return _finish(folder, parts, _ordered(parts), shards)


def append(src: str | os.PathLike[str], store: str | os.PathLike[str], *, processes: int = 0, progress: bool = True,
           limits: Limits = Limits(), clips: Clips | None = None) -> Report:  # fmt: skip
    """Pack the videos under ``src`` that a store does not have yet, by name, and add them to it.

    Safe to kill and to repeat. Whoever reads the store goes on with the clips that it had.

    Args:
        src: A folder, such as the one that the store was packed from.
        store: The store. Its options are used.
        processes, progress, limits: As of :func:`pack`.
        clips: A clip list, as of :func:`pack`. Rows of files that the store has are passed over.

    Returns:
        The report of the whole store.

    Raises:
        UserError: No new video, or one of the folders cannot be used.
    """
    _check_local("append", store)
    old = Store(store)
    known = _sources(old)
    lines = (old.path / "quarantine.jsonl").read_text().splitlines()
    known |= {entry["file"] for entry in map(json.loads, lines) if entry.get("state") != "skipped"}
    work = old.path / ".append"
    work.mkdir(exist_ok=True)
    with file_lock(work / "lock") as held:
        if not held:
            raise UserError(f"another process is appending to {old.path}; wait for it or stop it")
        if (work / "store" / "index.bin").exists() and _sources(Store(work / "store")) <= known:
            shutil.rmtree(work)  # killed after the new index
            return append(src, store, processes=processes, progress=progress, limits=limits, clips=clips)
        table, kept = old.path / labels.FILE, work / labels.FILE
        if kept.exists() and labels.count_labels(work) == len(old):  # killed before the new index
            os.replace(kept, table)
        options = old.description["options"]
        try:
            pack(
                src, work / "store", processes=processes, progress=progress, limits=limits, known=known, clips=clips,
                **options,
            )  # fmt: skip
        except UserError:
            if not (work / "store" / ".pack").exists():  # nothing is begun
                shutil.rmtree(work)
            raise
        new = Store(work / "store")
        used = {name for name, _ in old.index.shards}
        for path in old.path.glob("shard-*.bin"):  # of an append that was killed
            if path.name not in used:
                path.unlink()
        shards, free = list(old.index.shards), 0
        for name, size in new.index.shards:
            while f"shard-{free:05d}.bin" in used:
                free += 1
            shards.append((f"shard-{free:05d}.bin", size))
            used.add(shards[-1][0])
            os.link(new.path / name, old.path / shards[-1][0])
        if table.exists():
            kept.unlink(missing_ok=True)
            os.link(table, kept)
        sync_folder(old.path)
        report = _finish(old.path, [old, new], _ordered([old, new]), shards)
        shutil.rmtree(work)
    return report


def _sources(store: Store) -> set[str]:
    return {store.index.clip(clip).source for clip in range(len(store))}


def subset(
    store: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    where: ClipFilter = ClipFilter(),
    clips: Sequence[int] | None = None,
) -> Report:
    """Copy some clips of a store into a new one.

    Args:
        store: The store.
        dst: Folder of the new store. It must not exist.
        where: Filter of its clips.
        clips: Numbers of clips. None: all.

    Returns:
        The report of the new store.

    Raises:
        UserError: No clip is left, a clip is damaged, or ``dst`` exists.
        IndexError: No such clip.
    """
    _check_local("subset", dst)
    whole = Store(store)
    for clip in clips or ():
        if not 0 <= clip < len(whole):
            raise IndexError(f"clip {clip} of {len(whole)}")
    passed = select(whole, where)
    chosen = (passed if clips is None else np.intersect1d(passed, clips)).tolist()
    if not chosen:
        raise UserError(f"no clip of {store} is left: loosen the filters")
    size = int(whole.description["options"]["shard_mib"]) << 20
    with new_store(Path(dst)) as folder:
        moved, shards = _copied(whole, chosen, folder, size)
        order = _ordered([whole], chosen)
        return _finish(folder, [whole], order, shards, moved)


class new_store:
    """The folder in which a new store is made. It gets its name once it is complete."""

    def __init__(self, dst: Path):
        self._dst, self._partial = dst, dst.with_name(f".{dst.name}.partial")

    def __enter__(self) -> Path:
        if self._dst.exists():
            raise UserError(f"{self._dst} exists: choose a new folder")
        shutil.rmtree(self._partial, ignore_errors=True)
        self._partial.mkdir(parents=True)
        return self._partial

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            self._partial.rename(self._dst)
            sync_folder(self._dst.parent)
        else:
            shutil.rmtree(self._partial, ignore_errors=True)


def _check_local(command: str, store: str | os.PathLike[str]) -> None:
    if is_remote(store):
        raise UserError(f"store {command} writes local folders, not {store}: make the store in a folder and upload it")


def _check_options(parts: Sequence[Store]) -> None:
    first = parts[0].description["options"]
    for part in parts[1:]:
        for name, value in part.description["options"].items():
            if name != "shard_mib" and value != first[name]:
                raise UserError(f"{part.name} has {name}={value}, {parts[0].name} has {first[name]}: pack one again")


def _ordered(parts: Sequence[Store], chosen: Sequence[int] | None = None) -> list[Clip]:
    """Clips in the order of packing: by video, whose name is that of its first source, then by source and time."""
    clips: list[tuple[Video, str, int, int]] = []
    first: dict[Video, str] = {}
    seen: set[bytes] = set()
    joins = _joins(parts)
    for number, part in enumerate(parts):
        for clip in chosen if chosen is not None else range(len(part)):
            info = part.index.clip(clip)
            identity = f"{info.source}\n{info.start}\n".encode("utf-8", "surrogateescape")
            digest = hashlib.sha256(identity + part.index.packets(clip).checksums.tobytes()).digest()
            if digest in seen:
                continue
            seen.add(digest)
            video = joins.get((number, info.video), (number, info.video))
            first[video] = min(first.get(video, info.source), info.source)
            clips.append((video, info.source, number, clip))
    clips.sort(key=lambda item: (first[item[0]], *item))
    return [(number, clip, video) for video, _, number, clip in clips]


def _joins(parts: Sequence[Store]) -> dict[Video, Video]:
    """The first of the videos that share a group with each one. Empty without groups."""
    groups: dict[Video, set[str]] = {}
    for number, part in enumerate(parts):
        own = part.labels()
        if own is not None and own.grouped:
            for clip, group in enumerate(own.groups(np.arange(len(part)))):
                known = groups.setdefault((number, part.index.clip(clip).video), set())
                known.update({group} - {""})
    return joined(groups)


def _copied(
    whole: Store, chosen: Sequence[int], folder: Path, size: int
) -> tuple[dict[int, tuple[int, np.ndarray]], list[tuple[str, int]]]:
    """Copy the packets of clips to new shards. Returns the shard and offsets of each clip, and the shards."""
    moved: dict[int, tuple[int, np.ndarray]] = {}
    shards: list[tuple[str, int]] = []
    writer: ShardWriter | None = None
    for clip in chosen:
        if writer is None or writer.size >= size:
            if writer is not None:
                writer.close()
            writer = ShardWriter(folder / f"shard-{len(shards):05d}.bin", len(shards))
            shards.append((writer.path.name, 0))
        offsets = [writer.append(packet) for packet in whole.packets(clip)]
        moved[clip] = len(shards) - 1, np.array(offsets, np.int64)
        shards[-1] = writer.path.name, writer.size
    if writer is not None:
        writer.close()
    return moved, shards


def _finish(
    folder: Path,
    parts: Sequence[Store],
    order: Sequence[Clip],
    shards: Sequence[tuple[str, int]],
    moved: dict[int, tuple[int, np.ndarray]] | None = None,
) -> Report:
    """Write quarantine, labels, index and description, each atomically."""
    report = Report()
    sources: set[str] = set()
    videos: dict[Video, int] = {}
    base = np.cumsum([0, *(len(part.index.shards) for part in parts)])

    def records() -> Iterator[ClipRecord]:
        for number, clip, joint in order:
            info, packets = parts[number].index.clip(clip), parts[number].index.packets(clip)
            video = videos.setdefault(joint, len(videos))
            shard, offsets = moved[clip] if moved else (int(base[number]) + info.shard, packets.offsets)
            sources.add(info.source)
            report.frames += info.num_frames
            report.hours += (info.end - info.start) / 3600
            yield ClipRecord(
                video=video, source=info.source, codec=info.codec, width=info.width, height=info.height, shard=shard,
                time_base=info.time_base, pts=packets.pts, offsets=offsets, sizes=packets.sizes,
                checksums=packets.checksums, flags=packets.flags, end=round(info.end / info.time_base),
                extradata=info.extradata, rotation=info.rotation, mirror=info.mirror,
            )  # fmt: skip

    draft = folder / ".index.bin"
    report.clips = write_index(draft, records(), format=parts[0].index.format, shards=shards)
    report.videos, report.packed, report.bytes = len(videos), len(sources), sum(size for _, size in shards)
    report.packets_per_frame = expected_packets(Index(draft))
    quarantine = ""
    if not moved:
        _add_up(report, [part.report for part in parts])
        if any(part.report.listed for part in parts):
            report.listed, report.packed = True, sum(part.report.packed for part in parts)
        quarantine = "".join((part.path / "quarantine.jsonl").read_text() for part in parts)
    report.found = report.packed + sum(report.rejected.values()) + sum(report.skipped.values())
    seals = sorted(part.description["sources"] for part in parts) + sorted(sources)
    seal = hashlib.sha256("\n".join(seals).encode("utf-8", "surrogateescape")).hexdigest()
    description = {
        "version": VERSION, "options": parts[0].description["options"], "sources": seal, "report": asdict(report),
    }  # fmt: skip
    with atomic_write(folder / "quarantine.jsonl") as partial:
        partial.write_text(quarantine)
    rows, numbers = [(number, clip) for number, clip, _ in order], [videos[video] for *_, video in order]
    table = labels.combine_labels([(part.path, len(part)) for part in parts], rows, numbers)
    if table is not None:
        labels.write_labels(folder, table)
    os.replace(draft, folder / "index.bin")
    with atomic_write(folder / "store.json") as partial:
        partial.write_text(json.dumps(description, indent=1))
    sync_folder(folder)
    return report


def _add_up(report: Report, parts: Sequence[Report]) -> None:
    """Add the counts that the index does not tell."""
    for name in ("short_shots", "still_clips", "salvaged", "lost_frames"):
        setattr(report, name, sum(getattr(part, name) for part in parts))
    for name in ("frame_rates", "rejected", "skipped", "kinds", "traits"):
        total: Counter[str] = sum((Counter(getattr(part, name)) for part in parts), Counter())
        setattr(report, name, dict(total.most_common()))
