"""A packing process: ``python -m vito_fast.data.pack.worker FD`` serves one :mod:`.pack` over the pipe FD.

A process of its own, not a fork, so that a decoder that crashes or hangs on a bad file takes nothing else with it, and
so that it holds none of its parent's memory. It dies with its parent.
"""

import ctypes
import errno
import os
import signal
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

from vito_fast.data.pack.encode import Cutter, EncoderMissing, PackOptions
from vito_fast.data.pack.remux import Copier
from vito_fast.data.store.media import BadVideo


class ShardWriter:
    """Appends packets to one shard file; what a failed source wrote is taken back."""

    def __init__(self, path: Path, number: int):
        self.number, self.path = number, path
        self._file = open(path, "ab", buffering=1 << 20)  # noqa: SIM115 - open until close
        self.size = self._file.tell()

    def append(self, payload: bytes) -> int:
        self._file.write(payload)
        offset, self.size = self.size, self.size + len(payload)
        return offset

    def flush(self) -> None:
        self._file.flush()

    def rewind(self, size: int) -> None:
        self._file.flush()
        os.ftruncate(self._file.fileno(), size)
        self.size = size

    def close(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle


def _pack_one(path: Path, shard: ShardWriter, options: PackOptions, heartbeat) -> tuple[str, object]:
    start = shard.size
    try:
        packer = Copier(options, shard) if options.format == "copy" else Cutter(options, shard)
        result = packer.run(path, heartbeat)
        shard.flush()
        return "done", result
    except BadVideo as error:
        shard.rewind(start)
        return "rejected", str(error)
    except OSError as error:  # of the shard: those of the source are BadVideo
        space = error.errno in (errno.ENOSPC, errno.EDQUOT)
        return "fatal", f"disk full: {shard.path.parent}" if space else f"cannot write {shard.path}: {error.strerror}"
    except EncoderMissing as error:
        return "fatal", str(error)
    except Exception as error:  # one strange file must not end the run
        shard.rewind(start)
        return "rejected", f"unexpected {type(error).__name__}: {error}".splitlines()[0]


def serve(connection: Connection, parent: int) -> None:
    """Messages in: ("options", PackOptions), ("shard", path, number), ("file", path), None to end.

    Messages out: ("beat",) at the start and every second of work, then ("done", PackedFile, shard size), ("rejected",
    reason, size) or ("fatal", line, size).
    """
    options, shard = PackOptions(), None
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
            options = message[1]
        elif message[0] == "shard":
            if shard is not None:
                shard.close()
            shard = ShardWriter(Path(message[1]), message[2])
        else:
            assert shard is not None
            kind, value = _pack_one(Path(message[1]), shard, options, heartbeat)
            connection.send((kind, value, shard.size))
    if shard is not None:
        shard.close()


def main() -> None:
    parent = os.getppid()
    _die_with_parent()
    try:
        serve(Connection(int(sys.argv[1])), parent)
    except (EOFError, BrokenPipeError):
        sys.exit(1)  # the parent is gone; what it has not recorded, the next run takes back


if __name__ == "__main__":
    main()
