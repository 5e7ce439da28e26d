"""Checkpoints: one safetensors file each, written whole or not at all, verified when read, never unpickled.

A file ``step-00000123.safetensors`` holds the tensors. Its header holds the rest of the state as JSON and a SHA-256
over both. It is written under another name, flushed to the disk and renamed. A matching name is therefore a whole file
unless the disk failed, which the checksum shows.

Why not torch.distributed.checkpoint: it pays where each rank holds a shard of the state. Here every rank holds all of
it, and it is small: 0.56 GB for ResNet-50 with the ancestors' heads (online, target, momentum). Rank 0 writes one file,
which any number of ranks reads.
"""

import hashlib
import json
import re
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vito_fast.config import Config
from vito_fast.config_files import from_mapping, legacy_defaults
from vito_fast.errors import UserError
from vito_fast.files import atomic_write

FORMAT = "vito-fast checkpoint"
VERSION = "1"
_NAME = re.compile(r"step-(\d{8})\.safetensors")


class Checkpoint(NamedTuple):
    """Contents of a file: tensors by name (on the CPU), and the rest as plain JSON values."""

    path: Path
    tensors: dict[str, Tensor]
    state: dict[str, Any]
    sha256: str
    """Of tensors and state, in hexadecimal."""

    def value(self, name: str) -> Any:
        """A value of the state. UserError if it has none of that name."""
        if name not in self.state:
            raise UserError(f"{self.path} has no {name}: it may come from another version of this program")
        return self.state[name]

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin with ``prefix``, by the rest of their names."""
        return {name.removeprefix(prefix): t for name, t in self.tensors.items() if name.startswith(prefix)}


def config_of(checkpoint: Checkpoint) -> Config:
    """The configuration of the run that made a checkpoint; one of version 0.1 keeps its meaning.

    UserError if it has none, or one that makes no sense.
    """
    mapping = checkpoint.value("config")
    base = Config() if "heads" in mapping.get("model", {}) else legacy_defaults()
    try:
        return from_mapping(base, mapping, str(checkpoint.path), notice=False)
    except UserError as error:
        raise UserError(f"{error} (the checkpoint may come from a newer version of this program)") from None


def path_of(folder: Path, step: int) -> Path:
    """The file of a step."""
    return folder / f"step-{step:08d}.safetensors"


def named_as_one(path: Path) -> bool:
    """Whether a file of this name would be taken for a checkpoint."""
    return _NAME.fullmatch(path.name) is not None


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(path.stem.removeprefix("step-"))


def checkpoints(folder: Path) -> list[Path]:
    """The files with a checkpoint's name in ``folder``, newest first."""
    found = [p for p in folder.glob("step-*.safetensors") if named_as_one(p)] if folder.is_dir() else []
    return sorted(found, reverse=True)


def write(path: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Writes a checkpoint atomically; OSError if it cannot be written, and then ``path`` is as it was."""
    from safetensors.torch import save_file

    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    text = json.dumps(state, sort_keys=True)
    header = {"format": FORMAT, "version": VERSION, "state": text, "sha256": _checksum(tensors, text)}
    with atomic_write(path) as partial:
        save_file(tensors, partial, metadata=header)


def read(path: Path) -> Checkpoint:
    """Reads and verifies a checkpoint.

    Raises:
        UserError: the file is missing, torn, changed or no checkpoint.
        OSError: the disk or the network does not answer; the file may be whole.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with open(path, "rb"):  # safetensors reports any file that it cannot open as missing
            pass
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                raise UserError(f"{path} is not a checkpoint of vito-fast")
            if header.get("version") != VERSION:
                version = header.get("version")
                raise UserError(f"{path} is a checkpoint of version {version}, this program reads {VERSION}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except SafetensorError as error:
        raise UserError(f"{path} is torn or not a checkpoint: {error}") from None
    if _checksum(tensors, header.get("state", "")) != header.get("sha256"):
        raise UserError(f"{path} is damaged: its checksum does not match")
    return Checkpoint(path, tensors, json.loads(header["state"]), header["sha256"])


def warn(message: str) -> None:
    print(f"warning: {message}", flush=True)


def read_newest(folder: Path, refused: Callable[[str], None] = warn) -> Checkpoint | None:
    """Reads the newest whole checkpoint of a folder.

    Args:
        folder: Where the files are.
        refused: Called with a message for each newer file that is not whole.

    Returns:
        The checkpoint; None if there is no such file.

    Raises:
        UserError: there are files and none is whole.
        OSError: a file cannot be read. It may be whole, and an older one would undo its steps.
    """
    reasons: list[str] = []
    found = checkpoints(folder)
    for path in found:
        try:
            checkpoint = read(path)
        except UserError as error:
            reasons.append(str(error))
            continue
        for reason in reasons:
            refused(f"{reason}; trying the one before")
        return checkpoint
    if found:
        raise UserError(f"none of the {len(found)} checkpoints in {folder} can be used; the newest: {reasons[0]}")
    return None


def find(run_or_file: str | Path, refused: Callable[[str], None] = warn) -> Checkpoint:
    """The checkpoint in a file, or the newest of a run's folder. UserError if there is none."""
    path = Path(run_or_file)
    if path.is_file():
        return read(path)
    if not path.is_dir():
        raise UserError(f"no run or checkpoint {path}")
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    found = read_newest(folder, refused)
    if found is None:
        raise UserError(f"{path} holds no usable checkpoint")
    return found


def _checksum(tensors: dict[str, Tensor], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        t = tensors[name]
        digest.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
        digest.update(t.reshape(-1).view(torch.uint8).numpy().data if t.numel() else b"")
    return digest.hexdigest()


class Checkpointer:
    """Writes the checkpoints of one run in the background, and deletes old ones.

    ``save`` copies the state and returns; one write at a time. ``wait`` returns once the last one is on the disk. After
    a failed write, as on a disk that is full for a moment, ``save`` warns and waits for its own write.

    Args:
        folder: Where the files are; it is made if it is absent.
        keep_last: How many newest checkpoints stay.
        keep_every: Checkpoints whose step is a multiple of this stay too; 0 keeps none.
        start: The step that the run continues after. Files of later steps were refused and do not count.
    """

    def __init__(self, folder: Path, keep_last: int, keep_every: int = 0, start: int | None = None) -> None:
        self.folder, self.keep_last, self.keep_every = folder, keep_last, keep_every
        folder.mkdir(parents=True, exist_ok=True)
        self._refused = {path for path in checkpoints(folder) if start is not None and step_of(path) > start}
        for leftover in [*folder.glob(".step-*.partial"), *folder.glob(".tmp??????")]:  # the second are safetensors'
            leftover.unlink()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> Path:
        """Starts to write the state after ``step`` steps; returns its path. OSError after two failures."""
        try:
            self.wait()
            failed = None
        except OSError as error:
            failed = error
        copies = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
        path = path_of(self.folder, step)
        self._pending = self._pool.submit(self._write, path, copies, state)
        if failed:
            print(f"warning: {failed}; trying again after step {step}", file=sys.stderr, flush=True)
            self.wait()
        return path

    def wait(self) -> None:
        """Waits for the write in progress; OSError if it failed."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def close(self) -> None:
        """Waits, and ends the thread."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()

    def _write(self, path: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        write(path, tensors, state)
        self._refused.discard(path)
        so_far = [old for old in checkpoints(self.folder) if old <= path]
        kept = [old for old in so_far if old not in self._refused][: self.keep_last]
        for old in so_far:
            if old < kept[-1] and not (self.keep_every and step_of(old) % self.keep_every == 0):
                old.unlink(missing_ok=True)
