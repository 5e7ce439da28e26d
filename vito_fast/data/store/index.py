"""The store's index: size, codec and timing of every clip, and the place of each of its packets.

csrc/index.hpp describes the file format and its guarantees. Opening verifies the header only and costs the same for ten
clips and a million. A clip is verified when it is first used. A corrupt one raises ``ValueError``.
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

from vito_fast.errors import UserError
from vito_fast.files import atomic_write
from vito_fast.native import sampler as _sampler

KEY = 1
"""Packet flag: decoding can start here."""
DISCARD = 2
"""Packet flag: decodes to a frame outside the clip (edit list, lead-in)."""
NO_PICTURE = 4
"""Packet flag: decodes to no frame (VP8's hidden reference frames)."""
DISPOSABLE = 8
"""Packet flag: no other frame refers to it."""
OPEN = 16
"""Packet flag of a key that is no IDR frame: the decoder must be in its initial state to start here."""

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ClipRecord:
    """One clip to index. The arrays have one entry per packet, in decoding order.

    A clip takes 8 bytes per packet if all packets are keys, contiguous in the shard and equally spaced in time.
    """

    video: int
    """Number of the source video. Clips of one video are never negatives of each other."""
    source: str
    codec: str
    """FFmpeg's name, at most 15 characters."""
    width: int
    height: int
    """Size in pixels as decoded, before ``rotation``."""
    shard: int
    """Number of the shard that holds the packets."""
    time_base: Fraction
    """Seconds per tick."""
    pts: Integers
    """Presentation times in ticks."""
    offsets: Integers
    """Positions in the shard in bytes."""
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
    """Degrees clockwise by which a decoded frame is rotated for display."""
    mirror: bool = False
    """Whether it is mirrored left to right before that."""


class Packets(NamedTuple):
    """The packets of a clip in decoding order. ``order`` is the packet number of each frame in presentation order."""

    offsets: Integers
    sizes: Integers
    checksums: npt.NDArray[np.uint32]
    pts: Integers
    flags: npt.NDArray[np.uint8]
    order: npt.NDArray[np.int32]


@dataclass(frozen=True)
class ClipInfo:
    """Entry of a clip in the index, without its packets."""

    video: int
    source: str
    codec: str
    width: int
    height: int
    rotation: int
    shard: int
    time_base: Fraction
    start: float
    """Timestamp of the first frame in seconds, on the clock of the source video, as all timestamps of frames."""
    end: float
    """Seconds at which the last frame ends."""
    num_frames: int
    num_packets: int
    constant_rate: bool
    extradata: bytes = field(repr=False)
    mirror: bool = False


class Index:
    """A store's index, mapped into memory. Thread-safe. Reads only the pages that it needs.

    The file must not be overwritten in place while it is open. ``write_index`` never does that.

    Raises:
        OSError: The file cannot be opened.
        ValueError: It is no index, of another version or corrupt.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.native = _sampler.Index(os.fsencode(path))
        self.path = Path(path)
        self.format: str = self.native.format
        self.num_clips: int = self.native.num_clips
        self.num_frames: int = self.native.num_frames
        self.num_packets: int = self.native.num_packets
        self.shards: tuple[tuple[str, int], ...] = self.native.shards
        """File name and size in bytes of each shard."""

    def __len__(self) -> int:
        return self.num_clips

    def clip(self, clip: int) -> ClipInfo:
        """The entry of a clip. Raises IndexError if there is no such clip, ValueError if it is corrupt."""
        values: dict[str, Any] = self.native.clip(clip)
        return ClipInfo(**{**values, "time_base": Fraction(*values["time_base"])})

    def measures(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """Seconds, pixels of the short side, and frames of each clip, (N,). Raises ValueError if one is corrupt."""
        return self.native.measures()

    def times(self, clip: int) -> npt.NDArray[np.float64]:
        """Timestamps of the frames, (num_frames,) in seconds, in presentation order."""
        return self.native.times(clip)

    def packets(self, clip: int) -> Packets:
        """The packets of a clip."""
        return Packets(*self.native.packets(clip))


def open_index(store: Path) -> Index:
    """Open ``index.bin`` of a store. Raises UserError if it cannot be read or is damaged."""
    try:
        return Index(store / "index.bin")
    except ValueError as error:
        raise UserError(str(error)) from None
    except OSError as error:
        raise UserError(f"cannot read {store / 'index.bin'}: {error.strerror or error}") from None


def checksum(data: bytes | bytearray | memoryview | npt.NDArray[np.uint8]) -> int:
    """Checksum of a packet: the low 32 bits of XXH64 with seed 0."""
    return _sampler.checksum(data)


def packet_flags(codec: str, extradata: bytes, packet: bytes | memoryview) -> int | None:
    """Flags of a packet, without ``DISCARD``, parsed from its bits. Some containers lack key flags or set wrong ones.

    Returns:
        None for a codec other than h264, hevc, vp8, vp9, av1 and mjpeg. Use ``KEY | OPEN`` for its keys.
    """
    return _sampler.packet_flags(codec, extradata, packet)


class Plan(NamedTuple):
    """The fewest packets from which the wanted frames decode."""

    packets: Integers
    """(P,) packet numbers in decoding order."""
    pictures: npt.NDArray[np.int32]
    """(V,) position of each wanted frame among the frames that these packets decode to, in presentation order."""
    runs: Integers
    """(R, 2) first row of ``packets``, and last row + 1, of each run from a key to its last wanted frame."""


def plan_packets(index: Index, clip: int, frames: npt.ArrayLike, *, single_stream: bool = True) -> Plan:
    """Plan the decoding of frames. Packets that no other refers to, and that an open key would drop, are left out.

    Args:
        index: The store's index.
        clip: Number of the clip.
        frames: (V,) frame numbers in presentation order.
        single_stream: Whether one decoder takes all packets without a reset, as in a mini-clip. Otherwise it is reset
            before each run, which saves packets of open groups of pictures.

    Raises:
        IndexError: No such clip or frame.
    """
    return Plan(*_sampler.plan_packets(index.native, clip, exact_array(frames, "int64", "frames"), single_stream))


class Read(NamedTuple):
    """The packets of one sample, or the reason why they cannot be read."""

    code: str
    """``ok``, ``missing``, ``io``, ``truncated``, ``checksum``, ``index``, ``unsupported`` or ``memory``."""
    error: str
    """One line with clip, file and reason. Empty if ok."""
    data: npt.NDArray[np.uint8]
    """The plan's packets end to end, or a Matroska file."""
    sizes: Integers
    """(P,) bytes of each packet as stored."""
    packets: Integers
    pictures: npt.NDArray[np.int32]
    runs: Integers
    """As in ``Plan``."""

    def split(self) -> list[npt.NDArray[np.uint8]]:
        """``data`` as one array per packet. Not for a Matroska file."""
        return np.split(self.data, np.cumsum(self.sizes)[:-1])


class Reader:
    """Reads packets from a store's shards with a pool of threads and verifies each checksum.

    Thread-safe. Releases the GIL. Shards are opened on first use.

    Args:
        index: The store's index.
        directory: Folder of the shards.
        threads: Number of threads.
    """

    def __init__(self, index: Index, directory: str | os.PathLike[str], *, threads: int = 4):
        self._native = _sampler.Reader(index.native, os.fsencode(directory), threads)

    def read(
        self, clips: npt.ArrayLike, frames: npt.ArrayLike, *, miniclip: bool = False, single_stream: bool = True
    ) -> list[Read]:
        """Read the packets of a batch.

        Args:
            clips: (B,) numbers of clips.
            frames: (B, V) frame numbers in presentation order.
            miniclip: Whether to wrap the packets into a Matroska file, whose frames ``Read.pictures`` numbers. Implies
                ``single_stream``.
            single_stream: As in :func:`plan_packets`.

        Returns:
            One ``Read`` per clip. Damaged data does not raise: see ``Read.code``.

        Raises:
            IndexError: No such clip or frame.
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
    """Write the index of a store atomically.

    Args:
        path: File to write.
        clips: The clips. May be a generator: only 128 bytes per clip stay in memory.
        format: Name of the store format.
        shards: File name and size in bytes of each shard.

    Returns:
        The number of clips.

    Raises:
        ValueError: A record is invalid. The message names the clip and the field.
        OSError: The file cannot be written.
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
        rotation=clip.rotation + 360 * clip.mirror,
        shard=clip.shard,
        time_base=(time_base.numerator, time_base.denominator),
        end=clip.end,
        **arrays,
    )


def exact_array(values: npt.ArrayLike, dtype: str, name: str) -> npt.NDArray[Any]:
    """``values`` as a C-ordered array of an integer dtype. ValueError if a value is no integer or does not fit."""
    array = np.asarray(values)
    if array.dtype == dtype and array.flags.c_contiguous:
        return array
    if array.size and array.dtype.kind not in "iu":
        raise ValueError(f"{name} has dtype {array.dtype}, must be integers")
    limits = np.iinfo(dtype)
    if array.size and (int(array.min()) < limits.min or int(array.max()) > limits.max):
        raise ValueError(f"{name} has values from {array.min()} to {array.max()}, must fit {dtype}")
    return array.astype(dtype, order="C")
