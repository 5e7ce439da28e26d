"""Runs a step over its items: units of items in child processes, one Parquet file a unit.

A unit's file is written whole, synced and renamed, and carries its key and item ids in the footer. An item is done if a
file of the step's key has it. A child that dies by an item's fault loses that item alone: the item is tried again, then
rejected, and its reason is its row. The rows of a step depend on its key and its items only, not on units, engine or
processes.
"""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from vito_fast.curate.options import digest
from vito_fast.data.pack.on_ray import connect
from vito_fast.errors import UserError
from vito_fast.files import atomic_write

UNIT = 32
"""Items of one unit."""
TRIES = 3
"""Times an item is tried whose child died."""
KILLS = 10
"""The same for SIGKILL, which comes from outside unless the machine has no memory left."""
ENDED = "its process ended with status"
KILLED = f"{ENDED} {-signal.SIGKILL}"
KEY, ITEMS = b"vito_fast.key", b"vito_fast.items"


@dataclass(frozen=True, slots=True)
class Item:
    """``id`` names content and identity; ``data`` is what the step needs of it."""

    id: str
    data: Mapping[str, Any]


@dataclass(frozen=True)
class Step:
    """``module`` has ``SCHEMA``, ``run(data, options) -> row`` and ``rejected(data, reason) -> row``."""

    name: str
    module: str
    options: Any
    key: str
    """Digest of everything that decides a row besides its item: see :func:`step_key`."""
    seconds: float = 3600.0
    """Wall time of one item."""
    memory_mib: int = 8192
    """Address space, 0 = no limit: that of CUDA is huge."""


@dataclass(frozen=True)
class Unit:
    items: tuple[Item, ...]
    path: str

    @staticmethod
    def of(items: Sequence[Item], folder: Path, key: str) -> "Unit":
        name = digest(key, [item.id for item in items])
        return Unit(tuple(items), str(folder / f"{name}.parquet"))


@dataclass
class Cost:
    """Of one step in this run."""

    items: int = 0
    reused: int = 0
    cpu_s: float = 0.0
    wall_s: float = 0.0


@dataclass
class Engine:
    """Where units run. ``part`` (i, n) takes the i-th of n shares of the items, by their ids."""

    name: str = "local"
    processes: int = 0
    part: tuple[int, int] = (1, 1)
    progress: Callable[[str, int, int], None] = lambda step, done, total: None
    costs: dict[str, Cost] = field(default_factory=dict)


def step_key(name: str, version: int, *parts: Any) -> str:
    """The key of a step: its name, its code's version, its options and the keys of the steps before it."""
    return digest(name, version, *parts)


def mine(item: Item, part: tuple[int, int]) -> bool:
    return int(digest(item.id), 16) % part[1] == part[0] - 1


def unit_files(folder: Path, key: str) -> Iterator[tuple[Path, list[str]]]:
    """The finished units of a key, in a fixed order, each with its item ids."""
    for path in sorted(folder.glob("*.parquet")):
        with contextlib.suppress(pa.ArrowException, OSError, KeyError, ValueError):
            footer = pq.read_metadata(path).metadata or {}
            if footer[KEY].decode() == key:
                yield path, json.loads(footer[ITEMS])


def run(step: Step, items: Sequence[Item], folder: Path, engine: Engine) -> None:
    """Compute the rows of all items of this part that no unit has yet.

    Raises:
        UserError: A child cannot start, the disk is full, or Ray is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    own = [item for item in items if mine(item, engine.part)]
    done = {name for _, names in unit_files(folder, step.key) for name in names}
    todo = [item for item in own if item.id not in done]
    units = [Unit.of(todo[start : start + UNIT], folder, step.key) for start in range(0, len(todo), UNIT)]
    cost = engine.costs.setdefault(step.name, Cost())
    cost.items += len(todo)
    cost.reused += len(own) - len(todo)
    begin, finished = time.monotonic(), len(own) - len(todo)
    engine.progress(step.name, finished, len(own))
    for unit, cpu_s in (_ray if engine.name == "ray" else _local)(step, units, engine):
        finished += len(unit.items)
        cost.cpu_s += cpu_s
        engine.progress(step.name, finished, len(own))
    cost.wall_s += time.monotonic() - begin


def clean(folder: Path, key: str) -> None:
    """Remove the units of other keys and what killed processes left. Only while no other process writes there."""
    if folder.is_dir():
        kept = {path for path, _ in unit_files(folder, key)}
        for path in folder.iterdir():
            if path not in kept and (path.suffix == ".parquet" or path.name.endswith(".partial")):
                path.unlink(missing_ok=True)


def rows(folder: Path, key: str, ids: Container[str], columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The rows of the items ``ids``, unit by unit, each once; other items' rows are passed over."""
    seen: set[str] = set()
    for path, _ in unit_files(folder, key):
        for row in pq.read_table(path, columns=["item_id", *columns]).to_pylist():
            if row["item_id"] in ids and row["item_id"] not in seen:
                seen.add(row["item_id"])
                yield row


