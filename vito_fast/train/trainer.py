"""One training step: keys, queries, loss, gradient, update. One process or many, CPU or GPU: only configuration
differs.

Legend: V views, B clips of this rank, S scales, D embedding width; a part is the share of the clips computed at once.
"""

import contextlib
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vito_fast.config import Config
from vito_fast.errors import UserError
from vito_fast.model import VitoModel
from vito_fast.model.norm import convert_sync_batchnorm, frozen_statistics
from vito_fast.model.pair import normalise
from vito_fast.train.checkpoint import Checkpoint
from vito_fast.train.distributed import PendingKeys, World, mean_over_ranks, replicate
from vito_fast.train.loss import accuracy, attention_entropy, chance, embedding_rank, embedding_std, objective
from vito_fast.train.optim import Lars, Schedule
from vito_fast.train.profiling import part as named

WEIGHTS = {"float32": torch.float32, "bfloat16": torch.float32, "float64": torch.float64}
"""Dtype of the weights for each ``train.dtype``; bfloat16 is autocast over float32 weights."""


def _compiled(part: Any, mode: str | None = None) -> Any:
    return torch.compile(part, mode=mode)


def _by_dtype(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    groups: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.dtype, []).append(tensor)
    return list(groups.values())


def _flat(tensors: list[Tensor]) -> Tensor:
    """A copy of them all, end to end: one launch, where a clone of each would be hundreds."""
    return torch.cat([tensor.flatten() for tensor in tensors])


