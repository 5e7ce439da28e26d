"""Tiny copies of the benchmarks in their own layouts, and a network that is small enough to learn them in a second.

Validation shows the training pictures again, under other names: a task that trains must score near 1 on them.
"""

import json
import shutil

import numpy as np
import torch
from PIL import Image
from torch import nn

from vito_fast.evaluate.encoders import Encoder, _encoder, set_statistics


class Backbone(nn.Module):
    """Four stages of two convolutions."""

    strides, channels = (4, 8, 16, 32), (16, 24, 32, 48)

    def __init__(self):
        super().__init__()
        self.stem = self.block(3, 16)
        for number, (inputs, outputs) in enumerate(zip((16, 16, 24, 32), self.channels, strict=True), 1):
            setattr(self, f"layer{number}", self.block(inputs, outputs))

    @staticmethod
    def block(inputs, outputs):
        first = nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
        return nn.Sequential(
            *first, nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
        )

    def forward(self, images):
        stages = [self.stem(images)]
        for number in range(1, 5):
            stages.append(getattr(self, f"layer{number}")(stages[-1]))
        return stages[1:]


def tiny_encoder() -> Encoder:
    """``Backbone`` with weights of seed 0."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        backbone = Backbone()
        set_statistics(backbone, torch.randn(4, 3, 64, 64))
    return _encoder(backbone, "tiny", "tiny", "tiny", "random: seed 0", torch.device("cpu"))


UCF_CLASSES = ("Archery", "Bowling", "Diving")


def ucf101(root, write_video):
    """Moving stripes; their direction and color are the class."""
    rng = np.random.default_rng(0)
    (root / "ucfTrainTestlist").mkdir(parents=True)
    lists = {"train": [], "test": []}
    for label, name in enumerate(UCF_CLASSES):
        (root / "UCF-101" / name).mkdir(parents=True)
        for group in range(1, 4):
            videos = [f"{name}/v_{name}_g{number:02d}_c01.avi" for number in (group, group + 10)]
            write_video(root / "UCF-101" / videos[0], stripes(label, rng))
            shutil.copyfile(root / "UCF-101" / videos[0], root / "UCF-101" / videos[1])
            lists["train"].append(f"{videos[0]} {label + 1}")
            lists["test"] += [videos[1]] if group < 3 else []
    classes = "".join(f"{i + 1} {name}\n" for i, name in enumerate(UCF_CLASSES))
    (root / "ucfTrainTestlist" / "classInd.txt").write_text(classes)
    for kind, lines in lists.items():
        (root / "ucfTrainTestlist" / f"{kind}list01.txt").write_text("\r\n".join(lines) + "\r\n")


def stripes(label, rng):
    y, x = np.mgrid[:48, :64]
    along = (y, x, x + y)[label]
    phases = rng.uniform(0, 6) + 0.4 * np.arange(12)
    gray = 128 + 80 * np.sin(along[None] * 0.9 + phases[:, None, None]) + rng.normal(0, 5, (12, 48, 64))
    tint = np.full(3, 0.6)
    tint[label] = 1.0
    return (gray[..., None] * tint).clip(0, 255).astype(np.uint8)


MASK_COLORS = {1: (220, 40, 40), 2: (40, 200, 60)}
"""Of the two objects that pictures with masks show; a disc is class 1 and a square is class 2."""


def masked_picture(rng):
    """An image (48,64,3) and its labels: 0 background, 1 and 2 the objects, 255 around them."""
    image = rng.normal(110, 12, (48, 64, 3))
    labels = np.zeros((48, 64), np.uint8)
    y, x = np.mgrid[:48, :64]
    for label, left in ((1, 0), (2, 32)):
        cy, cx, r = rng.integers(16, 32), left + rng.integers(12, 20), rng.integers(9, 13)
        distance = np.hypot(y - cy, x - cx) if label == 1 else np.maximum(abs(y - cy), abs(x - cx))
        labels[distance < r + 1] = 255
        labels[distance < r] = label
        image[distance < r] = np.array(MASK_COLORS[label]) + rng.normal(0, 8, (int((distance < r).sum()), 3))
    return image.clip(0, 255).astype(np.uint8), labels


def save_pair(image, labels, image_path, labels_path):
    for path in (image_path, labels_path):
        path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(image_path, quality=95)
    indexed = Image.fromarray(labels)
    if image_path.parent.name == "JPEGImages":
        indexed = indexed.convert("P")
        indexed.putpalette(list(range(255)) + [0] * 513)
    indexed.save(labels_path)


def pascal(root):
    """``VOC2012`` with SBD's labels."""
    rng, pictures = np.random.default_rng(0), []
    for kind, count, folder in (("train_aug", 8, "SegmentationClassAug"), ("val", 4, "SegmentationClass")):
        names = [f"2007_{kind[0]}{i:03d}" for i in range(count)]
        for at, name in enumerate(names):
            pictures += [masked_picture(rng)] if kind == "train_aug" else []
            save_pair(*pictures[at], root / "JPEGImages" / f"{name}.jpg", root / folder / f"{name}.png")
        path = root / "ImageSets" / "Segmentation" / f"{kind}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [f"/JPEGImages/{n}.jpg /SegmentationClassAug/{n}.png" if kind != "val" else n for n in names]
        path.write_text("\n".join(lines) + "\n")


