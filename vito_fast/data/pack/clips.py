"""Packed clips: the time rules that re-encoding and copying share, the shard they go to, and the journal of files.

The journal is the record from which a killed run continues. Each machine's share has one append-only file with a line
of JSON per source file. A run that continues truncates the shards to the recorded packets.
"""

import base64
import dataclasses
import json
import math
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from vito_fast.data.store.labels import NO_LABEL

GAP = 2.0
"""Seconds between two frames that end a clip: the recording was interrupted, or a timestamp is wrong."""

CLOCK = 0.001
"""Resolution in seconds of Matroska's clock, to which many containers round their timestamps."""


@dataclass
class PackedClip:
    """A clip as written to a shard: the fields of ``ClipRecord`` without video number and source name."""

    codec: str
    width: int
    height: int
    rotation: int
    shard: int
    time_base: Fraction
    end: int
    extradata: bytes
    pts: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    checksums: np.ndarray
    flags: np.ndarray
    mirror: bool = False


@dataclass
class PackedFile:
    """All clips of one source file."""

    clips: list[PackedClip] = field(default_factory=list)
    rate: float = 0.0
    """Frames per second."""
    too_short: int = 0
    """Shots left out because they are shorter than ``min_length``."""
    still: int = 0
    """Clips left out because nothing moves in them."""
    kinds: list[str] = field(default_factory=list)
    """What is out of the ordinary: see ``picture.kinds``."""
    traits: list[str] = field(default_factory=list)
    """Of its first frame: see ``picture.traits``."""
    lost: int = 0
    """Frames left out because of damage."""
    damage: str = ""
    """What is damaged, if anything."""
    rows: list[int] = field(default_factory=list)
    """Of a clip list: the row of each clip, by its place among those of the file."""
    refused: list[tuple[int, str]] = field(default_factory=list)
    """Of a clip list: rows without a clip, by their places, and the reasons."""

    def why_empty(self) -> str:
        """The reason why no clip is left."""
        if self.refused:
            return self.refused[0][1]
        counts = {"shorter than the shortest clip": self.too_short, "in which nothing moves": self.still}
        return "no clip left: " + ", ".join(f"{count} shots {why}" for why, count in counts.items() if count)


@dataclass(frozen=True, kw_only=True)
class Row:
    """What a row of a clip list says about its clips, for ``labels.parquet``."""

    label: int = NO_LABEL
    class_name: str = ""
    """Name of the label."""
    id: str = ""
    group: str = ""
    """Clips of one group become one video of the store, which training never contrasts."""
    text: str = ""
    """A text about it, such as a caption."""
    line: int = 0
    """Number of its line in the list, 0 for none."""


@dataclass(frozen=True)
class Span(Row):
    """Frames [``first_frame``, ``end_frame``) of a file in presentation order.

    ``start`` is the first frame's time in ticks of the file, by which a file is known to be the listed one.
    """

    first_frame: int
    end_frame: int
    start: int

    def begun(self, number: int, seconds: float) -> bool:
        """Whether frame ``number``, so many seconds after the first one, is the first one of the clip or later."""
        return number >= self.first_frame

    def ended(self, number: int, seconds: float) -> bool:
        """Whether it comes after the clip."""
        return number >= self.end_frame

    def missing(self, number: int, seconds: float) -> str:
        """The reason why a file that ends there lacks the clip."""
        return f"the clip ends after the file: it has {number} frames, the clip list has {self.end_frame}"

    def fits(self, tick: int) -> bool:
        """Whether the clip's first frame may be at ``tick``."""
        return tick == self.start


@dataclass(frozen=True)
class TimeSpan(Row):
    """The frames of a file that are shown from ``start`` to ``end`` seconds after its first frame.

    Without either, the file is packed as one that is not in a list: cut into shots, and split.
    """

    start: float = -math.inf
    end: float = math.inf

    @property
    def whole(self) -> bool:
        return self.start == -self.end == -math.inf

    def begun(self, number: int, seconds: float) -> bool:
        return seconds >= self.start - CLOCK / 2

    def ended(self, number: int, seconds: float) -> bool:
        return seconds >= self.end - CLOCK / 2

    def missing(self, number: int, seconds: float) -> str:
        return f"no frame in the clip: none from {self.start:g} s to {self.end:g} s, with frames up to {seconds:.3f} s"

    def fits(self, tick: int) -> bool:
        return True


Clips = Mapping[str, Sequence[Span | TimeSpan]]
"""A clip list: the clips of each file, by its name."""


