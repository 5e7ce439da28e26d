"""A timed run on a CPU is two passes over its cases, each a process of its own and half as long; here they become one.

What makes two runs of a case differ is less the noise of a round than the minute it ran in and where its memory came to
lie, which more rounds in a row do not average out, and a pass some minutes later does: over 14 cases beside other work,
ratios of two passes differed by 8.4 %, of two such pairs by 5.8 % (root mean square). Where a pass was in vain for some
cases, since the host kept the cores apart, they race once more.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from bench.harness import rates, summary

Record = dict[str, Any]


def merge(passes: Sequence[Record]) -> Record:
    """Results of the same run's passes as one, in the order of the first.

    Ratios and times are geometric means, ``speedups`` keeps a ratio's parts. A pass whose cores were apart counts for a
    case only if none had them together. A case that a later pass does not have went wrong there and is left out, unless
    it was not asked for: ``single`` cases race in the first pass alone, others once more (:func:`lost`).
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


def lost(passes: Sequence[Record], seconds: float) -> list[str]:
    """The cases of which a pass does not count, as its cores were apart; the shortest of them, as many as another pass
    races in these ``seconds``.
    """
    apart = {record["id"] for each in passes for record in each["cases"] if not _together(record)}
    taken = {record["id"]: record["seconds"] for each in passes[1:] for record in each["cases"] if not record["single"]}
    found = []
    for case in sorted(apart & taken.keys(), key=lambda case: (taken[case], case)):
        seconds -= taken[case]
        if seconds > 0:
            found.append(case)
    return found


def _together(record: Record) -> bool:
    """Whether the cores shared a cache (see bench/cores.py) in most of a case's rounds."""
    return bool(2 * record["apart"] < record["rounds"])


def _merge_case(records: Sequence[Record]) -> Record:
    counted = [record for record in records if _together(record)] or records
    rows = [_merge_rows(*each) for each in zip(_by_candidate(records), _by_candidate(counted), strict=True)]
    totals = {name: sum(record[name] for record in counted) for name in ("rounds", "apart")}
    seconds = next(row["median_s"] for row in rows if row["role"] == "ours")
    merged = records[0] | totals | {"seconds": round(sum(record["seconds"] for record in records), 1)}
    return merged | {"rates": rates(merged["work"], seconds), "vs": summary(rows), "candidates": rows}


def _by_candidate(records: Sequence[Record]) -> Iterator[tuple[Record, ...]]:
    return zip(*(record["candidates"] for record in records), strict=True)


def _merge_rows(every: Sequence[Record], rows: Sequence[Record]) -> Record:
    """One candidate with the times of ``rows``: as it was in the pass in which it went wrong, if it did in any."""
    first = next((row for row in every if row["status"] != "ok"), every[0])
    if first["status"] != "ok" or "median_s" not in first:
        return first
    merged = first | {
        "median_s": statistics.geometric_mean(row["median_s"] for row in rows),
        "low_s": min(row["low_s"] for row in rows),
        "spread": max(row["spread"] for row in rows),
        "rounds": sum(row["rounds"] for row in rows),
    }
    if "error" in first:
        merged["error"] = max(row["error"] for row in every)
    if "speedup" in first:
        merged["speedups"] = [row["speedup"] for row in rows]
        merged["speedup"] = statistics.geometric_mean(merged["speedups"])
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


def skipped(cases: Sequence[Record]) -> list[dict[str, str]]:
    """Every peer that did not race somewhere: name, first reason, and in how many cases."""
    found: dict[tuple[str, str], int] = {}
    for record in cases:
        for row in record["candidates"]:
            if row["status"] != "ok":
                key = (row["name"], f"{row['status']}: {row['reason']}")
                found[key] = found.get(key, 0) + 1
    return [{"name": name, "reason": reason, "cases": str(count)} for (name, reason), count in sorted(found.items())]
