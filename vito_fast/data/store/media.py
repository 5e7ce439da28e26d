"""Sequential decoding of any video file: the truth that every faster way of reading is compared with.

Frames are told apart by *tokens*: each packet's place in decoding order, handed through the decoder in the packet's
pts. So a frame is tied to the packet it came from even where a file's own times are missing, repeated or out of order.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.bitstream import BitStreamFilterContext
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

VIDEO_SUFFIXES = frozenset(
    [
        ".3gp",
        ".asf",
        ".avi",
        ".divx",
        ".flv",
        ".gif",
        ".h264",
        ".hevc",
        ".ivf",
        ".m2ts",
        ".m2v",
        ".m4v",
        ".mjpeg",
        ".mkv",
        ".mov",
        ".mp4",
        ".mpeg",
        ".mpg",
        ".mts",
        ".mxf",
        ".ogv",
        ".qt",
        ".ts",
        ".vob",
        ".webm",
        ".wmv",
        ".y4m",
    ]
)


PLAYLISTS = frozenset(["concat", "dash", "hls", "image2", "imf", "sdp"])
"""FFmpeg's formats of files that name other files, wherever those may lie."""


def for_ffmpeg(path: Path) -> str:
    """The only form in which FFmpeg, or a reader that uses it, is given a path: absolute. It takes a relative one for a
    URL where there is a colon in it: a folder ``http:``, a file ``10:00.mp4``."""
    return str(path.absolute())


class BadVideo(Exception):
    """A file that cannot be used; the message is the reason that goes to the quarantine list."""


