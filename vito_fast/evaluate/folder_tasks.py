"""Tasks on any labeled folder, ``train/CLASS/FILE`` and ``val/CLASS/FILE`` of images or videos.

``knn`` and ``linear`` classify files, ``corruptions`` classifies corrupted ones, ``pmk`` frames near a video's middle.
The last two use the k-NN vote, so that nothing is trained.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vito_fast.errors import UserError
from vito_fast.evaluate import neighbours, robustness
from vito_fast.evaluate.corruptions import CORRUPTIONS, corrupt
from vito_fast.evaluate.data import IMAGES, manifest
from vito_fast.evaluate.encoders import Encoder
from vito_fast.evaluate.features import FeatureCache
from vito_fast.evaluate.folders import (
    VIDEOS,
    FolderOptions,
    Labeled,
    encode,
    features,
    features_note,
    frame_count,
    read_frames,
    read_item,
    train_and_val,
)
from vito_fast.evaluate.linear import STRENGTHS, LinearProbe, choose_l2, fit
from vito_fast.evaluate.pictures import save_strip
from vito_fast.evaluate.result import Metric, mean_metric
from vito_fast.evaluate.task import Check, Measured, Progress, Task, barrier, gathered, own_share, rank_and_size

Items = dict[str, dict[str, float | None]]
HEAD = "head.safetensors"
"""The classifier of ``linear``, in its folder."""


@dataclass(frozen=True)
class KnnOptions(FolderOptions):
    """The vote. Values are fixed ahead: they are no parameters to tune on val."""

    k: int = 20
    temperature: float = 0.07


@dataclass(frozen=True)
class LinearOptions(FolderOptions):
    """The regularizations to choose from, on a share of train."""

    strengths: tuple[float, ...] = STRENGTHS
    holdout: float = 0.2


@dataclass(frozen=True)
class CorruptionsOptions(KnnOptions):
    """Which corruptions, and the seed of their noise."""

    names: tuple[str, ...] = tuple(CORRUPTIONS)
    severities: tuple[int, ...] = (1, 2, 3, 4, 5)
    seed: int = 0


@dataclass(frozen=True)
class PmKOptions(KnnOptions):
    """The window around the anchor, a video's middle frame."""

    window: int = 10
    """Frames before and after. All of them count; the official sets hold reviewed frames only."""


class FolderTask(Task):
    """What tasks on a labeled folder share."""

    passes = 1
    """Times that each file of val goes through the encoder."""

    def check(self, data: Path, options: Any) -> Check:
        """Lists both parts, and refuses files of val that are in train."""
        try:
            train, val = train_and_val(data)
            problems = self.problems(train, val, options)
        except UserError as error:
            return Check((str(error),))
        return self.found(data, train, val, problems, options)

    def found(self, data: Path, train: Labeled, val: Labeled, problems: list[str], options: Any) -> Check:
        """What both parts amount to."""
        frames = [options.frames if Path(n).suffix.lower() in VIDEOS else 1 for n in train.names + val.names]
        images = sum(frames[: len(train.names)]) + self.passes * sum(frames[len(train.names) :])
        found = manifest(data, train.files + val.files)
        return Check(tuple(problems), len(val.names), found, images, (options.size, options.size))

    def problems(self, train: Labeled, val: Labeled, options: Any) -> list[str]:
        """What else is wrong, one line each."""
        return []


def classification(
    val: Labeled, scores: Tensor, seeds: dict[str, int] | None = None, notes: tuple[str, ...] = ()
) -> Measured:
    """Top-1 and, beyond five classes, top-5 of scores (N, classes), by item and by class."""
    order = scores.argsort(dim=1, descending=True, stable=True)
    right = order == val.labels[:, None]
    values = {"top1": right[:, 0].double()}
    if len(val.classes) > 5:
        values["top5"] = right[:, :5].any(1).double()
    items: Items = {name: {key: float(v[i]) for key, v in values.items()} for i, name in enumerate(val.names)}
    groups = {}
    for number, name in enumerate(val.classes):
        own = values["top1"][val.labels == number]
        groups[name] = {"top1": float(own.mean()) if len(own) else None}
    metrics = {key: mean_metric(v.tolist(), "share") for key, v in values.items()}
    return Measured(metrics, items, groups, seeds or {}, notes=notes)


