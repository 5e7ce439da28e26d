"""One LARS step on every parameter of a ResNet-50 branch, and the moving average of the target."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.harness import Candidate, Result, Work, absent
from bench.limits import traffic
from bench.peers import not_compiled, not_imported
from vito_fast.config import ModelConfig, OptimizerConfig
from vito_fast.model.pair import Branch, VitoModel
from vito_fast.train.optim import Lars

LEARNING_RATE, TAU = 0.2, 0.99
PROBES = 8  # parameters, spread over the network, whose update is compared


Drawn = list[tuple[Tensor, Tensor]]


@pytest.fixture(scope="module")
def drawn(device: torch.device, quick: bool) -> Drawn:
    """(weights, gradient) of each parameter of the default online branch; in the quick set, of ResNet-18's."""
    config = ModelConfig(backbone="resnet18" if quick else "resnet50", heads="per_level")
    with torch.device("meta"):
        shapes = [p.shape for p in Branch(config, predictor=True).parameters()]
    generator = torch.Generator().manual_seed(0)

    def draw(scale: float, shape: torch.Size) -> Tensor:
        return (scale * torch.randn(shape, generator=generator)).to(device)

    return [(draw(0.02, shape), draw(0.001, shape)) for shape in shapes]


def parameters(drawn: Drawn, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """New parameters with these weights and gradients."""
    found = []
    for weight, gradient in drawn:
        found.append(nn.Parameter(weight.to(dtype, copy=True)))
        found[-1].grad = gradient.to(dtype, copy=True)
    return found


def some(tensors: list[Tensor]) -> Result:
    """What a whole step is judged by: a few of the tensors, of every kind."""
    return [tensor.detach().clone() for tensor in tensors[:: max(1, len(tensors) // PROBES)]]


def once(change: Callable[[], object], tensors: list[Any]) -> Callable[[], Result]:
    """The first call returns the changed tensors for the comparison; later ones only do the work."""
    fresh = [True]

    def call() -> Result:
        change()
        return [tensor.detach().clone() for tensor in tensors] if fresh and fresh.pop() else ()

    return call


def moved(step: Callable[[], object], weights: list[Any]) -> Callable[[], Result]:
    """The first call returns how far two steps moved each weight: beside the weights themselves they are so short that
    a missing momentum, which shows in the second, would pass. Later calls are one step each.
    """
    fresh = [True]

    def call() -> Result:
        if not fresh:
            step()
            return ()
        fresh.pop()
        before = [(weight.detach().clone(), weight.grad.clone()) for weight in weights]
        step()
        for weight, (_, gradient) in zip(weights, before, strict=True):
            weight.grad.copy_(gradient)  # ours uses gradients up
        step()
        return [weight.detach() - start for weight, (start, _) in zip(weights, before, strict=True)]

    return call


def one_by_one(weights: list[Any], config: OptimizerConfig) -> Callable[[], None]:
    """LARS as its formula reads, parameter by parameter: the reference."""
    momentum = [torch.zeros_like(w) for w in weights]

    @torch.no_grad()
    def step() -> None:
        for weight, buffer in zip(weights, momentum, strict=True):
            gradient = weight.grad
            if weight.dim() > 1:
                gradient = gradient + config.weight_decay * weight
                gradient = gradient * (config.trust_coefficient * weight.norm() / gradient.norm())
            buffer.mul_(config.momentum).add_(gradient)
            weight.sub_(LEARNING_RATE * buffer)

    return step


def package_peer(name: str, module: str, drawn: Drawn, **options: Any) -> Candidate:
    """An optimizer class of another package, with weight decay and trust ratio on matrices and filters only."""
    config = OptimizerConfig()
    try:
        imported = import_module(module)
    except Exception as error:
        return absent(name, not_imported(error))
    optimizer_class = getattr(imported, "LARS", None) or imported.Lars
    weights = parameters(drawn)
    adapted, plain = [w for w in weights if w.dim() > 1], [w for w in weights if w.dim() <= 1]
    groups = [{"params": adapted, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = optimizer_class(groups, lr=LEARNING_RATE, momentum=config.momentum, **options)
    return Candidate(name, moved(optimizer.step, weights))


def test_lars(race: Any, device: torch.device, drawn: Drawn) -> None:
    config = OptimizerConfig()
    weights, plain = parameters(drawn), parameters(drawn)
    lars = Lars([(str(i), weight) for i, weight in enumerate(weights)], config)
    candidates = [
        Candidate("vito_fast", moved(lambda: lars.step(LEARNING_RATE), weights), "ours"),
        Candidate("reference", moved(one_by_one(plain, config), plain), "reference"),
        not_compiled("takes over 20 s to compile, and may be the fastest then: not raced yet"),
        package_peer("timm", "timm.optim.lars", drawn, trust_coeff=config.trust_coefficient),
        package_peer("lightly", "lightly.utils.lars", drawn, trust_coefficient=config.trust_coefficient),
    ]
    count = sum(weight.numel() for weight in weights)
    whole, gradient, momentum = (torch.zeros(count, device=device) for _ in range(3))
    candidates.append(traffic(updates=[(whole, gradient), (momentum, momentum)]))

    def truth() -> Result:
        doubles = parameters(drawn, torch.float64)
        return moved(one_by_one(doubles, config), doubles)()

    amount = Work(bytes=5.0 * 4 * count, items=count, unit="parameters")
    race("lars", {"parameters": count}, candidates, truth=truth, work=amount, once=True)


def test_target(race: Any, device: torch.device) -> None:
    """target <- tau target + (1 - tau) online."""
    torch.manual_seed(0)
    model = VitoModel(ModelConfig(heads="per_level", predictor=True)).to(device)
    for parameter in model.online.parameters():
        parameter.data.add_(0.01)
    target, online = model.averaged_pairs()
    copies = [[t.detach().clone() for t in target] for _ in range(2)]

    @torch.no_grad()
    def by_loop(averages: list[Tensor]) -> None:
        for mine, new in zip(averages, online, strict=True):
            mine.mul_(TAU).add_(new, alpha=1 - TAU)

    @torch.no_grad()
    def by_foreach(averages: list[Tensor]) -> None:
        torch._foreach_mul_(averages, TAU)
        torch._foreach_add_(averages, online, alpha=1 - TAU)

    def truth() -> Result:
        starts = [t.detach().double() for t in target]
        return [TAU * start + (1 - TAU) * new.detach().double() for start, new in zip(starts, online, strict=True)]

    count = sum(t.numel() for t in target)
    whole = torch.zeros(count, device=device)
    candidates = [
        Candidate("vito_fast", once(lambda: model.update_target(TAU), target), "ours"),
        Candidate("reference", once(lambda: by_loop(copies[0]), copies[0]), "reference"),
        not_compiled("takes 13 s to compile"),
        Candidate("torch foreach mul + add", once(lambda: by_foreach(copies[1]), copies[1])),
        traffic(updates=[(whole, torch.zeros_like(whole))]),
    ]
    amount = Work(bytes=3.0 * 4 * count, items=count, unit="parameters")
    race("target_average", {"parameters": count}, candidates, truth=truth, work=amount, once=True)
