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
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import IO

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vito_fast.data.pack.clips import Journal, Rejected, ShardWriter, Span, TimeSpan
from vito_fast.data.pack.encode import EncoderMissing, Transcoder
from vito_fast.data.pack.remux import Remuxer
from vito_fast.data.store.description import Limits, PackOptions
from vito_fast.data.store.media import BadVideo, Member, Unreadable
from vito_fast.errors import UserError


@dataclass(frozen=True)
class FileJob:
    """One file to pack; all of it, or the spans of a clip list."""

    path: Path | Member
    spans: Sequence[Span | TimeSpan] | None = None


@dataclass(frozen=True)
class Faults:
    """What to do about faults of the surroundings, which say nothing about a file."""

    root: Path
    """The source folder. Without it, nothing can be packed."""
    timeout: float
    """Seconds for which a file that cannot be read is tried again."""
    skip: bool
    """Whether a file is rejected that still cannot be read."""

    def check_root(self) -> None:
        """Raise UserError if the source folder cannot be listed or is empty, as an unmounted one."""
        try:
            with os.scandir(self.root) as entries:
                reason = None if any(True for _ in entries) else "it is empty now"
        except OSError as error:
            reason = error.strerror
        if reason:
            raise UserError(f"the source {self.root} is gone: {reason}: bring it back and repeat the command")


@dataclass
class _Task:
    """A file to pack, and its faults so far."""

    name: str
    job: FileJob
    due: float = 0.0
    """Monotonic time before which it is not tried again."""
    first_fault: float = 0.0
    faults: int = 0
    deaths: int = 0
    """Processes that ended while they packed it."""


