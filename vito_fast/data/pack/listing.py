"""The video files of a folder, without leaving it, and each content once."""

import errno
import hashlib
import os
import stat
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from vito_fast.data.pack.clip_list import rows_of_archives
from vito_fast.data.pack.clips import Clips, Span, TimeSpan
from vito_fast.data.pack.tars import Archives
from vito_fast.data.store.description import DUPLICATE
from vito_fast.data.store.media import Member, SourceFile
from vito_fast.errors import UserError

VIDEO_SUFFIXES = frozenset(
    [
        ".3gp", ".asf", ".avi", ".divx", ".flv", ".gif", ".h264", ".hevc", ".ivf", ".m2ts", ".m2v", ".m4v", ".mjpeg",
        ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".mxf", ".ogv", ".qt", ".ts", ".vob", ".webm", ".wmv", ".y4m",
    ]
)  # fmt: skip
"""Suffixes by which video files are found."""
ARCHIVE = ".tar"
"""Suffix of archives, whose members are taken as files."""


@dataclass(frozen=True)
class Listing:
    """Files below ``root``, by relative name, sorted. ``rejected`` has the reason of each."""

    root: Path
    videos: list[str]
    rejected: dict[str, str]
    fingerprint: str
    """Hash of the names and sizes of all videos, and of the clip list."""
    skipped: Mapping[str, str] = field(default_factory=dict)
    """Reasons of the files that are no videos by their suffix, and of the folders that cannot be listed."""
    rows: Clips = field(default_factory=dict)
    """Clips of each file of a clip list, in order, and what an archive says about its videos."""
    from_list: bool = False
    members: Mapping[str, Member] = field(default_factory=dict)
    """Places of the videos that are in archives."""

    def spans(self, name: str) -> Sequence[Span | TimeSpan] | None:
        """The clips to make of a file, None if it is to be cut."""
        rows = self.rows.get(name)
        return None if not rows or (isinstance(rows[0], TimeSpan) and rows[0].whole) else rows

    def path(self, name: str) -> Path | Member:
        """The place of a file."""
        return self.members.get(name) or self.root / os.fsdecode(os.fsencode(name))


def list_videos(src: Path, known: Collection[str] = ()) -> Listing:
    """List the videos under ``src``, also in tar archives, by suffix. Rejects duplicates, and links that lead outside.

    Args:
        src: A folder, searched recursively, or one file.
        known: Names to pass over.

    Raises:
        UserError: ``src`` does not exist, a disk fails, or no file has a video's suffix.
    """
    if not src.exists():
        raise UserError(f"no such file or folder: {src}")
    root = src if src.is_dir() else src.parent
    found, skipped = _walk(src) if src.is_dir() else ([src.name], {})
    inside, rejected, sizes, archives = root.resolve(), dict[str, str](), dict[str, int](), Archives(VIDEO_SUFFIXES)
    for name in found:
        try:
            real = (root / name).resolve(strict=True)
            if src.is_dir() and not real.is_relative_to(inside):
                rejected[name] = "link leads outside the folder"
            elif not real.is_file():
                rejected[name] = "no regular file"
            elif name.lower().endswith(ARCHIVE):
                archives.read(root, name)
            else:
                sizes[name] = real.stat().st_size
        except OSError as error:
            _check_own(src, error, link=(root / name).is_symlink())
            rejected[name] = f"cannot be read: {error.strerror}"
        except RuntimeError:
            rejected[name] = "cannot be read: a loop of links"
    skipped |= archives.skipped
    sizes |= {name: member.size for name, member in archives.videos.items()}
    sizes = {name: size for name, size in sizes.items() if name not in known}
    rejected = {name: reason for name, reason in (rejected | archives.rejected).items() if name not in known}
    names = sorted(sizes.keys() | rejected.keys())
    if not names:
        if known:
            raise UserError(f"no new video in {src}: all are known")
        raise UserError(f"no video in {src}: looked for {', '.join(sorted(VIDEO_SUFFIXES))}")
    rows = rows_of_archives(archives.about)
    lines = (f"{name}\t{sizes.get(name, -1)}{rows.get(name, '')}" for name in names)
    seal = hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape"))
    listing = Listing(root, names, rejected, seal.hexdigest(), skipped, rows, members=archives.videos)
    rejected |= _duplicates(listing, sizes)
    return replace(listing, videos=[name for name in names if name not in rejected])


