"""Several tasks on an encoder and its baselines: checks first, then results, and a record of each task not run."""

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vito_fast.errors import UserError
from vito_fast.evaluate.encoders import Encoder
from vito_fast.evaluate.result import Result, compare
from vito_fast.evaluate.task import Check, Preset, Task, folder_name, rank_and_size
from vito_fast.files import atomic_write

NOT_RUN = "vito-fast evaluation not run, 1"
"""Schema of the record that a task leaves when it cannot score an encoder."""


@dataclasses.dataclass(frozen=True)
class Job:
    """A task with its preset and data."""

    task: Task
    preset: Preset
    data: Path


def check_lines(job: Job, found: Check, seconds: float | None) -> list[str]:
    """What ``--check`` says of a task: problems, or size, time and memory."""
    head = f"{job.task.name} ({job.preset.name}) in {job.data}"
    if found.problems:
        shown = [f"{head}: {problem}" for problem in found.problems[:5]]
        return shown + ([f"{head}: and {len(found.problems) - 5} more problems"] if len(found.problems) > 5 else [])
    parts = [f"{found.items:,} items", f"{found.manifest.get('bytes', 0) / 1e9:.2f} GB"]
    if seconds is not None:
        parts.append(f"about {_duration(seconds)} on this device")
    if found.memory:
        parts.append(f"{found.memory / 1e9:.1f} GB of memory for features")
    return [f"{head}: {', '.join(parts)}", *(f"  note: {note}" for note in found.notes)]


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def seconds_of(encoder: Encoder, found: Check) -> float:
    """Time of a task's forward (and backward) passes, from a few images of its size. Reading files is not in it."""
    height, width = (max(32, n // 32 * 32) for n in found.size)
    images = torch.zeros(2, 3, height, width, device=encoder.device)
    encoder.stages(images)
    start = time.perf_counter()
    rounds = 2
    for _ in range(rounds):
        encoder.stages(images)
    if encoder.device.type == "cuda":
        torch.cuda.synchronize(encoder.device)
    return (time.perf_counter() - start) / (rounds * len(images)) * found.forward_images


def evaluate(
    encoders: Sequence[Encoder], jobs: Sequence[Job], out: Path, command: str, tell: Callable[[str], None]
) -> list[Result]:
    """Runs every task on every encoder; what is complete for the same digests is read.

    Args:
        encoders: The encoder first, then its baselines.
        jobs: Tasks, presets and data.
        out: Results' folder.
        command: What the user typed, for the record of tasks not run.
        tell: Gets one line a result.
    Returns:
        All results, encoder by encoder.
    Raises:
        UserError: if a task cannot score the first encoder at all.
    """
    results: list[Result] = []
    for number, encoder in enumerate(encoders):
        for job in jobs:
            try:
                result = job.task.run(encoder, job.data, job.preset, out)
            except UserError as error:
                if number == 0 and len(jobs) == 1:
                    raise
                _record(out, encoder, job, str(error), command)
                tell(f"{job.task.name}: {encoder.record.name}: not run: {error}")
                continue
            tell(line_of(result))
            results.append(result)
    return results


def line_of(result: Result) -> str:
    """A result in one line."""
    parts = [f"{name} {number(metric.value, metric.standard_error)}" for name, metric in result.metrics.items()]
    return f"{result.task}: {result.encoder.name}: {', '.join(parts[:3])} (n = {result.primary[1].n})"


def number(value: float | None, error: float | None = None) -> str:
    """A metric with its standard error, or a dash."""
    if value is None:
        return "—"
    return f"{value:.3f}" + (f" ± {error:.3f}" if error is not None else "")


def comparisons(results: Sequence[Result], first: str) -> list[str]:
    """A line for each baseline that a paired comparison cannot place below the encoder of digest ``first``."""
    lines = []
    for ours in (r for r in results if r.encoder.sha256 == first):
        for other in results:
            if other.task != ours.task or other.encoder.sha256 == first:
                continue
            text = comparison_line(other, ours)
            if text:
                lines.append(text)
    return lines


def comparison_line(baseline: Result, ours: Result) -> str | None:
    """The paired comparison of two results in words; None without common items."""
    metric = paired_metric(ours)
    found = compare(baseline, ours, metric) if metric else None
    if found is None:
        return None
    verdict = "no difference decided"
    if found.decided:
        verdict = "beats" if found.difference > 0 else "does NOT beat, and is worse than,"
    interval = f"{found.difference:+.3f} [{found.low:+.3f}, {found.high:+.3f}], n = {found.n}"
    if not found.decided:
        return f"{ours.task}: {ours.encoder.name} and {baseline.encoder.name}: {verdict}: {interval}"
    return f"{ours.task}: {ours.encoder.name} {verdict} {baseline.encoder.name}: {interval}"


def paired_metric(result: Result) -> str | None:
    """The first metric of which the result has items or resamples."""
    names = {name for scores in result.items.values() for name in scores} | set(result.resamples)
    return next((name for name in result.metrics if name in names), None)


def _record(out: Path, encoder: Encoder, job: Job, why: str, command: str) -> None:
    if rank_and_size()[0] == 0:
        folder = out / folder_name(encoder.record)
        folder.mkdir(parents=True, exist_ok=True)
        record = {"schema": NOT_RUN, "task": job.task.name, "preset": job.preset.name, "why": why, "command": command}
        record["encoder"] = encoder.record.name
        with atomic_write(folder / f"{job.task.name}.not-run.json") as partial:
            partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def not_run(folder: Path) -> list[Mapping[str, Any]]:
    """The records of tasks not run under a folder."""
    found: list[Mapping[str, Any]] = []
    for path in sorted(folder.rglob("*.not-run.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(record, dict) and record.get("schema") == NOT_RUN:
            found.append(record)
    return found
