"""Passes become one run: medians of ratios, sums of rounds, and nothing that went wrong in any."""

import copy
import ctypes
import json
import math
import subprocess
import sys
import time
from unittest.mock import Mock

import pytest
import torch

from bench import __main__ as command
from bench import memory, report
from bench.harness import Candidate, Race, Work, partial
from bench.machine import Others
from bench.passes import START, caveats, disagreement, doubtful, merge


def one_pass(*cases, only=None):
    return {"seconds": 10.0, "waited": 1.0, "only": only, "cases": list(cases)}


def case(name="a", ours=1.0, other=2.0, single=False, undisturbed=True, **changes):
    rows = [
        {"name": "ours", "role": "ours", "median_s": ours},
        {"name": "peer", "role": "peer", "median_s": other, "speedup": other / ours, "speedup_spread": 0.1},
    ]
    rows = [
        row | {"status": "ok", "reason": "", "error": 1e-6, "low_s": row["median_s"], "spread": 0.1, "rounds": 3}
        for row in rows
    ]
    rows[1] |= changes
    work = {"flops": 1e12, "bytes": 0, "items": 4, "unit": "rows"}
    for row in rows:
        row["undisturbed"] = undisturbed
    counts = {"rounds": 4, "seconds": 5.0}
    return {"id": name, "test": f"test_{name}", "single": single, "work": work, "candidates": rows} | counts


def test_ratios_and_times_of_two_are_means_and_counts_are_sums():
    merged = merge([one_pass(case(ours=1.0, other=2.0)), one_pass(case(ours=4.0, other=12.0))])
    (only,) = merged["cases"]
    mine, other = only["candidates"]
    assert (mine["median_s"], mine["low_s"], mine["rounds"]) == (2.0, 1.0, 6)
    assert other["speedups"] == [2.0, 3.0]
    assert other["speedup"] == pytest.approx(math.sqrt(6))
    assert other["error"] == 1e-6
    assert only["vs"] == {"best_peer": other["speedup"], "best_peer_name": "peer"}
    assert only["rates"] == {"tflops": 0.5, "items": 2.0}
    assert (only["rounds"], only["seconds"]) == (8, 10.0)
    assert (merged["seconds"], merged["waited"], merged["passes"]) == (20.0, 2.0, 2)
    assert disagreement(merged["cases"]) == pytest.approx(1.5)
    assert disagreement([case()]) is None


def test_a_busy_machine_is_told():
    others = Others()
    with subprocess.Popen([sys.executable, "-c", "import time; end = time.time() + 1\nwhile time.time() < end: pass"]):
        time.sleep(1)
        busy = others.cores()
    assert busy > 0.3
    assert others.cores() < busy - 0.2, "a child that ended is no other"
    assert "Other processes" in caveats({"cases": [], "others": busy})[0]


def test_one_pass_of_three_may_say_what_it_likes():
    passes = [one_pass(case(ours=ours, other=2.0)) for ours in (1.0, 0.1, 0.98)]
    (only,) = merge(passes)["cases"]
    assert only["candidates"][1]["speedup"] == pytest.approx(2.0 / 0.98)
    assert only["candidates"][0]["median_s"] == pytest.approx(0.98)


def test_a_disturbed_ratio_counts_only_beside_others_of_its_kind():
    calm, shaken = case(other=2.0, peak_bytes=7), case(other=9.0, undisturbed=False)
    for passes in ([calm, shaken], [shaken, calm]):
        (only,) = merge([one_pass(each) for each in passes])["cases"]
        assert only["candidates"][1]["speedups"] == [2.0]
        assert only["candidates"][1]["undisturbed"]
    (only,) = merge([one_pass(calm), one_pass(shaken)])["cases"]
    assert only["candidates"][1]["peak_bytes"] == 7, "counted in the first pass alone"
    (only,) = merge([one_pass(shaken), one_pass(shaken)])["cases"]
    assert only["candidates"][1]["speedups"] == [9.0, 9.0]
    assert not only["candidates"][1]["undisturbed"]
    assert caveats({"cases": [calm]}) == []
    assert "1 of 2 ratios, marked" in report._trust({"cases": [only, calm], "passes": 2})
    assert report._ratio(only["candidates"][1]) == "ours ×9 ≈"
    assert report._ratio(calm["candidates"][1]) == "ours ×2"


def test_cases_in_doubt_race_again_while_there_is_time():
    first = [case(name, single=name == "single") for name in ("a", "b", "c", "d", "e", "single")]
    second = [
        case("a", other=2.2),
        case("b", other=2.6),
        case("c", other=2.06),
        case("d", undisturbed=False),
        case("e", undisturbed=False) | {"seconds": 90.0},
    ]
    passes = [one_pass(*first), one_pass(*second)]
    assert doubtful(passes, START + 100.0) == ["d", "e"], "of which a pass does not count"
    assert doubtful(passes, START + 110.0) == ["d", "e", "b", "a"], "that differ most, and not by 3 %"
    assert doubtful(passes, START + 16.0) == ["d", "b", "a"]
    assert doubtful(passes, START + 4.0) == []
    third = one_pass(case("a", other=2.0), case("d"), case("e", undisturbed=False), only=["a", "d", "e"])
    speedups = {each["id"]: each["candidates"][1]["speedups"] for each in merge([*passes, third])["cases"]}
    assert speedups["a"] == [2.0, 2.2, 2.0]
    assert speedups["b"] == [2.0, 2.6]
    assert speedups["d"] == [2.0, 2.0]
    assert speedups["e"] == speedups["single"] == [2.0]
    assert doubtful([*passes, third], 1000.0) == ["e", "b", "a"]
    third = one_pass(case("a"), only=["a", "d"])
    assert [each["id"] for each in merge([*passes, third])["cases"]] == ["a", "b", "c", "e", "single"], "d went wrong"


