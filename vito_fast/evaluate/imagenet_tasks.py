"""ImageNet's linear classifier, and the benchmarks that need its 1000 classes.

``imagenet`` trains the classifier once and saves it beside its result. ``imagenet_a``, ``imagenet_c``,
``imagenet_3dcc``, ``vid_robust``, ``shape_bias``, ``error_consistency`` and ``clickme`` read it from there.
"""

import csv
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from vito_fast.errors import UserError
from vito_fast.evaluate import human, robustness
from vito_fast.evaluate.data import IMAGES, counted, files_under, manifest
from vito_fast.evaluate.encoders import Encoder
from vito_fast.evaluate.folder_tasks import HEAD, Items, Linear, LinearOptions
from vito_fast.evaluate.folders import FolderOptions, Labeled, batches, encode, labeled_folder
from vito_fast.evaluate.linear import LinearProbe, load_probe
from vito_fast.evaluate.result import Encoded, Metric, Result, mean_metric
from vito_fast.evaluate.task import Check, Measured, Preset, Progress, Task, folder_name, gathered, own_share

CLASSES = 1000


@dataclass(frozen=True)
class ImageNetOptions(LinearOptions):
    """The probe's options."""

    subset: bool = False
    """Whether other counts than the benchmark's are scored; the result says so."""


class ImageNet(Linear):
    """Top-1 of the linear classifier."""

    name, title, options = "imagenet", "ImageNet, linear classifier", ImageNetOptions

    def found(self, data: Path, train: Labeled, val: Labeled, problems: list[str], options: ImageNetOptions) -> Check:
        """Counts classes and images of ``train/WNID/IMAGE`` and ``val/WNID/IMAGE``."""
        found = super().found(data, train, val, problems, options)
        wrong = counted("classes", len(train.classes), CLASSES)
        wrong += counted("training images", len(train.names), 1_281_167) + counted("val images", len(val.names), 50_000)
        return with_counts(found, wrong, subset=options.subset)


def with_counts(found: Check, wrong: Sequence[str], *, subset: bool) -> Check:
    """A check whose wrong counts are notes of a subset, and else problems."""
    values = {**found.__dict__, "notes" if subset else "problems": tuple(wrong)}
    return Check(**values)


@dataclass(frozen=True)
class Classifier:
    """An encoder with its linear classifier.

    Args:
        encoder: what makes features.
        probe: what reads them.
        classes: WordNet ids by number, sorted as ImageNet's classes are.
        options: how images are read.
        clean: top-1 on ImageNet's val.
    """

    encoder: Encoder
    probe: LinearProbe
    classes: list[str]
    options: FolderOptions
    clean: float

    def logits(self, paths: Sequence[Path], label: str) -> Tensor:
        """(N, classes) of image files."""
        progress, found = Progress(label, len(paths)), [torch.zeros(0, len(self.classes))]
        for batch in batches(paths, self.options):
            found.append(self.probe.logits(encode(self.encoder, torch.cat(batch), self.options)))
            progress.step(len(batch))
        return torch.cat(found)

    def numbers(self, names: Sequence[str]) -> list[int]:
        """Class numbers of WordNet ids. UserError naming one that the classifier lacks."""
        known = {name: number for number, name in enumerate(self.classes)}
        if absent := [name for name in names if name not in known]:
            raise UserError(f"{absent[0]} is no class of the classifier's {len(self.classes)}")
        return [known[name] for name in names]


@dataclass(frozen=True)
class HeadOptions:
    """Where the classifier is, and whether partial data count."""

    head: str = ""
    """A classifier's file; by default that of the encoder's own ``imagenet`` result in the same output folder."""
    subset: bool = False
    """Whether other counts than the benchmark's are scored; the result says so."""


class HeadTask(Task):
    """What tasks that read the classifier share: finding it, and results that are stale with another one."""

    _head: Path | None = None

    def run(self, encoder: Encoder, data: Path, preset: Preset, out: Path) -> Result:
        """As of any task; the classifier's digest is part of the result's key."""
        self._head = find_head(out / folder_name(encoder.record), preset.options, self.name)
        return super().run(encoder, data, preset, out)

    def key(self, preset: Preset, encoder: Encoded, manifest: Mapping[str, Any]) -> dict[str, str]:
        assert self._head is not None
        digest = hashlib.sha256(self._head.read_bytes()).hexdigest()
        return {**super().key(preset, encoder, manifest), "head": digest}

    def classifier(self, encoder: Encoder) -> Classifier:
        """The encoder with the classifier that ``run`` found. UserError if the two do not fit."""
        assert self._head is not None
        probe, notes = load_probe(self._head)
        try:
            options = FolderOptions(size=int(notes["size"]), features=notes["features"])  # type: ignore[arg-type]
            found = Classifier(encoder, probe, notes["classes"].split(" "), options, float(notes["top1"]))
        except (KeyError, ValueError) as error:
            raise UserError(f"{self._head} is no classifier of the task imagenet ({error})") from None
        sample = encode(encoder, torch.zeros(1, 3, options.size, options.size, dtype=torch.uint8), options)
        if sample.shape[1] != probe.weight.shape[1]:
            raise UserError(f"{self._head} reads {probe.weight.shape[1]} features, the encoder has {sample.shape[1]}")
        return found


