"""From a decoded frame to the picture that a player shows: upright, in square pixels, in colors of a common screen."""

import functools
import math
import struct
import threading
from fractions import Fraction
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from av.sidedata.sidedata import Type
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter

Pixels = npt.NDArray[np.uint8]

BT709, UNSPECIFIED, BT2020 = 1, 2, 9
BT601, RANGES = 5, {"yuv420p": 1, "yuvj420p": 2}
"""swscale's number of a color matrix, and FFmpeg's of the range: limited or full."""
PixelFormat = Literal["rgb24", "yuv420p", "yuvj420p"]
"""FFmpeg's numbers of a color matrix."""
HDR = {16: "PQ", 18: "HLG"}
"""Transfer functions of high dynamic range, by FFmpeg's number."""
SQUARE = Fraction(1)


def orientation(frame: VideoFrame) -> tuple[int, bool]:
    """How a frame is turned for display, by its display matrix.

    Returns:
        Degrees clockwise, a multiple of 90, and whether the frame is mirrored left to right before that. A matrix that
        FFmpeg ignores, such as one of zeros, changes nothing.
    """
    data: Any = frame.side_data
    if not len(data) or Type.DISPLAYMATRIX not in data:
        return 0, False
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(data[Type.DISPLAYMATRIX]))
    mirror = a * d < b * c
    if a * d == b * c:
        return 0, False
    degrees = math.degrees(math.atan2(-b, -a) if mirror else math.atan2(b, a))
    return round(degrees / 90) * 90 % 360, mirror