@contextlib.contextmanager
def opened(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The file's container and first video stream; what FFmpeg or the file system says against it becomes BadVideo."""
    try:
        with av.open(for_ffmpeg(path), metadata_errors="ignore") as container:
            if container.format.name in PLAYLISTS:
                raise BadVideo("a playlist, not a video")
            stream = container.streams.best("video")
            if not isinstance(stream, VideoStream):
                raise BadVideo("no video stream")
            if stream.codec_context is None:
                raise BadVideo("no decoder for its codec")
            if container.format.name.startswith("mov"):  # MP4: its index says how long the file must be
                end = max((entry.pos + entry.size for entry in stream.index_entries), default=0)
                if end > path.stat().st_size:
                    raise BadVideo(f"cut short: {path.stat().st_size} bytes of at least {end}")
            yield container, stream
    except av.FFmpegError as error:
        raise BadVideo(f"cannot be decoded: {error.strerror}") from None


def demuxed(container: InputContainer, stream: VideoStream) -> Iterator[av.Packet]:
    """The stream's packets in decoding order, none empty. DivX files pack a B-frame into the packet of another frame:
    these are taken apart, so that a packet is a frame."""
    codec = stream.codec_context.codec.canonical_name
    unpack = BitStreamFilterContext("mpeg4_unpack_bframes", stream) if codec == "mpeg4" else None
    for packet in container.demux(stream):
        if packet.size:
            yield from unpack.filter(packet) if unpack else [packet]
    if unpack:
        yield from unpack.filter(None)


def claimed_rate(stream: VideoStream) -> Fraction:
    """Frames a second. Where the file names none FFmpeg guesses, and without a clue its guess is the container's clock:
    1000 for a browser's recording."""
    guess = stream.guessed_rate
    return stream.average_rate or (guess if guess and guess <= 240 else Fraction(25))


def strictness(codec: str) -> dict[str, str]:
    """Options of a decoder by which damage is an error, not something hidden behind what was there before.

    None for H.264, whose decoder then takes the first pictures of an open group for damage; what it conceals it marks.
    """
    return {} if codec == "h264" else {"err_detect": "crccheck+explode"}


@dataclass
class Source:
    """One video file being decoded in order by :meth:`frames`; the packet lists fill up as it goes.

    After :meth:`frames` is exhausted ``pts`` (container ticks of ``time_base``, or None), ``sizes`` and ``discard``
    (outside the edit list: decoded, never shown) have one entry per packet in decoding order.
    """

    path: Path
    width: int = 0
    height: int = 0
    codec: str = ""
    time_base: Fraction = Fraction(1)
    rate: Fraction = Fraction(25)
    """Frames a second as the file claims them; its times may say otherwise."""
    extradata: bytes = b""
    pts: list[int | None] = field(default_factory=list)
    discard: list[bool] = field(default_factory=list)

    def frames(self, on_packet=None) -> Iterator[tuple[int, VideoFrame]]:
        """Yields (token, frame) in presentation order; ``on_packet(av.Packet)`` sees every packet before it is decoded.

        Raises BadVideo on anything a decoder complains of, and on frames it marks as corrupt: a software decoder
        otherwise hides damage behind a copy of the frame before.
        """
        with opened(self.path) as (container, stream):
            yield from self._decode(container, stream, on_packet)

    def _decode(self, container, stream, on_packet) -> Iterator[tuple[int, VideoFrame]]:
        context = stream.codec_context
        self.width, self.height, self.codec = context.width, context.height, context.codec.canonical_name
        context.thread_count, context.options = 1, strictness(self.codec)
        self.time_base = stream.time_base
        self.rate = claimed_rate(stream)
        self.extradata = context.extradata or b""
        seen: set[int] = set()
        for packet in chain(demuxed(container, stream), [None]):
            if packet is not None:
                if packet.is_corrupt:
                    raise BadVideo(f"packet {len(self.pts)} is damaged or cut short")
                if on_packet is not None:
                    on_packet(packet)
                self.pts.append(packet.pts if packet.pts is not None else packet.dts)
                self.discard.append(packet.is_discard)
                packet.pts = len(self.pts) - 1
            for frame in context.decode(packet):
                if frame.is_corrupt:
                    raise BadVideo(f"frame {len(seen)} is damaged")
                token = frame.pts
                if token is None or token in seen or not 0 <= token < len(self.pts):
                    token = _unclaimed(seen, len(self.pts))
                seen.add(token)
                yield token, frame
        shown = len(self.pts) - sum(self.discard)
        if not seen:
            raise BadVideo("holds no frame")
        if len(seen) < 0.9 * shown:
            raise BadVideo(f"only {len(seen)} of {shown} frames can be decoded")


def _unclaimed(seen: set[int], count: int) -> int:
    return next(token for token in range(count + len(seen) + 1) if token not in seen)


def presentation_times(pts: Sequence[int | None], step: int = 1) -> np.ndarray:
    """Ticks (int64, strictly increasing) of frames in the order the decoder gave them in, from their packets' pts.

    Good files pass unchanged. Where pts are out of order (written in decoding order by careless muxers) the same ticks
    are handed out in order; repeated ticks move up by one; missing ones are ``step`` after the one before.
    """
    ticks: list[int] = []
    for value in pts:
        ticks.append(value if value is not None else (ticks[-1] + step if ticks else 0))
    ordered = np.sort(np.asarray(ticks, np.int64))
    index = np.arange(len(ordered), dtype=np.int64)
    return np.maximum.accumulate(ordered - index) + index


def rgb(frame: VideoFrame, size: tuple[int, int] | None = None, *, turn: bool = True) -> np.ndarray:
    """The frame as (H, W, 3) uint8 RGB by its own colour matrix, turned upright; ``size`` (h, w) is after the turn.

    Resizing is swscale's bicubic, which filters before it shrinks. Frames of unknown matrix are read as BT.601, as
    swscale does.
    """
    quarter = round(frame.rotation / 90) % 4 if turn else 0
    height, width = size or (None, None)
    if quarter % 2:
        height, width = width, height
    array = frame.to_ndarray(format="rgb24", width=width, height=height, interpolation="BICUBIC")
    return np.ascontiguousarray(np.rot90(array, quarter)) if quarter else array


def upright(frame: VideoFrame) -> tuple[int, int]:
    """(height, width) of the frame once turned upright."""
    turned = round(frame.rotation / 90) % 2
    return (frame.width, frame.height) if turned else (frame.height, frame.width)


def fitted(height: int, width: int, short_side: int) -> tuple[int, int]:
    """(h, w) with the short side at ``short_side``, both even, the shape kept; smaller pictures are not enlarged."""
    scale = min(1.0, short_side / min(height, width))
    return max(2, round(height * scale / 2) * 2), max(2, round(width * scale / 2) * 2)


def bare_packet(payload: Any, number: int) -> av.Packet:
    """A packet of nothing but its bytes (anything with a buffer) and, as pts and dts, its number.

    Made by size first: FFmpeg then pads it with zeros, as decoders that read a little past the end demand. A packet
    made of bytes directly ends in whatever lies behind them in memory, and MPEG-4 decoding then differs from run to
    run.
    """
    data = memoryview(payload)
    packet = av.Packet(data.nbytes)
    packet.update(data)
    packet.pts = packet.dts = number
    return packet
