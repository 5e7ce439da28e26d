"""Statistics of a store: a table of its sources, and a page."""

import csv
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from vito_fast import page
from vito_fast.data.store.index import ClipInfo
from vito_fast.data.store.labels import NO_LABEL
from vito_fast.data.store.store import Store
from vito_fast.files import atomic_write, check_writable

MOST_BARS, MOST_ROWS = 40, 300
"""Bars of a plot and rows of a table, at most."""
TRAITS = {
    "color": "Color tags", "pixel": "Shape of a pixel", "scan": "Scan", "orientation": "Orientation, clockwise",
}  # fmt: skip
COLUMNS = ("source", "video", "clips", "frames", "seconds", "rate", "width", "height", "codec", "rotation", "mirror",
           "bytes")  # fmt: skip


@dataclass
class _Source:
    """One source of a store. ``info`` is the entry of its last clip."""

    info: ClipInfo
    clips: int = 0
    frames: int = 0
    seconds: float = 0.0
    bytes: int = 0

    def row(self) -> list[object]:
        """The values of ``COLUMNS``."""
        info, rate = self.info, self.frames / self.seconds
        return [
            info.source, info.video, self.clips, self.frames, round(self.seconds, 3), round(rate, 3), info.width,
            info.height, info.codec, info.rotation, int(info.mirror), self.bytes,
        ]  # fmt: skip


@dataclass
class _Content:
    sources: dict[str, _Source] = field(default_factory=dict)
    lengths: list[float] = field(default_factory=list)
    """Seconds of each clip."""


def _content(store: Store) -> _Content:
    found = _Content()
    for clip in range(len(store)):
        info = store.index.clip(clip)
        source = found.sources.setdefault(info.source, _Source(info))
        source.info = info
        source.clips += 1
        source.frames += info.num_frames
        source.seconds += info.end - info.start
        source.bytes += int(store.index.packets(clip).sizes.sum())
        found.lengths.append(info.end - info.start)
    return found


def write_table(store: Store, path: Path) -> None:
    """Write a CSV with a row for each source of a store: clips, frames, seconds, rate, size, codec, turn and bytes."""
    check_writable(path)
    with atomic_write(path) as partial, open(partial, "w", newline="", errors="surrogateescape") as file:
        table = csv.writer(file)
        table.writerow(COLUMNS)
        table.writerows(source.row() for source in _content(store).sources.values())


def write_page(store: Store, path: Path) -> None:
    """Write a self-contained HTML page about a store: its sources, clips, labels, and files left out.

    Raises:
        UserError: ``path`` cannot be written or is inside a store, or the labels cannot be read.
    """
    check_writable(path)
    text = "".join(_page(store))
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8")


def _page(store: Store) -> Iterator[str]:
    report, content = store.report, _content(store)
    sources = list(content.sources.values())
    yield page.head(f"Store {Path(store.name).name}")
    yield "<p>" + "<br>".join(map(page.esc, report.lines())) + "</p>"
    counts = [("packed", report.packed), *report.rejected.items(), *report.skipped.items()]
    if report.found:
        yield _bars("Rows of the clip list" if report.listed else "Files found", Counter(dict(counts)))
    yield _left_out(store.path / "quarantine.jsonl")
    yield _bars("Frames per second, by source", Counter(f"{source.frames / source.seconds:.3g}" for source in sources))
    yield _histogram("Seconds of a source in the store", [source.seconds for source in sources])
    yield _histogram("Seconds of a clip", content.lengths)
    yield _histogram("Clips of a source", [float(source.clips) for source in sources], "")
    yield _bars("Frame size, by source", Counter(f"{each.info.width} x {each.info.height}" for each in sources))
    yield _bars("Codec, by source", Counter(each.info.codec for each in sources))
    for kind, title in TRAITS.items():
        of_kind = {name: n for name, n in report.traits.items() if name.partition(": ")[0] == kind}
        yield _bars(f"{title}, by file", Counter({name.partition(": ")[2]: n for name, n in of_kind.items()}))
    yield _bars("Out of the ordinary, by file", Counter(report.kinds))
    yield _labels(store)
    rows = [source.row() for source in islice(sources, MOST_ROWS)]
    yield f"<h2>Sources</h2>{_more(len(sources), MOST_ROWS, 'sources')}"
    yield page.table(COLUMNS, rows, [n for n, name in enumerate(COLUMNS) if name not in ("source", "codec")])
    yield page.END


def _bars(title: str, counts: Counter[str]) -> str:
    """A plot of counts, the largest first. Empty without any."""
    if not counts:
        return ""
    rows = [(name, float(count), None) for name, count in counts.most_common(MOST_BARS)]
    return f"<h2>{page.esc(title)}</h2>{page.bars(rows, title)}{_more(len(counts), MOST_BARS, 'values')}"


def _histogram(title: str, values: Sequence[float], unit: str = " s") -> str:
    middle = sorted(values)[len(values) // 2]
    words = f"least {min(values):.4g}{unit}, median {middle:.4g}{unit}, most {max(values):.4g}{unit}"
    return f"<h2>{title}</h2><p>{words}</p>{page.histogram(values, title, top=float(f'{max(values):.4g}'), unit=unit)}"


def _more(count: int, shown: int, what: str) -> str:
    return f'<p class="dim">The first {shown} of {count} {what}.</p>' if count > shown else ""


def _left_out(path: Path) -> str:
    """The first entries of the quarantine list."""
    with open(path, encoding="utf-8") as file:
        entries = [json.loads(line) for line in islice(file, MOST_ROWS)]
        count = len(entries) + sum(1 for _ in file)
    if not entries:
        return ""
    rows = [(entry["file"], entry.get("line", ""), entry["state"], entry["reason"]) for entry in entries]
    table = page.table(("file", "line", "state", "reason"), rows, (1,))
    return f"<h2>Left out, wholly or in part</h2>{_more(count, MOST_ROWS, 'entries')}{table}"


def _labels(store: Store) -> str:
    labels = store.labels()
    if labels is None:
        return ""
    counts: Counter[str] = Counter()
    for label in labels.label.tolist():
        counts["none" if label == NO_LABEL else labels.classes.get(label, str(label))] += 1
    return _bars("Clips by label", counts)
