"""``python -m bench.study``: which of the paper's choices helps on the demo, over several seeds?

An arm is the demo's configuration or one of the ``ablation_*.yaml`` presets, each of which changes one thing. Every run
is scored on the held-out objects. ``bench/results/<machine>-study.json`` is written after each run, and a run that it
holds is not repeated. ``python -m bench.tables`` then fills docs/study.md. Options ``--section.field VALUE`` go to
every run.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import machine as machines
from bench.harness import timestamp
from bench.text import markdown
from vito_fast.cli.overrides import configured
from vito_fast.cli.train import Train
from vito_fast.errors import UserError
from vito_fast.files import atomic_write

ROOT = Path(__file__).resolve().parent.parent
Record = dict[str, Any]

T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Two-sided 95 % points of Student's t with 1 to 9 degrees of freedom."""


@dataclass(frozen=True)
class Arm:
    """One preset, and the paper's difference between its method and this change of it."""

    config: str
    change: str
    paper: str
    """In PASCAL mIoU where stated, with the sign that favors the paper's choice; empty = not compared."""


VITO = "demo"
SAME_FRAME = "ablation_same_frame"
ARMS = (
    Arm(VITO, "none: the paper's method", ""),
    Arm(SAME_FRAME, "all views from one frame", "+"),
    Arm("ablation_moclr", "MoCLR: one frame, crops from .08, one level averaged", "+2.8"),
    Arm("ablation_crop_08", "crops from .08 of the frame, not .4", "+1.7"),
    Arm("ablation_average_pooling", "two levels averaged, without attention", "+"),
    Arm("ablation_single_level", "one level with attention", "+1.0"),
    Arm("ablation_window_1_28", "frames within 1.28 s, not 2.56 s", "+1.0"),
    Arm("ablation_two_views", "two views, not three", ""),
    Arm("ablation_per_level", "a projector, a predictor and a loss for each level", ""),
    Arm("ablation_fixed_frames", "one fixed set of frames a clip", "+0.3"),
)


def estimate(values: list[float]) -> tuple[float, float]:
    """Mean, and half of its 95 % interval over seeds by Student's t; NaN for one value."""
    if len(values) < 2:
        return values[0], math.nan
    return statistics.mean(values), T95[len(values) - 2] * statistics.stdev(values) / math.sqrt(len(values))


def percent(mean: float, half: float = math.nan, sign: str = "") -> str:
    return f"{100 * mean:{sign}.1f}" + ("" if math.isnan(half) else f" ± {100 * half:.1f}")


def scores(results: Record, config: str, name: str = "pooled") -> dict[str, float]:
    """Held-out accuracy by seed; empty for an arm without runs."""
    return {seed: run["trained"][name][0] for seed, run in results["runs"].get(config, {}).items()}


def verdict(mean: float, half: float, paper: str) -> str:
    """The difference beside the paper's: a sign counts where the interval excludes 0."""
    if math.isnan(half) or abs(mean) <= half:
        return "undecided"
    if not paper:
        return "better" if mean > 0 else "worse"
    return "agrees" if (mean > 0) == paper.startswith("+") else "disagrees"


def arms_table(results: Record) -> str:
    """Each arm's accuracy, and how far the method is above it, paired by seed."""
    rows, method = [], scores(results, VITO)
    for arm in ARMS:
        found = scores(results, arm.config)
        if not found:
            rows.append([f"`{arm.config}`", arm.change, "0", "not run", "", "", arm.paper, ""])
            continue
        accuracy = [percent(*estimate(list(scores(results, arm.config, name).values()))) for name in ("pooled", "gray")]
        paired = [method[seed] - value for seed, value in found.items() if seed in method]
        last = ["", arm.paper, ""]
        if arm.config != VITO and paired:
            difference = estimate(paired)
            last = [percent(*difference, sign="+"), arm.paper, verdict(*difference, arm.paper)]
        rows.append([f"`{arm.config}`", arm.change, str(len(found)), *accuracy, *last])
    header = ["arm", "change", "seeds", "accuracy", "without color", "method's lead", "paper's", "seen"]
    return markdown(header, rows)


def margins_table(results: Record) -> str:
    """The demo's figures of each seed, and the smallest lead over any other column."""
    rows = []
    for seed, run in results["runs"].get(VITO, {}).items():
        others = {
            "same frame": scores(results, SAME_FRAME).get(seed, math.nan),
            "averaged": run["trained"]["averaged"][0],
            "untrained": run["untrained"]["pooled"][0],
            "pixels": run["pixels"][0],
            "histogram": run["histogram"][0],
        }
        trained, error = run["trained"]["pooled"]
        lead = trained - max(value for value in others.values() if not math.isnan(value))
        cells = ["not run" if math.isnan(value) else percent(value) for value in others.values()]
        rows.append([seed, f"{percent(trained)} ± {percent(error)}", *cells, percent(lead, sign="+")])
    header = ["seed", "VITO", "same frame", "averaged", "untrained", "pixels", "histogram", "smallest lead"]
    return markdown(header, rows)


