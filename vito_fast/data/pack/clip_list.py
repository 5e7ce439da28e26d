"""Clip lists: a CSV or Parquet table of the clips to pack, with their labels."""

import csv
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from vito_fast.data.pack.clips import Clips, Span, TimeSpan
from vito_fast.data.store.labels import NO_LABEL
from vito_fast.errors import UserError

NAMES = {"source": "path", "clip_id": "id"}
"""Other names of columns."""
COLUMNS = ("path", "start", "end", "first_frame", "end_frame", "label", "class", "id", "group", "text")


def read_clip_list(path: Path) -> Clips:
    """Read a clip list.

    Args:
        path: A CSV with a header, or a Parquet file. Columns:

            - ``path``, or ``source``: the file, relative to the source folder.
            - ``start`` and ``end``: seconds after the file's first frame. An empty one is the file's own. A file whose
              row has neither is packed as one that is not in a list.
            - ``label``: a number, or a name. Names get the numbers from 0 on in their sorted order.
            - ``class``: the name of a label that is a number.
            - ``id``, or ``clip_id``, ``group`` and ``text``: texts. Clips of one group become one video.
            - ``first_frame``, ``end_frame``, in place of ``end``: frames of the file, as curation writes them. Then
              ``start`` is the first frame's time in ticks.

            Other columns are ignored.

    Returns:
        The clips of each file. ``line`` is the line of a CSV, counted from 1, or the row of a Parquet table.

    Raises:
        UserError: The list cannot be read, or a value makes no sense. The message names line and column.
    """
    lines = list(_parquet(path) if path.suffix == ".parquet" else _csv(path))
    if not lines:
        raise UserError(f"{path} has no rows")
    known = lines[0][1].keys()
    if "path" not in known:
        raise UserError(f"{path} has no column path or source: its header is {', '.join(known)}")
    try:
        numbers = _numbers(row.get("label", "") for _, row in lines)
    except ValueError as error:
        raise UserError(f"{path}, column label: {error}") from None
    clips: dict[str, list[Span | TimeSpan]] = {}
    for line, row in lines:
        values = _Values(path, line, row)
        about = {**_row(row, numbers), "line": line}
        if not row["path"]:
            raise values.error("path", "is empty")
        own = clips.setdefault(row["path"], [])
        if "first_frame" in known:
            frames = [values.integer(name) for name in ("first_frame", "end_frame", "start")]
            own.append(Span(*frames, **about))
        else:
            own.append(TimeSpan(values.seconds("start", -math.inf), values.seconds("end", math.inf), **about))
            if len(own) > 1 and any(isinstance(span, TimeSpan) and span.whole for span in (own[0], own[-1])):
                raise values.error("path", f"names {row['path']!r} again, which is listed as a whole")
    return clips


class _Values:
    """The values of one row."""

    def __init__(self, path: Path, line: int, row: dict[str, str]):
        self._path, self._line, self._row = path, line, row

    def error(self, column: str, problem: str) -> UserError:
        return UserError(f"{self._path}: line {self._line}, column {column}: {problem}")

    def seconds(self, column: str, default: float) -> float:
        text = self._row.get(column, "")
        try:
            value = float(text) if text else default
        except ValueError:
            value = math.nan
        if not (value >= 0 or value == default) or (text and math.isinf(value)):
            raise self.error(column, f"{text!r} is no number of seconds")
        return value

    def integer(self, column: str) -> int:
        text = self._row.get(column, "")
        if not _integer(text):
            raise self.error(column, f"{text!r} is no integer")
        return int(text)


def rows_of_archives(about: Mapping[str, Mapping[str, str]]) -> Clips:
    """The rows of videos of which an archive says something, by their names.

    Raises:
        UserError: A label makes no sense.
    """
    try:
        numbers = _numbers(texts.get("label", "") for texts in about.values())
    except ValueError as error:
        raise UserError(f"the labels in the archives: {error}") from None
    return {name: [TimeSpan(**_row(texts, numbers))] for name, texts in about.items()}


def _row(texts: Mapping[str, str], numbers: Mapping[str, tuple[int, str]]) -> dict[str, Any]:
    """The fields of :class:`Row`."""
    number, name = numbers.get(texts.get("label", ""), (NO_LABEL, ""))
    known = {field: texts.get(field, "") for field in ("id", "group", "text")}
    return {"label": number, "class_name": texts.get("class") or name, **known}


def _numbers(labels: Iterable[str]) -> dict[str, tuple[int, str]]:
    """Number and name of each label. ValueError for a number that is no label."""
    found = set(labels) - {""}
    if not all(map(_integer, found)):
        return {name: (number, name) for number, name in enumerate(sorted(found))}
    for label in found:
        if not NO_LABEL <= int(label) < 2**63:
            raise ValueError(f"{label} is not within -1 and 2^63 - 1")
    return {label: (int(label), "") for label in found}


def _integer(text: str) -> bool:
    return re.fullmatch(r"\s*[+-]?[0-9]{1,19}\s*", text) is not None


def _named(row: dict[Any, Any]) -> dict[str, str]:
    """A row by the names of its columns, without those that are ignored."""
    texts = {str(name).strip(): "" if value is None else str(value) for name, value in row.items()}
    for other, name in NAMES.items():
        if other in texts:
            texts.setdefault(name, texts[other])
    return {name: text for name, text in texts.items() if name in COLUMNS}


def _csv(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    csv.field_size_limit(1 << 20)
    try:
        with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            reader = csv.DictReader(file, restkey="more", strict=True)
            try:
                for row in reader:
                    if "more" in row:
                        raise UserError(f"{path}: line {reader.line_num} has more fields than the header")
                    yield reader.line_num, _named(row)
            except csv.Error as error:
                raise UserError(f"{path}: line {reader.line_num} cannot be read: {error}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def _parquet(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    from vito_fast.data.store.labels import read_table

    yield from enumerate(map(_named, read_table(path).to_pylist()), 1)
