"""A run's folder: opened, saved, evaluated and summarized.

``runs/NAME`` holds config.yaml, metrics.jsonl, evaluations.jsonl, attention/, tensorboard/, checkpoints/ and
summary.json. All ranks read it; only the main one writes.
"""

import json
import platform
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vito_fast import __version__
from vito_fast.config import ClipFilter, Config
from vito_fast.config_files import changeable, method_differences, save_config, to_mapping
from vito_fast.data.loader.loader import ClipLoader
from vito_fast.errors import UserError
from vito_fast.files import atomic_write
from vito_fast.machine import usable_cores
from vito_fast.train import holdout, probe
from vito_fast.train.checkpoint import Checkpoint, Checkpointer, config_of, path_of, read_newest
from vito_fast.train.distributed import World, all_gather_str, sole_writer
from vito_fast.train.initial import initialize
from vito_fast.train.loggers import going_on
from vito_fast.train.metrics import Recorder
from vito_fast.train.trainer import Trainer


class Callback:
    """Hooks of a run, ``train(config, callbacks=[...])``: override what you need.

    An exception ends the run, as any error of your own would; checkpoints stay.

    Attributes of ``run`` are ``config``, ``folder``, ``world``, ``loader`` and ``trainer``, whose ``model.online`` is
    the network. Reading a tensor's value makes the host wait for the GPU.
    """

    def step_end(self, run: "Run", step: int, row: dict[str, Any] | None) -> None:
        """After each step, on every rank.

        Args:
            run: The run.
            step: The step, from 1.
            row: The step's row of metrics.jsonl where one is logged.
        """

    def evaluation(self, run: "Run", step: int, scores: dict[str, Any]) -> None:
        """After each evaluation, on the main rank, with its row of evaluations.jsonl."""

    def checkpoint(self, run: "Run", step: int, path: Path) -> None:
        """When a checkpoint begins to be written, on the main rank. ``path`` appears when it is whole."""


