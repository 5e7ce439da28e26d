"""The regression gate: a slower kernel is named, noise is not, and counted figures are exact."""

import copy
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from bench import compare

ROOT = Path(__file__).resolve().parents[2]


def candidate(name, role, median, speedup=None, **more):
    row = {"name": name, "role": role, "status": "ok", "reason": "", "median_s": median}
    return row | ({"speedup": speedup} if speedup else {}) | more


def case(name, ours=1.0, flops=1000, peak=100):
    rows = [
        candidate("vito_kernels", "ours", ours, flops=flops, peak_bytes=peak),
        candidate("reference", "reference", 3.0, 3.0 / ours),
        candidate("bare matmuls", "limit", 0.9, 0.9 / ours),
        candidate("peer", "peer", 2.0, 2.0 / ours),
        {"name": "gone", "role": "peer", "status": "skipped", "reason": "not installed"},
    ]
    return {"id": f"{name}[N=1]", "case": name, "device": "cpu", "params": {"N": 1}, "candidates": rows}


def counted_part(results):
    """The same as of a run with ``--counted``: ours alone, without times."""
    new = copy.deepcopy(results) | {"counted": True}
    for record in new["cases"]:
        del record["candidates"][1:], record["candidates"][0]["median_s"]
    return new


@pytest.fixture
def results():
    sizes = {"registers": 200, "spill_bytes": 0, "shared_bytes": 1000, "loop_instructions": 263, "min_bytes": 4096}
    kernel = {"name": "forward D=256", "arch": 90} | sizes
    return {
        "schema": 1,
        "quick": True,
        "device": "cpu",
        "machine": {"name": "cpu-x", "cpu": "x", "gpu": None},
        "versions": {"torch": "2", "triton": "3"},
        "cases": [case("info_nce"), case("photometric"), case("sampler")],
        "static": {
            "counts": {"sampler: instructions a sample": 3000.0, "packets per frame, GOP 8": 4.2},
            "kernels": [kernel],
        },
    }


def worse(old, new, **options):
    return [(change.case, change.figure) for change in compare.compare(old, new, **options)[0] if change.worse]


@pytest.fixture
def gate(tmp_path, capsys):
    """``gate(old, new, *options)``: exit status and lines of the command."""

    def run(old, new, *options):
        for name, content in (("old", old), ("new", new)):
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
        try:
            status = compare.main([str(tmp_path / "old.json"), str(tmp_path / "new.json"), *options])
        except SystemExit as stopped:
            status = stopped.code
        said = capsys.readouterr()
        return status, (said.out + said.err).splitlines()

    return run


def test_equal_results_pass(results):
    changes, missing = compare.compare(results, copy.deepcopy(results))
    assert not missing
    assert not any(change.worse for change in changes)
    assert len(changes) == 3 * 3 + 2 + 5  # time, flops, memory; two counts; five figures of the kernel


@pytest.mark.parametrize("slower", [1.2, 2.0])
def test_a_kernel_slower_by_a_fifth_is_named_alone(results, slower):
    new = copy.deepcopy(results)
    new["cases"][1] = case("photometric", ours=slower)
    assert worse(results, new) == [("photometric[N=1]", "time ratio")]


def test_a_machine_slower_by_half_changes_nothing(results):
    new = copy.deepcopy(results)
    for record in new["cases"]:
        for row in record["candidates"]:
            if row["status"] == "ok":
                row["median_s"] *= 1.5
    assert worse(results, new) == []


def test_one_anchor_with_a_bad_day_is_outvoted(results):
    new = copy.deepcopy(results)
    new["cases"][0]["candidates"][1]["speedup"] *= 0.5
    assert worse(results, new) == []


@pytest.mark.parametrize(
    ("figure", "value"),
    [("registers", 221), ("spill_bytes", 4), ("shared_bytes", 1001), ("loop_instructions", 277), ("min_bytes", 4097)],
)
def test_a_kernel_that_compiles_worse_is_named(results, figure, value):
    new = copy.deepcopy(results)
    new["static"]["kernels"][0][figure] = value
    assert worse(results, new) == [("forward D=256 on 90", figure)]


@pytest.mark.parametrize(
    ("name", "value"), [("sampler: instructions a sample", 3100.0), ("packets per frame, GOP 8", 4.21)]
)
def test_counts_may_not_grow(results, name, value):
    new = copy.deepcopy(results)
    new["static"]["counts"][name] = value
    assert worse(results, new) == [(name, "count")]


