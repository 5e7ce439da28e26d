"""The ``race`` fixture, and the results file written at the end of the session.

Options: ``--device --quick --counted --cold --rounds --only --results --later-pass``.
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
from bench.cores import Cores
from bench.harness import Budget, Candidate, Race, timestamp
from bench.memory import settle_malloc
from bench.passes import skipped

SCHEMA = 1
QUICK = Budget(seconds=1.0, fewest=5, most=30)  # of one pass
FULL = Budget(seconds=1.5, fewest=4, most=30)
CUDA = Budget(seconds=0.7, fewest=9, most=40)  # graphs differ by less than 1 % from one replay to the next


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("vito-fast benchmarks")
    group.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="where the races run")
    group.addoption("--quick", action="store_true", help="the quick set: fewer cases, fewer rounds")
    group.addoption("--counted", action="store_true", help="no clock: correctness, flops and peak memory of ours alone")
    group.addoption("--cold", action="store_true", help="CUDA: empty the L2 cache before every sample")
    group.addoption("--rounds", type=int, help="exactly so many rounds a case, instead of a time budget")
    group.addoption("--only", metavar="ID,ID", help="race the cases of these ids alone")
    group.addoption(
        "--later-pass",
        action="store_true",
        help="not the first (bench/passes.py): nothing is compared or counted again",
    )
    group.addoption("--results", metavar="FILE", help="write the results as JSON to FILE")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "full: left out of the quick set")
    config.addinivalue_line("markers", "first_pass: takes long to set up, and is left out of later passes")
    config.addinivalue_line("markers", "benchmark: group and timer, for pytest-benchmark")
    config.addinivalue_line("markers", "cpu_only: what is measured does not depend on a GPU")
    if config.getoption("--device") == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: this machine has no CUDA device that torch can use")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    timed = config.getoption("--device") == "cpu" and not config.getoption("--counted")
    config.stash[CORES] = Cores(patience=10.0 if config.getoption("--quick") else 40.0) if timed else None
    config.stash[RECORDS] = []
    config.stash[STARTED] = time.perf_counter()


CORES = pytest.StashKey[Cores | None]()
RECORDS = pytest.StashKey[list[dict[str, Any]]]()
STARTED = pytest.StashKey[float]()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    clock = CudaClock() if config.getoption("--device") == "cuda" else wall_clock
    kept, dropped = [], []
    for item in items:
        full = config.getoption("--quick") and item.get_closest_marker("full")
        other = config.getoption("--device") == "cuda" and item.get_closest_marker("cpu_only")
        again = config.getoption("--later-pass") and item.get_closest_marker("first_pass")
        (dropped if full or other or again else kept).append(item)
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

    Our own call is the one that pytest-benchmark times; everybody else has their turn in the set-up of its rounds. A
    bare pytest does as well, on a machine with little more than torch. The suite is the file's name without ``bench_``.
    """
    config = request.config
    timed = config.pluginmanager.hasplugin("benchmark") and not config.getoption("--counted")
    benchmark = request.getfixturevalue("benchmark") if timed else None

    def run(case: str, params: dict[str, Any], candidates: Sequence[Candidate], **options: Any) -> dict[str, Any]:
        start = time.perf_counter()
        settle_malloc()
        cuda = config.getoption("--device") == "cuda"
        options.setdefault("budget", CUDA if cuda else QUICK if config.getoption("--quick") else FULL)
        if rounds := config.getoption("--rounds"):
            options["budget"] = Budget(seconds=0, fewest=rounds, most=rounds)
        options.setdefault("device", config.getoption("--device"))
        options |= {"cold": config.getoption("--cold"), "cores": config.stash[CORES]}
        if cores := options["cores"]:
            cores.start_race()
        later = config.getoption("--later-pass")
        contest = Race(case, params, candidates, later=later, **options)
        if later and contest.single:
            pytest.skip("raced in the first pass alone")
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
        if not later:
            contest.count_cost()
        record = {"suite": request.path.stem.removeprefix("bench_"), "test": request.node.nodeid} | contest.record()
        record["single"] |= request.node.get_closest_marker("first_pass") is not None
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
    """Writes the cases so far: what stops a run on a lent machine does not take them along."""
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
        "waited": round(cores.waited, 1) if (cores := config.stash[CORES]) else 0.0,
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
