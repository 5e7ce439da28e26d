"""``vito-fast inspect-store`` and ``vito-fast bench-data``."""

from pathlib import Path
from typing import Annotated

import tyro

from vito_fast.cli.overrides import Place
from vito_fast.errors import UserError


def inspect_store(
    store: Place,
    sheet: Path | None = None,
    pictures: int = 24,
    verify: Annotated[bool, tyro.conf.FlagConversionOff] = True,
    threads: int = 0,
) -> int:
    """Verify a store's checksums, describe its content and draw a contact sheet.

    Args:
        store: A folder written by vito-fast pack.
        sheet: The PNG to draw; by default contact-sheet.png in the store.
        pictures: Clips on it, evenly spaced over the store.
        verify: Whether to read every packet and compare its checksum.
        threads: 0 = as many as cores.
    """
    from vito_fast.data.store.inspect import inspect_store as inspect

    sheet = sheet or store / "contact-sheet.png"
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


def bench_data(
    store: Place,
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
