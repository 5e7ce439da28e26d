"""Re-encoding: a decoded video becomes clips of JPEGs or of H.264 with short groups of pictures."""

import io
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Protocol, TypeVar

import av
import av.filter
import numpy as np
from av.video.frame import VideoFrame
from PIL import Image

from vito_fast.data.pack.clips import (
    CLOCK,
    GAP,
    PackedClip,
    PackedFile,
    ShardWriter,
    Span,
    TimeSpan,
    frame_duration,
    too_short,
)
from vito_fast.data.pack.shots import mark_cuts
from vito_fast.data.store.description import H264, JPEG, Limits, PackOptions
from vito_fast.data.store.index import KEY, checksum, packet_flags
from vito_fast.data.store.media import BadVideo, Member, Source, presentation_times
from vito_fast.data.store.picture import HDR, PixelFormat, fitted, rgb, scaled, shown_size

T = TypeVar("T")

TICKS = Fraction(1, 720000)
"""Time base of re-encoded clips. A frame of 23.976, 24, 25, 29.97, 30, 48, 50, 59.94, 60, 119.88 or 120 fps lasts a
whole number of ticks."""

BT601, LIMITED_RANGE = 6, 1  # FFmpeg's numbers; swscale converts RGB to these by default


class EncoderMissing(Exception):
    """The chosen encoder does not work on this machine."""


class Encoder(Protocol):
    """Encodes the frames of one clip."""

    pixels: PixelFormat
    """Format of the frames that it takes."""

    def encode(self, picture: VideoFrame) -> list[bytes]:
        """Take one frame and return the packets that are ready."""

    def finish(self) -> tuple[list[bytes], bytes]:
        """Return the remaining packets and the codec's extradata."""


class JpegEncoder:
    """Encodes every frame as a JPEG: 4:2:0, BT.601 in full range, as JFIF defines."""

    pixels: PixelFormat = "yuvj420p"

    def __init__(self, options: PackOptions, height: int, width: int, rate: Fraction):
        self._quality = options.quality

    def encode(self, picture: VideoFrame) -> list[bytes]:
        buffer = io.BytesIO()
        try:
            Image.fromarray(rgb(picture, turn=False)).save(buffer, "JPEG", quality=self._quality, subsampling="4:2:0")
        except OSError as error:
            raise BadVideo(f"no JPEG can be made: {picture.width} x {picture.height} pixels: {error}") from None
        return [buffer.getvalue()]

    def finish(self) -> tuple[list[bytes], bytes]:
        return [], b""


class H264Encoder:
    """Encodes closed groups of ``gop`` frames without B-frames: decoding a frame takes ``gop`` packets at most.

    Raises:
        av.FFmpegError: The encoder refuses frames of this size.
        EncoderMissing: FFmpeg has no such encoder.
    """

    pixels: PixelFormat = "yuv420p"

    def __init__(self, options: PackOptions, height: int, width: int, rate: Fraction):
        try:
            context = av.CodecContext.create(options.encoder, "w")
        except (av.FFmpegError, ValueError) as error:
            raise EncoderMissing(f"encoder {options.encoder} is not part of this FFmpeg: {error}") from None
        context.width, context.height, context.pix_fmt = width, height, "yuv420p"
        context.framerate, context.time_base = rate, 1 / rate
        context.gop_size, context.max_b_frames, context.thread_count = options.gop, 0, 1
        context.options = ENCODER_OPTIONS[options.encoder](options, height * width)
        context.colorspace, context.color_range = BT601, LIMITED_RANGE
        self._context, self._count = context, 0
        context.open()

    def encode(self, picture: VideoFrame) -> list[bytes]:
        picture.pts, picture.pict_type = self._count, 0
        self._count += 1
        return [bytes(packet) for packet in self._context.encode(picture)]

    def finish(self) -> tuple[list[bytes], bytes]:
        rest = [bytes(packet) for packet in self._context.encode(None)]
        return rest, self._context.extradata or b""