@pytest.mark.parametrize(("changed", "figure"), [({"flops": 1006}, "flops"), ({"peak": 106}, "peak_bytes")])
def test_flops_and_memory_may_not_grow(results, changed, figure):
    new = copy.deepcopy(results)
    new["cases"][2] = case("sampler", **changed)
    assert worse(results, new) == [("sampler[N=1]", figure)]


def test_kernels_may_execute_no_more_than_they_did(results):
    results["static"]["executed"] = {"ntxent: forward": {"launches": 2, "flops": 0, "operations": 100}}
    for figure, value in {"launches": 3, "flops": 1, "operations": 103}.items():
        new = copy.deepcopy(results)
        new["static"]["executed"]["ntxent: forward"][figure] = value
        assert worse(results, new) == [("ntxent: forward", f"{figure} executed")]
    new["static"]["executed"] = {}
    assert compare.compare(results, new)[1] == ["ntxent: forward: no longer executed"]


def test_what_disappears_is_missing(results):
    new = copy.deepcopy(results)
    del new["cases"][0], new["static"]["counts"]["packets per frame, GOP 8"]
    missing = compare.compare(results, new)[1]
    assert len(missing) == 2
    assert "info_nce[N=1]" in missing[0]
    assert "GOP 8" in missing[1]


def test_instructions_are_excused_where_no_tool_counts_them(results):
    new = copy.deepcopy(results)
    del new["static"]["counts"]["sampler: instructions a sample"]
    assert len(compare.compare(results, new)[1]) == 1
    new["static"]["missing"] = ["instructions: valgrind not installed"]
    assert compare.compare(results, new)[1] == []


def test_a_quick_run_is_compared_on_what_it_has(results):
    full = copy.deepcopy(results) | {"quick": False}
    del results["cases"][0]
    assert compare.compare(full, results)[1] == []


def test_a_timed_run_compiles_fewer_kernels_than_a_counted_one(results):
    results["counted"] = True
    new = copy.deepcopy(results)
    results["static"]["kernels"].append(results["static"]["kernels"][0] | {"name": "rare"})
    assert compare.compare(results, new)[1] == ["rare on 90: no longer compiled"]
    new["counted"] = False
    assert compare.compare(results, new)[1] == []
    new["static"]["kernels"] = []
    assert len(compare.compare(results, new)[1]) == 2


def test_the_traced_step_has_a_threshold_of_its_own(results):
    results["static"]["counts"] = {"step of ResNet-50: GB moved": 100.0}
    for value, worse in ((101.9, False), (102.1, True)):
        new = copy.deepcopy(results)
        new["static"]["counts"] = {"step of ResNet-50: GB moved": value}
        assert [change.worse for change in compare.compare(results, new)[0]][-6] == worse


def test_a_counted_run_is_compared_on_what_it_counts(results):
    new = counted_part(results)
    del new["cases"][0]
    new["cases"][1]["candidates"][0]["flops"] = 1010
    assert worse(results, new) == [("sampler[N=1]", "flops")]
    assert compare.compare(results, new)[1] == []


@pytest.mark.parametrize(
    ("change", "status"), [({"ours": 1.29}, 0), ({"ours": 1.31}, 1), ({"peak": 109}, 0), ({"peak": 111}, 1)]
)
def test_another_processor_gets_twice_the_slack(results, gate, change, status):
    new = copy.deepcopy(results)
    new["cases"][1] = case("photometric", **change)
    assert gate(results, new)[0] == 1
    new["machine"]["cpu"] = "y"
    assert gate(results, new)[0] == status


LOST = {
    "every anchor failed": (
        lambda new: [row.pop("speedup", None) for row in new["cases"][0]["candidates"]],
        "info_nce[N=1]: no time ratio any more",
    ),
    "flops are NaN": (
        lambda new: new["cases"][0]["candidates"][0].update(flops=math.nan),
        "info_nce[N=1]: flops is nan",
    ),
    "no peak_bytes": (
        lambda new: new["cases"][0]["candidates"][0].pop("peak_bytes"),
        "info_nce[N=1]: no peak_bytes any more",
    ),
    "no static": (lambda new: new.pop("static"), "forward D=256 on 90: no longer compiled"),
    "no kernels": (lambda new: new["static"].update(kernels=[]), "forward D=256 on 90: no longer compiled"),
    "no spill_bytes": (
        lambda new: new["static"]["kernels"][0].pop("spill_bytes"),
        "forward D=256 on 90: no spill_bytes any more",
    ),
}


@pytest.mark.parametrize("what", LOST)
def test_a_figure_that_is_lost_is_named(results, gate, what):
    new = copy.deepcopy(results)
    LOST[what][0](new)
    status, lines = gate(results, new)
    assert status == 1
    assert f"MISSING {LOST[what][1]}" in lines
    assert not any(line.startswith("REGRESSION") for line in lines)


