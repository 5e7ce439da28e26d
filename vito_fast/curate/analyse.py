"""Step ``clips``: the one decode of each file gives its clips, their hashes and the frames for the classifier."""

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from av.video.frame import VideoFrame
from PIL import Image

from vito_fast.curate.hashes import frame_hashes
from vito_fast.curate.options import AnalyseOptions, digest
from vito_fast.curate.probe import IMAGES, confined
from vito_fast.data.pack.clips import GAP, frame_duration
from vito_fast.data.pack.shots import mark_cuts
from vito_fast.data.store.media import BadVideo, Source, check_pixels, presentation_times
from vito_fast.data.store.picture import fitted, gray, rgb, shown_size

VERSION = 4
SMALL = 96
"""Short side in pixels of the frames that hashes are computed of."""
JPEG_QUALITY = 92
FRAME = pa.struct([("frame", pa.int32()), ("jpeg", pa.binary())])
HASH = pa.struct([("seconds", pa.float64()), ("contrast", pa.float32()), ("bits", pa.binary())])
CLIP = pa.struct(
    [
        ("clip_id", pa.string()),
        ("first_frame", pa.int32()),
        ("end_frame", pa.int32()),
        ("start", pa.int64()),
        ("end", pa.int64()),
        ("seconds", pa.float64()),
        ("cut", pa.string()),
        ("cut_score", pa.float32()),
        ("flat_share", pa.float32()),
        ("motion", pa.float32()),
    ]
)
SCHEMA = pa.schema(
    [
        ("item_id", pa.string()),
        ("path", pa.string()),
        ("status", pa.string()),
        ("reason", pa.string()),
        ("frame_count", pa.int32()),
        ("time_base", pa.string()),
        ("clips", pa.list_(CLIP)),
        ("frames", pa.list_(pa.list_(FRAME))),
        ("hashes", pa.list_(pa.list_(HASH))),
    ]
)
VIEWS = ((0.875, 0.5), (1.0, 0.1), (1.0, 0.5), (1.0, 0.9))
"""The squares of a clip's classified frames, in turn: share of the short side, and place along the long one."""
FLAT = 6.0
"""Contrast in levels below which a frame is flat."""


@dataclass
class _Frame:
    number: int
    seconds: float
    picture: VideoFrame | None
    """Of the frames that the classifier may see. Scaled only once its clip is known."""
    small: np.ndarray | None
    """Luma of the frames that are hashed."""
    scene: tuple[int, int, int]
    """Number of the run of undisturbed packets, height and width. A clip has one, as in a store."""


@dataclass
class _Clip:
    first: int
    begin: float
    cut: str
    score: float
    end: int = 0
    frames: list[dict[str, Any]] = field(default_factory=list)
    hashes: list[dict[str, Any]] = field(default_factory=list)
    change: float = 0.0


def run(data: Mapping[str, Any], options: AnalyseOptions) -> dict[str, Any]:
    """One row of ``SCHEMA``. ``data``: root and path. Raises BadVideo."""
    path = confined(data["root"], data["path"])
    if path.suffix.lower() in IMAGES:
        return _still(data, np.asarray(_open_image(path, options)), options)
    source, tokens = Source(path, options.limits, salvage=True), list[int]()
    clips: list[_Clip] = []
    latest, before, scene = 0.0, None, None
    for frame, cut, _ in mark_cuts(_frames(source, tokens, options)):
        gap = abs(frame.seconds - latest) > GAP
        latest = max(latest, frame.seconds) if frame.number and not gap else frame.seconds
        broken, scene = scene not in (None, frame.scene), frame.scene
        if not clips or cut or gap or broken or frame.seconds - clips[-1].begin >= options.clip_length - 1e-6:
            kind = "start" if not clips else cut.kind if cut else "gap" if gap else "break" if broken else "split"
            score = cut.score if cut else 0.0
            clips.append(_Clip(frame.number, frame.seconds, kind, score))
            before = None
        clip = clips[-1]
        clip.end = frame.number + 1
        if frame.picture and frame.number - clip.first < options.first_frames:
            picture = square(frame.picture, options.frame_size, len(clip.frames))
            clip.frames.append({"frame": frame.number, "jpeg": _jpeg(picture)})
        if frame.small is not None:
            clip.hashes.append(_hash(frame.small, frame.seconds))
            if before is not None:
                clip.change += float(np.abs(frame.small.astype(np.int16) - before).mean())
            before = frame.small
    return _row(data, source, tokens, clips)


