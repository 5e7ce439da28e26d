"""Every task that trains, end to end on tiny copies: it learns, resumes after kill -9, and is the same on two ranks."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from forks import forked, on_ranks
from tiny import tiny_encoder

from vito_fast.evaluate import detection, detection_models, segmentation_task
from vito_fast.evaluate.finetune import finetune
from vito_fast.evaluate.result import load
from vito_fast.evaluate.task import find_preset, find_task
from vito_fast.train import checkpoint
from vito_fast.train.checkpoint import checkpoints, read_newest
from vito_fast.train.metrics import read_rows

SMALL = {"batch_size": 4, "subset": True, "schedule": "cosine", "dtype": "float32", "optimizer": "adamw", "lr": 0.01}
CLIPS = {"frames": 2, "fps": 8.0, "size": 32, "test_clips": 1, "jitter": (0.0,) * 4, "min_area": 0.6, "dropout": 0.1}
CROPS = {"crop": 48, "scales": (1.0, 1.0), "stride": 4, "photometric": False, "test_short": 0}
CROPS |= {"optimizer": "sgd", "lr": 0.1}
BOXES = {"height": 64, "width": 96, "jitter": (1.0, 1.05), "warmup_steps": 5, "clip_norm": 5.0, "lr": 2e-3, "rois": 16}
CASES = {
    "ucf101": ("ucf101", "finetune", CLIPS),
    "pascal": ("pascal", "fcn", CROPS),
    "ade20k": ("ade20k", "fcn", CROPS),
    "coco": ("coco", "fcos", BOXES),
    "lvis": ("lvis", "fcos", BOXES),
    "maskrcnn": ("coco", "maskrcnn", BOXES | {"batch_size": 2, "width": 64, "rois": 8}),
}


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    """Heads of 64 channels: those of 256 take most of the time."""
    for module in (detection_models, segmentation_task):
        monkeypatch.setattr(module, "WIDTH", 64)


def run(case, copies, out, **changes):
    name, preset, options = CASES[case]
    task = find_task(name)
    chosen = find_preset(task, preset).with_options({**SMALL, **options, **changes})
    return task.run(tiny_encoder(), copies[name], chosen, Path(out))


@pytest.mark.parametrize(
    ("case", "epochs", "metrics"),
    [
        ("ucf101", 12, {"top1": 1.0}),
        ("pascal", 50, {"miou": 0.88, "pixel_accuracy": 0.95}),
        ("ade20k", 70, {"miou": 0.8, "pixel_accuracy": 0.93}),
        ("coco", 24, {"AP50": 0.95, "AP": 0.6}),
        ("lvis", 24, {"AP50": 0.95, "AP": 0.6}),
    ],
)
def test_it_learns_what_it_is_shown(copies, tmp_path, case, epochs, metrics):
    encoder = tiny_encoder()
    before = {name: t.clone() for name, t in encoder.backbone.state_dict().items()}
    result = run(case, copies, tmp_path, epochs=epochs)
    for name, least in metrics.items():
        assert result.metrics[name].value >= least
    assert result.encoder.sha256 == encoder.record.sha256
    assert all(torch.equal(t, before[name]) for name, t in encoder.backbone.state_dict().items())
    if case != "ucf101":
        assert result.primary[1].standard_error is not None
        assert len(result.resamples[result.primary[0]]) >= 200
    if case == "coco":  # any tool that reads COCO's results files gives the same
        truth = json.loads((copies["coco"] / "annotations" / "instances_val2017.json").read_text())
        found = json.loads(next(tmp_path.rglob("detections.json")).read_text())
        assert detection.coco_ap(truth, found)["AP"] == pytest.approx(result.metrics["AP"].value, abs=1e-9)
    assert load(next(tmp_path.rglob(f"{result.task}-*.json"))).metrics == result.metrics


@pytest.mark.parametrize("case", CASES)
def test_kills_and_ranks_change_nothing(copies, tmp_path, case, monkeypatch):
    """Killed after the second of four steps and resumed: the same bits. On two gloo ranks: the same up to rounding."""
    monkeypatch.setitem(finetune.__kwdefaults__, "checkpoint_every", 2)
    options = {**SMALL, **CASES[case][2]}
    samples = {"ucf101": 9, "ade20k": 6}.get(case, 8)
    # Training is chaotic: at a high rate four steps are enough to tell sums in another order apart.
    changes = {"epochs": 4 * options["batch_size"] / samples, "lr": options["lr"] / 10}
    outs = {name: tmp_path / name for name in ("whole", "killed", "ranks")}
    whole = run(case, copies, outs["whole"], **changes)
    assert forked(killed_after_a_checkpoint, case, copies, outs["killed"], changes) == -signal.SIGKILL
    assert [p.name for p in checkpoints(folder(outs["killed"]))] == ["step-00000002.safetensors"]
    resumed = run(case, copies, outs["killed"], **changes)
    assert (resumed.metrics, resumed.items, resumed.groups) == (whole.metrics, whole.items, whole.groups)
    expected, found = (read_newest(folder(outs[name])).part("") for name in ("whole", "killed"))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    rows = [read_rows(folder(outs[name]).parent / "metrics.jsonl") for name in ("whole", "killed")]
    assert rows[0] == rows[1]

    on_ranks(2, tmp_path / "store", rank_of_two, case, copies, outs["ranks"], changes)
    found = read_newest(folder(outs["ranks"])).part("model.")
    for name, tensor in read_newest(folder(outs["whole"])).part("model.").items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-2, atol=2e-3, msg=name)
    two = load(next(outs["ranks"].rglob(f"{whole.task}-*.json")))
    for name, metric in whole.metrics.items():
        assert two.metrics[name].n == metric.n
        assert two.metrics[name].value == pytest.approx(metric.value, abs=0.05)


def folder(out):
    """Where a run's checkpoints are."""
    return next(out.rglob("checkpoints"))


def killed_after_a_checkpoint(case, copies, out, changes):
    write = checkpoint.write

    def write_and_die(path, *args):
        write(path, *args)
        os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.write = write_and_die
    run(case, copies, out, **changes)


def rank_of_two(_, case, copies, out, changes):
    run(case, copies, out, **changes)
