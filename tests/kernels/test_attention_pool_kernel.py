"""Attention pooling's Triton kernels against float64: at most twice the error of torch in the same precision."""

import pytest
import torch

from vito_kernels import attention_pool, reference

SHAPES = [(2, 49, 64), (3, 196, 128), (1, 33, 200), (2, 1, 5), (1, 7, 1), (1, 1500, 40), (5, 64, 16)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def gradients(pool, features, logits, g_pooled, g_weights):
    features, logits = features.detach().requires_grad_(), logits.detach().requires_grad_()
    pooled, weights = pool(features, logits)
    outputs, grads = [pooled, weights], [g_pooled.to(pooled.dtype), g_weights.to(weights.dtype)]
    return [pooled, weights, *torch.autograd.grad(outputs, [features, logits], grads)]


def plain(features, logits):
    """torch in the inputs' own precision."""
    weights = logits.softmax(1)
    if features.ndim == 4:
        features = features.flatten(2).transpose(1, 2)
    return torch.bmm(weights[:, None].to(features.dtype), features)[:, 0], weights


def assert_as_exact_as_torch(features, logits, seed=0):
    torch.manual_seed(seed)
    batch, channels = features.shape[0], features.shape[2 if features.ndim == 3 else 1]
    # gradients that every dtype represents, so that only the arithmetic differs
    g_pooled = torch.randn(batch, channels, device=features.device).bfloat16()
    g_weights = torch.randn(logits.shape, device=features.device).bfloat16()
    ours = gradients(attention_pool, features, logits, g_pooled, g_weights)
    exact = gradients(reference.attention_pool, features.double(), logits.double(), g_pooled, g_weights)
    torchs = gradients(plain, features, logits, g_pooled, g_weights)
    eps = torch.finfo(features.dtype).eps
    for name, a, b, c in zip(("pooled", "weights", "d features", "d logits"), ours, exact, torchs, strict=True):
        error, allowed = (a.double() - b).norm(), 2 * (c.double() - b).norm()
        allowed += 4 * torch.finfo(torch.float32).eps * b.norm()  # torch's happen to round to less, at times
        assert error <= allowed + eps**2, f"{name}: error {error:.3g}, torch's twice {allowed:.3g}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_exact(shape, dtype, device):
    torch.manual_seed(1)
    features = torch.randn(shape, device=device).to(dtype)
    logits = (3 * torch.randn(shape[:2], device=device)).to(dtype)
    assert_as_exact_as_torch(features, logits)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=["channels_last", "contiguous"])
def test_maps_of_either_layout_are_not_copied(layout, device, monkeypatch):
    torch.manual_seed(2)
    features = torch.randn(2, 70, 5, 6, device=device).contiguous(memory_format=layout)
    logits = torch.randn(2, 30, device=device)
    assert_as_exact_as_torch(features, logits)
    monkeypatch.setattr(torch.Tensor, "contiguous", None)  # would raise if called on the way forward
    monkeypatch.setattr(torch.Tensor, "clone", None)
    import importlib

    module = importlib.import_module("vito_kernels.attention_pool")
    flat = features.permute(0, 2, 3, 1).flatten(1, 2)
    assert flat.data_ptr() == features.data_ptr()
    d_features, _ = module.launch_attention_pool_backward(
        flat, *(torch.rand(2, n, device=device) for n in (30, 70, 70)), None, torch.float32
    )
    assert d_features.stride() == flat.stride()


def test_rows_are_split_when_there_are_few(device, monkeypatch):
    import importlib

    module = importlib.import_module("vito_kernels.attention_pool")
    monkeypatch.setattr(module, "num_sms", lambda device: 16)
    torch.manual_seed(3)
    features, logits = torch.randn(1, 700, 24, device=device), torch.randn(1, 700, device=device)
    grids = []
    kernel = module.attention_pool_fwd_kernel
    spy = type("Spy", (), {"__getitem__": lambda self, grid: grids.append(grid) or kernel[grid]})()
    monkeypatch.setattr(module, "attention_pool_fwd_kernel", spy)
    assert_as_exact_as_torch(features, logits)
    assert grids[0][1] > 1, "the launcher did not split"


@pytest.mark.parametrize("scale", [1e4, 0.0])
def test_extreme_logits(scale, device):
    torch.manual_seed(4)
    features, logits = torch.randn(2, 40, 16, device=device), scale * torch.randn(2, 40, device=device)
    pooled, weights = attention_pool(features, logits)
    expected, expected_weights = reference.attention_pool(features.double(), logits.double())
    torch.testing.assert_close(pooled.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weights.double(), expected_weights, rtol=1e-5, atol=1e-6)


def test_minus_infinity_masks_a_location(device):
    torch.manual_seed(5)
    features, logits = torch.randn(1, 9, 8, device=device), torch.randn(1, 9, device=device)
    logits[0, 3] = float("-inf")
    keep = [i for i in range(9) if i != 3]
    torch.testing.assert_close(
        attention_pool(features, logits)[0], attention_pool(features[:, keep], logits[:, keep])[0]
    )


def test_deterministic(device):
    torch.manual_seed(6)
    features, logits = torch.randn(2, 300, 65, device=device), torch.randn(2, 300, device=device)
    first, second = attention_pool(features, logits), attention_pool(features, logits)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_mixed_dtypes_as_under_autocast(device):
    features = torch.randn(2, 12, 8, device=device).bfloat16()
    logits = torch.randn(2, 12, device=device)
    pooled, weights = attention_pool(features, logits)
    assert pooled.dtype == torch.bfloat16
    assert weights.dtype == torch.float32


if torch.cuda.is_available():

    def test_cuda_graph():
        features = torch.randn(8, 196, 256, device="cuda", requires_grad=True)
        logits = torch.randn(8, 196, device="cuda", requires_grad=True)

        def step():
            return torch.autograd.grad(attention_pool(features, logits)[0].square().sum(), (features, logits))

        step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        with torch.no_grad():
            features.normal_()
        graph.replay()
        for a, b in zip(captured, step(), strict=True):
            torch.testing.assert_close(a, b)


def test_the_caller_may_write_into_what_was_pooled(device):
    torch.manual_seed(3)
    features, logits = (torch.randn(2, 9, *rest, device=device).requires_grad_() for rest in ((5,), ()))
    found, expected = (
        torch.autograd.grad(relu(attention_pool(features, logits)[0]).square().sum(), (features, logits))
        for relu in (torch.relu_, torch.relu)
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
