"""The regression gate: a slower kernel is named, noise is not, and counted figures are exact."""

import copy
import json
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


@pytest.fixture
def results():
    sizes = {"registers": 200, "spill_bytes": 0, "shared_bytes": 1000, "loop_instructions": 263}
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


def test_equal_results_pass(results):
    changes, missing = compare.compare(results, copy.deepcopy(results))
    assert not missing
    assert not any(change.worse for change in changes)
    assert len(changes) == 3 * 3 + 2 + 4  # time, flops, memory; two counts; four figures of the kernel


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
    ("figure", "value"), [("registers", 230), ("spill_bytes", 4), ("shared_bytes", 1001), ("loop_instructions", 300)]
)
def test_a_kernel_that_compiles_worse_is_named(results, figure, value):
    new = copy.deepcopy(results)
    new["static"]["kernels"][0][figure] = value
    assert worse(results, new) == [("forward D=256 on 90", figure)]


@pytest.mark.parametrize(
    ("name", "value"), [("sampler: instructions a sample", 3100.0), ("packets per frame, GOP 8", 4.3)]
)
def test_counts_may_not_grow(results, name, value):
    new = copy.deepcopy(results)
    new["static"]["counts"][name] = value
    assert worse(results, new) == [(name, "count")]


@pytest.mark.parametrize(("changed", "figure"), [({"flops": 1010}, "flops"), ({"peak": 110}, "peak_bytes")])
def test_flops_and_memory_may_not_grow(results, changed, figure):
    new = copy.deepcopy(results)
    new["cases"][2] = case("sampler", **changed)
    assert worse(results, new) == [("sampler[N=1]", figure)]


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
    del new["static"]["counts"]["packets per frame, GOP 8"]
    assert len(compare.compare(results, new)[1]) == 1


def test_a_quick_run_is_compared_on_what_it_has(results):
    full = copy.deepcopy(results) | {"quick": False}
    del results["cases"][0]
    assert compare.compare(full, results)[1] == []


def test_a_counted_run_is_compared_on_what_it_counts(results):
    new = copy.deepcopy(results) | {"counted": True}
    del new["cases"][0]
    new["cases"][1] = case("sampler", flops=1010)
    for record in new["cases"]:
        record["candidates"] = record["candidates"][:1]
        del record["candidates"][0]["median_s"]
    assert worse(results, new) == [("sampler[N=1]", "flops")]
    assert compare.compare(results, new)[1] == []


def test_another_processor_gets_twice_the_slack(results):
    new = copy.deepcopy(results)
    new["cases"][1] = case("photometric", ours=1.2)
    assert worse(results, new, slack=2.0) == []


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
    assert slower.stdout.splitlines()[-1] == "REGRESSION photometric[N=1]: time ratio x1.20, allowed x1.13"
    nothing = subprocess.run([*command, str(tmp_path / "none.json")], cwd=ROOT, capture_output=True, text=True)
    assert nothing.returncode == 2
    assert "none.json is not a results file" in nothing.stderr
