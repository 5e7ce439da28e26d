"""Batch norm as PyTorch ops, on the CPU path."""

import importlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from vito_kernels import batch_norm, reference

module = importlib.import_module("vito_kernels.batch_norm.op")
AFTER = [(False, False), (False, True), (True, False), (True, True)]
OPTIONS = {"momentum": 0.1, "eps": 1e-5}


def make(dtype=torch.float64, shape=(3, 5, 2, 4)):
    torch.manual_seed(0)
    x, residual = (torch.randn(shape, dtype=dtype).contiguous(memory_format=torch.channels_last) for _ in range(2))
    wide = torch.promote_types(dtype, torch.float32)
    weight, bias = torch.rand(shape[1], dtype=wide) + 0.5, torch.randn(shape[1], dtype=wide)
    return x, weight, bias, residual


def running(weight):
    return torch.zeros_like(weight), torch.ones_like(weight)


@pytest.mark.parametrize(("joined", "relu"), AFTER)
def test_on_the_cpu_it_is_torchs(joined, relu):
    x, weight, bias, residual = make(torch.float32)
    ours, theirs = running(weight), running(weight)
    last = residual if joined else None
    y = batch_norm(x, weight, bias, *ours, **OPTIONS, residual=last, relu=relu)
    expected = torch.nn.functional.batch_norm(x, *theirs, weight, bias, True, 0.1, 1e-5)
    expected = expected + residual if joined else expected
    assert torch.equal(y, expected.relu() if relu else expected)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    specified = running(weight)
    torch.testing.assert_close(
        reference.batch_norm(x, weight, bias, *specified, **OPTIONS, residual=last, relu=relu), y
    )
    torch.testing.assert_close(specified, ours)


