"""Shot boundaries, found while a video is decoded."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import numpy as np

Frame = TypeVar("Frame")


class ShotDetector:
    """Streaming detector of hard cuts. Feed it every frame of one video in presentation order.

    A frame begins a new shot if its change against the previous frame is large, and large for this shot. The change is
    the mean absolute difference of thumbnails. Averaged cells suppress noise and small motion. Deterministic.
    """

    DELAY = 0
    """Frames after a cut that :meth:`push` may need before it reports the cut."""

    THRESHOLD = 0.1
    """Least change at a cut. Pixels are in [0, 1]."""
    RATIO = 3.0
    """Least change at a cut, relative to the mean change of the last frames of the shot."""

    def __init__(self) -> None:
        self._count = 0
        self._previous: np.ndarray | None = None
        self._changes: deque[float] = deque(maxlen=12)

    def push(self, picture: np.ndarray) -> list[int]:
        """Take the next frame.

        Args:
            picture: (H, W, 3) uint8 RGB. H and W may change between frames, which is a cut.

        Returns:
            Numbers of the frames that begin a new shot and were not reported before, in order. The first frame of a
            video is number 0 and begins no *new* shot. Each is at most ``DELAY`` frames old.
        """
        number, self._count = self._count, self._count + 1
        step = max(1, min(picture.shape[:2]) // 64)
        small = picture[::step, ::step]
        cell = min(4, *small.shape[:2])
        h, w = (n // cell for n in small.shape[:2])
        cells = small[: h * cell, : w * cell].reshape(h, cell, w, cell, 3)
        thumbnail = cells.mean((1, 3), dtype=np.float32) / 255
        previous, self._previous = self._previous, thumbnail
        if previous is None:
            return []
        if previous.shape != thumbnail.shape:
            return [number]
        change = float(np.abs(thumbnail - previous).mean())
        usual = float(np.mean(self._changes)) if self._changes else 0.0
        if change > self.THRESHOLD and change > self.RATIO * usual:
            self._changes.clear()
            return [number]
        self._changes.append(change)
        return []

    def finish(self) -> list[int]:
        """Cuts among the last frames, once no more frames follow."""
        return []


def mark_cuts(frames: Iterable[Frame], picture: Callable[[Frame], np.ndarray]) -> Iterator[tuple[Frame, bool]]:
    """Yield each frame with whether it begins a new shot, in order, ``ShotDetector.DELAY`` frames late.

    Args:
        frames: Frames of one video in presentation order, of any type.
        picture: Returns a frame's pixels as :meth:`ShotDetector.push` takes them.
    """
    detector, cuts = ShotDetector(), set[int]()
    pending: deque[Frame] = deque()
    done = 0
    for frame in frames:
        pending.append(frame)
        cuts.update(detector.push(picture(frame)))
        if len(pending) > detector.DELAY:
            yield pending.popleft(), done in cuts
            done += 1
    cuts.update(detector.finish())
    for number, frame in enumerate(pending, done):
        yield frame, number in cuts
