"""Detection's metrics: average precision of COCO and LVIS by faster-coco-eval.

Sources: Lin et al., "Microsoft COCO" (2014); Gupta et al., "LVIS" (2019). Traps: LVIS keeps the 300 best detections of
an image over *all* its classes before anything is matched, a number that per-class truncation does not give; LVIS
scores a class on an image only where it is annotated as present or absent, and ignores false positives where its
annotation is not exhaustive. Areas come from the annotations' ``area``, not from boxes.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vito_fast.errors import UserError

LVIS_LIMIT = 300
"""Detections of an image that LVIS reads, over all classes."""

_COCO = {"AP": "AP_all", "AP50": "AP_50", "AP75": "AP_75", "APs": "AP_small", "APm": "AP_medium", "APl": "AP_large"}
_LVIS = {**_COCO, "APr": "APr", "APc": "APc", "APf": "APf"}

Truth = Mapping[str, Any]
Detection = Mapping[str, Any]


def coco_ap(truth: Truth, detections: Sequence[Detection]) -> dict[str, float]:
    """Box AP of COCO: AP, AP50, AP75, APs, APm, APl in [0, 1]; -1 where there is no object of that size.

    Args:
        truth: an instances file as loaded from JSON: ``images``, ``annotations`` (boxes x, y, w, h), ``categories``.
        detections: ``image_id``, ``category_id``, ``bbox`` and ``score`` each, as a results file has them.

    Raises:
        UserError: for a detection on an image, or of a class, that the truth lacks.
    """
    return _evaluate(truth, detections, lvis=False)


def lvis_ap(truth: Truth, detections: Sequence[Detection]) -> dict[str, float]:
    """Box AP of LVIS: COCO's six, and APr, APc, APf of rare, common and frequent classes; -1 without any.

    Args:
        truth: an LVIS file as loaded from JSON: images with ``neg_category_ids`` and ``not_exhaustive_category_ids``,
            categories with ``frequency``.
        detections: as for :func:`coco_ap`; the best 300 of an image are read.

    Raises:
        UserError: likewise, and for a truth that is not LVIS's.
    """
    check_lvis(truth)
    return _evaluate(truth, best_per_image(detections), lvis=True)


def check_lvis(truth: Truth) -> None:
    """UserError for annotations that lack what LVIS's own have, as COCO's do."""
    if any(key not in item for key, items in _LVIS_KEYS for item in truth[items]):
        raise UserError("this is no annotation file of LVIS v1: images need neg_category_ids, categories a frequency")


_LVIS_KEYS = (
    ("neg_category_ids", "images"),
    ("not_exhaustive_category_ids", "images"),
    ("frequency", "categories"),
)


def best_per_image(detections: Sequence[Detection], limit: int = LVIS_LIMIT) -> list[Detection]:
    """The ``limit`` best detections of each image over all classes; of equal scores the earlier ones."""
    images: dict[Any, list[Detection]] = defaultdict(list)
    for detection in detections:
        images[detection["image_id"]].append(detection)
    return [kept for found in images.values() for kept in sorted(found, key=lambda d: -d["score"])[:limit]]


def average_precisions(truth: Truth, detections: Sequence[Detection], *, lvis: bool = False) -> dict[int, float]:
    """AP of each class by its id; NaN for one without objects. Arguments as above."""
    kept = best_per_image(detections) if lvis else detections
    precision = _run(truth, kept, lvis=lvis).eval["precision"]
    numbers = sorted(category["id"] for category in truth["categories"])
    # (IoU, recall, class, size, limit): all sizes, the largest limit.
    values = np.asarray(precision)[:, :, :, 0, -1]
    return {
        number: float(part[part > -1].mean()) if (part > -1).any() else float("nan")
        for number, part in zip(numbers, values.transpose(2, 0, 1), strict=True)
    }


def resampled_ap(
    truth: Truth, detections: Sequence[Detection], counts: NDArray[np.int64], *, lvis: bool = False
) -> NDArray[np.float64]:
    """AP over images drawn anew, by faster-coco-eval itself: matching is done once, and summed up for each draw.

    Args:
        truth, detections: as above.
        counts: (resamples, images), how often each of ``truth["images"]`` is drawn.

    Returns:
        (resamples,); NaN where no drawn image has an object.
    """
    place = {image["id"]: at for at, image in enumerate(truth["images"])}
    kept = best_per_image(detections) if lvis else detections
    run = _library(truth, kept, lvis=lvis, separate=True)
    images: dict[int, set[int]] = defaultdict(set)
    for item in (*truth["annotations"], *kept):
        images[item["category_id"]].add(item["image_id"])
    values = []
    for category, numbers in images.items():  # one class at a time: all pairs of LVIS would not fit into memory
        run.params.catIds, run.params.imgIds = [category], sorted(numbers)
        run.params.areaRng, run.params.areaRngLbl = run.params.areaRng[:1], run.params.areaRngLbl[:1]
        run.evaluate()
        found = run._evalImgs_cpp
        repeats = counts[:, [place[number] for number in run.params.imgIds]]
        values.append([_drawn(run, np.repeat(found, row).tolist()) for row in repeats])
    return np.asarray(np.nanmean(np.array(values), 0))


def _drawn(run: Any, evaluated: list[Any]) -> float:
    """AP of one class over the images of ``evaluated``."""
    run._evalImgs_cpp, run._paramsEval.imgIds = evaluated, list(range(len(evaluated)))
    run.accumulate()
    precision = np.asarray(run.eval["precision"])[:, :, 0, 0, -1]
    return float(precision.mean()) if (precision > -1).any() else float("nan")


def _evaluate(truth: Truth, detections: Sequence[Detection], *, lvis: bool) -> dict[str, float]:
    stats = _run(truth, detections, lvis=lvis).stats_as_dict
    return {name: float(stats[key]) for name, key in (_LVIS if lvis else _COCO).items()}


def _run(truth: Truth, detections: Sequence[Detection], *, lvis: bool) -> Any:
    run = _library(truth, detections, lvis=lvis)
    run.evaluate()
    run.accumulate()
    run.summarize()
    return run


def _library(truth: Truth, detections: Sequence[Detection], *, lvis: bool, separate: bool = False) -> Any:
    from faster_coco_eval import COCO, COCOeval_faster

    images = {image["id"] for image in truth["images"]}
    classes = {category["id"] for category in truth["categories"]}
    for detection in detections:
        if detection["image_id"] not in images or detection["category_id"] not in classes:
            place = f"image {detection['image_id']}, class {detection['category_id']}"
            raise UserError(f"a detection on {place} is not of this annotation file")
    # The library writes into its input, and reads crowds and areas that LVIS's files need not have.
    annotations = [{"iscrowd": 0, **annotation} for annotation in truth["annotations"]]
    expected = COCO({**truth, "annotations": annotations}, print_function=_silent)
    found = expected.loadRes([dict(detection) for detection in detections])
    run = COCOeval_faster(expected, found, "bbox", lvis_style=lvis, print_function=_silent, separate_eval=separate)
    if lvis:
        run.params.maxDets = [LVIS_LIMIT]
    return run


def _silent(*_: Any) -> None:
    pass
