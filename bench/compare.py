"""``python -m bench.compare OLD NEW``: has this project become slower? Compares figures that hold on every machine.

*Timed* figures are ratios within one run: our time over the time of each anchor (limit, reference, peers) of the case.
A case is slower by the median growth of that ratio over its anchors.

*Counted* figures are exact and may hardly grow: flops, peak memory, instructions, packets per frame, registers, spills.

A case, a figure, a kernel or all anchors that OLD has and NEW lost is a regression too, and so is a figure that is not
finite. Three kinds are excused: full cases and targets in a quick run, times in a --counted run, and instructions
without valgrind.

``--confirm N`` races the slower cases again, at most N times, and keeps a verdict that repeats.

Exit status: 0 nothing is worse, 1 something is (named on the last lines), 2 unusable input.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bench.harness import one_line
from bench.tables import ours_of
from bench.text import significant

Record = dict[str, Any]
ANCHORS = ("limit", "reference", "peer", "context")
SCHEMA = 1
REQUIRED = ("quick", "device", "machine", "versions", "cases")
UNUSABLE = (OSError, ValueError, RecursionError)


@dataclass(frozen=True)
class Rule:
    """The factor by which a figure may grow; ``from_nothing`` is the limit of a figure that was zero."""

    allowed: float
    meaning: str
    from_nothing: float = 0.0


TIME = Rule(1.15, "time against the anchors of the same run")
COUNTED = {
    "flops": Rule(1.005, "flops of our call"),
    "peak_bytes": Rule(1.05, "peak memory of our call", from_nothing=2**20),
    "instructions": Rule(1.03, "instructions executed by the C++ core"),
    "packets": Rule(1.001, "packets decoded per frame used"),
    "step": Rule(1.02, "arithmetic, traffic, memory and planned time of the traced CUDA step"),
    "registers": Rule(1.10, "registers a thread"),
    "spill_bytes": Rule(1.0, "bytes spilled"),
    "shared_bytes": Rule(1.0, "shared memory of a block"),
    "loop_instructions": Rule(1.05, "instructions in the kernel's main loop, or of a kernel without one"),
    "min_bytes": Rule(1.0, "bytes that the kernel must move"),
    "executed": Rule(1.02, "launches, flops, other operations, bytes read and written by a kernel"),
}
KERNEL_FIGURES = ("registers", "spill_bytes", "shared_bytes", "loop_instructions", "min_bytes")


@dataclass(frozen=True)
class Change:
    """One figure of one case, old and new; ``factor`` above ``allowed`` is a regression."""

    case: str
    figure: str
    old: float
    new: float
    factor: float
    allowed: float

    @property
    def worse(self) -> bool:
        return self.factor > self.allowed

    def __str__(self) -> str:
        verdict = "WORSE" if self.worse else "better" if self.factor < 1 / self.allowed else "same"
        values = f"{significant(self.old)} -> {significant(self.new)}"
        factor = f"x{self.factor:.3f} (allowed x{self.allowed:.3f})"
        return f"{verdict:<7}{self.case:<52} {self.figure:<18} {values:<26} {factor}"


@dataclass
class Found:
    """Changes of figures that both results have, and the figures that the new ones lack."""

    changes: list[Change] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def figure(self, case: str, label: str, old: float | None, new: float | None, rule: Rule, slack: float = 1) -> None:
        """Compares one figure. None means that the results lack it."""
        if old is None:
            return
        if new is None:
            self.missing.append(f"{case}: no {label} any more")
        elif not (math.isfinite(old) and math.isfinite(new)):
            self.missing.append(f"{case}: {label} is {old if math.isfinite(new) else new}")
        else:
            factor = new / old if old else (math.inf if new > rule.from_nothing else 1.0)
            self.changes.append(Change(case, label, old, new, factor, 1 + (rule.allowed - 1) * slack))


def compare(old: Record, new: Record, *, slack: float = 1.0) -> tuple[list[Change], list[str]]:
    """Compares two results.

    Args:
        old: the baseline.
        new: the results to judge.
        slack: widens the thresholds of time and memory for results of another machine; 2 doubles them.

    Returns:
        The changes of all figures that both have, and a line for each figure that ``new`` lacks.
    """
    found = Found()
    before, after = _cases(old), _cases(new)
    counted = new.get("counted", False)
    complete = old["quick"] == new["quick"] and (old.get("counted", False) or not counted)
    for name, record in before.items():
        if name in after:
            _compare_case(found, record, after[name], slack, counted)
        elif complete:
            found.missing.append(f"{name}: not in the new results")
    if not before.keys() & after.keys():
        found.missing.append("cases: no case is in both results")
    _compare_static(found, old, new, complete)
    return found.changes, found.missing


def _cases(results: Record) -> dict[str, Record]:
    return {record["id"]: record for record in results["cases"]}


def _compare_case(found: Found, old: Record, new: Record, slack: float, counted: bool) -> None:
    name, mine, yours = old["id"], ours_of(old), ours_of(new)
    if not counted:
        found.figure(name, "time ratio", slowdown(old, old), slowdown(old, new), TIME, slack)
    found.figure(name, "flops", mine.get("flops"), yours.get("flops"), COUNTED["flops"])
    # Libraries choose their scratch by the processor, so memory has slack too.
    found.figure(name, "peak_bytes", mine.get("peak_bytes"), yours.get("peak_bytes"), COUNTED["peak_bytes"], slack)


def slowdown(old: Record, new: Record) -> float | None:
    """The factor by which our time grew against the anchors that both runs share. None without any.

    It is the median. Of two anchors it is the larger: the reference of ``train_step`` runs the same trainer and slows
    down with it, so a mean would halve the growth.
    """
    before = {row["name"]: row["speedup"] for row in old["candidates"] if row["role"] in ANCHORS and "speedup" in row}
    shared = [row for row in new["candidates"] if row["name"] in before and 0 < row.get("speedup", 0) < math.inf]
    votes = [before[row["name"]] / row["speedup"] for row in shared]
    return (max(votes) if len(votes) == 2 else statistics.median(votes)) if votes else None


def _compare_static(found: Found, before: Record, after: Record, complete: bool) -> None:
    fewer = before.get("counted", False) and not after.get("counted", False)  # a counted run compiles more kernels
    old, new = before.get("static", {}), after.get("static", {})
    excused = any(str(reason).startswith("instructions") for reason in new.get("missing", []))  # no valgrind there
    counts = new.get("counts", {})
    for name, value in old.get("counts", {}).items():
        kind = next((kind for kind in ("packets", "step") if kind in name), "instructions")
        if name in counts or not (excused and kind == "instructions"):
            found.figure(name, "count", value, counts.get(name), COUNTED[kind])
    kernels = _kernels(new)
    targets = {str(kernel["arch"]) for kernel in kernels.values()}
    for label, kernel in _kernels(old).items():
        if label in kernels:
            for figure in KERNEL_FIGURES:
                found.figure(label, figure, kernel.get(figure), kernels[label].get(figure), COUNTED[figure])
        elif not targets or (not fewer and (complete or str(kernel["arch"]) in targets)):  # quick: one target of three
            found.missing.append(f"{label}: no longer compiled")
    for label, kernel in old.get("executed", {}).items():
        if (now := new.get("executed", {}).get(label)) is None:
            found.missing.append(f"{label}: no longer executed")
            continue
        for figure, value in kernel.items():
            found.figure(label, f"{figure} executed", value, now.get(figure), COUNTED["executed"])


def _kernels(static: Record) -> dict[str, Record]:
    """By name and target, the second of the same name ``#2``: one launch may compile a kernel twice."""
    found: dict[str, Record] = {}
    seen: Counter[str] = Counter()
    for kernel in static.get("kernels", []):
        label = f"{kernel['name']} on {kernel['arch']}"
        seen[label] += 1
        found[f"{label} #{seen[label]}" if seen[label] > 1 else label] = kernel
    return found


