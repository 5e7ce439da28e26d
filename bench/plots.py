"""Line charts as SVG, inline or as a file: logarithmic or linear axes, colors by CSS class for light and dark."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 420, 300
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 12, 40


@dataclass(frozen=True)
class Series:
    """One line. ``style`` is a CSS class; ``dots`` draws points without a line."""

    name: str
    points: Sequence[tuple[float, float]]
    style: str
    dots: bool = False


@dataclass(frozen=True)
class Axis:
    """Where values fall, and how they are written; ``ticks`` replaces the powers of ``base`` or the five even steps."""

    label: str
    text: Callable[[float], str]
    log: bool = True
    ticks: Sequence[float] = ()
    base: int = 10


class _Scale:
    def __init__(self, axis: Axis, values: Sequence[float], start: float, end: float) -> None:
        self._log = axis.log
        low, high = min(values), max(values)
        if axis.log:
            low, high = math.log(low), math.log(high)
            margin = 0.04 * (high - low) or 0.5
            self._low, self._high = low - margin, high + margin
        else:
            self._low, self._high = 0.0 if low >= 0 else low, high * 1.05 or 1.0
        self._start, self._end = start, end

    def __call__(self, value: float) -> float:
        position = math.log(value) if self._log else value
        return self._start + (position - self._low) / (self._high - self._low) * (self._end - self._start)

    def ticks(self, axis: Axis) -> list[float]:
        if axis.ticks:
            return list(axis.ticks)
        if not self._log:
            step = _even_step(self._high / 5)
            return [step * i for i in range(int(self._high / step) + 1)]
        low, high = math.exp(self._low), math.exp(self._high)
        base = float(axis.base)
        decades = range(math.floor(math.log(low, base)), math.ceil(math.log(high, base)) + 1)
        steps = (1, 2, 5) if base == 10 and high / low < 60 else (1,)
        found = [step * base**decade for decade in decades for step in steps if low <= step * base**decade <= high]
        return found[:: max(1, math.ceil(len(found) / 7))]


def _even_step(rough: float) -> float:
    magnitude = 10.0 ** math.floor(math.log10(rough))
    return next(step * magnitude for step in (1, 2, 5, 10) if step * magnitude >= rough)


def chart(title: str, x: Axis, y: Axis, series: Sequence[Series]) -> str:
    """``<figure>`` with the picture, its caption and its legend.

    Empty series are left out; no series gives no figure.
    """
    series = [one for one in series if one.points]
    if not series:
        return ""
    xs = [point[0] for one in series for point in one.points] + list(x.ticks)
    ys = [point[1] for one in series for point in one.points]
    across = _Scale(x, xs, LEFT, WIDTH - RIGHT)
    up = _Scale(y, ys, HEIGHT - BOTTOM, TOP)
    parts = [*_grid(x, y, across, up), *(_line(one, across, up, x, y) for one in series)]
    legend = "".join(f'<li><i class="{one.style}"></i>{escape(one.name)}</li>' for one in series)
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title)}">{"".join(parts)}</svg><ul class="legend">{legend}</ul></figure>'
    )


STYLE = """
svg{font:11px system-ui,sans-serif;background:#fff} text{fill:#444} .grid{stroke:#ddd}
polyline{fill:none;stroke:currentColor;stroke-width:2} circle{fill:currentColor}
.ours{color:#d2492a} .ours polyline{stroke-width:3.5} .reference{color:#888} .peer0{color:#2a6fb0} .peer1{color:#3a9a5c}
.name{fill:currentColor;font-weight:600}
@media(prefers-color-scheme:dark){svg{background:#1c1c1e} text{fill:#ccc} .grid{stroke:#3a3a3c}}
"""


def picture(title: str, x: Axis, y: Axis, series: Sequence[Series]) -> str:
    """A chart as an SVG file of its own: the names of the lines stand in the upper left corner.

    Args:
        title: the text above.
        x: the axis across.
        y: the axis up.
        series: the lines, none of them empty.
    """
    across = _Scale(x, [point[0] for one in series for point in one.points], LEFT, WIDTH - RIGHT)
    up = _Scale(y, [point[1] for one in series for point in one.points], HEIGHT - BOTTOM, TOP)
    parts = [*_grid(x, y, across, up), *(_line(one, across, up, x, y) for one in series)]
    for line, one in enumerate(series):
        at = f'x="{LEFT + 14}" y="{TOP + 18 + 16 * line}"'
        parts.append(f'<text class="name {one.style}" {at}>{escape(one.name)}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 -26 {WIDTH + 10} {HEIGHT + 28}" role="img" '
        f'aria-label="{escape(title)}"><style>{STYLE}</style>'
        f'<text x="{LEFT}" y="-8" style="font-size:13px;font-weight:600">{escape(title)}</text>{"".join(parts)}</svg>\n'
    )


def _grid(x: Axis, y: Axis, across: _Scale, up: _Scale) -> list[str]:
    parts = []
    for value in across.ticks(x):
        place = across(value)
        parts.append(f'<line class="grid" x1="{place:.1f}" x2="{place:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(
            f'<text x="{place:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{escape(x.text(value))}</text>'
        )
    for value in up.ticks(y):
        place = up(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{place:.1f}" y2="{place:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{place + 4:.1f}" text-anchor="end">{escape(y.text(value))}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="axis" x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x.label)}</text>')
    return parts


def _line(one: Series, across: _Scale, up: _Scale, x: Axis, y: Axis) -> str:
    points = sorted(one.points)
    path = " ".join(f"{across(a):.1f},{up(b):.1f}" for a, b in points)
    marks = "".join(
        f'<circle cx="{across(a):.1f}" cy="{up(b):.1f}" r="3.5"><title>{escape(one.name)}: {escape(x.text(a))}, '
        f"{escape(y.text(b))}</title></circle>"
        for a, b in points
    )
    return f'<g class="{one.style}">{"" if one.dots else f"<polyline points={chr(34)}{path}{chr(34)}/>"}{marks}</g>'