class Child:
    """A process that computes units; started again whenever one ends it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen | None = None
        self._connection: Connection
        self._stderr: IO[bytes]

    def compute(self, step: Step, unit: Unit) -> float:
        """Write the unit's file; returns CPU seconds. UserError if it can never be written."""
        poison: dict[int, str] = {}
        deaths: dict[int, int] = {}
        while True:
            at, reason, cpu_s = self._try(step, unit, poison)
            if reason is None:
                return cpu_s
            deaths[at] = deaths.get(at, 0) + 1
            most = KILLS if reason.startswith(KILLED) else TRIES
            if at < 0:
                if deaths[at] >= most:
                    raise UserError(f"a process of step {step.name} cannot start: {reason}")
            elif reason.startswith("over a limit") or deaths[at] >= most:
                poison[at] = reason

    def _try(self, step: Step, unit: Unit, poison: dict[int, str]) -> tuple[int, str | None, float]:
        """(item it was at, why it ended or None, CPU seconds)."""
        at, since = -1, time.monotonic()
        try:
            if self._process is None:
                self._start()
            self._connection.send(("unit", step, unit, poison))
            while True:
                while not self._connection.poll(0.5):
                    if at >= 0 and time.monotonic() - since > step.seconds:
                        self.stop()
                        return at, f"over a limit: not done within {step.seconds:g} s", 0.0
                kind, value = self._connection.recv()
                if kind == "item":
                    at, since = value, time.monotonic()
                elif kind == "done":
                    return at, None, value
                else:
                    raise UserError(f"step {step.name}: {value}")
        except (EOFError, ConnectionResetError, BrokenPipeError):
            reason = self._last_words()
            self.stop()
            return at, reason, 0.0

    def _start(self) -> None:
        self._connection, theirs = Pipe()
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        paths = os.pathsep.join(path for path in sys.path if path)
        environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "vito_fast.curate.child", str(theirs.fileno())],
            pass_fds=[theirs.fileno()], env=environment,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=self._stderr,
        )  # fmt: skip
        theirs.close()

    def _last_words(self) -> str:
        assert self._process
        status = self._process.wait()
        self._stderr.seek(0)
        lines = self._stderr.read().decode(errors="replace").strip().splitlines()
        said = f": {lines[-1]}" if lines else ""
        return f"{ENDED} {status}{said}"

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._connection.close()
            self._process = None


def _local(step: Step, units: Sequence[Unit], engine: Engine) -> Iterator[tuple[Unit, float]]:
    waiting: queue.SimpleQueue[Unit] = queue.SimpleQueue()
    results: queue.SimpleQueue[tuple[Unit, float] | BaseException] = queue.SimpleQueue()
    for unit in units:
        waiting.put(unit)
    children = [Child() for _ in range(min(engine.processes or len(os.sched_getaffinity(0)), len(units)))]

    def serve(child: Child) -> None:
        try:
            while True:
                unit = waiting.get_nowait()
                results.put((unit, child.compute(step, unit)))
        except queue.Empty:
            pass
        except BaseException as error:  # the driver raises it
            results.put(error)

    threads = [threading.Thread(target=serve, args=(child,), daemon=True) for child in children]
    try:
        for thread in threads:
            thread.start()
        for _ in units:
            result = results.get()
            if isinstance(result, BaseException):
                raise result
            yield result
    finally:
        for child in children:
            child.stop()


_ray_child: Child | None = None


def ray_unit(step: Step, unit: Unit) -> float:
    """A Ray task: the unit in a child of the Ray worker, which outlives the task."""
    global _ray_child
    if Path(unit.path).exists():  # a task that ran, and whose answer was lost
        return 0.0
    _ray_child = _ray_child or Child()
    return _ray_child.compute(step, unit)


def _ray(step: Step, units: Sequence[Unit], engine: Engine) -> Iterator[tuple[Unit, float]]:
    ray = connect()
    remote = ray.remote(max_retries=-1, num_cpus=1)(ray_unit)
    waiting = {remote.remote(step, unit): unit for unit in units}
    while waiting:
        ready, _ = ray.wait(list(waiting), num_returns=1)
        for reference in ready:
            unit = waiting.pop(reference)
            try:
                yield unit, ray.get(reference)
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None


def write_unit(path: Path, table: pa.Table, key: str, ids: Sequence[str]) -> None:
    """Atomically, with key and item ids in the footer."""
    table = table.replace_schema_metadata({KEY: key.encode(), ITEMS: json.dumps(list(ids)).encode()})
    with atomic_write(path) as partial:
        pq.write_table(table, partial, compression="zstd")