@dataclass
class Run:
    """An open run. Only the main process has a recorder, a saver and frames; elsewhere the methods do nothing."""

    config: Config
    world: World
    folder: Path
    loader: ClipLoader
    trainer: Trainer
    last: int
    """The step that it ends after."""
    recorder: Recorder | None = None
    saver: Checkpointer | None = None
    frames: probe.Frames | None = None
    held_out: holdout.Holdout | None = None
    changes: list[dict[str, Any]] = field(default_factory=list)
    """Fields that the run took when it resumed (``--resume-with``), with the step that they hold after."""
    callbacks: Sequence[Callback] = ()
    baselines: dict[str, Any] = field(default_factory=dict)
    """Retrieval of the untrained network and of raw pixels; ``holdout``: those of the held-out clips."""

    def save(self, if_healthy: bool = False) -> None:
        """Starts to write a checkpoint of the current step.

        Args:
            if_healthy: Do nothing while steps are skipped, so that repeated failures do not displace older checkpoints.
        """
        if self.saver and self.recorder and not (if_healthy and self.trainer.skipped[1]):
            self.recorder.sync()
            tensors, state = self.trainer.state()
            path = self.saver.save(self.trainer.step_count, tensors, state | self._origin())
            for callback in self.callbacks:
                callback.checkpoint(self, self.trainer.step_count, path)

    def evaluate(self) -> None:
        """Records a row of retrieval and of the held-out clips, and an attention picture. A part that fails is left
        out with a warning."""
        if self.recorder is None:
            return
        step, online, device = self.trainer.step_count, self.trainer.model.online, self.world.device
        training = online.training
        scores: dict[str, Any] = {}
        if self.frames:
            with going_on(f"retrieval at step {step}"):
                scores |= probe.evaluate(online.backbone, self.frames, self.config, device)
        if self.held_out:
            with going_on(f"held-out evaluation at step {step}"):
                scores["holdout"] = holdout.evaluate(online, self.held_out, self.config, device)
        if scores:
            self.recorder.evaluation({"step": step} | scores)
            for callback in self.callbacks:
                callback.evaluation(self, step, {"step": step} | scores)
        if self.frames:
            with going_on(f"attention picture at step {step}"):
                probe.picture(online, self.frames, self.folder / "attention" / f"step-{step:08d}.png")
        online.train(training)

    def opening_line(self) -> str:
        """The run in a line: data, steps, learning rate and place."""
        config, world, schedule = self.config, self.world, self.trainer.schedule
        size, device, steps = config.train.batch_size, "the CPU", self.last - self.trainer.step_count
        if world.device.type == "cuda":
            device = torch.cuda.get_device_name(world.device)
        place = device if world.size == 1 else f"{world.size} ranks, {size // world.size} each, on {device}"
        stores = f" in {len(self.loader.stores)} stores" if config.data.mix else ""
        compiled = "; the first step compiles, which takes minutes" if config.train.compile else ""
        return (
            f"{self.folder}: {self.loader.num_clips} clips{stores}, {steps} steps of {size} on {place}; learning rate "
            f"{schedule.peak:.3g} after {schedule.warmup_steps} steps of warm-up{compiled}"
        )

    def retrieval(self) -> dict[int, float]:
        """Retrieval by step, of the evaluations with as many clips as the baselines."""
        rows = self.recorder.evaluations.rows if self.recorder else []
        clips = self.baselines.get("clips")  # older rows may lack it
        return {
            row["step"]: row["retrieval"] for row in rows if "retrieval" in row and row.get("clips", clips) == clips
        }

    def finish(self, rate: float, stopped_by: str | None) -> dict[str, Any]:
        """Evaluates the last step once, then prints the outcome and writes summary.json.

        Args:
            rate: Clips a second of this process's logged steps.
            stopped_by: Name of the signal that ended the run early.
        """
        if self.recorder is None:
            return {}
        step, total = self.trainer.step_count, self.trainer.schedule.total_steps
        rows = self.recorder.metrics.rows
        if step >= self.last and (self.frames or self.held_out) and step not in self.retrieval():
            self.evaluate()
        summary = {
            "checkpoint": str(path_of(self.folder / "checkpoints", step)),
            "step": step,
            "steps": total,
            "first_loss": rows[0]["loss"] if rows else None,
            "last_loss": rows[-1]["loss"] if rows else None,
            "log_negatives_plus_1": rows[-1]["chance"] if rows else None,
            "pairs_per_s": rate or (rows[-1]["pairs_per_s"] if rows else 0.0),
            "retrieval": {
                "trained": next(reversed(self.retrieval().values()), None),
                **{name: value for name, value in self.baselines.items() if name != "holdout"},
            },
        }
        if self.held_out and "holdout" in self.baselines:
            scores = [row["holdout"] for row in self.recorder.evaluations.rows if row["step"] and "holdout" in row]
            summary["holdout"] = {"trained": scores[-1] if scores else None, **self.baselines["holdout"]}
        with atomic_write(self.folder / "summary.json") as partial:
            partial.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        self.recorder.close()
        _print_summary(summary, stopped_by)
        return summary

    def _origin(self) -> dict[str, Any]:
        """A checkpoint's record of its making: configuration, data position, versions."""
        try:
            command, here = ["git", "rev-parse", "HEAD"], Path(__file__).parent
            git = subprocess.run(command, cwd=here, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            git = None
        python = platform.python_version()
        return {
            "config": to_mapping(self.config),
            "loader": self.loader.state_dict(),
            "clips": self.loader.num_clips,
            "store": self.loader.store.identity,
            "ranks": self.world.size,
            "baselines": self.baselines,
            "changes": self.changes,
            "versions": {"vito_fast": __version__, "torch": torch.__version__, "python": python, "git": git},
        }


@contextmanager
def open_run(
    config: Config, world: World, resume: bool, max_steps: int | None, resume_with: Sequence[str] = ()
) -> Iterator[Run]:
    """Opens a new run, evaluated once, or one at its newest whole checkpoint.

    Args:
        config: The run, with the fields of ``resume_with``.
        world: This process's place.
        resume: Whether a run of this name continues.
        max_steps: Its last step, if that is before the schedule's end.
        resume_with: ``section.field=value`` that may differ from the checkpoint's.

    Raises:
        UserError: a folder, store or configuration that cannot be used, or a checkpoint of another run.
    """
    if config.train.cuda_graphs and (world.size > 1 or world.device.type == "cpu"):
        where = "the CPU" if world.device.type == "cpu" else f"{world.size} GPUs, whose collectives would be captured"
        raise UserError(f"train.cuda_graphs is for one GPU, and this run is on {where}")
    folder = Path(config.train.runs) / config.name
    loader = make_loader(config, world)
    _check_negatives(config, loader)
    trainer = Trainer(config, world, config.steps_per_epoch(loader.num_clips))
    with sole_writer(folder, world):
        checkpoint = _open_folder(folder, resume)
        changes: list[dict[str, Any]] = []
        if checkpoint is not None:
            changes = _check_same_run(checkpoint, config, loader, [c.partition("=")[0] for c in resume_with])
        elif config.model.init:
            told = initialize(trainer.model, config.model.init)
            if world.main:
                print(f"{folder} {told}", flush=True)
        if world.main:
            save_config(config, folder / "config.yaml")  # of a run that was not refused
        baselines = {} if checkpoint is None else checkpoint.value("baselines")
        online, frames, held_out = trainer.model.online, None, None
        if world.main:
            with going_on("retrieval"):
                frames = probe.draw(config, len(loader.chosen[0]))
            if frames and (baselines.get("clips") != frames.clips or "histogram" not in baselines):
                with going_on("baselines of retrieval"):  # of a new run, or of other clips
                    baselines |= probe.baselines(online.backbone, frames, config, world.device)
            if (data := config.data).holdout:
                held_out = holdout.read(data.holdout, config.sampler.size, cache=data.cache, cache_gib=data.cache_gib)
            if held_out and "holdout" not in baselines:
                with going_on("baselines of the held-out clips"):
                    baselines["holdout"] = holdout.baselines(online, held_out, config, world.device)
        if checkpoint is not None:
            trainer.load(checkpoint)
        start, total = trainer.step_count, trainer.schedule.total_steps
        loader.seek(start)
        last = total if max_steps is None else min(total, max_steps)
        run = Run(
            config, world, folder, loader, trainer, last, None, None, frames, held_out, changes, baselines=baselines
        )
        if world.main:
            if start:
                how = "continues after" if start < last else "is finished at"
                print(f"{folder} {how} step {start} of {total}", flush=True)
            for change in changes[-1:] if changes and changes[-1]["step"] == start else ():
                print(_told(change), flush=True)
            run.recorder = Recorder(folder, start, config)
            run.saver = Checkpointer(folder / "checkpoints", config.train.keep_last, config.train.keep_every, start)
            if checkpoint is None:
                run.recorder.evaluation({"step": 0, **baselines})
        yield run


def make_loader(config: Config, world: World) -> ClipLoader:
    """This rank's loader. UserError if the store is unusable or the batch does not divide among the ranks."""
    clips = config.train.clips(world.size)
    threads = config.data.threads or max(1, usable_cores() // world.local_size)
    return ClipLoader(
        config.data.weights if config.data.mix else config.data.store,
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
        labels=False,
        where=ClipFilter.parse(config.data.where),
        cache=config.data.cache,
        cache_gib=config.data.cache_gib,
    )


def _check_negatives(config: Config, loader: ClipLoader) -> None:
    """UserError where no clip has a negative: the loss would be 0 from the start."""
    chosen = loader.chosen[0]
    first, last = (loader.store.index.clip(int(clip)) for clip in chosen[[0, -1]])  # videos are numbered in their order
    if config.loss.name == "contrastive" and first.video == last.video and not config.data.mix:
        raise UserError(
            f"all {len(chosen)} clips of {config.data.store} are of one video, {first.source}, and the contrastive "
            "loss takes negatives from other videos: pack more videos, or train with --loss.name byol, which needs none"
        )


def _open_folder(folder: Path, resume: bool) -> Checkpoint | None:
    """The newest checkpoint of a run's folder, if there is one.

    Raises:
        UserError: on all ranks, if the folder must not be overwritten, or if the ranks find different checkpoints. A
            rank that continued from another file would never notice.
    """
    found: Checkpoint | None = None
    problem = ""
    try:
        found = read_newest(folder / "checkpoints")
    except UserError as error:
        problem = f"{error}: move {folder} away, give another --name, or take the program that wrote it"
    except OSError as error:
        problem = f"{error.filename or folder} cannot be read: {error.strerror or error}; start again when it can"
    by_rank = all_gather_str(problem or (f"{found.path.name} ({found.sha256[:12]})" if found else "no checkpoint"))
    if len(set(by_rank)) > 1:
        each = ", ".join(f"rank {rank}: {what}" for rank, what in enumerate(by_rank))
        raise UserError(f"the ranks do not find the same in {folder}: start again when all see the same files ({each})")
    if problem:
        raise UserError(problem)
    if found is not None and not resume:
        raise UserError(f"{folder} already holds a run: continue it with --resume, or give this one another --name")
    return found


def _told(change: dict[str, Any]) -> str:
    """A change in words, and its meaning."""
    step = change["step"]
    values = ", ".join(f"{name} {new} (was {old})" for name, (old, new) in change["fields"].items())
    meaning = f"steps 1 to {step} are those of the old values, so this is not a run of the new ones from the start"
    if set(change["fields"]) == {"train.micro_batches"}:
        meaning = "up to rounding the same run, but for batch norm, whose statistics are of a micro-batch"
    return f"changed after step {step}: {values}; {meaning}"


def _check_same_run(
    checkpoint: Checkpoint, config: Config, loader: ClipLoader, named: Sequence[str]
) -> list[dict[str, Any]]:
    """All changes of the run so far, with that of now. UserError for differences that ``named`` does not name."""
    before = config_of(checkpoint)
    different = method_differences(before, config)
    if other := [name for name in different if name not in named]:
        message = f"{checkpoint.path} was made with other values of {', '.join(other)}: resume with the same"
        if all(name in changeable(config) for name in other):
            message += f", or change them from here on: --resume-with {' '.join(f'{name}=VALUE' for name in other)}"
        raise UserError(message)
    changes: list[dict[str, Any]] = list(checkpoint.state.get("changes", []))
    if different:
        was, now = to_mapping(before), to_mapping(config)
        both = {name: [mapping[name.split(".")[0]][name.split(".")[1]] for mapping in (was, now)] for name in different}
        changes.append({"step": checkpoint.value("step"), "fields": both})
    if before.data.where != config.data.where:
        raise UserError(
            f"{checkpoint.path} was made with data.where {' '.join(before.data.where) or 'empty'}: resume with the same"
        )
    if (clips := checkpoint.value("clips")) != loader.num_clips:
        raise UserError(
            f"{checkpoint.path} was made on {clips} clips, the store {config.data.store} has {loader.num_clips}"
        )
    packed, here = checkpoint.state.get("store", {}), loader.store.identity  # older checkpoints may lack it
    if different := [name for name, value in packed.items() if value != here.get(name)]:
        raise UserError(
            f"{checkpoint.path} was made on another store than {config.data.store}, packed with other "
            f"{', '.join(different)}: resume on the same"
        )
    parts = before.data.mix or config.data.mix or config.data.where
    if parts and checkpoint.value("loader")["store"] != loader.state_dict()["store"]:
        given, made = (" ".join(each.data.mix) for each in (config, before))
        if given == made:
            raise UserError(f"{checkpoint.path} was made on other clips than the stores hold now: resume on the same")
        raise UserError(
            f"{checkpoint.path} was made on other stores or weights than data.mix {given or 'none'}: "
            f"resume with {made or 'none'}"
        )
    return changes


def _print_summary(summary: dict[str, Any], stopped_by: str | None) -> None:
    scores = summary["retrieval"]
    if stopped_by:
        print(f"stopped by {stopped_by} after step {summary['step']} of {summary['steps']}; continue with --resume")
    if "holdout" not in summary and None not in (scores["trained"], scores.get("untrained")):
        print(
            f"retrieval of a clip's other frame among {scores['clips']} clips: trained {scores['trained']:.1%}, "
            f"untrained {scores['untrained']:.1%}, raw pixels {scores['pixels']:.1%}, "
            f"color histogram {scores['histogram']:.1%}"
        )
        for name, baseline in (("raw pixels", scores["pixels"]), ("a color histogram", scores["histogram"])):
            if not stopped_by and baseline > scores["trained"]:
                print(f"warning: the encoder retrieves worse than {name}: train longer, or on more varied videos")
    first, last, uniform = (summary[k] for k in ("first_loss", "last_loss", "log_negatives_plus_1"))
    if None not in (first, last):
        print(f"loss: first {first:.4f}, last {last:.4f}" + (f"; log(negatives + 1) {uniform:.4f}" if uniform else ""))
    print(f"speed: {summary['pairs_per_s']:.1f} pairs/s")
    print(f"checkpoint: {summary['checkpoint']}", flush=True)
    if "holdout" in summary:
        print("\n".join(holdout.lines(summary["holdout"], summary["holdout"]["trained"])), flush=True)
