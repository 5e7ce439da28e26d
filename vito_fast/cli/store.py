"""``vito-fast inspect-store``, ``vito-fast store`` and ``vito-fast bench-data``."""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import tyro

from vito_fast.cli.overrides import Address, Place, parse
from vito_fast.config import ClipFilter
from vito_fast.errors import UserError


def inspect_store(
    store: Address,
    sheet: Path | None = None,
    pictures: int = 24,
    verify: Annotated[bool, tyro.conf.FlagConversionOff] = True,
    threads: int = 0,
) -> int:
    """Verify a store's checksums, describe its content and draw a contact sheet.

    Args:
        store: A folder written by vito-fast pack, or its address.
        sheet: The PNG to draw; by default contact-sheet.png in the store, or here if the store is remote.
        pictures: Clips on it, evenly spaced over the store.
        verify: Whether to read every packet and compare its checksum.
        threads: 0 = as many as cores.
    """
    from vito_fast.data.store.inspect import inspect_store as inspect
    from vito_fast.data.store.remote import is_remote

    sheet = sheet or Path("" if is_remote(store) else store, "contact-sheet.png")
    try:
        found = inspect(store, verify=verify, sheet=sheet, pictures=pictures, threads=threads)
    except ValueError as error:
        raise UserError(str(error)) from None
    print("\n".join(found.lines()))
    if found.damaged:
        raise UserError(
            f"{len(found.damaged)} of {found.clips} clips of {store} are damaged; delete the store and pack again"
        )
    return 0


def append(src: Place, store: Address, processes: int = 0, clips: Path | None = None) -> int:
    """Pack the videos that a store does not have yet, by name, and add them to it. Safe to kill and to repeat.

    Args:
        src: A folder of videos, such as the one that the store was packed from.
        store: The store to grow. Its options are used.
        processes: Worker processes, 0 = one per core.
        clips: A clip list, CSV or Parquet, as of vito-fast pack. Rows of files that the store has are passed over.
    """
    from vito_fast.data.pack.clip_list import read_clip_list
    from vito_fast.data.pack.edit import append

    rows = read_clip_list(clips) if clips else None
    return _told(append(src, store, processes=processes, clips=rows).lines(), store)


def merge(dst: Address, stores: Annotated[tuple[str, ...], tyro.conf.Positional]) -> int:
    """Make one store of several of equal options. Clips that several have are taken once.

    Args:
        dst: The new store.
        stores: The stores, whose shards are linked, or downloaded from an address.
    """
    from vito_fast.data.pack.edit import merge

    return _told(merge(dst, stores).lines(), dst)


def subset(
    store: Address,
    dst: Address,
    where: Annotated[ClipFilter, tyro.conf.arg(name="")] = ClipFilter(),
    clips: Path | None = None,
) -> int:
    """Copy some clips of a store into a new one.

    Args:
        store: The store.
        dst: The new store.
        where: Filters. A clip passes all options, and one value of each.
        clips: A file of clip numbers, one a line. By default all clips.
    """
    from vito_fast.data.pack.edit import subset

    try:
        numbers = [int(line) for line in clips.read_text().split()] if clips else None
        report = subset(store, dst, where=where, clips=numbers)
    except (ValueError, IndexError) as error:
        raise UserError(f"{clips}: {error}") from None
    return _told(report.lines(), dst)


def export(store: Address, dst: Place) -> int:
    """Write the clips of a store as video files, without encoding, and clips.csv, a clip list of them.

    Args:
        store: The store. JPEGs become Motion JPEG.
        dst: The new folder.
    """
    from vito_fast.data.pack.export import export

    count = export(store, dst)
    print(f"{count} clips: {dst}, listed in {dst / 'clips.csv'}")
    return 0


def stats(store: Address, table: Path | None = None, page: Path | None = None) -> int:
    """Describe a store: what was packed, what was left out and why.

    Args:
        store: The store.
        table: A CSV to write, with a row for each source.
        page: An HTML page to write, with plots of sources, clips, labels and files left out.
    """
    from vito_fast.data.store.stats import write_page, write_table
    from vito_fast.data.store.store import Store

    opened = Store(store, check=False)
    print("\n".join(opened.report.lines()))
    for kind, path, write in (("table", table, write_table), ("page", page, write_page)):
        if path is not None:
            write(opened, path)
            print(f"{kind}: {path}")
    return 0


def _told(lines: Sequence[str], store: str | Path) -> int:
    print("\n".join([*lines, f"store: {store}"]))
    return 0


STORE: dict[str, Callable[..., int]] = {
    "append": append,
    "merge": merge,
    "subset": subset,
    "export": export,
    "stats": stats,
}


def store(words: Sequence[str]) -> int:
    """``vito-fast store COMMAND ...``."""
    if not words or words[0] not in STORE:
        if words and words[0] not in ("-h", "--help"):
            raise UserError(f"unknown command 'store {words[0]}': choose {', '.join(STORE)}")
        for name, function in STORE.items():
            with contextlib.suppress(SystemExit):
                parse(function, ["--help"], f"vito-fast store {name}")
        return 0
    return int(parse(STORE[words[0]], words[1:], f"vito-fast store {words[0]}"))


store.takes_words = True  # type: ignore[attr-defined]


def bench_data(
    store: Address,
    originals: Path | None = None,
    batch: int = 32,
    seconds: float = 10.0,
    size: int = 224,
    threads: int = 0,
    pairs: int = 16,
    rounds: int = 5,
    output: Path | None = None,
) -> int:
    """Time a store's loader, and its decoding beside that of the public readers that are installed.

    Args:
        store: A folder written by vito-fast pack.
        originals: The folder that was packed: the public readers then read its files, not the store's clips.
        batch: Clips a batch; fewer if the store holds fewer.
        seconds: How long to measure the loader.
        size: Side of a view in pixels.
        threads: Decoding threads of the loader; 0 = as many as cores. Decoding is compared on one.
        pairs: Frame pairs a round of the comparison.
        rounds: Rounds of the comparison.
        output: File to write all figures to, as JSON.
    """
    import json

    from vito_fast.data import bench_data as bench
    from vito_fast.files import check_writable

    if output is not None:
        check_writable(output)
    try:
        result = bench.bench_data(
            store, originals=originals, batch_size=batch, seconds=seconds, size=size, threads=threads, pairs=pairs,
            rounds=rounds,
        )  # fmt: skip
        if output is not None:
            output.write_text(json.dumps(result, indent=1) + "\n")
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from None
    print("\n".join(bench.lines(result)))
    return 0
