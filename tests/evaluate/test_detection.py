"""AP against the official tools' values, perfect and empty detectors, and LVIS's truncation."""

import copy

import pytest

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
