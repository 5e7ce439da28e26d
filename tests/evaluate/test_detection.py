"""AP against the official tools' values, perfect and empty detectors, and LVIS's truncation."""

import copy

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vito_fast.errors import UserError
from vito_fast.evaluate import detection

CATEGORIES = [{"id": c, "name": "abc"[c - 1], "frequency": "rcf"[c - 1]} for c in (1, 2, 3)]


def g5():
    images = [{"id": i + 1, "width": 640, "height": 480} for i in range(8)]
    annotations, detections = [], []
    for q in range(40):
        w, h = 20 + 37 * q % 180, 16 + 53 * q % 150
        x, y = 97 * q % (640 - w), 61 * q % (480 - h)
        image, category = q // 5 + 1, q % 3 + 1
        annotations.append(
            {"id": q + 1, "image_id": image, "category_id": category, "bbox": [x, y, w, h], "area": w * h}
            | {"iscrowd": int(q % 13 == 7)}
        )
        if q % 6 != 5:
            s = 1 + (11 * q % 5 - 2) / 20
            box = [x + 7 * q % 11 - 5, y + 5 * q % 9 - 4, round(w * s, 3), round(h * s, 3)]
            found = category % 3 + 1 if q % 9 == 4 else category
            detections.append({"image_id": image, "category_id": found, "bbox": box, "score": (11 * q % 101 + 1) / 102})
        if q % 4 == 1:
            box = [31 * q % 500, 17 * q % 380, 60, 50]
            found = (q // 4) % 3 + 1
            detections.append({"image_id": image, "category_id": found, "bbox": box, "score": (23 * q % 89 + 1) / 180})
    return {"images": images, "annotations": annotations, "categories": CATEGORIES}, detections


def g6():
    truth, detections = g5()
    for annotation in truth["annotations"]:
        del annotation["iscrowd"]
    for image in truth["images"]:
        present = {a["category_id"] for a in truth["annotations"] if a["image_id"] == image["id"]}
        absent = [c for c in (1, 2, 3) if c not in present]
        image["neg_category_ids"] = absent[:1] if image["id"] % 2 else []
        image["not_exhaustive_category_ids"] = [min(present)] if image["id"] % 3 == 0 else []
    return truth, detections


def test_coco():
    truth, detections = g5()
    before = copy.deepcopy((truth, detections))
    expected = {
        "AP": 0.4057427941, "AP50": 0.6360497588, "AP75": 0.5091786102,
        "APs": 0, "APm": 0.4288228823, "APl": 0.4609735974,
    }  # fmt: skip
    assert detection.coco_ap(truth, detections) == pytest.approx(expected, abs=5e-11)
    assert (truth, detections) == before


def test_lvis():
    truth, detections = g6()
    expected = {
        "AP": 0.419307439, "AP50": 0.6427392739, "AP75": 0.5230665924,
        "APr": 0.5801170364, "APc": 0.3624587459, "APf": 0.3153465347,
    }  # fmt: skip
    found = detection.lvis_ap(truth, detections)
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-9)
    classes = detection.average_precisions(truth, detections, lvis=True)
    assert classes == pytest.approx({1: found["APr"], 2: found["APc"], 3: found["APf"]})


def test_lvis_reads_the_best_300_of_an_image_over_all_classes():
    truth, detections = g6()
    detections += [
        {"image_id": 1 + q % 2, "category_id": q % 3 + 1, "bbox": [13 * q % 600, 29 * q % 440, 40, 40]}
        | {"score": 0.2 + (q % 50) / 100}
        for q in range(1200)
    ]
    assert detection.lvis_ap(truth, detections)["AP"] == pytest.approx(0.19179771, abs=5e-9)
    kept = detection.best_per_image(detections)
    assert max(sum(d["image_id"] == i for d in kept) for i in (1, 2)) == 300


def overlap(a, b):
    w = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    h = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    both = max(w, 0) * max(h, 0)
    return both / (a[2] * a[3] + b[2] * b[3] - both)


def ap_by_hand(truth, detections, lvis):
    """AP from its definition: greedy matches by score, the precision envelope at 101 recalls, classes, thresholds."""
    images, values = {image["id"]: image for image in truth["images"]}, []
    for category in (1, 2, 3):
        objects = [a for a in truth["annotations"] if a["category_id"] == category]
        if not objects:
            continue
        present = {a["image_id"] for a in objects}
        found = sorted((d for d in detections if d["category_id"] == category), key=lambda d: -d["score"])
        if lvis:
            found = [
                d for d in found if d["image_id"] in present or category in images[d["image_id"]]["neg_category_ids"]
            ]
        for threshold in np.linspace(0.5, 0.95, 10):
            taken, hits = set(), []
            for d in found:
                near = [a for a in objects if a["image_id"] == d["image_id"] and a["id"] not in taken]
                best = max(near, key=lambda a: overlap(a["bbox"], d["bbox"]), default=None)
                hit = best is not None and overlap(best["bbox"], d["bbox"]) >= threshold
                if hit:
                    taken.add(best["id"])
                elif lvis and category in images[d["image_id"]]["not_exhaustive_category_ids"]:
                    continue
                hits.append(hit)
            right = np.cumsum(hits)
            precision, recall = right / np.arange(1, len(hits) + 1), right / len(objects)
            values += [precision[recall >= r - 1e-12].max(initial=0) for r in np.linspace(0, 1, 101)]
    return np.mean(values)


