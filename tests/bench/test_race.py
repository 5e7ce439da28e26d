"""From the command line to the file: what gets a time and what does not, what a run writes and what it leaves alone."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import __main__ as command
from bench import gpu_check, report, static
from bench.harness import partial, relative_error

ROOT = Path(__file__).resolve().parents[2]
OLD = {"cases": ["from before"]}
NEW = [{"id": "a", "candidates": []}]
ENDS = {"over": 0, "some wrong": 1, "stopped": 2, "nothing found": 5}


class Ended:
    """A process that is over, after so many interrupts."""

    interrupts = 0

    def __init__(self, status):
        self.status = status

    def wait(self):
        if self.interrupts:
            self.interrupts -= 1
            raise KeyboardInterrupt
        return self.status


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """``bench(status, cases, *arguments)``: ``python -m bench`` whose pytest ends so; (exit status, results file)."""

    def run(status, cases, *arguments):
        def instead_of_pytest(given, env):
            target = Path(given[given.index("--results") + 1])
            if cases:
                target.write_text(json.dumps({"cases": cases}))
            return Ended(status)

        monkeypatch.setattr(subprocess, "Popen", instead_of_pytest)
        options = ["--no-static", "--results", str(results)]
        monkeypatch.setattr(sys, "argv", ["bench", *options, *arguments])
        return command.main(), results

    results = tmp_path / "here.json"
    results.write_text(json.dumps(OLD))
    monkeypatch.setattr(report, "write", lambda *paths: None)
    monkeypatch.chdir(tmp_path)  # main goes to the checkout; this goes back
    return run


@pytest.mark.parametrize("end", ["over", "some wrong"])
def test_a_run_that_is_over_replaces_the_results(bench, end):
    status, results = bench(ENDS[end], NEW)
    assert status == ENDS[end]
    assert json.loads(results.read_text())["cases"] == NEW
    assert not partial(results).exists()


def test_a_run_that_is_stopped_keeps_its_cases_beside_the_results(bench, capsys):
    status, results = bench(ENDS["stopped"], NEW)
    assert status == ENDS["stopped"]
    assert json.loads(results.read_text()) == OLD
    assert json.loads(partial(results).read_text())["cases"] == NEW
    assert "here.partial.json" in capsys.readouterr().err


@pytest.mark.parametrize("status", [0, ENDS["stopped"]])
def test_ctrl_c_waits_for_the_cases_and_says_where_they_are(bench, capsys, monkeypatch, status):
    monkeypatch.setattr(Ended, "interrupts", 2)
    ended, results = bench(status, NEW)
    assert ended == command.STOPPED
    assert json.loads(results.read_text()) == OLD
    assert json.loads(partial(results).read_text())["cases"] == NEW
    assert "stopped; results so far: " in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--results", "--report"])
@pytest.mark.parametrize("place", ["/proc/x.json", ".", "here.json/x", "/dev/null"])
def test_what_cannot_be_written_is_said_before_the_races(bench, capsys, monkeypatch, tmp_path, option, place):
    monkeypatch.setattr(command, "_wait", lambda *_: pytest.fail("raced"))
    status, results = bench(0, NEW, option, str(tmp_path / place))
    assert status == 2
    assert json.loads(results.read_text()) == OLD
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"cannot write {tmp_path / place}: ")


@pytest.mark.parametrize("value", ["0", "-1", "1.5"])
def test_rounds_are_at_least_one(bench, capsys, value):
    with pytest.raises(SystemExit, match="2"):
        bench(0, NEW, f"--rounds={value}")
    assert f"argument --rounds: '{value}' is not a whole number of at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("end", ENDS)
def test_a_run_without_cases_fails_and_writes_nothing(bench, capsys, end):
    _, results = bench(ENDS["stopped"], ["a stopped run, long ago"])
    status, results = bench(ENDS[end], [])
    assert status != 0
    assert json.loads(results.read_text()) == OLD
    assert "here.json is not written" in capsys.readouterr().err


@pytest.mark.parametrize("selection", [[], ["-k", "a"], ["--suite", "a"], ["--only", "a[b=1]"]], ids=str)
def test_a_selection_leaves_the_machine_s_file_alone(tmp_path, monkeypatch, capsys, selection):
    def instead_of_pytest(given, env):
        Path(given[given.index("--results") + 1]).write_text(json.dumps({"cases": NEW}))
        return Ended(0)

    monkeypatch.setattr(command, "ROOT", tmp_path)
    monkeypatch.setattr(command, "_arguments", lambda options, results: ["--results", str(results)])
    monkeypatch.setattr(subprocess, "Popen", instead_of_pytest)
    monkeypatch.setattr(sys, "argv", ["bench", "--no-static", *selection])
    monkeypatch.setattr(report, "write", lambda _, page: page.write_text("a page"))
    monkeypatch.chdir(tmp_path)
    assert command.main() == 0
    (written,) = tmp_path.rglob("*.json")
    assert written.parent == tmp_path / ("build/bench" if selection else "bench/results")
    (page,) = tmp_path.rglob("report.html")
    assert page.parent == tmp_path / ("build/bench" if selection else "bench")
    assert ("a selection" in capsys.readouterr().out) == bool(selection)


def test_a_run_that_ends_while_it_counts_leaves_the_results_alone(bench, monkeypatch):
    """The counted figures take a minute, after the races."""

    def arguments(options, results):
        options.static = True
        return ["--results", str(results)]

    monkeypatch.setattr(command, "_arguments", arguments)
    monkeypatch.setattr(static, "add", lambda path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        bench(0, NEW)
    results = Path(sys.argv[sys.argv.index("--results") + 1])
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


def test_gpu_check_s_processes_end_with_their_time_and_take_theirs_along(tmp_path):
    assert gpu_check.wait(gpu_check.start([sys.executable, "-c", "raise SystemExit(3)"]), 60) == 3
    parent = gpu_check.start(["sh", "-c", "sleep 60 & echo $! > $0; wait", str(tmp_path / "child")])
    while not (tmp_path / "child").exists() or not (child := (tmp_path / "child").read_text().strip()):
        time.sleep(0.01)
    assert gpu_check.wait(parent, 0.1) == LATE
    while Path(f"/proc/{child}/stat").exists() and Path(f"/proc/{child}/stat").read_text().split()[2] != "Z":
        time.sleep(0.01)  # or the test's time is over


@pytest.fixture
def cases(pytestconfig):
    """``cases(name)``: the module ``bench/bench_<name>.py``, whose markers this suite does not know otherwise."""
    for marker in ("full", "cpu_only"):
        pytestconfig.addinivalue_line("markers", f"{marker}: of the benchmarks")
    return lambda name: pytest.importorskip(f"bench.bench_{name}")


def test_photometric_and_loader_take_no_nan_and_no_other_shape(cases):
    truth = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    nan = truth.clone().index_fill_(3, torch.tensor(3), torch.nan)
    for agree in (cases("photometric").gray_levels, cases("loader").mean_distance):
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


CASES = """
import pytest
import torch
from bench.harness import Candidate

