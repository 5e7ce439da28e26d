"""From the command line to the file: what gets a time and what does not, what a run writes and what it leaves alone."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch

from bench import __main__ as command
from bench import gpu_check, report, static
from bench.harness import partial, relative_error

OLD = {"cases": ["from before"]}
ENDS = {"over": 0, "some wrong": 1, "stopped": 2, "nothing found": 5}


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """``bench(status, cases, *arguments)``: ``python -m bench`` whose pytest ends so; (exit status, results file)."""

    def run(status, cases, *arguments):
        def instead_of_pytest(given):
            target = command.Path(given[given.index("--results") + 1])
            if cases:
                target.write_text(json.dumps({"cases": cases}))
            return status

        monkeypatch.setattr(pytest, "main", instead_of_pytest)
        monkeypatch.setattr(sys, "argv", ["bench", "--no-static", "--results", str(results), *arguments])
        return command.main(), results

    results = tmp_path / "here.json"
    results.write_text(json.dumps(OLD))
    monkeypatch.setattr(report, "write", lambda *paths: None)
    monkeypatch.chdir(tmp_path)  # main goes to the checkout; this goes back
    return run


@pytest.mark.parametrize("end", ["over", "some wrong"])
def test_a_run_that_is_over_replaces_the_results(bench, end):
    status, results = bench(ENDS[end], ["a"])
    assert status == ENDS[end]
    assert json.loads(results.read_text()) == {"cases": ["a"]}
    assert not partial(results).exists()


def test_a_run_that_is_stopped_keeps_its_cases_beside_the_results(bench, capsys):
    status, results = bench(ENDS["stopped"], ["a"])
    assert status == ENDS["stopped"]
    assert json.loads(results.read_text()) == OLD
    assert json.loads(partial(results).read_text()) == {"cases": ["a"]}
    assert "here.partial.json" in capsys.readouterr().err


@pytest.mark.parametrize("end", ENDS)
def test_a_run_without_cases_fails_and_writes_nothing(bench, capsys, end):
    _, results = bench(ENDS["stopped"], ["a stopped run, long ago"])
    status, results = bench(ENDS[end], [])
    assert status != 0
    assert json.loads(results.read_text()) == OLD
    assert "here.json is not written" in capsys.readouterr().err


@pytest.mark.parametrize("selection", [[], ["-k", "a"], ["--suite", "a"], ["--only", "a[b=1]"]], ids=str)
def test_a_selection_leaves_the_machine_s_file_alone(tmp_path, monkeypatch, capsys, selection):
    def instead_of_pytest(given):
        target = command.Path(given[given.index("--results") + 1])
        target.parent.mkdir(parents=True)
        target.write_text("{}")
        return 0

    monkeypatch.setattr(command, "ROOT", tmp_path)
    monkeypatch.setattr(pytest, "main", instead_of_pytest)
    monkeypatch.setattr(sys, "argv", ["bench", "--no-static", *selection])
    monkeypatch.setattr(report, "write", lambda *paths: None)
    monkeypatch.chdir(tmp_path)
    assert command.main() == 0
    (written,) = tmp_path.rglob("*.json")
    assert written.parent == tmp_path / ("build/bench" if selection else "bench/results")
    assert ("a selection" in capsys.readouterr().out) == bool(selection)


def test_a_run_that_ends_while_it_counts_leaves_the_results_alone(bench, monkeypatch):
    """The counted figures take a minute, after the races."""

    def arguments(options, results):
        options.static = True
        return ["--results", str(results)]

    monkeypatch.setattr(command, "_arguments", arguments)
    monkeypatch.setattr(static, "add", lambda path, quick: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        bench(0, ["a"])
    results = command.Path(sys.argv[sys.argv.index("--results") + 1])
    assert json.loads(results.read_text()) == OLD


GOOD, BAD = {"status": 0, "tests": 9, "seconds": 1.0}, {"status": 1, "tests": 9, "seconds": 1.0}
LATE = "stopped: its time was over"


@pytest.mark.parametrize(
    ("tests", "benches", "status"),
    [(GOOD, 0, 0), (BAD, 0, 1), (GOOD, 1, 1), (GOOD, LATE, 1), (GOOD | {"tests": 0}, 0, 1)],
)
def test_gpu_check_passes_only_if_tests_and_benches_do(tmp_path, monkeypatch, tests, benches, status):
    """What a bench that was stopped has got so far becomes the results."""

    def run_benches(results, seconds):
        assert not results.exists()
        target = partial(results) if benches == LATE else results
        target.write_text(json.dumps({"cases": ["a"]}))
        return benches

    results = tmp_path / "bench/results/a-gpu.json"
    results.parent.mkdir(parents=True)
    results.write_text("{}")
    monkeypatch.setattr(gpu_check.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check, "machine", lambda device: {"name": "a-gpu"})
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_check, "run_tests", lambda: tests)
    monkeypatch.setattr(gpu_check, "run_benches", run_benches)
    assert gpu_check.main() == status
    record = json.loads(results.read_text())
    assert (record["cases"], record["tests"], record["bench_status"]) == (["a"], tests, benches)
    assert not partial(results).exists()


def test_gpu_check_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(gpu_check.torch.cuda, "is_available", lambda: False)
    assert gpu_check.main() == 1


def test_gpu_check_s_processes_end_with_their_time():
    def start(code):
        return subprocess.Popen([sys.executable, "-c", code])

    assert gpu_check._wait(start("raise SystemExit(3)"), 60) == 3
    assert gpu_check._wait(start("import time; time.sleep(60)"), 0.1) == LATE


@pytest.fixture
def cases(pytestconfig):
    """``cases(name)``: the module ``bench/bench_<name>.py``, whose markers this suite does not know otherwise."""
    for marker in ("full", "cpu_only"):
        pytestconfig.addinivalue_line("markers", f"{marker}: of the benchmarks")
    return lambda name: pytest.importorskip(f"bench.bench_{name}")


def test_photometric_and_loader_take_no_nan_and_no_other_shape(cases):
    truth = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    nan = truth.clone().index_fill_(3, torch.tensor(3), torch.nan)
    for agree in (cases("photometric").grey_levels, cases("loader").mean_distance):
        assert agree([truth.float()], [truth]) < 1e-3
        assert not agree([nan], [truth]) <= 100
        assert agree([truth[:1]], [truth]) == float("inf")
    assert not cases("loader").mean_distance([truth, nan], [truth, truth]) <= 100
    assert cases("loader").mean_distance([truth], [truth, truth]) == float("inf")


@pytest.mark.parametrize(("change", "seen"), [({}, False), ({"momentum": 0.0}, True), ({"weight_decay": 1e-4}, True)])
def test_lars_is_judged_by_what_its_steps_move(cases, change, seen):
    optimizer = cases("optimizer")
    generator = torch.Generator().manual_seed(0)
    drawn = [tuple(s * torch.randn(shape, generator=generator) for s in (0.02, 0.001)) for shape in ((64, 64), (64,))]

    def steps(config, dtype):
        weights = optimizer.parameters(drawn, dtype)
        return optimizer.moved(optimizer.one_by_one(weights, config), weights)

    usual, changed = optimizer.OptimizerConfig(), dataclasses.replace(optimizer.OptimizerConfig(), **change)
    truth, reference, got = steps(usual, torch.float64)(), steps(usual, torch.float32)(), steps(changed, torch.float32)
    assert (relative_error(got(), truth) > 2 * relative_error(reference, truth)) == seen
    assert got() == ()
