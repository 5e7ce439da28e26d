"""The processes that pack files, from both ends of the pipe.

:class:`ProcessPool` distributes files, collects results, and replaces workers that crash or hang. A worker is
``python -m vito_fast.data.pack.process_pool FD``: it packs the files that it receives over the pipe FD. A decoder that
crashes or hangs on a bad file ends this process alone. It is no fork, so it holds none of its parent's memory. It ends
with its parent.
"""

import contextlib
import ctypes
import errno
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import IO

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vito_fast.data.pack.clips import Journal, Rejected, ShardWriter, Span
from vito_fast.data.pack.encode import EncoderMissing, Transcoder
from vito_fast.data.pack.remux import Remuxer
from vito_fast.data.store.description import Limits, PackOptions
from vito_fast.data.store.media import BadVideo
from vito_fast.errors import UserError


@dataclass(frozen=True)
class FileJob:
    """One file to pack; all of it, or the spans of a clip list."""

    path: str
    spans: tuple[Span, ...] | None = None


@dataclass(eq=False)
class _Worker:
    process: subprocess.Popen
    connection: Connection
    shard: int = -1
    """Number of the shard it appends to, -1 for none yet."""
    size: int = 0
    """Bytes of the shard that the journal has recorded."""
    file: str | None = None
    """The file it is packing."""
    last_message: float = 0.0
    """Monotonic time in seconds."""
    deadline: float = 0.0
    """Monotonic time at which its file is rejected, even while it decodes."""
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
        self, journal: Journal, options: PackOptions, processes: int, decode_timeout: float, limits: Limits = Limits()
    ):
        self._journal, self._options, self._limits = journal, options, limits
        self._processes, self._decode_timeout = processes, decode_timeout
        self._workers: list[_Worker] = []

    def run(self, jobs: Mapping[str, FileJob], progress: bool) -> None:
        """Pack the jobs, by name of the file. Returns once the journal has an entry for each.

        Raises:
            UserError: The store cannot be written, or no worker can start.
        """
        queue = list(reversed(list(jobs.items())))
        columns = (
            TextColumn("packing"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, disable=not progress, transient=True) as bar:
            task, start, done = bar.add_task("packing", total=len(jobs), rate=""), time.monotonic(), 0
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
            [sys.executable, "-m", "vito_fast.data.pack.process_pool", str(theirs.fileno())],
            pass_fds=[theirs.fileno()], env=environment,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=stderr,
        )  # fmt: skip
        theirs.close()
        worker = _Worker(process, ours, stderr=stderr)
        worker.send(("options", self._options, self._limits))
        return worker

    def _assign(self, worker: _Worker, queue: list[tuple[str, FileJob]]) -> None:
        """Send the next file of the queue, if any, and a new shard if the old one is full."""
        if not queue:
            worker.file = None
            return
        if worker.shard < 0 or worker.size >= self._options.shard_mib << 20:
            worker.shard, worker.size = self._journal.new_shard(), 0
            worker.send(("shard", str(self._journal.shard_path(worker.shard)), worker.shard))
        (worker.file, job), worker.last_message = queue.pop(), time.monotonic()
        worker.deadline = worker.last_message + self._limits.seconds
        worker.send(("file", job))

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


def limit_memory(mebibytes: int) -> None:
    """Limit this process's address space to that of now and so much more. Decoders then fail, the machine does not."""
    with open("/proc/self/statm") as file:
        own = int(file.read().split()[0]) * resource.getpagesize()
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    most = own + (mebibytes << 20)
    resource.setrlimit(resource.RLIMIT_AS, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C


def _pack_one(
    job: FileJob, shard: ShardWriter, options: PackOptions, limits: Limits, heartbeat: Callable[[], None]
) -> tuple[str, object]:
    start = shard.size
    try:
        if options.store_format.codec:
            result = Transcoder(options, shard, limits, job.spans).run(Path(job.path), heartbeat)
        else:
            result = Remuxer(options, shard, limits).run(Path(job.path), heartbeat)
        shard.flush()
        return "done", result
    except BadVideo as error:
        shard.rewind(start)
        return "rejected", str(error)
    except OSError as error:  # of the shard: an OSError of the source is a BadVideo
        space = error.errno in (errno.ENOSPC, errno.EDQUOT)
        return "fatal", f"disk full: {shard.path.parent}" if space else f"cannot write {shard.path}: {error.strerror}"
    except EncoderMissing as error:
        return "fatal", str(error)
    except MemoryError:
        shard.rewind(start)
        return "rejected", "over a limit: memory"
    except Exception as error:  # one file must not end the run
        shard.rewind(start)
        return "rejected", f"unexpected {type(error).__name__}: {error}".splitlines()[0]


def serve(connection: Connection, parent: int) -> None:
    """Pack files until the parent sends None.

    Messages in: ("options", PackOptions, Limits), ("shard", path, number), ("file", FileJob), None.

    Messages out: ("beat",) at the start and each second of work. After each file ("done", PackedFile, shard size),
    ("rejected", reason, shard size) or ("fatal", message, shard size).
    """
    options, limits, shard = PackOptions(), Limits(), None
    connection.send(("beat",))
    last = time.monotonic()

    def heartbeat() -> None:
        nonlocal last
        if time.monotonic() - last > 1.0:
            if os.getppid() != parent:
                os._exit(1)
            last = time.monotonic()
            connection.send(("beat",))

    while (message := connection.recv()) is not None:
        if message[0] == "options":
            options, limits = message[1:]
            limit_memory(limits.memory_mib)
        elif message[0] == "shard":
            if shard is not None:
                shard.close()
            shard = ShardWriter(Path(message[1]), message[2])
        else:
            assert shard is not None
            kind, value = _pack_one(message[1], shard, options, limits, heartbeat)
            connection.send((kind, value, shard.size))
    if shard is not None:
        shard.close()


def main() -> None:
    parent = os.getppid()
    die_with_parent()
    try:
        serve(Connection(int(sys.argv[1])), parent)
    except (EOFError, BrokenPipeError):
        sys.exit(1)  # the parent is gone; the next run removes packets without a record


if __name__ == "__main__":
    main()
