"""COCO and LVIS: the network, canvases and wrong copies. test_finetune_tasks.py trains on them."""

import copy

import numpy as np
import pytest
import torch
from tiny import BOX_COLORS, tiny_encoder

from vito_fast.errors import UserError
from vito_fast.evaluate.detection_models import DetectionModel, KeyedSampler
from vito_fast.evaluate.detection_task import (
    Coco,
    DetectionOptions,
    Lvis,
    TrainCanvases,
    annotated,
    decode_mask,
    image_name,
)


@pytest.fixture
def data(copies):
    return copies["coco"]


@pytest.mark.parametrize("kind", ["fcos", "maskrcnn"])
def test_two_halves_add_up_to_the_batch(data, kind):
    """Sums and counts of two ranks' shares are those of one process with both."""
    options = DetectionOptions(detector=kind, height=64, width=64, rois=16)
    images, _ = annotated(data, "instances_train2017.json", True)
    canvases = TrainCanvases(images, options, (0.5, 0.5, 0.5))
    samples = [canvases.sample(i, np.random.default_rng(i)) for i in range(2)]
    torch.manual_seed(0)
    model = DetectionModel(tiny_encoder(), options, 2)
    for module in model.modules():  # batch norm over ranks is tested with the loop
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.momentum, module.training = 0.0, False
    whole = model.loss(canvases.collate(copy.deepcopy(samples)))
    parts = [model.loss(canvases.collate(copy.deepcopy(samples[i::2]))) for i in range(2)]
    for name, (total, count) in whole.items():
        assert count == parts[0][name][1] + parts[1][name][1]
        assert count > 0
        torch.testing.assert_close(parts[0][name][0] + parts[1][name][0], total, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [(64, 96), (96, 64)])
def test_the_network_sees_the_canvas_as_it_is(size):
    """torchvision would resize it to 800 pixels in eval mode."""
    options = DetectionOptions(height=size[0], width=size[1])
    model = DetectionModel(tiny_encoder(), options, 2)
    for training in (True, False):
        images, _ = model.network.transform.train(training)([torch.zeros(3, *size)])
        assert images.tensors.shape[2:] == size


def test_objects_move_with_their_image(data):
    options = DetectionOptions(detector="maskrcnn", height=80, width=80)
    images, categories = annotated(data, "instances_train2017.json", True)
    assert len(images[0].boxes) == len(images[0].segmentations) <= 2  # without the crowd
    canvases = TrainCanvases(images, options, (0.5, 0.5, 0.5))
    for number in range(24):
        sample = canvases.sample(number % 8, np.random.default_rng(number))
        target = sample["target"]
        for box, label, mask in zip(target["boxes"], target["labels"], target["masks"], strict=True):
            x0, y0, x1, y1 = (int(v) for v in box.round())
            if min(x1 - x0, y1 - y0) < 6:
                continue
            inside = sample["image"][:, y0 + 2 : y1 - 2, x0 + 2 : x1 - 2]
            color = torch.tensor(BOX_COLORS[categories[label - 1]]) / 255
            assert (inside.mean((1, 2)) - color).abs().max() < 0.1
            assert mask[y0 + 2 : y1 - 2, x0 + 2 : x1 - 2].float().mean() > 0.95
            assert mask.sum() <= (x1 - x0 + 2) * (y1 - y0 + 2)


def test_the_sampler_is_torchvisions_with_keys():
    labels = torch.tensor([1.0] * 30 + [0.0] * 100 + [-1.0] * 10)
    sampler = KeyedSampler(40, 0.5, 4)
    sampler.keys = [5, 6]
    positive, negative = sampler([labels, labels[20:]])
    assert [int(p.sum()) for p in positive] == [20, 10]
    assert [int(n.sum()) for n in negative] == [20, 30]
    assert (sampler.drawn, sampler.positives) == (80, 30)
    assert not (positive[0].bool() & (labels < 1)).any()
    sampler.keys = [5]
    assert torch.equal(sampler([labels])[0][0], positive[0])


def test_masks_decode():
    polygon = [[1, 1, 5, 1, 5, 3, 1, 3]]
    mask = decode_mask(polygon, 6, 8)
    assert (tuple(mask.shape), mask[1:3, 1:5].min(), mask.sum()) == ((6, 8), 1, 8)
    runs = {"size": [2, 3], "counts": [1, 2, 3]}  # down the columns: 0 11 000
    assert decode_mask(runs, 2, 3).tolist() == [[0, 1, 0], [1, 0, 0]]


def test_wrong_copies_are_one_line(data, tmp_path):
    options = DetectionOptions(subset=True)
    assert Coco().check(data, options).problems == Lvis().check(data, options).problems == ()
    assert Coco().check(data, DetectionOptions()).problems[0].startswith("8 training images")
    assert "annotations/, train2017/ and val2017/" in Coco().check(tmp_path, options).problems[0]
    (tmp_path / "annotations").mkdir()
    for path in (data / "annotations").iterdir():
        (tmp_path / "annotations" / path.name).write_text(path.read_text())
    (tmp_path / "val2017").symlink_to(data / "val2017")
    problem = Lvis().check(tmp_path, options).problems
    assert any("LVIS's validation images lie in train2017 too" in line for line in problem)
    with pytest.raises(UserError, match="is no image of train2017 or val2017"):
        image_name({"file_name": "../secret.jpg"}, "instances_val2017.json")
    cocos = (data / "annotations" / "instances_val2017.json").read_text().replace("neg_category_ids", "other")
    (tmp_path / "annotations" / "lvis_v1_val.json").write_text(cocos)
    assert "no annotation file of LVIS v1" in Lvis().check(tmp_path, options).problems[0]
    (tmp_path / "annotations" / "instances_val2017.json").write_text("[1]")
    assert "is no annotation file" in Coco().check(tmp_path, options).problems[0]
