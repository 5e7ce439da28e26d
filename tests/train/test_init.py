"""``vito-fast init``: a proposal that trains, and its reasons."""

import dataclasses

import pytest
import torch

from vito_fast.cli.main import main
from vito_fast.cli.overrides import configured
from vito_fast.cli.train import Train
from vito_fast.config_files import load_config
from vito_fast.errors import UserError
from vito_fast.plan import propose
from vito_fast.plan.propose import Footage
from vito_fast.train.loop import train

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def footage(clips, short_side=256, **values):
    return Footage("videos", clips, clips / 360, clips, short_side, 1, 1e6, False, **values)


@pytest.mark.parametrize("clips", [8, 27, 3000, 100_000, 2_000_000])
@pytest.mark.parametrize("device", [CPU, GPU])
def test_a_proposal_fits_the_store_and_moves_as_far_as_the_paper(clips, device):
    config, reasons = propose.propose(footage(clips), "s", device)
    steps = config.schedule.epochs * clips / config.train.batch_size
    assert 4 <= config.train.batch_size <= clips // 2
    assert steps == pytest.approx(round(steps), abs=0.05)
    assert 499 <= steps <= 100_000
    peak = config.optimizer.base_lr * config.train.batch_size / 256
    assert peak * config.optimizer.trust_coefficient == pytest.approx(0.005, rel=0.05)
    assert config.sampler.size <= 224
    assert any(f"batch {config.train.batch_size}" in line for line in reasons)
    if clips == 2_000_000 and device is GPU:
        assert (config.train.batch_size, config.optimizer.base_lr, config.schedule.base_ema) == (4096, 0.3, 0.99)


def test_small_frames_and_too_few_clips():
    assert propose.propose(footage(100, short_side=150), "s", GPU)[0].sampler.size == 128
    with pytest.raises(UserError, match="about 7 clips of 10 s, and at least 8 are needed"):
        propose.propose(footage(7), "s", CPU)


def test_from_videos_to_a_run(tmp_path, make_clip, capsys, monkeypatch):
    """Unpacked footage of two shapes and a broken file; then the store; then the run, named after the file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    for seed in range(9):
        make_clip(tmp_path / "mine" / f"{seed}.mp4", seed)
    (tmp_path / "mine" / "broken.mp4").write_text("hello")
    assert main(["init", "mine", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "9 clips, if packed in 10 s" in said or "10 clips, if packed in 10 s" in said
    for words in ("batch 4", "learning rate", "time: about", "disk:", "next: vito-fast pack mine data/mine/store"):
        assert words in said
    assert said.splitlines()[-1] == "next: vito-fast train mine.yaml"
    config = load_config("mine.yaml")
    assert (config.name, config.data.store, config.sampler.size) == ("mine", "data/mine/store", 64)
    assert main(["init", "mine"]) == 2
    assert "mine.yaml is there already" in capsys.readouterr().err
    assert main(["init", "mine", "--check", "vito_r50_8xh100"]) == 2
    assert "clips, fewer than one batch of 4096: lower" in capsys.readouterr().err
    assert main(["init", "mine", "--check", "mine.yaml"]) == 0
    assert main(["pack", "mine", "data/mine/store", "--processes", "1"]) == 0
    assert main(["init", "data/mine/store", "store.yaml", "--device", "cpu"]) == 0
    assert "9 clips of a store" in capsys.readouterr().out
    small = dataclasses.replace(config, sampler=dataclasses.replace(config.sampler, size=32))
    assert train(small, max_steps=1)["step"] == 1


def test_yes_or_no_is_written_either_way():
    def compiled(*words):
        return configured("train", Train, ["vito_r50_8xh100", *words]).config.train.compile

    assert [compiled(), compiled("--train.compile", "true"), compiled("--train.compile")] == [True] * 3
    assert [compiled("--train.compile", "false"), compiled("--train.compile=False")] == [False] * 2
    assert not compiled("--train.no-compile")
    assert configured("train", Train, ["demo", "--train.compile=true"]).config.train.compile
    assert configured("train", Train, ["demo", "--model.predictor", "true", "--resume"]).resume
    with pytest.raises(UserError, match="must be true or false, got 'maybe'"):
        compiled("--train.compile=maybe")


def test_a_name_is_the_files_and_presets_are_extended_by_name(tmp_path):
    (tmp_path / "mine.yaml").write_text("extends: demo\nseed: 3\n")
    (tmp_path / "named.yaml").write_text("extends: mine.yaml\nname: other\n")
    mine, named = load_config(tmp_path / "mine.yaml"), load_config(tmp_path / "named.yaml")
    assert (mine.name, mine.seed, mine.model) == ("mine", 3, load_config("demo").model)
    assert (named.name, named.seed) == ("other", 3)
    (tmp_path / "bad.yaml").write_text("extends: no_such\n")
    with pytest.raises(UserError, match=r"cannot read the configuration .*no_such"):
        load_config(tmp_path / "bad.yaml")