def ade20k(root):
    """``ADEChallengeData2016``."""
    rng, pictures = np.random.default_rng(1), []
    for kind, count in (("training", 6), ("validation", 2)):
        for at in range(count):
            pictures += [masked_picture(rng)] if kind == "training" else []
            image, labels = pictures[at]
            shifted = np.where(labels == 255, 0, labels + 1).astype(np.uint8)  # ADE20K's own: 0 is "other"
            stem = f"ADE_{kind[:3]}_{at:08d}"
            save_pair(
                image, shifted, root / "images" / kind / f"{stem}.jpg", root / "annotations" / kind / f"{stem}.png"
            )


BOX_COLORS = {3: (220, 40, 40), 8: (40, 60, 220)}
"""Category id to the color of its rectangles."""


def boxed_picture(rng, number):
    """A picture (64,96,3) of one or two rectangles, and its annotations in COCO's form."""
    image = rng.normal(110, 10, (64, 96, 3))
    objects = []
    for side in range(int(rng.integers(1, 3))):
        w, h = rng.integers(22, 36, 2)
        x, y = side * 48 + rng.integers(0, 48 - w), rng.integers(0, 64 - h)
        category = int(rng.choice(list(BOX_COLORS)))
        image[y : y + h, x : x + w] = BOX_COLORS[category] + rng.normal(0, 6, (h, w, 3))
        x, y, w, h = (int(v) for v in (x, y, w, h))
        polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
        objects.append({"image_id": number, "category_id": category, "bbox": [x, y, w, h], "area": w * h,
                        "iscrowd": 0, "segmentation": [polygon]})  # fmt: skip
    return image.clip(0, 255).astype(np.uint8), objects


def _boxes(root, kind, count, first):
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for number in range(first, first + count):
        image, objects = boxed_picture(rng, number)
        folder = root / f"{kind}2017"
        folder.mkdir(exist_ok=True)
        Image.fromarray(image).save(folder / f"{number:012d}.jpg", quality=95)
        images.append({"id": number, "file_name": f"{number:012d}.jpg", "height": 64, "width": 96,
                       "coco_url": f"http://images.cocodataset.org/{kind}2017/{number:012d}.jpg",
                       "neg_category_ids": [], "not_exhaustive_category_ids": []})  # fmt: skip
        annotations += objects
    for at, annotation in enumerate(annotations):
        annotation["id"] = first * 1000 + at + 1
    categories = [{"id": c, "name": f"color {c}", "frequency": "f"} for c in BOX_COLORS]
    return {"images": images, "annotations": annotations, "categories": categories}


def coco(root):
    """COCO 2017 and LVIS v1, whose validation images lie in both folders."""
    (root / "annotations").mkdir(parents=True)
    train, val = _boxes(root, "train", 8, 100), _boxes(root, "val", 4, 200)
    crowd = train["annotations"][0] | {"id": 9, "iscrowd": 1}
    names = {
        "instances_train2017": train | {"annotations": [*train["annotations"], crowd]},
        "instances_val2017": val,
        "lvis_v1_train": train,
    }
    mixed = {"images": train["images"][:2] + val["images"], "categories": val["categories"]}
    mixed["annotations"] = [a for a in train["annotations"] if a["image_id"] in (100, 101)] + val["annotations"]
    names["lvis_v1_val"] = mixed
    for name, content in names.items():
        (root / "annotations" / f"{name}.json").write_text(json.dumps(content))
