"""Step ``media``: what each file is, without decoding it; everything hostile about it is found here if it can be."""

import hashlib
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from vito_fast.data.store.description import Limits
from vito_fast.data.store.media import BadVideo, check_pixels, claimed_rate, opened

VERSION = 1
IMAGES = frozenset([".jpg", ".jpeg", ".png", ".webp", ".bmp"])
SCHEMA = pa.schema(
    [
        ("item_id", pa.string()),
        ("path", pa.string()),
        ("status", pa.string()),
        ("reason", pa.string()),
        ("size", pa.int64()),
        ("mtime_ns", pa.int64()),
        ("digest", pa.string()),
        ("codec", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("rate", pa.float64()),
        ("duration", pa.float64()),
    ]
)


def confined(root: str | os.PathLike[str], name: str) -> Path:
    """The file ``name`` of ``root``, resolved. BadVideo unless it is a regular file inside, by its own name and links.

    Args:
        root: The folder that no path may leave.
        name: Relative to ``root``, or absolute.
    """
    if "\0" in name:
        raise BadVideo("its name holds a NUL")
    inside = Path(root).resolve()
    try:
        real = (inside / name).resolve(strict=True)
        mode = real.stat().st_mode
    except (OSError, RuntimeError) as error:
        raise BadVideo(f"cannot be read: {getattr(error, 'strerror', None) or 'a loop of links'}") from None
    if not real.is_relative_to(inside):
        raise BadVideo("outside the root folder")
    if not stat.S_ISREG(mode):
        raise BadVideo("no regular file")
    return real


def run(data: Mapping[str, Any], limits: Limits) -> dict[str, Any]:
    """One row of ``SCHEMA``. ``data``: root and path. Raises BadVideo."""
    path = confined(data["root"], data["path"])
    try:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
        status = path.stat()
    except OSError as error:
        raise BadVideo(f"cannot be read: {error.strerror}") from None
    with opened(path) as (container, stream):
        context = stream.codec_context
        check_pixels(context.width, context.height, limits)
        duration = (container.duration or 0) / 1e6
        if stream.duration and stream.time_base:
            duration = float(stream.duration * stream.time_base)
        return {
            "path": data["path"], "status": "ok", "reason": "", "size": status.st_size,
            "mtime_ns": status.st_mtime_ns, "digest": digest, "codec": context.codec.canonical_name,
            "width": context.width, "height": context.height, "rate": float(claimed_rate(stream)),
            "duration": duration,
        }  # fmt: skip


def rejected(data: Mapping[str, Any], reason: str) -> dict[str, Any]:
    return {"path": data["path"], "status": "rejected", "reason": reason}
