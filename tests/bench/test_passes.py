"""Two passes become one run: means of ratios, sums of rounds, and nothing that went wrong in either."""

import copy
import ctypes
import json
import math
import subprocess
import sys
from unittest.mock import Mock

import pytest
import torch

from bench import __main__ as command
from bench import memory, report
from bench.harness import Candidate, Race, Work, partial
from bench.passes import disagreement, lost, merge


def one_pass(*cases, only=None):
    return {"seconds": 10.0, "waited": 1.0, "only": only, "cases": list(cases)}


def case(name="a", ours=1.0, other=2.0, single=False, **changes):
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
    return {"id": name, "single": single, "rounds": 3, "apart": 1, "seconds": 5.0, "work": work, "candidates": rows}


def test_ratios_and_times_are_means_and_counts_are_sums():
    merged = merge([one_pass(case(ours=1.0, other=2.0)), one_pass(case(ours=4.0, other=12.0, error=1e-3))])
    (only,) = merged["cases"]
    mine, other = only["candidates"]
    assert (mine["median_s"], mine["low_s"], mine["rounds"]) == (2.0, 1.0, 6)
    assert other["speedups"] == [2.0, 3.0]
    assert other["speedup"] == pytest.approx(math.sqrt(6))
    assert other["error"] == 1e-3
    assert only["vs"] == {"best_peer": other["speedup"], "best_peer_name": "peer"}
    assert only["rates"] == {"tflops": 0.5, "items": 2.0}
    assert (only["rounds"], only["apart"], only["seconds"]) == (6, 2, 10.0)
    assert (merged["seconds"], merged["waited"], merged["passes"]) == (20.0, 2.0, 2)
    assert disagreement(merged["cases"]) == pytest.approx(1.5)
    assert disagreement([case()]) is None


def test_a_pass_whose_cores_were_apart_counts_only_beside_others_of_its_kind():
    together, apart = case(other=2.0, peak_bytes=7), case(other=9.0) | {"apart": 2}
    (only,) = merge([one_pass(apart), one_pass(together)])["cases"]
    assert only["candidates"][1]["speedups"] == [2.0]
    assert (only["rounds"], only["apart"]) == (3, 1)
    (only,) = merge([one_pass(together), one_pass(apart)])["cases"]
    assert only["candidates"][1]["speedups"] == [2.0]
    assert only["candidates"][1]["peak_bytes"] == 7, "counted in the first pass alone"
    (only,) = merge([one_pass(apart), one_pass(apart)])["cases"]
    assert only["candidates"][1]["speedups"] == [9.0, 9.0]


def test_cases_that_lost_a_pass_race_once_more_while_there_is_time():
    together, apart = [case(name, single=name == "single") for name in ("a", "b", "c", "single")], {"apart": 2}
    passes = [
        one_pass(*(each | apart for each in together[:2]), *together[2:]),
        one_pass(together[0] | {"seconds": 9.0}, together[1], together[2] | apart | {"seconds": 2.0}),
    ]
    assert lost(passes, 100.0) == ["c", "b", "a"]
    assert lost(passes, 16.0) == ["c", "b"]
    assert lost(passes, 1.0) == []
    assert lost([one_pass(*together), one_pass(*together[:3])], 100.0) == []
    merged = merge([*passes, one_pass(case("b", other=8.0), case("c") | apart, only=["b", "c"])])
    speedups = [each["candidates"][1]["speedups"] for each in merged["cases"]]
    assert speedups == [[2.0], [2.0, 8.0], [2.0], [2.0]]
    assert merged["seconds"] == 30.0
    merged = merge([*passes, one_pass(case("b"), only=["b", "c"])])
    assert [each["id"] for each in merged["cases"]] == ["a", "b", "single"], "c went wrong"


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


def test_the_command_runs_two_passes_of_which_the_second_counts_nothing(tmp_path, monkeypatch, capsys):
    given, results, apart = [], tmp_path / "here.json", 1

    def instead_of_pytest(command):
        target = command[command.index("--results") + 1]
        only = command[command.index("--only") + 1] if "--only" in command else None
        given.append(("--later-pass" in command, only))
        with open(target, "w") as file:
            json.dump(one_pass(case(other=2.0 * len(given)) | {"apart": apart}), file)
        return Mock(wait=lambda status=0 if len(given) < 6 else 2: status)

    def speedups():
        return json.loads(results.read_text())["cases"][0]["candidates"][1]["speedups"]

    monkeypatch.setattr(subprocess, "Popen", instead_of_pytest)
    monkeypatch.setattr(report, "write", lambda *paths: None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["bench", "--no-static", "--results", str(results)])
    assert command.main() == 0
    assert given == [(False, None), (True, None)]
    assert speedups() == [2.0, 4.0]
    apart = 2
    assert command.main() == 0
    assert given[2:] == [(False, None), (True, None), (True, "a")]
    assert speedups() == [6.0, 8.0, 10.0]
    monkeypatch.setattr(sys, "argv", ["bench", "--no-static", "--passes", "3", "--results", str(results)])
    assert command.main() == 2  # the first of these passes is stopped
    assert given[5:] == [(False, None)]
    assert json.loads(results.read_text())["passes"] == 3, "of the run before"
    assert partial(results).exists()
    assert "stopped" in capsys.readouterr().err


def test_a_single_race_counts_while_it_compares():
    calls = []
    data = torch.rand(1 << 16)

    def ours():
        calls.append(1)
        return (data @ data[:, None],)

    race = Race("a", {}, [Candidate("ours", ours, "ours")], truth=lambda: ours(), bound=0.0, work=Work(1), single=True)
    race.check()
    race.count_cost()
    assert len(calls) == 2  # the truth's, and the one compared
    assert race.ours.peak_bytes >= 4
    assert race.ours.flops > 0


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