class ShardWriter:
    """Appends packets to one shard file. :meth:`rewind` removes those of a failed source."""

    def __init__(self, path: Path, number: int):
        self.number, self.path = number, path
        self._file = open(path, "ab", buffering=1 << 20)  # noqa: SIM115 - open until close
        self.size = self._file.tell()

    def append(self, payload: bytes) -> int:
        """Append one packet and return its offset in bytes."""
        self._file.write(payload)
        offset, self.size = self.size, self.size + len(payload)
        return offset

    def flush(self) -> None:
        self._file.flush()

    def rewind(self, size: int) -> None:
        """Truncate the shard to ``size`` bytes."""
        self._file.flush()
        os.ftruncate(self._file.fileno(), size)
        self.size = size

    def close(self) -> None:
        """Sync to disk and close."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


def frame_duration(seconds: np.ndarray, rate: Fraction) -> float:
    """Seconds per frame: that of the claimed ``rate``, unless the timestamps differ from it by over 10 %."""
    claimed, steps = float(1 / rate), np.diff(seconds)
    mean = float(steps[steps <= GAP].mean()) if (steps <= GAP).any() else claimed
    return claimed if abs(mean - claimed) < 0.1 * claimed else mean


def too_short(start: float, end: float, min_length: float) -> bool:
    """Whether a shot from ``start`` to ``end`` seconds is below ``min_length``. Both ends may be rounded."""
    return end - start < min_length - 2 * CLOCK


@dataclass(frozen=True)
class Rejected:
    reason: str


Entry = PackedFile | Rejected


class Records(Mapping[str, Entry]):
    """Entries by file name. They stay on disk: memory holds only the offset of each line."""

    def __init__(self) -> None:
        self._places: dict[str, tuple[Path, int]] = {}
        self.end = 0
        """Bytes of whole lines in the file that was read last."""

    def __getitem__(self, name: str) -> Entry:
        path, place = self._places[name]
        with open(path, "rb") as file:
            file.seek(place)
            return _load(file.readline())[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def note(self, name: str, path: Path, place: int) -> None:
        self._places[name] = (path, place)

    def forget(self, name: str) -> None:
        self._places.pop(name, None)

    def read(self, path: Path) -> Iterator[tuple[str, Entry]]:
        """Register and yield the entries of ``path``, up to the partial line that a killed run may have left."""
        place = 0
        with open(path, "rb") as file:
            for line in file:
                try:
                    name, entry = _load(line)
                except (ValueError, KeyError, TypeError, zlib.error):
                    return
                self.note(name, path, place)
                place += len(line)
                self.end = place
                yield name, entry


class Journal:
    """The record of one share (``number`` of ``parts``, from 1) of the store that is packed in ``store``."""

    def __init__(self, store: Path, number: int, parts: int):
        self.store, self.number, self.parts = store, number, parts
        self.entries = Records()
        self._path = store / ".pack" / f"part-{number}-of-{parts}.jsonl"
        self._path.touch()
        ends: dict[int, int] = {}
        lost = []
        for name, entry in self.entries.read(self._path):
            for clip in entry.clips if isinstance(entry, PackedFile) else []:
                end = int((clip.offsets + clip.sizes).max())
                path = self.shard_path(clip.shard)
                if not path.exists() or path.stat().st_size < end:  # lost in a power cut; pack this file again
                    lost.append(name)
                else:
                    ends[clip.shard] = max(ends.get(clip.shard, 0), end)
        for name in lost:
            self.entries.forget(name)
        self._file = open(self._path, "a+b")  # noqa: SIM115 - open until mark_done
        self._file.truncate(self.entries.end)
        self._trim_shards(ends)

    def mine(self, name: str) -> bool:
        """Whether the file belongs to this share. Depends on its name alone: machines need not agree on a listing."""
        return zlib.crc32(name.encode("utf-8", "surrogateescape")) % self.parts == self.number - 1

    def add(self, name: str, entry: Entry) -> None:
        """Record a file that is packed or rejected."""
        self.entries.note(name, self._path, self._file.seek(0, os.SEEK_END))
        self._file.write(_dump(name, entry))
        self._file.flush()

    def mark_done(self) -> None:
        """Sync to disk and mark this share as complete."""
        os.fsync(self._file.fileno())
        self._file.close()
        self._path.with_suffix(".done").touch()

    def shard_path(self, number: int) -> Path:
        return self.store / f"shard-{number:05d}.bin"

    def new_shard(self) -> int:
        """Create an empty shard and return its number. Shares use disjoint numbers."""
        number = self.number - 1
        while True:
            try:
                os.close(os.open(self.shard_path(number), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
                return number
            except FileExistsError:
                number += self.parts

    def _trim_shards(self, ends: dict[int, int]) -> None:
        """Truncate this share's shards to the end of the last recorded packet."""
        for path in self.store.glob("shard-*.bin"):
            number = int(path.stem.split("-")[1])
            if number % self.parts == self.number - 1:
                if number not in ends:
                    path.unlink()
                else:
                    os.truncate(path, ends[number])

    @staticmethod
    def all_entries(store: Path, parts: int) -> Records | None:
        """The records of all shares, or None while one is unfinished."""
        records = Records()
        for number in range(1, parts + 1):
            path = store / ".pack" / f"part-{number}-of-{parts}.jsonl"
            if not path.with_suffix(".done").exists():
                return None
            for _ in records.read(path):
                pass
        return records


def _dump(name: str, entry: Entry) -> bytes:
    body: dict[str, Any]
    if isinstance(entry, Rejected):
        body = {"reason": entry.reason}
    else:
        body = {**vars(entry), "clips": [_plain(clip) for clip in entry.clips]}
    return json.dumps({"file": name, **body}).encode() + b"\n"


def _plain(clip: PackedClip) -> dict[str, Any]:
    values = {f.name: getattr(clip, f.name) for f in dataclasses.fields(clip)}
    for key, value in values.items():
        if isinstance(value, np.ndarray):
            values[key] = [value.dtype.str, base64.b64encode(zlib.compress(value.tobytes(), 1)).decode()]
    return {**values, "time_base": str(clip.time_base), "extradata": base64.b64encode(clip.extradata).decode()}


def _load(line: bytes) -> tuple[str, Entry]:
    if not line.endswith(b"\n"):
        raise ValueError("half a line")
    body = json.loads(line)
    if "reason" in body:
        return body["file"], Rejected(body["reason"])
    name = body.pop("file")
    return name, PackedFile(**{**body, "clips": [_clip(values) for values in body["clips"]]})


def _clip(values: dict[str, Any]) -> PackedClip:
    for key in ("pts", "offsets", "sizes", "checksums", "flags"):
        dtype, data = values[key]
        values[key] = np.frombuffer(zlib.decompress(base64.b64decode(data)), np.dtype(dtype))
    values["time_base"], values["extradata"] = Fraction(values["time_base"]), base64.b64decode(values["extradata"])
    return PackedClip(**values)
