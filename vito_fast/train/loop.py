"""The training loop, in the order in which it runs; what one step does is in step.py.

A run lives in ``runs/NAME``: config.yaml, metrics.jsonl, evaluations.jsonl, attention/, tensorboard/, checkpoints/,
summary.json. Killed at any moment it continues from its newest checkpoint with ``--resume`` as if nothing had happened,
bit for bit on the CPU.
"""

import gc
import json
import os
import platform
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vito_fast import __version__
from vito_fast.config import Config, method_differences, save_config, to_mapping
from vito_fast.data.loader.batch import sent
from vito_fast.data.loader.loader import ClipLoader
from vito_fast.errors import UserError
from vito_fast.export import config_of
from vito_fast.files import atomic_write
from vito_fast.train import probe as monitor
from vito_fast.train.checkpoint import Checkpoint, Checkpointer, path_of, read_newest
from vito_fast.train.distributed import World, any_rank, greatest, join, leave, sole_writer, told_by_ranks
from vito_fast.train.metrics import Clock, Progress, Recorder, pairs_at_peak
from vito_fast.train.profiling import Profile, part
from vito_fast.train.trainer import Trainer

ASK_EVERY = 3.0
"""Seconds between the moments at which ranks ask each other whether one was told to end."""


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
    if max_steps is not None and max_steps < 1:
        raise UserError(f"--max-steps must be at least 1, got {max_steps}")
    world = join(config.train.device)
    try:
        with _open(config, world, resume, max_steps) as run:
            summary = _train(run, profile)
    except BaseException:
        leave(failed=True)
        raise
    leave()
    return summary


def _train(run: "_Run", profile: bool) -> dict[str, Any]:
    config, world, trainer, loader = run.config, run.world, run.trainer, run.loader
    start, last = trainer.step_count, run.last
    with StopSignal(world, start) as stop:
        clock = Clock(world.device, pairs_at_peak(config, world) if world.main else None)
        alarm, progress = monitor.CollapseAlarm(config.train, world.size), Progress(last, start, world.main)
        batches = _endless(loader)
        tracer = Profile(run.folder / "profile", world.device) if profile and world.main else None
        gc.collect()
        gc.disable()  # collected on logged steps instead, on all ranks at once
        try:
            for step in range(start + 1, last + 1):
                asked = time.perf_counter()
                with part("data"):
                    batch = next(batches)
                waited = time.perf_counter() - asked

                logged = step % config.train.log_every == 0 or step in (1, trainer.schedule.total_steps)
                row = trainer.step(batch["views"], sent(batch["video"], world.device), measure=logged)
                clock.count(config.train.batch_size, waited)

                if logged:
                    row = {"step": step, "epoch": step / len(loader)} | row | clock.timings(loader.stats.failures)
                    if run.recorder:
                        run.recorder.log(row | alarm(row))
                    gc.collect(1)
                    if row["skipped_in_a_row"] >= config.train.max_bad_steps:  # saves nothing: nothing has changed
                        raise TrainingFailed(_evidence(run.folder, row, batch))
                if tracer:
                    tracer.step(step)
                progress.update(step, row if logged else None)

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
        any_rank(False, world.device)  # one that ended before all is saved might have its launcher end the others
    return summary | {"signal": stop.name}


