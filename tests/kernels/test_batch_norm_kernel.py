"""Batch norm's Triton kernels against float64: at most twice the error of torch in the same precision."""

import importlib

import pytest
import torch

from vito_kernels import batch_norm, reference

module = importlib.import_module("vito_kernels.batch_norm.op")
kernels = importlib.import_module("vito_kernels.batch_norm.triton_kernels")
SHAPES = [(3, 64, 5, 6), (3, 130, 11, 7), (60, 20), (2, 16, 3, 3), (5, 3, 7, 9), (2, 256, 1, 1)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ("y", "running mean", "running variance", "dx", "d weight", "d bias", "d residual")
AFTER = [(False, False), (False, True), (True, False), (True, True)]


def make(shape, dtype, device, mean=1.0, std=2.0):
    torch.manual_seed(0)
    x = to_rows((torch.randn(shape, device=device) * std + mean).to(dtype))
    weight, bias = torch.rand(shape[1], device=device) + 0.5, torch.randn(shape[1], device=device)
    return x, weight, bias, to_rows(torch.randn(shape, device=device).to(dtype))


def to_rows(x):
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def results(norm, x, weight, bias, residual, relu, dtype=None, momentum=0.1, **options):
    """Output, running statistics and gradients of ``norm``, with inputs in ``dtype``."""
    given = [t.detach().to(dtype or t.dtype).requires_grad_() for t in (x, weight, bias, residual) if t is not None]
    running = [torch.full_like(weight, v, dtype=dtype or weight.dtype) for v in (0.5, 1.5)]
    last = given[3] if residual is not None else None
    y = norm(*given[:3], *running, momentum=momentum, eps=1e-5, residual=last, relu=relu, **options)
    g = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x.dtype)  # the same for every dtype
    return [y.detach(), *running, *torch.autograd.grad(y, given, to_rows(g.to(y.device, y.dtype)))]


def plain(x, weight, bias, running_mean, running_var, *, momentum, eps, residual=None, relu=False, groups=1):
    running = running_mean, running_var
    y = [torch.nn.functional.batch_norm(s, *running, weight, bias, True, momentum, eps) for s in x.chunk(groups)]
    y = torch.cat(y)
    y = y if residual is None else y + residual
    return torch.relu(y) if relu else y


def assert_as_exact_as_torch(x, weight, bias, residual, relu, **options):
    ours = results(batch_norm, x, weight, bias, residual, relu, **options)
    exact = results(reference.batch_norm, x, weight, bias, residual, relu, torch.float64, **options)
    torchs = results(plain, x, weight, bias, residual, relu, **options)
    for name, a, b, c in zip(NAMES, ours, exact, torchs, strict=False):
        error, allowed = (a.double() - b).norm(), 2 * (c.double() - b).norm()
        allowed += 4 * torch.finfo(torch.float32).eps * b.norm()  # torch's happen to round to less, at times
        assert error <= allowed, f"{name}: error {error:.3g}, torch's twice {allowed:.3g}"
        assert a.dtype == c.dtype, name
        assert a.stride() == (x.stride() if a.shape == x.shape else (1,)), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_exact(shape, dtype, device):
    x, weight, bias, residual = make(shape, dtype, device)
    for joined, relu in AFTER:
        assert_as_exact_as_torch(x, weight, bias, residual if joined else None, relu)


