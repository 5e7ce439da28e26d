"""``python -m bench.compare OLD NEW``: did this project get slower? Figures that mean the same on every machine, with
thresholds.

*Timed* figures are ratios within one run: our time over the time of each anchor (limit, reference, peers) of the same
case. A case is slower by the median, over its anchors, of how much that ratio grew: an anchor that had a bad day is
outvoted. *Counted* figures (flops, peak memory, instructions, packets per frame, registers, spills) are exact, so
that next to nothing is allowed. A case or figure that disappeared counts as a regression.

``--confirm N`` runs the cases that look slower again, at most N times, and keeps the verdict only if it repeats:
noise does not repeat, a slower kernel does. Exit status: 0 nothing got worse, 1 something did (named on the last
lines), 2 unusable input.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.text import significant

Record = dict[str, Any]
ANCHORS = ("limit", "reference", "peer", "context")


@dataclass(frozen=True)
class Rule:
    """By which factor a counted figure may grow."""

    allowed: float
    meaning: str


TIME = Rule(1.13, "time against the anchors of the same run")
COUNTED = {
    "flops": Rule(1.005, "flops of our call"),
    "peak_bytes": Rule(1.05, "peak memory of our call"),
    "instructions": Rule(1.03, "instructions executed by the C++ core"),
    "packets": Rule(1.001, "packets decoded per frame used"),
    "registers": Rule(1.10, "registers a thread"),
    "spill_bytes": Rule(1.0, "bytes spilled"),
    "shared_bytes": Rule(1.0, "shared memory of a block"),
    "loop_instructions": Rule(1.05, "instructions in the kernel's main loop"),
    "min_bytes": Rule(1.0, "bytes that the kernel must move"),
    "kernel_flops": Rule(1.005, "flops of the kernel"),
}


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


def compare(old: Record, new: Record, *, slack: float = 1.0) -> tuple[list[Change], list[str]]:
    """(changes of every figure that both have, what is missing in ``new``).

    ``slack`` widens the thresholds of time and memory, for results of another machine: 2 doubles them.
    """
    before, after = _cases(old), _cases(new)
    changes, missing = [], []
    for name, record in before.items():
        if name not in after:
            if old["quick"] == new["quick"] and old["device"] == new["device"] and not new.get("counted"):
                missing.append(f"{name}: not in the new results")
            continue
        changes += _case_changes(name, record, after[name], slack)
    complete = old["quick"] == new["quick"]
    static_changes, static_missing = _static_changes(old.get("static", {}), new.get("static", {}), complete)
    return changes + static_changes, missing + static_missing


def _cases(results: Record) -> dict[str, Record]:
    return {record["id"]: record for record in results["cases"]}


def _ours(record: Record) -> Record:
    return next(row for row in record["candidates"] if row["role"] == "ours")


def _case_changes(name: str, old: Record, new: Record, slack: float) -> list[Change]:
    found = []
    timed = slowdown(old, new) if "median_s" in _ours(new) else None  # a counted run has no times
    if timed is not None:
        found.append(Change(name, "time ratio", 1.0, timed, timed, 1 + (TIME.allowed - 1) * slack))
    mine, yours = _ours(old), _ours(new)
    for figure in ("flops", "peak_bytes"):
        if mine.get(figure) and yours.get(figure) is not None:
            factor, allowed = yours[figure] / mine[figure], COUNTED[figure].allowed
            if figure == "peak_bytes":  # libraries choose their scratch by the processor
                allowed = 1 + (allowed - 1) * slack
            found.append(Change(name, figure, mine[figure], yours[figure], factor, allowed))
    return found


def slowdown(old: Record, new: Record) -> float | None:
    """By which factor our time grew against the anchors that both runs share; None without any."""
    anchors = {row["name"]: row for row in old["candidates"] if row["role"] in ANCHORS and "speedup" in row}
    shared = [row for row in new["candidates"] if row["name"] in anchors and "speedup" in row]
    votes = [anchors[row["name"]]["speedup"] / row["speedup"] for row in shared]
    return statistics.median(votes) if votes else None


def _static_changes(old: Record, new: Record, complete: bool) -> tuple[list[Change], list[str]]:
    changes, missing = [], []
    if not new:
        return [], []
    excused = any(reason.startswith("instructions") for reason in new.get("missing", []))  # no valgrind there
    for name, value in old.get("counts", {}).items():
        kind = "packets" if "packets" in name else "instructions"
        if name not in new.get("counts", {}):
            if not (excused and kind == "instructions"):
                missing.append(f"{name}: no longer counted")
            continue
        rule = COUNTED[kind]
        changes.append(
            Change(name, "count", value, new["counts"][name], _grown(value, new["counts"][name]), rule.allowed)
        )
    before = {(k["name"], str(k["arch"])): k for k in old.get("kernels", [])}
    after = {(k["name"], str(k["arch"])): k for k in new.get("kernels", [])}
    for key, kernel in before.items():
        if key not in after:
            if after and complete:
                missing.append(f"{key[0]} on {key[1]}: no longer compiled")
            continue
        for figure in ("registers", "spill_bytes", "shared_bytes", "loop_instructions", "min_bytes"):
            if kernel.get(figure) is not None and after[key].get(figure) is not None:
                values = kernel[figure], after[key][figure]
                label = f"{key[0]} on {key[1]}"
                changes.append(Change(label, figure, *values, _grown(*values), COUNTED[figure].allowed))
    return changes, missing


def _grown(old: float, new: float) -> float:
    """new / old, where growing from nothing is growing without bound."""
    return new / old if old else (float("inf") if new else 1.0)


def confirm(
    old: Record, new: Record, worse: list[Change], times: int, run: Callable[[list[str]], Record]
) -> list[Change]:
    """Runs the cases of ``worse`` timed figures again and keeps those that are worse every time."""
    device_cases = _cases(new)
    for _ in range(times):
        again = [change.case for change in worse if change.figure == "time ratio"]
        if not again:
            break
        repeated = _cases(run(again))
        kept = []
        for change in worse:
            if change.figure != "time ratio" or change.case not in repeated:
                kept.append(change)
                continue
            factor = slowdown(_cases(old)[change.case], repeated[change.case]) or change.factor
            if factor > change.allowed:
                kept.append(Change(change.case, change.figure, 1.0, factor, factor, change.allowed))
            else:
                print(f"not confirmed: {change.case} is x{factor:.3f} in another run")
                device_cases[change.case] = repeated[change.case]
        worse = kept
    return worse


def _run_again(new: Record) -> Callable[[list[str]], Record]:
    def run(cases: list[str]) -> Record:
        names = sorted({case.split("[")[0] for case in cases})
        with tempfile.TemporaryDirectory() as folder:
            results = Path(folder) / "results.json"
            command = [
                sys.executable,
                "-m",
                "bench",
                "--device",
                new["device"],
                "--no-static",
                "--only",
                ",".join(cases),
            ]
            command += ["--results", str(results), "--report", str(Path(folder) / "report.html")]
            print(f"running again: {', '.join(names)}", flush=True)
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            return json.loads(results.read_text())

    return run


def _load(path: Path) -> Record:
    try:
        results = json.loads(path.read_text())
        if results["schema"] != 1:
            raise ValueError(f"schema {results['schema']}, expected 1")
        return results
    except (OSError, ValueError, KeyError, TypeError) as error:
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
    slack = 1.0
    if old["machine"]["cpu"] != new["machine"]["cpu"] or old["machine"]["gpu"] != new["machine"]["gpu"]:
        slack = 2.0
        names = f"{old['machine']['name']} -> {new['machine']['name']}"
        print(f"other machine ({names}): timed ratios and peak memory may differ twice as much")
    for package in ("torch", "triton"):
        if old["versions"].get(package) != new["versions"].get(package):
            print(f"other {package}: {old['versions'].get(package)} -> {new['versions'].get(package)}")
    changes, missing = compare(old, new, slack=slack)
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
