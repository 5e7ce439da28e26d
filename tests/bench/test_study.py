"""The study: intervals, verdicts, tables, and runs that are never repeated or mixed."""

import json
import math
import re

import pytest

from bench import study
from vito_fast.config_files import load_config


def fake(accuracy, gray=0.1):
    scores = {"pooled": [accuracy, 0.01], "averaged": [0.06, 0.01], "gray": [gray, 0.01]}
    base = {"clips": 240, "classes": 40, "chance": 0.025, "pixels": [0.05, 0.01], "histogram": [0.07, 0.01]}
    return base | {"trained": scores, "untrained": scores | {"pooled": [0.055, 0.01]}}


RESULTS = {
    "settings": {"steps": 9, "device": "cpu", "options": []},
    "runs": {
        study.VITO: {"0": fake(0.22), "1": fake(0.24), "2": fake(0.23)},
        study.SAME_FRAME: {"0": fake(0.10), "1": fake(0.11), "2": fake(0.09)},
        "ablation_crop_08": {"0": fake(0.28), "1": fake(0.30)},
        "ablation_two_views": {"0": fake(0.22), "1": fake(0.10)},
        "ablation_moclr": {"0": fake(0.05)},
    },
}


def test_intervals_are_students():
    stats = pytest.importorskip("scipy.stats")
    for values in ([0.1, 0.3], [0.22, 0.24, 0.29], [0.1 * i for i in range(10)]):
        mean, half = study.estimate(values)
        low, high = stats.t.interval(0.95, len(values) - 1, mean, stats.sem(values))
        assert (mean - half, mean + half) == pytest.approx((low, high), rel=1e-3)
    assert math.isnan(study.estimate([0.1])[1])


def test_arms():
    rows = {line.split("`")[1]: line for line in study.arms_table(RESULTS).splitlines()[2:]}
    assert rows["demo"].startswith("| `demo` | none: the paper's method | 3 | 23.0 ± 2.5 |")
    assert rows[study.SAME_FRAME].endswith("| +13.0 ± 2.5 | + | agrees |"), "12, 13 and 14 points, seed by seed"
    assert rows["ablation_crop_08"].endswith("| -6.0 ± 0.0 | +1.7 | disagrees |")
    assert rows["ablation_two_views"].endswith("|  | undecided |"), "0 and 14 points"
    assert rows["ablation_moclr"].endswith("| +17.0 | +2.8 | undecided |"), "one seed decides nothing"
    assert "| 0 | not run |" in rows["ablation_per_level"]


def test_margins():
    rows = study.margins_table(RESULTS).splitlines()[2:]
    assert rows[0] == "| 0 | 22.0 ± 1.0 | 10.0 | 6.0 | 5.5 | 5.0 | 7.0 | +12.0 |"
    assert len(rows) == 3
    alone = RESULTS | {"runs": {study.VITO: {"0": fake(0.06)}}}
    assert study.margins_table(alone).splitlines()[2].endswith("| not run | 6.0 | 5.5 | 5.0 | 7.0 | -1.0 |")


def test_the_committed_study_supports_what_its_page_says():
    machine = re.search(r"bench:margins (\S+)", (study.ROOT / "docs/study.md").read_text(encoding="utf-8"))[1]
    results = json.loads((study.ROOT / f"bench/results/{machine}.json").read_text())
    rows = [line.split("|")[1:-1] for line in study.margins_table(results).splitlines()[2:]]
    assert len(rows) >= 3
    for _, method, *others, lead in rows:
        assert "not run" not in " ".join(others)
        assert float(lead) > float(method.split("±")[1]), "above all others by more than the standard error"
    assert study.verdict(*study.estimate([float(row[-1]) for row in rows]), "+") == "agrees"


def test_runs_are_kept_and_never_mixed(tmp_path, monkeypatch, capsys):
    made = []

    def run(config, seed, *_):
        made.append((config, seed))
        if len(made) == 3:
            raise KeyboardInterrupt
        return fake(0.2)

    monkeypatch.setattr(study, "run", run)
    monkeypatch.setattr(study, "prepare", lambda data: None)
    path = tmp_path / "r.json"
    arguments = ["--results", str(path), "--arms", study.VITO, study.SAME_FRAME, "--seeds", "2", "--steps", "9"]
    with pytest.raises(KeyboardInterrupt):
        study.main(arguments)
    assert len(json.loads(path.read_text())["runs"][study.VITO]) == 2, "a run is kept as soon as it is done"
    assert study.main(arguments) == 0
    assert made[3:] == [(study.SAME_FRAME, 0), (study.SAME_FRAME, 1)]
    assert study.main(arguments) == 0
    assert len(made) == 5
    assert "| 2 | 20.0 ± 0.0 |" in capsys.readouterr().out
    assert study.main([*arguments, "--model.backbone", "resnet18"]) == 1
    assert "holds runs of" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        study.main([*arguments, "--seeds", "11"])


def test_a_failed_run_and_a_wrong_option_are_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study, "prepare", lambda data: None)
    arguments = ["--results", str(tmp_path / "r.json"), "--arms", study.VITO]
    with pytest.raises(SystemExit):
        study.main([*arguments, "--model.bakbone", "resnet18"])
    assert "unknown option '--model.bakbone'" in capsys.readouterr().err

    def train(command, check):
        raise study.subprocess.CalledProcessError(2, command)

    monkeypatch.setattr(study.subprocess, "run", train)
    assert study.main(arguments) == 1
    assert "study: -m vito_fast train demo failed with status 2" in capsys.readouterr().err
    assert not (tmp_path / "r.json").exists()


def test_a_run_has_the_steps_and_options_that_are_asked_for(tmp_path, monkeypatch):
    def train(command, check):
        given = dict(zip(command[5:-1:2], command[6:-1:2], strict=True))
        folder = tmp_path / given["--name"]
        folder.mkdir()
        (folder / "summary.json").write_text(json.dumps({"holdout": fake(0.2)}))
        (folder / "metrics.jsonl").write_text('{"loss": 3.0}\n{"loss": 2.0}\n')
        steps = float(given["--schedule.epochs"]) * float(given["--schedule.epoch_clips"]) / 32
        assert (command[4], steps, command[-1]) == (study.SAME_FRAME, 100, "--resume")
        assert 0 < float(given["--schedule.warmup_epochs"]) < 0.5
        assert given["--train.batch-size"] == "32"
        assert given["--seed"] == "4"

    monkeypatch.setattr(study.subprocess, "run", train)
    options = ["--train.batch-size", "32"]
    found = study.run(study.SAME_FRAME, 4, 100, "cpu", tmp_path / "data", tmp_path, options)
    assert found == fake(0.2) | {"loss": 2.0}


def test_every_arm_is_a_preset_that_changes_the_demo():
    method = load_config(study.VITO)
    changed = [load_config(arm.config) for arm in study.ARMS if arm.config != study.VITO]
    for config in changed:
        parts = [name for name in ("sampler", "model") if getattr(config, name) != getattr(method, name)]
        assert parts
        assert (config.train, config.optimizer, config.schedule) == (method.train, method.optimizer, method.schedule)
    assert len(study.ARMS) == len({arm.config for arm in study.ARMS}) == len(changed) + 1
