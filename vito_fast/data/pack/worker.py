"""A packing process: ``python -m vito_fast.data.pack.worker FD`` packs the files that it receives over the pipe FD.

It is a process of its own, so that a decoder that crashes or hangs on a bad file ends nothing else. It is no fork, so
that it holds none of its parent's memory. It ends with its parent.
"""

import ctypes
import errno
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from vito_fast.data.limits import Limits, limit_memory
from vito_fast.data.pack.clips import ShardWriter, Span
from vito_fast.data.pack.encode import EncoderMissing, Transcoder
from vito_fast.data.pack.remux import Remuxer
from vito_fast.data.store.description import PackOptions
from vito_fast.data.store.media import BadVideo


@dataclass(frozen=True)
class FileJob:
    """One file to pack; all of it, or the spans of a clip list."""

    path: str
    spans: tuple[Span, ...] | None = None


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