@settings(max_examples=15)
@given(st.integers(0, 2**32 - 1), st.booleans())
def test_ap_by_hand(seed, lvis):
    rng = np.random.default_rng(seed)
    ids = range(1, 5)
    images = [{"id": i, "width": 200, "height": 200} for i in ids]
    annotations = []
    for number in range(rng.integers(1, 14)):
        box = [*rng.uniform(0, 100, 2), *rng.uniform(20, 90, 2)]
        chosen = {"image_id": int(rng.choice(ids)), "category_id": int(rng.integers(1, 4))}
        annotations.append({"id": number + 1, "bbox": box, "area": box[2] * box[3], **chosen})
    scores = rng.permutation(40) / 40
    detections = []
    for score in scores[: rng.integers(1, 40)]:
        copied = annotations[rng.integers(len(annotations))]
        box = (np.array(copied["bbox"]) + rng.normal(0, rng.choice([1, 6]), 4)).tolist()
        category = copied["category_id"] if rng.random() < 0.8 else int(rng.integers(1, 4))
        detections.append({"image_id": copied["image_id"], "category_id": category, "bbox": box, "score": float(score)})
    for image in images:
        present = {a["category_id"] for a in annotations if a["image_id"] == image["id"]}
        image["neg_category_ids"] = [c for c in (1, 2, 3) if c not in present and rng.random() < 0.5]
        image["not_exhaustive_category_ids"] = [c for c in present if rng.random() < 0.3]
    truth = {"images": images, "annotations": annotations, "categories": CATEGORIES}
    found = (detection.lvis_ap if lvis else detection.coco_ap)(truth, detections)
    assert found["AP"] == pytest.approx(ap_by_hand(truth, detections, lvis), abs=1e-9)


@pytest.mark.parametrize(("score", "make"), [(detection.coco_ap, g5), (detection.lvis_ap, g6)])
def test_perfect_and_empty(score, make):
    truth, _ = make()
    perfect = [
        {key: a[key] for key in ("image_id", "category_id", "bbox")} | {"score": 0.5} for a in truth["annotations"]
    ]
    found = score(truth, perfect)
    assert found == pytest.approx(dict.fromkeys(found, 1), abs=1e-12)
    assert set(score(truth, []).values()) <= {0, -1}


def test_wrong_files_are_one_line():
    truth, detections = g5()
    with pytest.raises(UserError, match="LVIS v1"):
        detection.lvis_ap(truth, detections)
    with pytest.raises(UserError, match="image 99"):
        detection.coco_ap(truth, [{**detections[0], "image_id": 99}])


@pytest.mark.parametrize("lvis", [False, True])
def test_resamples_are_the_librarys_ap_of_drawn_images(lvis):
    """Drawing every image once gives AP; drawing one twice gives that of a copy of it under a number of its own."""
    truth, detections = g6() if lvis else g5()
    score = detection.lvis_ap if lvis else detection.coco_ap
    counts = np.ones((3, 8), np.int64)
    counts[1, 2], counts[2, [0, 5]] = 2, 0
    found = detection.resampled_ap(truth, detections, counts, lvis=lvis)
    assert found[0] == pytest.approx(score(truth, detections)["AP"], abs=1e-12)
    copies = {"images": [{**truth["images"][2], "id": 99}], "annotations": []}
    copies["annotations"] = [
        {**a, "image_id": 99, "id": 900 + a["id"]} for a in truth["annotations"] if a["image_id"] == 3
    ]
    twice = {**truth, **{key: truth[key] + copies[key] for key in copies}}
    more = detections + [{**d, "image_id": 99} for d in detections if d["image_id"] == 3]
    assert found[1] == pytest.approx(score(twice, more)["AP"], abs=1e-12)
    left = {**truth, "images": [i for i in truth["images"] if i["id"] not in (1, 6)]}
    left["annotations"] = [a for a in truth["annotations"] if a["image_id"] not in (1, 6)]
    fewer = [d for d in detections if d["image_id"] not in (1, 6)]
    assert found[2] == pytest.approx(score(left, fewer)["AP"], abs=1e-12)
