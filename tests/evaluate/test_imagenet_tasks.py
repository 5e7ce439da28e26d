"""The tasks that read ImageNet's classifier, on tiny data in the real layouts."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from test_human import encode as encode_example
from test_human import write_records

from vito_fast.errors import UserError
from vito_fast.evaluate import human, imagenet_tasks, saliency_task
from vito_fast.evaluate.encoders import load
from vito_fast.evaluate.linear import LinearProbe
from vito_fast.evaluate.task import find_preset

COLORS = {"n00000001": (30, 40, 210), "n00000002": (40, 190, 50), "n00000003": (220, 40, 30)}


def save(path, color, rng, size=(40, 40)):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = np.array(color) + rng.normal(0, 20, (*size, 3))
    Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(path)


def preset(task, **changes):
    return find_preset(task, None).with_options({"subset": True, **changes})


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """An output folder that holds the classifier of pixels."""
    root, rng = tmp_path_factory.mktemp("imagenet"), np.random.default_rng(0)
    for part, count in (("train", 6), ("val", 2)):
        for name, color in COLORS.items():
            for number in range(count):
                save(root / "data" / part / name / f"{part}{number}.png", color, rng)
    task = imagenet_tasks.ImageNet()
    options = {"size": 32, "strengths": [0.01]}
    result = task.run(load("pixels"), root / "data", preset(task, **options), root / "out")
    assert result.metrics["top1"].value == 1
    assert result.notes[:1] == ["3 classes, and the benchmark has 1,000"]
    assert "1,281,167" in task.check(root / "data", task.options()).problems[1]
    return root / "out"


def test_without_a_classifier_it_is_one_line(tmp_path, out):
    task = imagenet_tasks.ImageNetA()
    with pytest.raises(UserError, match="imagenet_a needs this encoder's ImageNet classifier: run --tasks imagenet"):
        task.run(load("pixels"), tmp_path, preset(task), tmp_path)
    with pytest.raises(UserError, match="there is no none"):
        task.run(load("pixels"), tmp_path, preset(task, head="none"), out)
    save(tmp_path / "n00000002" / "a.png", (0, 0, 0), np.random.default_rng(0))
    head = str(next(out.rglob("head.safetensors")))
    with pytest.raises(UserError, match="reads 768 features, the encoder has 512"):
        task.run(load("random:resnet18"), tmp_path, preset(task, head=head), out)


def test_imagenet_a_decides_among_its_own_classes(tmp_path, out):
    rng = np.random.default_rng(1)
    for name in ("n00000001", "n00000003"):  # green is no class here: a greenish red must be red
        for number in range(2):
            save(tmp_path / name / f"{number}.png", np.array(COLORS[name]) * 0.6 + np.array((20, 60, 10)), rng)
    task = imagenet_tasks.ImageNetA()
    result = task.run(load("pixels"), tmp_path, preset(task), out)
    assert result.metrics["top1"].value == 1
    assert result.metrics["top1 / clean"].value == 1
    assert set(result.groups) == {"n00000001", "n00000003"}
    assert "200" in task.check(tmp_path, task.options()).problems[0]
    save(tmp_path / "n00000009" / "a.png", (0, 0, 0), rng)
    with pytest.raises(UserError, match="n00000009 is no class"):
        task.run(load("pixels"), tmp_path, preset(task), out)


@pytest.mark.parametrize("task", [imagenet_tasks.ImageNetC(), imagenet_tasks.ImageNet3DCC()], ids=lambda t: t.name)
def test_corruptions_in_their_folders(tmp_path, out, task):
    rng = np.random.default_rng(2)
    for corruption in ("fog", "contrast"):
        for severity in range(1, 6):
            for name, color in COLORS.items():
                shown = color if corruption == "contrast" or severity < 3 else COLORS["n00000001"]
                save(tmp_path / corruption / str(severity) / name / "a.png", shown, rng)
    changed = preset(task)
    if task.name == "imagenet_c":
        assert f"{tmp_path} lacks gaussian_noise" in task.check(tmp_path, task.options()).problems
    result = task.run(load("pixels"), tmp_path, changed, out)
    fog = (1 + 1 + 1 / 3 + 1 / 3 + 1 / 3) / 5
    assert result.items["fog"]["corrupted"] == pytest.approx(fog)
    assert result.metrics["corrupted / clean"].value == pytest.approx((fog + 1) / 2)
    assert result.groups["fog/5"]["top1"] == pytest.approx(1 / 3)


def test_vid_robust(tmp_path, out):
    rng = np.random.default_rng(3)
    colors = {"val/a/0.png": "n00000001", "val/a/1.png": "n00000003", "val/b/0.png": "n00000002"}
    for name, color in colors.items():
        save(tmp_path / name, COLORS[color], rng)
    for name, value in {
        "metadata/pmsets.json": {"val/a/0.png": ["val/a/1.png"], "val/b/0.png": []},
        "metadata/labels.json": {"val/a/0.png": [1], "val/a/1.png": [1], "val/b/0.png": [0]},
        "misc/rev_class_idx_map.json": {"0": [1, 2], "1": [0]},
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(value))
    task = imagenet_tasks.VidRobust()
    result = task.run(load("pixels"), tmp_path, preset(task), out)
    assert (result.metrics["pm-10"].value, result.metrics["anchor"].value) == (0.5, 1)
    (tmp_path / "val" / "b" / "0.png").unlink()
    assert "is missing" in task.check(tmp_path, task.options()).problems[0]


@pytest.fixture
def thousand(tmp_path):
    """A classifier of 1000 classes for pixels: blue is an airplane, green an oven, red a truck."""
    weight = torch.zeros(1000, 768)
    for channel, name in ((2, "airplane"), (1, "oven"), (0, "truck")):
        weight[human.MEMBERS[name][0]].view(3, -1)[channel] = 1.0
    notes = {"classes": " ".join(f"n{i:08d}" for i in range(1000)), "size": "32", "features": "pooled", "top1": "0.5"}
    path = tmp_path / "thousand.safetensors"
    LinearProbe(weight, torch.zeros(1000), 0.1).save(path, **notes)
    return str(path)


def test_shape_bias_and_error_consistency(tmp_path, thousand):
    rng, data = np.random.default_rng(4), tmp_path / "data"
    shown = {"airplane1-oven2": 0, "airplane2-truck1": 0, "oven1-truck2": 2, "oven2-oven1": 1, "truck1-airplane3": 1}
    for name, color in shown.items():
        save(data / name.rstrip("0123456789").split("-")[0][:-1] / f"{name}.png", list(COLORS.values())[color], rng)
    task = imagenet_tasks.ShapeBias()
    result = task.run(load("pixels"), data, preset(task, head=thousand), tmp_path / "out")
    assert result.metrics["shape bias"].value == pytest.approx(2 / 3)
    assert result.metrics["decided by a cue"].value == 0.75
    assert result.groups["airplane"] == {"shape bias": 1}
    assert result.groups["truck"] == {"shape bias": None}
    task = imagenet_tasks.ErrorConsistency()
    assert "no CSV files of subjects" in task.check(data, task.options(subset=True)).problems[0]
    right = [True, True, False, True, False]  # as the encoder
    lines = ["subj,session,trial,rt,object_response,category,condition,imagename"]
    for subject, answers in (("subject-01", right), ("subject-02", [not ok for ok in right])):
        for number, (name, ok) in enumerate(zip(shown, answers, strict=True)):
            shape = name.split("-")[0][:-1]
            response = shape if ok else "dog"
            lines.append(f"{subject},1,{number},0.5,{response},{shape},0,{number:04d}_cue_{name}.png")
    (data / "cue-conflict_subjects.csv").write_text("\n".join(lines))
    result = task.run(load("pixels"), data, preset(task, head=thousand), tmp_path / "out")
    opposite = human.error_consistency(right, [not ok for ok in right])
    assert result.items["subject-01"] == {"kappa": 1, "kappa among people": pytest.approx(opposite)}
    assert result.items["subject-02"]["kappa"] == pytest.approx(opposite)
    assert result.metrics["accuracy"].value == pytest.approx(0.6)
    (data / "zebra1-dog2.png").write_bytes(b"")
    assert "two of the 16 classes" in task.check(data, task.options()).problems[0]


def jpeg(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "JPEG")
    return buffer.getvalue()


def test_clickme_drops_the_incomplete_batch(tmp_path, thousand):
    rng, data = np.random.default_rng(5), tmp_path / "clickme"
    data.mkdir()
    y, x = np.mgrid[:256, :256]
    records = []
    for number in range(66):
        image = np.full((256, 256, 3), rng.integers(0, 256, 3), np.uint8)
        heatmap = np.zeros((256, 256)) if number == 3 else 255 * np.exp(-((y - 128) ** 2 + (x - 128) ** 2) / 4000)
        features = {"image": [jpeg(image)], "heatmap": [jpeg(heatmap.astype(np.uint8))], "label": [number % 1000]}
        records.append(encode_example(features))
    write_records(data / "val-0.tfrecords", records[:40])
    write_records(data / "val-10.tfrecords", records[60:])
    write_records(data / "val-9.tfrecords", records[40:60])
    assert [path.name for path in saliency_task.shards(data)] == [
        "val-0.tfrecords",
        "val-9.tfrecords",
        "val-10.tfrecords",
    ]
    task = saliency_task.ClickMe()
    result = task.run(load("pixels"), data, preset(task, head=thousand), tmp_path / "out")
    assert len(result.items) == 64
    # A linear classifier of 16 x 16 means has the same gradient everywhere: no map has a correlation.
    assert result.metrics["alignment"].value is None
    assert result.notes[-2].startswith("64 of 64 gradient maps are constant")
    assert 0.9 < result.metrics["center prior spearman"].value <= 1
    assert result.metrics["center prior spearman"].n == 63
    assert "3 files, and the benchmark has 17" in task.check(data, task.options()).problems
    write_records(data / "val-9.tfrecords", [b"\x0a\x00"] * 20)
    with pytest.raises(UserError, match=r"val-9\.tfrecords holds a record that is not ClickMe's"):
        list(saliency_task.batches(data))
    with pytest.raises(UserError, match="no val-0"):
        saliency_task.shards(tmp_path)


def test_gradients_of_a_network(tmp_path):
    """The gradient through a ResNet leaves parameters and buffers alone, and reads the features of the classifier."""
    encoder = load("random:resnet18")
    before = {name: tensor.clone() for name, tensor in encoder.backbone.state_dict().items()}
    probe = LinearProbe(torch.randn(7, 512, generator=torch.Generator().manual_seed(0)), torch.zeros(7), 0.1)
    options = imagenet_tasks.FolderOptions(size=224)
    classifier = imagenet_tasks.Classifier(encoder, probe, [str(i) for i in range(7)], options, 1.0)
    y, x = torch.meshgrid(torch.arange(224.0), torch.arange(224.0), indexing="ij")
    heat = (-((y - 90) ** 2 + (x - 100) ** 2) / 3000).exp()[None]
    found = saliency_task.correlations(classifier, torch.rand(1, 3, 224, 224), heat, torch.tensor([2]))
    assert set(found) == {"gradient", "center prior"}
    assert abs(found["gradient"][0]) < 1
    assert all(torch.equal(before[name], tensor) for name, tensor in encoder.backbone.state_dict().items())
    assert all(parameter.grad is None for parameter in encoder.backbone.parameters())
    inputs = encoder.normalize(torch.rand(1, 3, 64, 64))
    features = saliency_task.differentiable(encoder, inputs, "pooled")
    torch.testing.assert_close(features.detach(), encoder.pooled(inputs), rtol=1e-4, atol=1e-5)
