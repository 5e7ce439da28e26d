"""``report.html``: one self-contained page about a finished curation. It runs no script and loads nothing.

Every text of the data is escaped, and every picture is a JPEG of this program's own, in a data URI.
"""

import base64
import json
import math
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from vito_fast import page
from vito_fast.curate.decide import ORDER
from vito_fast.curate.taxonomy import taxonomy
from vito_fast.errors import UserError
from vito_fast.files import atomic_write
from vito_fast.page import esc

THUMBNAILS = 24
"""Pictures of each gallery."""
REVIEW = 30
"""Kept clips in the random sample for review."""


def write_report(out: Path) -> Path:
    """Write ``OUT/report.html`` from the tables. UserError if ``out`` is no finished curation."""
    if not (out / "decisions.parquet").is_file() or not (out / "summary.json").is_file():
        raise UserError(f"{out} is no finished curation: run `vito-fast curate SRC {out}`")
    summary = json.loads((out / "summary.json").read_text())
    decisions = pq.read_table(out / "decisions.parquet").to_pylist()
    text = "".join(_page(out, summary, decisions))
    with atomic_write(out / "report.html") as partial:
        partial.write_text(text, encoding="utf-8")
    return out / "report.html"


def wilson(hits: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """The Wilson score interval of a share, 95 % by default (Wilson 1927)."""
    if not count:
        return 0.0, 1.0
    share, square = hits / count, z * z
    middle = (share + square / (2 * count)) / (1 + square / count)
    half = z * math.sqrt(share * (1 - share) / count + square / (4 * count * count)) / (1 + square / count)
    return max(0.0, middle - half), min(1.0, middle + half)


def _page(out: Path, summary: dict[str, Any], decisions: list[dict[str, Any]]) -> Iterator[str]:
    whole = [row for row in decisions if row["clip_id"] is None]
    clips = [row for row in decisions if row["clip_id"] is not None]
    kept = sum(row["verdict"] == "kept" for row in whole)
    low, high = wilson(kept, len(whole))
    yield page.head("Curation report")
    yield (
        f"<p>{len(whole)} candidates, {summary['files']} files. {kept} candidates are kept "
        f"({_percent(kept, len(whole))}; 95 % interval {low:.1%} to {high:.1%}). "
        f"The store has {summary['kept']} clips.</p>"
    )
    yield _funnel(whole)
    yield _reasons(whole)
    yield _classes(summary)
    yield _resolutions(out)
    yield _scores(clips)
    pictures = _Pictures(out)
    yield _galleries(clips, pictures)
    yield _groups(out, pictures)
    yield _review(clips, pictures)
    yield _costs(summary)
    yield page.END


def _percent(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "0 %"


def _funnel(whole: list[dict[str, Any]]) -> str:
    left, rows = len(whole), [("candidates", float(len(whole)), None)]
    lost = Counter(row["step"] for row in whole if row["verdict"] == "rejected")
    for step in ORDER:
        left -= lost[step]
        rows.append((f"after {step}", float(left), None))
    return f"<h2>Funnel</h2>{page.bars(rows, 'candidates left after each step')}"


def _reasons(whole: list[dict[str, Any]]) -> str:
    counts = Counter(
        (row["step"], row["reason"].partition(":")[0].partition(" of ")[0]) for row in whole if row["verdict"] != "kept"
    )
    order = sorted(counts.items(), key=lambda pair: (ORDER.index(pair[0][0]), -pair[1]))
    rows = [(step, reason, count, _percent(count, len(whole))) for (step, reason), count in order]
    return f"<h2>Rejected, by step and reason</h2>{page.table(('step', 'reason', 'candidates', 'share'), rows, (2, 3))}"


def _classes(summary: dict[str, Any]) -> str:
    names = taxonomy().classes
    counts = sorted(((int(n), *values) for n, values in summary["classes"].items()), key=lambda row: (-row[3], row[0]))
    if not counts:
        return ""
    rows = [(names[n].name, float(kept), float(wanted)) for n, _, wanted, kept in counts[:60]]
    short = [(names[n].name, available, wanted, kept) for n, available, wanted, kept in counts if kept < wanted]
    more = f"<p class='dim'>{len(counts) - 60} more classes are in summary.json.</p>" if len(counts) > 60 else ""
    return (
        "<h2>Classes against the target</h2>"
        f"<p>Total-variation distance to the target: {summary['distance']:.3f}. The least that the available clips "
        f"allow is {summary['optimum']:.3f}. The outline is the target.</p>"
        + page.bars(rows, "clips of each class")
        + more
        + (
            f"<h3>Shortfalls</h3>{page.table(('class', 'available', 'wanted', 'kept'), short[:60], (1, 2, 3))}"
            if short
            else ""
        )
    )


def _resolutions(out: Path) -> str:
    table = pq.read_table(out / "candidates.parquet", columns=["query", "resolution", "class_ids", "nearest"])
    counts: Counter[tuple[str, str, int, str]] = Counter()
    for row in table.to_pylist():
        counts[row["query"] or "(none)", row["resolution"], len(row["class_ids"]), row["nearest"]] += 1
    rows = [(query, kind, size, near, count) for (query, kind, size, near), count in counts.most_common(60)]
    head = ("query", "resolution", "classes", "nearest names", "candidates")
    return f"<h2>Queries</h2>{page.table(head, rows, (2, 4))}"


def _scores(clips: list[dict[str, Any]]) -> str:
    """Histograms of what each threshold compares."""
    found = []
    for reason, title in (("", "score of kept clips"), ("its query is seen too seldom", "frames that show the query")):
        values = [row["value"] for row in clips if row["reason"] == reason and row["value"] is not None]
        if not values:
            continue
        threshold = next((row["threshold"] for row in clips if row["reason"] == reason and row["threshold"]), None)
        found.append(f"<h3>{esc(title)}</h3>{page.histogram(values, title, top=max(1.0, *values), mark=threshold)}")
    return f"<h2>Scores</h2>{''.join(found)}" if found else ""


class _Pictures:
    """Middle frames of clips, found as they are asked for."""

    def __init__(self, out: Path):
        self._where: dict[str, tuple[Path, int, int]] = {}
        self._paths: dict[str, str] = {}
        for path in sorted((out / "clips").glob("*.parquet")):
            for row, values in enumerate(pq.read_table(path, columns=["path", "clips"]).to_pylist()):
                for place, clip in enumerate(values["clips"]):
                    self._where[clip["clip_id"]] = path, row, place
                    self._paths[clip["clip_id"]] = f"{values['path']} at frame {clip['first_frame']}"
        self._open: tuple[Path, list[Any]] | None = None

    def figure(self, clip: str, lines: Sequence[str], kind: str = "") -> str:
        path, row, place = self._where.get(clip, (None, 0, 0))
        source = ""
        if path is not None:
            if self._open is None or self._open[0] != path:
                self._open = path, pq.read_table(path, columns=["frames"])["frames"].to_pylist()
            frames = self._open[1][row][place]
            if frames:
                source = base64.b64encode(frames[len(frames) // 2]["jpeg"]).decode()
        image = f'<img alt="" loading="lazy" src="data:image/jpeg;base64,{source}">' if source else ""
        text = "<br>".join([f'<span class="{kind}">{esc(lines[0])}</span>', *map(esc, lines[1:])])
        place_line = f'<span class="dim">{esc(self._paths.get(clip, ""))}</span>'
        return f"<figure>{image}<figcaption>{text}<br>{place_line}</figcaption></figure>"

    def in_order(self, clips: Iterable[str]) -> list[str]:
        """Sorted so that each unit file is opened once."""
        return sorted(clips, key=lambda clip: (str(self._where.get(clip, ("",))[0]), clip))


def _galleries(clips: list[dict[str, Any]], pictures: _Pictures) -> str:
    """Clips on both sides of the decision, the nearest to its threshold first."""
    kept = sorted(
        (row for row in clips if row["verdict"] == "kept"), key=lambda row: (row["value"] or 0, row["clip_id"])
    )
    lost = [row for row in clips if row["step"] == "decide" and row["verdict"] != "kept"]
    lost.sort(key=lambda row: (abs((row["threshold"] or 0) - (row["value"] or 0)), row["clip_id"]))
    found = []
    for title, rows, kind in (
        ("Kept, lowest scores first", kept, "kept"),
        ("Rejected, nearest first", lost, "rejected"),
    ):
        figures = [pictures.figure(row["clip_id"], _caption(row), kind) for row in rows[:THUMBNAILS]]
        found.append(f'<h2>{title}</h2><div class="grid">{"".join(figures)}</div>' if figures else "")
    return "".join(found)


def _caption(row: dict[str, Any]) -> list[str]:
    name = taxonomy().classes[row["label"]].name if row["label"] >= 0 else row["reason"]
    value = "" if row["value"] is None else f"{row['value']:.2f}"
    limit = "" if row["threshold"] is None else f" (threshold {row['threshold']:.2f})"
    return [name, value + limit]


def _groups(out: Path, pictures: _Pictures) -> str:
    if not (out / "groups.parquet").is_file():
        return ""
    members: dict[str, list[dict[str, Any]]] = {}
    for row in pq.read_table(out / "groups.parquet").to_pylist():
        members.setdefault(row["representative"], []).append(row)
    large = sorted((own for own in members.values() if len(own) > 1), key=lambda own: (-len(own), own[0]["clip_id"]))
    figures = []
    for own in large[: THUMBNAILS // 2]:
        for row in sorted(own, key=lambda row: (row["clip_id"] != row["representative"], row["clip_id"]))[:4]:
            star = row["clip_id"] == row["representative"]
            note = f"of {len(own)}" if star else f"{row['distance']} bits, {row['share']:.0%}, {row['variant']}"
            figures.append(pictures.figure(row["clip_id"], ["representative" if star else "near-duplicate", note]))
    return f'<h2>Near-duplicates</h2><p>Groups: {len(large)}.</p><div class="grid">{"".join(figures)}</div>'


def _review(clips: list[dict[str, Any]], pictures: _Pictures) -> str:
    kept = sorted(row["clip_id"] for row in clips if row["verdict"] == "kept")
    by_clip = {row["clip_id"]: row for row in clips if row["verdict"] == "kept"}
    sample = random.Random(0).sample(kept, min(REVIEW, len(kept)))
    if not sample:
        return ""
    figures = "".join(pictures.figure(clip, _caption(by_clip[clip])) for clip in pictures.in_order(sample))
    rows = [
        (wrong, *(f"{bound:.1%}" for bound in wilson(len(sample) - wrong, len(sample))))
        for wrong in range(min(4, len(sample) + 1))
    ]
    table = page.table(("wrong labels you see", "precision at least", "at most"), rows, (0, 1, 2))
    return (
        f"<h2>Random sample for review</h2><p>{len(sample)} of {len(kept)} kept clips. Count the wrong labels; "
        f'the table gives the 95 % Wilson interval of the precision.</p>{table}<div class="grid">{figures}</div>'
    )


def _costs(summary: dict[str, Any]) -> str:
    rows = [
        (step, cost["items"], cost["reused"], f"{cost['cpu_s']:.1f}", f"{cost['wall_s']:.1f}")
        for step, cost in summary["costs"].items()
    ]
    head = ("step", "computed", "reused", "CPU seconds", "wall seconds")
    return f"<h2>Cost of the last run</h2>{page.table(head, rows, (1, 2, 3, 4))}"
