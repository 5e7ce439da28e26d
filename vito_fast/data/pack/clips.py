"""Packed clips, the shard they are written to, and the time rules that re-encoding and copying share."""

import os
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import numpy as np

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


@dataclass
class PackedFile:
    """All clips of one source file."""

    clips: list[PackedClip] = field(default_factory=list)
    rate: float = 0.0
    """Frames per second."""
    too_short: int = 0
    """Shots left out because they are shorter than ``min_length``."""


@dataclass(frozen=True)
class Span:
    """One clip of a clip list: frames [``first_frame``, ``end_frame``) of its file in presentation order.

    ``start`` is the first frame's time in ticks of the file. Clips of one ``group`` ("" is none) become one video of
    the store, which training never contrasts.
    """

    first_frame: int
    end_frame: int
    start: int
    group: str = ""


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