def rejected(data: Mapping[str, Any], reason: str) -> dict[str, Any]:
    return {"path": data["path"], "status": "rejected", "reason": reason, "clips": [], "frames": [], "hashes": []}


def _frames(source: Source, tokens: list[int], options: AnalyseOptions) -> Iterator[tuple[_Frame, VideoFrame]]:
    tick = -1
    for token, frame in source.frames():
        number = len(tokens)
        tokens.append(token)
        ticks = source.pts[token] if token < len(source.pts) else None
        seconds = float(ticks * source.time_base) if ticks is not None else float(number / source.rate)
        size, small = shown_size(frame, source.aspect), None
        if int(seconds * options.hash_rate) != tick:
            tick = int(seconds * options.hash_rate)
            small = gray(frame, fitted(*size, SMALL))
        picture = frame if number % options.stride == 0 else None
        yield _Frame(number, seconds, picture, small, (source.run, *size)), frame


def _hash(small: np.ndarray, seconds: float) -> dict[str, Any]:
    bits, contrast = frame_hashes(small)
    return {"seconds": round(seconds, 6), "contrast": contrast, "bits": bits.tobytes()}


def _jpeg(picture: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling="4:4:4")
    return buffer.getvalue()


def square(frame: VideoFrame, side: int, turn: int = 0) -> np.ndarray:
    """A square of a frame, (side, side, 3): the middle 7 / 8, as ImageNet's classifiers are tested, or by ``turn``
    another of ``VIEWS``, so that a subject beside the middle is seen as well."""
    share, place = VIEWS[turn % len(VIEWS)]
    picture = rgb(frame, fitted(*shown_size(frame), round(side / share)))
    height, width = picture.shape[:2]
    crop = min(side, height, width)
    y, x = (round((size - crop) * (place if size == max(height, width) else 0.5)) for size in (height, width))
    square = picture[y : y + crop, x : x + crop]
    if crop == side:
        return np.ascontiguousarray(square)
    return np.asarray(Image.fromarray(np.ascontiguousarray(square)).resize((side, side), Image.Resampling.BICUBIC))


def _row(data: Mapping[str, Any], source: Source, tokens: list[int], clips: list[_Clip]) -> dict[str, Any]:
    step = max(1, round(1 / (source.rate * source.time_base)))
    ticks = presentation_times([source.pts[token] for token in tokens], step, round(GAP / source.time_base))
    base = float(source.time_base)
    shown = []
    for clip in clips:
        own = ticks[clip.first : clip.end]
        following = ticks[clip.end] if clip.end < len(ticks) and (ticks[clip.end] - own[-1]) * base <= GAP else None
        end = following if following is not None else own[-1] + round(frame_duration(own * base, source.rate) / base)
        shown.append({
            "clip_id": digest(data["path"], data["id"], clip.first), "first_frame": clip.first, "end_frame": clip.end,
            "start": int(own[0]), "end": int(end), "seconds": float(end - own[0]) * base,
            "cut": clip.cut, "cut_score": clip.score,
            "flat_share": float(np.mean([h["contrast"] < FLAT for h in clip.hashes])) if clip.hashes else 0.0,
            "motion": clip.change / max(1, len(clip.hashes) - 1),
        })  # fmt: skip
    return {
        "path": data["path"], "status": "ok", "reason": "", "frame_count": len(tokens),
        "time_base": str(source.time_base), "clips": shown, "frames": [clip.frames for clip in clips],
        "hashes": [clip.hashes for clip in clips],
    }  # fmt: skip


def _open_image(path: Any, options: AnalyseOptions) -> Image.Image:
    try:
        with Image.open(path) as image:
            check_pixels(image.width, image.height, options.limits)
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadVideo(f"cannot be decoded: {error}") from None


def _still(data: Mapping[str, Any], picture: np.ndarray, options: AnalyseOptions) -> dict[str, Any]:
    """An image of an evaluation set, as a clip of one frame."""
    height, width = fitted(picture.shape[0], picture.shape[1], SMALL)
    small = np.asarray(Image.fromarray(picture).convert("L").resize((width, height), Image.Resampling.BOX))
    clip = {
        "clip_id": digest(data["path"], data["id"], 0), "first_frame": 0, "end_frame": 1, "start": 0, "end": 1,
        "seconds": 0.0, "cut": "start", "cut_score": 0.0, "flat_share": 0.0, "motion": 0.0,
    }  # fmt: skip
    return {
        "path": data["path"], "status": "ok", "reason": "", "frame_count": 1, "time_base": "1", "clips": [clip],
        "frames": [[]], "hashes": [[_hash(small, 0.0)]],
    }  # fmt: skip
