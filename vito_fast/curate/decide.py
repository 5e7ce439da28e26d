"""Steps decide, dedup and balance: pure functions of the tables. Nothing is decoded for them.

Conservation: each candidate, and each clip of it, ends in exactly one terminal state, with its reason and numbers.
"""

import itertools
import math
from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from vito_fast.curate.balance import Balance, Clip, balance
from vito_fast.curate.duplicates import Membership
from vito_fast.curate.options import CurateOptions, DecideOptions
from vito_fast.curate.taxonomy import taxonomy

SCHEMA = pa.schema(
    [
        ("candidate_id", pa.string()),
        ("clip_id", pa.string()),
        ("step", pa.string()),
        ("verdict", pa.string()),
        ("reason", pa.string()),
        ("label", pa.int16()),
        ("value", pa.float64()),
        ("threshold", pa.float64()),
    ]
)
DECIDED = ("too short", "flat", "no class prevails", "its query is not seen", "its query is seen too seldom")
"""Reasons of step decide; a later one is of a clip that came further."""
ORDER = ("manifest", "media", "clips", "scores", "decide", "exclude", "dedup", "balance", "pack")
"""Steps in the order of the graph; a candidate's state is that of its clip that came furthest."""


@dataclass(slots=True)
class State:
    """The terminal state of a clip of a candidate."""

    step: str
    verdict: str
    reason: str
    label: int = -1
    value: float | None = None
    threshold: float | None = None


def judge(
    scores: Sequence[Mapping[str, Any]], clip: Mapping[str, Any], classes: Sequence[int], options: DecideOptions
) -> State:
    """Whether a clip shows one of ``classes``; any class if there are none.

    Args:
        scores: Its frames' top-5 ``ids`` and ``probabilities``.
        clip: ``seconds`` and ``flat_share``.
        classes: The query's classes, empty without a query.
        options: The thresholds.

    Returns:
        The state; ``value`` is the clip's score, the mean probability of its hits, where it is kept.
    """
    if clip["seconds"] < options.min_length - 0.0021:
        return State("decide", "rejected", "too short", value=clip["seconds"], threshold=options.min_length)
    if clip["flat_share"] > options.flat_share:
        return State("decide", "rejected", "flat", value=clip["flat_share"], threshold=options.flat_share)
    best: dict[int, list[float]] = defaultdict(list)
    least = options.probability if classes else options.free_probability
    wanted = frozenset(classes)
    for frame in scores:
        label, probability = frame["ids"][0], frame["probabilities"][0]
        if (not wanted or label in wanted) and probability >= least:
            best[label].append(probability)
    if not wanted:
        best = {label: hits for label, hits in best.items() if len(hits) >= options.free_share * len(scores)}
        label = max(best, key=lambda n: (len(best[n]), sum(best[n]), -n), default=-1)
        if label < 0:
            share = max((len(hits) for hits in best.values()), default=0) / max(1, len(scores))
            return State("decide", "rejected", "no class prevails", value=share, threshold=options.free_share)
        return State("decide", "kept", "", label, sum(best[label]) / len(best[label]))
    hits = [probability for values in best.values() for probability in values]
    if len(hits) < options.hits:
        reason = "its query is not seen" if not hits else "its query is seen too seldom"
        return State("decide", "rejected", reason, value=float(len(hits)), threshold=float(options.hits))
    label = max(best, key=lambda n: (len(best[n]), sum(best[n]), -n))
    return State("decide", "kept", "", label, sum(hits) / len(hits))


