"""The training loop, in the order in which it runs.

trainer.py has one step; run.py has the run's folder, from which a killed run continues bit for bit on the CPU.
"""

import gc
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vito_fast.config import Config
from vito_fast.config_files import with_changes
from vito_fast.data.loader.batch import to_device
from vito_fast.data.loader.loader import ClipLoader
from vito_fast.errors import UserError
from vito_fast.train import profiling
from vito_fast.train.distributed import any_rank, init_distributed, shutdown
from vito_fast.train.metrics import Clock, Progress, SkipAlarm, warnings_of
from vito_fast.train.probe import CollapseAlarm
from vito_fast.train.run import Callback, Run, open_run
from vito_fast.train.stop import StopSignal


class TrainingFailed(Exception):
    """The run cannot continue, and not for a mistake of the user: one line with the reason and the evidence."""

    one_line = True


def train(
    config: Config,
    *,
    resume: bool = False,
    resume_with: Sequence[str] = (),
    max_steps: int | None = None,
    profile: bool = False,
    clips_at_peak: float | None = None,
    callbacks: Sequence[Callback] = (),
) -> dict[str, Any]:
    """Runs the configuration to its end.

    Args:
        config: The run.
        resume: Continue the run of this name from its newest whole checkpoint, or start it if there is none.
        resume_with: ``section.field=value`` of optimizer, schedule or train.micro_batches that the run takes from here
            on; the checkpoint records them. Implies ``resume``.
        max_steps: Stop after this many steps; the schedules stay those of the whole run.
        profile: Trace a few steps of the main process into the run's folder (profiling.py).
        clips_at_peak: Clips a second at an MFU of 1, for the metrics; without it MFU is null.
        callbacks: Hooks for steps, evaluations and checkpoints.

    Returns:
        The summary, which is also printed and saved; empty on other ranks than the first.

    Raises:
        UserError: a mistake that the user can fix.
        TrainingFailed: the loss stays non-finite, or the data ends.
    """
    if max_steps is not None and max_steps < 1:
        raise UserError(f"--max-steps must be at least 1, got {max_steps}")
    config = with_changes(config, resume_with)
    world = init_distributed(config.train.device, config.train.timeout)
    try:
        with open_run(config, world, resume or bool(resume_with), max_steps, resume_with) as run:
            run.callbacks = callbacks
            summary = _train(run, profile, clips_at_peak)
    except BaseException:
        shutdown(failed=True)
        raise
    shutdown()
    return summary


def _train(run: Run, profile: bool, clips_at_peak: float | None) -> dict[str, Any]:
    config, world, trainer, loader = run.config, run.world, run.trainer, run.loader
    start, last = trainer.step_count, run.last
    with StopSignal(world, start) as stop:
        if world.main and start < last:
            print(run.opening_line(), flush=True)
            for line in warnings_of(config, world):
                print(line, flush=True)
        clock = Clock(world.device, clips_at_peak)
        alarm, progress = CollapseAlarm(config.train, world.size), Progress(last, start, world.main)
        skips = SkipAlarm(world)
        batches = _endless(loader)
        tracer = profiling.Profile(run.folder / "profile", world.device) if profile and world.main else None
        gc.collect()
        gc.disable()  # collected on logged steps instead, on all ranks at once
        try:
            for step in range(start + 1, last + 1):
                asked = time.perf_counter()
                with profiling.range("data"):
                    batch = next(batches)
                waited = time.perf_counter() - asked

                logged = step % config.train.log_every == 0 or step in (1, last)
                row = trainer.step(batch["views"], to_device(batch["video"], world.device), measure=logged)
                clock.count(config.train.batch_size, waited)
                skips(step, trainer.skipped)
                if step == start + 1 and config.train.compile and world.main:
                    print(f"compiled: the first step took {time.perf_counter() - asked:.0f} s", flush=True)

                if logged:
                    row = (
                        {"step": step, "epoch": step / trainer.schedule.steps_per_epoch}
                        | row
                        | clock.timings(loader.stats.failures)
                    )
                    if run.recorder:
                        run.recorder.log(row | alarm(row))
                    gc.collect(1)
                    if row["skipped_in_a_row"] >= config.train.max_bad_steps:  # nothing has changed since the last save
                        raise TrainingFailed(_evidence(run.folder, row, batch))
                if tracer:
                    tracer.step(step)
                progress.update(step, row if logged else None)
                for callback in run.callbacks:
                    callback.step_end(run, step, row if logged else None)

                stopping = stop.agreed(step, at_once=logged or step == last)
                due = config.train.evaluate_every and step % config.train.evaluate_every == 0 and step != last
                if due and world.main:
                    with clock.paused():
                        run.evaluate()
                if step == last or stopping:
                    run.save()
                elif step % config.train.checkpoint_every == 0:
                    run.save(if_healthy=True)
                if stopping:
                    break
        finally:
            gc.enable()
            progress.close()
            if tracer:
                tracer.close()
            if run.saver:
                run.saver.close()

        summary = run.finish(clock.rate, stop.name)
        if tracer:
            print(tracer.line(), flush=True)
        any_rank(False, world.device)  # a rank that ends before all is saved might have its launcher end the others
    return summary | {"signal": stop.name}


def _endless(loader: ClipLoader) -> Iterator[dict[str, Any]]:
    """Batches from the loader's position on, epoch after epoch. TrainingFailed if the data ends."""
    try:
        while True:
            yield from loader
    except RuntimeError as error:
        raise TrainingFailed(f"the data gave out: {error}") from None


def _evidence(folder: Path, row: dict[str, Any], batch: dict[str, Any]) -> str:
    """Saves the inputs that reproduce a non-finite step; returns one line that names them."""
    path = folder / "non_finite.json"
    evidence = {"row": {k: str(v) for k, v in row.items()}}
    evidence |= {name: batch[name].tolist() for name in ("sample", "clip")}
    path.write_text(json.dumps(evidence), encoding="utf-8")
    count = row["skipped_in_a_row"]
    return f"{count} steps in a row had a non-finite loss or gradient: see {path}; the checkpoints are of before"