def find_head(folder: Path, options: HeadOptions, task: str) -> Path:
    """The classifier's file. UserError that says how to train it."""
    paths = [Path(options.head)] if options.head else sorted(folder.glob(f"imagenet-*/{HEAD}"))
    if not paths or not paths[0].is_file():
        missing = f"there is no {options.head}" if options.head else f"{task} needs this encoder's ImageNet classifier"
        raise UserError(f"{missing}: run --tasks imagenet --data.imagenet PATH into the same --out first")
    return paths[0]


class ImageNetA(HeadTask):
    """Top-1 among the 200 classes of natural adversarial images."""

    name, title, options = "imagenet_a", "ImageNet-A, natural adversarial images", HeadOptions

    def check(self, data: Path, options: HeadOptions) -> Check:
        """Counts classes and images of ``WNID/IMAGE``."""
        try:
            items = labeled_folder(data)
        except UserError as error:
            return Check((str(error),))
        found = Check((), len(items.names), manifest(data, items.files), len(items.names))
        wrong = counted("classes", len(items.classes), 200) + counted("images", len(items.names), 7500)
        return with_counts(found, wrong, subset=options.subset)

    def measure(self, encoder: Encoder, data: Path, options: HeadOptions, work: Path) -> Measured:
        """Decides among the classes that have a folder."""
        classifier, items = self.classifier(encoder), labeled_folder(data)
        among = classifier.numbers(items.classes)
        own = own_share(range(len(items.names)))
        logits = classifier.logits([items.paths[i] for i in own], self.name)
        right = (logits[:, among].argmax(1) == items.labels[own]).tolist()
        found = gathered({items.names[i]: float(ok) for i, ok in zip(own, right, strict=True)}, items.names)
        metrics = {"top1": mean_metric(found.values(), "share")}
        metrics["top1 / clean"] = _relative(metrics["top1"], classifier.clean)
        return Measured(
            metrics, {name: {"top1": value} for name, value in found.items()}, _by_class(items, found, "top1")
        )


def _by_class(items: Labeled, scores: Mapping[str, float], metric: str) -> Items:
    labels = items.labels.tolist()
    rows: list[list[float]] = [[] for _ in items.classes]
    for name, label in zip(items.names, labels, strict=True):
        rows[label].append(scores[name])
    return {
        name: {metric: float(np.mean(values)) if values else None}
        for name, values in zip(items.classes, rows, strict=True)
    }


def _relative(metric: Metric, clean: float) -> Metric:
    return Metric(metric.value / clean if clean and metric.value is not None else None, "ratio", metric.n)


class ImageNetC(HeadTask):
    """Top-1 on corrupted copies of ImageNet's val, over that on the clean one."""

    name: ClassVar[str] = "imagenet_c"
    title: ClassVar[str] = "ImageNet-C, common corruptions"
    options = HeadOptions
    names: ClassVar[tuple[str, ...]] = robustness.CORRUPTIONS_C
    """The corruptions that count; all that are found if empty."""

    def check(self, data: Path, options: HeadOptions) -> Check:
        """Looks for each corruption and severity, ``CORRUPTION/SEVERITY/WNID/IMAGE``, and counts the images of one."""
        try:
            folders = self.folders(data)
            items = labeled_folder(next(iter(folders.values())))
        except UserError as error:
            return Check((str(error),))
        wrong = [f"{data} lacks {name}" for name in self.names if (name, 1) not in folders]
        wrong += counted("images of a corruption", len(items.names), 50_000)
        count = len(folders) * len(items.names)
        found = Check(
            (), count, manifest(data, [path for folder in folders.values() for path in files_under(folder)]), count
        )
        return with_counts(found, wrong, subset=options.subset)

    def folders(self, data: Path) -> dict[tuple[str, int], Path]:
        """Folders of the corruptions that count."""
        found = robustness.corruption_folders(data)
        return {key: path for key, path in found.items() if not self.names or key[0] in self.names}

    def measure(self, encoder: Encoder, data: Path, options: HeadOptions, work: Path) -> Measured:
        """Each rank takes whole folders."""
        classifier, folders = self.classifier(encoder), self.folders(data)
        scores = {}
        for key in own_share(list(folders)):
            items = labeled_folder(folders[key])
            numbers = torch.tensor(classifier.numbers(items.classes))[items.labels]
            logits = classifier.logits(items.paths, f"{self.name} {key[0]} {key[1]}")
            scores[f"{key[0]}/{key[1]}"] = float((logits.argmax(1) == numbers).double().mean())
        found = gathered(scores, [f"{name}/{severity}" for name, severity in folders])
        summary = robustness.corrupted_accuracy(classifier.clean, {key: found[f"{key[0]}/{key[1]}"] for key in folders})
        metrics = {"corrupted": mean_metric(summary.by_corruption.values(), "share")}
        metrics["corrupted / clean"] = _relative(metrics["corrupted"], classifier.clean)
        items_of: Items = {name: {"corrupted": value} for name, value in summary.by_corruption.items()}
        groups: Items = {name: {"top1": value} for name, value in found.items()}
        return Measured(
            metrics, items_of, groups, notes=("corrupted / clean accuracy; mCE would need AlexNet's errors",)
        )