class Ledger:
    """The states of all candidates and clips, in columns since there may be millions.

    :meth:`rows` enforces the law of conservation.
    """

    def __init__(self) -> None:
        self.kept: dict[str, int] = {}
        """The row of the state that each kept clip counts for."""
        self._candidates: list[str] = []
        self._clips: list[str] = []
        """Empty for a candidate that has no clip."""
        self._reasons: list[str] = []
        self._numbers: dict[str, int] = {}
        """Of the reasons."""
        self._step, self._kept, self._reason, self._label = array("b"), array("b"), array("i"), array("h")
        self._value, self._threshold = array("d"), array("d")

    def reject(self, candidate: str, step: str, reason: str) -> None:
        self._add(candidate, "", State(step, "rejected", reason))

    def decide(self, candidate: str, clip: str, state: State) -> bool:
        """A clip that two candidates keep counts for the better one, by score, then id.

        Returns:
            Whether it counts for this candidate so far.
        """
        row = self._add(candidate, clip, state)
        if state.verdict != "kept":
            return False
        other = self.kept.get(clip)
        if other is not None:
            known = self._state(other)
            mine_first = (-(state.value or 0), candidate) < (-(known.value or 0), self._candidates[other])
            loser, won = (other, state) if mine_first else (row, known)
            lost = self._state(loser)
            reason = "another query of its video has it"
            self._set(loser, State("decide", "rejected", reason, lost.label, lost.value, won.value))
            if not mine_first:
                return False
        self.kept[clip] = row
        return True

    def drop(self, clip: str, step: str, reason: str, value: float | None, threshold: float | None) -> None:
        row = self.kept.pop(clip)
        self._set(row, State(step, "rejected", reason, self._label[row], value, threshold))

    def state(self, clip: str) -> State:
        """Of a kept clip."""
        return self._state(self.kept[clip])

    def states(self) -> Iterator[tuple[str, State]]:
        """The kept clips and their states."""
        return ((clip, self._state(row)) for clip, row in self.kept.items())

    def candidate(self, clip: str) -> str:
        """The candidate that a kept clip counts for."""
        return self._candidates[self.kept[clip]]

    def choose(self, clip: str) -> None:
        """A kept clip that the balance chose."""
        self._step[self.kept[clip]] = ORDER.index("balance")

    def rows(self) -> Iterator[dict[str, Any]]:
        """By candidate, one row for it, its best clip's state, and one for each of its clips."""
        names = [np.array(column, "S") for column in (self._clips, self._candidates)]
        order = np.lexsort(names)
        candidates, clips = names[1][order], names[0][order]
        fresh = np.ones(len(order), bool)
        fresh[1:] = candidates[1:] != candidates[:-1]
        twice = np.flatnonzero(~fresh & np.r_[False, (clips[1:] == clips[:-1]) | (clips[:-1] == b"")])
        assert not len(twice), f"two states of {candidates[twice[0]].decode()}"
        del names, candidates, clips
        starts = np.r_[np.flatnonzero(fresh), len(order)]
        for start, end in itertools.pairwise(starts):
            places = order[start:end].tolist()
            best = max(places, key=self._rank)  # the first of equals
            yield self._row(best, None)
            for place in places if self._clips[places[0]] else ():
                yield self._row(place, self._clips[place])

    def _rank(self, row: int) -> tuple[int, int, int, float]:
        value, reason = self._value[row], self._reasons[self._reason[row]]
        further = DECIDED.index(reason) if reason in DECIDED else len(DECIDED)
        return self._kept[row], self._step[row], further, 0.0 if math.isnan(value) else value

    def _row(self, row: int, clip: str | None) -> dict[str, Any]:
        state = self._state(row)
        return {
            "candidate_id": self._candidates[row], "clip_id": clip, "step": state.step, "verdict": state.verdict,
            "reason": state.reason, "label": state.label, "value": state.value, "threshold": state.threshold,
        }  # fmt: skip

    def _add(self, candidate: str, clip: str, state: State) -> int:
        self._candidates.append(candidate)
        self._clips.append(clip)
        for column in (self._step, self._kept, self._reason, self._label, self._value, self._threshold):
            column.append(0)
        self._set(len(self._clips) - 1, state)
        return len(self._clips) - 1

    def _set(self, row: int, state: State) -> None:
        self._step[row], self._kept[row] = ORDER.index(state.step), state.verdict == "kept"
        if state.reason not in self._numbers:
            self._numbers[state.reason] = len(self._reasons)
            self._reasons.append(state.reason)
        self._reason[row] = self._numbers[state.reason]
        self._label[row] = state.label
        self._value[row] = math.nan if state.value is None else state.value
        self._threshold[row] = math.nan if state.threshold is None else state.threshold

    def _state(self, row: int) -> State:
        numbers = (None if math.isnan(x) else x for x in (self._value[row], self._threshold[row]))
        verdict, reason = "kept" if self._kept[row] else "rejected", self._reasons[self._reason[row]]
        return State(ORDER[self._step[row]], verdict, reason, self._label[row], *numbers)


def drop_duplicates(ledger: Ledger, order: Sequence[str], groups: Sequence[Membership], distance: int) -> None:
    """Keeps the representative of each group. ``order``: the clips as numbered in ``groups``."""
    for clip, group in zip(order, groups, strict=True):
        if group.match is not None and clip in ledger.kept:
            reason = f"near-duplicate of {order[group.representative]}"
            ledger.drop(clip, "dedup", reason, float(group.match.distance), float(distance))


def apply_balance(
    ledger: Ledger, videos: Mapping[str, str], target: Mapping[int, float] | None, options: CurateOptions
) -> Balance:
    """Drops what the balance does not choose. ``videos``: the source video of each clip."""
    clips = [Clip(clip, state.label, videos[clip], state.value or 0.0) for clip, state in ledger.states()]
    if target is None:
        target = dict.fromkeys({clip.label for clip in clips}, 1.0)
    found = balance(clips, target or {0: 1.0}, options.balance)
    chosen = set(found.chosen)
    for clip in clips:
        if clip.clip_id in chosen:
            ledger.choose(clip.clip_id)
        else:
            wanted = found.wanted.get(clip.label)
            reason = "not in the target" if wanted is None else "its class or video is full"
            ledger.drop(clip.clip_id, "balance", reason, None, None if wanted is None else float(wanted))
    return found


def read_target(lines: Iterable[str], name: str) -> dict[int, float]:
    """Class weights from lines ``query,weight``; a query of several classes shares its weight among them evenly.

    Raises:
        ValueError: A line has no known class or no weight.
    """
    target: dict[int, float] = defaultdict(float)
    for number, line in enumerate(lines, 1):
        query, _, weight = line.strip().rpartition(",")
        if not line.strip() or (number == 1 and weight.strip() in ("weight", "count")):
            continue
        classes = taxonomy().resolve(query).classes
        try:
            share = float(weight) / len(classes)
        except (ValueError, ZeroDivisionError):
            raise ValueError(f"{name}: line {number} is no class and weight: {line.strip()!r}") from None
        for label in classes:
            target[label] += share
    return dict(target)
