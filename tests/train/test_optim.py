"""LARS against a plain transcription of its formula; the schedules against theirs."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from vito_fast.config import Config, OptimizerConfig, ScheduleConfig, TrainConfig
from vito_fast.train import optim
from vito_fast.train.optim import Lars, Schedule


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5)).double()


def plain_lars(weights, gradients, momentum, lr, config):
    """One parameter at a time, in the order of the ancestors' chain."""
    for name, w in weights.items():
        g = gradients[name]
        if w.dim() > 1:
            g = g + config.weight_decay * w
            if w.norm() > 0 and g.norm() > 0:
                g = g * (config.trust_coefficient * w.norm() / g.norm())
        momentum[name] = config.momentum * momentum[name] + g
        weights[name] = w - lr * momentum[name]


@pytest.mark.parametrize("chunk", [1 << 20, 90], ids=["one chunk", "three chunks"])
def test_lars_equals_the_formula_over_steps(chunk, monkeypatch):
    monkeypatch.setattr(optim, "CHUNK", chunk)
    config = OptimizerConfig(weight_decay=1e-2)
    net = network()
    optimizer = Lars(net.named_parameters(), config)
    weights = {n: p.detach().clone() for n, p in net.named_parameters()}
    momentum = {n: torch.zeros_like(w) for n, w in weights.items()}
    for step in range(5):
        x = torch.randn(6, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        for p in net.parameters():
            p.grad = None
        net(x).square().sum().backward()
        gradients = {n: p.grad.clone() for n, p in net.named_parameters()}
        plain_lars(weights, gradients, momentum, 0.1 * step, config)
        optimizer.step(0.1 * step, torch.tensor(True) if step % 2 else None)
        for name, p in net.named_parameters():
            torch.testing.assert_close(p.detach(), weights[name], rtol=1e-12, atol=1e-14)
    assert len(optimizer.chunks) == (1 if chunk > 90 else 3)
    assert {n for n, p in optimizer.plain} == {"1.weight", "1.bias", "3.bias"}


def test_zero_weights_and_zero_gradients_have_trust_ratio_one():
    weight = nn.Parameter(torch.zeros(2, 2))
    optimizer = Lars([("w", weight)], OptimizerConfig(weight_decay=0))
    weight.grad = torch.ones(2, 2)
    optimizer.step(0.5)
    assert torch.equal(weight.detach(), torch.full((2, 2), -0.5))


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_skipped_step_changes_nothing(poison):
    net = network()
    optimizer = Lars(net.named_parameters(), OptimizerConfig())
    net(torch.randn(6, 3, 4, 4, dtype=torch.float64)).square().sum().backward()
    optimizer.step(0.1)
    before = [p.detach().clone() for p in net.parameters()] + [m.clone() for m in optimizer.momentum.values()]
    for p in net.parameters():
        p.grad = torch.full_like(p, poison)
    assert not torch.isfinite(optimizer.gradient_norm())
    optimizer.step(0.1, torch.isfinite(optimizer.gradient_norm()))
    after = [p.detach() for p in net.parameters()] + list(optimizer.momentum.values())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_momentum_of_another_model_is_refused():
    optimizer = Lars(network().named_parameters(), OptimizerConfig())
    with pytest.raises(ValueError, match="other parameters"):
        optimizer.load_state_dict({"x": torch.zeros(1)})


def test_schedules_follow_the_ancestors():
    config = Config(
        optimizer=OptimizerConfig(base_lr=0.3),
        schedule=ScheduleConfig(epochs=10, warmup_epochs=2, base_ema=0.99),
        train=TrainConfig(batch_size=512),
    )
    schedule = Schedule(config, steps_per_epoch=5)
    assert (schedule.total_steps, schedule.warmup_steps) == (50, 10)
    assert schedule.learning_rate(0) == 0
    assert schedule.learning_rate(5) == pytest.approx(0.3)  # half of base * 512/256
    assert schedule.learning_rate(10) == pytest.approx(0.6)
    assert schedule.learning_rate(30) == pytest.approx(0.3)  # halfway down the cosine
    assert schedule.learning_rate(50) == pytest.approx(0)
    assert schedule.tau(0) == pytest.approx(0.99)
    assert schedule.tau(25) == pytest.approx(0.995)
    assert schedule.tau(50) == 1
    no_warmup = Schedule(replace(config, schedule=ScheduleConfig(epochs=1, warmup_epochs=0)), 5)
    assert no_warmup.learning_rate(0) == pytest.approx(0.6)
