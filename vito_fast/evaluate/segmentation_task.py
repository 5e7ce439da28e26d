"""PASCAL VOC 2012 and ADE20K: semantic segmentation with an FCN head, fine-tuned end to end, or a linear one, frozen.

The FCN is MoCo's, which BYOL, DetCon and VITO follow: the last stage at stride 16 with dilation, two 3 x 3 convolutions
of 256 channels and dilation 6, and a 1 x 1 classifier. torchvision's FCN is another network.
"""

import abc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as T

from vito_fast.errors import UserError
from vito_fast.evaluate import segmentation
from vito_fast.evaluate.augment import photometric_distortion
from vito_fast.evaluate.data import counted, manifest, missing, read_image, read_labels
from vito_fast.evaluate.encoders import Encoder, with_stride
from vito_fast.evaluate.finetune import Recipe, finetune, generator
from vito_fast.evaluate.result import Metric, deviation, draws, mean_metric
from vito_fast.evaluate.segmentation import IGNORE
from vito_fast.evaluate.task import Check, Measured, Progress, Task, gathered, own_share, rank_and_size

WIDTH = 256
"""Channels of the FCN's convolutions."""
VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip


@dataclass(frozen=True)
class SegmentationOptions(Recipe):
    """The recipe, the head, and the size of crops."""

    head: Literal["fcn", "linear"] = "fcn"
    """fcn: MoCo's. linear: batch norm without scale and one 1 x 1 convolution."""
    stride: int = 16
    """Of the features; layers beyond it are dilated."""
    crop: int = 512
    """Side of a training crop in pixels."""
    scales: tuple[float, float] = (0.5, 2.0)
    """Range of the factor by which a training image is resized, uniform."""
    photometric: bool = False
    """mmsegmentation's changes of brightness, contrast, saturation and hue in training."""
    test_short: int = 0
    """Short side of a test image in pixels; 0 = as it is. Masks are scored at the original size."""
    seed: int = 0
    subset: bool = False
    """Whether a copy with another number of images than the benchmark's is scored; the result says so."""


Pair = tuple[Path, Path]