class Trainer:
    """Model, optimiser and schedule, and the step that moves them."""

    def __init__(self, config: Config, world: World, steps_per_epoch: int) -> None:
        self.config, self.world, self.step_count = config, world, 0
        torch.manual_seed(config.seed)
        model = VitoModel(config.model).to(world.device, WEIGHTS[config.train.dtype])
        if config.train.channels_last:
            model = model.to(memory_format=torch.channels_last)
        if world.size > 1:
            convert_sync_batchnorm(model)
        self.model = model.train()
        self.optimizer = Lars(model.online.named_parameters(), config.optimizer)
        self.schedule = Schedule(config, steps_per_epoch)
        self.buffers = _by_dtype(model.buffers())
        self.skipped = torch.zeros(2, dtype=torch.int64, device=world.device)  # in all, and in a row
        self.online: nn.Module = model.online
        self.target: nn.Module = model.target
        self._update, self._average = self.optimizer.step, model.update_target
        if config.train.compile:
            mode = "reduce-overhead" if config.train.cuda_graphs else None  # not of the update: it changes its inputs
            self.online, self.target = _compiled(model.online, mode), _compiled(model.target, mode)
            self._update, self._average = _compiled(self._update), _compiled(self._average)
        if world.size > 1:
            self.online = replicate(self.online, world, static_graph=config.train.micro_batches == 1)

    def step(self, views: tuple[Tensor, ...], video: Tensor, measure: bool, total: int | None = None) -> dict[str, Any]:
        """One update from V views (B,3,H,W) of clips with ``video`` (B,) int64; what was measured, if asked for.

        ``total``: clips of all ranks, where shares differ (``distributed.shares``). Ranks then count by their clips, so
        that the step is that of one process with all of them.
        """
        lr, tau = self.schedule.learning_rate(self.step_count), self.schedule.tau(self.step_count)
        self.weight = 1.0 if total is None else len(video) * self.world.size / total
        parts = list(zip(*(v.tensor_split(self.config.train.micro_batches) for v in views), strict=True))
        before = [_flat(group) for group in self.buffers]
        for p in self.model.online.parameters():
            p.grad = None
        if self.config.train.cuda_graphs:  # what the graphs returned in the last step may be overwritten from here on
            torch.compiler.cudagraph_mark_step_begin()

        with torch.no_grad(), named("target"):  # keys first: they travel while the online branch runs
            keys = [self._forward(self.target, part)[0] for part in parts]
            pending = PendingKeys(
                [normalise(torch.cat(k, 1)) for k in zip(*keys, strict=True)], video, self.world, total
            )
        if len(parts) == 1:
            with named("online"):
                rows, weights = self._forward(self.online, parts[0])
                queries = [normalise(z) for z in rows]
            with named("loss"):
                loss, by_scale = objective(queries, every := pending.wait(), self.config.loss)
            with named("backward"):
                (loss * self.weight).backward()
        else:
            queries, weights, every, loss, by_scale = self._cached_gradients(parts, pending)

        with named("optimiser"):
            norm = self.optimizer.gradient_norm()
        finite: Tensor | None = self._finite(loss.detach(), norm)
        rates: tuple[Any, Any] = (lr, tau)
        if self.config.train.compile:  # as tensors: each new number would be compiled anew
            new: dict[str, Any] = {"dtype": torch.float64, "device": self.world.device}
            rates = torch.full((), lr, **new), torch.full((), tau, **new)
        elif self.world.device.type == "cpu" and finite:
            finite = None  # reading the flag is free here, and choosing by it on the device is not
        with named("optimiser"):
            self._update(rates[0], finite)
        with named("average"):
            self._average(rates[1], finite)
        if finite is not None:
            for group, old in zip(self.buffers, before, strict=True):
                kept = torch.where(finite, _flat(group), old).split([buffer.numel() for buffer in group])
                torch._foreach_copy_(group, [k.view_as(b) for k, b in zip(kept, group, strict=True)])
        self.step_count += 1
        if not measure:
            return {}
        return self._measure(queries, weights, every, by_scale, norm) | {"lr": lr, "tau": tau}

    def _forward(self, branch: nn.Module, part: tuple[Tensor, ...]) -> tuple[list[Tensor], list[Tensor]]:
        """All views of some clips in one pass: embeddings (V,b,D) and pooling weights (V*b,L) of each scale."""
        device, config = self.world.device, self.config.train
        with torch.autocast(device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
            images = torch.cat(part)
            out = branch(images.double() if config.dtype == "float64" else images)
        return [z.unflatten(0, (len(part), -1)) for z in out.embeddings], out.weights

    def _cached_gradients(self, parts: list[tuple[Tensor, ...]], pending: PendingKeys) -> Any:
        """The step of the whole batch with the activations of one part: embed all parts, differentiate the loss with
        respect to the embeddings, then embed each part again and send its share of that gradient back."""
        with torch.no_grad(), named("online"):
            forwards = [self._forward(self.online, part) for part in parts]
        rows = [torch.cat(z, 1).requires_grad_() for z in zip(*(f[0] for f in forwards), strict=True)]
        queries = [normalise(z) for z in rows]
        with named("loss"):
            loss, by_scale = objective(queries, every := pending.wait(), self.config.loss)
        gradients = [g.split([len(p[0]) for p in parts], 1) for g in torch.autograd.grad(loss * self.weight, rows)]
        for i, part in enumerate(parts):
            with self._without_sync(i < len(parts) - 1), frozen_statistics(self.model.online):
                with named("online"):
                    again, _ = self._forward(self.online, part)
                with named("backward"):
                    torch.autograd.backward(again, [g[i] for g in gradients])
        return queries, forwards[0][1], every, loss, by_scale

    def _without_sync(self, wanted: bool) -> contextlib.AbstractContextManager[Any]:
        online = self.online
        if wanted and isinstance(online, nn.parallel.DistributedDataParallel):
            return online.no_sync()
        return contextlib.nullcontext()

    def _finite(self, loss: Tensor, norm: Tensor) -> Tensor:
        """Whether every rank's loss and the gradient are finite (); counts the steps that are not. No host sync."""
        finite = torch.isfinite(loss) & torch.isfinite(norm)
        if self.world.size > 1:
            flag = finite.to(torch.uint8)
            dist.all_reduce(flag, dist.ReduceOp.MIN)
            finite = flag.bool()
        bad = (~finite).long()
        self.skipped.copy_(torch.stack([self.skipped[0] + bad, (self.skipped[1] + bad) * bad]))
        return finite

    def _measure(self, queries: Any, weights: Any, keys: Any, by_scale: Tensor, norm: Tensor) -> dict[str, Any]:
        """The row of metrics.jsonl: this is where the host waits for the device."""
        config = self.config.loss
        groups = {
            "loss_scale": by_scale,
            "accuracy_scale": accuracy(queries, keys, config),
            "embedding_std_scale": embedding_std(queries),
            "embedding_rank_scale": embedding_rank(queries),
            "attention_entropy_scale": attention_entropy(weights),
        }
        scalars = [by_scale.mean(), chance(keys, queries[0].shape[1], config), norm, self.model.target_distance()]
        flat = torch.cat([torch.stack([s.double() for s in scalars]), *(g.double() for g in groups.values())])
        values = mean_over_ranks(flat * self.weight).tolist()
        row = dict(zip(("loss", "chance", "gradient_norm", "target_distance"), values, strict=False))
        names = (f"{name}{s}" for name, group in groups.items() for s in range(len(group)))
        row |= zip(names, values[len(scalars) :], strict=True)
        row["skipped"], row["skipped_in_a_row"] = self.skipped.tolist()
        return row

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, plain values) that a run continues from, bit for bit."""
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"momentum.{k}": v for k, v in self.optimizer.state_dict().items()}
        tensors |= {"rng.cpu": torch.get_rng_state(), "skipped": self.skipped}
        if self.world.device.type == "cuda":
            tensors["rng.cuda"] = torch.cuda.get_rng_state(self.world.device)
        return tensors, {"step": self.step_count}

    def load(self, checkpoint: Checkpoint) -> None:
        """Continues from a checkpoint; UserError naming it if it is of another model."""
        groups: dict[str, dict[str, Tensor]] = {"model": {}, "momentum": {}, "rng": {}, "skipped": {}}
        for name, tensor in checkpoint.tensors.items():
            group, _, rest = name.partition(".")
            groups.setdefault(group, {})[rest] = tensor
        try:
            self.model.load_state_dict(groups["model"])
            self.optimizer.load_state_dict(groups["momentum"])
        except (RuntimeError, ValueError) as error:
            raise UserError(f"{checkpoint.path} is of another model: {' '.join(str(error).split())[:200]}") from None
        self.skipped.copy_(groups["skipped"][""])
        torch.set_rng_state(groups["rng"]["cpu"])
        if self.world.device.type == "cuda" and "cuda" in groups["rng"]:
            torch.cuda.set_rng_state(groups["rng"]["cuda"], self.world.device)
        self.step_count = checkpoint.value("step")
