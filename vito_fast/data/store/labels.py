"""``labels.parquet`` of a store: a row for each clip, in their order, with ``label``, ``class`` (the label's name),
``clip_id``, ``group`` and other columns.

Curation writes it, or pack from a clip list. Only this module reads it; pyarrow is imported where there is one.
"""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vito_fast.errors import UserError
from vito_fast.files import atomic_write

FILE = "labels.parquet"
NO_LABEL = -1


class Labels:
    """Classes, ids and groups of a store's clips.

    Args:
        table: A pyarrow table, a row for each clip, with ``label`` and perhaps ``class``, ``clip_id`` and ``group``.

    Attributes:
        label: (N,) int64, -1 where a clip has none.
        classes: Name of each label, of those that have one.
    """

    def __init__(self, table: Any):
        import pyarrow as pa

        self.label: npt.NDArray[np.int64] = table["label"].cast(pa.int64()).fill_null(NO_LABEL).to_numpy()
        self.classes = class_names(table)
        self._texts = {
            name: table[name].cast(pa.large_string()).fill_null("").combine_chunks()
            for name in ("clip_id", "group")
            if name in table.column_names
        }

    def ids(self, clips: npt.NDArray[np.int64]) -> list[str]:
        """The ids of clips (n,), "" where a clip has none."""
        return self._text("clip_id", clips)

    @property
    def grouped(self) -> bool:
        """Whether the store has groups."""
        return "group" in self._texts

    def groups(self, clips: npt.NDArray[np.int64]) -> list[str]:
        """The groups of clips (n,), "" where a clip has none."""
        return self._text("group", clips)

    def of_classes(self, names: Collection[str]) -> npt.NDArray[np.bool_]:
        """Whether each clip is of one of some classes, (N,), each given by its name or number."""
        wanted = {number for number, name in self.classes.items() if name in names}
        wanted |= {int(name) for name in names if name.isdecimal()}
        return np.isin(self.label, list(wanted))

    def of_groups(self, names: Collection[str]) -> npt.NDArray[np.bool_]:
        """Whether each clip is of one of some groups, (N,)."""
        return np.isin(np.array(self.groups(np.arange(len(self.label)))), list(names))

    def renumber(self, numbers: Mapping[int, int]) -> None:
        """Give labels other numbers: see :func:`common_numbers`."""
        self.label = _renumbered(self.label, numbers)
        self.classes = {numbers[number]: name for number, name in self.classes.items()}

    def _text(self, name: str, clips: npt.NDArray[np.int64]) -> list[str]:
        return self._texts[name].take(clips).to_pylist() if name in self._texts else [""] * len(clips)


def class_names(table: Any) -> dict[int, str]:
    """The name of each label of a table, without those that have none, by label."""
    if "class" not in table.column_names or "label" not in table.column_names:
        return {}
    pairs = table.select(["label", "class"]).drop_null().group_by(["label", "class"]).aggregate([]).to_pylist()
    return {pair["label"]: pair["class"] for pair in sorted(pairs, key=lambda pair: (pair["label"], pair["class"]))}


def common_numbers(parts: Sequence[tuple[object, Mapping[int, str], Collection[int]]]) -> list[dict[int, int]]:
    """Numbers by which classes of one name have one number in several stores.

    The first store keeps its numbers. A class that an earlier store has, by name, gets the number it has there.
    Another one keeps its number if that is free, else gets the next free one.

    Args:
        parts: Of each store its name or folder, the name of each label, and all its labels.

    Returns:
        The new number of each label of each store.

    Raises:
        UserError: One store names its classes and another one does not.
    """
    bare = next((path for path, names, labels in parts if any(label >= 0 for label in set(labels) - set(names))), None)
    named = next((path for path, names, _ in parts if names), None)
    if bare and named and len(parts) > 1:
        raise UserError(
            f"{named} names its classes and {bare} has label numbers alone: add the names as column class of the latter"
        )
    name_of: dict[int, str] = {}
    result: list[dict[int, int]] = []
    for _, names, labels in parts:
        earlier = {name: number for number, name in reversed(name_of.items())}
        new = {label: label for label in labels}
        for label, name in sorted(names.items()):
            if name_of.get(label) == name:
                continue
            if name in earlier:
                new[label] = earlier[name]
            elif label in name_of:
                new[label] = max(*name_of, *names) + 1
            name_of[new[label]] = name
        result.append(new)
    return result


def _renumbered(labels: npt.NDArray[np.int64], numbers: Mapping[int, int]) -> npt.NDArray[np.int64]:
    known, places = np.unique(labels, return_inverse=True)
    return np.array([numbers.get(int(label), int(label)) for label in known], np.int64)[places]


def read_labels(store: Path, clips: int) -> Labels | None:
    """The labels of a store, None where it has none.

    Args:
        store: Its folder.
        clips: Number of its clips.

    Raises:
        UserError: ``labels.parquet`` cannot be read, or has another number of rows.
    """
    if not (path := store / FILE).exists():
        return None
    pa = need_pyarrow(path)
    try:
        return Labels(_table(path, clips, ["label", "class", "clip_id", "group"]))
    except (pa.ArrowException, KeyError) as error:
        raise _unreadable(path, error) from None