def test_an_infinite_speedup_outvotes_nobody(results):
    new = case("info_nce", ours=1.2)
    for row in new["candidates"][1:3]:
        row["speedup"] = math.inf
    assert compare.slowdown(results["cases"][0], new) == pytest.approx(1.2)


@pytest.mark.parametrize(("figure", "allowed", "value"), [("flops", 0, 1), ("peak", 2**20, 2**20 + 1)])
def test_what_was_nothing_may_not_become_something(results, figure, allowed, value):
    results["cases"][2] = case("sampler", **{figure: 0})
    new = copy.deepcopy(results)
    new["cases"][2] = case("sampler", **{figure: allowed})
    assert worse(results, new) == []
    new["cases"][2] = case("sampler", **{figure: value})
    assert [name for name, _ in worse(results, new)] == ["sampler[N=1]"]


def test_counted_runs_hold_the_same_cases(results):
    old = counted_part(results)
    assert compare.compare(old, copy.deepcopy(old))[1] == []
    new = copy.deepcopy(old)
    del new["cases"][0]
    assert compare.compare(old, new)[1] == ["info_nce[N=1]: not in the new results"]
    assert len(compare.compare(old, new | {"cases": []})[1]) == 4  # three cases, and that none is left
    assert compare.compare(results, new)[1] == []  # a timed run has cases that count nothing


def test_results_without_a_common_case_do_not_pass(results):
    full = copy.deepcopy(results) | {"quick": False}
    assert compare.compare(full, results | {"cases": []})[1] == ["cases: no case is in both results"]


def test_a_quick_run_compiles_for_one_target(results):
    kernel = results["static"]["kernels"][0]
    full = copy.deepcopy(results) | {"quick": False}
    full["static"]["kernels"] += [kernel | {"arch": 80}, kernel | {"name": "backward"}]
    assert compare.compare(full, results)[1] == ["backward on 90: no longer compiled"]
    assert len(compare.compare(full, results | {"quick": False})[1]) == 2
    results["static"]["kernels"] = []
    assert len(compare.compare(full, results)[1]) == 3


def test_kernels_of_one_name_are_compared_in_order(results):
    first = results["static"]["kernels"][0]
    results["static"]["kernels"].append(first | {"registers": 100})
    new = copy.deepcopy(results)
    new["static"]["kernels"][0]["registers"] = 250
    assert worse(results, new) == [("forward D=256 on 90", "registers")]
    new["static"]["kernels"] = [first, first | {"registers": 120}]
    assert worse(results, new) == [("forward D=256 on 90 #2", "registers")]
    del new["static"]["kernels"][1]
    assert compare.compare(results, new)[1] == ["forward D=256 on 90 #2: no longer compiled"]


def test_only_what_repeats_is_confirmed(results):
    new = copy.deepcopy(results)
    new["cases"][0], new["cases"][1] = case("info_nce", ours=1.2), case("photometric", ours=1.2)
    slower = [change for change in compare.compare(results, new)[0] if change.worse]
    asked = []

    def again(cases):
        asked.append(cases)
        repeated = copy.deepcopy(results)
        repeated["cases"][1] = case("photometric", ours=1.21)
        return repeated

    kept = compare.confirm(results, new, slower, 2, again)
    assert [change.case for change in kept] == ["photometric[N=1]"]
    assert asked == [["info_nce[N=1]", "photometric[N=1]"], ["photometric[N=1]"]]


@pytest.fixture
def bench(monkeypatch):
    """Stands in for ``python -m bench``: keeps the commands, and writes ``bench.results`` where they say."""

    class Stub:
        commands, results, status = [], None, 0

        def run(self, command, *, check=False, **options):
            self.commands.append(command)
            if self.results is not None:
                Path(command[command.index("--results") + 1]).write_text(json.dumps(self.results))
            if check and self.status:
                raise subprocess.CalledProcessError(self.status, command)
            return subprocess.CompletedProcess(command, self.status)

    stub = Stub()
    monkeypatch.setattr(compare.subprocess, "run", stub.run)
    return stub


@pytest.mark.parametrize(("quick", "cold"), [(True, False), (False, True)])
def test_a_case_is_run_again_as_it_was_run(results, gate, bench, quick, cold):
    results |= {"quick": quick}
    new, bench.results = copy.deepcopy(results), results
    new["cases"][0], new["cases"][1] = case("info_nce", ours=1.2), case("photometric", ours=1.2)
    new["cases"][1]["cold"] = cold
    status, lines = gate(results, new, "--confirm", "2")
    assert status == 0
    assert "not confirmed: photometric[N=1] is x1.000 in another run" in lines
    (command,) = bench.commands
    assert command[:3] == [sys.executable, "-m", "bench"]
    assert command[command.index("--device") + 1] == "cpu"
    assert command[command.index("--only") + 1] == "info_nce[N=1],photometric[N=1]"
    assert Path(command[command.index("--report") + 1]).is_absolute()  # not over the report of the run itself
    assert "--no-static" in command
    assert ("--quick" in command, "--cold" in command) == (quick, cold)


