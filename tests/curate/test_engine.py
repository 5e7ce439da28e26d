"""Units, keys and children: whatever dies, each item has exactly one row, and the rows are the same."""

import os
import signal
import subprocess
import sys
import threading
import time

import pyarrow.parquet as pq
import pytest
import steps

from vito_fast.curate import engine as engines
from vito_fast.curate.engine import Engine, Item, Step, clean, rows, run, step_key, unit_files

STEP = Step("test", steps.__name__, {"factor": 2}, step_key("test", 1, {"factor": 2}), seconds=1.5, memory_mib=2048)


def items(count, **odd):
    """``count`` items that work, but for ``odd``: acts by number, as ``n3="hang"``."""
    return [Item(f"item {n}", {"act": odd.get(f"n{n}", "fine"), "value": n}) for n in range(count)]


def table(folder, key=STEP.key):
    return sorted((row["item_id"], row["status"], row["value"]) for path, _ in unit_files(folder, key)
                  for row in pq.read_table(path).to_pylist())  # fmt: skip


@pytest.fixture(autouse=True)
def small_units(monkeypatch):
    monkeypatch.setattr(engines, "UNIT", 4)


def test_one_and_two_processes_and_parts_give_the_same_rows(tmp_path):
    work = items(11)
    run(STEP, work, tmp_path / "one", Engine(processes=1))
    run(STEP, work, tmp_path / "two", Engine(processes=2))
    for part in (1, 2, 3):
        run(STEP, work, tmp_path / "parts", Engine(processes=1, part=(part, 3)))
    assert table(tmp_path / "one") == table(tmp_path / "two") == table(tmp_path / "parts")
    assert [value for *_, value in sorted(table(tmp_path / "one"), key=lambda r: r[2])] == [2 * n for n in range(11)]
    assert {p.name: p.read_bytes() for p in (tmp_path / "one").iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "two").iterdir()
    }


def test_a_finished_item_is_never_computed_again_and_new_ones_cost_only_themselves(tmp_path):
    first, second = Engine(processes=1), Engine(processes=1)
    run(STEP, items(6), tmp_path, first)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    run(STEP, items(9), tmp_path, second)
    assert (second.costs["test"].items, second.costs["test"].reused) == (3, 6)
    assert all(path.stat().st_mtime_ns == changed for path, changed in before.items())
    assert [name for name, *_ in table(tmp_path)] == sorted(item.id for item in items(9))


def test_other_options_are_another_key_and_old_units_go(tmp_path):
    run(STEP, items(3), tmp_path, Engine(processes=1))
    other = Step("test", steps.__name__, {"factor": 5}, step_key("test", 1, {"factor": 5}))
    run(other, items(3), tmp_path, Engine(processes=1))
    assert [value for *_, value in table(tmp_path)] == [0, 2, 4]
    assert [value for *_, value in table(tmp_path, other.key)] == [0, 5, 10]
    (tmp_path / ".x.parquet.1.partial").touch()
    clean(tmp_path, other.key)
    assert len(list(tmp_path.iterdir())) == 1
    assert [row["value"] for row in rows(tmp_path, other.key, {"item 1": None}, ["value"])] == [5]


def test_a_fault_costs_its_own_item_alone(tmp_path):
    work = items(8, n1="segfault", n3="bad", n4="hang", n6="memory")
    run(STEP, work, tmp_path, Engine(processes=2))
    found = {
        row["item_id"]: row for path, _ in unit_files(tmp_path, STEP.key) for row in pq.read_table(path).to_pylist()
    }
    assert {name for name, row in found.items() if row["status"] == "ok"} == {f"item {n}" for n in (0, 2, 5, 7)}
    reasons = [found[f"item {n}"]["reason"] for n in (1, 3, 4, 6)]
    assert "status -11" in reasons[0]
    assert reasons[1:] == ["a bad one", "over a limit: not done within 1.5 s", "over a limit: memory"]


def test_a_child_killed_from_outside_costs_nothing(tmp_path):
    (tmp_path / "marks").mkdir()
    work = [*items(3), Item("item 3", {"act": "killed", "value": 3, "marks": str(tmp_path / "marks"), "times": 4})]
    run(STEP, work, tmp_path / "units", Engine(processes=1))
    run(STEP, items(4), tmp_path / "calm", Engine(processes=1))
    assert table(tmp_path / "units") == table(tmp_path / "calm")


DRIVER = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
import test_engine as t
t.engines.UNIT = 2
t.run(t.STEP, t.items(24), Path({folder!r}), t.Engine(processes=2))
"""


def test_a_driver_killed_again_and_again_ends_with_the_same_rows(tmp_path):
    run(STEP, items(24), tmp_path / "calm", Engine(processes=2))
    folder = tmp_path / "killed"
    script = DRIVER.format(tests=os.path.dirname(__file__), folder=str(folder))
    for _ in range(3):
        driver = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
        begin, had = time.monotonic(), len(list(folder.glob("*.parquet")))
        while driver.poll() is None and time.monotonic() - begin < 30 and len(list(folder.glob("*.parquet"))) == had:
            time.sleep(0.01)
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    run(STEP, items(24), folder, Engine(processes=2))
    clean(folder, STEP.key)
    assert table(folder) == table(tmp_path / "calm")
    assert all(path.suffix == ".parquet" for path in folder.iterdir())


def test_an_error_of_the_disk_ends_the_run_in_one_line(tmp_path):
    folder = tmp_path / "units"
    folder.mkdir()
    engine = Engine(processes=1, progress=lambda *_: folder.exists() and folder.rmdir())
    with pytest.raises(Exception, match="cannot write"):
        run(STEP, items(2), folder, engine)


def test_no_thread_or_child_is_left(tmp_path):
    before = threading.active_count()
    run(STEP, items(4), tmp_path, Engine(processes=2))
    time.sleep(0.1)
    assert threading.active_count() == before
