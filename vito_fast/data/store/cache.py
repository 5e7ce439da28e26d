"""A bounded cache of blocks of files, on a local disk, shared by all processes of a machine.

A cached file is ``files/KEY.bin``, sparse and of the whole file's size. Beside it ``KEY.map`` has a uint32 for each
block: 0 = absent, else the second of its last use. The top bit is set until the block's bytes are written. So a block
of a process that was killed counts towards the bound and is never read.

Maps and blocks change under ``lock`` alone, so the bound holds at any moment. The least recently used blocks are
punched out of their files. Readers check content by themselves: a block may go between the look and the read.
"""

import ctypes
import errno
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from vito_fast.files import file_lock, name_errors

Blocks = npt.NDArray[np.int64]
"""Numbers of blocks, ascending."""

BLOCK = 128 << 10
"""Bytes of a block. Small ones waste little of a cache that is smaller than its stores."""
FREED = 0.1
"""Share of the cache that is free after blocks were evicted. A larger one evicts more rarely."""
TICK = 10
"""Seconds after which another use of a block is noted."""

_WRITING = np.uint32(1 << 31)
_CLOCK_START = 1577836800
"""2020-01-01: uses are counted from here, so that 31 bits last until 2088."""
_PUNCH_HOLE, _KEEP_SIZE = 2, 1
_libc = ctypes.CDLL(None, use_errno=True)


