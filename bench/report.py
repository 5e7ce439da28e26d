"""``bench/report.html`` from a results file: one self-contained page, light and dark, also on a phone."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from bench.plots import Axis, Series, chart
from bench.tables import ours_of, versus
from bench.text import bytes_text, count_text, seconds_text, significant

Record = dict[str, Any]

SUITES = {
    "infonce": ("InfoNCE, locked keys", "Loss and the gradient of the queries; normalization included."),
    "losses": ("CLIP and NT-Xent", "Loss and the gradients of both sides; normalization included."),
    "pooling": ("Attention pooling", "Forward, and backward to features and logits."),
    "batch_norm": ("Batch norm", "With residual and ReLU, in training: forward, and backward to all inputs."),
    "photometric": ("Photometric augmentation", "uint8 frames in, normalized channels_last out."),
    "optimizer": ("Optimizer and target", "LARS on every parameter of the online branch, then the moving average."),
    "sampler": ("Sampler", "Everything random about a batch: clips, frames, crops, flips, colors."),
    "decode": (
        "Decoding pairs of frames",
        "The same frames as RGB at 224 px, one thread: ours from a store that was packed once, from 720p to 256 px in "
        "decode_jpeg and decode_h264, the others from the videos as they came.",
    ),
    "loader": ("Whole loader", "Store to augmented batches."),
    "step": ("Whole training step", "Views to updated weights, data loading excluded."),
}
STYLES = {"ours": "ours", "reference": "reference", "limit": "limit", "context": "context"}


def write(results: Path, page: Path) -> None:
    """Reads ``results`` (JSON of ``python -m bench``) and writes ``page``. ValueError names which is unusable."""
    try:
        made = render(json.loads(results.read_text()))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{results}: no results of a race: {error}") from None
    try:
        page.write_text(made, encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot write {page}: {error.strerror}") from None


def render(results: Record) -> str:
    """The page as HTML: no scripts, no external resources."""
    cases = results["cases"]
    sections = [_summary(cases)]
    for suite, (title, note) in SUITES.items():
        mine = [record for record in cases if record["suite"] == suite]
        if mine:
            plots = "".join(_plots(suite, mine))
            tables = "".join(map(_case, mine))
            sections.append(_section(suite, title, note, f'<div class="plots">{plots}</div>{tables}'))
    between = "Our cases with both flops and bytes to count, between this machine's measured limits."
    sections.append(_section("roofline", "Roofline", between, _roofline(cases)))
    sections.append(_static(results.get("static", {})))
    sections.append(_skipped(results))
    menu = [("summary", "Summary")] + [
        (name, SUITES[name][0]) for name in SUITES if any(c["suite"] == name for c in cases)
    ]
    menu += [("roofline", "Roofline"), ("static", "Counted"), ("skipped", "Not raced")]
    links = "".join(f'<a href="#{name}">{escape(title)}</a>' for name, title in menu)
    style = (Path(__file__).parent / "report.css").read_text()
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, '
        'initial-scale=1"><meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>vito-fast benchmarks</title><style>{style}</style></head><body>"
        f"<header><h1>vito-fast benchmarks</h1>{_machine(results)}</header><nav>{links}</nav>"
        f"<main>{''.join(sections)}</main></body></html>\n"
    )


def _machine(results: Record) -> str:
    machine, versions = results["machine"], results["versions"]
    gpu = machine["gpu"]
    device = f"{gpu['name']}, driver {gpu['driver']}, CUDA {gpu['cuda']}; " if gpu else ""
    listed = ", ".join(f"{name} {version}" for name, version in versions.items())
    quick = " · quick set" if results["quick"] else ""
    return (
        f"<p><strong>{escape(device)}{escape(machine['cpu'])}, {machine['cores']} cores, {machine['memory_gib']} GiB"
        f"</strong> · {escape(results['date'])} · commit {escape(results['commit'] or 'unknown')} · "
        f"{results['threads']} threads{quick}</p>"
        f"<details><summary>Versions</summary><p>{escape(listed)}</p></details>"
        "<p>Every result was first compared with a float64 truth. A candidate that failed has no time. Rounds are "
        "interleaved, figures are medians, ± is half the interquartile range. "
        "Ratios are medians of the ratio within a round. "
        f"<em>ours ×2</em> means that vito-fast is twice as fast.</p>"
    )


def _section(name: str, title: str, note: str, body: str) -> str:
    return f'<section id="{name}"><h2>{escape(title)}</h2><p>{escape(note)}</p>{body}</section>'


def table(
    header: Sequence[str], rows: Iterable[Sequence[str]], classes: Sequence[str] = (), kind: str = "plain"
) -> str:
    """A table in a box that scrolls sideways, of cells in HTML. The last cell of a short row spans the rest."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = ""
    for position, row in enumerate(rows):
        style = f' class="{classes[position]}"' if position < len(classes) and classes[position] else ""
        *cells, last = row
        span = f' colspan="{len(header) - len(cells)}"' if len(row) < len(header) else ""
        body += f"<tr{style}>" + "".join(f"<td>{cell}</td>" for cell in cells) + f"<td{span}>{last}</td></tr>"
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _summary(cases: list[Record]) -> str:
    rows = []
    for record in cases:
        ours, vs = ours_of(record), record["vs"]
        best = (
            f"×{versus(record, 'best_peer')} <small>{escape(vs['best_peer_name'])}</small>"
            if "best_peer" in vs
            else "–"
        )
        rows.append(
            [
                f'<a href="#{escape(record["id"])}">{_breakable(record["id"])}</a>',
                seconds_text(ours["median_s"]),
                f"×{versus(record, 'reference')}" if "reference" in vs else "–",
                best,
                f"{vs['limit']:.0%}" if "limit" in vs else "–",
                bytes_text(ours["peak_bytes"]) if "peak_bytes" in ours else "–",
            ]
        )
    header = ["case", "ours", "vs reference", "vs best peer", "of the limit", "peak memory"]
    note = (
        "Speed over the others in the same run. The limit is the bare matmuls, copies or decoding of the case. "
        "†: ours is replayed as a CUDA graph. The other runs in Python, and that time may count."
    )
    return _section("summary", "Summary", note, table(header, rows))