def turned(picture: Pixels, rotation: int, mirror: bool) -> Pixels:
    """(H, W, 3) ``picture`` as displayed: see :func:`orientation`. Contiguous."""
    if mirror:
        picture = picture[:, ::-1]
    return np.ascontiguousarray(np.rot90(picture, -rotation // 90))


def shown_size(frame: VideoFrame, aspect: Fraction = SQUARE) -> tuple[int, int]:
    """Height and width of the upright frame in square pixels.

    Args:
        frame: A decoded frame. Its lines keep their number: the other side is stretched.
        aspect: Width of its pixels by their height.
    """
    height, width = frame.height, max(1, round(frame.width * aspect))
    return (width, height) if orientation(frame)[0] % 180 else (height, width)


def fitted(height: int, width: int, short_side: int) -> tuple[int, int]:
    """Height and width scaled to ``short_side``, both even. Smaller frames are not enlarged."""
    scale = min(1.0, short_side / min(height, width))
    return max(2, round(height * scale / 2) * 2), max(2, round(width * scale / 2) * 2)


def untagged_hd(frame: VideoFrame) -> bool:
    """Whether a frame without a color matrix is read as BT.709, as players do: above 576 lines or from 1280 pixels."""
    large = frame.height > 576 or frame.width >= 1280
    return large and frame.colorspace == UNSPECIFIED and not frame.format.is_rgb


def kinds(frame: VideoFrame, aspect: Fraction) -> set[str]:
    """What is out of the ordinary about a frame, for the report of packing."""
    rotation, mirror = orientation(frame)
    found = {
        "mirrored": mirror,
        "rotated": rotation != 0,
        "anamorphic": shown_size(frame, aspect) != shown_size(frame),
        "HDR": frame.color_trc in HDR,
        "interlaced": frame.interlaced_frame,
        "HD without color tags": untagged_hd(frame),
        "odd size": bool(frame.width % 2 or frame.height % 2),
        "palette": frame.format.name == "pal8",
    }
    return {name for name, true in found.items() if true}


MATRICES = {0: "RGB", 1: "BT.709", 2: "untagged", 5: "BT.601", 6: "BT.601", 9: "BT.2020", 10: "BT.2020"}
"""Names of color matrices, by FFmpeg's number."""


def traits(frame: VideoFrame, aspect: Fraction, rotation: int, mirror: bool) -> list[str]:
    """Color, shape of a pixel, scan and orientation of a frame, each as ``KIND: VALUE``, for statistics of a store."""
    matrix = "RGB" if frame.format.is_rgb else MATRICES.get(frame.colorspace, "another matrix")
    transfer = f" {HDR[frame.color_trc]}" if frame.color_trc in HDR else ""
    return [
        f"color: {matrix}{transfer}",
        f"pixel: {aspect.numerator}:{aspect.denominator}",
        f"scan: {'interlaced' if frame.interlaced_frame else 'progressive'}",
        f"orientation: {rotation} degrees{' mirrored' if mirror else ''}",
    ]


_scalers = threading.local()


def _scaler(*key: object) -> VideoReformatter:
    """This thread's scaler for a size. A frame's own one computes its filters and starts its threads every time."""
    cache: dict[str, VideoReformatter] = _scalers.__dict__
    name = str(key)
    if name not in cache:
        if len(cache) >= 16:
            cache.clear()
        cache[name] = VideoReformatter()
    return cache[name]


def scaled(
    frame: VideoFrame,
    size: tuple[int, int] | None = None,
    *,
    turn: bool = True,
    format: PixelFormat = "rgb24",
    interpolation: str = "BICUBIC",
) -> VideoFrame:
    """Scale a frame, and convert it by its own color matrix, HDR tone-mapped to BT.709.

    A frame without a color matrix is read as BT.601, as swscale does, or as BT.709 if it is large: see
    :func:`untagged_hd`.

    Args:
        frame: A decoded frame.
        size: Height and width of the result.
        turn: Whether to turn the frame upright.
        format: Of the result; the YUV ones are BT.601. A frame that is turned or tone-mapped remains RGB instead of
            becoming ``yuvj420p``.
        interpolation: Of swscale. BICUBIC filters before it shrinks; AREA is cheaper.
    """
    rotation, mirror = orientation(frame) if turn else (0, False)
    height, width = size or (None, None)
    if rotation % 180:
        height, width = width, height
    hdr = frame.color_trc in HDR
    matrix = BT2020 if hdr and frame.colorspace == UNSPECIFIED else BT709 if untagged_hd(frame) else None
    direct = not (rotation or mirror or hdr)
    to = format if direct else "rgb48le" if hdr else "rgb24"
    result = _converted(frame, width, height, to, matrix, interpolation)
    if direct:
        return result
    array: Any = result.to_ndarray()
    if hdr:
        array = _tone_mapped(array, frame.color_trc, frame.color_primaries)
    result = VideoFrame.from_ndarray(turned(array, rotation, mirror), format="rgb24")
    return _converted(result, None, None, format, None, interpolation) if format == "yuv420p" else result


def _converted(
    frame: VideoFrame, width: int | None, height: int | None, format: str, matrix: int | None, interpolation: str
) -> VideoFrame:
    scaler = _scaler(frame.format.name, frame.width, frame.height, height, width, format, interpolation)
    to = {"dst_colorspace": BT601, "dst_color_range": RANGES[format]} if format in RANGES else {}
    return scaler.reformat(
        frame, width, height, format, src_colorspace=matrix, interpolation=interpolation, threads=1, **to
    )


def rgb(
    frame: VideoFrame, size: tuple[int, int] | None = None, *, turn: bool = True, interpolation: str = "BICUBIC"
) -> Pixels:
    """The pixels of :func:`scaled`, (H, W, 3) uint8 RGB, contiguous."""
    return np.ascontiguousarray(scaled(frame, size, turn=turn, interpolation=interpolation).to_ndarray())


WHITE, PEAK, KNEE = 203.0, 1000.0, 0.75
"""Nits of diffuse white (BT.2408) and of the brightest highlight that is told from others; the share of white up to
which brightness stays as it is."""
TO_BT709 = np.array([[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]], np.float32)
"""Linear BT.2020 to BT.709 (BT.2087)."""


def _tone_mapped(picture: npt.NDArray[np.uint16], transfer: int, primaries: int) -> Pixels:
    """(H, W, 3) uint16 RGB of PQ or HLG as a common screen shows it: white stays, highlights are compressed."""
    light = _linear(transfer)[picture]
    if HDR[transfer] == "HLG":  # its display's gamma, at a peak of 1000 nits
        light *= PEAK / WHITE * (light @ np.array([0.2627, 0.678, 0.0593], np.float32))[..., None] ** np.float32(0.2)
    if primaries != BT709:
        light = light @ TO_BT709.T
    top = np.maximum(light.max(-1, keepdims=True), np.float32(1e-6))

    def squeeze(x: npt.NDArray[np.float32] | float) -> Any:
        return (x - KNEE) / (x - KNEE + 1 - KNEE)

    bright = KNEE + (1 - KNEE) * squeeze(np.maximum(top, KNEE)) / squeeze(PEAK / WHITE)
    light *= np.where(top > KNEE, bright / top, 1)
    return _screen()[(light.clip(0, 1) * 65535).astype(np.uint16)]


@functools.cache
def _linear(transfer: int) -> npt.NDArray[np.float32]:
    """Light of each 16-bit value: of PQ in units of white, of HLG in those of its peak, without the display's gamma."""
    value = np.arange(65536) / 65535
    if HDR[transfer] == "PQ":  # SMPTE ST 2084
        power = value ** (32 / 2523)
        light = (np.maximum(power - 107 / 128, 0) / (2413 / 128 - 2392 / 128 * power)) ** (8192 / 1305)
        return (light * 10000 / WHITE).astype(np.float32)
    a, b, c = 0.17883277, 0.28466892, 0.55991073  # BT.2100
    return np.where(value <= 0.5, value**2 / 3, (np.exp((value - c) / a) + b) / 12).astype(np.float32)


@functools.cache
def _screen() -> Pixels:
    """The byte of each 16-bit linear value on a screen of BT.1886."""
    return np.rint(255 * (np.arange(65536) / 65535) ** (1 / 2.4)).astype(np.uint8)


def gray(frame: VideoFrame, size: tuple[int, int]) -> Pixels:
    """The luma of a frame in full range, (H, W) uint8, upright. Arguments as of :func:`rgb`."""
    rotation, mirror = orientation(frame)
    height, width = size[::-1] if rotation % 180 else size
    scaler = _scaler(height, width, "AREA gray")
    array: Any = scaler.reformat(frame, width, height, "gray", interpolation="AREA", threads=1).to_ndarray()
    return turned(array, rotation, mirror)
