"""Robustness of a classifier: perturbed neighbors in video, natural adversarial images, corruptions.

Sources: Shankar et al., "Do Image Classifiers Generalize Across Time?" (2021), for pm-k; Hendrycks et al., "Natural
Adversarial Examples" (2021), for ImageNet-A; Hendrycks & Dietterich (2019) for ImageNet-C; Kar et al., "3D Common
Corruptions" (2022). Traps: pm-k officially reads neighbor sets that people reviewed, and the anchor itself counts; a
plain window of +-k frames is another number and has another name here (:func:`window_sets`). mCE divides by AlexNet's
errors; the number here is corrupted over clean accuracy. ImageNet-A is decided among its own 200 classes.
"""

import json
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vito_fast.errors import UserError

CORRUPTIONS_C = (
    "gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "snow",
    "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression",
)  # fmt: skip
"""The 15 corruptions of ImageNet-C; its four extra ones are in no average."""


@dataclass(frozen=True)
class PmK:
    """Accuracy on anchors and on the worst frame near them.

    Args:
        anchor: accuracy on the anchor frames.
        worst: fraction of anchors with every frame of their set right, the anchor included.
        wrong: for each anchor that is right and whose set is not, the frames that are wrong.
        n: number of anchors.
    """

    anchor: float
    worst: float
    wrong: dict[Hashable, list[Hashable]]
    n: int


def pm_k(
    correct: Mapping[Any, bool] | ArrayLike,
    sets: Mapping[Any, Iterable[Hashable]] | Sequence[tuple[Hashable, Iterable[Hashable]]],
) -> PmK:
    """pm-k accuracy.

    Args:
        correct: whether each frame is right, by name, or an array indexed by number.
        sets: the neighbors of each anchor (which need not repeat the anchor), a mapping or pairs.

    Raises:
        ValueError: without a set, or for a frame that has no decision, which is named.
    """
    table: Mapping[Any, Any] = correct if isinstance(correct, Mapping) else dict(np.ndenumerate(np.asarray(correct)))

    def right(frame: Hashable) -> bool:
        key = frame if isinstance(correct, Mapping) or isinstance(frame, tuple) else (frame,)
        if key not in table:
            raise ValueError(f"no decision for the frame {frame!r}")
        return bool(table[key])

    pairs = list(sets.items() if isinstance(sets, Mapping) else sets)
    if not pairs:
        raise ValueError("pm-k needs at least one set")
    anchors, worst, wrong = 0, 0, {}
    for anchor, neighbors in pairs:
        failed = [frame for frame in neighbors if not right(frame)]
        anchors += right(anchor)
        worst += right(anchor) and not failed
        if right(anchor) and failed:
            wrong[anchor] = failed
    return PmK(anchors / len(pairs), worst / len(pairs), wrong, len(pairs))


def window_sets(length: int, anchor: int, k: int = 10) -> list[int]:
    """All frames within ``k`` of an anchor inside a video of that length, the anchor left out. Not the official sets:
    those hold reviewed frames only."""
    if not 0 <= anchor < length:
        raise ValueError(f"anchor {anchor} is not in a video of {length} frames")
    return [t for t in range(max(anchor - k, 0), min(anchor + k + 1, length)) if t != anchor]


def corruption_folders(root: Path, severities: Sequence[int] = (1, 2, 3, 4, 5)) -> dict[tuple[str, int], Path]:
    """The folders of ImageNet-C or ImageNet-3DCC, ``CORRUPTION/SEVERITY/WNID/IMAGE``, by corruption and severity.

    Folders of groups (``noise/gaussian_noise/...``), as in the archives of ImageNet-C, are looked into.

    Raises:
        UserError: if there is no corruption, or one lacks a severity.
    """
    wanted = [str(severity) for severity in severities]
    found: dict[tuple[str, int], Path] = {}
    for folder in sorted([*root.glob("*"), *root.glob("*/*")]):
        if not folder.is_dir() or not any((folder / name).is_dir() for name in wanted):
            continue
        if absent := [name for name in wanted if not (folder / name).is_dir()]:
            raise UserError(f"{folder} lacks severity {absent[0]}: unpack its archive again")
        found |= {(folder.name, severity): folder / str(severity) for severity in severities}
    if not found:
        raise UserError(f"{root} has no CORRUPTION/SEVERITY folders")
    return found


