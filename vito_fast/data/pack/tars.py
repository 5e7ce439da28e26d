"""Video files in tar archives, as WebDataset has them: read where they are, with what the files beside them say."""

import json
import os
import tarfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from vito_fast.data.store.media import Member

SIDECARS = ("json", "cls", "txt")
"""Suffixes of the files that tell about the video of the same key."""
SIDECAR_BYTES = 1 << 20


class Archives:
    """The content of some archives. Names of members begin with that of their archive and a slash.

    Nothing is unpacked, and names of members are never used as paths.

    Args:
        suffixes: Those of videos.

    Attributes:
        videos: Place of each video.
        about: ``label``, ``class``, ``id``, ``group`` and ``text`` of each video, as far as they are known.
        rejected, skipped: Reasons.
    """

    def __init__(self, suffixes: frozenset[str]):
        self._suffixes = suffixes
        self.videos: dict[str, Member] = {}
        self.about: dict[str, dict[str, str]] = {}
        self.rejected: dict[str, str] = {}
        self.skipped: dict[str, str] = {}

    def read(self, root: Path, name: str) -> None:
        """List the archive ``name`` below ``root``. Raises OSError if it cannot be read."""
        keys, notes = dict[str, str](), dict[str, dict[str, bytes]]()
        try:
            with tarfile.open(root / name, "r:") as archive:
                for entry in archive:
                    if not entry.isdir():
                        self._take(root / name, f"{name}/{entry.name}", entry, keys, notes)
                    archive.members.clear()  # type: ignore[attr-defined]  # it would hold every entry
        except (tarfile.TarError, EOFError, ValueError) as error:
            self.rejected[name] = f"no whole tar archive: {error}"
        for video, key in keys.items():
            self.about[video] = {"id": PurePosixPath(key).name, **_about(notes.get(key, {}))}
        for key in notes.keys() - set(keys.values()):
            self.skipped.update({f"{name}/{key}.{suffix}": "no video of its name" for suffix in notes[key]})

    def _take(
        self, path: Path, name: str, entry: tarfile.TarInfo, keys: dict[str, str], notes: dict[str, dict[str, bytes]]
    ) -> None:
        """Take one member as a video, or as a note on one."""
        place = PurePosixPath(entry.name)
        stem, _, suffix = place.name.partition(".")
        key = str(place.with_name(stem)) if stem else ""
        video = place.suffix.lower() in self._suffixes
        if not entry.isreg() or entry.issparse():
            self.skipped[name] = "no regular member of its archive"
        elif place.is_absolute() or ".." in place.parts or not key:
            self.rejected[name] = "its name leads outside the archive"
        elif video and name in self.videos:
            self.rejected[f"{name} (again)"] = "a second member of its name"
        elif video:
            self.videos[name] = Member(path, entry.offset_data, entry.size, place.suffix)
            keys[name] = key
        elif suffix.lower() in SIDECARS and entry.size <= SIDECAR_BYTES:
            with open(path, "rb") as file:
                notes.setdefault(key, {})[suffix.lower()] = os.pread(file.fileno(), entry.size, entry.offset_data)
        else:
            self.skipped[name] = f"no suffix of a video: {place.suffix.lower() or 'none'}"


def _about(notes: Mapping[str, bytes]) -> dict[str, str]:
    """What the files of a key say. A ``.cls`` file has the label, a ``.txt`` file a text."""
    texts = {suffix: data.decode("utf-8", "replace").strip() for suffix, data in notes.items()}
    try:
        values: Any = json.loads(texts.get("json", "{}"))
    except (ValueError, RecursionError):
        values = {}
    about = values if isinstance(values, dict) else {}
    known = {name: str(about[name]) for name in ("label", "class", "id", "group", "text")
             if isinstance(about.get(name), str | int) and not isinstance(about.get(name), bool)}  # fmt: skip
    known |= {name: texts[suffix] for name, suffix in (("label", "cls"), ("text", "txt")) if texts.get(suffix)}
    return known
