"""Files that are the old one or the whole new one at any moment: when the process is killed, when the power goes; and
whether they can be written at all, and by whom.
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
def named(path: Path) -> Iterator[None]:
    """An OSError inside that names no file, as that of a full disk, names ``path``."""
    try:
        yield
    except OSError as error:
        if error.errno and not error.filename:
            error.filename = str(path)
        raise


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """What is written inside to the path that this yields becomes ``path`` at the end, on the disk; after an exception
    ``path`` is as it was. Processes that write one file at the same time do not meet: what the last one wrote stays.
    Its mode is the old file's, or a new file's here, also if what writes inside puts one of its own into the place.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with named(path):
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
    """Brings a folder's own entries (a rename) to the disk."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def locked(path: Path, patience: float = 0.0) -> Iterator[bool]:
    """Whether ``path``, an empty file, is this process's alone inside: False if another still has it after ``patience``
    seconds. The system lets go of it however the process ends. True where the file system knows no locks.
    """
    with open(path, "ab") as file:
        until = time.monotonic() + patience
        while not (mine := _lock(file)) and time.monotonic() < until:
            time.sleep(0.1)
        yield mine


def _lock(file: IO[bytes]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP):
            raise
    return True


def check_writable(path: Path) -> None:
    """UserError if a file cannot be written there: to be known before long work, not after it."""
    check_outside_stores(path)
    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a folder")
    if not path.exists() and not path.parent.is_dir():
        raise UserError(f"cannot write {path}: there is no folder {path.parent}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"cannot write {path}: no permission")


def check_outside_stores(path: Path) -> None:
    """UserError if the file would lie in a store, where it might take the place of one of the store's own. Pictures
    may."""
    folder = path.resolve().parent
    if (folder / "store.json").exists() and path.suffix.lower() != ".png":
        raise UserError(f"cannot write {path}: {folder} is a store, choose another folder")
