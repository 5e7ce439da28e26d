"""The training loop, in the order in which it runs; what one step does is in step.py.

A run lives in ``runs/NAME``: config.yaml, metrics.jsonl, evaluations.jsonl, attention/, tensorboard/, checkpoints/,
summary.json.
Killed at any moment it continues from its newest checkpoint with ``--resume`` as if nothing had happened, bit for bit
on the CPU.
"""

import gc
import json
import os
import platform
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from vito_fast import __version__, monitor
from vito_fast.checkpoint import Checkpoint, Checkpointer, path_of, read_newest
from vito_fast.config import Config, method_differences, save_config, to_mapping
from vito_fast.data.loader import ClipLoader
from vito_fast.distributed import World, any_rank, join, leave
from vito_fast.errors import UserError
from vito_fast.export import config_of
from vito_fast.metrics import Clock, Progress, Recorder, pairs_at_peak
from vito_fast.profiling import Profile, part
from vito_fast.step import Trainer


class TrainingFailed(Exception):
    """The run cannot go on (not the user's mistake): one line that says why and where the evidence is."""

    one_line = True


def train(
    config: Config, *, resume: bool = False, max_steps: int | None = None, profile: bool = False
) -> dict[str, Any]:
    """Runs the configuration to its end (or ``max_steps``) and returns the summary that it also prints and saves.

    ``resume`` continues the run of this name from its newest whole checkpoint, or starts it if there is none.
    ``profile`` traces a few steps of the main process into the run's folder (profiling.py).
    UserError for what the user can mend; TrainingFailed if the loss stays non-finite.
    """
    world = join(config.train.device)
    try:
        return _train(config, world, resume, max_steps, profile)
    finally:
        leave()


def _train(config: Config, world: World, resume: bool, max_steps: int | None, profile: bool) -> dict[str, Any]:
    if config.train.cuda_graphs and (world.size > 1 or world.device.type == "cpu"):
        where = "the CPU" if world.device.type == "cpu" else f"{world.size} GPUs, whose collectives would be captured"
        raise UserError(f"train.cuda_graphs is for one GPU, and this run is on {where}")
    run = Path(config.train.runs) / config.name
    loader = make_loader(config, world)
    trainer = Trainer(config, world, len(loader))
    checkpoint = _open_run(run, config, resume, world)
    if checkpoint is not None:
        _check_same_run(checkpoint, config, loader)
        trainer.load(checkpoint)
    loader.load_state_dict({"step": trainer.step_count})
    start, total = trainer.step_count, trainer.schedule.total_steps
    last = total if max_steps is None else min(total, max_steps)
    if world.main and start:
        print(f"{run} {'goes on after' if start < last else 'is finished at'} step {start} of {total}", flush=True)

    recorder = Recorder(run, start, config) if world.main else None
    saver = Checkpointer(run / "checkpoints", config.train.keep_last, config.train.keep_every) if world.main else None
    frames = monitor.draw(config, len(loader.store)) if world.main else None
    backbone = trainer.model.online.backbone
    if checkpoint is not None:
        baselines = checkpoint.state["baselines"]
    else:
        baselines = monitor.baselines(backbone, frames, config, world.device) if frames else {}
        if recorder:
            recorder.evaluation({"step": 0, **baselines})

    def save() -> None:
        if saver and recorder:
            recorder.sync()
            tensors, state = trainer.state()
            saver.save(trainer.step_count, tensors, state | _origin(config, world, loader, baselines))

    def evaluate() -> None:
        if recorder and frames:
            step = trainer.step_count
            recorder.evaluation({"step": step} | monitor.evaluate(backbone, frames, config, world.device))
            monitor.picture(trainer.model.online, frames, run / "attention" / f"step-{step:08d}.png")

    stop = StopSignal()
    clock = Clock(world.device, pairs_at_peak(config, world) if recorder else None)
    alarm, progress = monitor.CollapseAlarm(config.train, world.size), Progress(last, start, world.main)
    batches = _endless(loader)
    tracer = Profile(run / "profile", world.device) if profile and world.main else None
    gc.collect()
    gc.disable()  # collected on logged steps instead, on all ranks at once
    try:
        for step in range(start + 1, last + 1):
            asked = time.perf_counter()
            with part("data"):
                batch = next(batches)
            waited = time.perf_counter() - asked

            logged = step % config.train.log_every == 0 or step in (1, total)
            row = trainer.step(batch["views"], batch["video"].to(world.device), measure=logged)
            clock.count(config.train.batch_size, waited)

            if logged:
                row = {"step": step, "epoch": step / len(loader)} | row | clock.timings(loader.stats.failures)
                if recorder:
                    recorder.log(row | alarm(row))
                gc.collect(1)
                if row["skipped_in_a_row"] >= config.train.max_bad_steps:
                    save()
                    raise TrainingFailed(_evidence(run, row, batch))
            if tracer:
                tracer.step(step)
            progress.update(step, row if logged else None)

            stopping = (logged or world.size == 1) and any_rank(stop.received is not None, world.device)
            due = config.train.evaluate_every and step % config.train.evaluate_every == 0 and step != last
            if due and recorder:
                with clock.paused():
                    evaluate()
            if step % config.train.checkpoint_every == 0 or step == last or stopping:
                save()
            if stopping:
                break
    finally:
        gc.enable()
        progress.close()
        if tracer:
            tracer.close()
        if saver:
            saver.close()
        stop.restore()

    summary: dict[str, Any] = {}
    if recorder and frames:
        evaluated = [row["step"] for row in recorder.evaluations.rows]
        if trainer.step_count >= last and trainer.step_count not in evaluated:
            evaluate()
        summary = _summary(run, trainer.step_count, total, recorder, baselines, clock.rate)
        recorder.close()
        _print_summary(summary, stop.received)
    if tracer:
        print(tracer.line(), flush=True)
    return summary | {"signal": stop.received}