class Knn(FolderTask):
    """Top-1 of the weighted vote of the k nearest files of train."""

    name, title, options = "knn", "k nearest neighbors on a labeled folder", KnnOptions

    def measure(self, encoder: Encoder, data: Path, options: KnnOptions, work: Path) -> Measured:
        """Encodes both parts and votes; the picture shows val beside its nearest files."""
        train, val = train_and_val(data)
        cache = FeatureCache(work.parent / "features")
        bank = features(encoder, train, options, cache, label="knn train")
        queries = features(encoder, val, options, cache, label="knn val")
        scores = neighbours.votes(
            bank, train.labels, queries, k=options.k, temperature=options.temperature, classes=len(train.classes)
        )
        measured = classification(val, scores)
        if rank_and_size()[0] == 0:
            _neighbor_picture(train, val, bank, queries, options).save(work / "neighbors.png")
        media = {"from left: a query, its four nearest files of train": "neighbors.png"}
        notes = features_note(encoder, options)
        return Measured(measured.metrics, measured.items, measured.groups, media=media, notes=notes)


def _neighbor_picture(
    train: Labeled, val: Labeled, bank: Tensor, queries: Tensor, options: FolderOptions
) -> Image.Image:
    """Five queries, evenly spaced in val, each beside its four nearest files."""
    rows = []
    unit = torch.nn.functional.normalize(bank, dim=1)
    for i in np.linspace(0, len(val.names) - 1, min(5, len(val.names))).round().astype(int):
        similarity = unit @ torch.nn.functional.normalize(queries[i], dim=0)
        near = similarity.topk(min(4, len(unit))).indices.tolist()
        paths = [val.paths[i], *(train.paths[j] for j in near)]
        rows.append([_thumbnail(read_item(path, options)[0]) for path in paths])
    return Image.fromarray(np.concatenate([np.concatenate(row, 1) for row in rows]))


def _thumbnail(picture: Tensor, side: int = 96) -> np.ndarray:
    return np.asarray(Image.fromarray(picture.permute(1, 2, 0).numpy()).resize((side, side)))


class Linear(FolderTask):
    """Top-1 of multinomial logistic regression on frozen features."""

    name, title, options = "linear", "linear classifier on a labeled folder", LinearOptions

    def measure(self, encoder: Encoder, data: Path, options: LinearOptions, work: Path) -> Measured:
        """Chooses the regularization inside train, fits on all of train, scores val once, saves the classifier."""
        train, val = train_and_val(data)
        cache = FeatureCache(work.parent / "features")
        bank = features(encoder, train, options, cache, label=f"{self.name} train")
        queries = features(encoder, val, options, cache, label=f"{self.name} val")
        probe = self.train(encoder, bank, train, options)
        measured = classification(val, probe.logits(queries), notes=(f"l2 = {probe.l2:g}, chosen inside train",))
        if rank_and_size()[0] == 0:
            notes = {"classes": " ".join(train.classes), "size": str(options.size), "features": options.features}
            probe.save(work / HEAD, **notes, top1=repr(measured.metrics["top1"].value))
        barrier()
        return measured

    def train(self, encoder: Encoder, bank: Tensor, train: Labeled, options: LinearOptions) -> LinearProbe:
        """The classifier; every rank computes the same one."""
        bank, labels = bank.to(encoder.device), train.labels.to(encoder.device)
        classes = len(train.classes)
        l2, _ = choose_l2(bank, labels, classes, strengths=options.strengths, share=options.holdout)
        return fit(bank, labels, classes, l2=l2)


class Corruptions(FolderTask):
    """Accuracy of the vote on corrupted files of val, over that on clean ones."""

    name, title, options = "corruptions", "corruptions on a labeled folder", CorruptionsOptions

    def problems(self, train: Labeled, val: Labeled, options: CorruptionsOptions) -> list[str]:
        return [
            f"unknown corruption '{n}': choose from {', '.join(CORRUPTIONS)}"
            for n in options.names
            if n not in CORRUPTIONS
        ]

    def measure(self, encoder: Encoder, data: Path, options: CorruptionsOptions, work: Path) -> Measured:
        """Each rank corrupts its share of val. The noise of a file depends on its name and the seed alone."""
        train, val = train_and_val(data)
        bank = features(encoder, train, options, FeatureCache(work.parent / "features"), label="corruptions train")
        kinds = [("clean", 0), *((name, severity) for name in options.names for severity in options.severities)]
        truth = dict(zip(val.names, val.labels.tolist(), strict=True))
        own = own_share(val.names)
        progress, found = Progress("corruptions val", len(own)), {}
        for name in own:
            pictures, salt = read_item(val.root / name, options), f"{options.seed}/{name}"
            changed = [pictures if k == "clean" else corrupted(pictures, k, severity, salt) for k, severity in kinds]
            vectors = encode(encoder, torch.cat(changed), options).unflatten(0, (len(kinds), -1)).mean(1)
            votes = neighbours.knn(bank, train.labels, vectors, k=options.k, temperature=options.temperature)
            found[name] = (votes == truth[name]).tolist()
            progress.step()
        right = np.array(list(gathered(found, val.names).values()))
        share = right.mean(0)
        accuracies = {kind: float(value) for kind, value in zip(kinds[1:], share[1:], strict=True)}
        scores = robustness.corrupted_accuracy(float(share[0]), accuracies)
        items: Items = {
            name: {"corrupted": float(row[1:].mean()), "clean": float(row[0])}
            for name, row in zip(val.names, right, strict=True)
        }
        metrics = {key: mean_metric((item[key] for item in items.values()), "share") for key in ("corrupted", "clean")}
        metrics["corrupted / clean"] = Metric(scores.relative, "ratio", len(items))
        groups = {name: {"corrupted": value} for name, value in scores.by_corruption.items()}
        notes = features_note(encoder, options)
        return Measured(metrics, items, groups, {"seed": options.seed}, notes=notes)


