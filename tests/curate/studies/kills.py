"""``python tests/curate/studies/kills.py {driver,worker}``: kills a run again and again, then compares its tables.

SIGKILL strikes the driver, which is then started again, or one of its two workers. Each time, at least one more unit
was finished. At the end the rows must be those of an undisturbed run, with one for each item, and no process or partial
file may be left.
"""

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parent))  # busy

from vito_fast.curate import engine

ITEMS, UNIT, SECONDS = 160, 2, 0.05
STEP = engine.Step("busy", "busy", None, "key")


def work(folder: Path) -> None:
    engine.UNIT = UNIT
    items = [engine.Item(f"item {n}", {"seconds": SECONDS, "value": n}) for n in range(ITEMS)]
    engine.run(STEP, items, folder, engine.Engine(processes=2))


def start(folder: Path) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, __file__, "work", "--folder", str(folder)])


def children(pid: int) -> list[int]:
    found = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += map(int, (task / "children").read_text().split())
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def rows(folder: Path) -> list[tuple]:
    tables = [pq.read_table(path).to_pylist() for path, _ in engine.unit_files(folder, STEP.key)]
    return sorted(tuple(row.values()) for table in tables for row in table)


def kill(target: str, folder: Path, most: int) -> int:
    """Run to the end under kills. Returns their number."""
    driver, kills, seen, finished = start(folder), 0, set[int](), 0
    while True:
        if driver.poll() is not None:
            if driver.returncode != -signal.SIGKILL:
                break
            driver = start(folder)
        own = children(driver.pid)
        seen.update(own)
        now = len(list(folder.glob("*.parquet")))
        if now > finished and kills < most and own:
            time.sleep(random.random() * SECONDS)
            with contextlib.suppress(ProcessLookupError):
                os.kill(driver.pid if target == "driver" else random.choice(own), signal.SIGKILL)
                kills, finished = kills + 1, now
        time.sleep(0.01)
    time.sleep(1)
    left = [pid for pid in seen if alive(pid)]
    if driver.returncode or left:
        raise SystemExit(f"the driver ended with status {driver.returncode}, and processes {left} are left")
    return kills


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=("driver", "worker", "work"))
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    if args.target == "work":
        work(args.folder)
        return
    with tempfile.TemporaryDirectory() as place:
        work(Path(place) / "calm")
        folder = Path(place) / "killed"
        kills = kill(args.target, folder, args.kills)
        engine.clean(folder, STEP.key)
        same, one_each = rows(folder) == rows(Path(place) / "calm"), len(rows(folder)) == ITEMS
        rest = [path.name for path in folder.iterdir() if path.suffix != ".parquet"]
    print(f"{kills} kills of the {args.target}: rows equal {same}, one for each item {one_each}, left over {rest}")
    if not (same and one_each and not rest):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
