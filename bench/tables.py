"""Tables and figures in Markdown, generated from results files: ``python -m bench.tables [--check] FILE.md ...``.

Between ``<!-- bench:TABLE MACHINE -->`` and ``<!-- /bench -->`` stands the table of that name, made from
``bench/results/MACHINE.json``, for a table of cases with only those whose ids follow, if any do.
``bench:value MACHINE CASE PATH`` puts a single figure into a sentence, where PATH is ``vs.limit``, ``ours.peak_bytes``,
``rates.items`` and the like, and ``bench:at MACHINE KEY/KEY/...`` any other number of the file. Other text there
is replaced, and no text elsewhere. Without files it also writes the chart ``docs/h200.svg``.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from bench.plots import Axis, Series, picture
from bench.study import arms_table, margins_table, settings_table
from bench.text import bytes_text, count_text, markdown, seconds_text, significant

Record = dict[str, Any]
ROOT = Path(__file__).resolve().parent.parent
MARK = re.compile(r"(<!-- bench:([a-z]+) ([^\n]*?)-->)(.*?)(<!-- /bench -->)", re.S)


@cache
def load(machine: str) -> Record:
    """Results of a machine. FileNotFoundError names the file that a document relies on."""
    return json.loads((ROOT / "bench/results" / f"{machine}.json").read_text())


def ours_of(record: Record) -> Record:
    return next(row for row in record["candidates"] if row["role"] == "ours")


def versus(record: Record, role: str) -> str:
    """Our speed over that of the "reference", "best_peer" or "best_same_bytes", "" without one.

    † marks a ratio of our CUDA graph to a call without a graph, which may contain Python's time.
    """
    if role not in record["vs"]:
        return ""
    named = {"role": "reference"} if role == "reference" else {"name": record["vs"][f"{role}_name"]}
    other = next(row for row in record["candidates"] if named.items() <= row.items())
    python = "eager_s" in ours_of(record) and ("eager_s" not in other or other["reason"].startswith("not captured"))
    return significant(record["vs"][role]) + "†" * python


def _best(record: Record, role: str) -> str:
    return f"{versus(record, role)} ({record['vs'][f'{role}_name']})" if role in record["vs"] else "–"


def _row(record: Record) -> list[str]:
    ours, vs = ours_of(record), record["vs"]
    return [
        f"`{record['id']}`",
        seconds_text(ours["median_s"]),
        versus(record, "reference") or "–",
        _best(record, "best_peer"),
        f"{vs['limit']:.0%}" if "limit" in vs else "–",
        bytes_text(ours["peak_bytes"]) if "peak_bytes" in ours else "–",
    ]


HEADER = ["case", "ours", "x reference", "x best peer", "of the limit", "peak memory"]


def suites(results: Record, *names: str) -> str:
    """Summary of some suites: our median, speed over reference and best peer, share of the limit, memory."""
    return markdown(HEADER, [_row(record) for record in results["cases"] if record["suite"] in names])


def data(results: Record) -> str:
    """Reading of data: our median, speed over the best peer on the original files and on the store's own bytes."""
    rows = [
        [
            f"`{record['id']}`",
            seconds_text(ours_of(record)["median_s"]),
            _best(record, "best_peer"),
            _best(record, "best_same_bytes"),
            f"{record['vs']['limit']:.0%}" if "limit" in record["vs"] else "–",
        ]
        for record in results["cases"]
        if record["suite"] in ("sampler", "decode", "loader")
    ]
    return markdown(["case", "ours", "x best peer, originals", "x best peer, store's bytes", "of the limit"], rows)


def selection(results: Record, ids: list[str]) -> Record:
    """The results with these cases alone. ValueError names one that they do not hold."""
    by_id = {record["id"]: record for record in results["cases"]}
    if unknown := [name for name in ids if name not in by_id]:
        raise ValueError(f"no case {unknown[0]} in the results")
    return results | {"cases": [by_id[name] for name in ids]}


def memory(results: Record) -> str:
    """Peak extra memory of loss and gradient against N, ours and the others'."""
    family = [
        r
        for r in results["cases"]
        if r["case"] == "info_nce" and r["params"].get("D") == 256 and "dtype" not in r["params"]
    ]
    family.sort(key=lambda record: record["params"]["N"])
    names = [name for name in ("vito_kernels", "reference", "info-nce-pytorch", "open_clip ClipLoss")]
    rows = []
    for record in family:
        by_name = {row["name"]: row for row in record["candidates"]}
        cells = [by_name.get(name, {}) for name in names]
        texts = [bytes_text(cell["peak_bytes"]) if "peak_bytes" in cell else "not run" for cell in cells]
        rows.append([str(record["params"]["N"]), *texts])
    return markdown(["N", *names], rows)


def eager(results: Record) -> str:
    """Our time as a CUDA graph and without one, beside the fastest peer without one."""
    rows = []
    for record in results["cases"]:
        ours = ours_of(record)
        peers = [row for row in record["candidates"] if row["role"] in ("peer", "reference") and "eager_s" in row]
        if "eager_s" in ours and peers:
            best = min(peers, key=lambda row: row["eager_s"])
            named = f"{seconds_text(best['eager_s'])} ({best['name']})"
            rows.append([f"`{record['id']}`", seconds_text(ours["median_s"]), seconds_text(ours["eager_s"]), named])
    return markdown(["case", "ours, graph", "ours, eager", "fastest other, eager"], rows)


def modes(results: Record) -> str:
    """The training step of ``bench.step_modes``."""
    rows = [
        [f"{row['mode']}, {row['note']}", f"{row['ms']:.1f} ms", f"{row['pairs_s']:,.0f}", f"{row['peak_gib']:.1f} GiB",
         seconds_text(row["warm_s"])]
        for row in results["steps"] if "failed" not in row
    ]  # fmt: skip
    return markdown(["mode", "step", "clips/s", "peak memory", "warm-up"], rows)