class Segmentation(Task):
    """Mean IoU on the validation images of a data set that a subclass lists."""

    options = SegmentationOptions
    counts: ClassVar[tuple[int, int]]
    zero_is_ignored: ClassVar[bool]

    @abc.abstractmethod
    def pairs(self, data: Path) -> tuple[list[Pair], list[Pair]]:
        """Training and validation pairs of an image and its labels. UserError for another layout."""

    @abc.abstractmethod
    def class_names(self, data: Path) -> list[str]:
        """Names of the classes, in the order of their numbers."""

    def check(self, data: Path, options: SegmentationOptions) -> Check:
        """Counts both sets, looks for every file, and reads a few labels."""
        try:
            train, val = self.pairs(data)
        except UserError as error:
            return Check((str(error),))
        names = [str(path.relative_to(data)) for pair in train + val for path in pair]
        problems = missing(data, names, "the lists name it")
        lines = counted("training images", len(train), self.counts[0])
        lines += counted("validation images", len(val), self.counts[1])
        notes = lines if options.subset else []
        problems += [] if options.subset else lines
        if not problems:
            some = [labels for _, labels in val[:: max(1, len(val) // 20)]]
            problems += label_problems(some, len(self.class_names(data)), self)
        files = [] if problems else [path for pair in train for path in pair] + [image for image, _ in val]
        labels = [] if problems else [labels for _, labels in val]
        images = 3 * options.steps(len(train)) * options.batch_size + len(val)
        size = (options.crop, options.crop)
        return Check(tuple(problems), len(val), manifest(data, files, labels), images, size, True, notes=tuple(notes))

    def measure(self, encoder: Encoder, data: Path, options: SegmentationOptions, work: Path) -> Measured:
        """Fine-tunes on the training images, then scores the validation images."""
        train, val = self.pairs(data)
        names = self.class_names(data)
        torch.manual_seed(options.seed)
        model: Any = SegmentationModel(encoder, len(names), options)
        crops = TrainCrops(train, options, self.read_labels, encoder.mean)
        finetune(model, crops, options, work, encoder.device, seed=options.seed, label=f"{self.name} training")
        found, media = self._score(model, encoder, val, len(names), options, work)
        counts = np.stack(list(found.values()))  # (images,3,classes): intersection, truth, prediction
        per_image = {name: _image_scores(each) for name, each in found.items()}
        total = counts.sum(0)
        iou = _iou(total)
        miou, accuracy = float(np.nanmean(iou)), float(total[0].sum() / total[1].sum())
        resamples = resampled_miou(counts)
        metrics = {
            "miou": Metric(miou, "share", len(val), deviation(resamples)),
            "pixel_accuracy": Metric(accuracy, "share", len(val)),
            "image_miou": mean_metric((scores["image_miou"] for scores in per_image.values()), "share"),
        }
        groups = {name: {"iou": None if np.isnan(v) else float(v)} for name, v in zip(names, iou, strict=True)}
        notes = ("standard error of miou: bootstrap over images; image_miou is the mean over images, another number",)
        seeds = {"seed": options.seed}
        return Measured(metrics, per_image, groups, seeds, media, notes, {"miou": resamples.tolist()})

    def _score(
        self, model: Any, encoder: Encoder, val: list[Pair], classes: int, options: SegmentationOptions, work: Path
    ) -> tuple[dict[str, np.ndarray], dict[str, str]]:
        own, media = own_share(val), {}
        progress = Progress(f"{self.name} validation", len(own))
        found = {}
        for number, (image_path, labels_path) in enumerate(own):
            image, truth = read_image(image_path), self.read_labels(labels_path)
            prediction = model.predict(image.to(encoder.device), options.test_short).cpu()
            matrix = segmentation.confusion_matrix(truth, prediction, classes).numpy()
            found[image_path.stem] = np.stack([np.diag(matrix), matrix.sum(1), matrix.sum(0)])
            if number < 4 and rank_and_size()[0] == 0:
                media[f"{image_path.stem}: image, truth, prediction"] = _picture(
                    work, image_path.stem, image, truth, prediction
                )
            progress.step()
        return gathered(found, (image.stem for image, _ in val)), media

    def read_labels(self, path: Path) -> Tensor:
        """Classes (H,W) uint8; ignored pixels are 255."""
        labels = read_labels(path)
        return segmentation.reduce_zero_label(labels) if self.zero_is_ignored else labels


class Pascal(Segmentation):
    """VOC 2012: ``JPEGImages``, ``SegmentationClass``, ``SegmentationClassAug`` and ``ImageSets/Segmentation``."""

    name, title = "pascal", "PASCAL VOC 2012, semantic segmentation"
    counts, zero_is_ignored = (10_582, 1_449), False

    def pairs(self, data: Path) -> tuple[list[Pair], list[Pair]]:
        """``train_aug`` (SBD's labels) and ``val``."""
        lists = data / "ImageSets" / "Segmentation"
        for folder, hint in (
            (lists, "give the folder VOCdevkit/VOC2012"),
            (data / "SegmentationClassAug", "get SBD's labels, on which train_aug rests"),
        ):
            if not folder.is_dir():
                raise UserError(f"there is no folder {folder}: {hint}")
        names = next((lists / name for name in ("train_aug.txt", "trainaug.txt") if (lists / name).is_file()), None)
        if names is None:
            raise UserError(f"{lists} has no train_aug.txt: get the list of 10,582 names that comes with SBD's labels")
        found = []
        for path, labels in ((names, "SegmentationClassAug"), (lists / "val.txt", "SegmentationClass")):
            # Some copies of train_aug.txt give both paths in a line, and all give the name last.
            stems = [
                Path(line.split()[-1]).stem for line in path.read_text(encoding="utf-8").splitlines() if line.strip()
            ]
            found.append([(data / "JPEGImages" / f"{s}.jpg", data / labels / f"{s}.png") for s in stems])
        return found[0], found[1]

    def class_names(self, data: Path) -> list[str]:
        """VOC's twenty and the background."""
        return list(VOC_CLASSES)


class Ade20k(Segmentation):
    """The challenge's copy, ADEChallengeData2016: ``images`` and ``annotations``, each ``training``, ``validation``."""

    name, title = "ade20k", "ADE20K, semantic segmentation"
    counts, zero_is_ignored = (20_210, 2_000), True

    def pairs(self, data: Path) -> tuple[list[Pair], list[Pair]]:
        """All of both folders."""
        found = []
        for kind in ("training", "validation"):
            images, labels = data / "images" / kind, data / "annotations" / kind
            for folder in (images, labels):
                if not folder.is_dir():
                    raise UserError(f"there is no folder {folder}: give the folder ADEChallengeData2016")
            found.append([(image, labels / f"{image.stem}.png") for image in sorted(images.glob("*.jpg"))])
        return found[0], found[1]

    def class_names(self, data: Path) -> list[str]:
        """Names in ``objectInfo150.txt``; numbers from 1 without it."""
        path = data / "objectInfo150.txt"
        if not path.is_file():
            return [f"class {number}" for number in range(1, 151)]
        lines = path.read_text(encoding="utf-8").splitlines()[1:151]
        return [line.split("\t")[-1].split(",")[0].strip() for line in lines]


def label_problems(paths: list[Path], classes: int, task: Segmentation) -> list[str]:
    """A problem if labels are colors, have classes that the benchmark lacks, or had their zero reduced already."""
    seen: set[int] = set()
    for path in paths:
        try:
            seen |= set(read_labels(path).unique().tolist())
        except UserError as error:
            return [str(error)]
    highest = classes if task.zero_is_ignored else classes - 1
    wrong = sorted(label for label in seen if label > highest and (label != IGNORE or task.zero_is_ignored))
    if task.zero_is_ignored and IGNORE in seen:
        return [f"{paths[0].parent} has label 255: zero was reduced before; get the original annotations"]
    if wrong:
        return [f"{paths[0].parent} has label {wrong[0]}, and the benchmark's labels end at {highest}"]
    return []


class TrainCrops:
    """Training crops: resized, cropped, flipped, and with ``photometric`` recolored."""

    def __init__(
        self,
        pairs: list[Pair],
        options: SegmentationOptions,
        labels_of: Callable[[Path], Tensor],
        mean: tuple[float, float, float],
    ) -> None:
        self.pairs, self.options, self.labels_of = pairs, options, labels_of
        self.fill = [round(255 * m) for m in mean]

    def __len__(self) -> int:
        return len(self.pairs)

    def sample(self, index: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """``(3,S,S)`` uint8 and labels ``(S,S)`` uint8."""
        image, labels = read_image(self.pairs[index][0]), self.labels_of(self.pairs[index][1])
        side, (low, high) = self.options.crop, self.options.scales
        factor = rng.uniform(low, high)
        size = [max(1, round(n * factor)) for n in image.shape[1:]]
        image = T.resize(image, size, antialias=True)
        labels = T.resize(labels[None], size, interpolation=T.InterpolationMode.NEAREST)[0]
        missing_h, missing_w = (max(0, side - n) for n in size)
        padding = [0, 0, missing_w, missing_h]
        image = torch.stack([T.pad(c[None], padding, fill=f)[0] for c, f in zip(image, self.fill, strict=True)])
        labels = T.pad(labels[None], padding, fill=IGNORE)[0]
        top, left = (int(rng.integers(0, n - side + 1)) for n in image.shape[1:])
        image, labels = (x[..., top : top + side, left : left + side] for x in (image, labels))
        if rng.random() < 0.5:
            image, labels = image.flip(-1), labels.flip(-1)
        if self.options.photometric:
            image = photometric_distortion(image, rng)
        return image, labels

    def collate(self, samples: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """A batch of crops."""
        return {"images": torch.stack([s[0] for s in samples]), "labels": torch.stack([s[1] for s in samples])}


class SegmentationModel(nn.Module):
    """The last stage at a smaller stride, and a head that is applied at every location."""

    def __init__(self, encoder: Encoder, classes: int, options: SegmentationOptions) -> None:
        super().__init__()
        self.backbone = with_stride(encoder.trainable(), options.stride, dilate=True).train()
        channels = encoder.channels[-1]
        if options.head == "fcn":
            layers: list[nn.Module] = []
            for inputs in (channels, WIDTH):
                layers += [nn.Conv2d(inputs, WIDTH, 3, padding=6, dilation=6, bias=False), nn.BatchNorm2d(WIDTH)]
                layers.append(nn.ReLU(inplace=True))
            self.head = nn.Sequential(*layers, nn.Conv2d(WIDTH, classes, 1))
        else:
            self.head = nn.Sequential(nn.BatchNorm2d(channels, affine=False), nn.Conv2d(channels, classes, 1))
        self.mean, self.std = encoder.mean, encoder.std

    def logits(self, images: Tensor) -> Tensor:
        """uint8 (B,3,H,W) -> (B,classes,H,W), upsampled bilinearly."""
        mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (self.mean, self.std))
        inputs = (images.float() / 255 - mean) / std
        frozen = not self.backbone.training
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            features = self.backbone(inputs)[-1]
        return F.interpolate(self.head(features).float(), images.shape[2:], mode="bilinear", align_corners=False)

    def loss(self, batch: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """Cross-entropy over the pixels that have a class."""
        labels = batch["labels"].long()
        total = F.cross_entropy(self.logits(batch["images"]), labels, ignore_index=IGNORE, reduction="sum")
        return {"cross_entropy": (total, (labels != IGNORE).sum())}

    @torch.no_grad()
    def predict(self, image: Tensor, short: int = 0) -> Tensor:
        """uint8 (3,H,W) -> classes (H,W) uint8, at the image's own size."""
        inputs = T.resize(image, [short], antialias=True) if short else image
        logits = self.logits(inputs[None])
        if logits.shape[2:] != image.shape[1:]:
            logits = F.interpolate(logits, image.shape[1:], mode="bilinear", align_corners=False)
        return logits[0].argmax(0).to(torch.uint8)


def _iou(counts: np.ndarray) -> np.ndarray:
    """(...,3,classes) of intersection, truth and prediction -> (...,classes), NaN for a class that is in neither."""
    both, truth, prediction = (counts[..., row, :].astype(np.float64) for row in range(3))
    union = truth + prediction - both
    return np.divide(both, union, out=np.full(union.shape, np.nan), where=union > 0)


def _image_scores(counts: np.ndarray) -> dict[str, float | None]:
    if not counts[1].sum():
        return {"image_miou": None, "pixel_accuracy": None}
    return {"image_miou": float(np.nanmean(_iou(counts))), "pixel_accuracy": float(counts[0].sum() / counts[1].sum())}


def resampled_miou(counts: np.ndarray, resamples: int = 1000) -> np.ndarray:
    """mIoU over images drawn anew, (resamples,), from ``counts`` (images,3,classes)."""
    flat = counts.reshape(len(counts), -1).astype(np.float64)
    iou = _iou((draws(len(counts), resamples) @ flat).reshape(resamples, 3, -1))
    return np.asarray(np.nanmean(iou, axis=1))


def _picture(work: Path, name: str, image: Tensor, truth: Tensor, prediction: Tensor) -> str:
    """Writes image, truth and prediction side by side; returns the file's name."""
    palette = torch.from_numpy(generator(0, 1, 3).integers(40, 256, (256, 3)).astype(np.uint8))
    palette[0], palette[IGNORE] = 0, 255
    parts = [image.permute(1, 2, 0), palette[truth.long()], palette[prediction.long()]]
    picture = Image.fromarray(torch.cat(parts, 1).numpy())
    picture.thumbnail((720, 240))
    picture.save(work / f"{name}.png")
    return f"{name}.png"
