"""Counted figures: packets per frame are the planner's optimum, instructions are the same on every run."""

import shutil

import pytest

from bench import static


@pytest.mark.parametrize(("gop", "low", "high"), [(1, 1.0, 1.0), (8, 3.5, 4.5), (250, 55, 70)])
def test_packets_per_frame(tmp_path, gop, low, high):
    assert low <= static.packets_per_frame(tmp_path, gop, samples=128) <= high


def test_instructions_are_exact_or_named_as_missing():
    if shutil.which("valgrind") and shutil.which("g++"):
        counts, missing = static.count()
        assert missing == []
        assert 1000 < counts["sampler: instructions a sample of 2 views"] < 20_000
    else:
        counts, missing = static.count()
        assert missing[0].startswith("instructions:")
    assert counts["packets per frame, GOP 1"] == 1.0
