"""DAVIS-2017, semi-supervised: label propagation by an encoder's features, scored by region and boundary.

Sources: Perazzi et al., "A Benchmark Dataset and Evaluation Methodology for Video Object Segmentation" (2016), for
J and F; Pont-Tuset et al., "The 2017 DAVIS Challenge on Video Object Segmentation", for several objects. The numbers
are those of the official tool, with its quirks:

- Objects are those of the first frame, 1 to its largest id. The first and the last frame are not scored.
- Id 255 in a truth is void: neither object nor error.
- Recall counts values strictly above .5. Decay compares the first and the last of four bins that share their ends.
  The official bins are 8-bit integers, which wrap beyond 256 frames.
- A mask that fills the frame has no boundary, so its F against an empty mask is 1.
- The mean is over objects, not over sequences.

Trap: ``Annotations_unsupervised`` holds other objects under the same names and scores silently wrong.
"""

import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from vito_fast.errors import UserError
from vito_fast.evaluate import propagate as propagation
from vito_fast.evaluate.data import missing, read_image, read_labels
from vito_fast.evaluate.propagate import Preset, preset_of

BOUNDARY_TOLERANCE = 0.008
"""Distance, in diagonals of the image, within which boundaries match."""
VOID = 255

VAL_FRAMES = {
    "bike-packing": 69, "blackswan": 50, "bmx-trees": 80, "breakdance": 84, "camel": 90, "car-roundabout": 75,
    "car-shadow": 40, "cows": 104, "dance-twirl": 90, "dog": 60, "dogs-jump": 66, "drift-chicane": 52,
    "drift-straight": 50, "goat": 90, "gold-fish": 78, "horsejump-high": 50, "india": 81, "judo": 34,
    "kite-surf": 50, "lab-coat": 47, "libby": 49, "loading": 50, "mbike-trick": 79, "motocross-jump": 40,
    "paragliding-launch": 80, "parkour": 100, "pigs": 79, "scooter-black": 43, "shooting": 40, "soapbox": 99,
}  # fmt: skip
"""Frames of each sequence of the validation split: 30 sequences, 1,999 frames."""

Mask = NDArray[np.bool_]
Extract = Callable[[Tensor], Tensor]


def region_similarity(truth: NDArray, result: NDArray, void: NDArray | None = None) -> float:
    """J: the intersection of two masks over their union, 1 if both are empty.

    Args:
        truth: (H, W), true or non-zero inside the object.
        result: likewise.
        void: (H, W) pixels to leave out.
    """
    truth, result = _pair(truth, result, void)
    union = np.count_nonzero(truth | result)
    return np.count_nonzero(truth & result) / union if union else 1.0


def boundary_f(truth: NDArray, result: NDArray, void: NDArray | None = None) -> float:
    """F: the harmonic mean of boundary precision and recall.

    A boundary pixel matches if the other boundary has a pixel within ``ceil(.008 x diagonal)`` pixels. The distance
    transform on the boundaries' bounding box gives the dilation by a disk exactly.

    Args:
        truth: (H, W), true or non-zero inside the object.
        result: likewise.
        void: (H, W) pixels to leave out.
    """
    truth, result = _pair(truth, result, void)
    radius = np.ceil(BOUNDARY_TOLERANCE * np.linalg.norm(truth.shape))
    expected, found = _boundary(truth), _boundary(result)
    if not expected.any() or not found.any():
        return float(expected.any() == found.any())
    box = _bounding_box(expected | found)
    expected, found = expected[box], found[box]
    precision = np.mean(distance_transform_edt(~expected)[found] <= radius)
    recall = np.mean(distance_transform_edt(~found)[expected] <= radius)
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


def _pair(truth: NDArray, result: NDArray, void: NDArray | None) -> tuple[Mask, Mask]:
    truth, result = np.asarray(truth).astype(bool), np.asarray(result).astype(bool)
    if truth.ndim != 2 or truth.shape != result.shape:
        raise ValueError(f"masks must be two (H, W) of one size, not {truth.shape} and {result.shape}")
    if void is not None:
        inside = ~np.asarray(void).astype(bool)
        truth, result = truth & inside, result & inside
    return truth, result


def _boundary(mask: Mask) -> Mask:
    """Pixels that differ from their right, lower or lower right neighbor; the border repeats outward."""
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    return (mask != padded[:-1, 1:]) | (mask != padded[1:, :-1]) | (mask != padded[1:, 1:])


def _bounding_box(mask: Mask) -> tuple[slice, slice]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)


@dataclass(frozen=True)
class Statistics:
    """Mean, recall (fraction above .5) and decay (first quarter less last) of one measure over frames."""

    mean: float
    recall: float
    decay: float


