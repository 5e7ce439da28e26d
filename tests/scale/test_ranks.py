"""Ranks with unequal shares of the batch make the step of one process with all of it, gradient by gradient."""

import dataclasses
import errno
import re
from unittest import mock

import pytest
import torch
from ranks import spawn

from vito_fast.config import Config, LossConfig, ModelConfig, TrainConfig
from vito_fast.errors import UserError
from vito_fast.train import checkpoint, run
from vito_fast.train.distributed import World, init_distributed
from vito_fast.train.keys import PendingKeys, shares
from vito_fast.train.trainer import Trainer

ALONE = World(0, 1, 1, torch.device("cpu"))
CONFIG = Config(
    model=ModelConfig(backbone="timm:test_resnet", projector_hidden=16, projector_out=8, attention_hidden=8),
    train=TrainConfig(batch_size=9, dtype="float64", channels_last=False),
)
CASES = {
    "plain": CONFIG,
    "both views": dataclasses.replace(CONFIG, loss=LossConfig(negatives="both_views")),
    "byol": dataclasses.replace(CONFIG, loss=LossConfig(name="byol")),
    "cached": dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, micro_batches=2)),
}


def batch(clips):
    generator = torch.Generator().manual_seed(clips)
    views = tuple(torch.randn(clips, 3, 32, 32, generator=generator, dtype=torch.float64) for _ in range(3))
    return views, torch.arange(clips) // 2  # two clips of every video


def gradients(name, world, clips):
    """(row of metrics, each parameter's gradient, batch norms' buffers) of one step on this rank's share."""
    trainer = Trainer(CASES[name], world, 5)
    if name == "cached":  # by running statistics: a part's forward does not depend on the other parts
        trainer.model.eval()
    found = {}
    honest = trainer.optimizer.step

    def step(lr, finite):
        found.update({n: p.grad.clone() for n, p in trainer.model.online.named_parameters()})
        honest(lr, finite)

    trainer.optimizer.step = step
    before = sum(shares(clips, world.size)[: world.rank])
    mine = slice(before, before + shares(clips, world.size)[world.rank])
    views, video = batch(clips)
    row = trainer.step(tuple(v[mine] for v in views), video[mine], measure=True, total=clips)
    return row, found, dict(trainer.model.named_buffers())


def _rank(rank, clips, folder):
    world = init_distributed("cpu")
    torch.save({name: gradients(name, world, clips) for name in CASES}, folder / f"{rank}.pt")


@pytest.mark.parametrize(("ranks", "clips"), [(2, 9), (3, 8)])
def test_unequal_shares_equal_one_process(ranks, clips, tmp_path):
    spawn(_rank, ranks, clips, tmp_path)
    everyone = [torch.load(tmp_path / f"{rank}.pt") for rank in range(ranks)]
    for name in CASES:
        row, whole, buffers = gradients(name, ALONE, clips)
        for theirs, found, moved in (results[name] for results in everyone):
            for key in ("loss", "gradient_norm"):
                assert theirs[key] == pytest.approx(row[key], rel=1e-9), (name, key)
            for key in ("chance", "accuracy"):  # counted in float32
                assert theirs[key] == pytest.approx(row[key], rel=1e-6, nan_ok=True), (name, key)
            least = 1e-8 * row["gradient_norm"]  # of a bias before a batch norm only rounding is left
            for parameter, gradient in whole.items():
                error = (found[parameter] - gradient).norm() / gradient.norm().clamp(min=least)
                assert error < 1e-6, (name, parameter, float(error))
            for key, value in buffers.items():
                torch.testing.assert_close(moved[key], value, rtol=1e-9, atol=1e-12)


def _sees(rank, folder, sight):
    init_distributed("cpu")
    path = folder / "run"
    if rank == 1 and sight == "an old listing":
        run.read_newest = lambda _: checkpoint.read(checkpoint.path_of(path / "checkpoints", 1))
    if rank == 1 and sight == "no answer":
        run.read_newest = mock.Mock(side_effect=OSError(errno.EIO, "Input/output error", "step-2"))
    told = "all well"
    try:
        run._open_folder(path, True)
    except UserError as error:
        told = str(error)
    (folder / f"{rank}").write_text(told)


@pytest.mark.parametrize(
    ("sight", "told"),
    [
        ("one and the same", "all well"),
        ("an old listing", r"not find the same .*rank 0: step-00000002\.\w+ \(\w+\), rank 1: step-00000001\.\w+ "),
        ("no answer", r"not find the same .*rank 0: step-00000002.* rank 1: step-2 cannot be read: Input/output error"),
    ],
)
def test_ranks_do_not_go_on_from_different_checkpoints(sight, told, tmp_path):
    for step in (1, 2):
        path = checkpoint.path_of(tmp_path / "run" / "checkpoints", step)
        path.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.write(path, {"weight": torch.full((2,), float(step))}, {"step": step})
    spawn(_sees, 2, tmp_path, sight)
    for rank in "01":
        assert re.search(told, (tmp_path / rank).read_text())


def test_shares():
    assert shares(9, 2) == [5, 4]
    assert shares(8, 3) == [3, 3, 2]
    assert shares(8, 4) == [2, 2, 2, 2]
    with pytest.raises(ValueError, match="2 clips leave some of 3 ranks"):
        shares(2, 3)
    with pytest.raises(ValueError, match="rank 0 has 3 clips, its share of 9 is 9"):
        PendingKeys([torch.zeros(2, 3, 4)], torch.arange(3), ALONE, 9)


@pytest.mark.parametrize(
    ("launched", "message"),
    [
        ("WORLD_SIZE=two", "WORLD_SIZE must be a whole number, 1 or more, and is 'two': start the ranks with torchrun"),
        ("WORLD_SIZE=0", "WORLD_SIZE .* is '0'"),
        ("WORLD_SIZE=2", "RANK must be a whole number, 0 to 1, and is not set"),
        ("WORLD_SIZE=2 RANK=2", "RANK .* is '2'"),
        ("WORLD_SIZE=2 RANK=0 LOCAL_RANK=2", "LOCAL_RANK .* is '2'"),
        ("WORLD_SIZE=2 RANK=1 LOCAL_WORLD_SIZE=3", "LOCAL_WORLD_SIZE must be a whole number, 1 to 2, and is '3'"),
        ("WORLD_SIZE=2 RANK=1", r"rank 1 of 2 cannot join the others at \(MASTER_ADDR not set\)"),
        ("WORLD_SIZE=2 RANK=0 MASTER_ADDR=localhost MASTER_PORT=x", "cannot join the others at localhost:x: invalid"),
    ],
)
def test_an_environment_that_no_launcher_makes_is_named(launched, message, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for pair in launched.split():
        monkeypatch.setenv(*pair.split("="))
    with pytest.raises(UserError, match=message):
        init_distributed("cpu")
