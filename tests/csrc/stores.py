"""Builders of small stores for the tests: synthetic index records, and coded clips as a `copy` store holds them."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from vito_fast.data.store.index import (
    DISCARD,
    KEY,
    NO_PICTURE,
    OPEN,
    ClipRecord,
    Index,
    checksum,
    packet_flags,
    write_index,
)
from vito_fast.data.store.media import bare_packet

SHARD = "shard-00000.bin"
CODECS = {"libdav1d": "av1", "libvpx": "vp8", "libvpx-vp9": "vp9"}  # FFmpeg's decoders of other names


def constant_clip(video: int = 0, frames: int = 20, *, seed: int = 0, start: int = 0, **changes: object) -> ClipRecord:
    """A JPEG-like clip of 25 frames a second; its packets' bytes are not written anywhere."""
    rng = np.random.default_rng(seed + video)
    sizes = rng.integers(10, 100, frames)
    values: dict[str, object] = dict(
        video=video, source=f"video-{video}.mp4", codec="mjpeg", width=320, height=180, shard=0,
        time_base=Fraction(1, 25), pts=np.arange(frames) + start, offsets=np.cumsum(sizes) - sizes, sizes=sizes,
        checksums=rng.integers(0, 2**32, frames, dtype=np.uint32), flags=np.full(frames, KEY, np.uint8),
        end=frames + start,
    )  # fmt: skip
    return ClipRecord(**{**values, **changes})  # type: ignore[arg-type]


def synthetic_index(path: Path, clips: int = 10, frames: int = 20) -> Index:
    records = [constant_clip(video, frames) for video in range(clips)]
    write_index(path, records, format="jpeg", shards=[(SHARD, 10**6)])
    return Index(path)


def moving_picture(frame: int, width: int = 96, height: int = 64) -> np.ndarray:
    """An RGB picture that tells which frame it is: every part of it moves or changes."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin((x * a + y * b + frame * c) / 9) for a, b, c in ((1, 0.3, 2.0), (-0.4, 1, 3.1), (0.7, 0.7, -2.3))]
    picture = np.stack(waves, -1) * 90 + 128
    left = 7 * frame % (width - 16)
    picture[8:24, left : left + 16] = (frame * 37 % 256, 255 - frame * 11 % 256, frame * 91 % 256)
    return picture.clip(0, 255).astype(np.uint8)


def encode(path: Path, codec: str, frames: int = 40, options: dict[str, str] | None = None, bframes: int = 0) -> Path:
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=25, options=options or {})
        stream.width, stream.height = 96, 64
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.codec_context.thread_count = 1
        if bframes:
            stream.codec_context.max_b_frames = bframes
        for number in range(frames):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(moving_picture(number), format="rgb24")))
        out.mux(stream.encode(None))
    return path


@dataclass(frozen=True)
class CopiedClip:
    """A file as a `copy` store holds it, and its frames by sequential decoding."""

    directory: Path
    index: Index
    frames: list[np.ndarray]


def copy_store(source: Path, directory: Path) -> CopiedClip:
    """Packs a file without coding it anew. The order in which the decoder puts frames out is that of presentation."""
    directory.mkdir(parents=True, exist_ok=True)
    with av.open(str(source)) as container:
        stream = container.streams.video[0]
        context = stream.codec_context
        codec, extradata = CODECS.get(context.name, context.name), context.extradata or b""
        time_base, width, height = stream.time_base, context.width, context.height
        packets = [packet for packet in container.demux(stream) if packet.size]
        payloads = [bytes(packet) for packet in packets]
        times = sorted(packet.pts for packet in packets)
        discarded = [packet.is_discard for packet in packets]
        keys = [packet.is_keyframe for packet in packets]
        outputs = decode_packets(codec, extradata, payloads)
    flags = np.full(len(packets), NO_PICTURE, np.uint8)
    pts = np.full(len(packets), times[0])
    for place, number in enumerate(outputs):
        flags[number] = DISCARD if discarded[number] else 0
        pts[number] = times[place + len(times) - len(outputs)]
    for number, payload in enumerate(payloads):
        known = packet_flags(codec, extradata, payload)
        flags[number] |= (KEY | OPEN) * keys[number] if known is None else known
    sizes = np.array([len(payload) for payload in payloads])
    record = ClipRecord(
        video=0, source=source.name, codec=codec, width=width, height=height, shard=0, time_base=time_base,
        pts=pts, offsets=np.cumsum(sizes) - sizes, sizes=sizes,
        checksums=np.array([checksum(payload) for payload in payloads], np.uint32), flags=flags,
        end=int(pts.max()) + 1, extradata=extradata,
    )  # fmt: skip
    (directory / SHARD).write_bytes(b"".join(payloads))
    write_index(directory / "index.bin", [record], format="copy", shards=[(SHARD, int(sizes.sum()))])
    frames = [picture for number, picture in outputs.items() if not discarded[number]]
    return CopiedClip(directory, Index(directory / "index.bin"), frames)


def decode_packets(codec: str, extradata: bytes, packets: list[bytes]) -> dict[int, np.ndarray]:
    """Pictures by the number of their packet, in the decoder's order of output."""
    context = av.CodecContext.create("libdav1d" if codec == "av1" else codec, "r")
    context.thread_count = 1
    context.extradata = extradata or None
    pictures = {}
    for number, payload in enumerate([*packets, None]):
        for frame in context.decode(None if payload is None else bare_packet(payload, number)):
            pictures[frame.pts] = frame.to_ndarray()
    return pictures
