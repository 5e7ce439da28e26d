"""The harness itself: wrong results get no time, ratios mean what they say, memory and flops are exact."""

import pytest
import torch

from bench import harness
from bench.clock import CudaClock
from bench.harness import FEW_ROUNDS, Budget, Candidate, Race, Work, absent, relative_error
from bench.memory import cost
from vito_kernels.contrastive import cpu_matmul as matmul_cpu

X = torch.linspace(-1, 1, 1000)
EXACT = X.double().exp()
SHORT = Budget(seconds=0.2, fewest=7, most=20)
NOW = [0.0]  # seconds, moved on by the candidates themselves: no test depends on how busy the machine is


def pausing(seconds: float, scale: float = 1.0):
    """A call that takes so long and returns the right result, times ``scale``."""

    def call():
        NOW[0] += seconds
        return (X.exp() * scale,)

    return call


def race(*candidates: Candidate, **options) -> Race:
    options = {"truth": lambda: (EXACT,), "budget": SHORT, "memory": False, "bound": 1e-5} | options
    contest = Race("exp", {"N": 1000}, candidates, **options)
    contest.clock = lambda: NOW[0]
    return contest


def rows(record: dict) -> dict[str, dict]:
    return {row["name"]: row for row in record["candidates"]}


def test_a_wrong_result_of_ours_fails_before_anything_is_timed():
    contest = race(Candidate("ours", pausing(0.001, 1.001), "ours"), Candidate("peer", pausing(0.001)))
    with pytest.raises(AssertionError, match=r"exp\[N=1000\]: ours: differs .* no time"):
        contest.run()
    assert not contest._runners[1].times


@pytest.mark.parametrize(
    "broken", [lambda: (X.exp() * float("nan"),), lambda: (X,), lambda: (X[:10].exp(),), lambda: ()]
)
def test_a_wrong_peer_gets_no_time_and_is_named(broken):
    record = race(Candidate("ours", pausing(0.001), "ours"), Candidate("peer", broken)).run()
    peer = rows(record)["peer"]
    assert peer["status"] == "wrong"
    assert "differs" in peer["reason"]
    assert "median_s" not in peer
    assert "best_peer" not in record["vs"]


def test_a_peer_that_raises_or_is_absent_is_named_with_its_reason():
    def fails():
        raise RuntimeError("out of patience")

    gone = absent("gone", "not installed")
    record = race(Candidate("ours", pausing(0.001), "ours"), Candidate("fails", fails), gone).run()
    assert rows(record)["fails"]["reason"] == "RuntimeError: out of patience"
    assert (rows(record)["gone"]["status"], rows(record)["gone"]["reason"]) == ("skipped", "not installed")


def test_speedups_are_time_of_the_other_over_ours():
    record = race(
        Candidate("ours", pausing(0.002), "ours"),
        Candidate("reference", pausing(0.006), "reference"),
        Candidate("fast peer", pausing(0.004)),
        Candidate("slow peer", pausing(0.008)),
        Candidate("peer on our bytes", pausing(0.003), "same_bytes"),
        Candidate("limit", pausing(0.001), "limit"),
        work=Work(flops=2e9, bytes=4e6, items=10, unit="things"),
    ).run()
    vs = record["vs"]
    assert vs["reference"] == pytest.approx(3)
    assert (vs["best_peer_name"], vs["best_peer"]) == ("fast peer", pytest.approx(2))
    assert (vs["best_same_bytes_name"], vs["best_same_bytes"]) == ("peer on our bytes", pytest.approx(1.5))
    assert vs["limit"] == pytest.approx(0.5)
    assert record["rates"]["tflops"] == pytest.approx(1)
    assert record["rounds"] >= 7


def test_rounds_are_interleaved():
    order = []

    def noting(name, seconds):
        call = pausing(seconds)
        return lambda: (order.append(name), call())[1]

    others = [Candidate(name, noting(name, 0.02)) for name in "BC"]
    contest = race(Candidate("ours", noting("A", 0.02), "ours"), *others)
    contest.run()
    last = "".join(order[-3 * contest.rounds :])
    assert last == "BCA" * contest.rounds


def test_a_short_call_is_repeated_within_a_sample():
    ours = rows(race(Candidate("ours", pausing(3e-4), "ours")).run())["ours"]
    assert (ours["repeats"], ours["median_s"]) == (34, pytest.approx(3e-4))


