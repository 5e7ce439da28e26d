"""Files behind an address such as ``s3://bucket/store``, by fsspec: their state, byte ranges of them, and uploads.

A request that fails quickly is tried again a few times. Waiting longer is left to the caller.
"""

import asyncio
import hashlib
import os
import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeGuard

from vito_fast.errors import UserError

TRIES = 4
"""Of a request that fails within a few seconds. The pauses double from 0.1 s."""
QUICK, TIMEOUT = 5.0, 30.0
"""Seconds after which a failed request is not tried again here, and after which any request fails."""
UPLOAD_TIMEOUT = 3600.0
"""Seconds for one file."""
AT_ONCE = 64
"""Requests of one call at a time."""
PIECE = 8 << 20
"""Bytes of a request when a whole file is fetched."""
OPTIONS: dict[str, dict[str, Any]] = {
    # The retries of botocore would multiply with ours, and its 10 connections are few.
    "file": {"auto_mkdir": True},
    "s3": {"config_kwargs": {"max_pool_connections": AT_ONCE, "retries": {"max_attempts": 0}}},
}
"""Of fsspec's file systems."""
TAGS = ("ETag", "etag", "md5Hash", "blob_id", "generation", "Last-Modified", "LastModified", "last_modified", "mtime",
        "updated", "created")  # fmt: skip
"""Fields of fsspec's ``info`` that change with a file's content, the best first."""


class RemoteError(Exception):
    """A request that failed. The message is one line."""

    def __init__(self, message: str, code: Literal["missing", "denied", "io"] = "io"):
        super().__init__(message)
        self.code = code


class Located(NamedTuple):
    """A file on the server."""

    size: int
    tag: str
    """Another one if the content changes."""


def is_remote(address: str | os.PathLike[str]) -> TypeGuard[str]:
    """Whether ``address`` is one for fsspec, as ``s3://bucket/store``."""
    return isinstance(address, str) and re.match(r"[a-z][a-z0-9+.-]*://", address) is not None


