"""Sequential decoding of any video file: the reference for every faster way of reading.

Frames are identified by *tokens*: the position of their packet in decoding order, passed through the decoder as the
packet's pts. So a frame is tied to its packet even if the file's own timestamps are missing, repeated or out of order.
"""

import contextlib
import errno
import io
import os
import re
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import av.logging
import numpy as np
from av.bitstream import BitStreamFilterContext
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from vito_fast.data.store.description import H264, Limits
from vito_fast.data.store.index import DISPOSABLE, KEY, packet_flags
from vito_fast.data.store.picture import SQUARE, kinds, orientation, traits

PLAYLISTS = frozenset(["concat", "dash", "hls", "image2", "imf", "sdp"])
"""FFmpeg's formats of files that refer to other files, possibly outside the source folder."""
CLOSED = {"protocol_whitelist": "none"}
"""FFmpeg's options that let a file open no other."""


def for_ffmpeg(path: Path) -> str:
    """The path as FFmpeg must get it: absolute. It takes a relative path with a colon (``10:00.mp4``) for a URL."""
    return str(path.absolute())


class BadVideo(Exception):
    """A file that cannot be packed. The message is the reason in the quarantine list."""


class Unreadable(BadVideo):
    """The system failed to read a file: a fault of a disk or of the network, not of the file."""


@dataclass(frozen=True)
class Member:
    """A file within another, as in a tar archive: ``size`` bytes from ``offset``."""

    path: Path
    offset: int
    size: int
    suffix: str


class SourceFile(io.FileIO):
    """A file, or a member of one, that remembers a failed read: FFmpeg takes some failures for the file's end."""

    fault: OSError | None = None

    def __init__(self, path: Path | Member):
        super().__init__(path.path if isinstance(path, Member) else path)
        self._start = path.offset if isinstance(path, Member) else 0
        self._size = path.size if isinstance(path, Member) else None
        super().seek(self._start)

    def read(self, size: int | None = -1, /) -> bytes:
        size = -1 if size is None else size
        if self._size is not None:
            left = max(0, self._size - self.tell())
            size = min(size, left) if size >= 0 else left
        try:
            return super().read(size)
        except OSError as error:
            self.fault = error
            raise

    def readinto(self, buffer: Any, /) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def tell(self) -> int:
        return super().tell() - self._start

    def seek(self, place: int, whence: int = 0, /) -> int:
        if whence == os.SEEK_SET:
            place += self._start
        elif whence == os.SEEK_END and self._size is not None:
            place, whence = place + self._start + self._size, os.SEEK_SET
        try:
            return super().seek(place, whence) - self._start
        except OSError as error:
            if error.errno == errno.EINVAL:  # before the file's begin
                return -1
            self.fault = error
            raise


def unreadable(error: OSError) -> BadVideo:
    """What an OSError of a source says: :class:`Unreadable`, unless it is the file's own, such as its permissions."""
    own = error.errno in (errno.EACCES, errno.EPERM, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG)
    return (BadVideo if own else Unreadable)(f"cannot be read: {error.strerror or error}")


@contextlib.contextmanager
def opened(path: Path | Member) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open a file.

    Yields:
        The container and its first video stream.

    Raises:
        Unreadable: The system cannot read the file, also inside the ``with`` block.
        BadVideo: FFmpeg reports an error, also inside the ``with`` block.
    """
    try:
        file = SourceFile(path)
    except OSError as error:
        raise unreadable(error) from None
    with file:
        file.name = f"video{path.suffix}"  # FFmpeg takes some names for URLs
        try:
            with av.open(file, metadata_errors="ignore", buffer_size=1 << 17, options=CLOSED) as container:
                if container.format.name in PLAYLISTS:
                    raise BadVideo("a playlist, not a video")
                stream = container.streams.best("video")
                if not isinstance(stream, VideoStream):
                    raise BadVideo("no video stream")
                if stream.codec_context is None:
                    raise BadVideo("no decoder for its codec")
                yield container, stream
            if file.fault:
                raise file.fault
        except av.FFmpegError as error:
            raise unreadable(file.fault) if file.fault else BadVideo(f"cannot be decoded: {error.strerror}") from None
        except MemoryError:
            raise BadVideo("over a limit: memory") from None
        except OSError as error:
            if error is not file.fault:
                raise
            raise unreadable(error) from None


def missing_end(container: InputContainer, stream: VideoStream) -> str | None:
    """The reason if a file is shorter than its MP4 index says."""
    if not container.format.name.startswith("mov"):
        return None
    end = max((entry.pos + entry.size for entry in stream.index_entries), default=0)
    return f"cut short: {container.size} bytes of at least {end}" if end > container.size else None


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


def check_pixels(width: int, height: int, limits: Limits) -> None:
    """Raises BadVideo for frames beyond the limit."""
    if width * height > limits.pixels:
        raise BadVideo(f"over a limit: {width} x {height} pixels, more than {limits.pixels}")


REPORTING = frozenset(["h264", "mpeg1video", "mpeg2video", "mpeg4"])
"""Codecs whose decoders report every frame of which data are missing."""
MISSING = re.compile("reference picture missing|missing reference picture|co located POCs unavailable", re.IGNORECASE)
"""H.264's only report of a reference that was lost. The decoder puts another picture in its place."""


