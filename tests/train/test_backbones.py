"""Whole runs with backbones of other families: evaluated, killed, resumed, drawn, exported."""

import copy
import dataclasses
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torchvision.transforms import v2

from vito_fast.cli.main import main
from vito_fast.config import OptimizerConfig
from vito_fast.config_files import save_config
from vito_fast.train import probe
from vito_fast.train.attention_maps import load_online
from vito_fast.train.checkpoint import find
from vito_fast.train.distributed import World
from vito_fast.train.loop import train
from vito_fast.train.metrics import read_rows
from vito_fast.train.trainer import Trainer

FAMILIES = {
    "ViT": "timm:test_vit3",
    "EfficientNet": "timm:test_efficientnet",
    "MobileNet": "torchvision:mobilenet_v3_small",
}


def using(config, **model):
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **model))


KILLED = """
import os, signal, sys
from vito_fast.config_files import load_config
from vito_fast.train import Callback, train

class Kill(Callback):
    def step_end(self, run, step, row):
        if step == 3:
            os.kill(os.getpid(), signal.SIGKILL)

for path in sys.argv[1:]:
    child = os.fork()
    if not child:
        train(load_config(path), callbacks=[Kill()])
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
"""


def test_a_run_of_each_family_is_evaluated_killed_resumed_and_exported(config, tmp_path, capfd):
    """From the first step to the features of a file, which are those of the network that was trained."""
    changes = {"checkpoint_every": 1, "keep_last": 9}
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, **changes))
    runs = [dataclasses.replace(using(config, backbone=kind), name=name) for name, kind in FAMILIES.items()]
    paths = [tmp_path / f"{run.name}.yaml" for run in runs]
    for run, path in zip(runs, paths, strict=True):
        save_config(run, path)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", KILLED, *map(str, paths)], check=True, timeout=300, env=environment)
    (tmp_path / "images").mkdir()
    picture = np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "images" / "a.png")
    for run in runs:
        folder = tmp_path / "runs" / run.name
        assert [row["step"] for row in read_rows(folder / "metrics.jsonl")] == [1, 2]
        assert train(run, resume=True)["step"] == 4
        assert {p.name for p in (folder / "attention").iterdir()} == {f"step-0000000{step}.png" for step in (2, 4)}
        assert [row["step"] for row in read_rows(folder / "evaluations.jsonl")] == [0, 2, 4]
        found = []
        for encoder in (folder, tmp_path / f"{run.name}.safetensors"):
            if encoder.suffix:
                assert main(["export", str(folder), str(encoder.with_suffix(""))]) == 0
            assert main(["features", str(encoder), str(tmp_path / "images"), str(tmp_path / "f.safetensors")]) == 0
            found.append(load_file(tmp_path / "f.safetensors")["features"])
        x = v2.CenterCrop(32)(v2.Resize(37)(torch.from_numpy(picture).permute(2, 0, 1))).float() / 255
        x = v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])(x)
        with torch.no_grad():
            trained = load_online(find(folder)).backbone(x[None])[-1].mean((2, 3))
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], trained)
    said = capfd.readouterr().out
    assert said.count("continues after step") == len(runs)
    assert "warning: no" not in said


def test_a_network_of_one_shape_is_drawn_by_frames_of_that_shape(config, tmp_path, monkeypatch):
    """As those whose windows or bias tables timm does not resize."""
    config = using(config, backbone="timm:test_vit3")
    frames = probe.draw(config, 6)
    assert frames.shown.shape == (6, 32, 64, 3)
    branch = probe.Branch(config.model, predictor=False).eval()
    forward = type(branch.backbone).forward

    def square(self, x):
        assert x.shape[2:] == (32, 32), "another size"
        return forward(self, x)

    monkeypatch.setattr(type(branch.backbone), "forward", square)
    probe.picture(branch, frames, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_no_evaluation_ends_a_run(config, monkeypatch, capsys):
    """A failing part is one line a time, the others are there, and the numbers are those of a run without."""

    def fails(*_):
        raise RuntimeError("out of\nmemory")

    train(dataclasses.replace(config, name="whole"))
    for part in ("picture", "evaluate", "baselines"):
        monkeypatch.setattr(probe, part, fails)
    train(config)
    said = capsys.readouterr().out
    for part in ("baselines of retrieval", "retrieval at step 2", "attention picture at step 2", "retrieval at step 4"):
        assert f"warning: no {part}: out of memory; the run goes on\n" in said
    whole, found = (find(f"{config.train.runs}/{name}").part("model.") for name in ("whole", "r"))
    assert all(torch.equal(tensor, found[name]) for name, tensor in whole.items())


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_drop_path_is_of_the_step_and_not_of_what_ran_before(config, micro_batches):
    """Whatever has drawn numbers before, and in both passes of a micro-batch: the gradient is that of one function."""
    config = using(config, backbone="timm:test_convnext", drop_path=0.5)
    config = dataclasses.replace(
        config, train=dataclasses.replace(config.train, micro_batches=micro_batches, dtype="float64")
    )
    trainer = Trainer(config, World(0, 1, 1, torch.device("cpu")), 3)
    views, video = tuple(torch.randn(2, 6, 3, 32, 32)), torch.arange(6)
    before = copy.deepcopy(trainer.model.state_dict())
    results = []
    for number in range(2):
        trainer.model.load_state_dict(before)
        trainer.step_count = 1
        trainer.optimizer.load_state_dict({k: torch.zeros_like(v) for k, v in trainer.optimizer.state_dict().items()})
        torch.manual_seed(number)
        results.append(trainer.step(views, video, measure=True) | trainer.model.state_dict())
    one, two = results
    assert all(torch.equal(torch.as_tensor(value), torch.as_tensor(two[name])) for name, value in one.items())
    a, b, other = (trainer._online(views, i)[0][0] for i in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, other)


def test_adamw_runs_resume_and_skip(config):
    recipe = OptimizerConfig(name="adamw", base_lr=0.01, layer_decay=0.7, clip_norm=1.0)
    config = dataclasses.replace(config, optimizer=recipe, train=dataclasses.replace(config.train, evaluate_every=0))
    train(dataclasses.replace(config, name="whole"))
    for stop in (3, None):
        train(config, resume=True, max_steps=stop)
    whole, parts = (find(f"{config.train.runs}/{name}").tensors for name in ("whole", "r"))
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items() if not name.startswith("rng"))
    trainer = Trainer(config, World(0, 1, 1, torch.device("cpu")), 3)
    before = copy.deepcopy(trainer.state()[0])
    trainer.step(tuple(torch.full((2, 3, 3, 32, 32), torch.nan)), torch.arange(3), measure=False)
    after = trainer.state()[0]
    assert after.pop("skipped").tolist() == [1, 1]
    assert all(torch.equal(after[name], before[name]) for name in after)
