"""One fine-tuning loop for every task that trains, in the order in which it runs.

A model gives ``loss(batch)`` and ``predict(batch)``; the rest is here. Everything random is keyed by the seed and the
sample's number, so that a killed run resumes to the same result and two ranks give what one process gives.
"""

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, Dataset

from vito_fast.errors import UserError
from vito_fast.evaluate.task import Progress, barrier, rank_and_size
from vito_fast.model.norm import set_batch_norms
from vito_fast.train.checkpoint import Checkpoint, Checkpointer, read_newest
from vito_fast.train.distributed import World, replicate
from vito_fast.train.metrics import RowFile

LOG_EVERY = 10  # steps between rows of metrics.jsonl

Losses = Mapping[str, tuple[Tensor, Tensor]]


class Model(Protocol):
    """What the loop trains: an ``nn.Module`` with these two."""

    def loss(self, batch: Any) -> Losses:
        """Each term as (sum, count), both (): the loop divides by the count of all ranks, as one process would."""

    def predict(self, batch: Any) -> Any:
        """The model's answer, in eval mode."""


class TrainData(Protocol):
    """Samples by number. ``sample`` is a pure function of its arguments."""

    def __len__(self) -> int: ...

    def sample(self, index: int, rng: np.random.Generator) -> Any:
        """One sample, augmented by ``rng`` alone."""

    def collate(self, samples: list[Any]) -> Any:
        """A batch: tensors in nested dicts, lists and tuples."""


@dataclass(frozen=True)
class Recipe:
    """How to fine-tune."""

    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: float = 0.01
    """Of everything but the backbone, at its highest."""
    backbone_lr: float = 1.0
    """The backbone's share of ``lr``; 0 freezes it, and its batch norms then stay in eval mode."""
    momentum: float = 0.9
    weight_decay: float = 0.0
    decay_norms: bool = True
    """Whether biases and norm parameters decay too."""
    schedule: Literal["constant", "poly", "step", "exponential", "cosine"] = "constant"
    power: float = 0.9
    """Of poly: (1 - t) ** power."""
    gamma: float = 0.1
    """Of step: the factor at each milestone; of exponential: the factor at the end."""
    milestones: tuple[float, ...] = ()
    """Of step, in epochs."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0."""
    epochs: float = 1.0
    batch_size: int = 16
    """Samples of a step, over all ranks."""
    accumulate: int = 1
    """Parts of a step's batch, one after the other through the network; counts are then a part's."""
    clip_norm: float = 0.0
    """Greatest norm of the gradient; 0 = any."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 is autocast, on a GPU alone."""

    def steps(self, samples: int) -> int:
        """Updates in all."""
        return max(1, math.ceil(self.epochs * samples / self.batch_size))

    def rate(self, step: int, total: int, samples: int) -> float:
        """The learning rate's factor in step 0, 1, ..."""
        t = step / total
        factor = {
            "constant": 1.0,
            "poly": (1 - t) ** self.power,
            "step": self.gamma ** sum(step * self.batch_size / samples >= m for m in self.milestones),
            "exponential": self.gamma**t,
            "cosine": (1 + math.cos(math.pi * t)) / 2,
        }[self.schedule]
        return factor * min(1.0, (step + 1) / (self.warmup_steps + 1))


def finetune(
    model: nn.Module,
    data: TrainData,
    recipe: Recipe,
    work: Path,
    device: torch.device,
    *,
    seed: int = 0,
    workers: int | None = None,
    checkpoint_every: int = 200,
    label: str = "fine-tuning",
) -> nn.Module:
    """Trains ``model`` on ``data``; returns it in eval mode, the same on every rank.

    Args:
        model: A ``Model``; its part named ``backbone``, if any, learns at ``recipe.backbone_lr`` times the rate.
        data: Samples; every rank holds all of them and loads its share.
        recipe: Optimizer, schedule and length.
        work: Folder of ``checkpoints/`` and ``metrics.jsonl``; a run killed there goes on from its newest checkpoint.
        device: Place of the model.
        seed: Decides the order and the augmentation of samples.
        workers: Loading processes; by default one a core but one, and none where a rank has two cores.
        checkpoint_every: Steps between checkpoints.
        label: Of the progress line.
    Returns:
        ``model``. Deterministic on the CPU; with several ranks equal to one process up to rounding.
    Raises:
        UserError: for a loss that is not finite, or a checkpoint of another model.
    """
    rank, size = rank_and_size()
    total = recipe.steps(len(data))
    model = _prepared(model, recipe, size).to(device)
    optimizer = _optimizer(model, recipe)
    start = _resumed(model, optimizer, work / "checkpoints", device)
    world = World(rank, size, int(os.environ.get("LOCAL_WORLD_SIZE", size)), device)
    step_model: nn.Module = _Loss(model)
    if size > 1:
        step_model = replicate(step_model, world, static_graph=False)
    rates = [group["lr"] for group in optimizer.param_groups]
    saver = Checkpointer(work / "checkpoints", keep_last=1, start=start) if rank == 0 else None
    rows = RowFile(work / "metrics.jsonl", start) if rank == 0 else None
    progress = Progress(label, total - start)
    low_precision = recipe.dtype == "bfloat16" and device.type == "cuda"
    batches = _batches(data, recipe, start, total, seed, workers, world)
    for step in range(start, total):
        factor = recipe.rate(step, total, len(data))
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        optimizer.zero_grad(set_to_none=True)
        own = generator(seed, step * 65536 + rank, 2).integers(2**63)
        torch.manual_seed(int(own))  # of layers that draw by themselves: the same after a resume
        terms: dict[str, Tensor] = {}
        for _ in range(recipe.accumulate):
            batch = tree_map_only(Tensor, lambda tensor: tensor.to(device, non_blocking=True), next(batches))
            with torch.autocast(device.type, torch.bfloat16, enabled=low_precision):
                losses: Losses = step_model(batch)
            loss, found = _over_ranks(losses, size)
            (loss / recipe.accumulate).backward()
            terms = {name: terms.get(name, 0.0) + value / recipe.accumulate for name, value in found.items()}
        if recipe.clip_norm:
            nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
        optimizer.step()
        done, due = step + 1, (step + 1) % checkpoint_every == 0 or step + 1 == total
        if done % LOG_EVERY == 0 or due:  # here alone the host waits for the device
            values = {name: float(value) for name, value in terms.items()}
            if not all(map(math.isfinite, values.values())):
                raise UserError(f"{label}: the loss is not finite by step {done} ({values}): lower the learning rate")
            if rows:
                rows.append({"step": done, "lr": recipe.lr * factor, **values})
        if saver and due:
            saver.save(done, _tensors(model, optimizer), {"step": done})
        progress.step()
    if saver:
        saver.close()
    barrier()
    return model.eval()


