"""Rounds in which the cores did not share a cache, and waiting for them."""

import time

import pytest
import torch

from bench.cores import Cores
from bench.harness import Budget, Candidate, Race

X = torch.linspace(-1, 1, 100)


class Told(Cores):
    """Cores that are together as the list says, once it is used up as ``after`` says."""

    def __init__(self, answers, patience=0.0, after=True):
        super().__init__(patience)
        self.answers, self.after = iter(answers), after

    def together(self):
        return next(self.answers, self.after)


def raced(cores, rounds=6):
    """Ours takes 20 ms, the peer 40; with the cores apart, 80."""
    now = [0.0]

    def pausing(together, apart):
        def call():
            now[0] += together if contest._round in contest._together else apart
            return (X.exp(),)

        return call

    candidates = [Candidate("ours", pausing(0.02, 0.02), "ours"), Candidate("peer", pausing(0.04, 0.08))]
    contest = Race(
        "exp", {}, candidates, truth=lambda: (X.double().exp(),), bound=1e-5, memory=False, cores=cores,
        budget=Budget(seconds=0, fewest=rounds, most=rounds),
    )  # fmt: skip
    contest.clock = lambda: now[0]
    return contest.run()


def test_rounds_with_the_cores_apart_are_left_out():
    record = raced(Told([True, True, False, False, False, False, True, True, True, True, True, True]))
    assert record["vs"]["best_peer"] == pytest.approx(2)
    assert (record["rounds"], record["apart"]) == (6, 2)
    assert [row["rounds"] for row in record["candidates"]] == [4, 4]


def test_a_round_that_ends_with_the_cores_apart_is_left_out():
    record = raced(Told([True, False] * 2))
    assert (record["apart"], record["candidates"][0]["rounds"]) == (2, 4)


def test_cores_that_are_never_together_are_raced_all_the_same():
    record = raced(Told([], after=False))
    assert record["vs"]["best_peer"] == pytest.approx(4)
    assert (record["apart"], record["candidates"][0]["rounds"]) == (6, 6)


def test_patience_is_for_all_waits_together(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    cores = Told([False] * 5, patience=2.0)
    assert cores.gather()
    assert cores.waited == pytest.approx(0.5)
    cores.after = False
    assert not cores.gather()
    assert cores.waited == pytest.approx(2, abs=0.11)
    start = now[0]
    assert not cores.gather()
    assert now[0] == start


def test_one_thread_is_never_apart():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert Cores(0).together()
    finally:
        torch.set_num_threads(threads)


def test_what_is_measured_is_the_chunk_that_another_thread_wrote():
    """Apart or together is the machine's to say; that each thread has one chunk, and one alone the last, is ours."""
    cores = Cores(0)
    assert cores._shared.numel() == torch.get_num_threads() * 32768
    assert 0.5 < cores._distance(cores._shared[-32768:]) < 50
    assert cores._shared.min() > 0
