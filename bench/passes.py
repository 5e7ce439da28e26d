"""A timed run on a CPU is two passes over its cases, each a process of its own and half as long; here they become one.

What makes two runs of a case differ is less the noise of a round than the minute it ran in and where its memory came to
lie, which more rounds in a row do not average out, and a pass some minutes later does: over 14 cases beside other work,
ratios of two passes differed by 8.4 %, of two such pairs by 5.8 % (root mean square). Cases whose passes differ, or of
which the host disturbed one, race again while there is time; of three passes the median leaves out the odd one.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from bench.harness import rates, summary

Record = dict[str, Any]
ACCEPTED = 0.02  # standard error of a ratio, relative: two passes that differ by 4 %
ALLOWED = 0.05  # cores that other processes keep busy; an idle machine's take less than 0.01
START = 10.0  # seconds that a pass takes beside its cases


def merge(passes: Sequence[Record]) -> Record:
    """Results of the same run's passes as one, in the order of the first.

    Ratios and times are medians, ``speedups`` keeps a ratio's parts. A disturbed one counts beside its like alone.
    A case that a later pass does not have went wrong there and is left out, unless it was not asked for: ``single``
    cases race in the first pass alone, some others again (:func:`doubtful`).
    """
    later = [(each["only"], {record["id"]: record for record in each["cases"]}) for each in passes[1:]]
    cases = []
    for record in passes[0]["cases"]:
        case = record["id"]
        found = [by_id.get(case) for only, by_id in later if not record["single"] and (only is None or case in only)]
        if None not in found:
            cases.append(_merge_case([record, *filter(None, found)]))
    whole = {name: round(sum(each[name] for each in passes), 1) for name in ("seconds", "waited")}
    return passes[0] | whole | {"passes": len(passes), "skipped": skipped(cases), "cases": cases}


def doubtful(passes: Sequence[Record], seconds: float) -> list[str]:
    """The cases of which a pass does not count, as it was disturbed, or whose passes differ; those that differ most, as
    many as another pass races in these ``seconds``.
    """
    doubts = {record["id"]: _doubt(record) for record in merge(passes)["cases"] if not record["single"]}
    taken = {record["id"]: record["seconds"] for each in passes[1:] for record in each["cases"]}
    seconds -= START
    found = []
    for case in sorted(doubts, key=lambda case: (-doubts[case], taken[case], case)):
        if doubts[case] > ACCEPTED and taken[case] < seconds:
            seconds -= taken[case]
            found.append(case)
    return found


def _doubt(merged: Record) -> float:
    """The standard error of the least certain ratio's logarithm; infinite of one pass, and of disturbed ones."""
    rows = [row for row in merged["candidates"] if "speedups" in row]
    ratios = [row["speedups"] for row in rows]
    if any(len(row["speedups"]) == 1 or not row["undisturbed"] for row in rows):
        return math.inf
    return max((statistics.stdev(map(math.log, each)) / math.sqrt(len(each)) for each in ratios), default=0.0)


def _median(values: Sequence[float]) -> float:
    """On the logarithms: the geometric mean of two."""
    return math.exp(statistics.median(map(math.log, values)))


def _merge_case(records: Sequence[Record]) -> Record:
    rows = [_merge_rows(each) for each in zip(*(record["candidates"] for record in records), strict=True)]
    totals = {name: sum(record[name] for record in records) for name in ("rounds", "seconds")}
    seconds = next(row["median_s"] for row in rows if row["role"] == "ours")
    merged = records[0] | totals | {"seconds": round(totals["seconds"], 1)}
    return merged | {"rates": rates(merged["work"], seconds), "vs": summary(rows), "candidates": rows}


def _merge_rows(every: Sequence[Record]) -> Record:
    """One candidate: as it was in the pass in which it went wrong, if it did in any."""
    first = next((row for row in every if row["status"] != "ok"), every[0])
    if first["status"] != "ok" or "median_s" not in first:
        return first
    rows = [row for row in every if row["undisturbed"]] or every
    merged = first | {
        "median_s": _median([row["median_s"] for row in rows]),
        "low_s": min(row["low_s"] for row in rows),
        "spread": max(row["spread"] for row in rows),
        "rounds": sum(row["rounds"] for row in rows),
        "undisturbed": rows[0]["undisturbed"],
    }
    if "speedup" in first:
        merged["speedups"] = [row["speedup"] for row in rows]
        merged["speedup"] = _median(merged["speedups"])
        merged["speedup_spread"] = max(row["speedup_spread"] for row in rows)
    return merged


def disagreement(cases: Sequence[Record]) -> float | None:
    """By what factor the passes' ratios differ, root mean square over cases and candidates; None of a single pass."""
    logs = [
        math.log(max(row["speedups"]) / min(row["speedups"]))
        for record in cases
        for row in record["candidates"]
        if len(row.get("speedups", ())) > 1
    ]
    return math.exp(math.sqrt(statistics.fmean(log**2 for log in logs))) if logs else None


def caveats(results: Record) -> list[str]:
    """Why ratios of this run may repeat less well than others, in sentences."""
    ratios = [row for record in results["cases"] for row in record["candidates"] if "speedup" in row]
    some = sum(not row.get("undisturbed", True) for row in ratios)
    found = []
    if some:
        found.append(
            f"{some} of {len(ratios)} ratios, marked ≈, rest on samples that the host disturbed: they repeat less well."
        )
    if (others := results.get("others", 0.0)) > ALLOWED:
        found.append(f"Other processes of this machine kept {others:.2f} cores busy: no ratio repeats as it should.")
    return found


def skipped(cases: Sequence[Record]) -> list[dict[str, str]]:
    """Every peer that did not race somewhere: name, first reason, and in how many cases."""
    found: dict[tuple[str, str], int] = {}
    for record in cases:
        for row in record["candidates"]:
            if row["status"] != "ok":
                key = (row["name"], f"{row['status']}: {row['reason']}")
                found[key] = found.get(key, 0) + 1
    return [{"name": name, "reason": reason, "cases": str(count)} for (name, reason), count in sorted(found.items())]
