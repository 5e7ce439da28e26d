"""Labeled folders of images or videos, ``train/CLASS/FILE`` and ``val/CLASS/FILE``, and their features."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vito_fast.errors import UserError
from vito_fast.evaluate.augment import resize_center_crop
from vito_fast.evaluate.data import IMAGES, files_under, manifest, read_image
from vito_fast.evaluate.encoders import Encoder
from vito_fast.evaluate.features import FeatureCache
from vito_fast.evaluate.task import Progress, barrier, rank_and_size

VIDEOS = (".mp4", ".avi", ".mkv", ".mov", ".webm", ".m4v")
"""Video files, by their ending in lower case."""
BATCH = 64


@dataclass(frozen=True)
class FolderOptions:
    """How images are read and which features are taken."""

    size: int = 224
    """Side of the center crop in pixels; the short side is 8 / 7 of it."""
    frames: int = 4
    """Frames of a video, evenly spaced. The features of a video are their mean."""
    features: Literal["pooled", "attended", "own"] = "pooled"
    """``pooled``: the spatial mean of the last stage. ``attended``: the vectors of a run's attention pools. ``own``:
    ``attended`` for an encoder that has such pools, else ``pooled``."""


@dataclass(frozen=True)
class Labeled:
    """Files with labels.

    Args:
        root: of the names.
        names: paths relative to the root, by class and then by name.
        labels: (N,) int64, positions in ``classes``.
        classes: names of classes.
    """

    root: Path
    names: list[str]
    labels: Tensor
    classes: list[str]

    @property
    def paths(self) -> list[Path]:
        """The files."""
        return [self.root / name for name in self.names]

    @property
    def files(self) -> list[str]:
        """The files, for manifests: a million strings are made sooner than a million paths."""
        return [f"{self.root}/{name}" for name in self.names]


def labeled_folder(root: Path, classes: Sequence[str] | None = None) -> Labeled:
    """A folder with one folder of images or videos for each class.

    Args:
        root: the folder.
        classes: the classes by number, by default the folders' names, sorted.

    Raises:
        UserError: if there is no such folder, a class without files, or a folder that is no class.
    """
    if not root.is_dir():
        raise UserError(f"there is no folder {root}")
    folders = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not folders:
        raise UserError(f"{root} has no folders: it needs one for each class")
    numbers = {name: number for number, name in enumerate(folders if classes is None else classes)}
    names: list[str] = []
    labels: list[int] = []
    prefix = len(os.path.join(root, ""))
    for folder in folders:
        if folder not in numbers:
            raise UserError(f"{root / folder} is no class of the training set")
        found = files_under(root / folder, IMAGES + VIDEOS)
        if not found:
            raise UserError(f"{root / folder} has no images or videos: remove it, or fill it")
        names += [path[prefix:] for path in found]
        labels += [numbers[folder]] * len(found)
    return Labeled(root, names, torch.tensor(labels), list(numbers))


def train_and_val(data: Path) -> tuple[Labeled, Labeled]:
    """``train`` and ``val`` of a folder. UserError if either is missing, or they share a file."""
    train = labeled_folder(data / "train")
    val = labeled_folder(data / "val", train.classes)
    for name in sorted(set(train.names) & set(val.names)):
        first, second = train.root / name, val.root / name
        if first.stat().st_size == second.stat().st_size and _content(first) == _content(second):
            raise UserError(f"{second} is in train too: a score on it says nothing")
    return train, val


def _content(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def frame_count(path: Path) -> int:
    """Frames of a video, by its packets. UserError if it has none or cannot be read."""
    import av

    try:
        with av.open(str(path)) as container:
            count = sum(packet.size > 0 for packet in container.demux(container.streams.video[0]))
    except (av.FFmpegError, OSError, IndexError) as error:
        raise UserError(f"cannot read {path}: {' '.join(str(error).split())}") from None
    if not count:
        raise UserError(f"cannot read {path}: it has no frames")
    return count


def read_frames(path: Path, wanted: Sequence[int], size: int) -> Tensor:
    """Some frames of a video by number, (T, 3, size, size) uint8, resized and center-cropped one at a time.

    A number beyond the last frame that decodes gives that one. UserError if none decodes.
    """
    import av

    def picture(frame: Any) -> Tensor:
        return resize_center_crop(torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1), size)

    found: dict[int, Tensor] = {}
    frame = None
    try:
        with av.open(str(path)) as container:
            for number, frame in enumerate(container.decode(container.streams.video[0])):
                if number in wanted:
                    found[number] = picture(frame)
                if number >= max(wanted):
                    break
    except (av.FFmpegError, OSError, IndexError) as error:
        raise UserError(f"cannot decode {path}: {' '.join(str(error).split())}") from None
    if frame is None:
        raise UserError(f"cannot decode {path}: it has no frames")
    last = picture(frame)
    return torch.stack([found.get(number, last) for number in wanted])


def read_item(path: Path, options: FolderOptions) -> Tensor:
    """A file's pictures (T, 3, size, size) uint8: one of an image, evenly spaced ones of a video."""
    if path.suffix.lower() in IMAGES:
        return resize_center_crop(read_image(path), options.size)[None]
    count = frame_count(path)
    places = (np.arange(options.frames) + 0.5) / options.frames * count
    return read_frames(path, [int(place) for place in places], options.size)