class CachedFile:
    """One file of the cache. Made by :meth:`Cache.file`."""

    def __init__(self, path: Path, size: int, lock: Callable[[], AbstractContextManager[None]]):
        self.path, self.size, self._lock = path, size, lock
        self.table = _open_map(path)

    def use(self, blocks: Blocks) -> Blocks:
        """Note a use of blocks. Returns those whose bytes are not there."""
        state, now = self.table[blocks], _now()
        there = _valid(state)
        if (there & (state + TICK < now)).any():
            with self._lock():
                there = _valid(self.table[blocks])
                self.table[blocks[there]] = now
        return blocks[~there]

    @property
    def complete(self) -> bool:
        """Whether every block is there."""
        return bool(_valid(self.table).all())

    def write(self, first: int, data: bytes) -> None:
        """Write whole blocks from block ``first`` on, under the lock. Raises OSError."""
        with name_errors(self.path), open(self.path, "r+b", buffering=0) as file:
            view, place = memoryview(data), first * BLOCK
            while view:
                count = os.pwrite(file.fileno(), view, place)
                view, place = view[count:], place + count
        self.table[first : first + -(-len(data) // BLOCK)] = _now()


class Cache:
    """A cache folder.

    Args:
        folder: Created if missing. It holds nothing else.
        limit: Bytes that all its files may take on the disk.

    Raises:
        OSError: The folder cannot be written.
    """

    def __init__(self, folder: Path, limit: int):
        self.folder, self.limit = folder, limit
        self._mutex, self._held = threading.RLock(), False
        for name in ("files", "stores"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        with self.lock():
            for path in (folder / "files").glob("*.map"):
                _punch_leaks(path)
            self._used[0] = self._count()

    @cached_property
    def _used(self) -> npt.NDArray[np.int64]:
        """One number for all processes: bytes in use."""
        path = self.folder / "used"
        if not path.exists() or path.stat().st_size != 8:
            path.write_bytes(bytes(8))
        return np.memmap(path, np.int64, "r+")

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep all others from reserving and evicting. Reentrant."""
        with self._mutex:
            if self._held:
                yield
                return
            with file_lock(self.folder / "lock", None):
                self._held = True
                try:
                    yield
                finally:
                    self._held = False

    def file(self, key: str, size: int) -> CachedFile:
        """The file of ``key``, created with no blocks if it is not there."""
        path = self.folder / "files" / f"{key}.bin"
        table, entries = path.with_suffix(".map"), 4 * max(1, -(-size // BLOCK))
        with self.lock():
            if not (path.exists() and table.exists() and table.stat().st_size == entries):
                table.unlink(missing_ok=True)
                with open(path, "wb") as file:
                    file.truncate(size)
                with open(table, "wb") as file:
                    os.posix_fallocate(file.fileno(), 0, entries)  # a full disk must not kill who writes to the map
            return CachedFile(path, size, self.lock)

    def reserve(self, wanted: Sequence[tuple[CachedFile, Blocks]]) -> None:
        """Make room for blocks and mark them as being written. Raises OSError if they are more than the cache holds."""
        with self.lock():
            new = [(file, blocks[file.table[blocks] == 0]) for file, blocks in wanted]
            self._make_room(BLOCK * sum(len(blocks) for _, blocks in new))
            for file, blocks in new:
                self._used[0] += BLOCK * int((file.table[blocks] == 0).sum())
                file.table[blocks] = _WRITING | _now()

    def drop(self, file: CachedFile, blocks: Blocks) -> None:
        """Forget blocks."""
        with self.lock():
            blocks = blocks[file.table[blocks] != 0]
            self._used[0] -= BLOCK * _punch(file.path, file.table, blocks)

    def write(self, file: CachedFile, first: int, data: bytes) -> None:
        """Write reserved blocks, unless they were evicted meanwhile. If the disk is full, others are evicted first.

        Raises:
            OSError: The disk stays full.
        """
        blocks = np.arange(first, first + -(-len(data) // BLOCK))
        with self.lock():
            if not file.table[blocks].all():
                return self.drop(file, blocks)
            try:
                return file.write(first, data)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
            self._evict(2 * len(data) + int(FREED * int(self._used[0])))
            file.write(first, data)
            self._used[0] = self._count()

    def reserve_bytes(self, count: int) -> None:
        """Make room for ``count`` bytes of other files under ``stores``. Raises OSError as :meth:`reserve`."""
        with self.lock():
            self._make_room(count)
            self._used[0] += count

    def recount(self) -> None:
        """Count the bytes in use again."""
        with self.lock():
            self._used[0] = self._count()

    def _count(self) -> int:
        blocks = sum(int(np.count_nonzero(_read_map(path))) for path in (self.folder / "files").glob("*.map"))
        return blocks * BLOCK + _overhead(self.folder)

    def _make_room(self, need: int) -> None:
        """Evict blocks, under the lock, if ``need`` more bytes do not fit. Raises OSError if they never do."""
        if self._used[0] + need <= self.limit:
            return
        self._used[0] = used = self._count()
        if used + need > self.limit:
            self._evict(used + need - self.limit + int(FREED * self.limit))
        if self._used[0] + need > self.limit:
            raise OSError(
                errno.ENOSPC,
                f"the cache of {self.limit / 2**30:.3g} GiB is too small: {need} bytes more are needed at once",
                str(self.folder),
            )

    def _evict(self, excess: int) -> None:
        """Free ``excess`` bytes, or all there are: the least recently used blocks, and stores that nobody has open."""
        paths = sorted((self.folder / "files").glob("*.map"))
        maps = [_read_map(path) & ~_WRITING for path in paths]
        every = np.concatenate(maps) if maps else np.empty(0, np.uint32)
        present = np.flatnonzero(every)
        if count := min(len(present), -(-excess // BLOCK)):
            oldest = present[np.argpartition(every[present], count - 1)[:count]]
            _remove_stores(self.folder, int(every[oldest].max()))
            ends = np.cumsum([len(each) for each in maps])
            for path, each, end in zip(paths, maps, ends.tolist(), strict=True):
                first = end - len(each)
                blocks = oldest[(oldest >= first) & (oldest < end)] - first
                if len(blocks):
                    _punch(path.with_suffix(".bin"), _open_map(path), np.sort(blocks))
        _remove_unlinked(self.folder)
        self._used[0] = self._count()


def _now() -> np.uint32:
    return np.uint32(max(1, int(time.time()) - _CLOCK_START))


def _valid(state: npt.NDArray[np.uint32]) -> npt.NDArray[np.bool_]:
    return (state != 0) & (state < _WRITING)


def _read_map(path: Path) -> npt.NDArray[np.uint32]:
    return np.fromfile(path, np.uint32)


def _open_map(path: Path) -> npt.NDArray[np.uint32]:
    return np.asarray(np.memmap(path.with_suffix(".map"), np.uint32, "r+"))


def _runs(blocks: Blocks) -> list[tuple[int, int]]:
    """First and last + 1 of each run of neighbors."""
    if not len(blocks):
        return []
    cuts = np.flatnonzero(np.diff(blocks) != 1) + 1
    return [(int(run[0]), int(run[-1]) + 1) for run in np.split(blocks, cuts)]


def _punch(path: Path, table: npt.NDArray[np.uint32], blocks: Blocks) -> int:
    """Free the disk space of blocks. Killed in between, they still count as used. Returns how many were freed."""
    table[blocks] |= _WRITING
    with open(path, "r+b", buffering=0) as file:
        for first, end in _runs(blocks):
            arguments = (ctypes.c_int64(first * BLOCK), ctypes.c_int64((end - first) * BLOCK))
            if _libc.fallocate(file.fileno(), _PUNCH_HOLE | _KEEP_SIZE, *arguments):
                size, count = os.fstat(file.fileno()).st_size, int(np.count_nonzero(table))
                table[table != 0] |= _WRITING  # a file system without holes: free the whole file
                file.truncate(0)
                file.truncate(size)
                table[:] = 0
                return count
    table[blocks] = 0
    return len(blocks)


def _punch_leaks(path: Path) -> None:
    """Free what a power cut left of blocks that the map does not have."""
    table, data = _open_map(path), path.with_suffix(".bin")
    if data.exists() and 512 * data.stat().st_blocks > BLOCK * (int(np.count_nonzero(table)) + 1):
        _punch(data, table, np.flatnonzero(table == 0))


def _overhead(folder: Path) -> int:
    """Bytes on the disk of all files but the blocks."""
    files = [path for path in (folder / "stores").rglob("*") if not path.is_symlink()]
    files += (folder / "files").glob("*.map")
    total = 0
    for path in files:
        try:
            total += 512 * path.stat().st_blocks
        except FileNotFoundError:  # a partial file that got its name
            continue
    return total


def _remove_stores(folder: Path, until: int) -> None:
    """Remove the folders of stores that nobody has open and that were opened last before ``until``."""
    for store in (folder / "stores").iterdir():
        if not store.is_dir() or store.stat().st_mtime - _CLOCK_START > until:
            continue
        with file_lock(store.with_suffix(".lock")) as unused:
            if unused:
                shutil.rmtree(store, ignore_errors=True)


def _remove_unlinked(folder: Path) -> None:
    """Remove files without blocks that no store has a link to."""
    linked = {os.path.basename(os.readlink(path)) for path in (folder / "stores").rglob("*") if path.is_symlink()}
    for path in (folder / "files").glob("*.map"):
        data = path.with_suffix(".bin")
        if data.name not in linked and not _read_map(path).any():
            path.unlink()
            data.unlink(missing_ok=True)
