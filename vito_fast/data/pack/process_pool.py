"""The worker processes of one packing run: distributes files, collects results, replaces workers that crash or hang."""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe, wait
from typing import IO

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vito_fast.data.limits import Limits
from vito_fast.data.pack.journal import Journal, Rejected
from vito_fast.data.pack.listing import Listing
from vito_fast.data.pack.worker import FileJob
from vito_fast.data.store.description import PackOptions
from vito_fast.errors import UserError


@dataclass(eq=False)
class _Worker:
    process: subprocess.Popen
    connection: Connection
    shard: int = -1
    """Number of the shard it appends to, -1 for none yet."""
    size: int = 0
    """Bytes of the shard that the journal knows."""
    file: str | None = None
    """The file it is packing."""
    last_message: float = 0.0
    """Monotonic time in seconds."""
    deadline: float = 0.0
    """Monotonic time at which its file is rejected, whatever it does."""
    started: bool = False
    """Whether it has sent any message."""
    stderr: IO[bytes] = field(default_factory=tempfile.TemporaryFile)

    def last_error(self) -> str:
        """``: `` and the last line on its standard error, or nothing."""
        self.stderr.seek(0)
        lines = self.stderr.read().decode(errors="replace").strip().splitlines()
        return f": {lines[-1]}" if lines else ""

    def send(self, message: object) -> None:
        """Send to a process that may have ended. The loss shows when its answer is awaited."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.connection.send(message)


class ProcessPool:
    """Packs files with ``processes`` workers. Each appends to its own shard, and to a new one at the size limit."""

    def __init__(
        self, listing: Listing, journal: Journal, options: PackOptions, processes: int, decode_timeout: float,
        limits: Limits = Limits(),
    ):  # fmt: skip
        self._listing, self._journal, self._options, self._limits = listing, journal, options, limits
        self._processes, self._decode_timeout = processes, decode_timeout
        self._workers: list[_Worker] = []

    def run(self, names: Sequence[str], progress: bool) -> None:
        """Pack ``names``. Returns once the journal has an entry for each.

        Raises:
            UserError: The store cannot be written, or no worker can start.
        """
        queue = list(reversed(names))
        columns = (
            TextColumn("packing"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, disable=not progress, transient=True) as bar:
            task, start, done = bar.add_task("packing", total=len(names), rate=""), time.monotonic(), 0
            try:
                while len(self._workers) < min(self._processes, len(queue)):
                    self._workers.append(self._start_worker())
                for worker in self._workers:
                    self._assign(worker, queue)
                while any(worker.file for worker in self._workers):
                    for worker in self._wait():
                        done += 1
                        rate = done / (time.monotonic() - start)
                        bar.update(task, completed=done, rate=f"{rate:.1f} files/s")
                        self._assign(worker, queue)
            finally:
                self._stop_workers()

    def _start_worker(self) -> _Worker:
        ours, theirs = Pipe()
        stderr = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        paths = os.pathsep.join(path for path in sys.path if path)
        environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [sys.executable, "-m", "vito_fast.data.pack.worker", str(theirs.fileno())],
            pass_fds=[theirs.fileno()], env=environment,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=stderr,
        )  # fmt: skip
        theirs.close()
        worker = _Worker(process, ours, stderr=stderr)
        worker.send(("options", self._options, self._limits))
        return worker

    def _assign(self, worker: _Worker, queue: list[str]) -> None:
        """Send the next file of the queue, if any, and a new shard if the old one is full."""
        if not queue:
            worker.file = None
            return
        if worker.shard < 0 or worker.size >= self._options.shard_mib << 20:
            worker.shard, worker.size = self._journal.new_shard(), 0
            worker.send(("shard", str(self._journal.shard_path(worker.shard)), worker.shard))
        worker.file, worker.last_message = queue.pop(), time.monotonic()
        worker.deadline = worker.last_message + self._limits.seconds
        worker.send(("file", FileJob(str(self._listing.path(worker.file)), self._listing.spans.get(worker.file))))

    def _wait(self) -> list[_Worker]:
        """Wait for messages and return the workers whose file is packed or rejected."""
        busy = [worker for worker in self._workers if worker.file]
        ready = wait([worker.connection for worker in busy], timeout=1.0)
        finished = []
        for worker in busy:
            if time.monotonic() > worker.deadline:
                finished.append(self._replace(worker, f"over a limit: not packed within {self._limits.seconds:g} s"))
            elif worker.connection in ready:
                finished += self._receive(worker)
            elif time.monotonic() - worker.last_message > self._decode_timeout:
                finished.append(self._replace(worker, f"no frame decoded for {self._decode_timeout:.0f} s"))
        return finished

    def _receive(self, worker: _Worker) -> list[_Worker]:
        """Take one message. Returns the worker, or the one in its place, if its file is packed or rejected."""
        assert worker.file
        try:
            message = worker.connection.recv()
        except (EOFError, ConnectionResetError):
            status, reason = worker.process.wait(), worker.last_error()
            if not worker.started:
                raise UserError(f"a packing process cannot start (exit status {status}){reason}") from None
            return [self._replace(worker, f"the decoder crashed (exit status {status}){reason}")]
        worker.last_message, worker.started = time.monotonic(), True
        if message[0] == "beat":
            return []
        kind, value, worker.size = message
        if kind == "fatal":
            raise UserError(f"{value}: fix that and repeat the command, it continues from here")
        self._journal.add(worker.file, Rejected(value) if kind == "rejected" else value)
        return [worker]

    def _replace(self, worker: _Worker, reason: str) -> _Worker:
        """Reject the file of a dead or hanging worker, truncate its shard and start another process."""
        assert worker.file
        self._journal.add(worker.file, Rejected(reason))
        worker.process.kill()
        worker.process.wait()
        worker.connection.close()
        os.truncate(self._journal.shard_path(worker.shard), worker.size)
        fresh = self._start_worker()
        self._workers[self._workers.index(worker)] = fresh
        return fresh

    def _stop_workers(self) -> None:
        for worker in self._workers:
            try:
                if worker.file is None:
                    worker.connection.send(None)
                else:  # after an error: its packets have no record, and resuming removes them
                    worker.process.kill()
            except OSError:
                worker.process.kill()
        for worker in self._workers:
            worker.process.wait()
            worker.connection.close()
