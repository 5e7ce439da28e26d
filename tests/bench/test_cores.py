"""Rounds in which the cores did not share a cache or were not ours alone, and waiting for them."""

import time

import pytest
import torch

from bench.cores import PAUSE, Cores
from bench.harness import UNDISTURBED, Budget, Candidate, Race

X = torch.linspace(-1, 1, 100)


class Told(Cores):
    """Cores that are undisturbed as the list says, once it is used up as ``after`` says."""

    def __init__(self, answers, patience=0.0, after=True):
        super().__init__(patience)
        self.answers, self.after, self.calm = iter(answers), after, True

    def undisturbed(self):
        self.calm = next(self.answers, self.after)
        return self.calm

    def together(self):
        return False


def raced(cores, rounds=6):
    """Ours takes 20 ms, the peer 40; begun with the cores disturbed, 80."""
    now = [0.0]

    def pausing(undisturbed, disturbed):
        def call():
            now[0] += undisturbed if cores.calm else disturbed
            return (X.exp(),)

        return call

    candidates = [Candidate("ours", pausing(0.02, 0.02), "ours"), Candidate("peer", pausing(0.04, 0.08))]
    contest = Race(
        "exp", {}, candidates, truth=lambda: (X.double().exp(),), bound=1e-5, memory=False, cores=cores,
        budget=Budget(seconds=0, fewest=rounds, most=rounds),
    )  # fmt: skip
    contest.clock = lambda: now[0]
    return contest.run()


def peer_of(record):
    return record["candidates"][1]


def test_rounds_with_a_disturbed_sample_are_left_out():
    """A sample asks at its begin, and if that was undisturbed at its end, the peer's before ours."""
    record = raced(Told([True] * 4 + [False] * 2 + [True, True, True, False] + [True] * 100))
    assert record["vs"]["best_peer"] == pytest.approx(2)
    assert peer_of(record)["rounds"] == 4
    assert record["candidates"][0]["rounds"] == 4
    assert peer_of(record)["undisturbed"]


def test_cores_that_are_always_disturbed_are_raced_all_the_same():
    record = raced(Told([], after=False))
    assert record["vs"]["best_peer"] == pytest.approx(4)
    assert peer_of(record)["rounds"] == 6
    assert not peer_of(record)["undisturbed"]


def test_a_disturbed_sample_is_taken_again_while_there_is_patience(monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    ends_disturbed = [True, False]
    record = raced(Told(ends_disturbed * 3 + [True] * 100, patience=0.1))  # bears two samples of 40 ms, not three
    assert peer_of(record)["rounds"] == 5
    record = raced(Told(ends_disturbed * 3 + [True] * 100, patience=0.2))
    assert peer_of(record)["rounds"] == 6


def test_patience_is_for_all_waits_of_a_race_and_for_all_races(monkeypatch):
    now, cores = [0.0], Told([False] * 5, patience=5.0)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    assert cores.gather()
    assert cores.waited == pytest.approx(5 * PAUSE)
    cores.after = False
    for waited, next_race in ((2, False), (2, True), (4, False), (4, True), (5, True), (5, True)):
        assert not cores.gather()
        assert cores.waited == pytest.approx(waited, abs=0.11)
        if next_race:
            cores.start_race()


@pytest.mark.parametrize("together", [True, False])
def test_cores_that_are_apart_are_left_asleep_and_those_on_one_core_are_kept_busy(monkeypatch, together):
    cores, done, answers = Cores(5.0), [], iter([False, False, True])
    monkeypatch.setattr(cores, "undisturbed", lambda: next(answers))
    monkeypatch.setattr(cores, "together", lambda: together)
    monkeypatch.setattr(cores, "_compute", lambda: done.append("busy"))
    monkeypatch.setattr(time, "sleep", lambda seconds: done.append("asleep"))
    assert cores.gather()
    assert done == ["busy" if together else "asleep"] * 2


def test_a_race_waits_for_a_few_samples_of_each_and_no_more():
    waits = []

    class Counting(Told):
        def gather(self):
            waits.append(1)
            return super().gather()

    raced(Counting([]), rounds=10)
    assert len(waits) == 2 * 2 * UNDISTURBED


def test_arithmetic_slower_than_the_fastest_seen_has_a_neighbour():
    cores = Cores(0)
    assert 0 < cores._fastest < 1
    cores._fastest = 1.0
    assert cores.alone()
    assert cores._fastest < 1, "the fastest that was seen"
    cores._fastest = 1e-9
    assert not cores.alone()
    assert not cores.undisturbed()


def test_cores_that_never_share_a_cache_are_as_near_as_they_get(monkeypatch):
    cores, distances = Cores(0), iter([2.0, 2.3, 2.5, 1.1, 2.0, 1.4])
    cores._nearest = float("inf")
    monkeypatch.setattr(cores, "_distance", lambda other: next(distances))
    monkeypatch.setattr(cores, "_shared", torch.zeros(2 * 32768))
    assert [cores.together() for _ in range(6)] == [True, True, False, True, False, True]


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
