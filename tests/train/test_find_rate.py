"""The learning-rate finder: its judgement on made-up sweeps, and a sweep of a small run."""

import dataclasses

import numpy as np
import pytest

from vito_fast.cli.main import main
from vito_fast.config_files import save_config
from vito_fast.errors import UserError
from vito_fast.train.find_rate import find_rate, judge


def test_the_steepest_fall_lies_before_the_lowest_loss():
    rates = np.geomspace(1e-3, 10, 81)
    places = np.log10(rates)
    losses = 3 - 2 / (1 + np.exp(-4 * (places + 1))) + np.where(places > 0.4, (places - 0.4) * 5, 0)
    found = judge(rates.tolist(), losses.tolist())
    assert found.steepest == pytest.approx(0.1, rel=0.2)
    assert 1 < found.lowest < 4


@pytest.mark.parametrize("losses", [[], [3.0] * 20, list(np.linspace(3, 4, 20))])
def test_a_loss_that_falls_at_no_rate_is_one_line(losses):
    with pytest.raises(UserError, match="falls at no rate"):
        judge(np.geomspace(1, 2, len(losses)).tolist() if losses else [], losses)


def test_a_sweep_proposes_a_rate_and_writes_nothing(config, tmp_path, capsys):
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=6))
    save_config(config, tmp_path / "c.yaml")
    before = sorted(tmp_path.rglob("*"))
    status = main(["lr-find", str(tmp_path / "c.yaml"), "--steps", "60", "--low", "1", "--high", "1e4"])
    said = capsys.readouterr()
    assert (status, said.err) == (0, "")
    assert "propose: --optimizer.base-lr" in said.out
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(("steps", "low", "high"), [(19, 1, 2), (50, 2, 1), (50, 0, 1)])
def test_an_empty_sweep_is_refused(config, steps, low, high):
    with pytest.raises(UserError, match="a sweep of"):
        find_rate(config, steps, low, high, lambda *_: None)