@dataclass
class _Run:
    """A run in hand. Only the main process has a recorder, a saver and frames; elsewhere the methods do nothing."""

    config: Config
    world: World
    folder: Path
    loader: ClipLoader
    trainer: Trainer
    last: int
    """The step that it ends after."""
    recorder: Recorder | None = None
    saver: Checkpointer | None = None
    frames: monitor.Frames | None = None
    baselines: dict[str, Any] = field(default_factory=dict)
    """Retrieval of the untrained network and of raw pixels."""

    def save(self, if_healthy: bool = False) -> None:
        """Starts writing a checkpoint of the step at hand; ``if_healthy``, not while steps are skipped: however often
        they fail and are tried again, those of before are not crowded out."""
        if self.saver and self.recorder and not (if_healthy and self.trainer.skipped[1]):
            self.recorder.sync()
            tensors, state = self.trainer.state()
            self.saver.save(self.trainer.step_count, tensors, state | self._origin())

    def evaluate(self) -> None:
        """A row of retrieval and an attention picture."""
        if self.recorder and self.frames:
            step, online = self.trainer.step_count, self.trainer.model.online
            scores = monitor.evaluate(online.backbone, self.frames, self.config, self.world.device)
            self.recorder.evaluation({"step": step} | scores)
            monitor.picture(online, self.frames, self.folder / "attention" / f"step-{step:08d}.png")

    def retrieval(self) -> dict[int, float]:
        """What evaluations have found among as many clips as the baselines, by step."""
        rows = self.recorder.evaluations.rows if self.recorder else []
        clips = self.baselines.get("clips")  # rows did not always say
        return {
            row["step"]: row["retrieval"] for row in rows if "retrieval" in row and row.get("clips", clips) == clips
        }

    def finish(self, rate: float, stopped_by: str | None) -> dict[str, Any]:
        """Evaluates the last step unless that is done, and tells the outcome, also in summary.json."""
        if self.recorder is None:
            return {}
        step, total = self.trainer.step_count, self.trainer.schedule.total_steps
        rows = self.recorder.metrics.rows
        if step >= self.last and step not in self.retrieval():
            self.evaluate()
        summary = {
            "checkpoint": str(path_of(self.folder / "checkpoints", step)),
            "step": step,
            "steps": total,
            "first_loss": rows[0]["loss"] if rows else None,
            "last_loss": rows[-1]["loss"] if rows else None,
            "log_negatives_plus_1": rows[-1]["chance"] if rows else None,
            "pairs_per_s": rate or (rows[-1]["pairs_per_s"] if rows else 0.0),
            "retrieval": {"trained": next(reversed(self.retrieval().values()), None), **self.baselines},
        }
        with atomic_write(self.folder / "summary.json") as partial:
            partial.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        self.recorder.close()
        _print_summary(summary, stopped_by)
        return summary

    def _origin(self) -> dict[str, Any]:
        """What a checkpoint tells beside the state: configuration, data position, versions."""
        try:
            command, here = ["git", "rev-parse", "HEAD"], Path(__file__).parent
            git = subprocess.run(command, cwd=here, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            git = None
        python = platform.python_version()
        return {
            "config": to_mapping(self.config),
            "loader": self.loader.state_dict(),
            "clips": len(self.loader.store),
            "store": self.loader.store.identity,
            "ranks": self.world.size,
            "baselines": self.baselines,
            "versions": {"vito_fast": __version__, "torch": torch.__version__, "python": python, "git": git},
        }


@contextmanager
def _open(config: Config, world: World, resume: bool, max_steps: int | None) -> Iterator[_Run]:
    """A new run, evaluated once, or one at its newest whole checkpoint. All ranks read; only the main one writes."""
    if config.train.cuda_graphs and (world.size > 1 or world.device.type == "cpu"):
        where = "the CPU" if world.device.type == "cpu" else f"{world.size} GPUs, whose collectives would be captured"
        raise UserError(f"train.cuda_graphs is for one GPU, and this run is on {where}")
    folder = Path(config.train.runs) / config.name
    loader = make_loader(config, world)
    _check_negatives(config, loader)
    trainer = Trainer(config, world, len(loader))
    with sole_writer(folder, world):
        checkpoint = _open_folder(folder, config, resume, world)
        if checkpoint is not None:
            _check_same_run(checkpoint, config, loader)
        frames = monitor.draw(config, len(loader.store)) if world.main else None
        baselines = {} if checkpoint is None else checkpoint.value("baselines")
        if frames and baselines.get("clips") != frames.clips:  # of a new run, or one that asks for other clips now
            baselines = monitor.baselines(trainer.model.online.backbone, frames, config, world.device)
        if checkpoint is not None:
            trainer.load(checkpoint)
        start, total = trainer.step_count, trainer.schedule.total_steps
        loader.load_state_dict({"step": start})
        last = total if max_steps is None else min(total, max_steps)
        run = _Run(config, world, folder, loader, trainer, last, frames=frames, baselines=baselines)
        if world.main:
            if start:
                how = "goes on after" if start < last else "is finished at"
                print(f"{folder} {how} step {start} of {total}", flush=True)
            run.recorder = Recorder(folder, start, config)
            run.saver = Checkpointer(folder / "checkpoints", config.train.keep_last, config.train.keep_every, start)
            if checkpoint is None:
                run.recorder.evaluation({"step": 0, **baselines})
        yield run


def make_loader(config: Config, world: World) -> ClipLoader:
    """This rank's loader. UserError if the store is unusable or the batch cannot be shared out evenly."""
    clips = config.train.clips(world.size)
    threads = config.data.threads or max(1, len(os.sched_getaffinity(0)) // world.local_size)
    return ClipLoader(
        config.data.store,
        clips,
        seed=config.seed,
        rank=world.rank,
        world_size=world.size,
        sampler=config.sampler,
        device=world.device,
        dtype=torch.bfloat16 if config.train.dtype == "bfloat16" else torch.float32,
        threads=threads,
        prefetch=config.data.prefetch,
        max_bad_share=config.data.max_bad_share,
    )


def _check_negatives(config: Config, loader: ClipLoader) -> None:
    """UserError where no clip has a negative: with nothing to tell apart the loss is 0 from the start."""
    index = loader.store.index
    first, last = index.clip(0), index.clip(index.num_clips - 1)  # videos are numbered in the clips' order
    if config.loss.kind == "contrastive" and first.video == last.video:
        raise UserError(
            f"all {index.num_clips} clips of {config.data.store} are of one video, {first.source}, and the contrastive "
            "loss takes negatives from other videos: pack more videos, or train with --loss.kind byol, which needs none"
        )


def _endless(loader: ClipLoader) -> Iterator[dict[str, Any]]:
    """Batches of this epoch from the loader's position, then of the next ones. TrainingFailed if the data gives out."""
    try:
        while True:
            yield from loader
    except RuntimeError as error:
        raise TrainingFailed(f"the data gave out: {error}") from None


def _open_folder(run: Path, config: Config, resume: bool, world: World) -> Checkpoint | None:
    """Begins the run's folder, or finds where to continue. UserError, on all ranks, if what is there must not be
    written over, or if they do not all find the same: a rank that went on from another file would never notice."""
    found: Checkpoint | None = None
    problem = ""
    try:
        found = read_newest(run / "checkpoints")
    except UserError as error:
        problem = f"{error}: move {run} away, give another --name, or take the program that wrote it"
    except OSError as error:
        problem = f"{error.filename or run} cannot be read: {error.strerror or error}; start again when it can"
    told = told_by_ranks(problem or (f"{found.path.name} ({found.sha256[:12]})" if found else "no checkpoint"))
    if len(set(told)) > 1:
        each = ", ".join(f"rank {rank}: {what}" for rank, what in enumerate(told))
        raise UserError(f"the ranks do not find the same in {run}: start again when all see the same files ({each})")
    if problem:
        raise UserError(problem)
    if found is not None and not resume:
        raise UserError(f"{run} already holds a run: continue it with --resume, or give this one another --name")
    if world.main:
        save_config(config, run / "config.yaml")
    return found


def _check_same_run(checkpoint: Checkpoint, config: Config, loader: ClipLoader) -> None:
    if different := method_differences(config_of(checkpoint), config):
        raise UserError(f"{checkpoint.path} was made with other values of {', '.join(different)}: resume with the same")
    if (clips := checkpoint.value("clips")) != len(loader.store):
        raise UserError(
            f"{checkpoint.path} was made on {clips} clips, the store {config.data.store} has {len(loader.store)}"
        )
    was, now = checkpoint.state.get("store", {}), loader.store.identity  # checkpoints did not always say
    if different := [name for name, value in was.items() if value != now.get(name)]:
        raise UserError(
            f"{checkpoint.path} was made on another store than {config.data.store}, packed with other "
            f"{', '.join(different)}: resume on the same"
        )


def _evidence(run: Path, row: dict[str, Any], batch: dict[str, Any]) -> str:
    """Saves what reproduces a non-finite step, and says so in one line."""
    path = run / "non_finite.json"
    evidence = {"row": {k: str(v) for k, v in row.items()}}
    evidence |= {name: batch[name].tolist() for name in ("sample", "clip")}
    path.write_text(json.dumps(evidence), encoding="utf-8")
    count = row["skipped_in_a_row"]
    return f"{count} steps in a row had a non-finite loss or gradient: see {path}; the checkpoints are of before"


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
    """Inside, notes SIGTERM, SIGUSR1 and the first SIGINT, so that the loop saves and ends after the step at hand, all
    ranks after the same one, whichever of them was told.

    To ask the others is to wait for the device. Ranks ask after steps that wait anyway, and ``ASK_EVERY`` seconds after
    they last did, by as many steps as they agreed on then: launchers kill half a minute after SIGTERM.
    """

    name: str | None = None
    """The signal that all ranks end for."""

    def __init__(self, world: World, step: int) -> None:
        self.world, self._received = world, 0
        self._asked, self._next, self._time = step, step + 1, time.monotonic()

    def __enter__(self) -> "StopSignal":
        wanted = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
        self._before = {number: signal.signal(number, self._note) for number in wanted}
        return self

    def _note(self, number: int, frame: object) -> None:
        self._received = number
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C means it

    def agreed(self, step: int, at_once: bool) -> bool:
        """After each step: whether to end. ``at_once`` asks, as ``step`` may do by itself; alike on all ranks."""
        if at_once or step >= self._next or self.world.size == 1:
            now = time.monotonic()
            a_step = (now - self._time) / max(1, step - self._asked)
            received, a_step = greatest([self._received, a_step], self.world.device)
            self.name = signal.Signals(int(received)).name if received else None
            self._asked, self._next, self._time = step, step + max(1, int(ASK_EVERY / max(a_step, 1e-6))), now
        return self.name is not None

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
