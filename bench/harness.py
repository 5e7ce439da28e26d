"""A race: ours, the reference, the peers and the limit of the machine do the same work in interleaved rounds.

1. Every candidate runs once. Its values and gradients are compared with a float64 truth. A wrong candidate gets no
   time, and a wrong result of ours ends the race as a test failure.
2. A warm-up finds how many rounds the time budget allows.
3. The rounds run ``A B C A B C ...``, so that a busy neighbor slows all candidates alike. A speedup is the median over
   the rounds of the ratio *within* a round. The last result of ours is compared with the truth again.
4. Peak memory and flops are counted in a call of their own.

The record of a race is a plain dict (``docs/benchmarks.md``). ``bench/conftest.py`` hands it to pytest-benchmark.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from bench.clock import ColdCache, CudaClock, graphed, wall_clock
from bench.memory import cost

Role = Literal["ours", "reference", "peer", "same_bytes", "context", "limit"]
Result = Sequence[Tensor]

SHORT = 1e-2  # seconds: a sample of a shorter call repeats it
GRAPHED = 2e-2  # seconds: on CUDA a shorter call is replayed as a graph, which removes the launch time of Python
EAGER = 8  # calls without a graph, of which the fastest counts; the first ones compile and record
SLOW = 0.5  # seconds: a slower call is warmed up once, and a peer behind the best one then has few rounds ...
FAR_BEHIND = 4  # ... as has a peer that takes this many times as long as the best one
FEW_ROUNDS = 2  # or as many as fit the budget of the others
MAX_REFERENCE_ERROR = 0.5  # relative; bfloat16 gives some 0.2


@dataclass
class Candidate:
    """One way of doing the work.

    ``call`` does it once and returns its results in the order of the truth. A ``limit`` (bare matmul, copy, bare
    decode) does the unavoidable part only. A peer of ``same_bytes`` reads what ours reads, where the other peers read
    the original files. A ``context`` candidate does more or other work and is no peer. Neither is
    compared with the truth unless it has its own. A candidate without ``call`` stays in the record with its ``note``.
    One that ``compiles`` does so in a call of its own, and only in a race.
    """

    name: str
    call: Callable[[], Result] | None
    role: Role = "peer"
    note: str = ""
    truth: Callable[[], Result] | None = None
    compiles: bool = False


def absent(name: str, why: str) -> Candidate:
    """A peer that is not raced, and why; named in the output and in the JSON."""
    return Candidate(name, None, "peer", why)


@dataclass(frozen=True)
class Work:
    """What the task demands of any implementation: arithmetic and the least traffic, per call."""

    flops: float = 0.0
    bytes: float = 0.0
    items: float = 0.0
    unit: str = ""


@dataclass(frozen=True)
class Budget:
    """How long to race: seconds for the rounds of a case, and between how many rounds."""

    seconds: float = 6.0
    fewest: int = 7
    most: int = 60


@dataclass
class _Runner:
    candidate: Candidate
    status: str = "ok"
    reason: str = ""
    error: float | None = None
    bound: float | None = None
    repeats: int = 1
    estimate: float = 0.0
    eager: float | None = None
    sample: Callable[[], object] | None = None
    times: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    flops: int | None = None

    def record(self) -> dict[str, Any]:
        row: dict[str, Any] = {"name": self.candidate.name, "role": self.candidate.role, "status": self.status}
        row |= {"reason": self.reason or self.candidate.note}
        if self.error is not None:
            row |= {"error": self.error, "error_bound": self.bound}
        if self.times:
            ordered = sorted(self.times)
            row |= {"median_s": statistics.median(ordered), "low_s": ordered[0], "spread": spread(ordered)}
            row |= {"rounds": len(ordered), "repeats": self.repeats}
            row |= {"eager_s": self.eager} if self.eager else {}
        if self.peak_bytes is not None:
            row |= {"peak_bytes": self.peak_bytes} | ({} if self.flops is None else {"flops": self.flops})
        return row


def spread(ordered: Sequence[float]) -> float:
    """Interquartile range over the median, from sorted samples."""
    count = len(ordered)
    return (ordered[(3 * count) // 4] - ordered[count // 4]) / ordered[count // 2] if count > 1 else 0.0


def relative_error(got: Result, truth: Result) -> float:
    """The largest ``|got - truth| / |truth|`` (Euclidean norms, float64) over the results;

    inf for NaN or a wrong shape.
    """
    if len(got) != len(truth):
        return float("inf")
    worst = 0.0
    for mine, true in zip(got, truth, strict=True):
        if mine.shape != true.shape:
            return float("inf")
        true64 = true.detach().double()
        distance = (mine.detach().to(true64) - true64).norm().item()
        error = distance / max(true64.norm().item(), 1e-300) if distance else 0.0
        worst = max(worst, error) if error == error else float("inf")
    return worst


class Race:
    """Runs one case; see the module.

    Args:
        case: its name.
        params: its parameters, which complete its id.
        candidates: exactly one of them has the role ``ours``.
        truth: the float64 result.
        work: flops, bytes and items of the task.
        agree: replaces :func:`relative_error`.
        bound: the largest error allowed. By default twice the error of the reference in the precision of the inputs,
            and at least 1e-5, the effect of another order of float32 sums.
        device: of the candidates.
        budget: how long to race.
        cold: on CUDA, empty the L2 cache before each sample.
        memory: whether to count peak memory and flops.
        once: a call continues the one before it, as a training step does, so that only the first is compared.
    """

    def __init__(
        self,
        case: str,
        params: dict[str, Any],
        candidates: Sequence[Candidate],
        *,
        truth: Callable[[], Result],
        work: Work | None = None,
        agree: Callable[[Result, Result], float] = relative_error,
        bound: float | None = None,
        device: torch.device | str = "cpu",
        budget: Budget | None = None,
        cold: bool = False,
        memory: bool = True,
        once: bool = False,
    ) -> None:
        roles = [candidate.role for candidate in candidates]
        if roles.count("ours") != 1:
            raise ValueError(f"a race has exactly one candidate of ours, {case} has {roles.count('ours')}")
        if bound is None and "reference" not in roles:
            raise ValueError(f"a race needs a reference or a bound on the error, {case} has neither")
        self.case, self.params, self.work = case, params, work or Work()
        self.device, self.budget, self.cold = torch.device(device), budget or Budget(), cold
        self._agree, self._bound, self._truth, self._memory = agree, bound, truth, memory
        self._once, self._exact, self._last = once, list[Tensor](), list[Tensor]()
        self._runners = [_Runner(candidate) for candidate in candidates]
        self.ours = next(runner for runner in self._runners if runner.candidate.role == "ours")
        self.clock = CudaClock() if self.device.type == "cuda" else wall_clock
        self._flush = ColdCache(self.device) if cold and self.device.type == "cuda" else None
        self._round = 0
        self.rounds = 0

    @property
    def id(self) -> str:
        """``case[name=value,...]``, the key of the case in the gate and in the tables."""
        return f"{self.case}[{','.join(f'{name}={value}' for name, value in self.params.items())}]"

    def check(self) -> None:
        """Step 1. Raises AssertionError when our own result is wrong, before anything is timed."""
        self._exact = [tensor.detach() for tensor in self._truth()]
        if not all(bool(tensor.isfinite().all()) for tensor in self._exact):
            raise AssertionError(f"{self.id}: the float64 truth is not finite, so it says nothing")
        order = sorted(self._runners, key=lambda runner: runner.candidate.role != "reference")
        bound = self._bound
        gc.collect()
        gc.freeze()  # else each collection scans all imported objects, 0.2 s a candidate
        for runner in order:
            self._check_one(runner, bound)
            if runner.candidate.role == "reference" and bound is None:
                bound = max(2 * (runner.error or 0.0), 1e-5)
            gc.collect()
        gc.unfreeze()
        for runner in order:
            if runner.candidate.role in ("ours", "reference"):
                self._refuse(runner)

    def check_last(self) -> None:
        """After step 3: our last sample was as right as the first call. Raises as :meth:`check` does."""
        if not self._once:
            self._judge(self.ours, self._last, self._exact, self.ours.bound)
            self._refuse(self.ours)
        self._last.clear()
        self._exact.clear()

    def _refuse(self, runner: _Runner) -> None:
        if runner.status == "wrong":
            raise AssertionError(f"{self.id}: {runner.candidate.name}: {runner.reason}; no time is reported")

    def _check_one(self, runner: _Runner, bound: float | None) -> None:
        candidate = runner.candidate
        if candidate.call is None:
            runner.status, runner.reason = "skipped", candidate.note
            return
        try:
            if candidate.compiles:
                candidate.call()
            result = self._first_call(runner)
            if candidate.truth is not None:
                self._judge(runner, result, candidate.truth(), bound)
            elif candidate.role not in ("limit", "context"):
                self._judge(runner, result, self._exact, bound)
        except Exception as error:
            if candidate.role == "ours":
                raise
            runner.status, runner.reason = "failed", one_line(error)

    def _first_call(self, runner: _Runner) -> Result:
        call = runner.candidate.call
        assert call is not None
        start = self.clock()
        result = call()
        runner.estimate = self.clock() - start
        return result

    def _judge(self, runner: _Runner, result: Result, truth: Result, bound: float | None) -> None:
        runner.error = self._agree(result, truth)
        runner.bound = MAX_REFERENCE_ERROR if bound is None else bound  # no bound yet: this is the reference
        if not runner.error <= runner.bound:
            runner.status = "wrong"
            runner.reason = f"differs from the float64 truth by {runner.error:.2g}, allowed {runner.bound:.2g}"

    def calibrate(self) -> None:
        """Step 2: warm-up, repeats within a sample, and the number of rounds that the budget allows."""
        for runner in self._racing():
            call = runner.candidate.call
            assert call is not None
            if self.device.type == "cuda":  # the check compiled
                runner.estimate = self._timed(call)
            if runner.estimate > self.budget.seconds:  # the check was its warm-up
                runner.sample = call
                continue
            estimate = min(self._timed(call) for _ in range(1 if runner.estimate > SLOW else 2))
            if self.device.type == "cuda" and estimate < GRAPHED and self._flush is None:
                runner.eager = min(estimate, *(self._timed(call) for _ in range(EAGER)))
                self._make_graph(runner)
            if runner.sample is None:
                runner.repeats = 1 if self._flush else min(1000, int(SHORT / max(estimate, 1e-7)) + 1)
                runner.sample = _repeated(call, runner.repeats)
            runner.estimate = estimate if estimate > SLOW else self._timed(runner.sample) / runner.repeats
        total = sum(runner.estimate * runner.repeats for runner in self._racing() if not self._slow(runner))
        self.rounds = int(min(max(self.budget.seconds / max(total, 1e-9), self.budget.fewest), self.budget.most))

    def _make_graph(self, runner: _Runner) -> None:
        """First of one call, to see how long it takes the device; then of as many as make a sample."""
        call = runner.candidate.call
        assert call is not None
        try:
            once = _replayed(call)
            self._timed(once)
            repeats = min(100, int(SHORT / max(self._timed(once), 1e-6)) + 1)
            runner.sample, runner.repeats = _replayed(call, repeats), repeats
        except RuntimeError as error:
            runner.reason = f"not captured as a graph: {str(error).splitlines()[0][:120]}"

    def _slow(self, runner: _Runner) -> bool:
        """Whether it would use up the rounds of the reference, the best peer and the limit."""
        if runner.candidate.role not in ("peer", "same_bytes", "context"):
            return False
        peers = [other.estimate for other in self._racing() if other.candidate.role == "peer"]
        behind, sample = runner.estimate / min(peers, default=float("inf")), runner.estimate * runner.repeats
        return sample > (SLOW if behind < FAR_BEHIND else 4 * SHORT) and behind > 1

    def _few(self, runner: _Runner) -> int:
        return max(FEW_ROUNDS, int(self.budget.seconds / (runner.estimate * runner.repeats)))

    def _racing(self) -> list[_Runner]:
        return [runner for runner in self._runners if runner.status == "ok"]

    def _timed(self, call: Callable[[], object], keep: list[Any] | None = None) -> float:
        if self._flush is not None:
            self._flush()
        start = self.clock()
        kept = call()
        seconds = self.clock() - start
        if keep is not None:
            keep[:] = kept
        del kept
        return seconds

    def take_turns(self) -> None:
        """Step 3."""
        for _ in range(self.rounds):
            self.time_others()
            self.time_ours()

    def time_others(self) -> None:
        """Opens a round and times all candidates but ours."""
        self._last.clear()
        for runner in self._racing():
            if runner is not self.ours and (not self._slow(runner) or self._round < self._few(runner)):
                self._sample(runner)

    def time_ours(self) -> None:
        """Our turn; closes the round."""
        self._sample(self.ours)
        self._round += 1

    def _sample(self, runner: _Runner) -> None:
        assert runner.sample is not None
        keep = self._last if runner is self.ours else None
        runner.times.append(self._timed(runner.sample, keep) / runner.repeats)

    def count_cost(self) -> None:
        """Step 4: peak memory and flops of each candidate that has a time, but for the limit."""
        for runner in self._racing():
            if not self._memory or runner.candidate.role == "limit":
                continue
            assert runner.candidate.call is not None
            counted = cost(runner.candidate.call, self.device)
            runner.peak_bytes, runner.flops = counted.peak_bytes, counted.flops

    def run(self) -> dict[str, Any]:
        """The whole race without pytest-benchmark."""
        self.check()
        self.calibrate()
        self.take_turns()
        self.check_last()
        self.count_cost()
        return self.record()

    def count(self) -> dict[str, Any]:
        """Correctness, flops and peak memory of ours alone: no clock, so the same on every run."""
        self._runners = [runner for runner in self._runners if runner.candidate.role in ("ours", "reference")]
        self.check()
        self._runners = [self.ours]
        self.count_cost()
        return self.record()

    def record(self) -> dict[str, Any]:
        """The case as it goes into the results file."""
        rows = []
        for runner in self._runners:
            row = runner.record()
            if runner.times and runner is not self.ours:  # a slow peer raced in the first rounds alone
                ratios = sorted(theirs / ours for theirs, ours in zip(runner.times, self.ours.times, strict=False))
                row |= {"speedup": statistics.median(ratios), "speedup_spread": spread(ratios)}
            rows.append(row)
        seconds = next(row for row in rows if row["role"] == "ours").get("median_s", float("inf"))
        work = asdict(self.work)
        return {
            "id": self.id,
            "case": self.case,
            "params": self.params,
            "device": self.device.type,
            "rounds": self._round,
            "cold": self._flush is not None,
            "work": work,
            "rates": rates(work, seconds),
            "vs": summary(rows),
            "candidates": rows,
        }


def _repeated(call: Callable[[], Result], repeats: int) -> Callable[[], Result]:
    """Returns the last call's result."""
    if repeats == 1:
        return call

    def several() -> Result:
        for _ in range(repeats - 1):
            call()
        return call()

    return several


