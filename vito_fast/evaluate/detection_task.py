"""COCO and LVIS: detection with torchvision's FCOS or Mask R-CNN on the encoder, fine-tuned end to end.

The paper's detector is FCOS* (FCOS with ATSS and scores that know IoU); torchvision's is another, and results say so.
"""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as T

from vito_fast.errors import UserError
from vito_fast.evaluate import detection
from vito_fast.evaluate.data import counted, manifest, missing, read_image
from vito_fast.evaluate.detection_models import DetectionModel, DetectionOptions
from vito_fast.evaluate.encoders import Encoder
from vito_fast.evaluate.finetune import finetune
from vito_fast.evaluate.result import Metric, deviation, draws
from vito_fast.evaluate.task import Check, Measured, Progress, Task, gathered, own_share, rank_and_size
from vito_fast.files import atomic_write

RESAMPLES = 200
"""Of validation images, for the standard error of AP and its paired intervals."""


DETECTIONS = "detections.json"
"""The results file in COCO's form, in the task's folder, for the official tools."""


class Annotated(NamedTuple):
    """An image with its objects."""

    number: int
    path: Path
    boxes: np.ndarray
    """(N,4) float32: x0, y0, x1, y1."""
    labels: np.ndarray
    """(N,) int64, from 1, in the order of the categories' ids."""
    segmentations: list[Any]


class Detection(Task):
    """Box AP on the validation images of a data set that a subclass lists."""

    options = DetectionOptions
    counts: ClassVar[tuple[int, int]]
    files: ClassVar[tuple[str, str]]
    lvis: ClassVar[bool]

    def check(self, data: Path, options: DetectionOptions) -> Check:
        """Counts both sets and looks for every image."""
        try:
            train, val = (_read(data / "annotations" / name) for name in self.files)
            if self.lvis:
                detection.check_lvis(val)
        except UserError as error:
            return Check((str(error),))
        problems = []
        for truth, name in ((train, self.files[0]), (val, self.files[1])):
            hint = "LVIS's validation images lie in train2017 too" if self.lvis else "get COCO's images of 2017"
            problems += missing(data, [image_name(image, name) for image in truth["images"]], hint)
        lines = counted("training images", len(train["images"]), self.counts[0])
        lines += counted("validation images", len(val["images"]), self.counts[1])
        problems += [] if options.subset else lines
        files = [] if problems else [data / image_name(image, self.files[1]) for image in val["images"]]
        annotations = [data / "annotations" / name for name in self.files]
        images = 3 * options.steps(len(train["images"])) * options.batch_size + len(val["images"])
        size = (options.height, options.width)
        notes = (*(lines if options.subset else ()), "other detector than the paper's FCOS*")
        found = manifest(data, files, annotations)
        return Check(tuple(problems), len(val["images"]), found, images, size, True, notes=notes)

    def measure(self, encoder: Encoder, data: Path, options: DetectionOptions, work: Path) -> Measured:
        """Fine-tunes on the training images, then scores the validation images."""
        masks = options.detector == "maskrcnn"
        train, categories = annotated(data, self.files[0], masks)
        val, _ = annotated(data, self.files[1], False)
        torch.manual_seed(options.seed)
        model: Any = DetectionModel(encoder, options, len(categories))
        canvases = TrainCanvases([image for image in train if len(image.boxes)], options, encoder.mean)
        finetune(model, canvases, options, work, encoder.device, seed=options.seed, label=f"{self.name} training")
        own = own_share(val)
        progress = Progress(f"{self.name} validation", len(own))
        found = {}
        for image in own:
            found[str(image.number)] = _detected(model, image, options, encoder, categories)
            progress.step()
        every = gathered(found, (str(image.number) for image in val))
        detections = [d for of_image in every.values() for d in of_image]
        if rank_and_size()[0] == 0:
            with atomic_write(work / DETECTIONS) as partial:
                partial.write_text(json.dumps(detections), encoding="utf-8")
        truth = _read(data / "annotations" / self.files[1])
        if detections:
            scores = (detection.lvis_ap if self.lvis else detection.coco_ap)(truth, detections)
            per_class = detection.average_precisions(truth, detections, lvis=self.lvis)
            counts = draws(len(val), RESAMPLES)
            resamples = detection.resampled_ap(truth, detections, counts, lvis=self.lvis)
        else:
            scores, per_class = {"AP": 0.0, "AP50": 0.0, "AP75": 0.0}, {}
            resamples = np.zeros(RESAMPLES)
        metrics = {name: Metric(None if v < 0 else v, "share", len(val)) for name, v in scores.items()}
        metrics["AP"] = dataclasses.replace(metrics["AP"], standard_error=deviation(resamples))
        names = {category["id"]: category["name"] for category in truth["categories"]}
        groups = {names[n]: {"AP": None if np.isnan(v) else v} for n, v in per_class.items()}
        notes = ("AP is of boxes, by faster-coco-eval; its standard error is a bootstrap over images",)
        seeds, resampled = {"seed": options.seed}, {"AP": resamples.tolist()}
        return Measured(metrics, {}, groups, seeds, notes=notes, resamples=resampled)


