"""``labels.parquet`` of a store: a row for each clip, in their order, with ``label``, ``clip_id`` and other columns.

Curation writes it, or pack from a clip list. Only this module reads it; pyarrow is imported where there is one.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vito_fast.errors import UserError
from vito_fast.files import atomic_write

FILE = "labels.parquet"
NO_LABEL = -1


class Labels:
    """Classes and ids of a store's clips.

    Args:
        table: A pyarrow table, a row for each clip, with ``label`` and perhaps ``clip_id``.

    Attributes:
        label: (N,) int64, -1 where a clip has none.
    """

    def __init__(self, table: Any):
        import pyarrow as pa

        self.label: npt.NDArray[np.int64] = table["label"].cast(pa.int64()).fill_null(NO_LABEL).to_numpy()
        named = "clip_id" in table.column_names
        self._ids = table["clip_id"].cast(pa.large_string()).fill_null("").combine_chunks() if named else None

    def ids(self, clips: npt.NDArray[np.int64]) -> list[str]:
        """The ids of clips (n,), "" where a clip has none."""
        return [""] * len(clips) if self._ids is None else self._ids.take(clips).to_pylist()


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
    pa = _pyarrow(path)
    try:
        return Labels(_table(path, clips, ["label", "clip_id"]))
    except (pa.ArrowException, KeyError) as error:
        raise _unreadable(path, error) from None


def count_labels(store: Path) -> int:
    """Rows of a store's ``labels.parquet``, 0 where it has none. Raises UserError if it cannot be read."""
    if not (path := store / FILE).exists():
        return 0
    pa = _pyarrow(path)
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
    pa = _pyarrow(labeled[0])
    empty = [pa.table({"clip": pa.array(range(clips), pa.int64())}) for _, clips in parts]
    tables = [
        _table(folder / FILE, clips) if (folder / FILE).exists() else none
        for (folder, clips), none in zip(parts, empty, strict=True)
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
        columns: A pyarrow table, or a list of rows as dicts.
    """
    pa = _pyarrow(store / FILE)
    from pyarrow import parquet

    table = pa.Table.from_pylist(columns) if isinstance(columns, list) else columns
    with atomic_write(store / FILE) as partial:
        parquet.write_table(table, partial, compression="zstd")


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow
    except ImportError:
        raise UserError(f"the classes in {path} need pyarrow: pip install 'vito-fast[curate]'") from None
    return pyarrow


def _table(path: Path, clips: int, columns: list[str] | None = None) -> Any:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            table = file.read(columns)
    except (ArrowException, OSError) as error:
        raise _unreadable(path, error) from None
    if len(table) != clips:
        raise UserError(f"{path} has {len(table)} rows, the store has {clips} clips: it is of another store")
    return table


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(f"cannot read the classes in {path}: {_line(error)}")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
