"""A store behind an address, by the node's cache.

Its small files lie whole in a folder of the cache, its shards as cached files, beside links of the shards' names. So
for all other code it is a local folder. :class:`RemoteReader` fetches the blocks that a read needs. The checksum of a
packet decides about its bytes, as on a disk: bytes of a wrong checksum are fetched again and never kept.

Folders and files of the cache are named by address, size and tag (:class:`.remote.Located`). What changes on the server
is another file in the cache.
"""

import hashlib
import os
import shutil
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt

from vito_fast.data.store.cache import BLOCK, Blocks, Cache, CachedFile
from vito_fast.data.store.description import damaged
from vito_fast.data.store.index import Index, Read, Reader, exact_array
from vito_fast.data.store.remote import AT_ONCE, Located, Remote, RemoteError
from vito_fast.errors import UserError
from vito_fast.files import atomic_write, file_lock
from vito_fast.native import sampler as _sampler

FILES = ("index.bin", "store.json", "labels.parquet", "quarantine.jsonl")
"""Fetched when a store is opened, the last one first: with the index, the folder is complete."""
OPTIONAL = ("labels.parquet", "quarantine.jsonl")
CACHE_GIB = 50.0
MAX_GAP = 2
"""Blocks that are fetched needlessly rather than by another request."""
MAX_RANGE = 32
"""Blocks of one request."""
LOOK = 10.0
"""Seconds between looks at whether all of a store is cached."""
UNSURE = ("checksum", "truncated")
"""Values of ``Read.code`` that say that the cache lost a block, or that wrong bytes came."""
Sample = tuple[int, Blocks]
"""A shard, and the blocks of it that a sample needs."""