@pytest.mark.parametrize("left", ["nothing", "the other case", "a torn file"])
def test_a_case_that_fails_when_run_again_is_worse(results, gate, bench, left):
    new, bench.status = copy.deepcopy(results), 1
    new["cases"][0], new["cases"][1] = case("info_nce", ours=1.2), case("photometric", ours=1.2)
    if left != "nothing":
        bench.results = results | {"cases": results["cases"][:1]} if left == "the other case" else {"schema": 1}
    status, lines = gate(results, new, "--confirm", "3")
    assert status == 1
    assert "failed when run again: photometric[N=1]" in lines
    expected = "REGRESSION photometric[N=1]: time ratio (failed when run again) x1.20, allowed x1.15"
    assert lines[-1] == expected
    assert any("REGRESSION info_nce" in line for line in lines) == (left != "the other case")
    assert len(bench.commands) == 1  # a wrong result is not noise that another run could take back


BROKEN = {
    "no object": (lambda bad: [], "its schema is not 1"),
    "another schema": (lambda bad: bad | {"schema": 2}, "its schema is not 1"),
    "no machine": (lambda bad: {key: bad[key] for key in bad if key != "machine"}, "it has no machine"),
    "null cases": (lambda bad: bad | {"cases": None}, "TypeError"),
    "no candidates": (lambda bad: bad | {"cases": [{"id": "info_nce[N=1]", "candidates": []}]}, "StopIteration"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_an_unusable_file_is_named_in_one_line(results, gate, what):
    bad = BROKEN[what][0](results)
    for place, files in (("new.json", (results, bad)), ("old.json", (bad, results))):
        status, (line,) = gate(*files)
        assert status == 2
        assert place in line
        assert f"is not a results file: {BROKEN[what][1]}" in line


def test_results_of_a_gpu_are_not_compared_with_those_of_a_cpu(results, gate):
    status, (line,) = gate(results, results | {"device": "cuda"})
    assert status == 2
    assert "new.json is of cuda" in line


@pytest.mark.parametrize("path", sorted((ROOT / "bench/results").glob("*.json")), ids=lambda path: path.stem)
def test_committed_results_pass_against_themselves(path, capsys):
    if path.stem.endswith(("-steps", "-study")):  # of other kinds, without cases
        with pytest.raises(SystemExit, match="2"):
            compare.main([str(path), str(path)])
        assert capsys.readouterr().err == f"{path} is not a results file: it has no quick\n"
    else:
        assert compare.main([str(path), str(path)]) == 0


def test_of_two_anchors_the_larger_counts(results):
    for slower, expected in ((1.25, [("info_nce[N=1]", "time ratio")]), (1.12, [])):
        old, new = copy.deepcopy(results), copy.deepcopy(results)
        for side, ours in ((old, 1.0), (new, slower)):
            side["cases"][0] = case("info_nce", ours=ours)
            del side["cases"][0]["candidates"][3]  # the peer
            side["cases"][0]["candidates"][1]["speedup"] = (
                1.0  # the reference runs the same code and slows down with us
            )
        assert worse(old, new) == expected


def test_command_names_the_case_and_fails(results, tmp_path):
    new = copy.deepcopy(results)
    new["cases"][1] = case("photometric", ours=1.2)
    (tmp_path / "old.json").write_text(json.dumps(results))
    (tmp_path / "new.json").write_text(json.dumps(new))
    command = [sys.executable, "-m", "bench.compare", str(tmp_path / "old.json")]
    same = subprocess.run([*command, str(tmp_path / "old.json")], cwd=ROOT, capture_output=True, text=True)
    assert (same.returncode, same.stderr) == (0, "")
    slower = subprocess.run([*command, str(tmp_path / "new.json")], cwd=ROOT, capture_output=True, text=True)
    assert slower.returncode == 1
    assert slower.stdout.splitlines()[-1] == "REGRESSION photometric[N=1]: time ratio x1.20, allowed x1.15"
    nothing = subprocess.run([*command, str(tmp_path / "none.json")], cwd=ROOT, capture_output=True, text=True)
    assert nothing.returncode == 2
    assert "none.json is not a results file" in nothing.stderr
