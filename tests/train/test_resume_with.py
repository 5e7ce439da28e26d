"""Runs that start from weights, and runs that change when they resume."""

import dataclasses
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file

from vito_fast.cli.overrides import configured
from vito_fast.cli.train import Train
from vito_fast.config_files import with_changes
from vito_fast.errors import UserError
from vito_fast.export import export
from vito_fast.model import VitoModel
from vito_fast.train.checkpoint import find
from vito_fast.train.initial import initialize
from vito_fast.train.loop import train
from vito_fast.train.metrics import read_rows
from vito_fast.train.optim import Schedule


def weights_of(config):
    return find(f"{config.train.runs}/{config.name}", pytest.fail)


def test_a_run_starts_from_a_run_a_file_or_an_export_alike(config, tmp_path, capsys):
    train(config, max_steps=2)
    run = tmp_path / "runs" / config.name
    exported = export(run, tmp_path / "encoder").path
    torch.save(
        {"state_dict": {f"module.{k}": v for k, v in find(run).part("model.online.backbone.body.").items()}},
        tmp_path / "x.pth",
    )
    wanted = find(run).part("model.online.")
    for number, source in enumerate((run, exported, tmp_path / "x.pth")):
        model = VitoModel(config.model)
        told = initialize(model, str(source))
        for branch in (model.online, model.target):
            found = branch.state_dict()
            assert all(torch.equal(found[k], v) for k, v in wanted.items() if k.startswith("backbone."))
            assert all(torch.equal(found[k], v) for k, v in wanted.items()) == (number == 0)
        assert ("pools, projectors" in told) == (number == 0)
    capsys.readouterr()
    begun = dataclasses.replace(config, name="begun", model=dataclasses.replace(config.model, init=str(exported)))
    train(begun, max_steps=1)
    assert f"starts from {exported}: backbone" in capsys.readouterr().out
    exported.unlink()
    train(begun, resume=True, max_steps=2)  # the checkpoint has all that is needed


def test_a_run_starts_from_torchvisions_file_and_names_another_network(config, tmp_path):
    resnet = torchvision.models.resnet18()
    save_file(resnet.state_dict(), tmp_path / "r18.safetensors")
    model = VitoModel(dataclasses.replace(config.model, backbone="resnet18"))
    initialize(model, str(tmp_path / "r18.safetensors"))
    assert torch.equal(model.target.backbone.layer4[1].conv2.weight, resnet.layer4[1].conv2.weight)
    with pytest.raises(UserError, match=r"r18\.safetensors (lacks|is of another)"):
        initialize(VitoModel(dataclasses.replace(config.model, backbone="resnet34")), str(tmp_path / "r18.safetensors"))
    with pytest.raises(UserError, match="no encoder nowhere"):
        initialize(model, "nowhere")


def test_a_run_goes_on_with_other_values_and_remembers_them(config, capsys):
    twice = dataclasses.replace(config.schedule, epochs=8.0)
    often = dataclasses.replace(config.train, log_every=1, batch_size=6)
    config = dataclasses.replace(config, schedule=twice, train=often)
    train(config, max_steps=2)
    longer = dataclasses.replace(config, schedule=dataclasses.replace(config.schedule, epochs=16.0))
    written = Path(config.train.runs, config.name, "config.yaml")
    before = written.read_text()
    with pytest.raises(UserError, match=r"other values of schedule\.epochs: .*--resume-with schedule\.epochs=VALUE"):
        train(longer, resume=True)
    assert written.read_text() == before
    capsys.readouterr()
    for stop in (3, 4):  # as a job that is started again with the same words
        train(config, resume_with=["schedule.epochs=16"], max_steps=stop)
    said = capsys.readouterr().out
    assert said.count("changed after step 2: schedule.epochs 16.0 (was 8.0); steps 1 to 2 are those of the old") == 1
    found = weights_of(config)
    assert found.state["changes"] == [{"step": 2, "fields": {"schedule.epochs": [8.0, 16.0]}}]
    assert found.state["config"]["schedule"]["epochs"] == 16
    rates = {row["step"]: row["lr"] for row in read_rows(found.path.parent.parent / "metrics.jsonl")}
    old, new = (Schedule(c, 0.5) for c in (config, longer))
    assert rates == {1: old.learning_rate(0), 2: old.learning_rate(1), 3: new.learning_rate(2), 4: new.learning_rate(3)}
    train(config, resume_with=["schedule.epochs=16", "train.micro_batches=2"], max_steps=5)
    assert "train.micro_batches 2 (was 1); up to rounding the same run" in capsys.readouterr().out


def test_what_cannot_change_is_refused(config):
    for change, says in (
        ("model.levels=1", "a run cannot change it"),
        ("schedule.epoch=1", "did you mean 'schedule.epochs'"),
        ("schedule.epochs", "is no section.field=value"),
        ("schedule.epochs=-1", "above 0"),
        ("schedule.epochs=x", "must be a number"),
    ):
        with pytest.raises(UserError, match=says):
            with_changes(config, [change])


def test_the_command_line_takes_several_changes():
    words = ["demo", "--resume-with", "schedule.epochs=9", "optimizer.base_lr=0.1", "--max-steps", "3"]
    assert configured("train", Train, words).resume_with == ("schedule.epochs=9", "optimizer.base_lr=0.1")
