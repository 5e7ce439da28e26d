"""Every swap in examples/ of a contrastive loss runs, and prints a loss."""

import re
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("name", ["cross_entropy", "lightly_ntxent", "open_clip_loss"])
def test_example_runs(name, capsys):
    runpy.run_path(str(EXAMPLES / f"{name}.py"))
    numbers = [float(x) for x in re.findall(r"\d+\.\d+", capsys.readouterr().out)]
    assert len(numbers) == 2
    if name == "cross_entropy":
        assert numbers[0] == pytest.approx(numbers[1], abs=1e-5)
