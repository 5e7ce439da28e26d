"""``make gpu-report`` without a GPU: its list, its budgets, and what an early end leaves."""

from __future__ import annotations

import json
import sys

import pytest

from bench import gpu_report
from bench.gpu_report import STAGES, Stage


def stage(name: str, code: str, seconds: float = 60, needs: tuple[str, ...] = ()) -> Stage:
    return Stage(name, seconds, "a test", needs, lambda results: [sys.executable, "-c", code, str(results)])


@pytest.fixture
def run(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_report, "machine", lambda device: {"name": "a-gpu"})
    return lambda stages, seconds=60.0: gpu_report.run(stages, seconds, tmp_path)


def test_a_dry_run_lists_every_stage_within_ten_minutes(capsys):
    assert gpu_report.main(["--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert all(f"{stage.name:9}{stage.seconds:4.0f} s" in shown for stage in STAGES)
    assert sum(stage.seconds for stage in STAGES) <= 60 * gpu_report.MINUTES
    for part in STAGES:
        for word in part.command(gpu_report.ROOT / "results.json"):
            assert not word.endswith("_kernel.py") or (gpu_report.ROOT / word).exists()


def test_without_a_gpu_nothing_runs(monkeypatch, capsys):
    monkeypatch.setattr(gpu_report.torch.cuda, "is_available", lambda: False)
    assert gpu_report.main([]) == 1
    assert "no GPU" in capsys.readouterr().err


def test_each_stage_leaves_its_results_before_the_next(run, tmp_path):
    seen = "import sys, json, pathlib; p = pathlib.Path(sys.argv[1]); p.write_text('{}'); "
    count = "print(len(json.load(open(p.parent / 'a-gpu-report.json'))['stages'])); sys.exit(3)"
    done = run([stage("first", seen), stage("second", seen + count), stage("third", seen, needs=("no_such.module",))])
    assert [row["status"] for row in done] == [0, 3, "left out: no no_such.module"]
    assert done[0]["files"] == ["a-gpu-first.json", "a-gpu-first.log"]
    assert (tmp_path / "a-gpu-second.log").read_text() == "1\n"
    assert json.loads((tmp_path / "a-gpu-report.json").read_text())["stages"] == done
    assert not list(tmp_path.glob("*.tmp"))


def test_a_stage_ends_with_its_budget_and_the_rest_with_the_time(run):
    done = run([stage("slow", "import time; time.sleep(60)", 0.2), stage("next", "pass")], 5.1)
    assert done[0]["status"] == "stopped: its time was over"
    assert done[0]["seconds"] < 30
    assert done[1]["status"] == "left out: the time was over"
