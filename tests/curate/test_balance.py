"""The balance's counts, its order of choice and its distance to the target."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vito_fast.curate.balance import (
    BalanceOptions,
    Clip,
    balance,
    fill_total,
    least_distance,
    total_variation,
)


def clips(**counts: int) -> list[Clip]:
    """``a=3``: three clips of class 0, each of a video of its own."""
    return [
        Clip(f"{name}{number}", ord(name) - ord("a"), f"video {name}{number}", 0.5)
        for name, count in counts.items()
        for number in range(count)
    ]


def test_each_class_gets_what_it_has_up_to_its_share():
    found = balance(clips(a=50, b=20, c=3), {0: 1, 1: 1, 2: 1}, BalanceOptions(total=30))
    assert found.counts == {0: 10, 1: 10, 2: 3}
    assert found.wanted == {0: 10, 1: 10, 2: 10}
    assert found.available == {0: 50, 1: 20, 2: 3}
    assert len(found.chosen) == len(set(found.chosen)) == 23
    assert found.distance == pytest.approx(0.5 * (2 * (10 / 23 - 1 / 3) + 1 / 3 - 3 / 23))
    assert found.optimum == pytest.approx(found.distance)


def test_the_default_total_is_the_largest_that_fills_its_share():
    found = balance(clips(a=50, b=20, c=4), {0: 1, 1: 1, 2: 1}, BalanceOptions(fill=0.8))
    assert found.total == 30  # 10 + 10 + 4 is 80 % of 30; of 31 the classes fill 24.67


def test_a_weighted_target_is_followed():
    found = balance(clips(a=50, b=50), {0: 3, 1: 1}, BalanceOptions(total=40))
    assert found.counts == {0: 30, 1: 10}
    assert found.distance == 0


def test_videos_take_turns_and_then_scores_count():
    rows = [Clip("x1", 0, "x", 0.9), Clip("x2", 0, "x", 0.8), Clip("x3", 0, "x", 0.7), Clip("y1", 0, "y", 0.1)]
    found = balance(rows, {0: 1}, BalanceOptions(total=3))
    assert found.chosen == ("x1", "y1", "x2")


def test_a_video_gives_at_most_its_limit_over_all_classes():
    rows = [Clip(f"x{n}", n % 2, "x", 1 - n / 10) for n in range(8)]
    assert set(balance(rows, {0: 1, 1: 1}, BalanceOptions(total=8)).chosen) == {"x0", "x1", "x2"}
    assert len(balance(rows, {0: 1, 1: 1}, BalanceOptions(total=8, max_per_video=0)).chosen) == 8


def test_the_seed_breaks_ties_and_nothing_else():
    rows = clips(a=40)
    chosen = [balance(rows, {0: 1}, BalanceOptions(total=5, seed=seed)).chosen for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1]
    assert set(chosen[0]) != set(chosen[2])
    rows[7] = Clip("a7", 0, "video a7", 0.9)
    assert all(balance(rows, {0: 1}, BalanceOptions(total=5, seed=seed)).chosen[0] == "a7" for seed in range(3))


def test_classes_outside_the_target_are_left_out():
    found = balance(clips(a=5, b=5), {1: 1}, BalanceOptions(total=10))
    assert found.counts == {1: 5}


def test_nothing_available_chooses_nothing():
    found = balance([], {0: 1}, BalanceOptions())
    assert (found.chosen, found.total, found.distance, found.optimum) == ((), 0, 1.0, 1.0)


@pytest.mark.parametrize("target", [{}, {0: 0.0}, {0: -1.0, 1: 3.0}, {0: math.inf}])
def test_a_target_without_sense_is_refused(target):
    with pytest.raises(ValueError, match="target"):
        balance(clips(a=1), target, BalanceOptions())


@pytest.mark.parametrize("options", [{"total": 0}, {"fill": 0.0}, {"max_per_video": -1}])
def test_options_out_of_range_are_named(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        BalanceOptions(**options)


COUNTS = st.lists(st.integers(0, 6), min_size=1, max_size=4)


@settings(max_examples=100, deadline=None)
@given(COUNTS, st.data())
def test_the_optimum_is_that_of_all_choices(available, data):
    weights = data.draw(st.lists(st.integers(1, 5), min_size=len(available), max_size=len(available)))
    shares = {label: weight / sum(weights) for label, weight in enumerate(weights)}
    chosen = data.draw(st.integers(0, sum(available)))
    every = [
        total_variation(dict(enumerate(counts)), shares)
        for counts in itertools.product(*(range(n + 1) for n in available))
        if sum(counts) == chosen
    ]
    assert least_distance(dict(enumerate(available)), shares, chosen) == pytest.approx(min(every))


@settings(max_examples=60, deadline=None)
@given(COUNTS, st.floats(0.1, 1.0), st.randoms())
def test_the_choice_does_not_depend_on_the_order_and_the_total_is_the_largest(available, fill, random):
    rows = [
        Clip(f"{label}-{n}", label, f"v{n % 3}", 0.5) for label, count in enumerate(available) for n in range(count)
    ]
    target = dict.fromkeys(range(len(available)), 1.0)
    options = BalanceOptions(fill=fill, max_per_video=0)
    found = balance(rows, target, options)
    random.shuffle(rows)
    assert balance(rows, target, options) == found
    assert all(found.counts[label] <= found.available.get(label, 0) for label in target)
    shares = {label: 1 / len(available) for label in target}
    total = fill_total(dict(enumerate(available)), shares, fill)
    filled = [sum(min(n, t / len(available)) for n in available) for t in (total, total + 1)]
    assert not any(available) or filled[0] >= fill * total - 1e-9 or total == 1
    assert filled[1] < fill * (total + 1)