def cache_folder(folder: str | os.PathLike[str] = "") -> Path:
    """``folder``, else ``$VITO_FAST_CACHE``, else ``vito-fast`` in the user's cache folder."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(folder or os.environ.get("VITO_FAST_CACHE") or home / "vito-fast").absolute()


def cache_limit(gib: float = 0.0) -> int:
    """Bytes of a cache of ``gib`` GiB. 0: of ``$VITO_FAST_CACHE_GIB``, else 50. UserError if they are no number."""
    value: float | str = gib or os.environ.get("VITO_FAST_CACHE_GIB") or CACHE_GIB
    try:
        limit = int(float(value) * 2**30)
    except (ValueError, OverflowError):
        limit = 0
    if limit <= 0:
        raise UserError(f"the cache's size is {value} GiB, must be a number above 0")
    return limit


class RemoteStore:
    """The files of a store behind an address. Thread-safe.

    Args:
        address: Of the store's folder, for fsspec.
        cache, gib: As of :class:`.store.Store`.

    Attributes:
        name: The address without a password, for messages.
        folder: Where the store's small files lie.
        limit: Bytes of the cache.
        shards: Folder of links to the shards' cached files, after :meth:`bind`.

    Raises:
        UserError: The store cannot be read or is none, the cache cannot be used, or a package is missing.
    """

    def __init__(self, address: str, cache: str | os.PathLike[str] = "", gib: float = 0.0):
        self._remote = Remote(address)
        self.name = self._remote.name
        self._states: list[Located] = []
        self._names: list[str] = []
        self._files: list[CachedFile] = []
        self._mutex = threading.Lock()
        self._claims: dict[tuple[int, int], threading.Event] = {}
        self._complete, self._looked = False, -LOOK
        self._in_use = ExitStack()
        folder = cache_folder(cache)
        try:
            self.limit = cache_limit(gib)
            self._cache = Cache(folder, self.limit)
            self.folder = self.shards = self._fetch_files()
        except OSError as error:
            raise UserError(
                f"cannot use the cache {folder}: {error.strerror or error}; data.cache or VITO_FAST_CACHE names "
                "another, data.cache_gib or VITO_FAST_CACHE_GIB its size"
            ) from None

    def _fetch_files(self) -> Path:
        """The folder of the store's small files, which are fetched if they are not there. Locked against eviction."""
        for _ in range(3):
            found = self._look()
            parts = [self._remote.address, *(f"{name} {state}" for name, state in found.items())]
            folder = self._cache.folder / "stores" / _key(parts)
            self._in_use.enter_context(file_lock(folder.with_suffix(".lock"), None, shared=True))
            with file_lock(folder.with_suffix(".fetch"), None):
                folder.mkdir(exist_ok=True)
                os.utime(folder)
                if (folder / "index.bin").exists():
                    return folder
                for partial in folder.glob(".*.partial"):  # of a process that was killed
                    partial.unlink()
                self._cache.recount()
                self._cache.reserve_bytes(sum(state.size for state in found.values() if state))
                for name, state in reversed(found.items()):
                    if state:
                        self._fetch_file(folder / name, state)
                self._cache.recount()
                self._remote.forget()
                if found == self._look():
                    return folder
                shutil.rmtree(folder)
        raise UserError(f"{self.name} changes while it is read: try again when it is written")

    def _look(self) -> dict[str, Located | None]:
        states = self._remote.stat(FILES)
        return {name: self._required(name, states[name]) for name in FILES}

    def _required(self, name: str, state: Located | RemoteError) -> Located | None:
        if isinstance(state, Located):
            return state
        if name in OPTIONAL and state.code != "io":
            return None
        if state.code == "missing":
            raise UserError(f"{self.name} is no store, it has no {name}: run `vito-fast pack SRC {self.name}`")
        hint = "; check the credentials and the address" if state.code == "denied" else ""
        raise UserError(f"cannot read {state}{hint}")

    def _fetch_file(self, path: Path, state: Located) -> None:
        try:
            with atomic_write(path) as partial:
                self._remote.download(path.name, state, partial)
                if path.name == "index.bin" and not _whole(partial):  # perhaps on the way
                    self._remote.download(path.name, state, partial)
        except RemoteError as error:
            raise UserError(f"cannot read {error}") from None

    def bind(self, index: Index, *, check: bool) -> None:
        """Look up the shards and link their cached files.

        Args:
            index: The store's.
            check: Whether to raise UserError if a shard is missing or not of its size.
        """
        self._names = [name for name, _ in index.shards]
        states, keys = self._remote.stat(self._names), []
        for name, size in index.shards:
            state = states[name]
            if isinstance(state, RemoteError) and state.code != "missing":
                raise UserError(f"cannot read {state}")
            if isinstance(state, RemoteError):
                if check:
                    raise damaged(f"{self.name}/{name}", "it is missing")
                state = Located(size, "")
            if check and state.size != size:
                raise damaged(f"{self.name}/{name}", f"it has {state.size} bytes, not {size}")
            self._states.append(state)
            keys.append((_key([self._remote.address, name, str(state)]), state.size))
        self.shards = self.folder / _key([key for key, _ in keys])
        with self._cache.lock():  # against the removal of files without a link
            for name, (key, size) in zip(self._names, keys, strict=True):
                self._files.append(self._cache.file(key, size))
                link = self.shards / name
                if not link.is_symlink():
                    link.parent.mkdir(parents=True, exist_ok=True)
                    link.symlink_to(self._files[-1].path)
        self._remote.forget()

    @property
    def complete(self) -> bool:
        """Whether all of the store was cached at the last look. Each look notes a use of all blocks."""
        if time.monotonic() - self._looked > LOOK:
            self._complete = all(file.complete for file in self._files)
            for file in self._files if self._complete else ():
                file.use(np.arange(len(file.table)))
            self._looked = time.monotonic()
        return self._complete

    def room(self, share: float, packets: int, most: int) -> int:
        """How many times, up to ``most``, ``packets`` packets in blocks of their own fit in a share of the cache."""
        return min(most, int(share * self.limit) // (packets * BLOCK))

    def blocks(self, shard: int, offsets: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64]) -> Blocks:
        """The blocks of a shard that hold packets. Without those beyond its end."""
        firsts, lasts = offsets // BLOCK, (offsets + sizes - 1) // BLOCK
        blocks = {
            each for ends in zip(firsts.tolist(), lasts.tolist(), strict=True) for each in range(ends[0], ends[1] + 1)
        }
        count = len(self._files[shard].table)
        return np.array(sorted(block for block in blocks if block < count), np.int64)

    def load(self, samples: Iterable[Sample]) -> list[Exception | None]:
        """Bring the blocks of samples into the cache. Blocks that another thread fetches are waited for.

        Returns:
            For each sample the error, if blocks of it cannot be fetched.
        """
        samples, errors, mine = list(samples), dict[int, Exception](), threading.Event()
        for _ in range(2):  # again for the blocks that others failed to fetch
            own: dict[int, list[int]] = {}
            others: set[threading.Event] = set()
            with self._mutex:
                for shard, blocks in samples:
                    for block in self._files[shard].use(blocks).tolist() if shard not in errors else ():
                        claim = self._claims.setdefault((shard, block), mine)
                        if claim is not mine:
                            others.add(claim)
                        else:
                            own.setdefault(shard, []).append(block)
            if not own and not others:
                break
            try:
                errors |= self._fetch({shard: np.unique(blocks) for shard, blocks in own.items()})
            finally:
                with self._mutex:
                    for shard, claimed in own.items():
                        for block in claimed:
                            self._claims.pop((shard, block), None)
                mine.set()
                mine = threading.Event()
            for event in others:
                event.wait()
        if not errors:
            return [None] * len(samples)
        return [errors.get(shard) if len(self._files[shard].use(blocks)) else None for shard, blocks in samples]

    def read(self, shard: int, start: int, end: int) -> bytes:
        """Bytes of a shard, not by the cache. Raises UserError if they cannot be fetched."""
        (data,) = self._remote.ranges([(self._names[shard], start, end)])
        if isinstance(data, RemoteError):
            raise UserError(f"cannot read {data}")
        return data

    def download(self, shard: int, path: Path) -> None:
        """Write a whole shard to ``path``, not by the cache. Raises UserError if it cannot be fetched."""
        try:
            self._remote.download(self._names[shard], self._states[shard], path)
        except RemoteError as error:
            raise UserError(f"cannot read {error}") from None

    @contextmanager
    def loaded(self, sample: Sample) -> Iterator[Exception | None]:
        """Fetch the blocks of a sample again. None is evicted until the end of the context. Yields the error."""
        shard, blocks = sample
        with self._cache.lock():
            self._cache.drop(self._files[shard], blocks)
            yield self._fetch({shard: blocks}, alone=True).get(shard)

    def drop(self, samples: Iterable[Sample]) -> None:
        """Forget the blocks of samples, whose bytes are wrong."""
        for shard, blocks in samples:
            self._complete = False
            self._cache.drop(self._files[shard], blocks)

    def _fetch(self, wanted: dict[int, Blocks], *, alone: bool = False) -> dict[int, Exception]:
        """Fetch blocks, in a bounded number of requests at a time. Returns errors by shard.

        A fault of the server ends it, so that nobody waits for it once for each request.

        Args:
            alone: Whether to make room for all of them before the first comes, and to fetch no others.
        """
        errors: dict[int, Exception] = {}
        most = max(1, min(MAX_RANGE, self.limit // (4 * BLOCK)))  # a small cache holds few at a time
        count, gap = max(1, min(AT_ONCE, self.limit // (4 * BLOCK * most))), MAX_GAP
        if alone:
            count, gap = 1 << 30, 0
        ranges = [
            (shard, *ends) for shard, blocks in wanted.items() if len(blocks) for ends in _joined(blocks, most, gap)
        ]
        for at in range(0, len(ranges), count):
            chunk = ranges[at : at + count]
            reserved = [(self._files[shard], np.arange(first, end)) for shard, first, end in chunk]
            try:
                self._cache.reserve(reserved)
            except OSError as error:
                return dict.fromkeys(wanted, error) | errors
            asked = [
                (self._names[shard], first * BLOCK, min(end * BLOCK, self._files[shard].size))
                for shard, first, end in chunk
            ]
            given_up = None
            for (shard, first, _), (file, blocks), data in zip(
                chunk, reserved, self._remote.ranges(asked), strict=True
            ):
                try:
                    if isinstance(data, RemoteError):
                        raise data
                    self._cache.write(file, first, data)
                except (RemoteError, OSError) as error:
                    errors[shard] = error
                    self._cache.drop(file, file.use(blocks))
                    if not isinstance(error, RemoteError) or error.code != "missing":
                        given_up = error
            if given_up:
                return dict.fromkeys(wanted, given_up) | errors
        return errors


class RemoteReader(Reader):
    """Reads packets as :class:`.index.Reader` does, and fetches the blocks that are not cached.

    A file that the server does not have fails as ``missing``, any other fault of server, network or cache as ``io``.
    """

    def __init__(self, index: Index, store: RemoteStore, *, threads: int = 4):
        super().__init__(index, store.shards, threads=threads)
        self._index, self._store = index.native, store

    def read(
        self, clips: npt.ArrayLike, frames: npt.ArrayLike, *, miniclip: bool = False, single_stream: bool = True
    ) -> list[Read]:
        clips, frames = exact_array(clips, "int64", "clips"), exact_array(frames, "int64", "frames")
        single_stream = single_stream or miniclip
        results: dict[int, Read] = {}

        def read(rows: list[int]) -> list[int]:
            """Read cached packets. Returns the rows whose bytes are not those that were packed."""
            if rows:
                found = Reader.read(self, clips[rows], frames[rows], miniclip=miniclip, single_stream=single_stream)
                results.update(zip(rows, found, strict=True))
            return [row for row in rows if results[row].code in UNSURE]

        rows = list(range(len(clips)))
        if self._store.complete:
            rows = read(rows)
        samples = {row: self._sample(int(clips[row]), frames[row], single_stream) for row in rows}
        for _ in range(2 if rows else 0):
            errors = dict(zip(rows, self._store.load(samples[row] for row in rows), strict=True))
            results |= {row: _failed(int(clips[row]), error) for row, error in errors.items() if error}
            rows = read([row for row, error in errors.items() if not error])
            self._store.drop(samples[row] for row in rows)
        for row in rows:  # evicted between load and read, or damaged on the server
            with self._store.loaded(samples[row]) as error:
                wrong = read([row]) if error is None else []
            if error:
                results[row] = _failed(int(clips[row]), error)
            self._store.drop(samples[row] for row in wrong)
        return [self._named(results[row]) for row in range(len(clips))]

    def prefetch(self, clips: npt.NDArray[np.int64], frames: npt.NDArray[np.int32], *, single_stream: bool) -> None:
        """Fetch the blocks that a later read needs. Errors are left to that read."""
        wanted = list(zip(clips.tolist(), frames.astype(np.int64), strict=True))
        for at in range(0, len(wanted), AT_ONCE):  # whoever waits for a block waits for one part
            if not self._store.complete:
                self._store.load(self._sample(*each, single_stream) for each in wanted[at : at + AT_ONCE])

    def _sample(self, clip: int, frames: npt.NDArray[np.int64], single_stream: bool) -> Sample:
        try:
            shard = self._index.clip(clip)["shard"]
            numbers = _sampler.plan_packets(self._index, clip, frames, single_stream)[0]
            offsets, sizes = self._index.packets(clip)[:2]
        except (IndexError, ValueError):  # the reader reports it
            return 0, np.empty(0, np.int64)
        return shard, self._store.blocks(shard, offsets[numbers], sizes[numbers])

    def _named(self, read: Read) -> Read:
        """With the store's address in place of its folder."""
        if not read.error:
            return read
        for folder in (self._store.shards, self._store.folder):
            read = read._replace(error=read.error.replace(str(folder), self._store.name))
        return read


def _failed(clip: int, error: Exception) -> Read:
    none = np.empty(0, np.int64)
    code = "missing" if isinstance(error, RemoteError) and error.code == "missing" else "io"
    message = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else error
    return Read(code, f"clip {clip}: {message}", np.empty(0, np.uint8), none, none, np.empty(0, np.int32), none)


def _joined(blocks: Blocks, most: int, gap: int) -> Iterator[tuple[int, int]]:
    """Ranges of up to ``most`` blocks, first and last + 1, that cover ``blocks``, over gaps of up to ``gap``."""
    first = last = int(blocks[0])
    for block in blocks[1:].tolist():
        if block - last > gap + 1 or block - first >= most:
            yield first, last + 1
            first = block
        last = block
    yield first, last + 1


def _whole(path: Path) -> bool:
    """Whether an index is free of damage, in each clip."""
    try:
        index = _sampler.Index(os.fsencode(path))
        for clip in range(index.num_clips):
            index.packets(clip)
    except ValueError:
        return False
    return True


def _key(parts: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogateescape")).hexdigest()[:32]