def counts(results: Record) -> str:
    """Instructions and packets, which are the same on every machine."""
    return markdown(
        ["figure", "value"], [[name, significant(value, 5)] for name, value in results["static"]["counts"].items()]
    )


def machine(results: Record) -> str:
    """Hardware and software in one line."""
    on, versions = results["machine"], results["versions"]
    gpu = f"{on['gpu']['name']}, driver {on['gpu']['driver']}, " if on["gpu"] else ""
    shown = [
        f"{name} {versions[name]}" for name in ("torch", "triton", "nvidia-dali-cuda130", "av") if name in versions
    ]
    software = f"Python {versions['python']}, {', '.join(shown)}"
    return f"{gpu}{on['cpu']}, {on['cores']} cores; {software}; {results['date'][:10]}."


TABLES: dict[str, Callable[[Record], str]] = {
    "losses": lambda results: suites(results, "infonce", "losses"),
    "kernels": lambda results: suites(results, "pooling", "batch_norm", "photometric", "optimizer"),
    "data": data,
    "step": lambda results: suites(results, "step"),
    "memory": memory,
    "eager": eager,
    "modes": modes,
    "counts": counts,
    "machine": machine,
    "arms": arms_table,
    "margins": margins_table,
    "settings": settings_table,
}


CHART = ROOT / "docs/h200.svg"
CHARTED = {
    "vito_kernels": "ours",
    "memeff (LiT)": "peer0",
    "info-nce-pytorch": "peer1",
    "reference": "reference",
}


def h200_chart() -> str:
    """SVG of the time of InfoNCE with its gradient against N on the H200, ours and the others'."""
    points: dict[str, list[tuple[float, float]]] = {name: [] for name in CHARTED}
    for record in load("nvidia-h200")["cases"]:
        if record["case"] == "info_nce" and record["params"] == {"N": record["params"].get("N"), "D": 256}:
            for row in record["candidates"]:
                if row["name"] in points and "median_s" in row:
                    points[row["name"]].append((record["params"]["N"], row["median_s"]))
    series = [Series(name, sorted(points[name]), style) for name, style in CHARTED.items()]
    x, y = Axis("N keys of width 256, bfloat16", lambda n: f"{n / 1024:g}k", base=4), Axis("time", seconds_text)
    return picture("InfoNCE forward and backward on one H200", x, y, series)


def value(results: Record, case: str, path: str) -> str:
    """One figure. ValueError if the results do not hold it."""
    node: Any = next((record | {"ours": ours_of(record)} for record in results["cases"] if record["id"] == case), {})
    for part in path.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    if not isinstance(node, int | float):
        raise ValueError(f"no {path} of {case} in the results")
    if path.endswith("_bytes"):
        return bytes_text(node)
    if path.endswith("_s"):
        return seconds_text(node)
    if path.startswith("rates.items"):
        return count_text(node)
    return f"{node:.0%}" if path == "vs.limit" else significant(node)


def at(results: Record, path: str) -> str:
    """The number at ``path``, keys with / between them. ValueError if there is none."""
    node: Any = results
    for key in path.split("/"):
        node = node.get(key) if isinstance(node, dict) else None
    if not isinstance(node, int | float):
        raise ValueError(f"no number at {path} in the results")
    return significant(node)


def fill(text: str) -> str:
    """``text`` with the text between markers generated again. ValueError names the marker that cannot be filled."""

    def make(match: re.Match[str]) -> str:
        start, name, arguments, _, end = match.groups()
        try:
            made = _filling(name, *arguments.split())
        except KeyError as error:
            raise ValueError(f"{start}: no {error} in the results") from None
        except (TypeError, ValueError) as error:
            raise ValueError(f"{start}: {error}") from None
        return f"{start}\n{made}\n{end}" if "\n" in made else f"{start}{made}{end}"

    made, marks = MARK.subn(make, text)
    if marks != len(re.findall(r"<!--\s*bench:", text)):
        raise ValueError("a mark <!-- bench:... --> has no <!-- /bench --> of its own")
    return made


def _filling(name: str, machine: str = "", *words: str) -> str:
    """The text between two markers."""
    if name not in ("value", "at", *TABLES):
        raise ValueError(f"unknown table {name!r}, known: value, at, {', '.join(TABLES)}")
    if not machine:
        raise ValueError("no machine is named")
    results = load(machine)
    if name == "value":
        if len(words) < 2:
            raise ValueError("a case and a path are not both named")
        return value(results, " ".join(words[:-1]), words[-1])
    if name == "at":
        return at(results, " ".join(words))
    return TABLES[name](selection(results, list(words)) if words else results)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.tables", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "files", nargs="*", type=Path, default=[ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    )
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a file differs")
    options = parser.parse_args()
    different = []
    drawn = h200_chart()
    if not CHART.exists() or CHART.read_text(encoding="utf-8") != drawn:
        different.append(CHART)
        if not options.check:
            CHART.write_text(drawn, encoding="utf-8")
    for file in options.files:
        try:
            text = file.read_text(encoding="utf-8")
            made = fill(text)
        except (OSError, ValueError) as error:
            sys.exit(f"{file}: {error}")
        if made != text:
            different.append(file)
            if not options.check:
                file.write_text(made, encoding="utf-8")
    for file in different:
        print(f"{'differs from its results' if options.check else 'updated'}: {file}")
    return 1 if options.check and different else 0


if __name__ == "__main__":
    sys.exit(main())
