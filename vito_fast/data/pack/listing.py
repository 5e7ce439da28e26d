"""Which files a folder of videos holds, without leaving it, and each content once."""

import hashlib
import os
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from vito_fast.data.store.media import VIDEO_SUFFIXES
from vito_fast.errors import UserError


@dataclass(frozen=True)
class Listing:
    """``videos`` and ``rejected`` (with the reason) name files relative to ``root``, sorted."""

    root: Path
    videos: list[str]
    rejected: dict[str, str]
    fingerprint: str
    """Of the names and sizes of all files listed."""

    def path(self, name: str) -> Path:
        return self.root / os.fsdecode(os.fsencode(name))


def list_videos(src: Path) -> Listing:
    """Videos under ``src`` (or the one file ``src``), told by their suffix; links that lead outside are rejected.

    Raises UserError if ``src`` does not exist, cannot be read or holds no file with a video's suffix.
    """
    if not src.exists():
        raise UserError(f"no such file or folder: {src}")
    root = src if src.is_dir() else src.parent
    names = sorted(_walk(src)) if src.is_dir() else [src.name]
    if not names:
        raise UserError(f"no video in {src}: looked for {', '.join(sorted(VIDEO_SUFFIXES))}")
    inside, rejected, sizes = root.resolve(), {}, {}
    for name in names:
        try:
            real = (root / name).resolve(strict=True)
            if src.is_dir() and not real.is_relative_to(inside):
                rejected[name] = "link leads outside the folder"
            elif not real.is_file():
                rejected[name] = "no regular file"
            else:
                sizes[name] = real.stat().st_size
        except (OSError, RuntimeError) as error:
            rejected[name] = f"cannot be read: {getattr(error, 'strerror', None) or 'a circle of links'}"
    seal = hashlib.sha256(
        "\n".join(f"{name}\t{sizes.get(name, -1)}" for name in names).encode("utf-8", "surrogateescape")
    )
    rejected.update(_duplicates(root, sizes))
    videos = [name for name in names if name not in rejected]
    return Listing(root, videos, rejected, seal.hexdigest())


def _walk(src: Path):
    def fail(error: OSError) -> None:
        if Path(error.filename) == src:
            raise UserError(f"cannot read {src}: {error.strerror}")

    for folder, _, files in os.walk(src, followlinks=False, onerror=fail):
        for file in files:
            if os.path.splitext(file)[1].lower() in VIDEO_SUFFIXES:
                yield (Path(folder) / file).relative_to(src).as_posix()


def _duplicates(root: Path, sizes: dict[str, int]) -> dict[str, str]:
    """All but the first of each set of files with the same bytes; only files of equal size are read."""
    groups: dict[int, list[str]] = defaultdict(list)
    for name, size in sizes.items():
        groups[size].append(name)
    result: dict[str, str] = {}
    for names in groups.values():
        first: dict[bytes, str] = {}
        for name in names if len(names) > 1 else []:
            try:
                with open(root / name, "rb") as file:
                    digest = hashlib.file_digest(file, "blake2b").digest()
            except OSError as error:
                result[name] = f"cannot be read: {error.strerror}"
                continue
            if digest in first:
                result[name] = f"same content as another file: {first[digest]}"
            else:
                first[digest] = name
    return result
