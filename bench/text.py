"""Numbers and tables as people read them."""

from __future__ import annotations

from collections.abc import Iterable


def _scaled(value: float, units: list[tuple[float, str]], digits: int = 3) -> str:
    scale, unit = next((pair for pair in units if abs(value) >= pair[0]), units[-1])
    return f"{significant(value / scale, digits)} {unit}"


def significant(value: float, digits: int = 3) -> str:
    """``value`` to so many significant digits, never in scientific notation above 1e-4: 1.23, 12.3, 123, 1230."""
    if value == 0:
        return "0"
    text = f"{value:.{digits}g}"
    return f"{float(text):.0f}" if "e+" in text else text


def seconds_text(seconds: float) -> str:
    return (
        _scaled(seconds, [(1, "s"), (1e-3, "ms"), (1e-6, "µs"), (0, "ns")])
        if seconds >= 1e-6
        else f"{seconds * 1e9:.3g} ns"
    )


def bytes_text(count: float) -> str:
    return _scaled(count, [(2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B")]) if count >= 1 else "0 B"


def count_text(count: float) -> str:
    return _scaled(count, [(1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1, "")]).strip()


def markdown(header: list[str], rows: Iterable[list[str]]) -> str:
    """The table. ValueError for one without rows."""
    if not (cells := list(rows)):
        raise ValueError("the results hold none of its rows")
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *cells]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
