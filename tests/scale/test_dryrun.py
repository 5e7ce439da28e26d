"""The dry run counts what really happens, and finds what a GPU would stumble over."""

import dataclasses
import functools
from unittest import mock

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import vito_kernels
from vito_fast.config import Config, ModelConfig, SamplerConfig, TrainConfig
from vito_fast.config_files import load_config, preset_files
from vito_fast.model import VitoModel
from vito_fast.model.norm import BatchNorm
from vito_fast.model.pair import Branch
from vito_fast.plan.dryrun import dry_run, graph_breaks
from vito_fast.plan.op_counter import OpCounter, Problem, fake_cuda, to_fake_cuda, total
from vito_fast.train import trainer as step
from vito_fast.train.distributed import World
from vito_kernels import info_nce

SMALL = Config(
    sampler=SamplerConfig(size=64, views=2),
    model=ModelConfig(backbone="resnet18", projector_hidden=64, projector_out=32, attention_hidden=16),
    train=TrainConfig(batch_size=8, dtype="bfloat16"),
)


def with_train(config=SMALL, **changes):
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **changes))


def test_counts_the_arithmetic_of_a_real_step():
    config = with_train(dtype="float32", device="cpu")
    trainer = step.Trainer(config, World(0, 1, 1, torch.device("cpu")), 5)
    views = tuple(torch.randn(8, 3, 64, 64) for _ in range(2))
    with FlopCounterMode(display=False) as counter:
        trainer.step(views, torch.arange(8), measure=False)
    dry = dry_run(config)
    assert dry.problems == ()
    products = sum(dry.total(kind=kind)[0] for kind in ("convolution", "matmul", "fused"))
    assert products == counter.get_total_flops()
    loss = sum(dry.total(phase)[0] for phase in ("loss", "backward", "loss, backward"))
    pairs = 2
    assert dry.total("loss", "fused")[0] == pairs * 4 * 8 * 8 * 32
    assert loss > 0


def test_an_op_without_registered_flops_is_an_error(monkeypatch):
    packet = torch.ops.vito_kernels.normalize
    monkeypatch.delitem(flop_registry, packet)
    with fake_cuda(), OpCounter(), pytest.raises(Problem, match="has no flop formula"):
        vito_kernels.normalize(torch.ones(2, 3, device="cuda"))


def test_gradients_have_the_shapes_and_dtypes_of_autograds():
    def net():
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(288, 5)
        )

    real = net()
    out = real(torch.randn(4, 3, 8, 8))
    (out.square().mean() + out[:, :2].sum()).backward()
    with torch.device("meta"):
        fake = net()
    with fake_cuda(), OpCounter() as counter:
        to_fake_cuda(fake)
        with counter.saving():
            out = fake(torch.empty(4, 3, 8, 8, device="cuda"))
            loss = out.square().mean() + out[:, :2].sum()
        counter.backward((loss, torch.ones_like(loss)))
    for a, b in zip(real.parameters(), fake.parameters(), strict=True):
        assert (a.grad.shape, a.grad.dtype, "cuda") == (b.grad.shape, b.grad.dtype, b.grad.device.type)


def test_memory_by_hand():
    with torch.device("meta"):
        layer = nn.Linear(256, 512, bias=False)
    with fake_cuda(), OpCounter() as counter:
        with counter.in_phase("parameters"):
            to_fake_cuda(layer)
        with counter.in_phase("input"):
            x = torch.empty(64, 256, device="cuda")
        with counter.in_phase("forward"), counter.saving():
            out = layer(x).relu().square().sum()
        assert counter.live["parameters"] == 256 * 512 * 4
        assert counter.live["input"] == 64 * 256 * 4
        with counter.in_phase("backward"):
            counter.backward((out, torch.ones_like(out)))
        # relu keeps its result, which square keeps as well: one storage; the product of the matrices is gone.
        assert counter.saved == {"forward": 64 * 512 * 4, "input": 64 * 256 * 4}
        assert counter.peak_phase == "backward"
        del out
        assert counter.live["forward"] == 0
        assert counter.live["gradients"] == 256 * 512 * 4


def test_a_backward_frees_what_it_has_used():
    """The peak of a chain is its saved activations and little more, not twice them."""
    with fake_cuda(), OpCounter() as counter:
        with counter.in_phase("x"):
            x = torch.empty(1024, 1024, device="cuda", requires_grad=True)
        with counter.in_phase("forward"), counter.saving():
            y = x
            for _ in range(20):
                y = torch.tanh(y)
            loss = y.sum()
        with counter.in_phase("backward"):
            counter.backward((loss, torch.ones_like(loss)))
    assert sum(counter.peak.values()) <= (1 + 20 + 2) * 4 * 1024**2 + 64


def test_micro_batches_and_recomputation_trade_arithmetic_for_memory():
    config = with_train(dtype="float32")  # bfloat16 would save copies of the weights as well
    plain = dry_run(config)
    parts = dry_run(with_train(config, micro_batches=4))
    again = dry_run(dataclasses.replace(config, model=dataclasses.replace(SMALL.model, checkpoint_activations=True)))
    for dry in (plain, parts, again):
        assert dry.problems == ()
    assert parts.total("online")[0] == parts.total("online, first pass")[0] == plain.total("online")[0]
    assert sum(parts.saved.values()) == pytest.approx(sum(plain.saved.values()) / 4, rel=0.05)
    assert sum(again.saved.values()) < 0.6 * sum(plain.saved.values())
    assert again.total()[0] == pytest.approx(plain.total()[0] + plain.total("online", "convolution")[0], rel=0.1)


