"""Balance kept clips against a target class distribution: how many of each class, and which.

n_c = min(available_c, round(T p_c)). Nothing is ever copied to fill a class.
"""

import hashlib
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class BalanceOptions:
    total: int | None = None
    """Clips in all; by default the largest number that fills ``fill`` of the target."""
    fill: float = 0.9
    """Share of the target that the default total fills."""
    max_per_video: int = 3
    """Clips of one source video; 0 is no limit."""
    seed: int = 0
    """Breaks ties between clips of one video with equal scores."""

    def __post_init__(self) -> None:
        if self.total is not None and self.total < 1:
            raise ValueError(f"total is {self.total}, must be at least 1")
        if not 0 < self.fill <= 1:
            raise ValueError(f"fill is {self.fill}, must be above 0 and at most 1")
        if self.max_per_video < 0:
            raise ValueError(f"max_per_video is {self.max_per_video}, must be at least 0 (0 = no limit)")


@dataclass(frozen=True, slots=True)
class Clip:
    """A candidate of the balance. ``group`` is its duplicate group, whose members count as one video."""

    clip_id: str
    label: int
    video: str
    score: float


@dataclass(frozen=True)
class Balance:
    """``chosen`` clip ids, in the order of choice; the counts of each class are in ``counts`` and ``wanted``."""

    chosen: tuple[str, ...]
    total: int
    wanted: dict[int, int]
    available: dict[int, int]
    counts: dict[int, int]
    distance: float
    """Total-variation distance of the chosen classes to the target."""
    optimum: float
    """The least that any choice of as many clips from the available ones reaches."""


def balance(clips: Sequence[Clip], target: Mapping[int, float], options: BalanceOptions) -> Balance:
    """Choose clips so that the class counts are as near to ``target`` as the available clips allow.

    Within a class the videos take turns; each gives its best clip by score, then by a seeded hash of its id. The result
    depends on the set of clips only, not on their order.

    Args:
        clips: The clips that passed all earlier steps.
        target: Weight of each class; any scale.
        options: See :class:`BalanceOptions`.

    Raises:
        ValueError: The target has no positive weight, or a negative or infinite one.
    """
    shares = _shares(target)
    queues = _queues(clips, shares, options)
    available = {label: len(queue) for label, queue in queues.items()}
    total = options.total if options.total is not None else fill_total(available, shares, options.fill)
    wanted = {label: round(total * share) for label, share in shares.items()}
    counts = {label: min(available.get(label, 0), wanted[label]) for label in shares}
    chosen = tuple(clip for label in sorted(counts) for clip in queues.get(label, [])[: counts[label]])
    distance = total_variation(counts, shares)
    return Balance(chosen, total, wanted, available, counts, distance, least_distance(available, shares, len(chosen)))


def _shares(target: Mapping[int, float]) -> dict[int, float]:
    bad = [label for label, weight in target.items() if not 0 <= weight < math.inf]
    whole = sum(target.values())
    if bad or not whole > 0:
        raise ValueError(f"the target's weight of class {bad[0]} is {target[bad[0]]}" if bad else "the target is empty")
    return {label: weight / whole for label, weight in sorted(target.items()) if weight}


def _queues(clips: Sequence[Clip], shares: Mapping[int, float], options: BalanceOptions) -> dict[int, list[str]]:
    """The clips of each class in the order in which they are taken. A video's limit counts over all its classes."""
    numbers: dict[str, int] = {}
    label = np.fromiter((clip.label for clip in clips), np.int64)
    video = np.fromiter((numbers.setdefault(clip.video, len(numbers)) for clip in clips), np.int64)
    score = np.fromiter((clip.score for clip in clips), np.float64)
    draw = np.fromiter((_draw(clip.clip_id, options.seed) for clip in clips), np.uint64)
    inside = np.flatnonzero(np.isin(label, list(shares)))
    order = inside[np.lexsort((draw[inside], -score[inside], video[inside]))]
    if options.max_per_video:
        order = order[_places(video[order]) < options.max_per_video]
    order = order[np.lexsort((label[order], video[order]))]  # stable: the best first of each video and class
    turn = _places(video[order] * (label.max(initial=0) + 1) + label[order])
    order = order[np.lexsort((draw[order], -score[order], turn))]
    queues: dict[int, list[str]] = defaultdict(list)
    for place in order.tolist():
        queues[clips[place].label].append(clips[place].clip_id)
    return dict(queues)


def _places(groups: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The place of each element in its run of equal ones."""
    fresh = np.ones(len(groups), bool)
    fresh[1:] = groups[1:] != groups[:-1]
    starts = np.flatnonzero(fresh)
    return np.arange(len(groups)) - np.repeat(starts, np.diff(np.r_[starts, len(groups)]))


def _draw(clip_id: str, seed: int) -> int:
    key = seed.to_bytes(8, "little", signed=True)
    return int.from_bytes(hashlib.blake2b(clip_id.encode(), digest_size=8, key=key).digest())


def fill_total(available: Mapping[int, int], shares: Mapping[int, float], fill: float) -> int:
    """The largest T of which the classes can fill the share ``fill``: sum of min(a_c, T p_c) >= fill T.

    The filled share never grows with T, so T is found by bisection; 0 where no clip is available.
    """
    counts = np.array([available.get(label, 0) for label in shares], np.float64)
    weights = np.array(list(shares.values()))
    low, high = 0, int(counts.sum() / fill) + 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if np.minimum(counts, middle * weights).sum() >= fill * middle else (low, middle - 1)
    return low or min(1, int(counts.sum()))


def total_variation(counts: Mapping[int, int], shares: Mapping[int, float]) -> float:
    """Half the L1 distance of the counts' distribution to the target's; 1 where nothing is chosen."""
    whole = sum(counts.values())
    if not whole:
        return 1.0
    return 0.5 * sum(abs(counts.get(label, 0) / whole - share) for label, share in shares.items())


def least_distance(available: Mapping[int, int], shares: Mapping[int, float], chosen: int) -> float:
    """The least total-variation distance of any ``chosen`` of the available clips.

    Greedy is exact, since the distance is a sum of convex functions of the counts: the next clip goes to the class with
    the largest shortfall.
    """
    if not chosen:
        return 1.0
    limits: npt.NDArray[np.int64] = np.array([available.get(label, 0) for label in shares])
    ideal = chosen * np.array(list(shares.values()))
    counts = np.minimum(limits, np.floor(ideal).astype(np.int64))
    rest = chosen - int(counts.sum())
    while rest > 0 and (counts < limits).any():
        short = np.where(counts < limits, ideal - counts, -np.inf)
        order = np.argsort(-short, kind="stable")
        gain = order[short[order] > 0][:rest]
        if len(gain):
            counts[gain] += 1
            rest -= len(gain)
        else:  # all that have clips are at or above their ideal: any of them is as good
            step = np.minimum(limits - counts, rest)
            step = np.where(np.cumsum(step) <= rest, step, np.maximum(0, rest - (np.cumsum(step) - step)))
            counts += step
            rest -= int(step.sum())
    return 0.5 * float(np.abs(counts / max(1, int(counts.sum())) - np.array(list(shares.values()))).sum())