def list_clips(root: Path, clips: Clips, known: Collection[str] = ()) -> Listing:
    """The files of a clip list, named relative to ``root``. Rejects those that are missing or outside ``root``.

    Args:
        root: A folder.
        clips: The list.
        known: Names to pass over.

    Raises:
        ValueError: Spans of frames overlap, are empty or out of order.
        UserError: The list or ``root`` is empty, all names are known, or a disk fails.
    """
    if not clips:
        raise UserError("the clip list is empty")
    clips = {name: own for name, own in clips.items() if name not in known}
    if not clips:
        raise UserError("no new video in the clip list: all are known")
    if not root.is_dir():
        raise UserError(f"no such folder: {root}")
    inside, seal, rejected = root.resolve(), hashlib.sha256(), dict[str, str]()
    for name in sorted(clips):
        end = 0
        for span in clips[name]:
            if isinstance(span, Span):
                if not end <= span.first_frame < span.end_frame:
                    raise ValueError(f"clips of {name} overlap or are out of order at frame {span.first_frame}")
                end = span.end_frame
        size = -1
        try:
            real = (root / name).resolve()
            if not real.is_relative_to(inside):
                rejected[name] = "outside the source folder"
            elif not stat.S_ISREG((status := real.stat()).st_mode):
                rejected[name] = "no regular file"
            else:
                size = status.st_size
        except (FileNotFoundError, NotADirectoryError):
            rejected[name] = "no such file"
        except OSError as error:
            _check_own(root, error)
            rejected[name] = f"cannot be read: {error.strerror}"
        except (RuntimeError, ValueError) as error:
            rejected[name] = f"cannot be read: {error}"
        seal.update(f"{name}\t{size}\t{clips[name]}\n".encode("utf-8", "surrogateescape"))
    videos = [name for name in sorted(clips) if name not in rejected]
    rows: Clips = {name: tuple(sorted(own, key=lambda span: span.start)) for name, own in clips.items()}
    return Listing(root, videos, rejected, seal.hexdigest(), rows=rows, from_list=True)


def _check_own(src: Path, error: OSError, link: bool = False) -> None:
    """Raise UserError for a fault of the disk or network. Permissions, and what a link leads to, are the file's own."""
    own = error.errno in (errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG)
    own |= link and error.errno == errno.ENOENT
    if not own or Path(error.filename or src) == src:
        raise UserError(f"cannot read {error.filename or src}: {error.strerror}: fix that and repeat the command")


def _walk(src: Path) -> tuple[list[str], dict[str, str]]:
    """Names of the videos, sorted, and the reasons why other files and folders are none."""
    names: list[str] = []
    skipped: dict[str, str] = {}

    def fail(error: OSError) -> None:
        _check_own(src, error)
        name = Path(error.filename).relative_to(src).as_posix()
        skipped[f"{name}/"] = f"folder cannot be read: {error.strerror}"

    for folder, _, files in os.walk(src, followlinks=False, onerror=fail):
        for file in files:
            name, suffix = (Path(folder) / file).relative_to(src).as_posix(), os.path.splitext(file)[1].lower()
            if suffix in VIDEO_SUFFIXES or suffix == ARCHIVE:
                names.append(name)
            else:
                skipped[name] = f"no suffix of a video: {suffix or 'none'}"
    return sorted(names), skipped


def _duplicates(listing: Listing, sizes: dict[str, int]) -> dict[str, str]:
    """All but the first file of each content, with the reason. Only files of equal size are read."""
    groups: dict[int, list[str]] = defaultdict(list)
    for name, size in sizes.items():
        groups[size].append(name)
    result: dict[str, str] = {}
    for names in groups.values():
        first: dict[bytes, str] = {}
        for name in sorted(names) if len(names) > 1 else []:
            try:
                with SourceFile(listing.path(name)) as file:
                    digest = hashlib.file_digest(file, "blake2b").digest()
            except OSError as error:
                _check_own(listing.root, error)
                result[name] = f"cannot be read: {error.strerror}"
                continue
            if digest in first:
                result[name] = f"{DUPLICATE}: {first[digest]}"
            else:
                first[digest] = name
    return result
