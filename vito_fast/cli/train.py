"""``vito-fast train``."""

import signal
from dataclasses import dataclass
from typing import Annotated

import tyro

from vito_fast.config import Config


@dataclass(frozen=True)
class Train:
    """Pretrain an encoder.

    usage: vito-fast train CONFIG [--resume] [--section.field VALUE ...], where CONFIG is a YAML file or a shipped
    preset.
    """

    config: Annotated[Config, tyro.conf.arg(name="")]
    resume: bool = False
    """Continue the run of this name from its newest whole checkpoint, or start it if there is none."""
    resume_with: tuple[str, ...] = ()
    """Resume and change optimizer, schedule or train.micro_batches from here on: schedule.epochs=40 ..."""
    max_steps: int | None = None
    """Stop after this many steps; the schedules stay those of the whole run."""
    profile: bool = False
    """Trace a few steps after the first ten into the run's folder, profile/, for Perfetto or chrome://tracing."""
    dry_run: bool = False
    """Run one CUDA step without data or GPU; print its operations, its memory and its problems."""

    def run(self) -> int:
        """Trains, or runs dry; returns the exit status."""
        if self.dry_run:
            from vito_fast.plan.report import report_dry_run

            return report_dry_run(self.config)
        from vito_fast.plan.dryrun import clips_at_peak
        from vito_fast.train.loop import train

        summary = train(
            self.config,
            resume=self.resume,
            resume_with=self.resume_with,
            max_steps=self.max_steps,
            profile=self.profile,
            clips_at_peak=clips_at_peak(self.config),
        )
        stopped_by = summary.get("signal")
        return 128 + signal.Signals[stopped_by] if stopped_by else 0


@dataclass(frozen=True)
class LrFind:
    """Find a learning rate: train for some steps with a growing one, print the loss, and propose one. Writes nothing.

    usage: vito-fast lr-find CONFIG [--steps N] [--section.field VALUE ...]
    """

    config: Annotated[Config, tyro.conf.arg(name="")]
    steps: int = 100
    """Steps of the sweep."""
    low: float = 1e-3
    """First optimizer.base_lr."""
    high: float = 100.0
    """Last optimizer.base_lr; the sweep ends earlier where the loss grows."""

    def run(self) -> int:
        """Prints the sweep; returns the exit status."""
        from vito_fast.train.find_rate import find_rate

        every = max(1, self.steps // 20)

        def told(step: int, rate: float, loss: float) -> None:
            if step % every == 0:
                print(f"step {step}: base_lr {rate:.2g}, loss {loss:.4f}", flush=True)

        found = find_rate(self.config, self.steps, self.low, self.high, told)
        lowest = found.losses[found.rates.index(found.lowest)]
        print(f"lowest loss {lowest:.4f} at {found.lowest:.2g}, steepest fall at {found.steepest:.2g}")
        if found.lowest >= found.rates[-1] / 2:
            print("the loss still falls at the highest rates: a larger --high shows where it ends")
        print(f"propose: --optimizer.base-lr {found.steepest:.2g}  (now {self.config.optimizer.base_lr:g})")
        return 0
