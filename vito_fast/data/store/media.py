"""Sequential decoding of any video file: the reference for every faster way of reading.

Frames are identified by *tokens*: the position of their packet in decoding order, passed through the decoder as the
packet's pts. So a frame is tied to its packet even if the file's own timestamps are missing, repeated or out of order.
"""

import contextlib
import threading
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
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from vito_fast.data.store.description import H264, Limits

PLAYLISTS = frozenset(["concat", "dash", "hls", "image2", "imf", "sdp"])
"""FFmpeg's formats of files that refer to other files, possibly outside the source folder."""


def for_ffmpeg(path: Path) -> str:
    """The path as FFmpeg must get it: absolute. It takes a relative path with a colon (``10:00.mp4``) for a URL."""
    return str(path.absolute())


class BadVideo(Exception):
    """A file that cannot be packed. The message is the reason in the quarantine list."""


@contextlib.contextmanager
def opened(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open a file.

    Yields:
        The container and its first video stream.

    Raises:
        BadVideo: FFmpeg or the file system reports an error, also one inside the ``with`` block.
    """
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
    except MemoryError:
        raise BadVideo("over a limit: memory") from None


def demuxed(container: InputContainer, stream: VideoStream) -> Iterator[av.Packet]:
    """Yield the stream's packets in decoding order, none empty. DivX packs a B-frame into the packet of another frame;
    such packets are split, so that each packet is one frame."""
    codec = stream.codec_context.codec.canonical_name
    unpack = BitStreamFilterContext("mpeg4_unpack_bframes", stream) if codec == "mpeg4" else None
    for packet in container.demux(stream):
        if packet.size:
            yield from unpack.filter(packet) if unpack else [packet]
    if unpack:
        yield from unpack.filter(None)


def claimed_rate(stream: VideoStream) -> Fraction:
    """Frames per second as the file states or FFmpeg guesses them. Guesses above 240 are the container's clock: 25."""
    guess = stream.guessed_rate
    return stream.average_rate or (guess if guess and guess <= 240 else Fraction(25))


def decoder_options(codec: str, *, bare: bool = False) -> dict[str, str]:
    """FFmpeg's options that make a decoder report damage as an error instead of concealing it.

    For H.264 there is none: the decoder would take the first frames of an open group for damage. It marks concealed
    frames. With ``bare`` packets, no container states how far H.264 frames are reordered. The longest reordering is
    then assumed, so that no frame is lost.
    """
    if codec != H264.codec:
        return {"err_detect": "crccheck+explode"}
    return {"strict": "strict"} if bare else {}


@dataclass
class Source:
    """One video file, decoded in order by :meth:`frames`, which fills in the fields.

    ``pts`` (ticks of ``time_base``, or None) and ``discard`` (outside the edit list: decoded, never shown) have one
    entry per packet, in decoding order.
    """

    path: Path
    limits: Limits = field(default_factory=Limits)
    width: int = 0
    height: int = 0
    codec: str = ""
    time_base: Fraction = Fraction(1)
    rate: Fraction = Fraction(25)
    """Frames per second as the file claims. Its timestamps may differ."""
    extradata: bytes = b""
    pts: list[int | None] = field(default_factory=list)
    discard: list[bool] = field(default_factory=list)

    def frames(self, on_packet=None) -> Iterator[tuple[int, VideoFrame]]:
        """Decode the file.

        Args:
            on_packet: Called with each ``av.Packet`` before it is decoded.

        Yields:
            (token, frame) in presentation order.

        Raises:
            BadVideo: The decoder reports an error, or marks a frame as corrupt. It would otherwise show a copy of the
                previous frame.
        """
        with opened(self.path) as (container, stream):
            yield from self._decode(container, stream, on_packet)

    def _decode(self, container, stream, on_packet) -> Iterator[tuple[int, VideoFrame]]:
        context = stream.codec_context
        self.width, self.height, self.codec = context.width, context.height, context.codec.canonical_name
        context.thread_count, context.options = 1, decoder_options(self.codec)
        check_pixels(self.width, self.height, self.limits)
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
                check_pixels(frame.width, frame.height, self.limits)
                if len(seen) > self.limits.frames:
                    raise BadVideo(f"over a limit: more than {self.limits.frames} frames")
                yield token, frame
        shown = len(self.pts) - sum(self.discard)
        if not seen:
            raise BadVideo("holds no frame")
        if len(seen) < 0.9 * shown:
            raise BadVideo(f"only {len(seen)} of {shown} frames can be decoded")


def check_pixels(width: int, height: int, limits: Limits) -> None:
    """Raises BadVideo for frames beyond the limit."""
    if width * height > limits.pixels:
        raise BadVideo(f"over a limit: {width} x {height} pixels, more than {limits.pixels}")


def _unclaimed(seen: set[int], count: int) -> int:
    return next(token for token in range(count + len(seen) + 1) if token not in seen)


def presentation_times(pts: Sequence[int | None], step: int = 1) -> np.ndarray:
    """Presentation times of frames from the pts of their packets.

    Valid times pass unchanged. Times out of order, as some muxers write them, are sorted. Repeated times move up by one
    tick. Missing ones are ``step`` after the previous one.

    Args:
        pts: Ticks of the frames, in the decoder's output order.
        step: Ticks per frame.

    Returns:
        (n,) int64, strictly increasing.
    """
    ticks: list[int] = []
    for value in pts:
        ticks.append(value if value is not None else (ticks[-1] + step if ticks else 0))
    ordered = np.sort(np.asarray(ticks, np.int64))
    index = np.arange(len(ordered), dtype=np.int64)
    return np.maximum.accumulate(ordered - index) + index


_scalers = threading.local()


def _scaler(height: int | None, width: int | None, interpolation: str) -> VideoReformatter:
    """This thread's scaler for a size. A frame's own one computes its filters and starts its threads every time."""
    cache: dict[str, VideoReformatter] = _scalers.__dict__
    key = f"{height} {width} {interpolation}"
    if key not in cache:
        if len(cache) >= 16:
            cache.clear()
        cache[key] = VideoReformatter()
    return cache[key]


def rgb(
    frame: VideoFrame, size: tuple[int, int] | None = None, *, turn: bool = True, interpolation: str = "BICUBIC"
) -> np.ndarray:
    """Convert a frame to RGB by its own color matrix. An unknown matrix is read as BT.601, as swscale does.

    Args:
        frame: A decoded frame.
        size: Height and width of the result.
        turn: Whether to rotate the frame upright.
        interpolation: Of swscale. BICUBIC filters before it shrinks; AREA is cheaper.

    Returns:
        (H, W, 3) uint8, contiguous.
    """
    quarter = round(frame.rotation / 90) % 4 if turn else 0
    height, width = size or (None, None)
    if quarter % 2:
        height, width = width, height
    scaler = _scaler(height, width, interpolation)
    array = scaler.reformat(frame, width, height, "rgb24", interpolation=interpolation, threads=1).to_ndarray()
    return np.ascontiguousarray(np.rot90(array, quarter)) if quarter else array


def gray(frame: VideoFrame, size: tuple[int, int]) -> np.ndarray:
    """The luma of a frame in full range, (H, W) uint8, upright. Arguments as of :func:`rgb`."""
    quarter = round(frame.rotation / 90) % 4
    height, width = size[::-1] if quarter % 2 else size
    scaler = _scaler(height, width, "AREA gray")
    array = scaler.reformat(frame, width, height, "gray", interpolation="AREA", threads=1).to_ndarray()
    return np.ascontiguousarray(np.rot90(array, quarter))


def upright(frame: VideoFrame) -> tuple[int, int]:
    """Height and width of the frame after its rotation."""
    turned = round(frame.rotation / 90) % 2
    return (frame.width, frame.height) if turned else (frame.height, frame.width)


def fitted(height: int, width: int, short_side: int) -> tuple[int, int]:
    """Height and width scaled to ``short_side``, both even. Smaller frames are not enlarged."""
    scale = min(1.0, short_side / min(height, width))
    return max(2, round(height * scale / 2) * 2), max(2, round(width * scale / 2) * 2)


def bare_packet(payload: Any, number: int) -> av.Packet:
    """A packet of ``payload`` (any buffer) without side data, with ``number`` as pts and dts.

    It is allocated by size, so that FFmpeg pads it with zeros. Decoders read past the end: without the padding, MPEG-4
    decoding differs from run to run.
    """
    data = memoryview(payload)
    packet = av.Packet(data.nbytes)
    packet.update(data)
    packet.pts = packet.dts = number
    return packet