def test_who_anchors_no_figure_takes_nobody_s_rounds():
    """The best peer and the reference have all rounds however long they take."""
    candidates = [
        Candidate("ours", pausing(0.012), "ours"),
        Candidate("reference", pausing(0.7), "reference"),
        Candidate("best", pausing(0.6)),
        Candidate("next", pausing(0.61)),
    ]
    found = {name: row["rounds"] for name, row in rows(race(*candidates).run()).items()}
    assert found == {"ours": 7, "reference": 7, "best": 7, "next": FEW_ROUNDS}
    candidates = [Candidate("ours", pausing(0.003), "ours"), Candidate("best", pausing(0.011))]
    candidates += [Candidate("behind", pausing(0.043)), Candidate("far behind", pausing(0.2))]
    found = {name: row["rounds"] for name, row in rows(race(*candidates, budget=Budget(1.0, 7, 10)).run()).items()}
    assert found == {"ours": 10, "best": 10, "behind": 10, "far behind": 5}


def test_a_candidate_may_err_twice_as_much_as_the_reference():
    candidates = [
        Candidate("ours", pausing(0.001, 1 + 1e-4), "ours"),
        Candidate("reference", pausing(0.001, 1 + 1e-4), "reference"),
        Candidate("close", pausing(0.001, 1 + 1.9e-4)),
        Candidate("far", pausing(0.001, 1 + 2.1e-4)),
    ]
    record = rows(race(*candidates, bound=None).run())
    assert [record[name]["status"] for name in ("ours", "close", "far")] == ["ok", "ok", "wrong"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_truth_that_is_not_finite_judges_nobody(value):
    broken = EXACT.clone().index_fill_(0, torch.tensor(5), value)
    candidates = [Candidate("ours", pausing(0.001, value), "ours"), Candidate("reference", pausing(0.001), "reference")]
    for bound in (None, 1.0):
        with pytest.raises(AssertionError, match=r"exp\[N=1000\]: the float64 truth is not finite"):
            race(*candidates, truth=lambda: (broken,), bound=bound).run()


@pytest.mark.parametrize(("scale", "bound"), [(float("nan"), None), (1.6, None), (1.1, 0.01)])
def test_a_wrong_reference_ends_the_race(scale, bound):
    """Ours, as wrong as it, is not to blame first."""
    candidates = [Candidate(role, pausing(0.001, scale), role) for role in ("ours", "reference")]
    with pytest.raises(AssertionError, match="reference: differs from the float64 truth"):
        race(*candidates, bound=bound).run()


def test_a_peer_whose_result_cannot_be_judged_is_named():
    def agree(got, truth):
        return relative_error(got, truth) if len(got) == 1 else 1 / 0

    record = race(Candidate("ours", pausing(0.001), "ours"), Candidate("odd", lambda: ()), agree=agree).run()
    assert (rows(record)["odd"]["status"], rows(record)["odd"]["reason"]) == (
        "failed",
        "ZeroDivisionError: division by zero",
    )
    with pytest.raises(ZeroDivisionError):
        race(Candidate("ours", lambda: (), "ours"), agree=agree).run()


def worse_each_call(seconds):
    """Right at first, then ever further off."""
    calls = []
    return lambda: (calls.append(1), pausing(seconds, 1 + 1e-6 * len(calls))())[1]


@pytest.mark.parametrize("seconds", [0.001, 0.02, 1.0], ids=["several calls a sample", "one", "too long to warm up"])
def test_ours_is_right_to_the_end(seconds):
    contest = race(Candidate("ours", worse_each_call(seconds), "ours"), budget=Budget(seconds=0.5, fewest=20))
    with pytest.raises(AssertionError, match=r"ours: differs .* no time"):
        contest.run()
    assert len(contest.ours.times) >= 20
    assert race(Candidate("ours", worse_each_call(0.02), "ours"), once=True).run()["rounds"] >= 7


@pytest.mark.parametrize("scale", [1.0, 1.01])
def test_ours_is_right_when_replayed_as_a_graph(monkeypatch, scale):
    """Python runs at the capture alone; a replay writes into the tensors of then."""
    written = []

    def graphed(call, repeats=1):
        for _ in range(repeats):
            call()

        def replay():
            NOW[0] += 0.004 * repeats
            written[-1].copy_(X.exp() * scale)

        return replay

    def call():
        written.extend(pausing(0.005)())
        return written[-1:]

    monkeypatch.setattr(harness, "graphed", graphed)
    contest = race(Candidate("ours", call, "ours"), device="cuda")
    if scale == 1:
        ours = rows(contest.run())["ours"]
        assert (ours["eager_s"], ours["median_s"]) == (pytest.approx(0.005), pytest.approx(0.004))
    else:
        with pytest.raises(AssertionError, match="ours: differs"):
            contest.run()


def test_a_peer_that_compiles_is_timed_without_and_not_for_a_count():
    calls = []

    def call():
        calls.append(1)
        return pausing(0.02 if len(calls) > 1 else 50.0)()

    candidates = [Candidate("ours", pausing(0.02), "ours"), Candidate("peer", call, compiles=True)]
    race(*candidates, memory=True).count()
    assert not calls
    found = rows(race(*candidates).run())
    assert (found["peer"]["rounds"], found["peer"]["median_s"]) == (found["ours"]["rounds"], pytest.approx(0.02))


def test_a_race_needs_something_to_judge_by():
    with pytest.raises(ValueError, match="a reference or a bound on the error, exp has neither"):
        race(Candidate("ours", pausing(0.0), "ours"), bound=None)


def test_counting_needs_no_clock():
    candidates = [Candidate("ours", pausing(1.0), "ours"), Candidate("peer", lambda: 1 / 0)]
    record = race(*candidates, memory=True).count()
    assert [row["name"] for row in record["candidates"]] == ["ours"]
    assert record["candidates"][0]["peak_bytes"] > 0
    assert "median_s" not in record["candidates"][0]


def test_counting_checks_the_result():
    with pytest.raises(AssertionError, match="differs"):
        race(Candidate("ours", pausing(1.0, 1.1), "ours")).count()


def test_exactly_one_candidate_is_ours():
    with pytest.raises(ValueError, match="exactly one candidate of ours, exp has 0"):
        race(Candidate("peer", pausing(0.0)))


def test_relative_error_is_the_worst_of_all_results():
    truth = (torch.ones(4).double(), torch.zeros(3).double())
    assert relative_error((torch.ones(4), torch.zeros(3)), truth) == 0
    assert relative_error((torch.full((4,), 1.5), torch.zeros(3)), truth) == pytest.approx(0.5)
    assert relative_error((torch.ones(4), torch.full((3,), 1e-3)), truth) > 1e200
    assert relative_error((torch.ones(4),), truth) == float("inf")


def test_peak_memory_and_flops_are_exact():
    a, b = torch.randn(256, 128), torch.randn(128, 512)

    def call():
        first = a @ b
        return first.exp()

    counted = cost(call, torch.device("cpu"))
    assert counted.flops == 2 * 256 * 128 * 512
    assert counted.peak_bytes == 2 * 4 * 256 * 512
    assert cost(call, torch.device("cpu")) == counted


@pytest.mark.parametrize("slow", [True, False], ids=["oneDNN", "MKL"])
def test_products_of_either_library_are_counted(slow, monkeypatch):
    if slow and not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("PyTorch was built without oneDNN")
    monkeypatch.setattr(matmul_cpu, "_mkl_is_slow", lambda: slow)
    x, y, onto = torch.ones(20, 30), torch.ones(40, 30), torch.ones(20, 40)
    assert cost(lambda: matmul_cpu.product(x, y), torch.device("cpu")).flops == 2 * 20 * 40 * 30
    assert cost(lambda: matmul_cpu.add_product(onto, x, y), torch.device("cpu")).flops == 2 * 20 * 40 * 30


def test_peak_memory_forgets_what_was_released():
    def call():
        for _ in range(5):
            torch.empty(1 << 20, dtype=torch.uint8)
        return ()

    assert cost(call, torch.device("cpu")).peak_bytes == 1 << 20


def test_cuda_clock_adds_up_pairs_of_events(monkeypatch):
    now = [0.0]

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            now[0] += 5.0
            self.at = now[0]

        def synchronize(self):
            self.waited = True

        def elapsed_time(self, other):
            assert other.waited
            return other.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = CudaClock()
    differences = []
    for _ in range(3):
        start = clock()
        differences.append(clock() - start)
    assert differences == pytest.approx([0.005] * 3)
