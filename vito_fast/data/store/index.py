"""The store's index: what every clip is, and where and when each of its packets is.

The file format and its guarantees are described in csrc/index.hpp. Opening verifies the header only and costs the same
for ten clips and a million; a clip is verified when it is first touched, and a corrupt one raises ``ValueError``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from vito_fast.files import atomic_write
from vito_fast.native import sampler as _sampler

KEY = 1
"""Packet flag: decoding can start here."""
DISCARD = 2
"""Packet flag: decodes to a picture that is not part of the clip (edit list, lead-in)."""
NO_PICTURE = 4
"""Packet flag: decodes to no picture (VP8's hidden reference frames)."""
DISPOSABLE = 8
"""Packet flag: no other picture refers to it."""
OPEN = 16
"""Packet flag of a key that is no IDR picture: the decoder must be in its initial state to start here."""

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ClipRecord:
    """One clip to index. The arrays have one entry a packet, in decoding order.

    Clips whose packets are all keys, follow one another without a gap and are equally spaced in time take 8 bytes a
    packet.
    """

    video: int
    """Number of the source video: clips of one video are never each other's negatives."""
    source: str
    codec: str
    """FFmpeg's name of it, at most 15 characters."""
    width: int
    height: int
    """Size in pixels as decoded, before ``rotation``."""
    shard: int
    """Number of the shard that holds the packets."""
    time_base: Fraction
    """Seconds a tick."""
    pts: Integers
    """Presentation times in ticks."""
    offsets: Integers
    """Positions in the shard, in bytes."""
    sizes: Integers
    """Bytes."""
    checksums: npt.NDArray[np.uint32]
    """``checksum`` of each packet."""
    flags: npt.NDArray[np.uint8]
    """Sums of the packet flags above."""
    end: int
    """Tick at which the last frame ends."""
    extradata: bytes = b""
    rotation: int = 0
    """Degrees clockwise by which a decoded frame is turned for display."""


class Packets(NamedTuple):
    """The packets of a clip in decoding order, and the packet of each frame in presentation order."""

    offsets: Integers
    sizes: Integers
    checksums: npt.NDArray[np.uint32]
    pts: Integers
    flags: npt.NDArray[np.uint8]
    order: npt.NDArray[np.int32]


@dataclass(frozen=True)
class ClipInfo:
    """What the index knows of a clip, its packets apart."""

    video: int
    source: str
    codec: str
    width: int
    height: int
    rotation: int
    shard: int
    time_base: Fraction
    start: float
    """Seconds at which the first frame is shown, on the clock of the source video; so are all times of frames."""
    end: float
    """Seconds at which the last frame ends."""
    num_frames: int
    num_packets: int
    constant_rate: bool
    extradata: bytes = field(repr=False)


class Index:
    """A store's index, mapped into memory. Thread-safe; reads nothing that is not asked for.

    Raises ``OSError`` if the file cannot be opened and ``ValueError`` if it is not an index, is one of another version
    or is corrupt. The file must not be overwritten in place while it is open; ``write_index`` never does.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.native = _sampler.Index(os.fsencode(path))
        self.path = Path(path)
        self.format: str = self.native.format
        self.num_clips: int = self.native.num_clips
        self.num_frames: int = self.native.num_frames
        self.num_packets: int = self.native.num_packets
        self.shards: tuple[tuple[str, int], ...] = self.native.shards
        """Name, relative to the store, and bytes of each shard."""

    def __len__(self) -> int:
        return self.num_clips

    def clip(self, clip: int) -> ClipInfo:
        """Raises ``IndexError`` for a number that is not in the index, ``ValueError`` for a corrupt clip."""
        values: dict[str, Any] = self.native.clip(clip)
        return ClipInfo(**{**values, "time_base": Fraction(*values["time_base"])})

    def times(self, clip: int) -> npt.NDArray[np.float64]:
        """When each frame is shown, (num_frames,) in seconds, in presentation order."""
        return self.native.times(clip)

    def packets(self, clip: int) -> Packets:
        return Packets(*self.native.packets(clip))


def checksum(data: bytes | bytearray | memoryview | npt.NDArray[np.uint8]) -> int:
    """Checksum of a packet as the index keeps it: the low 32 bits of XXH64 with seed 0."""
    return _sampler.checksum(data)


def packet_flags(codec: str, extradata: bytes, packet: bytes | memoryview) -> int | None:
    """The packet's flags (``DISCARD`` apart) read from its coded bits; ``None`` for a codec that is not known here.

    Knows h264, hevc, vp8, vp9, av1 and mjpeg. To be preferred to the container's key flags, which some files lack.
    For other codecs take ``KEY | OPEN`` where the container flags a key.
    """
    return _sampler.packet_flags(codec, extradata, packet)


class Plan(NamedTuple):
    """The fewest packets that show the wanted frames."""

    packets: Integers
    """(P,) packet numbers in decoding order."""
    pictures: npt.NDArray[np.int32]
    """(V,) which of the pictures that come out of the decoder, in presentation order, each wanted frame is."""
    runs: Integers
    """(R, 2) first and last + 1 row of ``packets`` of each run from a key to its last wanted frame."""


def plan_packets(index: Index, clip: int, frames: npt.ArrayLike, *, single_stream: bool = True) -> Plan:
    """Plan the decoding of ``frames`` of a clip, (V,) in presentation order.

    With ``single_stream`` one decoder takes all packets without a reset in between, as in a mini-clip; else the decoder
    is reset before each run, which saves packets where groups of pictures are open. Left out are packets that no other
    refers to and those that an open key's decoder would drop. Raises ``IndexError`` for a clip or a frame that does not
    exist.
    """
    return Plan(*_sampler.plan_packets(index.native, clip, exact_array(frames, "int64", "frames"), single_stream))


class Read(NamedTuple):
    """What one sample needs from the shards, or why it cannot be had."""

    code: str
    """``ok``, ``missing``, ``io``, ``truncated``, ``checksum``, ``index``, ``unsupported`` or ``memory``."""
    error: str
    """One line with clip, file and reason; empty if ok."""
    data: npt.NDArray[np.uint8]
    """The plan's packets one after another, or a Matroska file."""
    sizes: Integers
    """(P,) bytes of each packet as stored."""
    packets: Integers
    pictures: npt.NDArray[np.int32]
    runs: Integers
    """As in ``Plan``."""

    def split(self) -> list[npt.NDArray[np.uint8]]:
        """``data`` as one array a packet (not for a Matroska file)."""
        return np.split(self.data, np.cumsum(self.sizes)[:-1])


class Reader:
    """Reads frames' packets from a store's shards by a pool of threads, the GIL released, every checksum verified.

    Thread-safe. ``directory`` is where the shards lie; they are opened when first needed.
    """

    def __init__(self, index: Index, directory: str | os.PathLike[str], *, threads: int = 4):
        self._native = _sampler.Reader(index.native, os.fsencode(directory), threads)

    def read(
        self, clips: npt.ArrayLike, frames: npt.ArrayLike, *, miniclip: bool = False, single_stream: bool = True
    ) -> list[Read]:
        """What ``frames``, (B, V) in presentation order, of ``clips``, (B,), need: one ``Read`` a clip.

        ``miniclip`` wraps the packets into a Matroska file whose pictures ``Read.pictures`` numbers; it implies
        ``single_stream``. Bad data never raise, ``Read.code`` tells; a clip or frame that does not exist raises
        ``IndexError``.
        """
        return [
            Read(*values)
            for values in self._native.read(
                exact_array(clips, "int64", "clips"),
                exact_array(frames, "int64", "frames"),
                miniclip,
                single_stream or miniclip,
            )
        ]


def write_index(
    path: str | os.PathLike[str], clips: Iterable[ClipRecord], *, format: str, shards: Sequence[tuple[str, int]]
) -> int:
    """Write the index of a store and return its number of clips; a reader sees the old file or the whole new one.

    ``clips`` may be a generator: only 128 bytes a clip stay in memory. ``shards`` are names, relative to the store, and
    sizes in bytes. Raises ``ValueError`` naming the clip and the field for a record that makes no sense, ``OSError`` if
    the file cannot be written; the old file, if any, then stays.
    """
    with atomic_write(Path(path)) as partial:
        writer = _sampler.IndexWriter(os.fsencode(partial), format, [(str(name), int(size)) for name, size in shards])
        for number, clip in enumerate(clips):
            _add(writer, number, clip)
        count: int = writer.finish()
    return count


def _add(writer: _sampler.IndexWriter, number: int, clip: ClipRecord) -> None:
    arrays: dict[str, npt.NDArray[Any]] = {}
    for name, dtype in (
        ("pts", "int64"),
        ("offsets", "int64"),
        ("sizes", "int64"),
        ("checksums", "uint32"),
        ("flags", "uint8"),
    ):
        arrays[name] = exact_array(getattr(clip, name), dtype, f"clip {number}: {name}")
    time_base = Fraction(clip.time_base)
    writer.add(
        video=clip.video,
        source=clip.source.encode("utf-8", "surrogateescape"),
        codec=clip.codec,
        extradata=clip.extradata,
        width=clip.width,
        height=clip.height,
        rotation=clip.rotation,
        shard=clip.shard,
        time_base=(time_base.numerator, time_base.denominator),
        end=clip.end,
        **arrays,
    )


def exact_array(values: npt.ArrayLike, dtype: str, name: str) -> npt.NDArray[Any]:
    """``values`` as a C-ordered array of an integer dtype; ``ValueError`` if a value is no integer or does not fit."""
    array = np.asarray(values)
    if array.dtype == dtype and array.flags.c_contiguous:
        return array
    if array.size and array.dtype.kind not in "iu":
        raise ValueError(f"{name} has dtype {array.dtype}, must be integers")
    limits = np.iinfo(dtype)
    if array.size and (int(array.min()) < limits.min or int(array.max()) > limits.max):
        raise ValueError(f"{name} has values from {array.min()} to {array.max()}, must fit {dtype}")
    return array.astype(dtype, order="C")