def make_loader(config: Config, world: World) -> ClipLoader:
    """This rank's loader. UserError if the store is unusable or the batch cannot be shared out evenly."""
    c = config.train
    if c.batch_size % (world.size * c.micro_batches):
        raise UserError(
            f"train.batch_size {c.batch_size} does not divide among {world.size} processes "
            f"x {c.micro_batches} micro-batches"
        )
    threads = config.data.threads or max(1, len(os.sched_getaffinity(0)) // world.local_size)
    return ClipLoader(
        config.data.store,
        c.batch_size // world.size,
        seed=config.seed,
        rank=world.rank,
        world_size=world.size,
        sampler=config.sampler,
        device=world.device.type,
        dtype=torch.bfloat16 if c.dtype == "bfloat16" else torch.float32,
        threads=threads,
        prefetch=config.data.prefetch,
        max_bad_share=config.data.max_bad_share,
    )


def _endless(loader: ClipLoader) -> Iterator[dict[str, Any]]:
    """Batches of this epoch from the loader's position, then of the next ones. TrainingFailed if the data gives out."""
    try:
        while True:
            yield from loader
    except RuntimeError as error:
        raise TrainingFailed(f"the data gave out: {error}") from None


def _open_run(run: Path, config: Config, resume: bool, world: World) -> Checkpoint | None:
    """Makes the run's folder, or finds where to continue. All ranks read; only the main one writes."""
    found = read_newest(run / "checkpoints", lambda message: print(f"warning: {message}", flush=True))
    if found is not None and not resume:
        raise UserError(f"{run} already holds a run: continue it with --resume, or give this one another --name")
    if world.main:
        try:
            run.mkdir(parents=True, exist_ok=True)
            save_config(config, run / "config.yaml")
        except OSError as error:
            raise UserError(f"cannot write the run's folder {run}: {error.strerror}") from None
    return found


def _check_same_run(checkpoint: Checkpoint, config: Config, loader: ClipLoader) -> None:
    if different := method_differences(config_of(checkpoint), config):
        raise UserError(f"{checkpoint.path} was made with other values of {', '.join(different)}: resume with the same")
    if checkpoint.state["clips"] != len(loader.store):
        raise UserError(
            f"{checkpoint.path} was made on {checkpoint.state['clips']} clips, "
            f"the store {config.data.store} has {len(loader.store)}"
        )


def _origin(config: Config, world: World, loader: ClipLoader, baselines: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint tells beside the state: configuration, data position, versions."""
    try:
        command, here = ["git", "rev-parse", "HEAD"], Path(__file__).parent
        git = subprocess.run(command, cwd=here, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        git = None
    versions = {"vito_fast": __version__, "torch": torch.__version__, "python": platform.python_version(), "git": git}
    return {
        "config": to_mapping(config),
        "loader": loader.state_dict(),
        "clips": len(loader.store),
        "ranks": world.size,
        "baselines": baselines,
        "versions": versions,
    }


def _evidence(run: Path, row: dict[str, Any], batch: dict[str, Any]) -> str:
    """Saves what reproduces a non-finite step, and says so in one line."""
    path = run / "non_finite.json"
    evidence = {"row": {k: str(v) for k, v in row.items()}}
    evidence |= {name: batch[name].tolist() for name in ("sample", "clip")}
    path.write_text(json.dumps(evidence), encoding="utf-8")
    count = row["skipped_in_a_row"]
    return f"{count} steps in a row had a non-finite loss or gradient: see {path} and the last checkpoint"


def _summary(
    run: Path, step: int, total: int, recorder: Recorder, baselines: dict[str, Any], rate: float
) -> dict[str, Any]:
    """The run's outcome, also written to summary.json."""
    rows = recorder.metrics.rows
    evaluation = recorder.evaluations.rows[-1] if recorder.evaluations.rows else {}
    summary = {
        "checkpoint": str(path_of(run / "checkpoints", step)),
        "step": step,
        "steps": total,
        "first_loss": rows[0]["loss"] if rows else None,
        "last_loss": rows[-1]["loss"] if rows else None,
        "log_negatives_plus_1": rows[-1]["chance"] if rows else None,
        "pairs_per_s": rate or (rows[-1]["pairs_per_s"] if rows else 0.0),
        "retrieval": {"trained": evaluation.get("retrieval"), **baselines},
    }
    (run / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return summary


def _print_summary(summary: dict[str, Any], stopped_by: str | None) -> None:
    scores = summary["retrieval"]
    if stopped_by:
        print(f"stopped by {stopped_by} after step {summary['step']} of {summary['steps']}; continue with --resume")
    if scores["trained"] is not None:
        print(
            f"retrieval of a clip's other frame among {scores['clips']} clips: trained {scores['trained']:.1%}, "
            f"untrained {scores['untrained']:.1%}, raw pixels {scores['pixels']:.1%}"
        )
    first, last, uniform = (summary[k] for k in ("first_loss", "last_loss", "log_negatives_plus_1"))
    if None not in (first, last, uniform):
        print(f"loss: first {first:.4f}, last {last:.4f}; log(negatives + 1) {uniform:.4f}")
    print(f"speed: {summary['pairs_per_s']:.1f} pairs/s")
    print(f"checkpoint: {summary['checkpoint']}", flush=True)


class StopSignal:
    """Notes SIGTERM, SIGUSR1 and the first SIGINT, so that the loop saves and ends after the step at hand."""

    def __init__(self) -> None:
        self.received: str | None = None
        wanted = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
        self._before = {number: signal.signal(number, self._note) for number in wanted}

    def _note(self, number: int, frame: object) -> None:
        self.received = signal.Signals(number).name
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C means it

    def restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