@contextlib.contextmanager
def _errors() -> Iterator[list[tuple[int, str, str]]]:
    """Collect what FFmpeg logs as errors in this thread."""
    level = av.logging.get_level()
    av.logging.set_level(av.logging.ERROR)
    try:
        with av.logging.Capture() as errors:
            yield errors
    finally:
        av.logging.set_level(level)


class Gate:
    """Decodes the packets of one stream, and tells the frames that damage reaches from the good ones.

    Strictly, any damage raises BadVideo. To salvage, frames are good that neither are flagged by the decoder nor depend
    on a packet that is damaged or lost: after one, the next good frame is that of a key.

    Args:
        context: The decoder.
        limits: Of the file.
        salvage: Whether to go on after damage.
    """

    REORDER = 16
    """Most frames by which a codec reorders."""

    def __init__(self, context: av.VideoCodecContext, limits: Limits, *, salvage: bool):
        self._context, self._limits, self._salvage = context, limits, salvage
        self._codec, self._extradata = context.codec.canonical_name, context.extradata or b""
        self._keys = [0]
        self._disposable: set[int] = set()
        """Numbers of packets that no other refers to."""
        self._damaged: set[int] = set()
        self._lost: list[int] = []
        """Numbers of the damaged packets that others may refer to, in order."""
        self._seen: set[int] = set()
        self._complete = -1
        """All frames up to this number are decoded."""
        self._pending: deque[tuple[int, VideoFrame]] = deque()
        self._shown: set[int] = set()
        self.count = 0
        """Packets so far."""
        self.reasons: list[str] = []
        """What is damaged."""

    def frames(
        self, packets: Iterable[av.Packet], prepare: Callable[[av.Packet], av.Packet]
    ) -> Iterator[tuple[int, VideoFrame, int | None]]:
        """Decode.

        Args:
            packets: In decoding order, none empty.
            prepare: Returns the packet that the decoder gets, with the packet's number as pts.

        Yields:
            Number of the frame's packet, the frame, and the number of the run of undisturbed packets that it belongs
            to, None if it is not good; in presentation order.

        Raises:
            BadVideo: Damage, unless it is to be salvaged, or the file is beyond a limit.
        """
        for packet, following in self._with_following(iter(packets)):
            number, self.count = self.count, self.count + 1
            flags = self._flags(packet) if self._salvage else 0
            if flags & KEY and number:
                self._keys.append(number)
            if flags & DISPOSABLE:
                self._disposable.add(number)
            if packet.is_corrupt and not (self._salvage and self._ends(following)):
                self._disposable.discard(number)  # packets after it may be missing, too
                self.damage(f"packet {number} is damaged or cut short", number)
            yield from self._release(self._decode(number, prepare(packet)))
        yield from self._release(self._decode(self.count, None), end=True)

    def damage(self, reason: str, number: int | None = None) -> None:
        """Note damage, of packet ``number`` if it is known."""
        if not self._salvage:
            raise BadVideo(reason)
        self.reasons.append(reason)
        if number is not None:
            self._damaged.add(number)
            if number not in self._disposable:
                self._lost.insert(bisect_left(self._lost, number), number)

    def _with_following(self, packets: Iterator[av.Packet]) -> Iterator[tuple[av.Packet, list[av.Packet]]]:
        """Each packet and up to two after it. A file whose rest cannot be demuxed ends there."""
        ahead: list[av.Packet] = []
        more = True
        while more or ahead:
            try:
                packet = next(packets, None) if more else None
            except av.FFmpegError as error:
                self.damage(f"cannot be read after packet {self.count + len(ahead)}: {error.strerror}")
                packet = None
            more = packet is not None
            ahead += [packet] if packet else []
            while len(ahead) > (2 if more else 0):
                yield ahead[0], ahead[1:]
                ahead.pop(0)

    def _ends(self, following: list[av.Packet]) -> bool:
        """Whether a packet that the container calls corrupt is merely the last of a segment, as in files end to end.

        The container's parser marks one of the last two packets. What is amiss with them, these decoders say.
        """
        return self._codec in REPORTING and any(self._flags(packet) & KEY for packet in following)

    def _flags(self, packet: av.Packet) -> int:
        flags = packet_flags(self._codec, self._extradata, bytes(packet))
        return flags if flags is not None else KEY * packet.is_keyframe

    def _decode(self, number: int, packet: av.Packet | None) -> list[VideoFrame]:
        if not self._salvage:
            return self._context.decode(packet)
        frames: list[VideoFrame] = []
        with _errors() as errors:
            try:
                frames = self._context.decode(packet)
            except av.FFmpegError as error:
                if isinstance(error, MemoryError):
                    raise
                self.damage(f"packet {number} cannot be decoded: {error.strerror}", number)
        for _, name, text in errors:
            if number not in self._damaged and MISSING.search(text):
                self.damage(f"packet {number} refers to a missing one: {name}: {text.strip()}", number)
        return frames

    def _release(
        self, frames: Iterable[VideoFrame], *, end: bool = False
    ) -> Iterator[tuple[int, VideoFrame, int | None]]:
        """Take decoded frames and yield those whose references are all decoded, by reordering at most ``REORDER``."""
        for frame in frames:
            token = frame.pts
            if token is None or token in self._seen or not 0 <= token < self.count:
                token = next(number for number in range(self.count + len(self._seen) + 1) if number not in self._seen)
            if frame.is_corrupt:
                self.damage(f"frame {len(self._seen)} is damaged", token)
            self._seen.add(token)
            while self._complete + 1 in self._seen:
                self._complete += 1
            check_pixels(frame.width, frame.height, self._limits)
            if len(self._seen) > self._limits.frames:
                raise BadVideo(f"over a limit: more than {self._limits.frames} frames")
            self._pending.append((token, frame))
        keep = 0 if end or not self._salvage else self.REORDER
        while self._pending and (len(self._pending) > keep or self._pending[0][0] <= self._complete):
            token, frame = self._pending.popleft()
            run = bisect_left(self._lost, token) if self._good(token) else None
            self._shown.add(token)
            yield token, frame, run

    def _good(self, token: int) -> bool:
        """Whether no loss reaches a frame, from its key on or, if it is shown before its key, from the key before."""
        if token in self._damaged:
            return False
        place = bisect_right(self._keys, token) - 1
        begin = self._keys[place]
        if place and token != begin and begin not in self._shown:
            begin = self._keys[place - 1]
        return bisect_left(self._lost, begin) == bisect_right(self._lost, token)


