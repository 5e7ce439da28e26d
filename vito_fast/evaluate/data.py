"""What all tasks ask of a folder of data: its manifest, its images, and one-line problems."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vito_fast.errors import UserError

IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm")
"""Image files, by their ending in lower case."""


SIZED = 100_000
"""Files of which a manifest reads the sizes; of a larger data set it reads an even share, to stay within seconds."""


def manifest(root: Path, files: Iterable[Path | str], annotations: Iterable[Path | str] = ()) -> dict[str, Any]:
    """What identifies a copy of a data set: names and sizes of ``files``, and contents of ``annotations``.

    Returns:
        ``files`` and ``bytes`` counted over both, and ``sha256``, the same wherever the root lies. Beyond ``SIZED``
        files only every n-th size is read, and ``bytes`` is an estimate.
    """
    sha, size, prefix = hashlib.sha256(), 0, len(os.path.join(root, ""))
    paths = sorted({os.fspath(path) for path in files})
    step = 1 + len(paths) // SIZED
    for number, path in enumerate(paths):
        length = os.stat(path).st_size if number % step == 0 else 0
        size += length * step
        sha.update(f"{path[prefix:]} {length}\n".encode())
    kept = sorted({os.fspath(path) for path in annotations})
    for path in kept:
        content = hashlib.sha256()
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                content.update(block)
                size += len(block)
        sha.update(f"{path[prefix:]} {content.hexdigest()}\n".encode())
    return {"files": len(paths) + len(kept), "bytes": size, "sha256": sha.hexdigest()}


def files_under(folder: Path, endings: tuple[str, ...] = ()) -> list[str]:
    """Paths of the files under a folder, sorted; without a look at any single file."""
    found = []
    for place, _, names in os.walk(folder):
        found += [os.path.join(place, name) for name in names if not endings or name.lower().endswith(endings)]
    return sorted(found)


def counted(what: str, found: int, expected: int) -> list[str]:
    """A problem if two counts differ, else none."""
    return [] if found == expected else [f"{found:,} {what}, and the benchmark has {expected:,}"]


def missing(root: Path, names: Iterable[str], where: str) -> list[str]:
    """A problem that names the first of ``names`` that is not under ``root``, and counts them; else none."""
    absent = [name for name in names if not (root / name).exists()]
    if not absent:
        return []
    return [f"{root / absent[0]} is missing{f', and {len(absent) - 1:,} others' if len(absent) > 1 else ''}: {where}"]


def read_image(path: Path) -> Tensor:
    """An image file as RGB (3,H,W) uint8. UserError naming it if it cannot be read."""
    try:
        with Image.open(path) as image:
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"cannot read the image {path}: {error}") from None


def read_labels(path: Path) -> Tensor:
    """A label image, palette or gray, (H,W) uint8: the indices, never the colors. UserError if it is an RGB image."""
    try:
        with Image.open(path) as image:
            if image.mode not in ("P", "L", "1"):
                raise UserError(f"{path} is a {image.mode} image; labels are palette or gray images")
            return torch.from_numpy(np.array(image).astype(np.uint8))
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"cannot read the labels {path}: {error}") from None