def _x264_options(options: PackOptions, pixels: int) -> dict[str, str]:
    keys = f"keyint={options.gop}:min-keyint={options.gop}:scenecut=0:open-gop=0:bframes=0:repeat-headers=1"
    if pixels < 64 * 64:  # with mbtree, x264 encodes equal frames of a few macroblocks differently from run to run
        keys += ":mbtree=0"
    return {"crf": str(options.crf), "preset": "fast", "a53cc": "0", "x264-params": keys}


def _nvenc_options(options: PackOptions, pixels: int) -> dict[str, str]:
    return {"rc": "vbr", "cq": str(options.crf), "a53cc": "0", "no-scenecut": "1", "forced-idr": "1", "preset": "p5"}


ENCODER_OPTIONS = dict(zip(H264.encoders, (_x264_options, _nvenc_options), strict=True))
ENCODERS: dict[str, type[JpegEncoder] | type[H264Encoder]] = {
    JPEG.name: JpegEncoder,
    H264.name: H264Encoder,
}


def probe_encoder(options: PackOptions) -> None:
    """Raise EncoderMissing if the encoder refuses even frames of a common size."""
    try:
        H264Encoder(options, 256, 448, Fraction(25))
    except av.FFmpegError as error:
        raise EncoderMissing(f"encoder {options.encoder} cannot be used on this machine: {error.strerror}") from None


def choose_encoder() -> tuple[str, str]:
    """Choose the H.264 encoder: NVENC where it works, else x264.

    Returns:
        FFmpeg's name of the encoder, and one line that states the choice and the reason.
    """
    software, hardware = H264.encoders
    try:
        probe_encoder(PackOptions(H264.name, encoder=hardware))
    except EncoderMissing as error:
        return software, f"encoding by {software}: {error}"
    return hardware, f"encoding by {hardware}"


@dataclass
class _OpenClip:
    encoder: Encoder
    first: int
    scene: tuple[int, int, int]
    moved: int = 0
    """The last frame that differs visibly from those before it."""
    times: list[float] = field(default_factory=list)
    payloads: list[bytes] = field(default_factory=list)


@dataclass
class _Frame:
    picture: VideoFrame
    number: int
    seconds: float
    scene: tuple[int, int, int]
    """Number of the run of undisturbed packets, height and width. A clip has one."""


def deinterlaced(frames: Iterable[tuple[T, VideoFrame, int]]) -> Iterator[tuple[T, VideoFrame, int]]:
    """Deinterlace the frames that are flagged as interlaced, one for one. The others pass unchanged.

    Args:
        frames: An item of any type, its frame, and the number of the run of frames that it belongs to.
    """
    graph, shape, waiting = None, None, deque[tuple[T, int]]()

    def ready() -> Iterator[tuple[T, VideoFrame, int]]:
        while graph is not None:
            try:
                frame = graph.vpull()
            except (av.BlockingIOError, av.EOFError):
                return
            item, run = waiting.popleft()
            yield item, frame, run

    for item, frame, run in frames:
        if graph is None or shape != (run, frame.width, frame.height, frame.format.name):
            if graph is not None:
                graph.vpush(None)
                yield from ready()
            shape = run, frame.width, frame.height, frame.format.name
            graph = av.filter.Graph()
            graph.threads = 1
            source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=TICKS)
            graph.link_nodes(source, graph.add("bwdif", "send_frame:auto:interlaced"), graph.add("buffersink"))
            graph.configure()
        waiting.append((item, run))
        graph.vpush(frame)
        yield from ready()
    if graph is not None:
        graph.vpush(None)
        yield from ready()


