"""The fine-tuning loop learns, follows its schedules, resumes after kill -9, and is the same on two ranks."""

import dataclasses
import math
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).parent))
from forks import on_ranks
from toy_finetune import RECIPE, ToyData, ToyModel, rank_main, train

from vito_fast.errors import UserError
from vito_fast.evaluate.finetune import Recipe, _optimizer, finetune, generator
from vito_fast.train.checkpoint import checkpoints
from vito_fast.train.metrics import read_rows


def accuracy(model):
    data = ToyData()
    batch = data.collate([data.sample(i, np.random.default_rng(1000 + i)) for i in range(200)])
    with torch.no_grad():
        return (model.predict(batch) == batch["labels"]).float().mean().item()


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_it_learns(tmp_path, optimizer):
    recipe = dataclasses.replace(RECIPE, optimizer=optimizer, lr=0.1 if optimizer == "sgd" else 0.02)
    before = accuracy(ToyModel().eval())
    model = train(tmp_path, recipe)
    assert not model.training
    assert accuracy(model) > 0.95 > before + 0.2
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert rows[-1]["step"] == 80
    assert rows[-1]["all"] < rows[0]["all"] / 2


def test_a_killed_run_resumes_to_the_same_result(tmp_path):
    script = str(Path(__file__).parent / "toy_finetune.py")
    work = tmp_path / "killed"
    for words, status in ((["14"], -signal.SIGKILL), ([], 0)):
        work.mkdir(exist_ok=True)
        assert subprocess.run([sys.executable, script, str(work), *words], check=False).returncode == status
        if words:
            assert checkpoints(work / "checkpoints")[0].name == "step-00000014.safetensors"
            assert not (work / "final.pth").exists()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the script does
    a = train(tmp_path / "whole", dropout=0.3).state_dict()
    torch.set_num_threads(threads)
    b = torch.load(work / "final.pth", weights_only=True)
    assert all(torch.equal(a[name], b[name]) for name in a)
    rows = [read_rows(tmp_path / name / "metrics.jsonl") for name in ("whole", "killed")]
    assert rows[0] == rows[1]


def test_two_ranks_give_what_one_process_gives(tmp_path):
    """Batch norm over both, counts over both, uneven shares too."""
    recipe = dataclasses.replace(RECIPE, batch_size=5, epochs=2)
    one = train(tmp_path / "one", recipe).state_dict()
    on_ranks(2, tmp_path / "store", rank_main, str(tmp_path), recipe)
    two = torch.load(tmp_path / "ranks.pth", weights_only=True)
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


def test_rates_are_the_formulas():
    assert Recipe(schedule="poly", power=0.9).rate(25, 100, 10) == pytest.approx(0.75**0.9)
    assert Recipe(schedule="cosine").rate(25, 100, 10) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    assert Recipe(schedule="exponential", gamma=0.01).rate(50, 100, 10) == pytest.approx(0.1)
    step = Recipe(schedule="step", gamma=0.3, milestones=(6, 10, 14), batch_size=5)  # 2 steps an epoch of 10
    assert [step.rate(s, 32, 10) for s in (11, 12, 19, 20, 28)] == pytest.approx([1, 0.3, 0.3, 0.09, 0.027])
    warm = Recipe(warmup_steps=4)
    assert [warm.rate(s, 100, 10) for s in (0, 3, 4)] == pytest.approx([0.2, 0.8, 1])
    assert Recipe(epochs=1.5, batch_size=4).steps(10) == 4


def test_groups_have_their_own_rates():
    groups = _optimizer(ToyModel(), Recipe(lr=1.0, backbone_lr=0.1, weight_decay=0.5, decay_norms=False)).param_groups
    found = {(g["lr"], g["weight_decay"]): sum(p.numel() for p in g["params"]) for g in groups}
    assert found == {(0.1, 0.5): 216, (0.1, 0.0): 8 + 16, (1.0, 0.5): 16, (1.0, 0.0): 2}


def test_a_frozen_backbone_stays(tmp_path):
    before = {name: t.clone() for name, t in ToyModel().backbone.state_dict().items()}
    model = train(tmp_path, dataclasses.replace(RECIPE, backbone_lr=0.0, epochs=1))
    assert all(torch.equal(t, before[name]) for name, t in model.backbone.state_dict().items())


def test_parts_of_a_batch_add_up(tmp_path):
    """Without batch norm in the way, two parts give what one gives, for a term whose count is the same in each."""
    recipe = dataclasses.replace(RECIPE, backbone_lr=0.0, epochs=1)
    for folder, parts in (("a", 1), ("b", 2)):
        model = ToyModel()
        loss = model.loss
        model.loss = lambda batch, loss=loss: {"all": loss(batch)["all"]}
        changed = dataclasses.replace(recipe, accumulate=parts)
        finetune(model, ToyData(), changed, tmp_path / folder, torch.device("cpu"), workers=0)
        torch.save(model.state_dict(), tmp_path / f"{folder}.pth")
    a, b = (torch.load(tmp_path / f"{x}.pth", weights_only=True) for x in "ab")
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-6)


def test_workers_give_what_the_process_gives(tmp_path):
    recipe = dataclasses.replace(RECIPE, epochs=1)
    a, b = train(tmp_path / "a", recipe), train(tmp_path / "b", recipe, workers=1)
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_a_loss_that_is_not_finite_is_the_users(tmp_path):
    with pytest.raises(UserError, match=r"the loss is not finite by step .*: lower the learning rate"):
        train(tmp_path, dataclasses.replace(RECIPE, lr=1e30))


def test_samples_have_generators_of_their_own():
    draws = {(s, n, k): generator(s, n, k).random() for s in range(3) for n in (0, 1, 255, 256) for k in range(3)}
    assert len(set(draws.values())) == len(draws)