class ImageNet3DCC(ImageNetC):
    """The same on corruptions that follow the scene's depth."""

    name, title, names = "imagenet_3dcc", "ImageNet-3DCC, 3D common corruptions", ()


class VidRobust(HeadTask):
    """pm-10 on ImageNet-Vid-Robust's reviewed neighbors."""

    name, title, options = "vid_robust", "ImageNet-Vid-Robust, pm-10", HeadOptions

    def check(self, data: Path, options: HeadOptions) -> Check:
        """Reads the metadata and looks for every frame."""
        try:
            videos = robustness.vid_robust(data)
        except UserError as error:
            return Check((str(error),))
        absent = [frame for frame in videos.frames if not (data / frame).is_file()]
        if absent:
            return Check((f"{data / absent[0]} is missing, and {len(absent) - 1} others: unpack the data set again",))
        paths = [data / frame for frame in videos.frames]
        metadata = [*(data / "metadata").glob("*.json"), data / "misc" / "rev_class_idx_map.json"]
        found = Check((), len(videos.sets), manifest(data, paths, metadata), len(paths))
        return with_counts(found, counted("anchors", len(videos.sets), 1109), subset=options.subset)

    def measure(self, encoder: Encoder, data: Path, options: HeadOptions, work: Path) -> Measured:
        """Decides among the 30 classes of ImageNet-VID, each by its best member."""
        classifier, videos = self.classifier(encoder), robustness.vid_robust(data)
        own = own_share(videos.frames)
        logits = videos.project(classifier.logits([data / frame for frame in own], self.name))
        decided = gathered(dict(zip(own, logits.argmax(1).tolist(), strict=True)), videos.frames)
        numbers = sorted(videos.members)
        correct = {frame: numbers[choice] in videos.labels[frame] for frame, choice in decided.items()}
        items: Items = {}
        for anchor, near in videos.sets.items():
            one = robustness.pm_k(correct, {anchor: near})
            items[anchor] = {"pm-10": one.worst, "anchor": one.anchor}
        return Measured(
            {key: mean_metric((i[key] for i in items.values()), "share") for key in ("pm-10", "anchor")}, items
        )


def cue_conflict(data: Path) -> list[tuple[Path, str, str]]:
    """Images with the classes of their shape and texture, by ``SHAPE/SHAPE1-TEXTURE2.png``. UserError if none is."""
    found = []
    for path in sorted(p for p in data.rglob("*") if p.suffix.lower() in IMAGES):
        shape, _, texture = path.stem.rpartition("_")[2].partition("-")
        classes = shape.rstrip("0123456789"), texture.rstrip("0123456789")
        if not set(classes) <= set(human.MEMBERS):
            raise UserError(f"{path} is not named SHAPE1-TEXTURE2, with two of the 16 classes")
        found.append((path, *classes))
    if not found:
        raise UserError(f"{data} has no images: give the folder cue-conflict of model-vs-human")
    return found


