"""Parts of self-contained pages: text, tables and plots as HTML and SVG. A page runs no script and loads nothing.

Every text of the data is escaped.
"""

import html
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

STYLE = Path(__file__).with_name("page.css")
END = "</body></html>\n"
BINS = 20


def head(title: str) -> str:
    """The beginning of a page, up to its headline."""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{esc(title)}</title>'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        f"style-src 'unsafe-inline'\"><style>{STYLE.read_text()}</style></head><body><h1>{esc(title)}</h1>"
    )


def esc(value: object) -> str:
    """Text for HTML; control characters are shown as escapes."""
    text = "".join(
        c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in str(value)
    )
    return html.escape(text.encode("utf-8", "backslashreplace").decode(), quote=True)


def table(names: Sequence[str], rows: Iterable[Sequence[object]], numbers: Sequence[int] = ()) -> str:
    """A table. ``numbers`` are the columns to align at the right."""

    def cells(row: Sequence[object], tag: str) -> str:
        kinds = [' class="n"' if place in numbers else "" for place in range(len(row))]
        return "".join(f"<{tag}{kind}>{esc(cell)}</{tag}>" for kind, cell in zip(kinds, row, strict=True))

    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{cells(names, "th")}</tr>{body}</table></div>'


def bars(rows: Sequence[tuple[str, float, float | None]], label: str) -> str:
    """Horizontal bars of (name, value, target). The outline is the target, None for none."""
    most = max((max(value, want or 0) for _, value, want in rows), default=0) or 1
    parts = []
    for place, (name, value, want) in enumerate(rows):
        y = place * 22
        parts.append(f'<text x="0" y="{y + 15}">{esc(name[:24])}</text>')
        parts.append(f'<rect class="bar" x="160" y="{y + 3}" width="{200 * value / most:.1f}" height="15" rx="2"/>')
        if want is not None:
            parts.append(f'<rect class="want" x="160" y="{y + 3}" width="{200 * want / most:.1f}" height="15"/>')
        shown = f"{value:g}" + (f" of {want:g}" if want is not None else "")
        parts.append(f'<text x="{166 + 200 * max(value, want or 0) / most:.1f}" y="{y + 15}">{esc(shown)}</text>')
    box = f'<svg viewBox="0 0 440 {22 * len(rows) + 4}" role="img" aria-label="{esc(label)}">'
    return f'<div class="wide">{box}{"".join(parts)}</svg></div>'


def histogram(
    values: Sequence[float], label: str, *, top: float | None = None, mark: float | None = None, unit: str = ""
) -> str:
    """A histogram from 0 to ``top``, by default the largest value, with a line at ``mark``."""
    top = top or max(values) or 1.0
    bins = Counter(min(BINS - 1, int(BINS * value / top)) for value in values)
    most = max(bins.values())
    parts = [
        f'<rect class="bar" x="{32 * n + 4}" y="{100 - 90 * bins[n] / most:.1f}" width="26" '
        f'height="{90 * bins[n] / most:.1f}"/>'
        for n in range(BINS)
    ]
    if mark is not None and mark <= top:
        x = f"{640 * mark / top:.1f}"
        parts.append(f'<line class="mark" x1="{x}" x2="{x}" y1="5" y2="100"/>')
    return (
        f'<div class="wide"><svg viewBox="0 0 650 120" role="img" aria-label="{esc(label)}">{"".join(parts)}'
        f'<text x="0" y="116">0</text><text x="644" y="116" text-anchor="end">{top:g}{esc(unit)}</text></svg></div>'
    )
