"""Correspondence: does a point's feature find the same point in another view?

Each point of the first image goes to the position of the second with the most similar feature. PCK is the fraction
that lands within some pixels of the truth. Pairs with dense true disparity give thousands of points: scikit-image's
``motorcycle`` pair installs with it, and Middlebury's stereo sets have the same form.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from vito_fast.errors import UserError
from vito_fast.evaluate.data import read_image

CHUNK = 2048
"""Points at a time: bounds the memory of similarities."""


@dataclass(frozen=True)
class Pair:
    """Two rectified views and the truth between them.

    Args:
        name: of the pair.
        left: file of the first view.
        right: file of the second.
        disparity: file of the disparity: a point (y, x) of the left view is (y, x - d) in the right one.
    """

    name: str
    left: Path
    right: Path
    disparity: Path


def find_pairs(root: Path) -> list[Pair]:
    """The pairs of a folder, by name: scikit-image's ``NAME_left.png``, ``NAME_right.png``, ``NAME_disp.npz``, or
    Middlebury's ``NAME/im0.png``, ``NAME/im1.png``, ``NAME/disp0.pfm``. UserError if there are none.
    """
    found = []
    for left in sorted(root.glob("*_left.png")):
        name = left.name.removesuffix("_left.png")
        found.append(Pair(name, left, root / f"{name}_right.png", root / f"{name}_disp.npz"))
    folders = sorted(left.parent for left in root.glob("*/im0.png"))
    found += [Pair(f.name, f / "im0.png", f / "im1.png", f / "disp0.pfm") for f in folders]
    found = [pair for pair in found if pair.right.is_file() and pair.disparity.is_file()]
    if not found:
        raise UserError(f"{root} has no pairs: NAME_left.png, NAME_right.png and NAME_disp.npz, or NAME/im0.png ...")
    return found


def read_disparity(path: Path) -> NDArray[np.float64]:
    """Disparity in pixels, (H, W) float64, not finite where unknown: an ``.npz`` with one array, or a ``.pfm``."""
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                (name,) = arrays.files
                values = arrays[name].astype(np.float64)
        else:
            values = _read_pfm(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the disparity {path}: {error}") from None
    if values.ndim != 2:
        raise UserError(f"{path} holds {values.shape}, not one (H, W) disparity")
    return values


def _read_pfm(data: bytes) -> NDArray[np.float64]:
    """A gray portable float map: rows from the bottom, little-endian if its scale is negative."""
    header = re.match(rb"Pf\s+(\d+)\s+(\d+)\s+(-?[\d.]+)\s", data)
    if not header:
        raise ValueError("no gray PFM file")
    width, height, scale = int(header[1]), int(header[2]), float(header[3])
    values = np.frombuffer(data, "<f4" if scale < 0 else ">f4", offset=header.end())
    return values.reshape(height, width)[::-1].astype(np.float64)


def match(first: Tensor, second: Tensor, points: Tensor, size: tuple[int, int]) -> Tensor:
    """Where points of one image are in another, by the most similar feature.

    Args:
        first: features of the first image, (C, h, w), read bilinearly at the points.
        second: features of the second, (C, h', w').
        points: (N, 2) float, (y, x) in pixels of the first image.
        size: height and width of both images in pixels.

    Returns:
        (N, 2) float32, (y, x) in pixels: the center of the best position's cell. Of equal ones the first.
    """
    if first.ndim != 3 or second.ndim != 3 or first.shape[0] != second.shape[0] or points.shape[1:] != (2,):
        shapes = f"{tuple(first.shape)}, {tuple(second.shape)} and {tuple(points.shape)}"
        raise ValueError(f"features must be two (C, h, w) and points (N, 2), not {shapes}")
    extent = points.new_tensor(size, dtype=torch.float32)
    # grid_sample's -1 and 1 are the image's borders, and a pixel's center lies half a pixel inside.
    grid = ((points.float() + 0.5) / extent * 2 - 1).flip(1)
    queries = F.grid_sample(first.float()[None], grid[None, None], align_corners=False, padding_mode="border")[
        0, :, 0
    ].T
    keys = F.normalize(second.float().flatten(1), dim=0)
    best = torch.cat([(F.normalize(part, dim=1) @ keys).argmax(1) for part in queries.split(CHUNK)])
    h, w = second.shape[1:]
    cells = torch.stack([best // w, best % w], 1) + 0.5
    return cells * extent / cells.new_tensor((h, w)) - 0.5


def pck(found: Tensor, truth: Tensor, threshold: float) -> float:
    """Percentage of correct keypoints as a fraction: points (N, 2) within ``threshold`` pixels of the truth."""
    if found.shape != truth.shape or not len(found):
        raise ValueError(f"two lists (N, 2) of at least one point, not {tuple(found.shape)} and {tuple(truth.shape)}")
    return float(((found - truth).norm(dim=1) <= threshold).double().mean())


def true_points(disparity: NDArray[np.float64], spacing: int) -> tuple[Tensor, Tensor]:
    """Points (N, 2) on a grid of the left view with known truth, and where they are in the right view, (y, x)."""
    height, width = disparity.shape
    y, x = (g.ravel() for g in np.mgrid[spacing // 2 : height : spacing, spacing // 2 : width : spacing])
    shift = disparity[y, x]
    known = np.isfinite(shift) & (shift > 0)
    known[known] = x[known] - shift[known] >= 0
    left = np.stack([y, x], 1)[known]
    right = np.stack([y[known], x[known] - shift[known]], 1)
    return torch.from_numpy(left).float(), torch.from_numpy(right).float()


def read_pair(pair: Pair) -> tuple[Tensor, Tensor, NDArray[np.float64]]:
    """Both views (3, H, W) uint8 and the disparity. UserError if their sizes differ."""
    left, right, disparity = read_image(pair.left), read_image(pair.right), read_disparity(pair.disparity)
    if left.shape != right.shape or left.shape[1:] != disparity.shape:
        raise UserError(
            f"{pair.name}: views {left.shape[1:]}, {right.shape[1:]} and truth {disparity.shape} differ in size"
        )
    return left, right, disparity