def test_a_norm_with_its_residual_and_relu_moves_what_its_passes_do():
    size, small = 2 * 4 * 64 * 8 * 8, 4 * 64  # bytes of a map, and of a number for each channel
    with torch.device("meta"):
        norm, relu = BatchNorm(64), nn.ReLU(inplace=True)
    with fake_cuda(), OpCounter() as counter:
        to_fake_cuda(norm)
        new = functools.partial(torch.empty, 4, 64, 8, 8, dtype=torch.bfloat16, device="cuda")
        x, shortcut = (new(memory_format=torch.channels_last, requires_grad=True) for _ in range(2))
        with counter.in_phase("forward"), counter.saving():
            y = norm(x, shortcut, relu)
        with counter.in_phase("backward"):
            counter.backward((y, y.detach()))
    assert y.stride() == x.stride()
    assert 4 * size <= total(counter.ops, "forward", "fused")[1] <= 4 * size + 16 * small
    assert 7 * size <= total(counter.ops, "backward", "fused")[1] <= 7 * size + 32 * small
    assert counter.saved["forward"] <= size + 4 * small, "y beside x, mean and deviation; no mask"


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(("query", "key", "passes"), [(0, 0, (2, 0)), (1, 0, (4, 0)), (0, 1, (2, 4)), (1, 1, (4, 4))])
def test_a_loss_counts_the_products_of_its_passes(query, key, passes, autocast):
    """Of 64 queries with 32 keys of 16 numbers, with gradient of the queries, the keys, both or neither."""
    with fake_cuda(), OpCounter() as counter:
        q, k = (torch.empty(n, 16, device="cuda", requires_grad=bool(r)) for n, r in ((64, query), (32, key)))
        own = torch.empty(64, dtype=torch.int64, device="cuda")
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast), counter.in_phase("forward"), counter.saving():
            loss = info_nce(q, k, positive=own)
        if loss.requires_grad:
            with counter.in_phase("backward"):
                counter.backward((loss, torch.ones_like(loss)))
    counted = [total(counter.ops, phase, "fused")[0] / (64 * 32 * 16) for phase in ("forward", "backward")]
    assert counted == list(passes)


@pytest.mark.parametrize(
    ("add", "says"),
    [
        (lambda q: q[0].new_ones(3) + torch.ones(3), "device mismatch"),
        (lambda q: q[0].sum().item(), "host waits"),
        (lambda q: q[0].sum().cpu(), "host waits"),
        (lambda q: q[0][q[0] > 0], "host waits"),
        (lambda q: bool((q[0] > 0).any()), "host waits"),
    ],
)
def test_finds_what_a_gpu_would_stumble_over(add, says):
    honest = step.objective

    def objective(queries, keys, config):
        add(queries)
        return honest(queries, keys, config)

    with mock.patch.object(step, "objective", objective):
        problems = dry_run(SMALL).problems
    assert len(problems) == 1
    assert says in problems[0]
    assert "test_dryrun.py" in problems[0]  # where, not only what


def breaking(owner, name):
    """``owner.name`` with a graph break before it."""
    honest = getattr(owner, name)

    def method(self, *given):
        torch._dynamo.graph_break()
        return honest(self, *given)

    return mock.patch.object(owner, name, method)


def test_lars_reads_and_writes_its_tensors_in_seven_passes():
    """The norms read weights and gradients of more than one dimension; the update reads three lists and writes two."""
    with torch.device("meta"):
        learned = [p for p in VitoModel(SMALL.model).online.parameters() if p.requires_grad]
    adapted, every = sum(p.numel() for p in learned if p.dim() > 1), sum(p.numel() for p in learned)
    dry = dry_run(SMALL)
    assert sum(count for op, count in dry.ops.items() if (op.phase, op.kind) == ("optimizer", "fused")) == 2
    moved = dry.total("optimizer", "fused")[1]
    assert moved == pytest.approx(8 * adapted + 20 * every, rel=1e-3)
    assert moved > 8 * adapted + 20 * every  # and the sums of squares of the chunks


def test_finds_graph_breaks():
    assert graph_breaks(SMALL) == graph_breaks(SMALL, world=8) == []
    with breaking(Branch, "forward"), breaking(VitoModel, "averaged_pairs"):
        tiny = dataclasses.replace(SMALL, model=dataclasses.replace(SMALL.model, backbone="timm:test_resnet"))
        problems = dry_run(with_train(tiny, compile=True, cuda_graphs=True)).problems
    for part in ("online branch", "target branch", "target's average"):
        assert any(problem.startswith(f"graph break in the {part}: ") for problem in problems), part


def test_a_read_of_the_gpu_between_ops_is_refused():
    with fake_cuda(), OpCounter(), pytest.raises(Problem, match="host waits"):
        torch.empty(3, device="cuda").to("cpu")


@pytest.mark.parametrize("preset", preset_files(), ids=lambda p: p.stem)
def test_every_preset_runs_dry(preset):
    config = load_config(preset)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, backbone="resnet18", drop_path=0))
    config = with_train(config, micro_batches=min(2, config.train.micro_batches), compile=False)
    assert dry_run(config, clips=8, world=2).problems == ()