@pytest.mark.parametrize(("shape", "groups"), [((6, 130, 5, 3), 3), ((12, 20), 2)], ids=str)
def test_groups_have_statistics_of_their_own(shape, groups, device):
    x, weight, bias, residual = make(shape, torch.float32, device)
    x[: len(x) // groups] += 3  # of another mean than the rest
    for joined, relu in AFTER:
        assert_as_exact_as_torch(x, weight, bias, residual if joined else None, relu, groups=groups)


def test_groups_take_no_more_launches(device, monkeypatch):
    names = [name for name in vars(kernels) if name.startswith("batch_norm_") and name.endswith("_kernel")]
    launched = []
    for name in names:
        kernel = getattr(kernels, name)
        spy = type("Spy", (), {"__getitem__": lambda _, grid, k=kernel, n=name: launched.append(n) or k[grid]})()
        monkeypatch.setattr(kernels, name, spy)
    x, weight, bias, residual = make((6, 20, 3, 4), torch.float32, device)
    for groups in (1, 3):
        results(batch_norm, x, weight, bias, residual, True, groups=groups)
    assert launched[: len(launched) // 2] == launched[len(launched) // 2 :]
    assert len(launched) // 2 == len(names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_rows_for_each_program(dtype, device, monkeypatch):
    monkeypatch.setattr(kernels, "PROGRAMS", 4)
    x, weight, bias, residual = make((3, 130, 19, 17), dtype, device)
    assert len(kernels.launch_stats(x)) == 2 < 969 / (kernels.UNROLL * 32)
    assert_as_exact_as_torch(x, weight, bias, residual, True)
    assert_as_exact_as_torch(x, weight, bias, None, True)


def test_more_parts_than_a_merge_takes_first(device, monkeypatch):
    monkeypatch.setattr(kernels, "TILE", 64)
    x, weight, bias, _ = make((1100, 16), torch.float32, device)
    assert len(kernels.launch_stats(x)) > kernels.PARTS_BLOCK
    assert_as_exact_as_torch(x, weight, bias, None, False)


@pytest.mark.parametrize("start", ["random", "black"])
def test_mean_far_above_deviation(start, device, monkeypatch):
    monkeypatch.setattr(kernels, "PROGRAMS", 2)
    x, weight, bias, residual = make((4, 64, 13, 11), torch.float32, device, mean=100.0, std=1.0)
    if start == "black":  # whatever the first rows are, sums are not taken about them
        x[0] = 0
    assert_as_exact_as_torch(x, weight, bias, residual, True)
    parts = kernels.launch_stats(x)
    flat = x.double().permute(0, 2, 3, 1).reshape(-1, 64)
    merged = module.merge_stats(parts, None, None, 0.0, 0.0)
    torch.testing.assert_close(merged[0].double(), flat.mean(0), rtol=4e-7, atol=0)
    torch.testing.assert_close(merged[1].double(), flat.var(0, correction=0).rsqrt(), rtol=2e-6, atol=0)


def test_momentum_zero_leaves_the_running_statistics(device):
    x, weight, bias, _ = make((3, 20, 4, 5), torch.float32, device)
    _, mean, variance, *_ = results(batch_norm, x, weight, bias, None, True, momentum=0.0)
    assert mean.eq(0.5).all()
    assert variance.eq(1.5).all()


def test_parts_of_two_ranks_make_the_whole(device):
    x, weight, bias, residual = make((7, 20, 5, 6), torch.float32, device)
    shares = [to_rows(x[:3]), to_rows(x[3:])]
    running = [torch.zeros(20, device=device), torch.ones(20, device=device)]
    parts = torch.cat([module.local_stats(share) for share in shares])
    assert parts[:, -1].tolist() == [90, 120]
    mean, invstd, count = module.merge_stats(parts, *running, 0.1, 1e-5)
    y, whole_mean, whole_var, dx, d_weight, d_bias, d_residual = results(
        lambda x, weight, bias, mean, var, **options: plain(x, weight, bias, mean.zero_(), var.fill_(1.0), **options),
        *(x, weight, bias, residual, True),
    )
    torch.testing.assert_close(running, [whole_mean, whole_var])
    g = to_rows(torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(device))
    found, totals = [], 0
    for share, rows in zip(shares, (slice(0, 3), slice(3, 7)), strict=True):
        ours = module.apply_norm(share, weight, bias, to_rows(residual[rows]), mean, invstd, count, True)
        sums, *of_parameters, masked = module.grad_sums(to_rows(g[rows]), share, ours, weight, bias, mean, invstd, True)
        totals = totals + sums
        found.append((ours, masked, *of_parameters))
    torch.testing.assert_close(torch.cat([f[0] for f in found]), y)
    torch.testing.assert_close(torch.cat([f[1] for f in found]), d_residual)
    torch.testing.assert_close(found[0][2] + found[1][2], d_weight)
    torch.testing.assert_close(found[0][3] + found[1][3], d_bias)
    ours = [
        module.input_grad(f[1], share, weight, bias, mean, invstd, count, totals, False)
        for f, share in zip(found, shares, strict=True)
    ]
    torch.testing.assert_close(torch.cat(ours), dx)


def test_the_mask_computed_anew_is_that_of_the_output(device):
    """With the output's zeros as a mask and with none to read: the same gradients."""
    x, weight, bias, _ = make((3, 64, 9, 8), torch.bfloat16, device)
    bias = bias.round()
    mean, invstd, count = module.merge_stats(module.local_stats(x), None, None, 0.0, 1e-5)
    y = module.apply_norm(x, weight, bias, None, mean, invstd, count, True)
    assert 0.1 < (y == 0).float().mean() < 0.9
    g = to_rows(torch.randn(x.shape, device=device).bfloat16())
    *by_output, masked = module.grad_sums(g, x, y, weight, bias, mean, invstd, True)
    *anew, nothing = module.grad_sums(g, x, None, weight, bias, mean, invstd, True)
    assert nothing.numel() == 0
    assert all(torch.equal(a, b) for a, b in zip(by_output, anew, strict=True))
    rest = x, weight, bias, mean, invstd, count, anew[0]
    assert torch.equal(module.input_grad(masked, *rest, False), module.input_grad(g, *rest, True))


def test_not_a_number_stays(device):
    x, weight, bias, residual = make((2, 16, 3, 3), torch.float32, device)
    x[1, 5, 2, 0] = torch.nan
    y, mean, *_, dx, _, _, _ = results(batch_norm, x, weight, bias, residual, True)
    for broken in (y[:, 5], mean[5], dx[:, 5]):
        assert broken.isnan().all()
    assert y[:, :5].isfinite().all()


def test_nothing_is_copied_and_little_is_kept(device, monkeypatch):
    x, weight, bias, residual = make((2, 20, 4, 5), torch.bfloat16, device)
    x.requires_grad_()
    running = torch.zeros(20, device=device), torch.ones(20, device=device)
    options = {"momentum": 0.1, "eps": 1e-5, "relu": True}
    with torch.no_grad():
        assert batch_norm(x, weight, bias, *running, **options).grad_fn is None
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = batch_norm(x, weight, bias, *running, **options)
        assert sum(t.numel() == x.numel() for t in kept) == 1
        joined = batch_norm(x, weight, bias, *running, **options, residual=residual)
        assert [t.data_ptr() for t in kept if t.numel() == x.numel()][1:] == [x.data_ptr(), joined.data_ptr()]
    whole = y.float().sum()
    monkeypatch.setattr(torch.Tensor, "clone", None)  # would raise if called
    torch.autograd.grad(whole, x)


def test_gradient_in_another_memory_format(device):
    x, weight, bias, _ = make((2, 20, 4, 5), torch.float32, device)
    x.requires_grad_()
    y = batch_norm(x, weight, bias, weight.clone(), bias.clone(), momentum=0.1, eps=1e-5)
    g = torch.randn(x.shape, device=device)
    expected = torch.autograd.grad(y, x, to_rows(g), retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(y, x, g, retain_graph=True)[0], expected)
    assert expected.stride() == x.stride()
    torch.autograd.grad(y.sum(), x)  # an expanded one


def test_deterministic(device):
    x, weight, bias, residual = make((3, 65, 9, 9), torch.float32, device)
    first, second = (results(batch_norm, x, weight, bias, residual, True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_network_takes_the_kernels(device, monkeypatch):
    """A block's norms in training, against the same block by torch; evaluation and frozen statistics stay."""
    try:
        from vito_fast.model import backbones as resnet
    except ImportError as error:  # not ``importorskip``: an extension that was not built is no missing module to it
        pytest.skip(f"`make gpu-check` needs little installed, which leaves the network out: {error}")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # convolutions that err by 1e-3 would hide the norms
    torch.manual_seed(0)
    (block,) = resnet._stage(resnet.Bottleneck, 16, 8, 1, 2)[0].to(device, memory_format=torch.channels_last)
    x = to_rows(torch.randn(2, 16, 6, 6, device=device))
    states = {name: value.clone() for name, value in block.state_dict().items()}
    launched = []
    kernel = kernels.batch_norm_fwd_kernel
    spy = type("Spy", (), {"__getitem__": lambda self, grid: launched.append(grid) or kernel[grid]})()
    found = []
    for ours in (True, False):
        monkeypatch.setattr(kernels, "batch_norm_fwd_kernel", spy)
        monkeypatch.setattr(module, "use_triton", lambda _, ours=ours: ours)
        block.load_state_dict(states)
        y = block(x)
        gradients = torch.autograd.grad(y.square().sum(), list(block.parameters()))
        found.append((y.detach(), *gradients, *(b.clone() for b in block.buffers())))
        again = torch.autograd.grad(resnet._recomputed(block, x).square().sum(), list(block.parameters()))
        torch.testing.assert_close(again, gradients, rtol=1e-5, atol=1e-5)
        before = {name: value.clone() for name, value in block.state_dict().items()}
        with resnet.frozen_statistics(block):
            torch.testing.assert_close(block(x), y)
        assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())
        assert len(launched) == 16, "four norms: once, twice recomputed, once frozen"
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
    block.eval()(x)
    assert len(launched) == 16


if torch.cuda.is_available():

    def test_cuda_graph():
        x, weight, bias, residual = make((8, 64, 14, 14), torch.bfloat16, "cuda")
        given = [t.requires_grad_() for t in (x, weight, bias, residual)]
        running = torch.zeros(64, device="cuda"), torch.ones(64, device="cuda")

        def step():
            y = batch_norm(*given[:3], *running, momentum=0.1, eps=1e-5, residual=residual, relu=True)
            return torch.autograd.grad(y.float().square().sum(), given)

        step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        with torch.no_grad():
            x.normal_()
        graph.replay()
        moved = running[0].clone()
        for a, b in zip(captured, step(), strict=True):
            torch.testing.assert_close(a, b)
        assert not torch.equal(running[0], moved)
