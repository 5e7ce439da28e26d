"""``vito-fast inspect-store STORE``: verify checksums, sum up the contents, draw a contact sheet."""

import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vito_fast.data.store.store import Report, Store, frames
from vito_fast.errors import UserError
from vito_fast.files import check_writable

CELL = (192, 108)
"""Width and height in pixels of a cell of the contact sheet."""
LABEL = 14
COLUMNS = 2
"""Clips per row of the contact sheet. Each takes three cells."""


@dataclass(frozen=True)
class Damage:
    """A clip with a packet that cannot be read as it was written."""

    clip: int
    source: str
    reason: str


@dataclass
class Inspection:
    """Contents and state of a store."""

    format: str
    clips: int
    videos: int
    frames: int
    packets: int
    hours: float
    bytes: int
    codecs: dict[str, int]
    """Clips by codec."""
    sizes: dict[str, int]
    """Clips by ``WIDTHxHEIGHT`` of their decoded frames."""
    seconds: tuple[float, float, float]
    """Length of the shortest, median and longest clip."""
    packed: Report
    """The report of packing."""
    verified: bool
    damaged: list[Damage] = field(default_factory=list)
    sheet: Path | None = None

    def lines(self) -> list[str]:
        """The result as text, one line each."""
        low, middle, high = self.seconds
        result = [
            f"{self.format} store: {self.clips} clips of {self.videos} videos, {self.hours:.2f} hours, "
            f"{self.frames} frames in {self.packets} packets, {self.bytes / 1e6:.1f} MB",
            f"codecs: {_table(self.codecs)}; frame sizes: {_table(self.sizes)}",
            f"clips of {low:.2f} to {high:.2f} s, median {middle:.2f} s",
            f"packets decoded per frame used: {self.packed.packets_per_frame:.2f}",
        ]
        result += [f"rejected when packing, {count}: {reason}" for reason, count in self.packed.rejected.items()]
        result += [f"damaged: clip {bad.clip} ({bad.source}): {bad.reason}" for bad in self.damaged]
        if self.verified:
            result.append(f"checksums: {self.clips - len(self.damaged)} clips good, {len(self.damaged)} damaged")
        if self.sheet:
            result.append(f"contact sheet: {self.sheet}")
        return result


def inspect_store(
    store: str | os.PathLike[str],
    *,
    verify: bool = True,
    sheet: str | os.PathLike[str] | None = None,
    pictures: int = 24,
    threads: int = 0,
    progress: bool = True,
) -> Inspection:
    """Read a whole store, compare every packet with its checksum and draw a contact sheet.

    Args:
        store: The store's folder.
        verify: False reads the index only.
        sheet: PNG file of the contact sheet. None: no sheet.
        pictures: Clips on the sheet, evenly spaced, each by its first, middle and last frame.
        threads: Reading threads, 0 = one per core.
        progress: Whether to draw a progress bar.

    Returns:
        The result. Damage does not raise: see ``damaged``.

    Raises:
        UserError: The store is unfinished or of another version, or ``sheet`` cannot be written.
        ValueError: A number is out of range.
    """
    for name, value, least in (("pictures", pictures, 1), ("threads", threads, 0)):
        if value < least:
            raise ValueError(f"{name} is {value}, must be at least {least}")
    opened = Store(store, threads=1, check=False)
    if sheet is not None:
        if Path(sheet).suffix.lower() != ".png":
            raise UserError(f"the contact sheet must be a .png, got {sheet}")
        check_writable(Path(sheet))
    threads = threads or len(os.sched_getaffinity(0))
    index = opened.index
    infos, damaged = [], []
    for number in range(index.num_clips):
        try:
            infos.append(index.clip(number))
        except ValueError as error:
            damaged.append(Damage(number, "", str(error)))
    seconds = np.array([info.end - info.start for info in infos] or [0.0])
    result = Inspection(
        format=index.format, clips=index.num_clips, videos=len({info.video for info in infos}), frames=index.num_frames,
        packets=index.num_packets, hours=float(seconds.sum() / 3600), bytes=sum(size for _, size in index.shards),
        codecs=dict(Counter(info.codec for info in infos).most_common()),
        sizes=dict(Counter(f"{info.width}x{info.height}" for info in infos).most_common()),
        seconds=(float(seconds.min()), float(np.median(seconds)), float(seconds.max())),
        packed=opened.report, verified=verify, damaged=damaged,
    )  # fmt: skip
    if verify:
        known = {bad.clip for bad in damaged}
        damaged += [bad for bad in _verify(opened, threads, progress) if bad.clip not in known]
    if sheet is not None:
        result.sheet = Path(sheet)
        drawn = _draw(opened, pictures)
        try:
            drawn.save(result.sheet)
        except OSError as error:
            raise UserError(f"cannot write {sheet}: {error.strerror or error}") from None
    return result


def _table(counts: dict[str, int], most: int = 6) -> str:
    shown = [f"{name} {count}" for name, count in list(counts.items())[:most]]
    return ", ".join(shown + ([f"{len(counts) - most} more"] if len(counts) > most else []))


def _verify(store: Store, threads: int, progress: bool) -> Iterator[Damage]:
    columns = (TextColumn("verifying"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    count = store.index.num_clips
    with Progress(*columns, disable=not progress, transient=True) as bar, ThreadPoolExecutor(threads) as pool:
        task = bar.add_task("verifying", total=count)
        for number, bad in enumerate(pool.map(lambda clip: _check(store, clip), range(count))):
            bar.update(task, completed=number + 1)
            if bad:
                yield bad


def _check(store: Store, clip: int) -> Damage | None:
    """Read all packets of one clip. The reader verifies their checksums."""
    try:
        info = store.index.clip(clip)
        everything = np.arange(info.num_frames)[None]
        (read,) = store.reader.read(np.array([clip]), everything, single_stream=False)
    except ValueError as error:
        return Damage(clip, "", str(error))
    return None if read.code == "ok" else Damage(clip, info.source, f"{read.code}: {read.error}")


def _draw(store: Store, pictures: int) -> Image.Image:
    """Draw three frames of up to ``pictures`` clips, with clip number, source and length."""
    count = min(pictures, store.index.num_clips)
    clips = np.linspace(0, store.index.num_clips - 1, count).round().astype(int)
    width, height = 3 * CELL[0], CELL[1] + LABEL
    rows = -(-count // COLUMNS)
    result = Image.new("RGB", (COLUMNS * width + (COLUMNS - 1) * LABEL, rows * height), "white")
    pen = ImageDraw.Draw(result)
    for place, clip in enumerate(clips.tolist()):
        left, top = place % COLUMNS * (width + LABEL), place // COLUMNS * height
        try:
            info = store.index.clip(clip)
            shown = frames(store, clip, [0, info.num_frames // 2, info.num_frames - 1])
        except (OSError, ValueError) as error:
            pen.text((left, top), f"{clip}: {error}"[:90], "red")
            continue
        source = info.source.encode("ascii", "replace").decode()
        label = f"{clip}: {source}, {info.end - info.start:.1f} s, {info.num_frames} frames"
        pen.text((left, top), label[:95], "black")
        for column, frame in enumerate(shown):
            picture = Image.fromarray(frame)
            picture.thumbnail(CELL)
            result.paste(picture, (left + column * CELL[0] + (CELL[0] - picture.width) // 2, top + LABEL))
    return result