def confirm(
    old: Record, new: Record, worse: list[Change], times: int, run: Callable[[list[str]], Record]
) -> list[Change]:
    """Races the slower cases again and keeps those that are slower every time, or that fail."""
    for _ in range(times):
        again = [change.case for change in worse if change.figure == "time ratio"]
        if not again:
            break
        repeated = _cases(run(again))
        kept = []
        for change in worse:
            if change.figure != "time ratio":
                kept.append(change)
            elif change.case not in repeated:  # a wrong result is not noise
                print(f"failed when run again: {change.case}")
                kept.append(replace(change, figure="time ratio (failed when run again)"))
            else:
                factor = slowdown(_cases(old)[change.case], repeated[change.case]) or change.factor
                if factor > change.allowed:
                    kept.append(replace(change, new=factor, factor=factor))
                else:
                    print(f"not confirmed: {change.case} is x{factor:.3f} in another run")
        worse = kept
    return worse


def _run_again(new: Record) -> Callable[[list[str]], Record]:
    """Runs cases as ``new`` did: the quick set has cases of its own, and a cold cache other times."""

    def run(cases: list[str]) -> Record:
        print(f"running again: {', '.join(cases)}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            results = Path(folder) / "results.json"
            command = [sys.executable, "-m", "bench", "--device", new["device"], "--no-static"]
            command += ["--quick"] if new["quick"] else []
            command += ["--cold"] if any(_cases(new)[case].get("cold") for case in cases) else []
            command += ["--only", ",".join(cases)]
            command += ["--results", str(results), "--report", str(Path(folder) / "report.html")]
            subprocess.run(command, check=False, stdout=subprocess.DEVNULL)  # a case that failed is not in the file
            try:
                return _read(results)
            except UNUSABLE as error:
                print(f"no results of the other run: {error}")
                return {"cases": []}

    return run


def _read(path: Path) -> Record:
    """A results file. ValueError names the reason why it is none."""
    results = json.loads(path.read_text())
    if not isinstance(results, dict) or results.get("schema") != SCHEMA:
        raise ValueError(f"its schema is not {SCHEMA}")
    if lacking := [key for key in REQUIRED if key not in results]:
        raise ValueError(f"it has no {lacking[0]}")
    return results


def _load(path: Path) -> Record:
    try:
        return _read(path)
    except UNUSABLE as error:
        print(f"{path} is not a results file: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.compare", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--confirm", type=int, default=0, metavar="N", help="repeat what looks slower up to N times")
    parser.add_argument("--all", action="store_true", help="print the figures that stayed the same, too")
    options = parser.parse_args(arguments)
    old, new = _load(options.old), _load(options.new)
    if old["device"] != new["device"]:
        print(f"{options.new} is of {new['device']}, {options.old} of {old['device']}", file=sys.stderr)
        return 2
    slack = 1.0
    if any(old["machine"].get(part) != new["machine"].get(part) for part in ("cpu", "gpu")):
        slack = 2.0
        names = f"{old['machine'].get('name')} -> {new['machine'].get('name')}"
        print(f"other machine ({names}): time ratios and peak memory have twice the slack")
    for package in ("torch", "triton"):
        if old["versions"].get(package) != new["versions"].get(package):
            print(f"other {package}: {old['versions'].get(package)} -> {new['versions'].get(package)}")
    try:
        changes, missing = compare(old, new, slack=slack)
    except (LookupError, TypeError, AttributeError, StopIteration) as error:
        print(f"{options.old} or {options.new} is not a results file: {one_line(error)}", file=sys.stderr)
        return 2
    worse = [change for change in changes if change.worse]
    if options.confirm:
        worse = confirm(old, new, worse, options.confirm, _run_again(new))
    for change in changes:
        if options.all or change.worse or change.factor < 1 / change.allowed:
            print(change)
    print(f"{len(changes)} figures of {len(_cases(new))} cases compared, {len(worse)} worse, {len(missing)} missing")
    for change in worse:
        print(f"REGRESSION {change.case}: {change.figure} x{change.factor:.2f}, allowed x{change.allowed:.2f}")
    for line in missing:
        print(f"MISSING {line}")
    for line in new.get("static", {}).get("missing", []):
        print(f"not compared: {line}")
    return 1 if worse or missing else 0


if __name__ == "__main__":
    sys.exit(main())
