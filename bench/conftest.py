"""The ``race`` fixture, and the results file written at the end of the session.

Options: ``--device --quick --counted --cold --rounds --only --results``.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import machine as machines
from bench.clock import CudaClock, wall_clock
from bench.harness import Budget, Candidate, Race, skipped, timestamp

SCHEMA = 1
QUICK = Budget(seconds=2.0, fewest=7, most=40)
FULL = Budget(seconds=3.0, fewest=7, most=60)
CUDA = Budget(seconds=0.7, fewest=9, most=40)  # graphs differ by less than 1 % from one replay to the next


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("vito-fast benchmarks")
    group.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="device of the races")
    group.addoption("--quick", action="store_true", help="the quick set: fewer cases, fewer rounds")
    group.addoption("--counted", action="store_true", help="no clock: correctness, flops and peak memory of ours alone")
    group.addoption("--cold", action="store_true", help="CUDA: empty the L2 cache before every sample")
    group.addoption("--rounds", type=int, help="exactly so many rounds a case, instead of a time budget")
    group.addoption("--only", metavar="ID,ID", help="race the cases of these ids alone")
    group.addoption("--results", metavar="FILE", help="write the results as JSON to FILE")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "full: left out of the quick set")
    config.addinivalue_line("markers", "benchmark: group and timer, for pytest-benchmark")
    config.addinivalue_line("markers", "cpu_only: the measurement does not depend on a GPU")
    if config.getoption("--device") == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: this machine has no CUDA device that torch can use")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    config.stash[RECORDS] = []
    config.stash[STARTED] = time.perf_counter()


RECORDS = pytest.StashKey[list[dict[str, Any]]]()
STARTED = pytest.StashKey[float]()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    clock = CudaClock() if config.getoption("--device") == "cuda" else wall_clock
    kept, dropped = [], []
    for item in items:
        full = config.getoption("--quick") and item.get_closest_marker("full")
        other = config.getoption("--device") == "cuda" and item.get_closest_marker("cpu_only")
        (dropped if full or other else kept).append(item)
        item.add_marker(pytest.mark.benchmark(group=item.path.stem.removeprefix("bench_"), timer=clock))
    config.hook.pytest_deselected(items=dropped)
    items[:] = kept


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> torch.device:
    return torch.device(pytestconfig.getoption("--device"))


@pytest.fixture(scope="session")
def quick(pytestconfig: pytest.Config) -> bool:
    return bool(pytestconfig.getoption("--quick"))


@pytest.fixture
def race(request: pytest.FixtureRequest) -> Callable[..., dict[str, Any]]:
    """``race(case, params, candidates, truth=..., ...) -> record``: the arguments of :class:`bench.harness.Race`.

    pytest-benchmark times our own call. All others run in the set-up of its rounds. A bare pytest does as well, on a
    machine with little more than torch. The suite is the file's name without ``bench_``.
    """
    config = request.config
    timed = config.pluginmanager.hasplugin("benchmark") and not config.getoption("--counted")
    benchmark = request.getfixturevalue("benchmark") if timed else None

    def run(case: str, params: dict[str, Any], candidates: Sequence[Candidate], **options: Any) -> dict[str, Any]:
        start = time.perf_counter()
        cuda = config.getoption("--device") == "cuda"
        options.setdefault("budget", CUDA if cuda else QUICK if config.getoption("--quick") else FULL)
        if rounds := config.getoption("--rounds"):
            options["budget"] = Budget(seconds=0, fewest=rounds, most=rounds)
        options.setdefault("device", config.getoption("--device"))
        contest = Race(case, params, candidates, cold=config.getoption("--cold"), **options)
        only = _asked_for(config)
        if only is not None and contest.id not in only:
            pytest.skip("not asked for")
        if config.getoption("--counted"):
            if not options.get("memory", True):
                pytest.skip("nothing to count without a clock")
            config.stash[RECORDS].append({"suite": request.path.stem.removeprefix("bench_")} | contest.count())
            return config.stash[RECORDS][-1]
        contest.check()
        contest.calibrate()
        if benchmark is None:
            contest.take_turns()
        else:
            benchmark.pedantic(contest.time_ours, setup=contest.time_others, rounds=contest.rounds)
        try:
            contest.check_last()
        except BaseException:
            if benchmark is not None:
                benchmark.has_error = True  # keeps its times out of --benchmark-json
            raise
        contest.count_cost()
        record = {"suite": request.path.stem.removeprefix("bench_"), "test": request.node.nodeid} | contest.record()
        record["seconds"] = round(time.perf_counter() - start, 1)
        if benchmark is not None:
            benchmark.extra_info.update({name: record[name] for name in ("id", "vs", "rates", "candidates")})
        config.stash[RECORDS].append(record)
        _say(config, record)
        _save(config)
        return record

    return run


def _asked_for(config: pytest.Config) -> list[str] | None:
    """``--only a[x=1,y=2],b[x=1]``: a comma separates cases only outside brackets."""
    text = config.getoption("--only")
    return [part.rstrip(",") for part in text.replace("],", "]\n").split("\n")] if text else None


def _say(config: pytest.Config, record: dict[str, Any]) -> None:
    """One line a candidate, as soon as the case is over; who was left out is named with the reason."""
    from bench.text import bytes_text, seconds_text

    write = config.get_terminal_writer().line
    write(f"\n{record['id']}  ({record['rounds']} rounds, {record['seconds']:.0f} s)")
    for row in record["candidates"]:
        if row["status"] != "ok":
            write(f"  {row['name']:<34} {row['status']}: {row['reason']}")
            continue
        times = f"{seconds_text(row['median_s']):>10} ±{row['spread'] / 2:4.0%}"
        memory = bytes_text(row["peak_bytes"]) if "peak_bytes" in row else ""
        speedup = f"ours x{row['speedup']:.2f}" if "speedup" in row else "ours"
        write(f"  {row['name']:<34} {times}  {memory:>10}  {speedup}  {row['role'] if row['role'] != 'ours' else ''}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """All cases skipped, by ``--only`` say, is as bad as none found."""
    _save(session.config)
    if session.exitstatus == pytest.ExitCode.OK and not (
        session.config.stash[RECORDS] or session.config.getoption("collectonly")
    ):
        session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED


def _save(config: pytest.Config) -> None:
    """Writes the cases so far, so that a stopped run does not lose them."""
    cases = config.stash[RECORDS]
    if not cases or not (target := config.getoption("--results")):
        return
    results = {
        "schema": SCHEMA,
        "date": timestamp(),
        "commit": machines.commit(),
        "device": config.getoption("--device"),
        "quick": config.getoption("--quick"),
        "counted": config.getoption("--counted"),
        "only": _asked_for(config),
        "seconds": round(time.perf_counter() - config.stash[STARTED], 1),
        "threads": torch.get_num_threads(),
        "machine": machines.machine(config.getoption("--device")),
        "versions": machines.versions(),
        "skipped": skipped(cases),
        "cases": cases,
    }
    path = Path(target)
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_name(f".{path.name}.part")
    whole.write_text(json.dumps(results, indent=1) + "\n")
    whole.replace(path)
