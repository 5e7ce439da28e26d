"""One training step: keys, queries, loss, gradient, update; alike on one process or many, CPU or GPU.

Legend: V views, B clips of this rank, b clips of a micro-batch, D embedding width, L locations
of a level.
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
from vito_fast.model.norm import frozen_statistics, set_batch_norms
from vito_fast.model.pair import normalize
from vito_fast.train import profiling
from vito_fast.train.checkpoint import Checkpoint
from vito_fast.train.distributed import World, mean_over_ranks, replicate
from vito_fast.train.keys import PendingKeys, shares
from vito_fast.train.loss import accuracy, attention_entropy, chance, embedding_rank, embedding_std, objective
from vito_fast.train.optim import Schedule, build_optimizer
from vito_fast.train.small_crops import small_crops

WEIGHTS = {"float32": torch.float32, "bfloat16": torch.float32, "float64": torch.float64}
"""Dtype of the weights for each ``train.dtype``; bfloat16 is autocast over float32 weights."""


def _compiled(function: Any, mode: str | None = None) -> Any:
    return torch.compile(function, mode=mode)


def _by_dtype(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    groups: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.dtype, []).append(tensor)
    return list(groups.values())


def _flat(tensors: list[Tensor]) -> Tensor:
    """A copy of all, end to end: one launch instead of one for each tensor."""
    return torch.cat([tensor.flatten() for tensor in tensors])


class Trainer:
    """Model, optimizer and schedule, and the step that updates them."""

    def __init__(self, config: Config, world: World, steps_per_epoch: float) -> None:
        self.config, self.world, self.step_count = config, world, 0
        torch.manual_seed(config.seed)
        model = VitoModel(config.model).to(world.device, WEIGHTS[config.train.dtype])
        if config.train.channels_last:
            model = model.to(memory_format=torch.channels_last)
        groups = config.sampler.views if config.model.batch_norm == "per_view" else 1
        if groups > 1 or world.size > 1:
            set_batch_norms(model, groups=groups, sync=world.size > 1)
        self.model = model.train()
        self.optimizer = build_optimizer(model.online, config.optimizer)
        self.schedule = Schedule(config, steps_per_epoch)
        self.buffers = _by_dtype(model.buffers())
        self.skipped = torch.zeros(2, dtype=torch.int64, device=world.device)  # in all, and in a row
        self.online: nn.Module = model.online
        self.target: nn.Module = model.target
        self._average = model.update_target
        if config.train.compile:
            mode = "reduce-overhead" if config.train.cuda_graphs else None  # not of the average: it changes its inputs
            self.online, self.target = _compiled(model.online, mode), _compiled(model.target, mode)
            self._average = _compiled(self._average)  # the optimizers are one or two kernels as they are
        if world.size > 1:
            self.online = replicate(self.online, world, static_graph=config.train.micro_batches == 1)

    def step(self, views: tuple[Tensor, ...], video: Tensor, measure: bool, total: int | None = None) -> dict[str, Any]:
        """Updates the networks once.

        Args:
            views: V views (B,3,H,W) of the clips.
            video: (B,) int64, the clips' videos.
            measure: Whether to return a row of metrics; the host then waits for the device.
            total: Clips of all ranks, where shares differ (``keys.shares``). The ranks' gradients are then weighted by
                their clips, so that the step equals that of one process.

        Returns:
            The row, or an empty one.
        """
        if len(views) != self.config.sampler.views:
            raise ValueError(f"a step takes {self.config.sampler.views} views, got {len(views)}")
        lr, tau = self.schedule.learning_rate(self.step_count), self.schedule.tau(self.step_count)
        self.weight = 1.0 if total is None else len(video) * self.world.size / total
        given = (*views, *self._small_crops(views, total))
        micro = list(zip(*(v.tensor_split(self.config.train.micro_batches) for v in given), strict=True))
        before = [_flat(group) for group in self.buffers]
        for p in self.model.online.parameters():
            p.grad = None
        if self.config.train.cuda_graphs:  # the outputs of the last step's graphs may be overwritten from here on
            torch.compiler.cudagraph_mark_step_begin()

        with torch.no_grad(), profiling.range("target"):  # keys first: they travel while the online branch runs
            keys = [self._forward(self.target, part[: len(views)])[0] for part in micro]
            pending = PendingKeys(
                [normalize(torch.cat(k, 1)) for k in zip(*keys, strict=True)], video, self.world, total
            )
        if len(micro) == 1:
            with profiling.range("online"):
                rows, weights = self._online(micro[0], 0)
                queries = [normalize(z) for z in rows]
            with profiling.range("loss"):
                loss, by_embedding = objective(queries, every := pending.wait(), self.config.loss)
            with profiling.range("backward"):
                (loss * self.weight).backward()
        else:
            queries, weights, every, loss, by_embedding = self._cached_gradients(micro, pending)

        with profiling.range("optimizer"):
            norm = self.optimizer.gradient_norm()
        finite: Tensor | None = self._finite(loss.detach(), norm)
        if self.config.optimizer.clip_norm:
            self.optimizer.clip(norm, self.config.optimizer.clip_norm)
        rate: Any = tau
        if self.config.train.compile:  # as a tensor: each new number would compile again
            rate = torch.full((), tau, dtype=torch.float64, device=self.world.device)
        elif self.world.device.type == "cpu" and finite:
            finite = None  # reading the flag is free here; selecting by it on the device is not
        with profiling.range("optimizer"):
            self.optimizer.step(lr, finite)
        with profiling.range("average"):
            self._average(rate, finite)
        if finite is not None:
            for group, old in zip(self.buffers, before, strict=True):
                kept = torch.where(finite, _flat(group), old).split([buffer.numel() for buffer in group])
                torch._foreach_copy_(group, [k.view_as(b) for k, b in zip(kept, group, strict=True)])
        self.step_count += 1
        if not measure:
            return {}
        return self._measure(queries, weights, every, by_embedding, norm) | {"lr": lr, "tau": tau}

    def _small_crops(self, views: tuple[Tensor, ...], total: int | None) -> tuple[Tensor, ...]:
        config, world = self.config, self.world
        if not config.sampler.small_crops:
            return ()
        sizes = shares(total or world.size * len(views[0]), world.size)
        return small_crops(views, config.sampler, config.seed, self.step_count, sum(sizes[: world.rank]), sum(sizes))

    def _forward(self, branch: nn.Module, views: tuple[Tensor, ...]) -> tuple[list[Tensor], list[Tensor]]:
        """All views and small crops of some clips: embeddings (V,b,D), and pooling weights (V*b,L) of each level."""
        device, config = self.world.device, self.config
        with torch.autocast(device.type, torch.bfloat16, enabled=config.train.dtype == "bfloat16"):
            whole = config.sampler.views
            images = [torch.cat(part) for part in (views[:whole], views[whole:]) if part]
            out = branch(*(part.double() if config.train.dtype == "float64" else part for part in images))
        return [z.unflatten(0, (len(views), -1)) for z in out.embeddings], out.weights

    def _online(self, views: tuple[Tensor, ...], micro: int) -> tuple[list[Tensor], list[Tensor]]:
        """``_forward`` of the online network. Its paths are dropped alike each time that a micro-batch is embedded."""
        if self.config.model.drop_path:  # by step and rank, so that a resumed run drops the same
            torch.manual_seed(hash((self.config.seed, self.step_count, self.world.rank, micro)) % 2**63)
        return self._forward(self.online, views)

    def _cached_gradients(self, micro: list[tuple[Tensor, ...]], pending: PendingKeys) -> Any:
        """The gradient of the whole batch with the activations of one micro-batch (GradCache, 2101.06983).

        Embeds all micro-batches, differentiates the loss with respect to the embeddings, then embeds each micro-batch
        again and propagates its share of that gradient.
        """
        with torch.no_grad(), profiling.range("online"):
            forwards = [self._online(part, i) for i, part in enumerate(micro)]
        rows = [torch.cat(z, 1).requires_grad_() for z in zip(*(f[0] for f in forwards), strict=True)]
        queries = [normalize(z) for z in rows]
        with profiling.range("loss"):
            loss, by_embedding = objective(queries, every := pending.wait(), self.config.loss)
        gradients = [
            g.split([len(part[0]) for part in micro], 1) for g in torch.autograd.grad(loss * self.weight, rows)
        ]
        for i, part in enumerate(micro):
            with self._without_sync(i < len(micro) - 1), frozen_statistics(self.model.online):
                with profiling.range("online"):
                    again, _ = self._online(part, i)
                with profiling.range("backward"):
                    torch.autograd.backward(again, [g[i] for g in gradients])
        return queries, forwards[0][1], every, loss, by_embedding

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

    def _measure(self, queries: Any, weights: Any, keys: Any, by_embedding: Tensor, norm: Tensor) -> dict[str, Any]:
        """A row of metrics.jsonl; here the host waits for the device."""
        config = self.config.loss
        groups = {
            "loss": by_embedding,
            "accuracy": accuracy(queries, keys, config),
            "embedding_std": embedding_std(queries),
            "embedding_rank": embedding_rank(queries),
            "attention_entropy": attention_entropy(weights),
        }
        scalars = [by_embedding.mean(), chance(keys, queries[0].shape[1], config), norm, self.model.target_distance()]
        flat = torch.cat([torch.stack([s.double() for s in scalars]), *(g.double() for g in groups.values())])
        values = mean_over_ranks(flat * self.weight).tolist()
        row = dict(zip(("loss", "chance", "gradient_norm", "target_distance"), values, strict=False))
        per_level = {name: len(group) > 1 or name == "attention_entropy" for name, group in groups.items()}
        names = (f"{n}_level{i}" if per_level[n] else n for n, group in groups.items() for i in range(len(group)))
        row |= zip(names, values[len(scalars) :], strict=True)
        row["skipped"], row["skipped_in_a_row"] = self.skipped.tolist()
        return row

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, plain values) from which a run continues bit for bit."""
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"momentum.{k}": v for k, v in self.optimizer.state_dict().items()}
        tensors |= {"rng.cpu": torch.get_rng_state(), "skipped": self.skipped}
        if self.world.device.type == "cuda":
            tensors["rng.cuda"] = torch.cuda.get_rng_state(self.world.device)
        return tensors, {"step": self.step_count}

    def load(self, checkpoint: Checkpoint) -> None:
        """Continues from a checkpoint. UserError if it is of another model."""
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