def restricted_accuracy(logits: ArrayLike, labels: ArrayLike, classes: Sequence[int]) -> float:
    """Accuracy of decisions among some classes, as ImageNet-A's 200.

    Args:
        logits: (N, all classes).
        labels: (N,) positions in ``classes``.
        classes: indices among all classes.
    """
    chosen = np.asarray(logits)[:, list(classes)].argmax(1)
    return float((chosen == np.asarray(labels)).mean())


@dataclass(frozen=True)
class Corrupted:
    """Accuracies under corruption.

    Args:
        clean: accuracy without.
        corrupted: the mean over corruptions of the mean over their severities.
        relative: ``corrupted`` over ``clean``: "corrupted / clean accuracy". It is no mCE.
        by_corruption: the mean over severities of each.
    """

    clean: float
    corrupted: float
    relative: float
    by_corruption: dict[str, float]


def corrupted_accuracy(clean: float, accuracies: Mapping[tuple[str, int], float]) -> Corrupted:
    """Summary of accuracies by (corruption, severity); each corruption has the same weight."""
    if not accuracies:
        raise ValueError("no accuracies under corruption")
    names = dict.fromkeys(name for name, _ in accuracies)
    means = {name: float(np.mean([value for key, value in accuracies.items() if key[0] == name])) for name in names}
    mean = float(np.mean(list(means.values())))
    return Corrupted(clean, mean, mean / clean if clean else float("nan"), means)


@dataclass(frozen=True)
class VidRobust:
    """ImageNet-Vid-Robust: reviewed neighbors and labels of frames, by path relative to the data set.

    Args:
        root: of the images.
        sets: the reviewed neighbors of each anchor.
        labels: the right classes of each frame, among the 30 of ImageNet-VID.
        members: the ImageNet classes of each of the 30.
    """

    root: Path
    sets: dict[str, list[str]]
    labels: dict[str, list[int]]
    members: dict[int, list[int]]

    @property
    def frames(self) -> list[str]:
        """Every frame that is needed, sorted."""
        return sorted({frame for anchor, others in self.sets.items() for frame in (anchor, *others)})

    def project(self, logits: ArrayLike) -> NDArray[np.float64]:
        """Scores (N, 30) from ImageNet's (N, 1000): the largest of each class's members."""
        values = np.asarray(logits, dtype=np.float64)
        return np.stack([values[:, self.members[number]].max(1) for number in sorted(self.members)], 1)

    def score(self, logits: ArrayLike, frames: Sequence[str]) -> PmK:
        """pm-10 from logits (N, 1000) of the named frames."""
        numbers = sorted(self.members)
        chosen = [numbers[i] for i in self.project(logits).argmax(1)]
        return pm_k({f: c in self.labels[f] for f, c in zip(frames, chosen, strict=True)}, self.sets)


def vid_robust(root: Path) -> VidRobust:
    """Reads ImageNet-Vid-Robust: ``metadata/pmsets.json``, ``metadata/labels.json``, ``misc/rev_class_idx_map.json``.

    Raises:
        UserError: for a missing or wrong file, or a path that leaves the data set.
    """
    sets = _json(root / "metadata" / "pmsets.json")
    labels = _json(root / "metadata" / "labels.json")
    members = _json(root / "misc" / "rev_class_idx_map.json")
    try:
        found = VidRobust(
            root,
            {str(anchor): [str(frame) for frame in frames] for anchor, frames in sets.items()},
            {str(f): [int(v) for v in (value if isinstance(value, list) else [value])] for f, value in labels.items()},
            {int(number): [int(index) for index in indices] for number, indices in members.items()},
        )
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{root}: the metadata are not those of ImageNet-Vid-Robust ({error})") from None
    for frame in found.frames:
        if frame not in found.labels:
            raise UserError(f"{root / 'metadata' / 'labels.json'} has no label for {frame}")
        if Path(frame).is_absolute() or ".." in Path(frame).parts:
            raise UserError(f"{root / 'metadata' / 'pmsets.json'}: {frame} leaves the data set")
    return found


def _json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object")
    return value