def settings_table(results: Record) -> str:
    """What all runs have in common."""
    settings = results["settings"]
    options = " ".join(settings["options"]) or "none"
    run = next(iter(results["runs"][VITO].values()))
    return markdown(
        ["setting", "value"],
        [
            ["steps of a run", str(settings["steps"])],
            ["device", settings["device"]],
            ["other options", f"`{options}`"],
            ["held-out clips", f"{run['clips']} of {run['classes']} objects"],
            ["chance", f"{100 * run['chance']:.1f} %"],
        ],
    )


def prepare(data: Path) -> None:
    """Renders and packs the demo's clips, as ``make pretrain`` does; what is there stays."""
    python, pack = [sys.executable, "-m"], ["--shot-cuts", "False", "--short-side", "96"]
    subprocess.run([*python, "vito_fast.data.demo", str(data)], check=True)
    for videos, store in (("videos", "store"), ("heldout", "heldout-store")):
        subprocess.run([*python, "vito_fast", "pack", str(data / videos), str(data / store), *pack], check=True)


def run(config: str, seed: int, steps: int, device: str, data: Path, runs: Path, options: list[str]) -> Record:
    """Trains one arm with one seed, or continues it; returns its held-out figures and last metrics.

    Raises:
        UserError: an option that the training does not know.
        subprocess.CalledProcessError: the training failed.
    """
    loaded, name = configured("train", Train, [config, *options]).config, f"{config}-{seed}-{steps}"
    schedule = loaded.schedule
    changes = {
        "name": name,
        "seed": seed,
        "data.store": data / "store",
        "data.holdout": data / "heldout-store",
        "train.runs": runs,
        "train.device": device,
        "schedule.epochs": 1,  # of as many clips as the steps take, with the preset's share of warm-up
        "schedule.epoch_clips": steps * loaded.train.batch_size,
        "schedule.warmup_epochs": schedule.warmup_epochs / schedule.epochs,
    }
    given = [text for key, value in changes.items() for text in (f"--{key}", str(value))]
    subprocess.run([sys.executable, "-m", "vito_fast", "train", config, *given, *options, "--resume"], check=True)
    summary = json.loads((runs / name / "summary.json").read_text(encoding="utf-8"))
    metrics = [json.loads(line) for line in (runs / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    last = ("loss", "embedding_rank", "attention_entropy_level0", "attention_entropy_level1")
    return summary["holdout"] | {key: metrics[-1][key] for key in last if key in metrics[-1]}


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 1 where the results file is of other settings, or a run fails."""
    parser = argparse.ArgumentParser(prog="python -m bench.study", description=__doc__)
    parser.add_argument("--arms", nargs="+", choices=[arm.config for arm in ARMS], metavar="PRESET")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each arm (default 3)")
    parser.add_argument("--steps", type=int, default=248, help="steps of each run (default 248)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--data", type=Path, default=ROOT / "data/demo", help="made if missing (default data/demo)")
    parser.add_argument(
        "--runs", type=Path, default=ROOT / "build/study", help="folder of the runs (default build/study)"
    )
    parser.add_argument("--results", type=Path, help="results file (default bench/results/<machine>-study.json)")
    options, others = parser.parse_known_args(arguments)
    if not 1 <= options.seeds <= 1 + len(T95) or options.steps < 1:
        parser.error(f"--seeds must be 1 to {1 + len(T95)} and --steps at least 1")
    on = machines.machine(options.device)
    path = options.results or ROOT / "bench/results" / f"{on['name']}-study.json"
    settings = {"steps": options.steps, "device": options.device, "options": others}
    results: Record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if results.get("settings", settings) != settings:
        print(
            f"study: {path} holds runs of {results['settings']}: move it away or name another --results",
            file=sys.stderr,
        )
        return 1
    results = {"schema": 1, "cases": [], "machine": on, "settings": settings, "runs": {}} | results
    try:
        prepare(options.data)
        for arm in options.arms or [arm.config for arm in ARMS]:
            for seed in range(options.seeds):
                done = results["runs"].setdefault(arm, {})
                if str(seed) in done:
                    continue
                print(f"study: {arm}, seed {seed}", flush=True)
                done[str(seed)] = run(arm, seed, options.steps, options.device, options.data, options.runs, others)
                results |= {"date": timestamp(), "commit": machines.commit(), "versions": machines.versions()}
                with atomic_write(path) as partial:
                    partial.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    except UserError as error:
        parser.error(str(error))
    except subprocess.CalledProcessError as error:
        print(f"study: {' '.join(map(str, error.cmd[1:5]))} failed with status {error.returncode}", file=sys.stderr)
        return 1
    print(arms_table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