def _breakable(name: str) -> str:
    """A case's name that a phone breaks between parameters."""
    return escape(name).replace("[", "<wbr>[").replace(",", ",<wbr>")


def _case(record: Record) -> str:
    rows, styles, graphed = [], [], any("eager_s" in row for row in record["candidates"])
    for row in sorted(record["candidates"], key=lambda row: row.get("median_s", float("inf"))):
        styles.append(row["role"] if row["status"] == "ok" else "absent")
        if row["status"] != "ok":
            why = f"<small>{escape(row['status'])}: {escape(row['reason'])}</small>"
            rows.append([escape(row["name"]), row["role"], why])
            continue
        note = f" <small>{escape(row['reason'])}</small>" if row["reason"] else ""
        rows.append(
            [
                escape(row["name"]) + note,
                row["role"],
                seconds_text(row["median_s"]),
                *([seconds_text(row["eager_s"]) if "eager_s" in row else ""] if graphed else []),
                f"±{row['spread'] / 2:.0%}",
                _ratio(row),
                bytes_text(row["peak_bytes"]) if "peak_bytes" in row else "",
                f"{row['error']:.1e}" if row.get("error") is not None else "",
            ]
        )
    header = ["candidate", "role", "median", *(["eager"] if graphed else []), "spread", "ratio", "peak memory", "error"]
    name = escape(record["id"])
    return f'<h3 id="{name}">{name}</h3>{_rates(record)}{table(header, rows, styles, "candidates")}'


def _ratio(row: Record) -> str:
    return f"ours ×{significant(row['speedup'])}" if "speedup" in row else ""


def _rates(record: Record) -> str:
    rates, work = record["rates"], record["work"]
    parts = []
    if "tflops" in rates:
        parts.append(f"{significant(rates['tflops'])} TFLOP/s")
    if "gbytes" in rates:
        parts.append(f"{significant(rates['gbytes'])} GB/s of the least traffic")
    if "items" in rates:
        parts.append(f"{count_text(rates['items'])} {escape(work['unit'])}/s")
    if "limit" in record["vs"]:
        parts.append(f"{record['vs']['limit']:.0%} of the limit")
    return f"<p>{' · '.join(parts)} · {record['rounds']} rounds</p>"


def _plots(suite: str, cases: list[Record]) -> list[str]:
    """The curves of a suite: each case against each parameter that takes three values while the others stand."""
    found = []
    for case in dict.fromkeys(record["case"] for record in cases):
        mine = [record for record in cases if record["case"] == case]
        for name in dict.fromkeys(name for record in mine for name in record["params"]):
            family = _family(mine, name)
            if len(family) < 3:
                continue
            rest = ", ".join(f"{k}={v}" for k, v in family[0]["params"].items() if k != name)
            ticks = sorted({record["params"][name] for record in family})
            x = Axis(name, count_or_power, ticks=ticks if len(ticks) < 8 else ticks[::2])
            label = f"{case}: %s against {name}" + (f" ({rest})" if rest else "")
            found.append(chart(label % "time", x, Axis("time", seconds_text), _series(family, name, _time)))
            found.append(
                chart(label % "peak memory", x, Axis("memory", bytes_text, base=4), _series(family, name, _memory))
            )
    return found


def count_or_power(value: float) -> str:
    """1024 as 1k, 65536 as 64k, 250 as 250."""
    for scale, unit in ((2**20, "M"), (2**10, "k")):
        if value >= scale and value % scale == 0:
            return f"{value / scale:.0f}{unit}"
    return significant(value)


def _family(cases: list[Record], name: str) -> list[Record]:
    """The largest set of cases that differ in the numeric parameter ``name`` only."""
    groups: dict[str, list[Record]] = {}
    for record in cases:
        if isinstance(record["params"].get(name), int | float):
            rest = {k: v for k, v in record["params"].items() if k != name}
            groups.setdefault(json.dumps(rest, sort_keys=True), []).append(record)
    return max(groups.values(), key=len, default=[])


