"""Packing to an address: the store is packed into a folder on this machine and uploaded, its index last."""

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vito_fast.data.store.remote import Located, Remote, RemoteError
from vito_fast.data.store.remote_store import cache_folder
from vito_fast.errors import UserError
from vito_fast.files import atomic_write

log = logging.getLogger("vito_fast.data")

DONE = ".uploaded.json"
"""In the folder: size and tag of each file that was uploaded."""


def is_finished(address: str) -> bool:
    """Whether a store is complete. Raises UserError if the server does not tell."""
    state = Remote(address).stat(["index.bin"])["index.bin"]
    if isinstance(state, RemoteError) and state.code != "missing":
        raise UserError(f"cannot read {state}")
    return isinstance(state, Located)


@contextmanager
def staged(address: str) -> Iterator[Path]:
    """Pack into a folder on this machine, and upload the store that is there at the end.

    The folder lies beside the cache and is always the same for an address. It goes when the upload is complete. After a
    kill, files that were uploaded and have not changed on the server are skipped.

    Yields:
        The folder.

    Raises:
        UserError: The address cannot be written. This is tried before packing.
    """
    remote = Remote(address)
    try:
        remote.check_writable()
    except RemoteError as error:
        raise UserError(f"cannot write {error}") from None
    cache = cache_folder()
    folder = cache.with_name(f"{cache.name}-staging") / hashlib.sha256(remote.address.encode()).hexdigest()[:32]
    yield folder
    try:
        _upload(folder, remote)
    except RemoteError as error:
        raise UserError(f"cannot write {error}: repeat the command to go on from here") from None
    shutil.rmtree(folder)


def _upload(folder: Path, remote: Remote) -> None:
    record = folder / DONE
    done = {name: Located(*state) for name, state in json.loads(record.read_text()).items()} if record.exists() else {}
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    names.sort(key=lambda name: (name == "index.bin", not name.startswith("shard-")))
    there = remote.stat(names)
    todo = [name for name in names if name not in done or there[name] != done[name]]
    log.info("uploading %d of %d files to %s", len(todo), len(names), remote.name)
    for name in todo:
        remote.upload(folder / name, name)
        remote.forget()
        state = remote.stat([name])[name]
        if isinstance(state, RemoteError):
            raise state
        if state.size != (size := (folder / name).stat().st_size):
            raise RemoteError(f"{remote.name}/{name}: it has {state.size} bytes, not {size}")
        done[name] = state
        with atomic_write(record) as partial:
            partial.write_text(json.dumps(done))