class Remote:
    """A folder behind an address. Thread-safe.

    Args:
        address: For fsspec.

    Attributes:
        name: The address without a password, for messages.

    Raises:
        UserError: A package is missing, or the address makes no sense.
    """

    def __init__(self, address: str):
        self.address = address.rstrip("/")
        self.name = re.sub(r"//[^/@]*@", "//", self.address)
        self._listed: Mapping[str, Located] | None = None
        scheme = address.split("://")[0]
        try:
            from fsspec.core import url_to_fs
            from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper

            options = {"use_listings_cache": False, **OPTIONS.get(scheme, {})}
            fs, self._root = url_to_fs(self.address, **options)
            self._fs = fs if fs.async_impl else AsyncFileSystemWrapper(fs)
        except ImportError as error:
            raise UserError(f"{self.name} needs a package: pip install 'vito-fast[remote]' ({error})") from None
        except ValueError as error:
            raise UserError(f"{self.name} is no address: {_line(error)}") from None

    def stat(self, names: Sequence[str]) -> dict[str, Located | RemoteError]:
        """Size and tag of files. The first call lists the folder, where the server can.

        Args:
            names: Relative to the folder.
        """
        if self._listed is None:
            (listing,) = self._all([lambda: self._fs._ls(self._root, detail=True)])
            entries = [] if isinstance(listing, RemoteError) else listing
            located = {str(entry["name"]).rpartition("/")[2]: _located(entry) for entry in entries}
            self._listed = {name: found for name, found in located.items() if found}
        rest = [name for name in names if name not in self._listed]
        infos = self._all([partial(self._fs._info, self._path(name)) for name in rest], rest)
        found: dict[str, Located | RemoteError] = {name: self._listed[name] for name in names if name in self._listed}
        for name, info in zip(rest, infos, strict=True):
            if isinstance(info, RemoteError):
                found[name] = info
            elif info.get("type") == "directory":
                found[name] = RemoteError(f"{self.name}/{name} is a folder", "missing")
            else:
                found[name] = _located(info) or RemoteError(
                    f"{self.name}/{name}: the server states no size, or neither ETag nor time of change", "denied"
                )
        return found

    def forget(self) -> None:
        """List the folder again for the next :meth:`stat`."""
        self._listed = None

    def ranges(self, wanted: Sequence[tuple[str, int, int]]) -> list[bytes | RemoteError]:
        """Fetch bytes ``[start, end)`` of files, in parallel. A response of another length is an error."""

        def fetch(name: str, start: int, end: int) -> Callable[[], Awaitable[bytes]]:
            async def one() -> bytes:
                data = await self._fs._cat_file(self._path(name), start=start, end=end)
                if len(data) != end - start:
                    raise OSError(f"{len(data)} bytes came, not {end - start}")
                return bytes(data)

            return one

        return self._all([fetch(*each) for each in wanted], [name for name, _, _ in wanted])

    def download(self, name: str, located: Located, path: Path) -> None:
        """Write a whole file to ``path``. One whose ETag is the MD5 of other bytes is fetched once more.

        Raises:
            RemoteError: It cannot be fetched.
            OSError: ``path`` cannot be written.
        """
        for _ in range(2):
            digest = hashlib.md5(usedforsecurity=False)
            with open(path, "wb") as file:
                for first in range(0, located.size, PIECE * 8):
                    end = min(located.size, first + PIECE * 8)
                    pieces = [(name, at, min(end, at + PIECE)) for at in range(first, end, PIECE)]
                    for data in self.ranges(pieces):
                        if isinstance(data, RemoteError):
                            raise data
                        digest.update(data)
                        file.write(data)
            if not re.fullmatch("[0-9a-f]{32}", located.tag) or digest.hexdigest() == located.tag:
                return

    def upload(self, path: Path, name: str) -> None:
        """Write a file to the server. Raises RemoteError."""
        (result,) = self._all([lambda: self._fs._put_file(str(path), self._path(name))], [name], timeout=UPLOAD_TIMEOUT)
        if isinstance(result, RemoteError):
            raise result

    def check_writable(self) -> None:
        """Write a small file and remove it. Raises RemoteError."""
        path = self._path(".writable")
        for call in (lambda: self._fs._pipe_file(path, b"vito-fast"), lambda: self._fs._rm_file(path)):
            (result,) = self._all([call])
            if isinstance(result, RemoteError):
                raise result

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _all(
        self, calls: Sequence[Callable[[], Awaitable[Any]]], names: Sequence[str] = (), timeout: float = TIMEOUT
    ) -> list[Any]:
        """The result of each call, or a RemoteError."""
        from fsspec.asyn import sync

        async def run() -> list[Any]:
            limit = asyncio.Semaphore(AT_ONCE)
            return await asyncio.gather(*(_attempt(call, limit, timeout) for call in calls), return_exceptions=True)

        results = sync(self._fs.loop, run)
        for number, result in enumerate(results):
            if isinstance(result, BaseException) and not isinstance(result, RemoteError):
                raise result
            if isinstance(result, RemoteError):
                where = f"{self.name}/{names[number]}" if names else self.name
                results[number] = RemoteError(f"{where}: {result}", result.code)
        return results


async def _attempt(call: Callable[[], Awaitable[Any]], limit: asyncio.Semaphore, timeout: float) -> Any:
    """The result of a call. Raises RemoteError if it fails each time."""
    for attempt in range(TRIES):
        start = time.monotonic()
        try:
            async with limit:
                return await asyncio.wait_for(call(), timeout)
        except Exception as error:
            failed = _failure(error)
            slow = time.monotonic() - start > max(QUICK, timeout - TIMEOUT)
            if failed.code != "io" or slow or attempt == TRIES - 1:
                raise failed from None
        await asyncio.sleep(0.1 * 2**attempt)
    raise AssertionError


def _failure(error: Exception) -> RemoteError:
    """What an error of a file system means."""
    cause = error.__cause__
    status = getattr(error, "status", None) or getattr(cause, "status", None)
    if isinstance(error, TimeoutError | asyncio.TimeoutError) and not str(error):
        return RemoteError("no answer in time")
    if isinstance(error, FileNotFoundError) and (cause is None or hasattr(cause, "response") or status in (404, 410)):
        return RemoteError("not found", "missing")
    reason = _line(cause if cause and status else error)
    credentials = "Credentials" in type(error).__name__ or "Token" in type(error).__name__
    invalid = (
        isinstance(error, ValueError | TypeError | NotImplementedError)
        or type(error).__name__ == "ParamValidationError"
    )
    if isinstance(error, PermissionError) or status in (401, 403) or credentials or invalid:
        return RemoteError(reason, "denied")
    return RemoteError(reason)


def _located(info: Mapping[str, Any]) -> Located | None:
    tag = next((str(info[name]) for name in TAGS if info.get(name)), "")
    size = info.get("size")
    return Located(int(size), tag.strip('"')) if tag and size is not None and info.get("type") == "file" else None


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