class Coco(Detection):
    """COCO 2017: ``train2017``, ``val2017`` and ``annotations``."""

    name, title, lvis = "coco", "COCO 2017, detection", False
    counts, files = (118_287, 5_000), ("instances_train2017.json", "instances_val2017.json")


class Lvis(Detection):
    """LVIS v1 on COCO's images: its validation images lie in ``train2017`` as well as in ``val2017``."""

    name, title, lvis = "lvis", "LVIS v1, detection", True
    counts, files = (100_170, 19_809), ("lvis_v1_train.json", "lvis_v1_val.json")


def image_name(image: dict[str, Any], annotations: str) -> str:
    """An image's path under the data set's folder; LVIS gives it as the end of a COCO address."""
    if "coco_url" in image and annotations.startswith("lvis"):
        folder, name = image["coco_url"].split("/")[-2:]
    else:
        folder = "train2017" if "train" in annotations else "val2017"
        name = str(image["file_name"])
    if Path(name).name != name or folder not in ("train2017", "val2017"):
        raise UserError(f"{annotations}: '{folder}/{name}' is no image of train2017 or val2017")
    return f"{folder}/{name}"


def _read(path: Path) -> dict[str, Any]:
    try:
        stat = path.stat()
    except OSError:
        raise UserError(
            f"{path} is missing: give the folder that holds annotations/, train2017/ and val2017/"
        ) from None
    return _parsed(path, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(2)
def _parsed(path: Path, mtime: int, size: int) -> dict[str, Any]:
    """The file as JSON, once for its time and size: LVIS's has a gigabyte."""
    try:
        loaded: dict[str, Any] = json.loads(path.read_bytes())
        loaded["images"], loaded["annotations"], loaded["categories"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(f"{path} is no annotation file: {error}") from None
    return loaded


def annotated(data: Path, name: str, masks: bool) -> tuple[list[Annotated], list[int]]:
    """Every image of an annotation file with its objects, crowds left out, and the categories' ids in order."""
    truth = _read(data / "annotations" / name)
    categories = sorted(category["id"] for category in truth["categories"])
    label = {number: place for place, number in enumerate(categories, 1)}
    objects: dict[int, list[dict[str, Any]]] = {}
    for annotation in truth["annotations"]:
        if not annotation.get("iscrowd"):
            objects.setdefault(annotation["image_id"], []).append(annotation)
    found = []
    for image in truth["images"]:
        mine = objects.get(image["id"], [])
        xywh = np.array([o["bbox"] for o in mine], np.float32).reshape(-1, 4)
        boxes = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1)
        labels = np.array([label[o["category_id"]] for o in mine], np.int64)
        segmentations = [o["segmentation"] for o in mine] if masks else []
        found.append(Annotated(image["id"], data / image_name(image, name), boxes, labels, segmentations))
    return found, categories


class TrainCanvases:
    """Training images on a canvas of one size, resized with jitter, cropped, padded and flipped with their objects."""

    def __init__(self, images: list[Annotated], options: DetectionOptions, mean: tuple[float, float, float]) -> None:
        self.images, self.options, self.mean = images, options, mean

    def __len__(self) -> int:
        return len(self.images)

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """``image`` (3,H,W) float in [0, 1], ``target`` as torchvision's detectors take it, and ``key``."""
        one, options = self.images[index], self.options
        picture = read_image(one.path)
        height, width = picture.shape[1:]
        canvas = (options.height, options.width)
        factor = min(canvas[0] / height, canvas[1] / width) * rng.uniform(*options.jitter)
        image, (top, left), scale = _placed(picture, canvas, factor, rng, self.mean)
        boxes = torch.from_numpy(one.boxes) * torch.tensor([scale[1], scale[0]] * 2)
        boxes = boxes - torch.tensor([left, top] * 2)
        boxes = torch.stack([boxes[:, i].clamp(0, canvas[1 - i % 2]) for i in range(4)], 1)
        kept = ((boxes[:, 2:] - boxes[:, :2]) > 1).all(1)
        flip = rng.random() < 0.5
        if flip:
            image = image.flip(-1)
            boxes = torch.stack([canvas[1] - boxes[:, 2], boxes[:, 1], canvas[1] - boxes[:, 0], boxes[:, 3]], 1)
        target = {"boxes": boxes[kept], "labels": torch.from_numpy(one.labels)[kept]}
        if options.detector == "maskrcnn":
            masks = [decode_mask(s, height, width) for s, k in zip(one.segmentations, kept.tolist(), strict=True) if k]
            target["masks"] = _placed_masks(masks, canvas, factor, (top, left), flip)
        return {"image": image, "target": target, "key": int(rng.integers(2**48))}

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch of lists, as torchvision's detectors take it."""
        return {
            "images": [s["image"] for s in samples],
            "targets": [s["target"] for s in samples],
            "keys": [s["key"] for s in samples],
        }


def _placed(
    picture: Tensor, canvas: tuple[int, int], factor: float, rng: np.random.Generator | None, mean: tuple[float, ...]
) -> tuple[Tensor, tuple[int, int], tuple[float, float]]:
    """The picture resized and on the canvas: a random part of it (the top left without ``rng``), padded with the mean.

    Returns:
        The canvas (3,H,W) float in [0, 1], the part's top and left, and the factors of both sides.
    """
    size = [max(1, round(n * factor)) for n in picture.shape[1:]]
    resized = T.resize(picture, size, antialias=True)
    over = [max(0, n - c) for n, c in zip(size, canvas, strict=True)]
    top, left = (int(rng.integers(0, n + 1)) if rng is not None else 0 for n in over)
    part = resized[:, top : top + canvas[0], left : left + canvas[1]].float() / 255
    image = torch.tensor(mean).view(3, 1, 1).expand(3, *canvas).clone()
    image[:, : part.shape[1], : part.shape[2]] = part
    return image, (top, left), (size[0] / picture.shape[1], size[1] / picture.shape[2])


def _placed_masks(
    masks: list[Tensor], canvas: tuple[int, int], factor: float, corner: tuple[int, int], flip: bool
) -> Tensor:
    result = torch.zeros(len(masks), *canvas, dtype=torch.uint8)
    for at, mask in enumerate(masks):
        size = [max(1, round(n * factor)) for n in mask.shape]
        resized = T.resize(mask[None], size, interpolation=T.InterpolationMode.NEAREST)[0]
        part = resized[corner[0] : corner[0] + canvas[0], corner[1] : corner[1] + canvas[1]]
        result[at, : part.shape[0], : part.shape[1]] = part
    return result.flip(-1) if flip else result


def decode_mask(segmentation: Any, height: int, width: int) -> Tensor:
    """COCO's polygons or run lengths as (H,W) uint8."""
    from faster_coco_eval.core import mask

    if isinstance(segmentation, list):
        encoded = mask.merge(mask.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        encoded = mask.frPyObjects(segmentation, height, width)
    else:
        encoded = segmentation
    return torch.from_numpy(np.ascontiguousarray(mask.decode(encoded)))


def _detected(
    model: Any, image: Annotated, options: DetectionOptions, encoder: Encoder, categories: list[int]
) -> list[dict[str, Any]]:
    """Detections of an image in the form of COCO's results files, in the image's own pixels."""
    picture = read_image(image.path)
    canvas = (options.height, options.width)
    factor = min(canvas[0] / picture.shape[1], canvas[1] / picture.shape[2])
    placed, _, scale = _placed(picture, canvas, factor, None, encoder.mean)
    found = model.predict([placed.to(encoder.device)])[0]
    boxes = found["boxes"].cpu() / torch.tensor([scale[1], scale[0]] * 2)
    xywh = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1).tolist()
    labels, scores = found["labels"].tolist(), found["scores"].tolist()
    return [
        {"image_id": image.number, "category_id": categories[label - 1], "bbox": box, "score": score}
        for box, label, score in zip(xywh, labels, scores, strict=True)
        if label > 0
    ]
