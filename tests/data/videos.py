"""Small videos of every awkward kind, made on the spot."""

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np


def pictures(count: int, height: int = 48, width: int = 64, seed: int = 0) -> list[np.ndarray]:
    """A textured scene that pans, so that every frame differs from every other and none looks like a cut."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(40, 216, ((height + count) // 16 + 1, (width + 96) // 16 + 1, 3))
    scene = np.kron(coarse, np.ones((16, 16, 1), int)).astype(np.uint8)
    frames = []
    for n in range(count):
        x = 96 - abs(96 - 2 * n % 192)
        frame = scene[n : n + height, x : x + width].copy()
        frame[:6, : 6 + n % (width - 6)] = 255 - n % 128  # a bar that tells the frames apart
        frames.append(np.ascontiguousarray(frame))
    return frames


def write(
    path: Path, frames: list[np.ndarray], codec: str = "libx264", *, gop: int = 12, b_frames: int = 0, rate: int = 25,
    times: list[int] | None = None, options: dict[str, str] | None = None, format: str | None = None,
    pixels: str | None = None, tags: dict[str, object] | None = None, container: dict[str, str] | None = None,
) -> Path:  # fmt: skip
    """Encodes ``frames``; ``times`` in milliseconds, default evenly by ``rate``; ``tags`` are the encoder's fields."""
    height, width = frames[0].shape[:2]
    with av.open(str(path), "w", format=format, options=container or {}) as output:
        stream = output.add_stream(codec, rate=rate, options={**_DEFAULTS.get(codec, {}), **(options or {})})
        stream.width, stream.height = width, height
        stream.pix_fmt = pixels or _PIXELS.get(codec, "yuv420p" if height % 2 == width % 2 == 0 else "yuv444p")
        stream.codec_context.gop_size, stream.codec_context.max_b_frames = gop, b_frames
        stream.codec_context.thread_count = 1
        for name, value in (tags or {}).items():
            setattr(stream.codec_context, name, value)
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[number], Fraction(1, 1000)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return path


_DEFAULTS = {
    "libx264": {"preset": "ultrafast", "crf": "23"},
    "libx265": {"preset": "ultrafast", "x265-params": "log-level=none:pools=1"},
    "libsvtav1": {"preset": "12", "svtav1-params": "lp=1"},
    "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8"},
    "libvpx": {"deadline": "realtime", "cpu-used": "8"},
}
_PIXELS = {"mjpeg": "yuvj420p", "png": "rgb24", "prores": "yuv422p10le"}


def remux(source: Path, target: Path, change) -> Path:
    """Copies the packets through ``change(list of packets)``."""
    with av.open(str(source)) as reader, av.open(str(target), "w") as writer:
        stream = writer.add_stream_from_template(reader.streams.video[0])
        packets = [packet for packet in reader.demux(video=0) if packet.size]
        for packet in change(packets):
            packet.stream = stream
            writer.mux(packet)
    return target


def without_rate(source: Path, target: Path) -> Path:
    """A WebM that does not say how long a frame is shown (DefaultDuration made void), as browsers record it."""
    data = bytearray(source.read_bytes())
    place = data.index(b"\x23\xe3\x83")
    size = 2 + (data[place + 3] & 0x7F)  # what the void holds, its own two bytes apart
    data[place : place + 2 + size] = bytes([0xEC, 0x80 | size, *bytes(size)])
    target.write_bytes(data)
    return target


def rotate(source: Path, target: Path, quarter: int) -> Path:
    """An MP4 whose track is to be shown turned by ``quarter`` times 90 degrees clockwise."""
    cos, sin = (1, 0, -1, 0)[quarter], (0, 1, 0, -1)[quarter]
    return display(source, target, (cos, sin, -sin, cos))


def display(source: Path, target: Path, matrix: tuple[int, int, int, int]) -> Path:
    """An MP4 whose track has another display matrix: x' = a x + c y, y' = b x + d y."""
    a, b, c, d = matrix
    data = bytearray(source.read_bytes())
    place = data.index(b"tkhd") + 4
    version = data[place]
    matrix = place + (52 if version else 40)
    one = 1 << 16
    data[matrix : matrix + 36] = struct.pack(">9i", a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30)
    target.write_bytes(data)
    return target


def skip_start(source: Path, target: Path, ticks: int) -> Path:
    """An MP4 whose edit list begins ``ticks`` later: the frames before are decoded and not shown."""
    data = bytearray(source.read_bytes())
    place = data.index(b"elst") + 4
    version = data[place]
    field, size = place + 8 + (8 if version else 4), "q" if version else "i"
    (start,) = struct.unpack_from(f">{size}", data, field)
    struct.pack_into(f">{size}", data, field, start + ticks)
    target.write_bytes(data)
    return target


def without_usability_information(source: Path, target: Path) -> Path:
    """x264's High profile without the part that tells how far frames are reordered, as many encoders leave it out."""
    with av.open(str(source)) as container:
        extradata = container.streams.video[0].codec_context.extradata or b""
    sps = extradata[8 : 8 + int.from_bytes(extradata[6:8], "big")]
    bits = "".join(f"{byte:08b}" for byte in sps.replace(b"\0\0\3", b"\0\0"))
    place = 32

    def golomb(count: int) -> None:
        nonlocal place
        for _ in range(count):
            place += 2 * (bits.index("1", place) - place) + 1

    golomb(4)  # number, chroma format, depths
    place += 2
    golomb(4)  # frame number and order of display (type 0), reference frames
    place += 1
    golomb(2)  # size
    place += 2
    place += 1
    if bits[place - 1] == "1":
        golomb(4)  # cropping
    short = bits[:place] + "01"
    short += "0" * (8 * len(sps) - len(short))
    data = source.read_bytes()
    assert sps in data
    target.write_bytes(data.replace(sps, int(short, 2).to_bytes(len(sps), "big")))
    return target


def write_three(folder: Path) -> Path:
    """40 frames each in ``a.mp4``, ``b.mp4`` and ``c.mkv``, the last with variable times; the folder again."""
    for name in "ab":
        write(folder / f"{name}.mp4", pictures(40, seed=ord(name)))
    write(folder / "c.mkv", pictures(40, seed=3), times=[40 * n + (13 if n % 3 else 0) for n in range(40)])
    return folder
