"""``vito-fast features``: an encoder's features of images or videos, in a file.

Images are read, resized and normalized as in every evaluation. The file says how.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from vito_fast.errors import UserError
from vito_fast.evaluate.data import IMAGES
from vito_fast.evaluate.encoders import Encoder, load
from vito_fast.evaluate.folders import BATCH, VIDEOS, FolderOptions, encode, read_item
from vito_fast.files import atomic_write, check_writable


def write_features(
    source: str,
    inputs: Path,
    out: Path,
    *,
    size: int | None = None,
    frames: int = 4,
    pooling: Literal["mean", "attention"] = "mean",
    per_frame: bool = False,
    device: torch.device | str = "cpu",
) -> tuple[int, int]:
    """Writes the features of every image and video below a folder.

    Args:
        source: The encoder, as ``encoders.load`` takes it.
        inputs: A folder, searched recursively, or one file.
        out: ``.safetensors`` with ``features`` (N,C) float32 and the names in its header, or ``.parquet`` with columns
            ``name`` and ``features``.
        size: Side of the center crop in pixels; by default that of the encoder's training, else 224.
        frames: Frames of a video, evenly spaced.
        pooling: ``mean`` over the last level, or ``attention``, the vectors of a run's pools, concatenated.
        per_frame: Whether a video has one row a frame, named ``FILE#i``, and not their mean.
        device: Its place.

    Returns:
        Rows and columns.

    Raises:
        UserError: an unusable encoder, no readable file, or an output that cannot be written.
    """
    if out.suffix not in (".safetensors", ".parquet"):
        raise UserError(f"{out} must end in .safetensors or .parquet")
    check_writable(out)
    paths = _files(inputs)
    encoder = load(source, device)
    kind: Literal["attended", "pooled"] = "attended" if pooling == "attention" else "pooled"
    options = FolderOptions(size or encoder.size, frames, kind)
    names: list[str] = []
    rows: list[Tensor] = []
    root = inputs if inputs.is_dir() else inputs.parent
    for group in _groups(paths, options):
        found = encode(encoder, torch.cat([pictures for _, pictures in group]), options)
        for (path, pictures), part in zip(group, found.split([len(p) for _, p in group]), strict=True):
            name = path.relative_to(root).as_posix()
            video = per_frame and path.suffix.lower() in VIDEOS
            names += [f"{name}#{i}" for i in range(len(pictures))] if video else [name]
            rows.append(part if video else part.mean(0, keepdim=True))
    if not rows:
        raise UserError(f"no file of {inputs} could be read")
    features = torch.cat(rows)
    _write(out, names, features, about(encoder, options) | {"per_frame": json.dumps(per_frame)})
    return features.shape[0], features.shape[1]


def about(encoder: Encoder, options: FolderOptions) -> dict[str, str]:
    """Everything that the features depend on, as text."""
    attends = options.features == "attended"
    return {
        "encoder": encoder.record.source,
        "backbone": encoder.record.architecture,
        "sha256": encoder.record.sha256,
        "mean": json.dumps(encoder.mean),
        "std": json.dumps(encoder.std),
        "size": str(options.size),
        "resize": str(round(options.size * 8 / 7)),
        "interpolation": "bilinear",
        "frames": str(options.frames),
        "level": f"last {len(encoder.pools or ())}" if attends else f"last, stride {encoder.strides[-1]}",
        "pooling": "attention" if attends else "mean",
    }


def _files(inputs: Path) -> list[Path]:
    if inputs.is_file():
        return [inputs]
    if (inputs / "store.json").is_file():
        raise UserError(f"{inputs} is a store: give the folder of its videos")
    wanted = (*IMAGES, *VIDEOS)
    paths = sorted(p for p in inputs.rglob("*") if p.suffix.lower() in wanted and p.is_file())
    if not paths:
        raise UserError(f"no image or video in {inputs}: looked for {', '.join(wanted)}")
    return paths


def _groups(paths: list[Path], options: FolderOptions) -> Iterator[list[tuple[Path, Tensor]]]:
    """Files with their pictures, about ``BATCH`` pictures at a time. One that cannot be read is left out."""
    group: list[tuple[Path, Tensor]] = []
    for path in paths:
        try:
            group.append((path, read_item(path, options)))
        except UserError as error:
            print(f"warning: left out: {error}", flush=True)
        if sum(len(pictures) for _, pictures in group) >= BATCH:
            yield group
            group = []
    if group:
        yield group


def _write(out: Path, names: list[str], features: Tensor, header: dict[str, str]) -> None:
    with atomic_write(out) as partial:
        if out.suffix == ".safetensors":
            from safetensors.torch import save_file

            save_file({"features": features}, partial, metadata=header | {"names": json.dumps(names)})
        else:
            _write_parquet(partial, names, features.numpy(), header)


def _write_parquet(path: Path, names: list[str], features: "np.ndarray[Any, Any]", header: dict[str, str]) -> None:
    try:
        import pyarrow as pa
        import pyarrow.parquet
    except ImportError:
        raise UserError("a .parquet file needs pyarrow: pip install pyarrow, or write .safetensors") from None
    rows = pa.FixedSizeListArray.from_arrays(pa.array(features.reshape(-1)), features.shape[1])
    table = pa.table({"name": names, "features": rows}).replace_schema_metadata(header)
    pyarrow.parquet.write_table(table, path)