def share_numbers(stores: Sequence[tuple[str, Labels | None]]) -> tuple[Labels | None, ...]:
    """Renumber the labels of several stores, by name of the store, as :func:`common_numbers` says. Returns them."""
    labeled = [(name, own) for name, own in stores if own]
    numbers = common_numbers([(name, own.classes, np.unique(own.label).tolist()) for name, own in labeled])
    for (_, own), new in zip(labeled, numbers, strict=True):
        own.renumber(new)
    return tuple(own for _, own in stores)


def count_labels(store: Path) -> int:
    """Rows of a store's ``labels.parquet``, 0 where it has none. Raises UserError if it cannot be read."""
    if not (path := store / FILE).exists():
        return 0
    pa = need_pyarrow(path)
    from pyarrow.parquet import read_metadata

    try:
        rows: int = read_metadata(path).num_rows
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, error) from None
    return rows


def combine_labels(parts: Sequence[tuple[Path, int]], order: Sequence[tuple[int, int]], videos: Sequence[int]) -> Any:
    """The table of a store that is made of stores. A clip of a store without labels has nulls.

    Args:
        parts: Folder and number of clips of each store.
        order: Store and clip of each clip of the new store.
        videos: The new number of each clip's video.

    Returns:
        A pyarrow table for :func:`write_labels`, None where no store has labels.

    Raises:
        UserError: A ``labels.parquet`` cannot be read, is of another store, or has columns of other types.
    """
    if not (labeled := [folder / FILE for folder, _ in parts if (folder / FILE).exists()]):
        return None
    pa = need_pyarrow(labeled[0])
    empty = [pa.table({"clip": pa.array(range(clips), pa.int64())}) for _, clips in parts]
    tables = [
        _table(folder / FILE, clips) if (folder / FILE).exists() else none
        for (folder, clips), none in zip(parts, empty, strict=True)
    ]
    labels = [_column(table) for table in tables]
    numbers = common_numbers(
        [
            (folder, class_names(table), np.unique(own).tolist())
            for (folder, _), table, own in zip(parts, tables, labels, strict=True)
        ]
    )
    tables = [
        table.set_column(table.column_names.index("label"), "label", pa.array(_renumbered(own, new)))
        if any(old != number for old, number in new.items())
        else table
        for table, own, new in zip(tables, labels, numbers, strict=True)
    ]
    first = np.cumsum([0, *(clips for _, clips in parts)])
    rows = [int(first[part]) + clip for part, clip in order]
    try:
        whole = pa.concat_tables(tables, promote_options="permissive").take(pa.array(rows, pa.int64()))
    except pa.ArrowException as error:
        raise UserError(f"the columns of {', '.join(map(str, labeled))} differ: {_line(error)}") from None
    for name, values in (("clip", range(len(rows))), ("video", videos)):
        if name in whole.column_names:
            whole = whole.set_column(whole.column_names.index(name), name, pa.array(values, pa.int64()))
    return whole


def write_labels(store: Path, columns: Any) -> None:
    """Write ``labels.parquet`` atomically.

    Args:
        store: Its folder.
        columns: A pyarrow table, a list of rows as dicts, or lists by the columns' names.
    """
    pa = need_pyarrow(store / FILE)
    from pyarrow import parquet

    table = pa.Table.from_pylist(columns) if isinstance(columns, list) else pa.table(columns)
    with atomic_write(store / FILE) as partial:
        parquet.write_table(table, partial, compression="zstd")


def need_pyarrow(path: Path) -> Any:
    """The module pyarrow. Raises UserError, with the file that needs it, if it is not installed."""
    try:
        import pyarrow
    except ImportError:
        raise UserError(f"{path} needs pyarrow: pip install 'vito-fast[curate]'") from None
    return pyarrow


def read_table(path: Path, columns: list[str] | None = None) -> Any:
    """A Parquet file as a pyarrow table. Raises UserError if it cannot be read."""
    pa = need_pyarrow(path)
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            return file.read(columns)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, error) from None


def _table(path: Path, clips: int, columns: list[str] | None = None) -> Any:
    table = read_table(path, columns)
    if len(table) != clips:
        raise UserError(f"{path} has {len(table)} rows, the store has {clips} clips: it is of another store")
    return table


def _column(table: Any) -> npt.NDArray[np.int64]:
    """``label`` of a table, -1 for none. Empty if it has no such column of numbers."""
    from pyarrow import int64, types

    if "label" not in table.column_names or not types.is_integer(table["label"].type):
        return np.empty(0, np.int64)
    labels: npt.NDArray[np.int64] = table["label"].cast(int64()).fill_null(NO_LABEL).to_numpy()
    return labels


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(f"cannot read {path}: {_line(error)}")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
