"""The packing processes of one run: hands out files, takes back results, survives a process that crashes or hangs."""

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

from vito_fast.data.pack.encode import PackOptions
from vito_fast.data.pack.journal import Journal, Rejected
from vito_fast.data.pack.listing import Listing
from vito_fast.errors import UserError


@dataclass
class _Member:
    process: subprocess.Popen
    connection: Connection
    shard: int
    size: int = 0
    name: str | None = None
    """The file it is at."""
    heard: float = 0.0
    ready: bool = False
    """Whether it has ever answered."""
    words: IO[bytes] = field(default_factory=tempfile.TemporaryFile)
    """Its standard error."""

    def last_words(self) -> str:
        self.words.seek(0)
        lines = self.words.read().decode(errors="replace").strip().splitlines()
        return f": {lines[-1]}" if lines else ""


class Crew:
    """Packs files with ``processes`` workers; each appends to a shard of its own, a new one at the size limit."""

    def __init__(self, listing: Listing, journal: Journal, options: PackOptions, processes: int, patience: float):
        self._listing, self._journal, self._options = listing, journal, options
        self._processes, self._patience = processes, patience
        self._members: list[_Member] = []

    def run(self, names: Sequence[str], progress: bool) -> None:
        """Returns when every file is in the journal, packed or rejected. UserError if the store cannot be written."""
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
                while len(self._members) < min(self._processes, len(queue)):
                    self._members.append(self._hire())
                for member in self._members:
                    self._give(member, queue)
                while any(member.name for member in self._members):
                    for member in self._heard():
                        done += 1
                        rate = done / (time.monotonic() - start)
                        bar.update(task, completed=done, rate=f"{rate:.1f} files/s")
                        self._give(member, queue)
            finally:
                self._dismiss()

    def _hire(self) -> _Member:
        mine, theirs = Pipe()
        words = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        paths = os.pathsep.join(path for path in sys.path if path)
        environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [sys.executable, "-m", "vito_fast.data.pack.worker", str(theirs.fileno())],
            pass_fds=[theirs.fileno()], env=environment,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=words,
        )  # fmt: skip
        theirs.close()
        member = _Member(process, mine, -1, words=words)
        _send(member, ("options", self._options))
        return member

    def _give(self, member: _Member, queue: list[str]) -> None:
        if not queue:
            member.name = None
            return
        if member.shard < 0 or member.size >= self._options.shard_mib << 20:
            member.shard, member.size = self._journal.new_shard(), 0
            _send(member, ("shard", str(self._journal.shard_path(member.shard)), member.shard))
        member.name, member.heard = queue.pop(), time.monotonic()
        _send(member, ("file", str(self._listing.path(member.name))))

    def _heard(self) -> list[_Member]:
        """Waits for news; returns the members whose file is settled."""
        busy = [member for member in self._members if member.name]
        ready = wait([member.connection for member in busy], timeout=1.0)
        settled = []
        for member in busy:
            if member.connection in ready:
                if self._take(member):
                    settled.append(member)
            elif time.monotonic() - member.heard > self._patience:
                self._replace(member, f"no frame decoded for {self._patience:.0f} s")
                settled.append(member)
        return settled

    def _take(self, member: _Member) -> bool:
        assert member.name
        try:
            message = member.connection.recv()
        except (EOFError, ConnectionResetError):
            code, said = member.process.wait(), member.last_words()
            if not member.ready:
                raise UserError(f"a packing process cannot start (exit status {code}){said}") from None
            self._replace(member, f"the decoder crashed (exit status {code}){said}")
            return True
        member.heard = time.monotonic()
        member.ready = True
        if message[0] == "beat":
            return False
        kind, value, member.size = message
        if kind == "fatal":
            raise UserError(f"{value}: mend that and repeat the command, it goes on where it stopped")
        self._journal.add(member.name, Rejected(value) if kind == "rejected" else value)
        return True

    def _replace(self, member: _Member, reason: str) -> None:
        """A new process for a dead or hanging one; its file is rejected, its shard cut back and left as it is."""
        assert member.name
        self._journal.add(member.name, Rejected(reason))
        member.process.kill()
        member.process.wait()
        member.connection.close()
        os.truncate(self._journal.shard_path(member.shard), member.size)
        fresh = self._hire()
        member.process, member.connection, member.shard = fresh.process, fresh.connection, -1
        member.ready, member.words = False, fresh.words

    def _dismiss(self) -> None:
        for member in self._members:
            try:
                if member.name is None:
                    member.connection.send(None)
                else:
                    member.process.kill()  # after an error: what it wrote is not recorded and is cut off on resume
            except OSError:
                member.process.kill()
        for member in self._members:
            member.process.wait()
            member.connection.close()


def _send(member: _Member, message: object) -> None:
    """To a process that may have died: that shows when its answer is awaited."""
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        member.connection.send(message)