@dataclass
class Source:
    """One video file, decoded in order by :meth:`frames`, which fills in the fields.

    ``pts`` (ticks of ``time_base``, or None) and ``discard`` (outside the edit list: decoded, never shown) have one
    entry per packet, in decoding order.
    """

    path: Path | Member
    limits: Limits = field(default_factory=Limits)
    salvage: bool = False
    """Whether to pass over damage. Otherwise it raises BadVideo."""
    heartbeat: Callable[[], None] = lambda: None
    """Called for each packet."""
    width: int = 0
    height: int = 0
    codec: str = ""
    time_base: Fraction = Fraction(1)
    rate: Fraction = Fraction(25)
    """Frames per second as the file claims. Its timestamps may differ."""
    aspect: Fraction = SQUARE
    """Width of a pixel by its height."""
    extradata: bytes = b""
    pts: list[int | None] = field(default_factory=list)
    discard: list[bool] = field(default_factory=list)
    run: int = 0
    """Number of the run of undisturbed packets that the last frame belongs to."""
    lost: int = 0
    """Frames that were left out."""
    damage: list[str] = field(default_factory=list)
    """What was passed over."""
    kinds: set[str] = field(default_factory=set)
    """What is out of the ordinary: see :func:`kinds`."""
    traits: list[str] = field(default_factory=list)
    """Of the first frame: see :func:`traits`."""

    def frames(self) -> Iterator[tuple[int, VideoFrame]]:
        """Decode the file.

        Yields:
            (token, frame) in presentation order.

        Raises:
            BadVideo: The decoder reports an error, or marks a frame as corrupt. It would otherwise show a copy of the
                previous frame.
        """
        with opened(self.path) as (container, stream):
            yield from self._decode(container, stream)

    def _decode(self, container: InputContainer, stream: VideoStream) -> Iterator[tuple[int, VideoFrame]]:
        context = stream.codec_context
        self.width, self.height, self.codec = context.width, context.height, context.codec.canonical_name
        context.thread_count, context.options = 1, decoder_options(self.codec)
        check_pixels(self.width, self.height, self.limits)
        self.time_base = stream.time_base or Fraction(1, 90000)
        self.rate = claimed_rate(stream)
        self.extradata = context.extradata or b""
        gate = Gate(context, self.limits, salvage=self.salvage)
        self.damage, aspects = gate.reasons, Aspects(stream)
        if reason := missing_end(container, stream):
            gate.damage(reason)
        count = 0
        for token, frame, run in gate.frames(demuxed(container, stream), self._number):
            if run is not None:
                count += 1
                self.run, self.aspect = run, aspects.now()
                self.kinds |= kinds(frame, self.aspect)
                self.traits = self.traits or traits(frame, self.aspect, *orientation(frame))
                yield token, frame
        shown = len(self.pts) - sum(self.discard)
        self.lost = max(0, shown - count)
        if not count:
            raise BadVideo(self.damage[0] if self.damage else "holds no frame")
        if count < 0.9 * shown:
            gate.damage(f"only {count} of {shown} frames can be decoded")

    def _number(self, packet: av.Packet) -> av.Packet:
        self.pts.append(packet.pts if packet.pts is not None else packet.dts)
        self.discard.append(packet.is_discard)
        packet.pts = len(self.pts) - 1
        self.heartbeat()
        return packet