def _time(row: Record) -> float | None:
    return row.get("median_s")


def _memory(row: Record) -> float | None:
    return row.get("peak_bytes") if row["role"] != "limit" and row.get("peak_bytes", 0) > 0 else None


def _series(family: list[Record], name: str, value: Callable[[Record], float | None]) -> list[Series]:
    points: dict[str, list[tuple[float, float]]] = {}
    styles: dict[str, str] = {}
    for record in family:
        for row in record["candidates"]:
            y = value(row)
            if y:
                points.setdefault(row["name"], []).append((record["params"][name], y))
                styles.setdefault(row["name"], STYLES.get(row["role"], ""))
    for position, peer in enumerate(name for name, style in styles.items() if not style):
        styles[peer] = f"peer{position % 4}" + " again" * (position >= 4)
    return [Series(peer, sorted(found), styles[peer]) for peer, found in points.items()]


def _roofline(cases: list[Record]) -> str:
    """Arithmetic intensity against achieved flops;

    the roofs are the fastest bare matmul and the fastest bare copy seen.
    """
    peak = bandwidth = 0.0
    dots = []
    for record in cases:
        work = record["work"]
        if not (work["flops"] and work["bytes"]):
            continue
        dots.append((record["case"], work["flops"] / work["bytes"], record["rates"]["tflops"] * 1e12))
        for row in record["candidates"]:
            if row["role"] == "limit" and row["status"] == "ok":
                if "matmul" in row["name"]:
                    peak = max(peak, work["flops"] / row["median_s"])
                elif "copy" in row["name"]:
                    bandwidth = max(bandwidth, work["bytes"] / row["median_s"])
    if not (dots and peak and bandwidth):
        return "<p>Needs a case limited by matmuls and one limited by copies.</p>"
    lowest, highest = min(dot[1] for dot in dots) / 2, max(dot[1] for dot in dots) * 2
    ridge = peak / bandwidth
    roofs = [
        Series(
            f"bare copy {significant(bandwidth / 1e9)} GB/s", [(lowest, lowest * bandwidth), (ridge, peak)], "limit"
        ),
        Series(
            f"bare matmul {significant(peak / 1e9)} GFLOP/s",
            [(min(ridge, highest), peak), (highest, peak)],
            "reference",
        ),
    ]
    names = list(dict.fromkeys(dot[0] for dot in dots))
    styles = ["ours", "peer0", "peer1", "peer2", "peer3", "context"]
    groups = [
        Series(name, [dot[1:] for dot in dots if dot[0] == name], styles[i % len(styles)], dots=True)
        for i, name in enumerate(names)
    ]
    x = Axis("flops per byte of the least traffic", significant)
    y = Axis("flop/s", lambda value: f"{count_text(value)}")
    return f'<div class="plots">{chart("Roofline", x, y, [*roofs, *groups])}</div>'


def _static(static: Record) -> str:
    parts = []
    if static.get("counts"):
        rows = [[escape(name), significant(value, 6)] for name, value in static["counts"].items()]
        parts.append(table(["figure", "value"], rows))
    if static.get("kernels"):
        header = ["kernel", "arch", "registers", "spill bytes", "shared KiB", "of limit", "tensor core"]
        rows = [
            [
                escape(kernel["name"]),
                escape(str(kernel["arch"])),
                str(kernel["registers"]),
                str(kernel["spill_bytes"]),
                f"{kernel['shared_bytes'] / 1024:.1f}",
                f"{kernel['shared_bytes'] / kernel['shared_limit']:.0%}",
                escape(str(kernel["mma"] or "–")),
            ]
            for kernel in static["kernels"]
        ]
        parts.append(table(header, rows))
    if static.get("executed"):
        figures = list(next(iter(static["executed"].values())))
        rows = [
            [escape(name), *(count_text(kernel[figure]) for figure in figures)]
            for name, kernel in static["executed"].items()
        ]
        body = table(["kernel", *(figure.replace("_", " ") for figure in figures)], rows)
        parts.append(f"<details><summary>Operations of the kernels at a small size</summary>{body}</details>")
    note = (
        "The same on every machine: instructions by callgrind, packets by the planner, kernels as they were compiled, "
        "and their operations in Triton's interpreter."
    )
    return _section("static", "Counted, not timed", note, "".join(parts) or "<p>Not counted in this run.</p>")


def _skipped(results: Record) -> str:
    rows = [
        [escape(row["name"]), f"<small>{escape(row['reason'])}</small>", escape(row["cases"])]
        for row in results["skipped"]
    ]
    note = "Candidates without a time, each with the reason."
    return _section("skipped", "Not raced", note, table(["candidate", "reason", "cases"], rows))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m bench.report RESULTS.json REPORT.html")
    try:
        write(Path(sys.argv[1]), Path(sys.argv[2]))
    except ValueError as error:
        sys.exit(str(error))