def test_what_went_wrong_in_one_pass_is_wrong():
    wrong = {"status": "wrong", "reason": "differs from the float64 truth"}
    second = case(**wrong)
    for name in ("median_s", "speedup"):
        del second["candidates"][1][name]
    for passes in ([case(), second], [second, case()]):
        merged = merge([one_pass(copy.deepcopy(each)) for each in passes])
        assert merged["cases"][0]["candidates"][1]["reason"] == wrong["reason"]
        assert merged["cases"][0]["vs"] == {}
        assert merged["skipped"] == [{"name": "peer", "reason": f"wrong: {wrong['reason']}", "cases": "1"}]


def test_a_case_that_failed_in_a_later_pass_is_left_out_and_a_single_one_is_not():
    merged = merge([one_pass(case("a"), case("b"), case("long", single=True)), one_pass(case("b"))])
    assert [record["id"] for record in merged["cases"]] == ["b", "long"]
    assert merged["cases"][1]["candidates"][1]["speedups"] == [2.0]


def test_the_command_runs_two_passes_and_those_in_doubt_again(tmp_path, monkeypatch, capsys):
    given, results, ratios = [], tmp_path / "here.json", [2.0, 2.04]

    def instead_of_pytest(command):
        target = command[command.index("--results") + 1]
        only = command[command.index("--only") + 1] if "--only" in command else None
        given.append(("--later-pass" in command, only))
        assert ("test_a" if only else "bench") in command
        if ratios:
            with open(target, "w") as file:
                json.dump(one_pass(case(other=ratios.pop(0)), only=only), file)
            return Mock(wait=lambda: 0)
        return Mock(wait=lambda: 2)

    def speedups():
        return json.loads(results.read_text())["cases"][0]["candidates"][1]["speedups"]

    monkeypatch.setattr(subprocess, "Popen", instead_of_pytest)
    monkeypatch.setattr(report, "write", lambda *paths: None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["bench", "--no-static", "--results", str(results)])
    assert command.main() == 0
    assert given == [(False, None), (True, None)], "the second counts nothing"
    assert speedups() == [2.0, 2.04]
    given.clear()
    ratios[:] = [2.0, 3.0, 2.05, 2.04, 2.06, 2.0]
    assert command.main() == 0
    assert given == [(False, None), (True, None)] + [(True, "a")] * 3, "however much they differ"
    assert speedups() == [2.0, 3.0, 2.05, 2.04, 2.06]
    given.clear()
    ratios.clear()
    monkeypatch.setattr(sys, "argv", ["bench", "--no-static", "--passes", "3", "--results", str(results)])
    assert command.main() == 2  # the first of these passes is stopped
    assert given == [(False, None)]
    assert json.loads(results.read_text())["passes"] == 5, "of the run before"
    assert "no case ran" in capsys.readouterr().err


def test_a_run_whose_second_pass_is_stopped_leaves_the_first(tmp_path, monkeypatch, capsys):
    results, statuses = tmp_path / "here.json", [0, 2]

    def instead_of_pytest(command):
        with open(command[command.index("--results") + 1], "w") as file:
            json.dump(one_pass(case()), file)
        return Mock(wait=lambda: statuses.pop(0))

    monkeypatch.setattr(subprocess, "Popen", instead_of_pytest)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["bench", "--no-static", "--results", str(results)])
    assert command.main() == 2
    assert not results.exists()
    assert partial(results).exists()
    assert "stopped" in capsys.readouterr().err


def test_a_single_race_counts_while_it_compares_and_takes_the_time_of_one_more():
    calls = []
    data = torch.rand(1 << 16)

    def ours():
        calls.append(1)
        return (data @ data[:, None],)

    race = Race("a", {}, [Candidate("ours", ours, "ours")], truth=lambda: ours(), bound=0.0, work=Work(1), single=True)
    record = race.run()
    assert len(calls) == 3  # the truth's, the one compared, the one timed
    assert record["rounds"] == 1
    (row,) = record["candidates"]
    assert row["peak_bytes"] >= 4
    assert row["flops"] > 0


def test_a_race_finds_no_stretch_of_the_heap_that_an_earlier_one_left():
    if not memory.settle_malloc():
        pytest.skip("the C library is not glibc")
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = memory._Usage
    blocks = [torch.empty(20 << 20, dtype=torch.uint8) for _ in range(6)]
    last = torch.empty(1000, dtype=torch.uint8)  # keeps the heap from ending before it
    del blocks
    mappings = libc.mallinfo2().hblks
    within = torch.empty(40 << 20, dtype=torch.uint8)
    assert libc.mallinfo2().hblks == mappings
    del within
    memory.settle_malloc()
    mappings = libc.mallinfo2().hblks
    apart = torch.empty(40 << 20, dtype=torch.uint8)
    assert libc.mallinfo2().hblks == mappings + 1
    del apart, last
