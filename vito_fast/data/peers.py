"""Public readers of frame pairs, for benchmarks: file and frame numbers in, RGB frames out.

Each uses one thread and opens the file each time, as training does: every sample is another clip.
"""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vito_fast.data.store.media import for_ffmpeg

Frames = list[npt.NDArray[np.uint8]]
PairReader = Callable[[Path, list[int]], Frames]


def torchcodec() -> PairReader:
    decoder = import_module("torchcodec.decoders").VideoDecoder

    def read(path: Path, frames: list[int]) -> Frames:
        opened = decoder(for_ffmpeg(path), num_ffmpeg_threads=1, dimension_order="NHWC", seek_mode="approximate")
        return list(opened.get_frames_at(frames).data.numpy())

    return read


def decord2() -> PairReader:
    module = import_module("decord")

    def read(path: Path, frames: list[int]) -> Frames:
        opened = module.VideoReader(for_ffmpeg(path), ctx=module.cpu(0), num_threads=1)
        return list(opened.get_batch(frames).asnumpy())

    return read


def opencv() -> PairReader:
    cv2 = import_module("cv2")

    def read(path: Path, frames: list[int]) -> Frames:
        opened = cv2.VideoCapture(for_ffmpeg(path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
        found = []
        for number in frames:
            opened.set(cv2.CAP_PROP_POS_FRAMES, number)
            good, picture = opened.read()
            if not good:
                raise OSError(f"{path}: OpenCV reads no frame {number}")
            found.append(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB))
        opened.release()
        return found

    return read


def pyav() -> PairReader:
    """Seek to the key before each frame, unless the decoder is already past it."""
    av = import_module("av")

    def read(path: Path, frames: list[int]) -> Frames:
        with av.open(for_ffmpeg(path)) as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1
            start, step = stream.start_time or 0, 1 / (stream.average_rate * stream.time_base)
            found: dict[int, Any] = {}
            for number in sorted(set(frames)):
                wanted = start + number * step
                if not found or _key_between(stream, start + max(found) * step, wanted):
                    container.seek(round(wanted), stream=stream)
                for frame in container.decode(stream):
                    if frame.pts >= wanted - step / 2:
                        found[number] = frame.to_ndarray(format="rgb24")
                        break
            return [found[number] for number in frames]

    return read


def _key_between(stream: Any, first: float, last: float) -> bool:
    """Whether the container's index has a key after ``first`` and up to ``last``."""
    entries = stream.index_entries
    return any(entry.is_keyframe and first < entry.timestamp <= last for entry in entries)


READERS: dict[str, Callable[[], PairReader]] = {
    "torchcodec": torchcodec,
    "decord2": decord2,
    "PyAV": pyav,
    "OpenCV": opencv,
}


def installed() -> tuple[dict[str, PairReader], dict[str, str]]:
    """The installed readers by name, and the reasons why the others are missing."""
    found, missing = {}, {}
    for name, make in READERS.items():
        try:
            found[name] = make()
        except (ImportError, RuntimeError, OSError) as error:
            missing[name] = str(error).splitlines()[0]
    return found, missing
