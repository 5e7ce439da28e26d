"""Shot boundaries, found while a video is decoded: hard cuts, fades and dissolves.

Three tests look at thumbnails, with a bounded delay:

* A *cut* separates the frames before it from those after it. All pairs across it differ, by more than neighbors do.
  A flash does not: the frames after it match those before it.
* A *fade* goes through flat frames, and the pictures on its two sides differ. After a blink they match.
* A *dissolve* is a weighted mean: the frame in the middle lies between the first and the last. In motion it does not.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

T = TypeVar("T")
Thumbnail = npt.NDArray[np.float32]


class Cut(NamedTuple):
    """``frame`` is the first of the new shot. It is exact for a ``cut``, the middle of a ``fade`` or ``dissolve``."""

    frame: int
    kind: str
    score: float
    """How far the evidence is above its threshold; 1 is the threshold."""


class ShotDetector:
    """Streaming detector of shot boundaries. Feed it every frame of one video in presentation order. Deterministic."""

    DELAY = 56
    """Frames after a boundary that :meth:`push` may need before it reports the boundary."""

    WINDOW = 8
    """Frames on each side of a cut that are compared; an interruption of fewer frames is a flash."""
    CHANGE = 0.02
    """Least change at a cut. Pixels are in [0, 1]."""
    CORRELATION = 0.93
    """Largest correlation of the frames on the two sides of a cut: a change of brightness is none."""
    FLAT = 0.005
    """Standard deviation of luma below which a frame is flat. Relative to the last second: ``FLAT_SHARE``."""
    FLAT_SHARE = 0.1
    SPANS = (10, 16, 24, 36, 52)
    """Frames from end to end at which dissolves are looked for."""
    BETWEEN = 0.38
    """Largest distance of a dissolve's middle from the mean of its ends, relative to the distance of the ends."""

    def __init__(self) -> None:
        self._count = 0
        self._first = 0
        """The first frame of this size."""
        self._colors: deque[Thumbnail] = deque(maxlen=64)
        self._lumas: deque[Thumbnail] = deque(maxlen=64)
        self._stds: deque[float] = deque(maxlen=64)
        self._changes: deque[float] = deque(maxlen=64)
        """Mean absolute difference to the frame before."""
        self._pending: list[Cut] = []
        self._dissolve: Cut | None = None
        self._last_dissolve = -1000
        self._flat_from = -1
        self._flat_run: tuple[int, int] | None = None
        """The last run of flat frames that is not decided: first, and first after it."""
        self._before_flat: list[Thumbnail] = []
        """Frames before that run."""
        self._flat_until = -1000
        """End of the last run of flat frames."""

    def push(self, picture: npt.NDArray[np.uint8]) -> list[Cut]:
        """Take the next frame.

        Args:
            picture: (H, W, 3) uint8 RGB. H and W may change between frames, which is a cut.

        Returns:
            Boundaries not reported before, in order. The first frame of a video is number 0 and begins no *new* shot.
            Each is at most ``DELAY`` frames old.
        """
        number, self._count = self._count, self._count + 1
        color = _thumbnail(picture)
        if self._colors and self._colors[-1].shape != color.shape:
            rest = self._settle(final=True)
            self._restart(number)
            self._add(color)
            return [*rest, Cut(number, "cut", 1.0)]
        self._add(color)
        self._look(number)
        return self._settle()

    def finish(self) -> list[Cut]:
        """Boundaries among the last frames, once no more frames follow."""
        for number in range(max(self._first + 1, self._count - self.WINDOW + 1), self._count):
            self._look_for_cut(number)
        return self._settle(final=True)

    def _restart(self, number: int) -> None:
        count = self._count
        self.__init__()  # type: ignore[misc]
        self._count, self._first = count, number

    def _add(self, color: Thumbnail) -> None:
        luma = color.mean(-1)
        self._changes.append(float(np.abs(color - self._colors[-1]).mean()) if self._colors else 0.0)
        self._colors.append(color)
        self._lumas.append(luma)
        self._stds.append(float(luma.std()))

    def _at(self, number: int) -> int:
        """Index of a frame in the deques."""
        return number - self._count

    def _is_flat(self, number: int) -> bool:
        place = len(self._stds) + self._at(number)
        recent = max(islice(self._stds, max(0, place - 24), place + 1))
        return self._stds[place] < max(self.FLAT, self.FLAT_SHARE * recent)

    def _look(self, number: int) -> None:
        if self._is_flat(number):
            if self._flat_from < 0:
                self._flat_from = number
                if not self._flat_run:
                    self._before_flat = self._sides(range(number - 1, max(self._first - 1, number - 25), -1))
        elif self._flat_from >= 0:
            if self._flat_run:  # two runs close together: one decision for both
                self._flat_from = self._flat_run[0]
            self._flat_run, self._flat_from = (self._flat_from, number), -1
            self._flat_until = number
        if self._flat_run and number - self._flat_run[1] >= 16:
            self._decide_run()
        if number - self.WINDOW + 1 > self._first:
            self._look_for_cut(number - self.WINDOW + 1)
        if number % 2 == 0:
            self._look_for_dissolve(number)

    def _look_for_cut(self, number: int) -> None:
        at = len(self._colors) + self._at(number)
        if self._changes[at] <= self.CHANGE or at < 1:
            return
        first, last = max(0, at - self.WINDOW), min(len(self._colors), at + self.WINDOW)
        frames = np.stack([self._colors[place] for place in range(first, last)])
        before, after = frames[: at - first], frames[at - first :]
        across = min(float(np.abs(after - frame).mean((1, 2, 3)).min()) for frame in before)
        around = sorted([self._changes[place] for place in range(first + 1, last) if place != at], reverse=True)
        usual = around[len(around) // 2] if around else 0.0
        third = around[2] if len(around) > 2 else 0.0
        if across <= max(self.CHANGE, 0.4 * self._changes[at]):
            return
        correlation = _correlation(self._lumas[at - 1], self._lumas[at])
        if across <= 1.3 * third and (across < 0.06 or correlation > 0.5):  # motion in steps
            return
        if correlation < self.CORRELATION:
            ratio = (1.45 + 2.0 * max(0.0, correlation - 0.1)) * usual
            score = across / max(self.CHANGE, ratio)
            if score > 1:
                self._pending.append(Cut(number, "cut", score))

    def _decide_run(self) -> None:
        """A run of flat frames is a boundary if the pictures on its two sides differ."""
        assert self._flat_run
        first, end = self._flat_run
        self._flat_run = None
        near = [cut for cut in self._pending if first - 12 <= cut.frame <= end + 12]
        after = self._sides(range(end, min(self._count, end + 24)))
        if not self._before_flat or not after:  # the video begins or ends in it
            self._pending = [cut for cut in self._pending if cut not in near]
            return
        correlation = max(_correlation(a, b) for a, b in zip(self._before_flat, after, strict=False))
        self._pending = [cut for cut in self._pending if cut not in near]
        if correlation > 0.72:
            self._pending += [cut for cut in near if cut.frame < first - 3 or cut.frame > end + 3]
            return
        edges = {cut.frame for cut in near}
        frame = end if end in edges else first if first in edges else (first + end) // 2
        kind = "cut" if frame in edges else "fade"
        self._pending.append(Cut(max(frame, self._count - self.DELAY), kind, 0.72 / max(0.1, correlation)))

    def _sides(self, numbers: range) -> list[Thumbnail]:
        """The frame of most contrast among ``numbers``, which count away from a flat run, and the nearest ones."""
        chosen = [max(numbers, key=lambda n: self._stds[self._at(n)])] if numbers else []
        return [
            self._lumas[self._at(n)] for n in [*chosen, *(numbers[gap] for gap in (0, 1, 2, 4) if gap < len(numbers))]
        ]

    def _look_for_dissolve(self, number: int) -> None:
        for span in self.SPANS:
            if number - span < max(self._first, self._count - len(self._lumas)) or number - span < self._flat_until:
                return
            if self._flat_from >= 0:
                return
            start, end = self._lumas[self._at(number - span)], self._lumas[self._at(number)]
            way = end - start
            length = float(np.sqrt(np.mean(way * way)))
            if length < 0.06:
                continue
            middle = self._off(start, way, number - span // 2)
            if middle[1] > self.BETWEEN or abs(middle[0] - 0.5) > 0.2:
                continue
            quarters = [self._off(start, way, number - span + place * span // 4) for place in (1, 3)]
            (low, low_off), (high, high_off) = quarters
            if not (-0.1 < low < 0.45 and 0.55 < high < 1.1 and max(low_off, high_off) < self.BETWEEN + 0.05):
                continue
            if _correlation(start, end, reach=0) > 0.6 or _correlation(start, end) > 0.7:
                continue
            found = Cut(number - span // 2, "dissolve", length / 0.06 * self.BETWEEN / max(0.05, middle[1]))
            best = self._dissolve
            if found.frame > self._last_dissolve + 36 and (best is None or found.score > best.score):
                self._dissolve = found

    def _off(self, start: Thumbnail, way: Thumbnail, number: int) -> tuple[float, float]:
        """Where a frame lies on the way from start to end (0 to 1), and its distance from the way."""
        step = self._lumas[self._at(number)] - start
        square = float((way * way).sum())
        along = float((step * way).sum()) / square
        rest = step - along * way
        return along, float(np.sqrt((rest * rest).sum() / square))

    def _settle(self, final: bool = False) -> list[Cut]:
        """Report the boundaries that later frames cannot change."""
        if final and self._flat_run:
            self._decide_run()
        best = self._dissolve
        if best and (final or self._count - best.frame > 40):
            self._dissolve = None
            near = [cut for cut in self._pending if abs(cut.frame - best.frame) <= 26]
            flat = self._flat_from >= 0 or self._flat_until > best.frame - 30
            if not near and not flat:
                self._last_dissolve = best.frame
                self._pending.append(best)
        done: list[Cut] = []
        waiting: list[Cut] = []
        for cut in sorted(self._pending):
            (done if final or self._count - cut.frame >= self.DELAY - 1 else waiting).append(cut)
        self._pending = waiting
        return done


def _thumbnail(picture: npt.NDArray[np.uint8]) -> Thumbnail:
    """Means of cells, so that noise and small motion vanish: about 16 rows, values in [0, 1]."""
    step = max(1, min(picture.shape[:2]) // 64)
    small = picture[::step, ::step]
    cell = min(4, *small.shape[:2])
    h, w = (n // cell for n in small.shape[:2])
    cells = small[: h * cell, : w * cell].reshape(h, cell, w * cell * 3)
    rows = cells.sum(1, dtype=np.uint16).reshape(h, w, cell, 3)
    return rows.sum(2, dtype=np.float32) / np.float32(255 * cell * cell)


def _correlation(a: Thumbnail, b: Thumbnail, reach: int = 2) -> float:
    """Largest correlation of two lumas over shifts of up to ``reach`` rows and twice as many columns."""
    h, w = a.shape
    reach = min(reach, (h - 1) // 2, (w - 1) // 4)
    a, b = a - a.mean(), b - b.mean()
    best = -1.0
    for dy in range(-reach, reach + 1):
        for dx in range(-2 * reach, 2 * reach + 1, 2):
            x = a[max(0, dy) : h + min(0, dy), max(0, dx) : w + min(0, dx)].ravel()
            y = b[max(0, -dy) : h + min(0, -dy), max(0, -dx) : w + min(0, -dx)].ravel()
            best = max(best, float(x @ y) / (float((x @ x) * (y @ y)) ** 0.5 + 1e-4))
    return best


def mark_cuts(frames: Iterable[T], picture: Callable[[T], npt.NDArray[np.uint8]]) -> Iterator[tuple[T, Cut | None]]:
    """Yield each frame with the boundary before it, if any, in order, ``ShotDetector.DELAY`` frames late.

    Args:
        frames: Frames of one video in presentation order, of any type.
        picture: Returns a frame's pixels as :meth:`ShotDetector.push` takes them.
    """
    detector, cuts = ShotDetector(), dict[int, Cut]()
    pending: deque[T] = deque()
    number = 0
    for frame in frames:
        pending.append(frame)
        cuts.update((cut.frame, cut) for cut in detector.push(picture(frame)))
        if len(pending) > detector.DELAY:
            yield pending.popleft(), cuts.get(number)
            number += 1
    cuts.update((cut.frame, cut) for cut in detector.finish())
    for place, frame in enumerate(pending, number):
        yield frame, cuts.get(place)