@pytest.mark.parametrize(("joined", "relu"), AFTER)
def test_gradients_of_the_steps(joined, relu):
    """The ops in place of torch's, by their formulas."""
    x, weight, bias, residual = make()

    def norm(x, weight, bias, *last):
        statistics = module.stats_op(x.detach(), *running(weight.detach()), 0.1, 1e-5)
        return module._apply(x, weight, bias, last[0] if last else None, *statistics, relu)

    given = [t.requires_grad_() for t in (x, weight, bias, residual)[: 4 if joined else 3]]
    assert torch.autograd.gradcheck(norm, given)
    expected = reference.batch_norm(*given[:3], *running(weight), **OPTIONS, residual=(*given, None)[3], relu=relu)
    torch.testing.assert_close(norm(*given), expected)
    (g,) = torch.autograd.grad(norm(*given).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(g.sum(), x)


@pytest.mark.parametrize(("joined", "relu"), AFTER)
def test_gradients_of_the_steps_by_groups(joined, relu):
    x, weight, bias, residual = make(shape=(6, 5, 2, 2))

    def norm(x, weight, bias, *last):
        statistics = module.stats_op(x.detach(), *running(weight.detach()), 0.1, 1e-5, 3)
        return module._apply(x, weight, bias, last[0] if last else None, *statistics, relu)

    given = [t.requires_grad_() for t in (x, weight, bias, residual)[: 4 if joined else 3]]
    assert torch.autograd.gradcheck(norm, given)
    options = {**OPTIONS, "residual": (*given, None)[3], "relu": relu, "groups": 3}
    torch.testing.assert_close(norm(*given), reference.batch_norm(*given[:3], *running(weight), **options))
    torch.testing.assert_close(norm(*given), batch_norm(*given[:3], *running(weight), **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    x, weight, bias, residual = make(dtype)
    moved = running(weight)
    torch.library.opcheck(module.local_stats_op, (x,))
    for groups in (1, 3):
        torch.library.opcheck(module.stats_op, (x, *moved, 0.1, 1e-5, groups))
        torch.library.opcheck(module.local_stats_op, (x, groups))
    parts = torch.cat([module.local_stats_op(x), module.local_stats_op(residual)])
    for statistics in (moved, (None, None)):
        torch.library.opcheck(module.merge_stats_op, (parts, *statistics, 0.1, 1e-5))
    mean, invstd, count = module.stats_op(x, *moved, 0.1, 1e-5)
    by_group = module.stats_op(x, *moved, 0.1, 1e-5, 3)
    for last, stats in ((residual, by_group), (residual, (mean, invstd, count)), (None, by_group)):
        learned = [t.clone().requires_grad_() for t in (x, weight, bias)]
        torch.library.opcheck(module.forward_op, (*learned, last, *stats, True))
        y = module.forward_op(x, weight, bias, last, *stats, True) if last is not None else None
        torch.library.opcheck(module.sums_op, (residual, x, y, weight, bias, *stats[:2], True))
    for stats in (by_group, (mean, invstd, count)):
        sums = module.sums_op(residual, x, None, weight, bias, *stats[:2], True)[0]
        torch.library.opcheck(module.input_grad_op, (residual, x, weight, bias, *stats, sums, True))


def test_parts_merge_to_the_whole():
    x, weight, _, _ = make(shape=(7, 5, 3, 2))
    whole, merged = running(weight), running(weight)
    expected = module.stats_op(x, *whole, 0.1, 1e-5)
    found = module.merge_stats(torch.cat([module.local_stats(x[:2]), module.local_stats(x[2:])]), *merged, 0.1, 1e-5)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(merged, whole)


def test_what_the_kernels_take():
    """On a GPU that is not there: channels_last maps and rows, beside float32 parameters."""
    with FakeTensorMode():
        map_, rows = torch.empty(4, 8, 3, 3, device="cuda"), torch.empty(4, 8, device="cuda", dtype=torch.bfloat16)
        fit = torch.empty_like(map_, memory_format=torch.channels_last)
        c, half = torch.empty(8, device="cuda"), torch.empty(8, device="cuda", dtype=torch.bfloat16)
        assert module.can_fuse(fit, c, c, c, c)
        assert module.can_fuse(fit, c, c, c, c, fit)
        assert module.can_fuse(rows, c, c, c, c)
        assert not module.can_fuse(map_, c, c, c, c)
        assert not module.can_fuse(fit, c, c, c, c, map_)
        assert not module.can_fuse(fit, c, c, c, c, fit.bfloat16())
        assert not module.can_fuse(fit, half, c, c, c)
        for other in (c[:4], torch.empty(8, 2, device="cuda")[:, 0], c[:1].expand(8), torch.empty(8)):
            assert not any(module.can_fuse(fit, *(other if i == j else c for j in range(4))) for i in range(4))
        assert not module.can_fuse(fit, c, c, c, c, torch.empty_like(fit, device="cpu"))
        assert not module.can_fuse(fit, c, c, None, None)
        assert not module.can_fuse(fit.double(), c, c, c, c)
        assert not module.can_fuse(rows[:1], c, c, c, c)
        y = batch_norm(fit, c, c, c, c, **OPTIONS, residual=fit, relu=True)
        assert (y.shape, y.stride(), y.dtype) == (fit.shape, fit.stride(), fit.dtype)


def test_compiled_code_keeps_torchs(monkeypatch):
    monkeypatch.setattr(module, "use_triton", lambda x: True)  # as if it were on a GPU
    x, weight, bias, residual = make(torch.float32)

    def norm(x, residual):
        return batch_norm(x, weight, bias, *running(weight), **OPTIONS, residual=residual, relu=True)

    compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")(x, residual)
    expected = torch.nn.functional.batch_norm(x, *running(weight), weight, bias, True, 0.1, 1e-5) + residual
    torch.testing.assert_close(compiled, expected.relu())


def test_wrong_input_is_named():
    x, weight, bias, residual = make(torch.float32)
    with pytest.raises(ValueError, match=r"\(3, 5, 2, 4\).*\(1, 5, 2, 4\)"):
        batch_norm(x, weight, bias, *running(weight), **OPTIONS, residual=residual[:1])
    with pytest.raises(ValueError, match="3 rows do not divide into 2 groups"):
        batch_norm(x, weight, bias, *running(weight), **OPTIONS, groups=2)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        batch_norm(x[:1, :, 0, 0], weight, bias, *running(weight), **OPTIONS)