def statistics(values: Sequence[float] | NDArray) -> Statistics:
    """Statistics of a measure over the scored frames of one object, at least one. Warns beyond 256 values, since the
    official decay wraps there.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not len(array):
        raise ValueError(f"values must be a list of at least one number, not of shape {array.shape}")
    if len(array) > 256:
        warnings.warn(f"decay over {len(array)} frames: the official 8-bit bins wrap beyond 256", stacklevel=2)
    edges = (np.round(np.linspace(1, len(array), 5) + 1e-10) - 1).astype(np.int64).astype(np.uint8)
    bins = [array[int(a) : int(b) + 1] for a, b in itertools.pairwise(edges)]
    decay = np.mean(bins[0]) - np.mean(bins[3]) if len(bins[0]) and len(bins[3]) else np.nan
    return Statistics(float(array.mean()), float(np.mean(array > 0.5)), float(decay))


@dataclass(frozen=True)
class ObjectScore:
    """One object of one sequence.

    Args:
        sequence: its name.
        object: its id, from 1.
        j: statistics of J over the frames.
        f: of F.
        frames: J and F of each scored frame, (n, 2).
    """

    sequence: str
    object: int
    j: Statistics
    f: Statistics
    frames: NDArray[np.float64]

    @property
    def jf(self) -> float:
        """The mean of J and F."""
        return (self.j.mean + self.f.mean) / 2


@dataclass(frozen=True)
class Scores:
    """Scores of a tree of results, by object."""

    objects: list[ObjectScore]

    @property
    def summary(self) -> dict[str, float]:
        """Means over objects, under the official names: ``J&F-Mean``, ``J-Mean``, ``J-Recall``, ``J-Decay``,
        ``F-Mean``, ``F-Recall``, ``F-Decay``."""
        parts = {
            f"{measure}-{name.title()}": float(
                np.mean([getattr(getattr(o, measure.lower()), name) for o in self.objects])
            )
            for measure in ("J", "F")
            for name in ("mean", "recall", "decay")
        }
        return {"J&F-Mean": (parts["J-Mean"] + parts["F-Mean"]) / 2, **parts}

    @property
    def per_object(self) -> dict[str, tuple[float, float]]:
        """Mean J and F by ``sequence_object``."""
        return {f"{o.sequence}_{o.object}": (o.j.mean, o.f.mean) for o in self.objects}

    @property
    def per_sequence(self) -> dict[str, float]:
        """J&F by sequence, the mean over its objects."""
        names = dict.fromkeys(o.sequence for o in self.objects)
        return {name: float(np.mean([o.jf for o in self.objects if o.sequence == name])) for name in names}


def score_sequence(name: str, truth: NDArray, results: NDArray) -> list[ObjectScore]:
    """Scores of all objects of one sequence.

    Args:
        name: of the sequence, for messages.
        truth: (T, H, W) integer ids of all frames; 255 is void.
        results: (T, H, W) integer ids; those of the first and the last frame are not read.

    Raises:
        UserError: if the results have an id beyond the objects of the first frame.
    """
    if truth.shape != results.shape or truth.ndim != 3 or len(truth) < 3:
        raise UserError(f"{name}: results of {results.shape} do not fit a truth of {truth.shape} (at least 3 frames)")
    void = truth == VOID
    count = int(np.where(void[0], 0, truth[0]).max())
    if results[1:-1].max() > count:
        raise UserError(f"{name}: the results have object {results[1:-1].max()}, the first frame has {count}")
    scores = []
    for object in range(1, count + 1):
        rows = []
        for t in range(1, len(truth) - 1):
            masks = truth[t] == object, results[t] == object, void[t]
            rows.append((region_similarity(*masks), boundary_f(*masks)))
        frames = np.array(rows)
        scores.append(ObjectScore(name, object, statistics(frames[:, 0]), statistics(frames[:, 1]), frames))
    return scores


def evaluate_results(results: str | Path, dataset: str | Path, *, split: str = "val") -> Scores:
    """Scores a tree of results as the official tool does.

    Args:
        results: ``SEQUENCE/00000.png``, ...: palette or gray images of object ids.
        dataset: a copy of DAVIS-2017 (``Annotations/480p``, ``ImageSets/2017``).
        split: the list of sequences in ``ImageSets/2017``. Without that folder, all sequences count.

    Raises:
        UserError: for a missing frame, a wrong size, an object that the first frame lacks, or the annotations of the
            unsupervised track.
    """
    results, dataset = Path(results), Path(dataset)
    return Scores([score for name in sequences(dataset, split) for score in score_folder(results, dataset, name)])


def score_folder(results: Path, dataset: Path, sequence: str) -> list[ObjectScore]:
    """Scores of all objects of one sequence of a tree of results; see :func:`evaluate_results`."""
    names = [path.name for path in frames(annotations(dataset) / sequence, ".png")]
    folder = results / sequence
    if absent := missing(folder, names[1:-1], "results have one PNG a frame"):
        raise UserError(absent[0])
    truth = [read_labels(annotations(dataset) / sequence / name).numpy() for name in names]
    found = [read_labels(folder / name).numpy() for name in names[1:-1]]
    if wrong := [name for name, ids in zip(names[1:-1], found, strict=True) if ids.shape != truth[0].shape]:
        raise UserError(f"{folder / wrong[0]} is not of the truth's size, {truth[0].shape}")
    edge = np.zeros_like(truth[0])
    return score_sequence(sequence, np.stack(truth), np.stack([edge, *found, edge]))


def annotations(dataset: Path) -> Path:
    """The folder of a data set's annotations. UserError for those of the unsupervised track, or none."""
    folder = dataset / "Annotations" / "480p"
    if "Annotations_unsupervised" in str(dataset) or (
        (dataset / "Annotations_unsupervised").is_dir() and not folder.is_dir()
    ):
        raise UserError(f"{dataset} has the annotations of the unsupervised track; get DAVIS-2017-trainval-480p.zip")
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}: give the folder that holds JPEGImages and Annotations")
    return folder


