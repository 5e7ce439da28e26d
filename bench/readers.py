"""Public readers of frame pairs: file name and two frame numbers in, two RGB frames out, one thread, file opened each
time.

Training draws another clip for every sample, so nobody gets to keep a file open.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import numpy as np

Reader = Callable[[Path, tuple[int, int]], list[np.ndarray]]


def torchcodec() -> Reader:
    decoder = import_module("torchcodec.decoders").VideoDecoder

    def read(path: Path, frames: tuple[int, int]) -> list[np.ndarray]:
        opened = decoder(str(path), num_ffmpeg_threads=1, dimension_order="NHWC", seek_mode="approximate")
        return list(opened.get_frames_at(list(frames)).data.numpy())

    return read


def decord2() -> Reader:
    module = import_module("decord")

    def read(path: Path, frames: tuple[int, int]) -> list[np.ndarray]:
        opened = module.VideoReader(str(path), ctx=module.cpu(0), num_threads=1)
        return list(opened.get_batch(list(frames)).asnumpy())

    return read


def opencv() -> Reader:
    cv2 = import_module("cv2")

    def read(path: Path, frames: tuple[int, int]) -> list[np.ndarray]:
        opened = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
        found = []
        for number in frames:
            opened.set(cv2.CAP_PROP_POS_FRAMES, number)
            found.append(cv2.cvtColor(opened.read()[1], cv2.COLOR_BGR2RGB))
        opened.release()
        return found

    return read


def pyav() -> Reader:
    """Seek to the key before the first frame and decode; seek again only if the second frame has a key in between."""
    av = import_module("av")

    def read(path: Path, frames: tuple[int, int]) -> list[np.ndarray]:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1
            step = 1 / (stream.average_rate * stream.time_base)
            wanted = [round(stream.start_time + number * step) for number in frames]
            found = []
            for pts in wanted:
                container.seek(pts, stream=stream)
                for frame in container.decode(stream):
                    if frame.pts in wanted and frame.pts >= pts:
                        found.append(frame.to_ndarray(format="rgb24"))
                        if len(found) == len(wanted):
                            return found
                        if frame.pts == pts and _key_between(stream, pts, wanted[-1]):
                            break
            return found

    return read


def _key_between(stream: object, first: int, last: int) -> bool:
    """Whether the container's own index has a key frame after ``first`` and up to ``last``."""
    entries = stream.index_entries  # type: ignore[attr-defined]
    return any(entry.is_keyframe and first < entry.timestamp <= last for entry in entries)


READERS: dict[str, Callable[[], Reader]] = {
    "torchcodec": torchcodec,
    "decord2": decord2,
    "OpenCV": opencv,
    "PyAV": pyav,
}
