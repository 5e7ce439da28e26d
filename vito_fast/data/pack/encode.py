"""From a decoded video to clips: shot changes, clip lengths, and the encoders of the ``jpeg`` and ``h264`` stores."""

import io
from collections import deque
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Protocol

import av
import numpy as np
from PIL import Image

from vito_fast.data.store.index import KEY, checksum, packet_flags
from vito_fast.data.store.media import BadVideo, Source, fitted, presentation_times, rgb, upright

TICKS = Fraction(1, 720000)
"""Time base of re-encoded clips: a frame of 23.976, 24, 25, 29.97, 30, 48, 50, 59.94, 60, 119.88 or 120 fps lasts a
whole number of ticks."""

GAP = 2.0
"""Seconds between two frames that end a clip: the recording was interrupted, or a time is wrong."""

CLOCK = 0.001
"""Seconds by which containers round times: Matroska's clock."""


@dataclass(frozen=True)
class PackOptions:
    """What a store is made of; two runs with equal options on the same files make the same clips."""

    format: str = "jpeg"
    short_side: int = 256
    """Pixels; smaller videos keep their size."""
    quality: int = 90
    """JPEG quality, 1 to 100 (jpeg stores)."""
    crf: int = 20
    """x264's constant rate factor, 0 to 51, lower is better (h264 stores)."""
    gop: int = 8
    """Frames from key to key (h264 stores)."""
    encoder: str = "libx264"
    """libx264 or h264_nvenc (h264 stores)."""
    clip_length: float = 10.0
    """Seconds at which a shot is split."""
    min_length: float = 1.0
    """Seconds; what is shorter is left out."""
    shot_cuts: bool = True
    """Whether clips end at shot changes."""
    shard_mib: int = 256

    def __post_init__(self) -> None:
        rules = {
            "format": (self.format in ("jpeg", "h264", "copy"), "jpeg, h264 or copy"),
            "short_side": (16 <= self.short_side <= 4096, "16 to 4096"),
            "quality": (1 <= self.quality <= 100, "1 to 100"),
            "crf": (0 <= self.crf <= 51, "0 to 51"),
            "gop": (1 <= self.gop <= 1000, "1 to 1000"),
            "encoder": (self.encoder in ("libx264", "h264_nvenc"), "libx264 or h264_nvenc"),
            "clip_length": (0 < self.clip_length < float("inf"), "above 0"),
            "min_length": (0 <= self.min_length <= self.clip_length, "from 0 to clip_length"),
            "shard_mib": (1 <= self.shard_mib <= 1 << 20, "1 to 1048576"),
        }
        for name, (good, rule) in rules.items():
            if not good:
                raise ValueError(f"{name} is {getattr(self, name)!r}, must be {rule}")


class EncoderMissing(Exception):
    """The encoder asked for cannot be used on this machine."""


@dataclass
class PackedClip:
    """A clip as written to a shard: what ``ClipRecord`` needs, its video number and source name apart."""

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
    too_short: int = 0
    """Shots left out for being shorter than ``min_length``."""


class Shard(Protocol):
    """Where packets go (see worker.ShardWriter)."""

    number: int
    path: Path
    size: int

    def append(self, payload: bytes) -> int: ...

    def flush(self) -> None: ...

    def rewind(self, size: int) -> None: ...