X = torch.linspace(0, 1, 100)


@pytest.mark.parametrize("name", ["right", "wrong", "late", "peerless"])
def test_exp(race, name):
    calls = []

    def ours():
        calls.append(1)
        off = {"wrong": 0.1, "late": 1e-4 * (len(calls) - 1)}.get(name, 0.0)
        return (X.exp() + off,)

    def fails(*args):
        raise RuntimeError("not today")

    others = [Candidate("peer", fails if name == "peerless" else lambda: (X.exp(),))]
    candidates = [Candidate("ours", ours, "ours"), *others]
    race(name, {"N": 100}, candidates, truth=lambda: (X.double().exp(),), bound=1e-5, memory=name != "peerless")
    assert len(calls) > 1
    if name == "late":
        print("late got through")
"""


@pytest.fixture(scope="module")
def raced(tmp_path_factory):
    """``raced(*options)``: pytest on :data:`CASES`, in a process of its own; (exit status, output, results or None)."""
    folder = tmp_path_factory.mktemp("cases")
    (folder / "bench_tiny.py").write_text(CASES)

    def run(*options):
        results, timings = folder / "results.json", folder / "timings.json"
        for old in (results, timings):
            old.unlink(missing_ok=True)
        line = [sys.executable, "-m", "pytest", "-p", "bench.conftest", "-p", "no:cacheprovider", "-c", os.devnull]
        line += ["--rootdir", str(folder), "-o", "python_files=bench_*.py", "--rounds", "3", "--results", str(results)]
        line += [f"--benchmark-json={timings}", "bench_tiny.py", *options]
        outer = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        environment = outer | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
        done = subprocess.run(line, cwd=folder, capture_output=True, text=True, env=environment)
        found = json.loads(results.read_text()) if results.exists() else None
        timed = json.loads(timings.read_text())["benchmarks"] if timings.exists() and timings.stat().st_size else []
        return done.returncode, done.stdout + done.stderr, found, [row["name"] for row in timed]

    return run


def test_only_what_is_right_to_the_end_is_timed(raced):
    status, output, results, timed = raced("--quick")
    assert status == 1, output
    assert "wrong[N=100]: ours: differs from the float64 truth" in output
    assert "late[N=100]: ours: differs from the float64 truth" in output
    assert "late got through" not in output
    assert [case["id"] for case in results["cases"]] == ["right[N=100]", "peerless[N=100]"]
    assert timed == ["test_exp[right]", "test_exp[peerless]"]
    assert (results["quick"], results["counted"]) == (True, False)
    right, peerless = (case["candidates"] for case in results["cases"])
    assert [(row["status"], row["rounds"]) for row in right] == [("ok", 3)] * 2
    assert (peerless[1]["status"], peerless[1]["reason"]) == ("failed", "RuntimeError: not today")
    assert [(row["name"], row["cases"]) for row in results["skipped"]] == [("peer", "1")]


def test_only_the_asked_for_cases_are_raced(raced):
    status, output, results, _ = raced("--only", "right[N=100],nope[N=1]")
    assert status == 0, output
    assert [case["id"] for case in results["cases"]] == ["right[N=100]"]
    status, output, results, _ = raced("--only", "nope[N=1]")
    assert (status, results) == (5, None), output


def test_a_count_says_that_it_is_one(raced):
    status, output, results, timed = raced("--counted", "-k", "right or wrong or peerless")
    assert status == 1, output
    assert results["counted"] is True
    assert [case["id"] for case in results["cases"]] == ["right[N=100]"]
    assert "median_s" not in results["cases"][0]["candidates"][0]
    assert timed == []