class _Items(Dataset):
    def __init__(self, paths: Sequence[Path], options: FolderOptions) -> None:
        self.paths, self.options = paths, options

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        return read_item(self.paths[index], self.options)


def batches(paths: Sequence[Path], options: FolderOptions) -> Iterator[list[Tensor]]:
    """The pictures of files in order, a list a batch; read by processes where there are many files."""
    size = int(os.environ.get("LOCAL_WORLD_SIZE", rank_and_size()[1]))
    workers = min(16, (os.cpu_count() or 1) // max(1, size)) if len(paths) > 2000 else 0
    yield from DataLoader(_Items(paths, options), BATCH, num_workers=workers, collate_fn=list)


def attends(encoder: Encoder, options: FolderOptions) -> bool:
    """Whether features are those of attention pools."""
    return options.features == "attended" or (options.features == "own" and encoder.pools is not None)


def features_note(encoder: Encoder, options: FolderOptions) -> tuple[str, ...]:
    """The features of an encoder in words, for a result's notes, where encoders differ in them."""
    kind = "attention-pooled" if attends(encoder, options) else "mean"
    return (f"{encoder.record.name}: {kind} features",) if options.features == "own" else ()


def encode(encoder: Encoder, images: Tensor, options: FolderOptions) -> Tensor:
    """Features (T, D) float32 on the CPU of pictures (T, 3, S, S) uint8."""
    take = encoder.attended if attends(encoder, options) else encoder.pooled
    return torch.cat([take(encoder.normalize(part)).float().cpu() for part in images.split(BATCH)])


def features(
    encoder: Encoder, items: Labeled, options: FolderOptions, cache: FeatureCache, *, mean: bool = True, label: str = ""
) -> Tensor:
    """Features of all files, computed once, shared among ranks.

    Args:
        encoder: in eval mode.
        items: the files.
        options: how they are read.
        cache: where features are kept.
        mean: whether a video has one vector, the mean of its frames'; else one a frame.
        label: of the progress line.

    Returns:
        (N, D) float32 with ``mean``, else (N, T, D).
    """
    rank, size = rank_and_size()
    content = manifest(items.root, items.files)["sha256"]

    def part(number: int) -> Tensor:
        def compute() -> dict[str, Tensor]:
            own = items.paths[number::size]
            progress, found = Progress(label, len(own)), []
            for batch in batches(own, options):
                flat = encode(encoder, torch.cat(batch), options).split([len(pictures) for pictures in batch])
                found += [one.mean(0) if mean else one for one in flat]
                progress.step(len(batch))
            return {"features": torch.stack(found) if found else torch.zeros(0)}

        options_of = {"size": options.size, "frames": options.frames, "features": options.features}
        transform: dict[str, Any] = {"version": 1, **options_of, "mean": mean, "part": [number, size]}
        return cache.get(encoder.record.sha256, content, transform, compute)["features"]

    part(rank)
    barrier()
    parts = [part(number) for number in range(size)]
    whole = torch.empty(len(items.names), *parts[0].shape[1:])
    for number, found in enumerate(parts):
        if len(found):
            whole[number::size] = found
    return whole
