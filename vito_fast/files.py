"""Atomic writes, advisory locks and checks of output paths.

A file written by :func:`atomic_write` holds either its old or its new content at any moment, also after ``kill -9`` or
a power cut.
"""

import errno
import fcntl
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from vito_fast.errors import UserError


@contextmanager
def name_errors(path: Path) -> Iterator[None]:
    """Add ``path`` to an OSError that names no file, such as that of a full disk. Those of safetensors become one."""
    try:
        yield
    except OSError as error:
        if error.errno and not error.filename:
            error.filename = str(path)
        raise
    except Exception as error:
        if type(error).__name__ != "SafetensorError":  # by name: a command without tensors need not import it
            raise
        raise OSError(errno.EIO, str(error), str(path)) from None


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Write a file completely or not at all.

    The content goes to the temporary path that this yields. It replaces ``path`` at the end and is synced to disk.
    Concurrent writers do not mix: the last one wins. The mode stays that of the old file, or the default of a new one,
    even if the writer replaces the temporary file.

    Args:
        path: File to write. Its folder must exist.

    Yields:
        A temporary path in the same folder.

    Raises:
        OSError: The file cannot be written. ``path`` is then unchanged, as after any other exception.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with name_errors(path):
            partial.touch()
            mode = stat.S_IMODE((path if path.exists() else partial).stat().st_mode)
            yield partial
            with open(partial, "rb+") as file:
                os.fchmod(file.fileno(), mode)
                os.fsync(file.fileno())
            os.replace(partial, path)
            sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Sync a folder's entries to disk: without this, a rename may be lost in a power cut."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def file_lock(path: Path, timeout: float | None = 0.0, *, shared: bool = False) -> Iterator[bool]:
    """Hold a lock on a file. The system releases it however the process ends.

    Args:
        path: Lock file. Created if missing.
        timeout: Seconds to wait for another holder. None: as long as it takes.
        shared: Whether others may hold it too, if they share it.

    Yields:
        Whether the lock is held. True on a file system without locks.
    """
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    with open(path, "ab") as file:
        if timeout is None:
            yield _try_lock(file, kind)
            return
        deadline = time.monotonic() + timeout
        while not (held := _try_lock(file, kind | fcntl.LOCK_NB)) and time.monotonic() < deadline:
            time.sleep(0.1)
        yield held


def _try_lock(file: IO[bytes], kind: int) -> bool:
    try:
        fcntl.flock(file, kind)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP):
            raise
    return True


def check_writable(path: Path) -> None:
    """Raise UserError if a file cannot be written at ``path``. Call this before long work, not after it."""
    check_outside_stores(path)
    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a folder")
    if not path.exists() and not path.parent.is_dir():
        raise UserError(f"cannot write {path}: there is no folder {path.parent}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"cannot write {path}: no permission")


def check_outside_stores(path: Path) -> None:
    """Raise UserError if ``path`` lies in a store, where it could replace one of the store's files. PNGs may."""
    folder = path.resolve().parent
    if (folder / "store.json").exists() and path.suffix.lower() != ".png":
        raise UserError(f"cannot write {path}: {folder} is a store, choose another folder")
