"""Batch norm over ranks as on CUDA: how its steps are put together, with their formulas in place of the kernels."""

import pytest
import torch
import torch.distributed as dist
from ranks import spawn
from torch import nn

from vito_fast.errors import UserError
from vito_fast.model.norm import set_batch_norms
from vito_kernels.distributed.sync_batch_norm import SyncBatchNormFunction, sync_batch_norm

EPS, MOMENTUM, SIZES = 1e-5, 0.1, (3, 5)


def run(norm, x, residual, slope):
    """(output, its gradients, running statistics) of ``norm``, a function of (x, weight, bias, residual, mean, var)."""
    weight, bias = torch.linspace(0.5, 2, 6).double().requires_grad_(), torch.ones(6).double().requires_grad_()
    running = torch.zeros(6).double(), torch.ones(6).double()
    given = [x.requires_grad_(), weight, bias] + ([] if residual is None else [residual.requires_grad_()])
    y = norm(x, weight, bias, residual, *running)
    gradients = dict(zip("xwbr", torch.autograd.grad((y * slope).sum(), given), strict=False))
    return y.detach(), gradients, running


def rank_equals_whole(rank, joined, relu, groups):
    generator = torch.Generator().manual_seed(0)
    x, residual, slope = torch.randn(3, groups * sum(SIZES), 6, 4, 2, generator=generator, dtype=torch.float64)
    x = x * 3 + 5 + torch.arange(groups).repeat_interleave(sum(SIZES)).view(-1, 1, 1, 1)
    first, last = sum(SIZES[:rank]), sum(SIZES[: rank + 1])
    mine = torch.cat([torch.arange(first, last) + group * sum(SIZES) for group in range(groups)])

    def whole(x, weight, bias, residual, mean, variance):
        shares = x.chunk(groups)
        y = [nn.functional.batch_norm(s, mean, variance, weight, bias, True, MOMENTUM, EPS) for s in shares]
        y = torch.cat(y)
        y = y if residual is None else y + residual
        return y.relu() if relu else y

    y, expected, running = run(whole, x.clone(), residual.clone() if joined else None, slope)
    found, gradients, moved = run(
        lambda *given: SyncBatchNormFunction.apply(*given, MOMENTUM, EPS, relu, groups),
        *(x[mine].clone(), residual[mine].clone() if joined else None, slope[mine]),
    )
    for parameter in (gradients["w"], gradients["b"]):  # DDP adds up what each rank finds for the parameters
        dist.all_reduce(parameter)
    expected = {name: g[mine] if name in "xr" else g for name, g in expected.items()}
    torch.testing.assert_close((found, gradients, moved), (y[mine], expected, running), rtol=1e-9, atol=1e-10)

    def on_cpu(x, weight, bias, residual, mean, variance):
        options = {"momentum": MOMENTUM, "eps": EPS, "residual": residual, "relu": relu, "groups": groups}
        return sync_batch_norm(x, weight, bias, mean, variance, **options)

    found, gradients, moved = run(on_cpu, *(x[mine].clone(), residual[mine].clone() if joined else None, slope[mine]))
    for parameter in (gradients["w"], gradients["b"]):
        dist.all_reduce(parameter)
    torch.testing.assert_close((found, gradients, moved), (y[mine], expected, running), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("joined", "relu"), [(False, False), (False, True), (True, True), (True, False)])
def test_unequal_ranks_equal_one_batch(joined, relu):
    spawn(rank_equals_whole, 2, joined, relu, 1)


def test_groups_of_unequal_ranks_equal_a_batch_each():
    spawn(rank_equals_whole, 2, True, True, 3)


def bfloat16_equals_whole(rank, clips):
    """On the CPU: statistics of values that bfloat16 has, but whose sums and number it has not."""
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(2 * clips, 6, 4, 2, generator=generator) + 5).bfloat16()
    ranks, whole = set_batch_norms(nn.BatchNorm2d(6), sync=True), nn.BatchNorm2d(6)
    expected = whole(x.float())
    mine = x[rank * clips : (rank + 1) * clips].clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found = ranks(mine)
    found.float().square().sum().backward()
    assert found.dtype == mine.grad.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected[rank * clips : (rank + 1) * clips], rtol=0.01, atol=0.01)
    torch.testing.assert_close(dict(ranks.named_buffers()), dict(whole.named_buffers()), rtol=1e-5, atol=1e-5)


def test_ranks_on_the_cpu_keep_statistics_of_bfloat16_in_float32():
    spawn(bfloat16_equals_whole, 2, 43)


@pytest.mark.parametrize("training", [True, False])
def test_timm_s_norms_keep_their_activation(training):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    network = timm.create_model("test_efficientnet", num_classes=0).double().train(training)
    kinds = {type(module).__name__ for module in network.modules()}
    assert "BatchNormAct2d" in kinds
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    expected = network(x)
    torch.testing.assert_close(set_batch_norms(network, sync=True)(x), expected)


def test_a_norm_that_does_more_is_refused():
    class Mine(nn.BatchNorm2d):
        pass

    with pytest.raises(UserError, match="Mine of this network takes no statistics over ranks"):
        set_batch_norms(nn.Sequential(nn.Linear(2, 2), Mine(2)), sync=True)