class Transcoder:
    """Encodes the frames of one source, in presentation order, into clips appended to a shard."""

    def __init__(
        self,
        options: PackOptions,
        shard: ShardWriter,
        limits: Limits = Limits(),
        spans: Sequence[Span | TimeSpan] | None = None,
    ):
        self.options, self.shard, self.limits = options, shard, limits
        self.spans = spans
        self.format = options.store_format
        self.result = PackedFile()
        self._ranges: list[tuple[int, int]] = []
        self._clip: _OpenClip | None = None
        self._tokens: list[int] = []

    def run(self, path: Path | Member, heartbeat: Callable[[], None] = lambda: None) -> PackedFile:
        """Pack one file.

        Args:
            path: The source.
            heartbeat: Called for each packet.

        Raises:
            BadVideo: The file cannot be packed. The caller then rewinds the shard.
        """
        source = Source(path, self.limits, not self.options.strict, heartbeat)
        if self.spans is None:
            self._run_shots(source)
        else:
            self._run_spans(source, self.spans)
        self.result.kinds, self.result.traits, self.result.lost = sorted(source.kinds), source.traits, source.lost
        self.result.damage = source.damage[0] if source.damage else ""
        return self.result

    def _run_shots(self, source: Source) -> None:
        """Cut the file into clips."""
        latest = 0.0
        for frame, cut, moved in mark_cuts(self._frames(source)):
            number, seconds = frame.number, frame.seconds
            gap = abs(seconds - latest) > GAP
            latest = max(latest, seconds) if number and not gap else seconds
            new_shot = cut is not None and self.options.shot_cuts
            if self._clip and (
                new_shot
                or gap
                or frame.scene != self._clip.scene
                or seconds - self._clip.times[0] >= self.options.clip_length - 1e-6
            ):
                self._close(self._clip, number, source, None if gap else seconds)
                self._clip = None
            if self._clip is None:
                self._clip = _OpenClip(self._encoder(frame.picture, source.rate), number, frame.scene)
            self._clip.payloads += self._clip.encoder.encode(frame.picture)
            self._clip.times.append(seconds)
            self._clip.moved = moved
        if self._clip:
            self._close(self._clip, len(self._tokens), source, None)
        self._set_times(source)

    def _run_spans(self, source: Source, spans: Sequence[Span | TimeSpan]) -> None:
        """Pack the spans of a clip list as they are: no shot is cut, split or left out. Spans may overlap."""
        waiting, clips, zero, seconds = list(reversed(range(len(spans)))), dict[int, _OpenClip](), 0.0, 0.0
        refused = self.result.refused
        for frame, _ in self._frames(source):
            number, zero = frame.number, zero if frame.number else frame.seconds
            seconds = frame.seconds - zero
            for row in [row for row in clips if spans[row].ended(number, seconds)]:
                self._close(clips.pop(row), number, source, frame.seconds, row)
            while waiting and spans[waiting[-1]].begun(number, seconds):
                row = waiting.pop()
                if spans[row].ended(number, seconds):
                    refused.append((row, spans[row].missing(number, seconds)))
                else:
                    clips[row] = _OpenClip(self._encoder(frame.picture, source.rate), number, frame.scene)
            for row, clip in list(clips.items()):
                if frame.scene != clip.scene:
                    refused.append((row, f"damage or another frame size in the clip: at frame {number}"))
                    del clips[row]
                    continue
                clip.payloads += clip.encoder.encode(frame.picture)
                clip.times.append(frame.seconds)
        count = len(self._tokens)
        for row, clip in clips.items():
            if spans[row].ended(count, math.inf):
                self._close(clip, count, source, None, row)
            else:
                waiting.append(row)
        refused += [(row, spans[row].missing(count, seconds)) for row in waiting]
        native, made = self._set_times(source), zip(self.result.rows, self.result.clips, self._ranges, strict=True)
        self.result.rows, self.result.clips = [], []
        for row, packed, (first, _) in sorted(made, key=lambda item: item[0]):
            if spans[row].fits(int(native[first])):
                self.result.rows.append(row)
                self.result.clips.append(packed)
            else:
                reason = f"not the listed file: frame {first} is at tick {native[first]}, not {spans[row].start}"
                refused.append((row, reason))
        refused.sort()

    def _frames(self, source: Source) -> Iterator[tuple[_Frame, VideoFrame]]:
        """Each resized frame with its time, which is exact enough to split shots, and once more for the detector."""
        decoded = (((token, source.aspect), frame, source.run) for token, frame in source.frames())
        size = None
        for (token, aspect), frame, run in deinterlaced(decoded) if self.options.deinterlace else decoded:
            if self.options.hdr == "reject" and frame.color_trc in HDR:
                raise BadVideo(f"HDR: its transfer function is {HDR[frame.color_trc]}")
            before, size = size, fitted(*shown_size(frame, aspect), self.options.short_side)
            number = len(self._tokens)
            if before not in (None, size) and not source.salvage:
                raise BadVideo(f"frame size changes at frame {number}")
            self._tokens.append(token)
            ticks = source.pts[token] if token < len(source.pts) else None
            seconds = float(ticks * source.time_base) if ticks is not None else float(number / source.rate)
            picture = scaled(frame, size, format=ENCODERS[self.format.name].pixels)
            yield _Frame(picture, number, seconds, (run, *size)), picture

    def _encoder(self, picture: VideoFrame, rate: Fraction) -> Encoder:
        height, width = picture.height, picture.width
        try:
            return ENCODERS[self.format.name](self.options, height, width, rate)
        except av.FFmpegError as error:
            probe_encoder(self.options)  # a fault of the machine ends the run; one of this video rejects it alone
            name = self.options.encoder
            raise BadVideo(f"encoder {name} does not open: {width} x {height} pixels: {error.strerror}") from None

    def _close(self, clip: _OpenClip, end: int, source: Source, following: float | None, row: int = 0) -> None:
        """Finish a clip of ``row``. ``following``: the next frame's time, None at the end or before a gap."""
        times = np.sort(clip.times)
        until = times[-1] + frame_duration(times, source.rate) if following is None else max(following, times[-1])
        if self.spans is None and too_short(times[0], until, self.options.min_length):
            self.result.too_short += 1
            return
        if self.spans is None and not self.options.keep_still and clip.moved <= clip.first:
            self.result.still += 1
            return
        rest, extradata = clip.encoder.finish()
        payloads = clip.payloads + rest
        if len(payloads) != len(times):
            raise BadVideo(f"the encoder made {len(payloads)} packets of {len(times)} frames")
        codec = self.format.codec
        assert codec
        flags = [packet_flags(codec, extradata, payload) or 0 for payload in payloads]
        if not flags[0] & KEY:
            raise BadVideo("the encoder's first packet is no key")
        _, height, width = clip.scene
        self.result.clips.append(
            PackedClip(
                codec=codec, width=width, height=height, rotation=0, shard=self.shard.number,
                time_base=TICKS, end=0,
                extradata=extradata, pts=np.empty(0, np.int64),
                offsets=np.array([self.shard.append(payload) for payload in payloads], np.int64),
                sizes=np.array([len(payload) for payload in payloads], np.int64),
                checksums=np.array([checksum(payload) for payload in payloads], np.uint32),
                flags=np.array(flags, np.uint8),
            )
        )  # fmt: skip
        self._ranges.append((clip.first, end))
        if self.spans is not None:
            self.result.rows.append(row)

    def _set_times(self, source: Source) -> np.ndarray:
        """Set exact times, which are known only once the whole file is decoded. Returns the source's own ticks."""
        step = max(1, round(1 / (source.rate * source.time_base)))
        restart = round(GAP / source.time_base) if source.salvage else None
        native = presentation_times([source.pts[token] for token in self._tokens], step, restart)
        ticks = np.array([round(int(t) * source.time_base / TICKS) for t in native], np.int64)
        for clip, (first, end) in zip(self.result.clips, self._ranges, strict=True):
            clip.pts = _constant_rate(ticks[first:end])
            if end < len(ticks) and (ticks[end] - ticks[end - 1]) * TICKS <= GAP:
                following = ticks[end]
            else:
                following = ticks[end - 1] + round(frame_duration(clip.pts * float(TICKS), source.rate) / TICKS)
            clip.end = int(max(following, clip.pts[-1] + 1))
        self.result.rate = 1 / frame_duration(ticks * float(TICKS), source.rate)
        return native


def _constant_rate(ticks: np.ndarray) -> np.ndarray:
    """Evenly spaced ticks, if no given tick is further than ``CLOCK`` from its own. Otherwise ``ticks``."""
    if len(ticks) < 3:
        return ticks
    step = round((ticks[-1] - ticks[0]) / (len(ticks) - 1))
    even = ticks[0] + np.arange(len(ticks), dtype=np.int64) * step
    return even if np.abs(ticks - even).max() <= round(CLOCK / TICKS) else ticks