class Aspects:
    """The aspect ratio of a stream's pixels, which may change while it is decoded."""

    def __init__(self, stream: VideoStream):
        self._context = stream.codec_context
        self._first, self._stream = self._context.sample_aspect_ratio, stream.sample_aspect_ratio

    def now(self) -> Fraction:
        """That of the frame decoded last. Ratios beyond 1 to 8 are taken for errors."""
        own = self._context.sample_aspect_ratio
        ratio = (own if own != self._first else self._stream) or SQUARE
        return ratio if SQUARE / 8 <= ratio <= 8 else SQUARE


def presentation_times(pts: Sequence[int | None], step: int = 1, restart: int | None = None) -> np.ndarray:
    """Presentation times of frames from the pts of their packets.

    Valid times pass unchanged. Times out of order, as some muxers write them, are sorted. Repeated times move up by one
    tick. Missing ones are ``step`` after the previous one.

    Args:
        pts: Ticks of the frames, in the decoder's output order.
        step: Ticks per frame.
        restart: Ticks. Times that go back by more, to about the first time, begin again, as in files end to end: they
            continue after the previous ones. None: they are sorted.

    Returns:
        (n,) int64, strictly increasing.
    """
    ticks: list[int] = []
    shift, last = 0, 0
    for value in pts:
        if value is None:
            value = last + step if ticks else 0
        elif restart is not None and ticks and value < last - restart and value < ticks[0] + restart // 2:
            shift = max(ticks) + step - value
        ticks.append(value + shift)
        last = value
    ordered = np.sort(np.asarray(ticks, np.int64))
    index = np.arange(len(ordered), dtype=np.int64)
    return np.maximum.accumulate(ordered - index) + index


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
