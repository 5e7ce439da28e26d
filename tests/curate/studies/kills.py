"""``python tests/curate/studies/kills.py TARGET``: kills a run again and again, then compares its tables.

SIGKILL strikes the driver, which is then started again, or one of its two workers. ``ray-worker`` and ``ray-node``
strike a process of a local Ray cluster's two nodes, or a whole node, which another replaces. Each time, at least one
more unit was finished. At the end the rows must be those of an undisturbed run, with one for each item, and no process
or partial file may be left.
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


def work(folder: Path, name: str = "local") -> None:
    engine.UNIT = UNIT
    items = [engine.Item(f"item {n}", {"seconds": SECONDS, "value": n}) for n in range(ITEMS)]
    engine.run(STEP, items, folder, engine.Engine(name, processes=2))


def start(folder: Path, name: str = "local") -> subprocess.Popen:
    return subprocess.Popen([sys.executable, __file__, "work", "--folder", str(folder), "--engine", name])


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


def descendants(pid: int) -> list[int]:
    return [one for child in children(pid) for one in (child, *descendants(child))]


def command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def kill_ray(target: str, folder: Path, most: int) -> int:
    """The same on a local Ray cluster of two nodes, whose head runs no task."""
    import ray
    from ray.cluster_utils import Cluster

    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)  # workers import the step
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    os.environ["RAY_ADDRESS"] = cluster.address
    driver, kills, finished, seen = start(folder, "ray"), 0, 0, set[int]()
    while driver.poll() is None:
        own = [
            pid for pid in descendants(os.getpid()) if "ray::ray_unit" in command(pid) or "curate.child" in command(pid)
        ]
        seen.update(own)
        now = len(list(folder.glob("*.parquet")))
        if now > finished and kills < most and own:
            time.sleep(random.random() * SECONDS)
            if target == "ray-node":
                cluster.remove_node(nodes.pop(random.randrange(2)), allow_graceful=False)
                nodes.append(cluster.add_node(num_cpus=1))
            else:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(random.choice(own), signal.SIGKILL)
            kills, finished = kills + 1, now
        time.sleep(0.05)
    ray.shutdown()
    cluster.shutdown()
    time.sleep(2)
    left = [pid for pid in seen if alive(pid)]
    if driver.returncode or left:
        raise SystemExit(f"the driver ended with status {driver.returncode}, and processes {left} are left")
    return kills


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=("driver", "worker", "ray-worker", "ray-node", "work"))
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--engine", default="local")
    args = parser.parse_args()
    if args.target == "work":
        work(args.folder, args.engine)
        return
    with tempfile.TemporaryDirectory() as place:
        work(Path(place) / "calm")
        folder = Path(place) / "killed"
        kills = (kill_ray if args.target.startswith("ray") else kill)(args.target, folder, args.kills)
        engine.clean(folder, STEP.key)
        same, one_each = rows(folder) == rows(Path(place) / "calm"), len(rows(folder)) == ITEMS
        rest = [path.name for path in folder.iterdir() if path.suffix != ".parquet"]
    print(f"{kills} kills of the {args.target}: rows equal {same}, one for each item {one_each}, left over {rest}")
    if not (same and one_each and not rest):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