class _Loss(nn.Module):
    """The loss as a forward pass, which is what DDP follows."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Any) -> Losses:
        losses: Losses = self.model.loss(batch)
        return losses


def _prepared(model: nn.Module, recipe: Recipe, size: int) -> nn.Module:
    model.train()
    backbone = getattr(model, "backbone", None)
    if recipe.backbone_lr == 0 and backbone is not None:
        backbone.requires_grad_(False).eval()
    if size > 1:
        set_batch_norms(model, sync=True)
    return model


def _optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = recipe.decay_norms or parameter.dim() > 1
            groups.setdefault((name.startswith("backbone."), decays), []).append(parameter)
    settings: list[dict[str, Any]] = [
        {
            "params": parameters,
            "lr": recipe.lr * (recipe.backbone_lr if backbone else 1.0),
            "weight_decay": recipe.weight_decay if decays else 0.0,
        }
        for (backbone, decays), parameters in groups.items()
    ]
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(settings, momentum=recipe.momentum)
    return (torch.optim.AdamW if recipe.optimizer == "adamw" else torch.optim.Adam)(settings)


def _over_ranks(losses: Losses, size: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss to differentiate, whose gradients' mean over ranks is one process's, and each term over all ranks."""
    both = torch.stack([torch.stack([x.detach().double() for x in pair]) for pair in losses.values()], 1)
    if size > 1:
        dist.all_reduce(both)
    sums, counts = both[0], both[1].clamp(min=1)
    loss = torch.stack([total / n for (total, _), n in zip(losses.values(), counts.float(), strict=True)]).sum() * size
    return loss, dict(zip(losses, sums / counts, strict=True))


def _batches(
    data: TrainData, recipe: Recipe, start: int, total: int, seed: int, workers: int | None, world: World
) -> Iterator[Any]:
    """This rank's batches from step ``start`` on. Sample number n of the whole run is drawn from epoch n // len."""
    size, rank, parts = recipe.batch_size, world.rank, recipe.accumulate
    if size < world.size * parts:
        raise UserError(f"batch_size {size} leaves some of {world.size} ranks x {parts} parts without samples")
    numbers = [
        list(range(step * size, (step + 1) * size))[part * world.size + rank :: world.size * parts]
        for step in range(start, total)
        for part in range(parts)
    ]
    cores = len(os.sched_getaffinity(0)) // world.local_size
    count = workers if workers is not None else cores - 1 if cores > 2 else 0
    loader = DataLoader(
        _Numbered(data, seed),
        batch_sampler=numbers,
        num_workers=count,
        collate_fn=data.collate,
        pin_memory=world.device.type == "cuda",
        multiprocessing_context="spawn" if count else None,
    )
    return iter(loader)


class _Numbered(Dataset[Any]):
    """Samples by their number in the run."""

    def __init__(self, data: TrainData, seed: int) -> None:
        self.data, self.seed, self.epoch, self.order = data, seed, -1, np.empty(0, np.int64)

    def __getitem__(self, number: int) -> Any:
        epoch, position = divmod(number, len(self.data))
        if epoch != self.epoch:
            self.epoch, self.order = epoch, generator(self.seed, epoch, 1).permutation(len(self.data))
        return self.data.sample(int(self.order[position]), generator(self.seed, number, 0))


def generator(seed: int, number: int, stream: int) -> np.random.Generator:
    """A counter-based generator of its own for each (seed, number, stream)."""
    return np.random.Generator(np.random.Philox(key=[seed, (number << 8) + stream]))


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for number, values in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{name}": v for name, v in values.items() if isinstance(v, Tensor)}
    return tensors


def _resumed(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path, device: torch.device) -> int:
    """Loads the newest checkpoint; returns its step, 0 without one."""
    found: Checkpoint | None = read_newest(folder)
    if found is None:
        return 0
    try:
        model.load_state_dict(found.part("model."))
    except RuntimeError as error:
        raise UserError(f"{found.path} is of another model: {' '.join(str(error).split())[:200]}") from None
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in found.part("optimizer.").items():
        number, _, key = name.partition(".")
        state.setdefault(int(number), {})[key] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    return int(found.value("step"))