class ShapeBias(HeadTask):
    """Shape decisions among shape and texture decisions on cue-conflict images."""

    name, title, options = "shape_bias", "shape bias on cue-conflict images", HeadOptions

    def check(self, data: Path, options: HeadOptions) -> Check:
        """Counts the images."""
        try:
            images = cue_conflict(data)
        except UserError as error:
            return Check((str(error),))
        found = Check((), len(images), manifest(data, [path for path, *_ in images]), len(images))
        return with_counts(found, counted("images", len(images), 1280), subset=options.subset)

    def decisions(self, encoder: Encoder, images: Sequence[tuple[Path, str, str]]) -> list[str]:
        """The class, of 16, of each image."""
        classifier = self.classifier(encoder)
        if len(classifier.classes) != CLASSES:
            raise UserError(
                f"{self.name} needs a classifier of ImageNet's {CLASSES} classes, not {len(classifier.classes)}"
            )
        own = own_share(range(len(images)))
        probabilities = classifier.logits([images[i][0] for i in own], self.name).softmax(1).numpy()
        chosen = human.to_16_classes(probabilities) if own else []
        return list(gathered(dict(zip(map(str, own), chosen, strict=True)), map(str, range(len(images)))).values())

    def measure(self, encoder: Encoder, data: Path, options: HeadOptions, work: Path) -> Measured:
        """Items are the images decided by either cue."""
        images = cue_conflict(data)
        chosen = self.decisions(encoder, images)
        items: Items = {}
        for (path, shape, texture), choice in zip(images, chosen, strict=True):
            if shape != texture:
                by_cue = float(choice == shape) if choice in (shape, texture) else None
                items[path.name] = {"shape bias": by_cue, "decided by a cue": float(by_cue is not None)}
        metrics = {
            key: mean_metric((i[key] for i in items.values()), "share") for key in ("shape bias", "decided by a cue")
        }
        groups: Items = {
            name: {
                "shape bias": mean_metric(
                    (items[p.name]["shape bias"] for p, s, t in images if s == name != t), ""
                ).value
            }
            for name in human.MEMBERS
        }
        return Measured(metrics, items, groups)


def human_responses(data: Path) -> dict[str, dict[str, tuple[str, str]]]:
    """Responses of people, by subject and image: (response, category). From all CSV files of a folder.

    Raises:
        UserError: for a file without the columns subj, object_response, category and imagename, or no file.
    """
    found: dict[str, dict[str, tuple[str, str]]] = {}
    for path in sorted(data.rglob("*.csv")):
        with open(path, newline="", encoding="utf-8") as file:
            rows = csv.DictReader(file)
            if absent := {"subj", "object_response", "category", "imagename"} - set(rows.fieldnames or ()):
                raise UserError(f"{path} has no column {min(absent)}: give the raw data of model-vs-human")
            for row in rows:
                image = row["imagename"].rpartition("_")[2]
                found.setdefault(row["subj"], {})[image] = row["object_response"], row["category"]
    people = {name: answers for name, answers in found.items() if name.startswith("subject")}
    if not people:
        raise UserError(f"{data} has no CSV files of subjects: add raw-data/cue-conflict of model-vs-human")
    return people


class ErrorConsistency(ShapeBias):
    """The mean kappa with each person on cue-conflict images; right is the shape."""

    name, title = "error_consistency", "error consistency with people"

    def check(self, data: Path, options: HeadOptions) -> Check:
        """Also looks for the people's responses to the same images."""
        found = super().check(data, options)
        if found.problems:
            return found
        try:
            people = human_responses(data)
        except UserError as error:
            return Check((str(error),))
        names = {path.name.rpartition("_")[2] for path, *_ in cue_conflict(data)}
        for subject, answers in people.items():
            if absent := sorted(names - set(answers)):
                return Check((f"{subject} has no response to {absent[0]}, and {len(absent) - 1} others",))
        files = [path for path, *_ in cue_conflict(data)]
        return Check(**{**found.__dict__, "manifest": manifest(data, files, data.rglob("*.csv"))})

    def measure(self, encoder: Encoder, data: Path, options: HeadOptions, work: Path) -> Measured:
        """Items are people; the agreement among them is given beside it."""
        images, people = cue_conflict(data), human_responses(data)
        chosen = self.decisions(encoder, images)
        right = np.array([choice == shape for (_, shape, _), choice in zip(images, chosen, strict=True)])
        names = [path.name.rpartition("_")[2] for path, *_ in images]
        rows = {s: np.array([a[n][0] == a[n][1] for n in names]) for s, a in people.items()}
        items: Items = {
            subject: {
                "kappa": human.error_consistency(right, row),
                "kappa among people": float(
                    np.mean([human.error_consistency(row, other) for name, other in rows.items() if name != subject])
                )
                if len(rows) > 1
                else None,
            }
            for subject, row in rows.items()
        }
        metrics = {k: mean_metric((i[k] for i in items.values()), "kappa") for k in ("kappa", "kappa among people")}
        metrics["accuracy"] = mean_metric(right.astype(float).tolist(), "share")
        return Measured(metrics, items)