def _replayed(call: Callable[[], Result], repeats: int = 1) -> Callable[[], Result]:
    """As a graph that returns the results of its last call. Detached, as an autograd node would outlive the capture."""
    kept: list[Tensor] = []

    def keeping() -> None:
        kept.clear()
        kept.extend(tensor.detach() for tensor in call())

    replay = graphed(keeping, repeats)

    def sample() -> Result:
        replay()
        return kept

    return sample


def rates(work: dict[str, Any], seconds: float) -> dict[str, float]:
    """What of the work there is, a second: ``tflops``, ``gbytes`` and ``items``."""
    units = {"tflops": ("flops", 1e12), "gbytes": ("bytes", 1e9), "items": ("items", 1.0)}
    return {name: work[key] / seconds / unit for name, (key, unit) in units.items() if work[key]}


def one_line(error: Exception) -> str:
    """An exception as the reason of a candidate that is not raced."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Our speed over the reference's, over the best peer's of either kind, and as a fraction of the limit, in the same
    run."""
    found: dict[str, Any] = {}
    timed = [row for row in rows if "speedup" in row]
    for row in timed:
        if row["role"] == "reference":
            found["reference"] = row["speedup"]
        elif row["role"] == "limit":
            found["limit"] = min(row["speedup"], found.get("limit", float("inf")))
    for role, name in (("peer", "best_peer"), ("same_bytes", "best_same_bytes")):
        if peers := [row for row in timed if row["role"] == role]:
            best = min(peers, key=lambda row: row["speedup"])
            found |= {name: best["speedup"], f"{name}_name": best["name"]}
    return found


def skipped(cases: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """Every candidate without a time: name, reason, and in how many cases."""
    rows = [row for record in cases for row in record["candidates"] if row["status"] != "ok"]
    found = Counter((row["name"], f"{row['status']}: {row['reason']}") for row in rows)
    return [{"name": name, "reason": reason, "cases": str(count)} for (name, reason), count in sorted(found.items())]


def partial(results: Path) -> Path:
    """Where a run keeps its cases until it is over: one that is stopped leaves the file of the run before it alone."""
    return results.with_name(f"{results.stem}.partial.json")


def timestamp() -> str:
    """Now, in UTC, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