class ShotDetector:
    """Says whether a frame begins a new shot: its change against the frame before is large, and large for this shot.

    The change is the mean absolute difference of thumbnails whose cells are averaged, so that noise and small motion
    vanish.
    """

    ABSOLUTE = 0.1
    RELATIVE = 3.0

    def __init__(self) -> None:
        self._before: np.ndarray | None = None
        self._changes: deque[float] = deque(maxlen=12)

    def __call__(self, picture: np.ndarray) -> bool:
        """``picture`` (H, W, 3) uint8 RGB; the first one begins no *new* shot."""
        step = max(1, min(picture.shape[:2]) // 64)
        small = picture[::step, ::step]
        cell = min(4, *small.shape[:2])
        h, w = (n // cell for n in small.shape[:2])
        cells = small[: h * cell, : w * cell].reshape(h, cell, w, cell, 3)
        thumb = cells.mean((1, 3), dtype=np.float32) / 255
        before, self._before = self._before, thumb
        if before is None or before.shape != thumb.shape:
            return before is not None
        change = float(np.abs(thumb - before).mean())
        usual = float(np.mean(self._changes)) if self._changes else 0.0
        cut = change > self.ABSOLUTE and change > self.RELATIVE * usual
        if cut:
            self._changes.clear()
        else:
            self._changes.append(change)
        return cut


def frame_time(seconds: np.ndarray, rate: Fraction) -> float:
    """Seconds that a frame is shown for: as ``rate`` claims, unless the frames at ``seconds`` come at quite another."""
    claimed, steps = float(1 / rate), np.diff(seconds)
    mean = float(steps[steps <= GAP].mean()) if (steps <= GAP).any() else claimed
    return claimed if abs(mean - claimed) < 0.1 * claimed else mean


def too_short(start: float, end: float, options: PackOptions) -> bool:
    """Whether a shot is left out: by its time, as frames of variable rate tell nothing; both its ends are rounded."""
    return end - start < options.min_length - 2 * CLOCK


def bucket(height: int, width: int) -> tuple[int, int]:
    """The size that ``h264`` stores cut a picture to: hardware decoders restart at each new size, so few occur."""
    height, width = (side // 32 * 32 if side >= 64 else side for side in (height, width))
    return height, width


def centred(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The middle of ``picture``, of ``size`` (h, w)."""
    y, x = ((whole - part) // 2 for whole, part in zip(picture.shape[:2], size, strict=True))
    return np.ascontiguousarray(picture[y : y + size[0], x : x + size[1]])


class JpegEncoder:
    """Every frame a JPEG (4:2:0, BT.601 full range as JFIF has it)."""

    codec = "mjpeg"

    def __init__(self, options: PackOptions, height: int, width: int, rate: Fraction):
        self._quality = options.quality

    def encode(self, picture: np.ndarray) -> list[bytes]:
        buffer = io.BytesIO()
        try:
            Image.fromarray(picture).save(buffer, "JPEG", quality=self._quality, subsampling="4:2:0")
        except OSError as error:
            raise BadVideo(f"no JPEG can be made: {picture.shape[1]} x {picture.shape[0]} pixels: {error}") from None
        return [buffer.getvalue()]

    def finish(self) -> tuple[list[bytes], bytes]:
        return [], b""


class H264Encoder:
    """Closed groups of ``gop`` frames without B-frames or scene-cut keys, so a frame costs at most ``gop`` packets.

    Raises av.FFmpegError if the encoder will not open for such pictures, EncoderMissing if there is none.
    """

    codec = "h264"

    def __init__(self, options: PackOptions, height: int, width: int, rate: Fraction):
        try:
            context = av.CodecContext.create(options.encoder, "w")
        except (av.FFmpegError, ValueError) as error:
            raise EncoderMissing(f"encoder {options.encoder} is not part of this FFmpeg: {error}") from None
        context.width, context.height, context.pix_fmt = width, height, "yuv420p"
        context.framerate, context.time_base = rate, 1 / rate
        context.gop_size, context.max_b_frames, context.thread_count = options.gop, 0, 1
        if options.encoder == "libx264":
            parameters = (
                f"keyint={options.gop}:min-keyint={options.gop}:scenecut=0:open-gop=0:bframes=0:repeat-headers=1"
            )
            context.options = {"crf": str(options.crf), "preset": "fast", "x264-params": parameters}
        else:
            context.options = {
                "rc": "vbr",
                "cq": str(options.crf),
                "no-scenecut": "1",
                "forced-idr": "1",
                "preset": "p5",
            }
        context.colorspace, context.color_range = 6, 1  # SMPTE 170M, limited: what swscale makes of RGB by default
        self._context, self._count = context, 0
        context.open()

    def encode(self, picture: np.ndarray) -> list[bytes]:
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv420p")
        frame.pts, frame.pict_type = self._count, 0
        self._count += 1
        return [bytes(packet) for packet in self._context.encode(frame)]

    def finish(self) -> tuple[list[bytes], bytes]:
        rest = [bytes(packet) for packet in self._context.encode(None)]
        return rest, self._context.extradata or b""


def probe(options: PackOptions) -> None:
    """Raises EncoderMissing if the encoder will not open even for pictures that every encoder takes."""
    try:
        H264Encoder(options, 256, 448, Fraction(25))
    except av.FFmpegError as error:
        raise EncoderMissing(f"encoder {options.encoder} cannot be used on this machine: {error.strerror}") from None


def choose_encoder() -> tuple[str, str]:
    """The H.264 encoder to use, h264_nvenc where the machine has one that works, and a line that says why."""
    try:
        probe(PackOptions("h264", encoder="h264_nvenc"))
    except EncoderMissing as error:
        return "libx264", f"encoding by libx264: {error}"
    return "h264_nvenc", "encoding by h264_nvenc"


ENCODERS: dict[str, type[JpegEncoder] | type[H264Encoder]] = {"jpeg": JpegEncoder, "h264": H264Encoder}


@dataclass
class _OpenClip:
    encoder: JpegEncoder | H264Encoder
    first: int
    times: list[float] = field(default_factory=list)
    payloads: list[bytes] = field(default_factory=list)


class Cutter:
    """Encodes the frames of one source, in presentation order, into clips appended to a shard."""

    def __init__(self, options: PackOptions, shard: Shard):
        self.options, self.shard = options, shard
        self.result = PackedFile()
        self._ranges: list[tuple[int, int]] = []
        self._clip: _OpenClip | None = None

    def run(self, path: Path, heartbeat=lambda: None) -> PackedFile:
        """Packs ``path``; raises BadVideo. The caller takes back what was appended if it raises."""
        source, detector = Source(path), ShotDetector()
        tokens: list[int] = []
        latest = 0.0
        size: tuple[int, int] | None = None
        for token, frame in source.frames():
            shape = fitted(*upright(frame), self.options.short_side)
            if size is not None and shape != size:
                raise BadVideo(f"frame size changes at frame {len(tokens)}")
            size = shape
            picture = centred(rgb(frame, size), bucket(*size)) if self.options.format == "h264" else rgb(frame, size)
            number, seconds = len(tokens), self._seconds(source, token, len(tokens))
            tokens.append(token)
            cut = detector(picture) and self.options.shot_cuts
            gap = abs(seconds - latest) > GAP
            latest = max(latest, seconds) if number and not gap else seconds
            if self._clip and (cut or gap or seconds - self._clip.times[0] >= self.options.clip_length - 1e-6):
                self._close(number, source, None if gap else seconds)
            if self._clip is None:
                self._clip = _OpenClip(self._encoder(picture, source.rate), number)
            self._clip.payloads += self._clip.encoder.encode(picture)
            self._clip.times.append(seconds)
            heartbeat()
        self._close(len(tokens), source, None)
        self._set_times(source, tokens, size or (0, 0))
        return self.result

    def _encoder(self, picture: np.ndarray, rate: Fraction) -> JpegEncoder | H264Encoder:
        height, width = picture.shape[:2]
        try:
            return ENCODERS[self.options.format](self.options, height, width, rate)
        except av.FFmpegError as error:
            probe(self.options)  # is it the machine's fault? else this video's alone, and the others can be packed
            name = self.options.encoder
            raise BadVideo(f"encoder {name} does not open: {width} x {height} pixels: {error.strerror}") from None

    @staticmethod
    def _seconds(source: Source, token: int, number: int) -> float:
        """Provisional time, good enough to split shots by; exact times are set at the end."""
        ticks = source.pts[token] if token < len(source.pts) else None
        return float(ticks * source.time_base) if ticks is not None else float(number / source.rate)

    def _close(self, end: int, source: Source, following: float | None) -> None:
        """``following``: when the next frame comes, if there is one and no gap before it."""
        clip, self._clip = self._clip, None
        if clip is None:
            return
        times = np.sort(clip.times)
        until = times[-1] + frame_time(times, source.rate) if following is None else max(following, times[-1])
        if too_short(times[0], until, self.options):
            self.result.too_short += 1
            return
        rest, extradata = clip.encoder.finish()
        payloads = clip.payloads + rest
        if len(payloads) != len(times):
            raise BadVideo(f"the encoder made {len(payloads)} packets of {len(times)} frames")
        flags = [packet_flags(clip.encoder.codec, extradata, payload) or 0 for payload in payloads]
        if not flags[0] & KEY:
            raise BadVideo("the encoder's first packet is no key")
        self.result.clips.append(
            PackedClip(
                codec=clip.encoder.codec, width=0, height=0, rotation=0, shard=self.shard.number,
                time_base=TICKS, end=0,
                extradata=extradata, pts=np.empty(0, np.int64),
                offsets=np.array([self.shard.append(payload) for payload in payloads], np.int64),
                sizes=np.array([len(payload) for payload in payloads], np.int64),
                checksums=np.array([checksum(payload) for payload in payloads], np.uint32),
                flags=np.array(flags, np.uint8),
            )
        )  # fmt: skip
        self._ranges.append((clip.first, end))

    def _set_times(self, source: Source, tokens: list[int], size: tuple[int, int]) -> None:
        step = max(1, round(1 / (source.rate * source.time_base)))
        native = presentation_times([source.pts[token] for token in tokens], step)
        ticks = np.array([round(int(t) * source.time_base / TICKS) for t in native], np.int64)
        for clip, (first, end) in zip(self.result.clips, self._ranges, strict=True):
            clip.height, clip.width = bucket(*size) if self.options.format == "h264" else size
            clip.pts = _constant_rate(ticks[first:end])
            if end < len(ticks) and (ticks[end] - ticks[end - 1]) * TICKS <= GAP:
                following = ticks[end]
            else:
                following = ticks[end - 1] + round(frame_time(clip.pts * float(TICKS), source.rate) / TICKS)
            clip.end = int(max(following, clip.pts[-1] + 1))
        self.result.rate = 1 / frame_time(ticks * float(TICKS), source.rate)


def _constant_rate(ticks: np.ndarray) -> np.ndarray:
    """Evenly spaced ticks from the first on, where the given ones are even but for the rounding of their container's
    clock: each stays within ``CLOCK`` of its own time."""
    if len(ticks) < 3:
        return ticks
    step = round((ticks[-1] - ticks[0]) / (len(ticks) - 1))
    even = ticks[0] + np.arange(len(ticks), dtype=np.int64) * step
    return even if np.abs(ticks - even).max() <= round(CLOCK / TICKS) else ticks
