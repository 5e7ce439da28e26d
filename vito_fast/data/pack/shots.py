"""Shot boundaries, found while a video is decoded: hard cuts, fades and dissolves.

Three tests look at thumbnails of one fixed size, with a bounded delay:

* A *cut* separates the frames before it from those after it. All pairs across it differ, by more than neighbors do.
  A flash does not: the frames after it match those before it.
* A *fade* goes through flat frames, and the pictures on its two sides differ. After a blink they match.
* A *dissolve* is a weighted mean: the frame in the middle lies between the first and the last. In motion it does not.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
from av.video.frame import VideoFrame

from vito_fast.data.store.picture import rgb

T = TypeVar("T")
Floats = npt.NDArray[np.float32]

ROWS, COLUMNS = 18, 32
"""Cells of a thumbnail. Noise and small motion vanish in their means; small and large videos look alike."""


class Cut(NamedTuple):
    """``frame`` is the first of the new shot. It is exact for a ``cut``, the middle of a ``fade`` or ``dissolve``."""

    frame: int
    kind: str
    score: float
    """How far the evidence is above its threshold; 1 is the threshold."""


class ShotDetector:
    """Streaming detector of shot boundaries. Feed it every frame of one video in presentation order. Deterministic."""

    DELAY = 72
    """Frames after a boundary that :meth:`push` may need before it reports the boundary."""
    CHUNK = 16
    """Frames that are taken up at once."""
    HISTORY = 64
    """Frames before a chunk that the tests look back at."""

    WINDOW = 8
    """Frames on each side of a cut that are compared; an interruption of fewer frames is a flash."""
    CHANGE = 0.02
    """Least change at a cut. Pixels are in [0, 1]."""
    CORRELATION = 0.93
    """Largest correlation of the frames on the two sides of a cut: a change of brightness is none."""
    FLAT = 0.005, 0.012
    """Standard deviation of luma below which a frame is flat. The latter is that of black and white, which have noise,
    after pictures of ten times as much."""
    SIDE = 24
    """Frames on each side of flat ones that are compared."""
    BLINK = 5
    """Flat frames that may be an interruption of one shot, whose pictures then correlate less."""
    SPANS = (10, 16, 24, 36, 52)
    """Frames from end to end at which dissolves are looked for."""
    BETWEEN = 0.35
    """Largest distance of a dissolve's middle from the mean of its ends, relative to the distance of the ends."""
    DIP = 0.8
    """Largest variance of a dissolve's middle, relative to its ends': a mean of two pictures has less contrast."""

    MOVES = 6
    """Levels by which a cell of a thumbnail changes, at least, if anything moves."""

    def __init__(self) -> None:
        self.moved = 0
        """The last frame that differs visibly from those before it."""
        self._still: Floats | None = None
        self._restart(0)

    def _restart(self, number: int) -> None:
        """Forget all frames before ``number``."""
        self._first = self._base = self._count = number
        """The first frame of this size; the first in the arrays; frames seen."""
        self._size: tuple[int, int] | None = None
        self._waiting: list[npt.NDArray[np.uint8]] = []
        self._colors = np.empty((0, ROWS, COLUMNS, 3), np.float32)
        self._lumas = np.empty((0, ROWS, COLUMNS), np.float32)
        self._means = np.empty(0, np.float32)
        self._stds = np.empty(0, np.float32)
        self._changes = np.empty(0, np.float32)
        """Mean absolute difference to the frame before."""
        self._pending: list[Cut] = []
        self._latest = Cut(-1000, "cut", 0.0)
        """The last one that was reported."""
        self._dissolve: Cut | None = None
        self._last_dissolve = -1000
        self._flat_from = -1
        self._flat_run: tuple[int, int] | None = None
        """The last run of flat frames that is not decided: first, and first after it."""
        self._before_flat = np.empty((0, ROWS, COLUMNS, 3), np.float32)
        """The last second before that run."""
        self._last_flat = (-1000, -1000)
        """The last run of flat frames, decided or not."""

    def push(self, frame: VideoFrame) -> list[Cut]:
        """Take the next frame.

        Args:
            frame: Decoded, of any size. A change of the size is a cut.

        Returns:
            Boundaries not reported before, in order. The first frame of a video is number 0 and begins no *new* shot.
            Each is at most ``DELAY`` frames old.
        """
        done: list[Cut] = []
        size = frame.height, frame.width
        if self._size is not None and self._size != size:
            number = self._count + len(self._waiting)
            done = [*self.finish(), Cut(number, "cut", 1.0)]
            self._restart(number)
        self._size = size
        self._waiting.append(thumbnail(frame))
        cells = 255 * _cells(self._waiting[-1][None])[0]
        if self._still is None or np.abs(cells - self._still).max() > self.MOVES:
            self.moved, self._still = self._count + len(self._waiting) - 1, cells
        if len(self._waiting) == self.CHUNK:
            self._take()
            done += self._settle()
        return done

    def finish(self) -> list[Cut]:
        """Boundaries among the last frames, once no more frames follow."""
        self._take()
        for number in range(max(self._first + 1, self._count - self.WINDOW + 1), self._count):
            self._look_for_cut(number, self._count)
        return self._settle(final=True)

    def _take(self) -> None:
        """Measure the waiting frames, then run the tests as of each of them."""
        if not self._waiting:
            return
        cut = max(0, len(self._stds) - self.HISTORY)
        colors = _cells(np.stack(self._waiting))
        self._waiting = []
        before = self._colors[-1:] if len(self._colors) else colors[:1]
        changes = np.abs(colors - np.concatenate([before, colors[:-1]])).mean((1, 2, 3))
        lumas = colors.mean(-1)
        start, self._base = self._count, self._base + cut
        self._colors = np.concatenate([self._colors[cut:], colors])
        self._lumas = np.concatenate([self._lumas[cut:], lumas])
        self._means = np.concatenate([self._means[cut:], lumas.mean((1, 2))])
        self._stds = np.concatenate([self._stds[cut:], lumas.std((1, 2))])
        self._changes = np.concatenate([self._changes[cut:], changes])
        self._count += len(colors)
        for number in range(start, self._count):
            self._look_for_fade(number)
            if number - self.WINDOW + 1 > self._first:
                self._look_for_cut(number - self.WINDOW + 1, number + 1)
        self._look_for_dissolves(start)

    def _is_flat(self, number: int) -> bool:
        at = number - self._base
        recent = float(self._stds[max(0, at - 24) : at + 1].max())
        least, most = self.FLAT
        extreme = abs(float(self._means[at]) - 0.5) > 0.4
        return float(self._stds[at]) < (min(max(least, 0.1 * recent), most) if extreme else least)

    def _look_for_fade(self, number: int) -> None:
        if self._is_flat(number):
            if self._flat_from < 0:
                if self._flat_run and any(self._flat_run[1] < cut.frame < number for cut in self._pending):
                    self._decide_run(number)
                self._flat_from = number
                if not self._flat_run:
                    at = number - self._base
                    self._before_flat = self._colors[max(0, at - self.SIDE) : at].copy()
        elif self._flat_from >= 0:
            if self._flat_run:  # two runs close together: one decision for both
                self._flat_from = self._flat_run[0]
            self._flat_run, self._flat_from = (self._flat_from, number), -1
            self._last_flat = self._flat_run
        if self._flat_run and number - self._flat_run[1] >= 16:
            self._decide_run(number + 1)

    def _look_for_cut(self, number: int, end: int) -> None:
        """Whether a shot begins with frame ``number``, as far as the frames before ``end`` say."""
        at = number - self._base
        if self._changes[at] <= self.CHANGE or number - self._first < 3:
            return
        first, last = max(0, at - self.WINDOW), min(end - self._base, at + self.WINDOW)
        around = np.sort(np.delete(self._changes[first + 1 : last], at - first - 1))[::-1]
        usual = float(around[len(around) // 2]) if len(around) else 0.0
        third = float(around[2]) if len(around) > 2 else 0.0
        frames = self._colors[first:last]
        before, after = frames[: at - first], frames[at - first :]
        across = float(np.abs(before[:, None] - after).mean((2, 3, 4)).min())
        if across <= max(self.CHANGE, 0.3 * float(self._changes[at])):
            return
        correlation = _correlation(self._lumas[at - 1], self._lumas[at])
        if across <= 1.3 * third and (across < 0.06 or correlation > 0.5):  # motion in steps
            return
        steps = np.sort(
            np.delete(self._changes[max(0, at - 3 * self.WINDOW) : last], at - max(0, at - 3 * self.WINDOW))
        )
        if across <= 1.3 * float(steps[-3:][0]) and correlation > 0.85:  # slow motion in steps
            return
        if correlation < self.CORRELATION:
            ratio = (1.8 + 2.0 * max(0.0, correlation - 0.1)) * usual
            score = across / max(self.CHANGE, ratio)
            if score > 1:
                self._pending.append(Cut(number, "cut", score))

    def _decide_run(self, end: int) -> None:
        """A run of flat frames is a boundary if the pictures on its two sides differ. ``end``: of what follows it."""
        assert self._flat_run
        begin, follow = self._flat_run
        self._flat_run = None
        edges = [cut for cut in self._pending if begin - 1 <= cut.frame <= follow + 1]
        others = [cut.frame for cut in self._pending if cut not in edges]
        self._pending = [cut for cut in self._pending if cut not in edges]
        own = begin - max([begin - len(self._before_flat), *(n for n in others if n < begin)])
        before = self._before_flat[len(self._before_flat) - own :][::-1]
        last = min([end, follow + self.SIDE, *(n for n in others if n > follow)])
        after = self._colors[max(0, follow - self._base) : last - self._base]
        if not len(before) or not len(after):  # the video begins or ends in it
            return
        score = 1.0
        level = float(self._means[max(0, follow - 1 - self._base)])
        if not (_gradual(before, level) or _gradual(after, level)):
            pairs = list(zip(_sides(before), _sides(after), strict=False))
            if max(float(np.abs(a - b).mean()) for a, b in pairs[:2]) < 2 * self.CHANGE:
                return
            most = 0.5 if follow - begin < self.BLINK else 0.72
            score = most / max(0.1, *(_correlation(a.mean(-1), b.mean(-1)) for a, b in pairs))
            if score < 1:
                return
        exact = {cut.frame for cut in edges}
        frame = follow if follow in exact else begin if begin in exact else (begin + follow) // 2
        kind = "cut" if frame in exact else "fade"
        self._pending.append(Cut(max(frame, self._count - self.DELAY), kind, score))

    def _look_for_dissolves(self, start: int) -> None:
        """Dissolves that end with one of the frames from ``start`` on, every second of them."""
        for span in self.SPANS:
            ends = np.arange(start + start % 2, self._count, 2)
            least = max(self._first, self._base, self._last_flat[1])
            ends = ends[ends - span >= least]
            if self._flat_from >= 0:
                ends = ends[ends < self._flat_from]
            if not len(ends):
                continue
            at = ends - self._base
            begin = self._lumas[at - span].reshape(len(at), -1)
            way = self._lumas[at].reshape(len(at), -1) - begin
            squares = np.einsum("nc,nc->n", way, way)
            lengths = np.sqrt(squares / way.shape[1])
            rows = np.flatnonzero(lengths >= 0.06)
            if not len(rows):
                continue
            begin, way, squares = begin[rows], way[rows], squares[rows]

            def off(share: float, span: int = span, at=at[rows], begin=begin, way=way, squares=squares):
                """Where frames lie on the way from start to end (0 to 1), and their distance from the way."""
                step = self._lumas[at - span + round(share * span)].reshape(len(at), -1) - begin
                along = np.einsum("nc,nc->n", step, way) / squares
                step -= along[:, None] * way
                return along, np.sqrt(np.einsum("nc,nc->n", step, step) / squares)

            middle, middle_off = off(0.5)
            low, low_off = off(0.25)
            high, high_off = off(0.75)
            good = (middle_off <= self.BETWEEN) & (np.abs(middle - 0.5) <= 0.2)
            good &= (low > -0.1) & (low < 0.45) & (high > 0.55) & (high < 1.1)
            variances = np.square(self._stds)
            ends_variance = (variances[at[rows]] + variances[at[rows] - span]) / 2
            good &= variances[at[rows] - span + span // 2] <= self.DIP * ends_variance
            good &= np.maximum(low_off, high_off) < self.BETWEEN + 0.05
            for row in np.flatnonzero(good):
                end = int(at[rows[row]])
                first, last = self._lumas[end - span], self._lumas[end]
                if _correlation(first, last, reach=0) > 0.6 or _correlation(first, last) > 0.7:
                    continue
                score = float(lengths[rows[row]]) / 0.06 * self.BETWEEN / max(0.05, float(middle_off[row]))
                found = Cut(end + self._base - span // 2, "dissolve", score)
                best = self._dissolve
                if found.frame > self._last_dissolve + 36 and (best is None or found.score > best.score):
                    self._dissolve = found

    def _settle(self, final: bool = False) -> list[Cut]:
        """Report the boundaries that later frames cannot change."""
        if final and self._flat_run:
            self._decide_run(self._count)
        best = self._dissolve
        if best and (final or self._count - best.frame > 40):
            self._dissolve = None
            near = [cut for cut in self._pending if abs(cut.frame - best.frame) <= 26]
            begin, end = (self._flat_from, self._count) if self._flat_from >= 0 else self._last_flat
            if not near and not (begin < best.frame + 30 and end > best.frame - 30):
                self._last_dissolve = best.frame
                self._pending.append(best)
        done: list[Cut] = []
        waiting: list[Cut] = []
        for cut in sorted(self._pending):
            if not final and self._count - cut.frame <= self.DELAY - self.CHUNK:
                waiting.append(cut)
            elif not any(self._beats(other, cut) for other in (*self._pending, self._latest)):
                done.append(cut)
                self._latest = cut
        self._pending = waiting
        return done

    def _beats(self, other: Cut, cut: Cut) -> bool:
        """Of two cuts within the window, one is false: a shot's first frames may still change, its last be torn."""
        near = cut.kind == other.kind == "cut" and abs(cut.frame - other.frame) < self.WINDOW
        return near and (other.score, cut.frame) > (cut.score, other.frame)


def thumbnail(frame: VideoFrame) -> npt.NDArray[np.uint8]:
    """(2 ROWS, 2 COLUMNS, 3) uint8 RGB, whatever the frame's size and shape; not turned upright."""
    return rgb(frame, (2 * ROWS, 2 * COLUMNS), turn=False, interpolation="AREA")


def _cells(thumbnails: npt.NDArray[np.uint8]) -> Floats:
    """(N, 2 ROWS, 2 COLUMNS, 3) uint8 to (N, ROWS, COLUMNS, 3) in [0, 1]."""
    rows = thumbnails[:, ::2].astype(np.uint16) + thumbnails[:, 1::2]
    return (rows[:, :, ::2] + rows[:, :, 1::2]).astype(np.float32) / np.float32(4 * 255)


def _sides(frames: Floats) -> list[Floats]:
    """Of frames in the order away from a flat run, the one of most contrast, and the nearest ones."""
    stds = frames.mean(-1).std((1, 2))
    return [frames[int(stds.argmax())], *(frames[place] for place in (0, 1, 2, 4) if place < len(frames))]


def _gradual(frames: Floats, level: float) -> bool:
    """Whether frames, in the order away from a flat run of a level, leave it step by step. A blink ends at once."""
    lumas = frames.mean(-1)
    stds, way = lumas.std((1, 2)), np.abs(lumas.mean((1, 2)) - level)
    slow = stds[:4].max() < 0.6 * stds.max() and way[0] < 0.35 * way.max()
    return bool(slow and way.max() > ShotDetector.CHANGE)


def _correlation(a: Floats, b: Floats, reach: int = 2) -> float:
    """Largest correlation of two lumas over shifts of up to ``reach`` rows and twice as many columns."""
    h, w = a.shape
    a, b = a - a.mean(), b - b.mean()
    best = -1.0
    for dy in range(-reach, reach + 1):
        for dx in sorted({*range(-2 * reach, 2 * reach + 1, 2), *range(-min(reach, 1), min(reach, 1) + 1)}):
            x = a[max(0, dy) : h + min(0, dy), max(0, dx) : w + min(0, dx)].ravel()
            y = b[max(0, -dy) : h + min(0, -dy), max(0, -dx) : w + min(0, -dx)].ravel()
            best = max(best, float(x @ y) / (float((x @ x) * (y @ y)) ** 0.5 + 1e-4))
    return best


def mark_cuts(frames: Iterable[tuple[T, VideoFrame]]) -> Iterator[tuple[T, Cut | None, int]]:
    """Yield each item with the boundary before it, if any, in order, ``ShotDetector.DELAY`` frames late.

    Args:
        frames: Items of any type, each with its frame, of one video in presentation order. No frame is kept.

    Yields:
        The item, the boundary, and the last frame, up to this one, that differs visibly from those before it.
    """
    detector, cuts = ShotDetector(), dict[int, Cut]()
    pending: deque[tuple[T, int]] = deque()
    number = 0
    for item, frame in frames:
        cuts.update((cut.frame, cut) for cut in detector.push(frame))
        pending.append((item, detector.moved))
        if len(pending) > detector.DELAY:
            item, moved = pending.popleft()
            yield item, cuts.get(number), moved
            number += 1
    cuts.update((cut.frame, cut) for cut in detector.finish())
    for place, (item, moved) in enumerate(pending, number):
        yield item, cuts.get(place), moved
