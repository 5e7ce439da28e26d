"""``make gpu-report``: what ten minutes on a borrowed GPU are spent on, the most valuable first.

Each stage is a process with a budget of seconds, and leaves its results before the next one starts, so that an early
end costs the last stages alone. ``bench/results/<gpu>-report.json`` names the stages, their status and their files.
Kernels need a checkout and a Python with torch, triton, numpy and pytest; the other stages need the package with its
sampler, and say so where it is not there. No network. ``--dry-run`` shows the stages on any machine.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.gpu_check import ROOT, start, wait
from bench.machine import commit, machine

MINUTES = 10.0
LEAST = 5.0  # seconds: a stage with less is not started
CHANGED = ("replay", "more_losses", "contrastive", "multi_view", "wide")  # tests of the kernels no GPU has run


@dataclass(frozen=True)
class Stage:
    """One process.

    Args:
        name: of the stage, and of its files.
        seconds: its budget; what it leaves goes to the next ones.
        why: what its results are for.
        needs: modules without which it is left out.
        command: from the path of its results.
    """

    name: str
    seconds: float
    why: str
    needs: tuple[str, ...]
    command: Callable[[Path], list[str]]


def _tests(results: Path) -> list[str]:
    files = [f"tests/kernels/test_{name}_kernel.py" for name in CHANGED]
    spread = ["-n", str(min(16, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
    plain = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-o",
        "addopts=",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:benchmark",
        *spread,
    ]
    return [*plain, f"--junitxml={results.with_suffix('.xml')}", *files]


def _races(*arguments: str) -> Callable[[Path], list[str]]:
    page = ["--report", str(ROOT / "build" / "gpu-report.html"), "--no-static"]
    command = [sys.executable, "-m", "bench", "--device", "cuda", *page]
    return lambda results: [*command, "--results", str(results), *arguments]


def _script(*commands: str) -> Callable[[Path], list[str]]:
    """Commands of a shell, with a folder of ``build/`` and a name that no earlier run has."""

    def command(results: Path) -> list[str]:
        run = f"gpu-report-{time.strftime('%Y%m%d-%H%M%S')}"
        names = {"folder": shlex.quote(str(ROOT / "build" / run)), "python": shlex.quote(sys.executable), "run": run}
        return ["sh", "-c", " && ".join(line.format(**names) for line in commands)]

    return command


DEMO = "{python} -m vito_fast.data.demo {folder}/demo --objects 60 --held-out 6"
PACK = "{python} -m vito_fast pack {folder}/demo/videos {folder}/{store} --shot-cuts False"
STORES = ("jpeg", "h264")
FAST = "vito_fast._sampler"
STAGES = (
    Stage("tests", 150, "correctness of what changed", ("triton",), _tests),
    Stage("losses", 150, "losses, eager and as graphs, beside their peers", ("triton",), _races("--suite", "losses")),
    Stage(
        "infonce",
        90,
        "InfoNCE, eager and as graphs, at the sizes people train",
        ("triton",),
        _races("--suite", "infonce", "-k", "not large_n and not over_d"),
    ),
    Stage(
        "steps",
        60,
        "the training step's appetite, eager and fused",
        (FAST,),
        lambda _: [sys.executable, "-m", "bench.step_modes", "--mode", "eager"],
    ),
    Stage(
        "loader",
        60,
        "the loader from jpeg and h264 stores on DALI against the step's appetite",
        (FAST, "nvidia.dali"),
        _script(
            DEMO,
            *(PACK.replace("{store}", store) + f" --format {store}" for store in STORES),
            *(f"{{python}} -m vito_fast bench-data {{folder}}/{store} --seconds 8" for store in STORES),
        ),
    ),
    Stage(
        "training",
        90,
        "a run of the method and its evaluation",
        (FAST,),
        _script(
            DEMO,
            PACK.replace("{store}", "store"),
            "{python} -m vito_fast train configs/demo.yaml --data.store {folder}/store --name {run}",
            "{python} -m vito_fast.evaluate.demo {folder}/demo {folder}/evaluation",
            "{python} -m vito_fast evaluate runs/{run} --tasks knn --preset demo "
            "--data.knn {folder}/evaluation/objects --out {folder}/scores --baselines random,pixels",
        ),
    ),
)


def missing(stage: Stage) -> list[str]:
    """The modules that the stage needs and this Python has not."""
    return [name for name in stage.needs if not _found(name)]


def _found(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:  # of a package that is not there itself
        return False


def run(stages: list[Stage], seconds: float, folder: Path) -> list[dict[str, Any]]:
    """Runs the stages for at most ``seconds`` together, and writes the report after each."""
    on, ends, done = machine("cuda"), time.monotonic() + seconds, list[dict[str, Any]]()
    report = folder / f"{on['name']}-report.json"
    folder.mkdir(parents=True, exist_ok=True)
    for stage in stages:
        results = folder / f"{on['name']}-{stage.name}.json"
        row: dict[str, Any] = {"name": stage.name, "why": stage.why}
        left = ends - time.monotonic()
        if lacking := missing(stage):
            row["status"] = f"left out: no {', '.join(lacking)}"
        elif left < LEAST:
            row["status"] = "left out: the time was over"
        else:
            before, began = set(folder.iterdir()), time.monotonic()
            with results.with_suffix(".log").open("wb") as output:
                row["status"] = wait(start(stage.command(results), output), min(stage.seconds, left))
            row["seconds"] = round(time.monotonic() - began, 1)
            row["files"] = sorted(path.name for path in set(folder.iterdir()) - before | {results} if path.exists())
        done.append(row)
        _write(report, {"machine": on, "commit": commit(), "seconds": seconds, "stages": done})
        print(f"{stage.name}: {row['status']}", flush=True)
    print(f"report: {os.path.relpath(report)}")
    return done


def _write(path: Path, record: dict[str, Any]) -> None:
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(record, indent=1) + "\n")
    beside.replace(path)


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 0 if every stage that could run ended well."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_report", description=__doc__.partition("\n")[0])
    parser.add_argument("--dry-run", action="store_true", help="list the stages with their budgets and commands")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"of all stages together (default {MINUTES:g})")
    names = [stage.name for stage in STAGES]
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="these stages")
    options = parser.parse_args(arguments)
    if not options.minutes > 0:
        parser.error(f"--minutes must be positive, got {options.minutes:g}")
    stages = [stage for stage in STAGES if stage.name in options.only]
    if options.dry_run:
        for stage in stages:
            lacking = missing(stage)
            print(
                f"{stage.name:9}{stage.seconds:4.0f} s  {stage.why}" + f"; no {', '.join(lacking)} here" * bool(lacking)
            )
            print(f"             {shlex.join(stage.command(Path('bench/results/GPU-' + stage.name + '.json')))}")
        print(f"{sum(stage.seconds for stage in stages):13.0f} s of {60 * options.minutes:.0f}")
        return 0
    if not torch.cuda.is_available():
        print("gpu-report: there is no GPU here that PyTorch can use, so nothing was run", file=sys.stderr)
        return 1
    done = run(stages, 60 * options.minutes, ROOT / "bench" / "results")
    return int(any(row["status"] != 0 and not str(row["status"]).startswith("left out: no") for row in done))


if __name__ == "__main__":
    sys.exit(main())