def corrupted(pictures: Tensor, kind: str, severity: int, salt: str) -> Tensor:
    """Pictures (T, 3, H, W) uint8 under a corruption whose noise ``salt`` decides."""
    seed = int.from_bytes(hashlib.sha256(f"{salt}/{kind}/{severity}".encode()).digest()[:8], "little")
    arrays = [corrupt(p.permute(1, 2, 0).numpy(), kind, severity, seed + t) for t, p in enumerate(pictures)]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


class PmK(FolderTask):
    """Accuracy of the vote on the middle frame of each video of val, and on the worst frame near it."""

    name, title, options = "pmk", "frames near a frame, on a labeled folder of videos", PmKOptions

    def problems(self, train: Labeled, val: Labeled, options: PmKOptions) -> list[str]:
        images = [name for name in val.names if Path(name).suffix.lower() in IMAGES]
        return [f"{val.root / images[0]} is an image; pmk reads videos"] if images else []

    def measure(self, encoder: Encoder, data: Path, options: PmKOptions, work: Path) -> Measured:
        """Votes of the frames of train, one by one. Pictures show an anchor beside a frame that fails."""
        train, val = train_and_val(data)
        cache = FeatureCache(work.parent / "features")
        bank = features(encoder, train, options, cache, mean=False, label="pmk train")
        labels = train.labels.repeat_interleave(bank.shape[1])
        truth = dict(zip(val.names, val.labels.tolist(), strict=True))
        own = own_share(val.names)
        progress, correct = Progress("pmk val", len(own)), {}
        pairs: dict[str, list[np.ndarray]] = {}
        for name in own:
            path = val.root / name
            count = frame_count(path)
            anchor = count // 2
            frames = sorted([anchor, *robustness.window_sets(count, anchor, options.window)])
            pictures = read_frames(path, frames, options.size)
            votes = neighbours.knn(
                bank.flatten(0, 1),
                labels,
                encode(encoder, pictures, options),
                k=options.k,
                temperature=options.temperature,
            )
            right = (votes == truth[name]).tolist()
            correct[name] = {"anchor": anchor, **dict(zip(map(str, frames), right, strict=True))}
            wrong = [i for i, ok in enumerate(right) if not ok]
            if right[frames.index(anchor)] and wrong and len(pairs) < 4:
                pair = pictures[[frames.index(anchor), wrong[0]]]
                pairs[name] = list(pair.permute(0, 2, 3, 1).numpy())
            progress.step()
        everyone = gathered(correct, val.names)
        table = {(name, int(t)): ok for name, row in everyone.items() for t, ok in row.items() if t != "anchor"}
        items: Items = {}
        for name, row in everyone.items():
            near = [(name, int(t)) for t in row if t != "anchor" and int(t) != row["anchor"]]
            one = robustness.pm_k(table, {(name, row["anchor"]): near})
            items[name] = {f"pm-{options.window}": one.worst, "anchor": one.anchor}
        metrics = {
            key: mean_metric((item[key] for item in items.values()), "share") for key in next(iter(items.values()))
        }
        media = {}
        for number, (name, picture) in enumerate(pairs.items() if rank_and_size()[0] == 0 else ()):
            media[f"{name}: right, and wrong nearby"] = save_strip(work / f"pair{number}.png", picture)
        notes = features_note(encoder, options)
        notes += (f"plain window of {options.window} frames, not the reviewed sets of ImageNet-Vid-Robust",)
        return Measured(metrics, items, media=media, notes=notes)