@dataclass(eq=False)
class _Worker:
    process: subprocess.Popen
    connection: Connection
    shard: int = -1
    """Number of the shard it appends to, -1 for none yet."""
    size: int = 0
    """Bytes of the shard that the journal has recorded."""
    task: _Task | None = None
    """What it is packing."""
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

    def stopped(self) -> bool:
        """Whether a signal has suspended it, or it waits for a disk: it does not hang."""
        try:
            return Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")")[-1].split()[0] in "TtD"
        except (OSError, IndexError):
            return False

    def send(self, message: object) -> None:
        """Send to a process that may have ended. The loss shows when its answer is awaited."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.connection.send(message)


class ProcessPool:
    """Packs files with ``processes`` workers. Each appends to its own shard, and to a new one at the size limit."""

    RETRY = 0.5, 30.0
    """Seconds until a file that cannot be read is tried again: at first, and at most."""
    SUSPENDED = 5.0
    """Seconds without a look at the workers that mean that this process was suspended, with them."""

    def __init__(
        self,
        journal: Journal,
        options: PackOptions,
        processes: int,
        decode_timeout: float,
        faults: Faults,
        limits: Limits = Limits(),
    ):
        self._journal, self._options, self._limits = journal, options, limits
        self._processes, self._decode_timeout, self._faults = processes, decode_timeout, faults
        self._workers: list[_Worker] = []
        self._queue: deque[_Task] = deque()
        self._later: list[_Task] = []
        """Files to be tried again."""
        self._given_up: dict[str, str] = {}
        """Reasons of the files that neither the journal nor the queue has."""
        self._last_look = 0.0

    def run(self, jobs: Mapping[str, FileJob], progress: bool) -> None:
        """Pack the jobs, by name of the file. Returns once the journal has an entry for each.

        Raises:
            UserError: The store cannot be written, no worker can start, or files cannot be read now.
        """
        self._queue = deque(_Task(name, job) for name, job in jobs.items())
        columns = (
            TextColumn("packing"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, disable=not progress, transient=True) as bar:
            task, start = bar.add_task("packing", total=len(jobs), rate=""), time.monotonic()
            try:
                while len(self._workers) < min(self._processes, len(self._queue)):
                    self._workers.append(self._start_worker())
                self._last_look = time.monotonic()
                while self._queue or self._later or any(worker.task for worker in self._workers):
                    for worker in self._workers:
                        if worker.task is None:
                            self._assign(worker)
                    self._wait()
                    waiting = len(self._queue) + len(self._later) + sum(bool(worker.task) for worker in self._workers)
                    done = len(jobs) - waiting
                    rate = done / (time.monotonic() - start)
                    bar.update(task, completed=done, rate=f"{rate:.1f} files/s")
            finally:
                self._stop_workers()
        if self._given_up:
            name, reason = next(iter(self._given_up.items()))
            raise UserError(
                f"{len(self._given_up)} files could not be packed, {name!r} for one: {reason}: repeat the command to "
                "try them again, or pass --skip-unreadable to leave them out"
            )

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

    def _assign(self, worker: _Worker) -> None:
        """Send the next file that is due, if any, and a new shard if the old one is full."""
        now = time.monotonic()
        if due := next((task for task in self._later if task.due <= now), None):
            self._later.remove(due)
        worker.task = due or (self._queue.popleft() if self._queue else None)
        if worker.task is None:
            return
        if worker.shard < 0 or worker.size >= self._options.shard_mib << 20:
            worker.shard, worker.size = self._journal.new_shard(), 0
            worker.send(("shard", str(self._journal.shard_path(worker.shard)), worker.shard))
        worker.last_message = now
        worker.deadline = now + self._limits.seconds
        worker.send(("file", worker.task.job))

    def _wait(self) -> None:
        """Wait for messages and take them."""
        busy = [worker for worker in self._workers if worker.task]
        ready = wait([worker.connection for worker in busy], timeout=1.0 if busy else 0.1)
        now = time.monotonic()
        lost, self._last_look = now - self._last_look, now
        for worker in busy:
            if lost > self.SUSPENDED or (worker.connection not in ready and worker.stopped()):
                worker.last_message += lost
                worker.deadline += lost
            if now > worker.deadline:
                self._reject(worker, f"over a limit: not packed within {self._limits.seconds:g} s")
            elif worker.connection in ready:
                self._receive(worker)
            elif worker.started and now - worker.last_message > self._decode_timeout:
                self._reject(worker, f"no frame decoded for {self._decode_timeout:.0f} s")

    def _receive(self, worker: _Worker) -> None:
        """Take one message."""
        task = worker.task
        assert task
        try:
            message = worker.connection.recv()
        except (EOFError, ConnectionResetError):
            self._died(worker, task)
            return
        worker.last_message, worker.started = time.monotonic(), True
        if message[0] == "beat":
            return
        kind, value, worker.size = message
        worker.task = None
        if kind == "fatal":
            raise UserError(f"{value}: fix that and repeat the command, it continues from here")
        if kind == "unreadable":
            self._retry(task, value)
        else:
            self._journal.add(task.name, Rejected(value) if kind == "rejected" else value)

    def _died(self, worker: _Worker, task: _Task) -> None:
        """Try a file again whose process ended, once: the fault may not be the file's."""
        status, reason = worker.process.wait(), worker.last_error()
        if not worker.started:
            raise UserError(f"a packing process cannot start (exit status {status}){reason}")
        task.deaths += 1
        if task.deaths == 1:
            self._replace(worker)
            self._later.append(task)
        elif -status in (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            self._replace(worker)
            self._give_up(task, f"its process was killed twice (signal {-status}), by lack of memory or by someone")
        else:
            self._reject(worker, f"the decoder crashed (exit status {status}){reason}")

    def _retry(self, task: _Task, reason: str) -> None:
        """Put a file that cannot be read back into the queue, or give it up after a while."""
        now, (first, most) = time.monotonic(), self.RETRY
        task.first_fault = task.first_fault or now
        if now - task.first_fault >= self._faults.timeout:
            self._faults.check_root()
            self._give_up(task, reason)
            return
        task.due = min(now + min(most, first * 2**task.faults), task.first_fault + self._faults.timeout)
        task.faults += 1
        self._later.append(task)

    def _give_up(self, task: _Task, reason: str) -> None:
        if self._faults.skip:
            self._journal.add(task.name, Rejected(reason))
        else:
            self._given_up[task.name] = reason

    def _reject(self, worker: _Worker, reason: str) -> None:
        """Reject the file of a worker that hangs or crashes."""
        assert worker.task
        self._journal.add(worker.task.name, Rejected(reason))
        self._replace(worker)

    def _replace(self, worker: _Worker) -> None:
        """End a worker, truncate its shard and start another process."""
        worker.process.kill()
        worker.process.wait()
        worker.connection.close()
        os.truncate(self._journal.shard_path(worker.shard), worker.size)
        self._workers[self._workers.index(worker)] = self._start_worker()

    def _stop_workers(self) -> None:
        for worker in self._workers:
            try:
                if worker.task is None:
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
            result = Transcoder(options, shard, limits, job.spans).run(job.path, heartbeat)
        else:
            result = Remuxer(options, shard, limits, job.spans).run(job.path, heartbeat)
        shard.flush()
        return "done", result
    except BadVideo as error:
        shard.rewind(start)
        return "unreadable" if isinstance(error, Unreadable) else "rejected", str(error)
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
    ("rejected", reason, shard size), ("unreadable", reason, shard size) or ("fatal", message, shard size).
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
