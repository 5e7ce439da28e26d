"""What has been packed so far, so that a killed run goes on where it stopped.

One append-only file a part; a record is one line of JSON. The run that resumes cuts the shards back to what is
recorded.
"""

import base64
import dataclasses
import json
import os
import zlib
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from vito_fast.data.cutting import PackedClip, PackedFile


@dataclass(frozen=True)
class Rejected:
    reason: str


Entry = PackedFile | Rejected


class Journal:
    """The record of one part (``number`` of ``parts``, from 1) of the store being packed in ``store``."""

    def __init__(self, store: Path, number: int, parts: int):
        self.store, self.number, self.parts = store, number, parts
        self._path = store / ".pack" / f"part-{number}-of-{parts}.jsonl"
        self.entries, good = _read(self._path)
        self._file = open(self._path, "a+b")  # noqa: SIM115 - open until mark_done
        self._file.truncate(good)
        self._trim_shards()

    def mine(self, name: str) -> bool:
        """Whether the file belongs to this part; by its name alone, so that machines need not agree on a listing."""
        return zlib.crc32(name.encode("utf-8", "surrogateescape")) % self.parts == self.number - 1

    def add(self, name: str, entry: Entry) -> None:
        self.entries[name] = entry
        self._file.write(_dump(name, entry))
        self._file.flush()

    def mark_done(self) -> None:
        os.fsync(self._file.fileno())
        self._file.close()
        self._path.with_suffix(".done").touch()

    def shard_path(self, number: int) -> Path:
        return self.store / f"shard-{number:05d}.bin"

    def new_shard(self) -> int:
        """Creates an empty shard of this part; numbers of different parts never meet."""
        number = self.number - 1
        while True:
            try:
                os.close(os.open(self.shard_path(number), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
                return number
            except FileExistsError:
                number += self.parts

    def _trim_shards(self) -> None:
        ends: dict[int, int] = {}
        for name, entry in list(self.entries.items()):
            for clip in entry.clips if isinstance(entry, PackedFile) else []:
                end = int((clip.offsets + clip.sizes).max())
                path = self.shard_path(clip.shard)
                if not path.exists() or path.stat().st_size < end:  # lost in a power cut: pack this file again
                    self.entries.pop(name, None)
                else:
                    ends[clip.shard] = max(ends.get(clip.shard, 0), end)
        for path in self.store.glob("shard-*.bin"):
            number = int(path.stem.split("-")[1])
            if number % self.parts == self.number - 1:
                if number not in ends:
                    path.unlink()
                else:
                    os.truncate(path, ends[number])

    @staticmethod
    def present_entries(store: Path) -> dict[str, Entry]:
        """Everything recorded so far, by whatever part."""
        entries: dict[str, Entry] = {}
        for path in sorted((store / ".pack").glob("part-*-of-*.jsonl")):
            entries.update(_read(path)[0])
        return entries

    @staticmethod
    def all_entries(store: Path, parts: int) -> dict[str, Entry] | None:
        """Everything recorded, or None while a part is unfinished."""
        done = [store / ".pack" / f"part-{number + 1}-of-{parts}.done" for number in range(parts)]
        return Journal.present_entries(store) if all(path.exists() for path in done) else None


def _read(path: Path) -> tuple[dict[str, Entry], int]:
    """Records by file name and the length of the readable part (a killed run may leave half a line)."""
    entries: dict[str, Entry] = {}
    good = 0
    if path.exists():
        with open(path, "rb") as file:
            for line in file:
                try:
                    name, entry = _load(line)
                except (ValueError, KeyError, TypeError):
                    break
                entries[name] = entry
                good += len(line)
    return entries, good


def _dump(name: str, entry: Entry) -> bytes:
    body: dict[str, Any]
    if isinstance(entry, Rejected):
        body = {"reason": entry.reason}
    else:
        body = {"rate": entry.rate, "too_short": entry.too_short, "clips": [_plain(clip) for clip in entry.clips]}
    return json.dumps({"file": name, **body}).encode() + b"\n"


def _plain(clip: PackedClip) -> dict[str, Any]:
    values = {f.name: getattr(clip, f.name) for f in dataclasses.fields(clip)}
    for key, value in values.items():
        if isinstance(value, np.ndarray):
            values[key] = [value.dtype.str, base64.b64encode(value.tobytes()).decode()]
    return {**values, "time_base": str(clip.time_base), "extradata": base64.b64encode(clip.extradata).decode()}


def _load(line: bytes) -> tuple[str, Entry]:
    if not line.endswith(b"\n"):
        raise ValueError("half a line")
    body = json.loads(line)
    if "reason" in body:
        return body["file"], Rejected(body["reason"])
    return body["file"], PackedFile([_clip(values) for values in body["clips"]], body["rate"], body["too_short"])


def _clip(values: dict[str, Any]) -> PackedClip:
    for key in ("pts", "offsets", "sizes", "checksums", "flags"):
        dtype, data = values[key]
        values[key] = np.frombuffer(base64.b64decode(data), np.dtype(dtype))
    values["time_base"], values["extradata"] = Fraction(values["time_base"]), base64.b64decode(values["extradata"])
    return PackedClip(**values)
