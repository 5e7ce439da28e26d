"""A learning-rate finder (Smith, 1506.01186): the loss of some steps whose rate grows from one to the next."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from vito_fast.config import Config
from vito_fast.data.loader.batch import to_device
from vito_fast.errors import UserError
from vito_fast.train.distributed import init_distributed, shutdown
from vito_fast.train.loop import _endless
from vito_fast.train.run import make_loader
from vito_fast.train.trainer import Trainer

SMOOTHING = 0.9
"""Share of the average of the earlier losses in each smoothed one."""
DIVERGED = 2.0
"""The sweep ends once the smoothed loss is so many times its lowest so far."""
LEAST_FALL = 0.02
"""Share of the highest loss before that some rate must take away."""


@dataclass(frozen=True)
class Sweep:
    """The outcome. Rates are values of ``optimizer.base_lr``."""

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    """Smoothed."""
    steepest: float
    """The rate around which the loss falls most, within a decade of the rate."""
    lowest: float
    """The rate of the lowest loss."""


def find_rate(config: Config, steps: int, low: float, high: float, told: Callable[[int, float, float], None]) -> Sweep:
    """Trains new weights for a while, on one process; writes nothing.

    Args:
        config: The run.
        steps: Steps of the sweep, at least 20.
        low: First ``optimizer.base_lr``.
        high: Last one.
        told: Gets step, rate and smoothed loss.

    Raises:
        UserError: an empty range, too few steps, or a loss that falls at no rate.
    """
    if steps < 20 or not 0 < low < high < math.inf:
        raise UserError(f"a sweep of {steps} steps from {low:g} to {high:g}: take 20 steps or more, and low below high")
    world = init_distributed(config.train.device, config.train.timeout)
    try:
        if world.size > 1:
            raise UserError(f"the finder runs on one process, and this launcher started {world.size}")
        loader = make_loader(config, world)
        trainer = Trainer(config, world, config.steps_per_epoch(loader.num_clips))
        rates = np.geomspace(low, high, steps).tolist()
        scale = config.train.batch_size / 256
        trainer.schedule.learning_rate = lambda step: rates[step] * scale  # type: ignore[method-assign]
        losses: list[float] = []
        average = 0.0
        batches = _endless(loader)
        for step, rate in enumerate(rates):
            batch = next(batches)
            loss = trainer.step(batch["views"], to_device(batch["video"], world.device), measure=True)["loss"]
            average = SMOOTHING * average + (1 - SMOOTHING) * loss
            losses.append(average / (1 - SMOOTHING ** (step + 1)))
            if not math.isfinite(losses[-1]):
                losses.pop()
                break
            told(step + 1, rate, losses[-1])
            if step > steps // 4 and losses[-1] > DIVERGED * min(losses[steps // 10 :]):
                break
        loader.close()
    finally:
        shutdown()
    return judge(rates[: len(losses)], losses)


def judge(rates: list[float], losses: list[float]) -> Sweep:
    """The steepest fall and the lowest loss. UserError if the loss does not fall."""
    first = round(1 / (1 - SMOOTHING))  # those before are smoothed over fewer steps
    bottom = first + int(np.argmin(losses[first:])) if len(losses) > first else 0
    if bottom < first + 2 or losses[bottom] > (1 - LEAST_FALL) * max(losses[first:bottom]):
        raise UserError(
            f"the loss falls at no rate in {len(losses)} steps: take more --steps, another range, or larger batches"
        )
    decades = np.log10(rates[first:])
    after, before = (np.interp(decades + side, decades, losses[first:]) for side in (0.5, -0.5))
    steepest = first + int(np.argmin((after - before)[: bottom - first + 1]))
    return Sweep(tuple(rates), tuple(losses), rates[steepest], rates[bottom])
