"""LARS against a plain transcription of its formula; the schedules against theirs."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from vito_fast.config import Config, ModelConfig, OptimizerConfig, ScheduleConfig, TrainConfig
from vito_fast.model.pair import Branch
from vito_fast.train import optim
from vito_fast.train.optim import AdamW, Gradients, Lars, Schedule, layer_scales
from vito_kernels import lars
from vito_kernels._core.lazy_triton import record_launches


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


def test_a_gpu_takes_the_step_in_two_launches(monkeypatch):
    """What they compute is tested beside them; here they are only recorded."""
    monkeypatch.setattr(lars, "use_triton", lambda tensor: tensor.dtype == torch.float32)
    config = OptimizerConfig(momentum=0.8, weight_decay=0.3, trust_coefficient=0.02)
    net, launched, finite = network().float(), [], torch.tensor(True)
    optimizer = Lars(net.named_parameters(), config)
    before = [p.detach().clone() for p in net.parameters()]
    with record_launches(lambda kernel, grid, *given, **_: launched.append((kernel.__name__, grid, given))):
        optimizer.step(0.1, finite)
    adapted, every = len(optimizer.adapted), len(optimizer.named)
    (norms, norms_grid, _), (update, update_grid, given) = launched
    assert (norms, norms_grid) == ("lars_norms_kernel", (adapted,))
    assert (update, update_grid) == ("lars_update_kernel", (every,))
    assert given[3] is finite
    assert given[4:] == (every, adapted, 0.1, 0.8, 0.3, 0.02)
    tensors = [*optimizer.parameters, *(p.grad for _, p in optimizer.named), *optimizer.momentum.values()]
    assert given[0].flatten().tolist() == [t.data_ptr() for t in tensors]
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), before, strict=True))


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


def small_branch(**model):
    torch.manual_seed(0)
    return Branch(ModelConfig(projector_hidden=8, projector_out=4, attention_hidden=4, **model), predictor=False)


def filled(branch, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in branch.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


def test_adamw_is_torchs_and_leaves_skipped_steps_out():
    config = OptimizerConfig(name="adamw", weight_decay=0.1, betas=(0.8, 0.9))
    ours, theirs = small_branch(backbone="timm:test_vit3"), small_branch(backbone="timm:test_vit3")
    optimizer = AdamW(ours, config)
    named = [p for p in theirs.parameters() if p.requires_grad]
    plain = {"params": [p for p in named if p.dim() <= 1], "weight_decay": 0.0}
    peer = torch.optim.AdamW([{"params": [p for p in named if p.dim() > 1]}, plain], betas=(0.8, 0.9), weight_decay=0.1)
    for step, finite in enumerate((None, torch.tensor(True), torch.tensor(False), torch.tensor(True))):
        filled(ours, step)
        if finite is not None and not finite:
            next(p for p in ours.parameters() if p.grad is not None).grad.fill_(torch.nan)
        optimizer.step(0.01 * (step + 1), finite)
        if finite is None or finite:
            filled(theirs, step)
            for group in peer.param_groups:
                group["lr"] = 0.01 * (step + 1)
            peer.step()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
    again = AdamW(small_branch(backbone="timm:test_vit3"), config)
    again.load_state_dict(optimizer.state_dict())
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in optimizer.state_dict().items())
    with pytest.raises(ValueError, match="momentum of other parameters"):
        again.load_state_dict({})


def test_layer_decay_slows_the_early_layers_and_not_the_heads():
    """Adam's first update is the learning rate itself, so each layer moves by its own."""
    branch = small_branch(backbone="timm:test_vit3")
    before = {name: p.detach().clone() for name, p in branch.named_parameters()}
    optimizer = AdamW(branch, OptimizerConfig(name="adamw", weight_decay=0.0, layer_decay=0.5))
    filled(branch, 0)
    optimizer.step(0.01)
    moved = {name: (p - before[name]).abs().median().item() for name, p in branch.named_parameters()}
    scales = layer_scales(branch.backbone, 0.5)
    names = ("patch_embed.proj", "blocks.0.attn.qkv", "blocks.1.attn.qkv", "blocks.2.attn.qkv")
    by_depth = [scales[f"body.{name}.weight"] for name in names]
    assert by_depth == sorted(by_depth)
    assert by_depth[-1] == 2 * by_depth[-2]
    for name, p in branch.named_parameters():
        share = scales.get(name.removeprefix("backbone."), 1.0) if p.requires_grad else 0.0
        assert moved[name] == pytest.approx(0.01 * share, rel=1e-3), name
    assert scales["body.blocks.2.attn.qkv.weight"] <= 1
    with pytest.raises(ValueError, match=r"optimizer\.layer_decay must be in \(0, 1\], and 1 with lars"):
        OptimizerConfig(layer_decay=0.5)


def test_clipping_bounds_the_norm_and_leaves_smaller_gradients():
    branch = small_branch(backbone="timm:test_vit3")
    gradients = Gradients([(name, p) for name, p in branch.named_parameters() if p.requires_grad])
    filled(branch, 0)
    norm = gradients.gradient_norm()
    gradients.clip(norm, float(norm) * 2)
    torch.testing.assert_close(gradients.gradient_norm(), norm)
    gradients.clip(norm, 1.5)
    torch.testing.assert_close(gradients.gradient_norm(), torch.tensor(1.5))
