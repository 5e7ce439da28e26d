"""A whole training step from given views: keys, queries, loss, gradient, LARS, moving average."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import vito_fast.train.loss
from bench.bench_optimizer import some
from bench.harness import Budget, Candidate, Result, Work
from bench.limits import bare
from bench.peers import not_compiled
from vito_fast.config import Config, ModelConfig, SamplerConfig, ScheduleConfig, TrainConfig
from vito_fast.model import norm
from vito_fast.train.distributed import World
from vito_fast.train.trainer import Trainer
from vito_kernels import reference


@contextlib.contextmanager
def plain_kernels() -> Iterator[None]:
    """The references in place of the kernels, everywhere in the step."""
    pooling = importlib.import_module("vito_kernels.attention_pool")
    plain = [
        (vito_fast.train.loss, "info_nce", reference.info_nce),
        (pooling, "attention_pool", reference.attention_pool),
        (norm, "can_fuse", lambda *_: False),  # torch's batch norm
    ]
    with contextlib.ExitStack() as stack:
        for where, name, function in plain:
            stack.callback(setattr, where, name, getattr(where, name))
            setattr(where, name, function)
        yield


def trainer(backbone: str, batch: int, device: torch.device, dtype: str = "float32", **train: bool) -> Trainer:
    config = Config(
        model=ModelConfig(backbone=backbone, heads="per_level", predictor=True),  # the step of the committed results
        sampler=SamplerConfig(views=2),
        schedule=ScheduleConfig(warmup_epochs=0),
        train=TrainConfig(batch_size=batch, dtype=dtype, **train),
    )
    return Trainer(config, World(0, 1, 1, device), steps_per_epoch=100)


def views_of(batch: int, size: int, device: torch.device) -> tuple[tuple[Tensor, ...], Tensor]:
    generator = torch.Generator().manual_seed(0)
    clips = torch.randn(batch, 3, size, size, generator=generator)
    views = [clips + 0.5 * torch.randn(batch, 3, size, size, generator=generator) for _ in range(2)]
    return tuple(v.to(device).contiguous(memory_format=torch.channels_last) for v in views), torch.arange(batch)


def stepping(made: Trainer, views: tuple[Tensor, ...], video: Tensor) -> Callable[[], Result]:
    """The first call returns how some parameters moved; later ones only step on."""
    fresh = [True]

    def call() -> Result:
        parameters = made.optimizer.parameters
        before = some(parameters) if fresh else []
        made.step(views, video, measure=False)
        if not fresh:
            return ()
        fresh.pop()
        return [after - start for after, start in zip(some(parameters), before, strict=True)]

    return call


def moved_alike(got: Result, truth: Result) -> float:
    """The largest error of a parameter's movement, relative to it or to a thousandth of the longest movement.

    A bias before batch norm has no gradient but what rounding makes of it: any two computations differ there by 100 %.
    """
    floor = 1e-3 * max(true.norm().item() for true in truth)
    errors = [
        ((mine.to(true) - true).norm() / true.norm().clamp(min=floor)).item()
        for mine, true in zip(got, truth, strict=True)
    ]
    return max(errors) if all(error == error for error in errors) else float("inf")


def moved_together(got: Result, truth: Result) -> float:
    """The error of all movements as one vector: in bfloat16 that of a single early parameter says little."""
    errors = sum((mine.to(true) - true).norm().item() ** 2 for mine, true in zip(got, truth, strict=True))
    return (errors / sum(true.norm().item() ** 2 for true in truth)) ** 0.5


@pytest.mark.parametrize(
    ("backbone", "batch", "size"),
    [("resnet18", 4, 64), pytest.param("resnet50", 2, 224, marks=pytest.mark.full)],
    ids=["resnet18", "resnet50"],
)
def test_step(race: Any, device: torch.device, backbone: str, batch: int, size: int) -> None:
    """On a GPU 128 clips in bfloat16, against float32: the share that one of 32 GPUs has of the published batch."""
    cuda = device.type == "cuda"
    batch, dtype, exact_dtype = (128, "bfloat16", "float32") if cuda else (batch, "float32", "float64")
    views, video = views_of(batch, size, device)
    video = video.to(device)
    fused, plain = trainer(backbone, batch, device, dtype), trainer(backbone, batch, device, dtype)
    plain_step = stepping(plain, views, video)

    def reference_step() -> Result:
        with plain_kernels():
            return plain_step()

    def networks_alone() -> Result:
        with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
            with torch.no_grad():
                fused.model.target.backbone(torch.cat(views))
            features = fused.model.online.backbone(torch.cat(views))
        torch.stack([f.mean() for f in features]).sum().backward()
        return ()

    def truth() -> Result:
        exact = trainer(backbone, batch, device, exact_dtype)
        with plain_kernels():
            return stepping(exact, views, video)()

    candidates = [
        Candidate("vito_fast", stepping(fused, views, video), "ours"),
        Candidate("the same with the references", reference_step, "reference"),
        not_compiled("python -m bench.step_modes times compiled steps"),
        bare("networks alone", networks_alone, "both backbones, no pooling, heads, loss or update"),
    ]
    params = {"backbone": backbone, "B": batch, "size": size}
    work = Work(items=batch, unit="pairs")
    fewest = {"resnet18": 6, "resnet50": 3}[backbone]  # seconds a step of ResNet-50 on a CPU
    budget = Budget(2.5, fewest)
    # In bfloat16 a step errs by a fifth, whoever computes it (0.17 and 0.18 on a CPU): at most twice the reference's.
    agree, bound = (moved_together, None) if cuda else (moved_alike, 0.02)
    options: dict[str, Any] = {"agree": agree, "bound": bound, "budget": budget, "once": True}
    race("train_step", params, candidates, truth=truth, work=work, **options)
