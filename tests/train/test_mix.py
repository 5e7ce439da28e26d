"""A run on several or filtered stores: its configuration, its samples and exact resume."""

import dataclasses
from pathlib import Path

import pytest
import torch

from vito_fast.cli.overrides import configured
from vito_fast.cli.train import Train
from vito_fast.config import DataConfig
from vito_fast.config_files import load_config, save_config
from vito_fast.data.loader import loader
from vito_fast.data.pack.pack import pack
from vito_fast.errors import UserError
from vito_fast.train.checkpoint import checkpoints, read
from vito_fast.train.distributed import init_distributed, shutdown
from vito_fast.train.loop import train
from vito_fast.train.run import make_loader


@pytest.fixture(scope="module")
def other(make_clip, tmp_path_factory):
    """A store of a single video, which has no negatives of its own."""
    folder = tmp_path_factory.mktemp("other")
    (folder / "videos").mkdir()
    make_clip(folder / "videos" / "7.mp4", 7)
    pack(folder / "videos", folder / "store", progress=False, processes=1)
    return str(folder / "store")


def mixed(config, name, *entries):
    return dataclasses.replace(config, name=name, data=dataclasses.replace(config.data, mix=entries))


def final(config):
    return read(checkpoints(Path(config.train.runs) / config.name / "checkpoints")[0])


def test_a_mixed_run_resumes_exactly_and_with_its_weights_alone(config, other, capsys):
    whole, parts = mixed(config, "whole", f"{other}=0.5"), mixed(config, "parts", f"{other}=0.5")
    train(whole, max_steps=4)
    assert "7 clips in 2 stores, 4 steps of 3" in capsys.readouterr().out
    for steps in (2, 4):
        train(parts, resume=True, max_steps=steps)
    left, right = final(whole), final(parts)
    assert left.state["step"] == right.state["step"] == 4
    for name, tensor in left.tensors.items():
        assert torch.equal(tensor, right.tensors[name]), name
    with pytest.raises(UserError, match=r"other stores or weights than data.mix .*=0.25: resume with .*=0.5$"):
        train(mixed(config, "parts", f"{other}=0.25"), resume=True)
    with pytest.raises(UserError, match="made on 7 clips, the store"):
        train(mixed(config, "parts"), resume=True)


def test_a_filtered_run_resumes_with_its_filter_alone(config, capsys, monkeypatch):
    def where(*entries):
        return dataclasses.replace(config, data=dataclasses.replace(config.data, where=entries))

    train(where("sources=[0-3].mp4"), max_steps=2)
    assert ": 4 clips, " in capsys.readouterr().out
    for entries, words in (((), "sources=.*: resume"), (("sources=[0-4].mp4",), "with data.where sources=")):
        with pytest.raises(UserError, match=words):
            train(where(*entries), resume=True)
    train(where("sources=[0-3].mp4"), resume=True, max_steps=3)
    assert "continues after step 2" in capsys.readouterr().out
    monkeypatch.setattr(loader, "_digest", lambda clips: "/of as many others")
    with pytest.raises(UserError, match=r"on other clips than the stores hold now: resume on the same$"):
        train(where("sources=[0-3].mp4"), resume=True)


def test_the_loader_takes_the_weights(config, other):
    data = dataclasses.replace(config.data, store=other, mix=(f"{config.data.store}=3",))
    world = init_distributed("cpu", 60)
    try:
        with make_loader(dataclasses.replace(config, data=data), world) as loader:
            seen = torch.cat([loader.batch(step)["store"] for step in range(60)])
    finally:
        shutdown()
    assert abs(seen.float().mean().item() - 0.75) < 0.1


def test_files_and_the_command_line_name_stores(config, tmp_path):
    given = mixed(config, "run", "a=b/c=2", "d=0.5")
    assert given.data.weights == {config.data.store: 1.0, "a=b/c": 2.0, "d": 0.5}
    save_config(given, tmp_path / "run.yaml")
    assert load_config(tmp_path / "run.yaml") == given
    words = [str(tmp_path / "run.yaml"), "--data.mix", "e=1", "f=3"]
    assert configured("train", Train, words).config.data.mix == ("e=1", "f=3")


@pytest.mark.parametrize(
    "entries",
    [("a",), ("a=",), ("=1",), ("a=x",), ("a=0",), ("a=-1",), ("a=nan",), ("a=inf",), ("a=1", "a=2"), ("s=1",)],
)
def test_entries_that_make_no_sense(entries):
    with pytest.raises(ValueError, match=r"data\.mix must be stores as PATH=WEIGHT"):
        DataConfig(store="s", mix=entries)
    with pytest.raises(ValueError, match=r"data\.mix must be weights"):
        DataConfig(store="s", mix=("a=1e-5",))
