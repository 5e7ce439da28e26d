"""The candidates: what is to be curated, and which classes each is said to show."""

import csv
import itertools
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vito_fast.curate.options import digest
from vito_fast.curate.taxonomy import taxonomy
from vito_fast.data.pack.listing import VIDEO_SUFFIXES
from vito_fast.errors import UserError
from vito_fast.files import atomic_write

MOST_ROWS = 100_000_000
LONGEST = 4096
"""Characters of a field; the rest is cut off."""
FIELDS = ("path", "query", "title", "tags", "licence", "source")
SCHEMA = pa.schema(
    [
        ("candidate_id", pa.string()),
        ("row", pa.int64()),
        *((name, pa.string()) for name in FIELDS),
        ("class_ids", pa.list_(pa.int16())),
        ("resolution", pa.string()),
        ("nearest", pa.string()),
    ]
)
BATCH = 1 << 14


def write_candidates(src: Path, out: Path) -> Path:
    """Write ``candidates.parquet`` and return the default root of its paths.

    Args:
        src: A folder: the innermost folder name that names a class is a file's query, and its own files have none. Or a
            manifest, CSV, JSONL or Parquet, with the column ``path`` and optionally the others of ``FIELDS``.
        out: The file to write.

    Raises:
        UserError: No such file, no column ``path``, no row, or a row that cannot be read, with its number.
    """
    if not src.exists():
        raise UserError(f"no such file or folder: {src}")
    rows = _folder(src) if src.is_dir() else _manifest(src)
    count, seen = 0, set[int]()
    with atomic_write(out) as partial, pq.ParquetWriter(partial, SCHEMA, compression="zstd") as writer:
        numbered = enumerate(rows)
        while batch := list(itertools.islice(numbered, BATCH)):
            shown = [_candidate(number, row) for number, row in batch]
            fresh = []
            for row in shown:  # the same video with the same query is one candidate
                name = int(row["candidate_id"][:16], 16)
                if name not in seen:
                    seen.add(name)
                    fresh.append(row)
            writer.write_table(pa.Table.from_pylist(fresh, schema=SCHEMA))
            count += len(batch)
            if count > MOST_ROWS:
                raise UserError(f"{src} has over {MOST_ROWS} rows: split it")
        if not count:
            raise UserError(f"{src} holds no candidate: looked for {', '.join(sorted(VIDEO_SUFFIXES))}")
    return src if src.is_dir() else src.parent


def _candidate(number: int, row: Mapping[str, str]) -> dict[str, Any]:
    values = {name: clean(row.get(name) or "", keep=name == "path") for name in FIELDS}
    found = taxonomy().resolve(values["query"])
    return {
        "candidate_id": digest(values["path"], values["query"]), "row": number, **values,
        "class_ids": list(found.classes), "resolution": found.kind, "nearest": ", ".join(found.nearest),
    }  # fmt: skip


def clean(text: str, keep: bool = False) -> str:
    """A field of bounded length whose control characters are escaped; of a path (``keep``) none is changed."""
    text = text[:LONGEST].encode("utf-8", "backslashreplace").decode()
    return text if keep else "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _folder(src: Path) -> Iterator[dict[str, str]]:
    def fail(error: OSError) -> None:
        if Path(error.filename) == src:
            raise UserError(f"cannot read {src}: {error.strerror}")

    for folder, folders, files in os.walk(src, followlinks=False, onerror=fail):
        folders.sort()
        place = Path(folder).relative_to(src)
        known = [part for part in place.parts if taxonomy().resolve(part).classes]
        query = known[-1] if known else place.name
        for name in sorted(files):
            if os.path.splitext(name)[1].lower() in VIDEO_SUFFIXES:
                yield {"path": (place / name).as_posix(), "query": query}


def _manifest(src: Path) -> Iterator[dict[str, str]]:
    suffix = src.suffix.lower()
    readers = {".csv": _csv, ".tsv": _csv, ".jsonl": _jsonl, ".ndjson": _jsonl, ".parquet": _parquet}
    if suffix not in readers:
        raise UserError(f"{src} is no manifest: CSV, JSONL or Parquet, by its suffix")
    for number, row in enumerate(readers[suffix](src)):
        path = row.get("path")
        if not isinstance(path, str) or not path:
            raise UserError(f"{src}: row {number + 1} has no path")
        yield {name: value if isinstance(value, str) else json.dumps(value) for name, value in row.items() if value}


def _csv(src: Path) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(1 << 20)
    with open(src, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        reader = csv.DictReader(file, delimiter="\t" if src.suffix == ".tsv" else ",", restkey="rest")
        try:
            yield from reader
        except csv.Error as error:
            raise UserError(f"{src}: line {reader.line_num} cannot be read: {error}") from None


def _jsonl(src: Path) -> Iterator[dict[str, Any]]:
    with open(src, encoding="utf-8", errors="surrogateescape") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    row = None
                if not isinstance(row, dict):
                    raise UserError(f"{src}: line {number} is no JSON object")
                yield row


def _parquet(src: Path) -> Iterator[dict[str, Any]]:
    try:
        with pq.ParquetFile(src) as file:
            columns = [name for name in FIELDS if name in file.schema_arrow.names]
            for batch in file.iter_batches(batch_size=BATCH, columns=columns):
                yield from batch.to_pylist()
    except pa.ArrowException as error:
        raise UserError(f"{src} is no Parquet file: {str(error).splitlines()[0]}") from None
