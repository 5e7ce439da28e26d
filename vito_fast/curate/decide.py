"""Steps decide, dedup and balance: pure functions of the tables. Nothing is decoded for them.

Conservation: each candidate, and each clip of it, ends in exactly one terminal state, with its reason and numbers.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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

    @property
    def rank(self) -> tuple[int, int, float]:
        return self.verdict == "kept", ORDER.index(self.step), self.value or 0.0


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
    """The states of all candidates and clips; :meth:`rows` enforces the law of conservation."""

    def __init__(self) -> None:
        self.candidates: dict[str, State] = {}
        """Of candidates without clips."""
        self.clips: dict[str, dict[str, State]] = defaultdict(dict)
        """By candidate, then clip."""
        self.kept: dict[str, str] = {}
        """The candidate that each kept clip counts for."""

    def reject(self, candidate: str, step: str, reason: str) -> None:
        assert candidate not in self.candidates, f"two states of {candidate}"
        self.candidates[candidate] = State(step, "rejected", reason)

    def decide(self, candidate: str, clip: str, state: State) -> None:
        """A clip that two candidates keep counts for the better one, by score, then id."""
        assert clip not in self.clips[candidate], f"two states of {candidate}, {clip}"
        self.clips[candidate][clip] = state
        if state.verdict != "kept":
            return
        other = self.kept.get(clip)
        if other is not None:
            known = self.clips[other][clip]
            mine_first = (-(state.value or 0), candidate) < (-(known.value or 0), other)
            loser, won = (other, state) if mine_first else (candidate, known)
            lost = self.clips[loser][clip]
            reason = "another query of its video has it"
            self.clips[loser][clip] = State("decide", "rejected", reason, lost.label, lost.value, won.value)
            if not mine_first:
                return
        self.kept[clip] = candidate

    def drop(self, clip: str, step: str, reason: str, value: float | None, threshold: float | None) -> None:
        candidate = self.kept.pop(clip)
        label = self.clips[candidate][clip].label
        self.clips[candidate][clip] = State(step, "rejected", reason, label, value, threshold)

    def state(self, clip: str) -> State:
        return self.clips[self.kept[clip]][clip]

    def rows(self) -> Iterator[dict[str, Any]]:
        """By candidate, one row for it, its best clip's state, and one for each of its clips."""
        for candidate in sorted({*self.candidates, *self.clips}):
            clips = self.clips.get(candidate)
            if clips is None:
                yield _row(candidate, None, self.candidates[candidate])
                continue
            assert candidate not in self.candidates, f"{candidate} has a state of its own and clips"
            best = min(clips, key=lambda clip: (tuple(-x for x in clips[clip].rank), clip))
            yield _row(candidate, None, clips[best])
            for clip in sorted(clips):
                yield _row(candidate, clip, clips[clip])


def _row(candidate: str, clip: str | None, state: State) -> dict[str, Any]:
    return {
        "candidate_id": candidate, "clip_id": clip, "step": state.step, "verdict": state.verdict,
        "reason": state.reason, "label": state.label, "value": state.value, "threshold": state.threshold,
    }  # fmt: skip


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
    states = {clip: ledger.state(clip) for clip in ledger.kept}
    clips = [Clip(clip, state.label, videos[clip], state.value or 0.0) for clip, state in states.items()]
    if target is None:
        target = dict.fromkeys({clip.label for clip in clips}, 1.0)
    found = balance(clips, target or {0: 1.0}, options.balance)
    chosen = set(found.chosen)
    for clip in clips:
        if clip.clip_id not in chosen:
            wanted = found.wanted.get(clip.label)
            reason = "not in the target" if wanted is None else "its class or video is full"
            ledger.drop(clip.clip_id, "balance", reason, None, None if wanted is None else float(wanted))
    for clip_id in chosen:
        state = ledger.state(clip_id)
        ledger.clips[ledger.kept[clip_id]][clip_id] = State("balance", "kept", "", state.label, state.value)
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
