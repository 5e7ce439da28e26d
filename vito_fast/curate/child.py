"""The process of :class:`vito_fast.curate.engine.Child`: computes units until its parent goes."""

import importlib
import resource
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pyarrow as pa

from vito_fast.curate.engine import Step, Unit, write_unit
from vito_fast.data.pack.process_pool import die_with_parent, limit_memory
from vito_fast.data.store.media import BadVideo


def compute(connection: Connection, step: Step, unit: Unit, poison: dict[int, str]) -> None:
    """One unit. A file's faults are its row; the disk's end the run."""
    module = importlib.import_module(step.module)
    begin = time.process_time()
    found: list[dict[str, Any]] = []
    for number, item in enumerate(unit.items):
        connection.send(("item", number))
        reason = poison.get(number)
        if reason is None:
            try:
                row = module.run(item.data, step.options)
            except BadVideo as error:
                reason = str(error)
            except MemoryError:
                reason = "over a limit: memory"
        if reason is not None:
            row = module.rejected(item.data, reason)
        found.append({"item_id": item.id, **row})
    try:
        table = pa.Table.from_pylist(found, schema=module.SCHEMA)
        write_unit(Path(unit.path), table, step.key, [item.id for item in unit.items])
    except OSError as error:
        connection.send(("fatal", f"cannot write {unit.path}: {error.strerror or error}"))
        return
    connection.send(("done", time.process_time() - begin))


def main() -> None:
    die_with_parent()
    connection, limited = Connection(int(sys.argv[1])), False
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        while True:
            _, step, unit, poison = connection.recv()
            if not limited:
                importlib.import_module(step.module)
                if step.memory_mib:
                    limit_memory(step.memory_mib)
                limited = True
            compute(connection, step, unit, poison)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        sys.exit(1)


if __name__ == "__main__":
    main()