def sequences(dataset: Path, split: str = "val") -> list[str]:
    """Sequences of a split, in its order; those of the annotations, sorted, where there is no ``ImageSets``."""
    folder = annotations(dataset)
    listing = dataset / "ImageSets" / "2017" / f"{split}.txt"
    if not listing.parent.is_dir():
        names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    elif listing.is_file():
        names = listing.read_text(encoding="utf-8").split()
    else:
        raise UserError(f"there is no split {listing}")
    for name in names:
        if Path(name).name != name or name in (".", ".."):
            raise UserError(f"{listing}: {name!r} is no name of a sequence")
    if not names:
        raise UserError(f"{dataset} has no sequences")
    return names


def frames(folder: Path, suffix: str) -> list[Path]:
    """The frames of a sequence in order. UserError if there are none."""
    found = sorted(path for path in folder.glob(f"*{suffix}") if not path.name.startswith("."))
    if not found:
        raise UserError(f"{folder} has no {suffix} files")
    return found


def problems(dataset: Path, split: str = "val", *, exact: bool = True) -> list[str]:
    """What is wrong with a copy of the data, one line each.

    Args:
        dataset: the folder that holds ``JPEGImages`` and ``Annotations``.
        split: the list of sequences.
        exact: whether ``val`` must be the benchmark's 30 sequences, with their frame counts. Without it, and in other
            splits, images and annotations must only agree.
    """
    try:
        names = sequences(dataset, split)
        expected = {name: len(frames(annotations(dataset) / name, ".png")) for name in names}
    except UserError as error:
        return [str(error)]
    found = []
    if exact and split == "val":
        found += [f"{split}.txt lacks {name}" for name in VAL_FRAMES if name not in names]
        found += [f"{split}.txt has {name}, which the benchmark lacks" for name in names if name not in VAL_FRAMES]
        expected |= VAL_FRAMES
    for name, count in expected.items():
        for folder, suffix in ((annotations(dataset), ".png"), (dataset / "JPEGImages" / "480p", ".jpg")):
            have = len(list((folder / name).glob(f"*{suffix}")))
            if have != count:
                found.append(f"{folder / name} has {have} {suffix} files instead of {count}")
    return found


def propagate(
    extract: Extract, video: Iterable[Tensor | NDArray], first_mask: Tensor | NDArray, preset: str | Preset = "vfs"
) -> Iterator[NDArray[np.uint8]]:
    """Masks of every frame of a video from that of the first.

    Args:
        extract: normalized (1, 3, H, W) float32 -> features (1, C, h, w), in eval mode. The paper uses the third
            stage of a ResNet-50 at stride 8: strides changed and no dilation.
        video: frames (H, W, 3) uint8 RGB in order, read one at a time.
        first_mask: (H, W) integer object ids, 0 for the background.
        preset: ``vfs`` (the paper's), ``crw``, ``dino`` or a :class:`~vito_fast.evaluate.propagate.Preset`.

    Yields:
        (H, W) uint8 ids per frame; of the first frame the given mask itself, as official results have it.
    """
    preset = preset_of(preset)
    mask = torch.as_tensor(np.asarray(first_mask).astype(np.int64))
    mask = torch.where(mask == VOID, 0, mask)
    inputs: list[tuple[int, int]] = []

    def features() -> Iterator[Tensor]:
        for frame in video:
            image = propagation.prepare(torch.as_tensor(frame), preset)
            inputs[:] = [(image.shape[2], image.shape[3])]
            yield extract(image)[0]

    stream = features()
    first = next(stream)
    labels = propagation.first_labels(mask, (first.shape[1], first.shape[2]), preset).to(first.device)
    steps = propagation.propagate_features(itertools.chain([first], stream), labels, preset)
    for t, scores in enumerate(steps):
        original = (mask.shape[0], mask.shape[1])
        ids = propagation.to_mask(scores, original, inputs[0], preset).cpu() if t else mask.to(torch.uint8)
        yield ids.numpy()


def read_video(dataset: Path, sequence: str) -> Iterator[Tensor]:
    """Frames (H, W, 3) uint8 of a sequence, read one at a time."""
    for path in frames(dataset / "JPEGImages" / "480p" / sequence, ".jpg"):
        yield read_image(path).permute(1, 2, 0)
