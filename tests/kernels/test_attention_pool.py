"""Attention pooling as a PyTorch op, on the CPU path."""

import importlib
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from vito_kernels import AttentionPool, attention_pool, reference

module = importlib.import_module("vito_kernels.attention_pool")


@pytest.fixture
def inputs():
    torch.manual_seed(0)
    return torch.randn(2, 9, 5, dtype=torch.float64, requires_grad=True), torch.randn(
        2, 9, dtype=torch.float64, requires_grad=True
    )


def test_gradcheck(inputs):
    assert torch.autograd.gradcheck(attention_pool, inputs)
    assert torch.autograd.gradcheck(lambda f, l: attention_pool(f, l)[0], inputs)
    assert torch.autograd.gradcheck(lambda f, l: attention_pool(f, l)[1], inputs)


@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 20), st.integers(1, 20)),
    seed=st.integers(0, 99),
    shift=st.floats(-50, 50),
)
@settings(max_examples=40, deadline=None)
def test_properties(shape, seed, shift):
    torch.manual_seed(seed)
    features, logits = torch.randn(shape), 3 * torch.randn(shape[:2])
    pooled, weights = attention_pool(features, logits)
    expected = reference.attention_pool(features, logits)
    torch.testing.assert_close((pooled, weights), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weights.sum(1), torch.ones(shape[0]))
    torch.testing.assert_close(attention_pool(features, logits + shift)[0], pooled, rtol=1e-4, atol=1e-4)
    order = torch.randperm(shape[1])
    torch.testing.assert_close(attention_pool(features[:, order], logits[:, order])[0], pooled, rtol=1e-4, atol=1e-5)
    assert (pooled <= features.amax(1) + 1e-5).all()
    assert (pooled >= features.amin(1) - 1e-5).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    torch.manual_seed(1)
    features = torch.randn(2, 9, 6, dtype=dtype, requires_grad=True)
    logits = torch.randn(2, 9, requires_grad=True)
    torch.library.opcheck(module.attention_pool_op, (features, logits))
    pooled, weights, mean = module.attention_pool_op(features.detach(), logits.detach())
    for g_weights in (None, torch.randn(2, 9)):
        arguments = (torch.randn_like(pooled), g_weights, features.detach(), logits.detach()[:0], weights, mean)
        torch.library.opcheck(module.attention_pool_backward_op, arguments)


def test_compiles_whole(inputs):
    compiled = torch.compile(lambda f, l: attention_pool(f * 2, l), fullgraph=True)
    eager = attention_pool(inputs[0] * 2, inputs[1])
    torch.testing.assert_close(compiled(*inputs), eager)
    g = torch.autograd.grad(compiled(*inputs)[0].square().sum(), inputs)
    torch.testing.assert_close(g, torch.autograd.grad(eager[0].square().sum(), inputs))


def test_functional_gradient_and_checkpointing(inputs):
    def loss(features, logits):
        pooled, weights = attention_pool(features, logits)
        return pooled.square().sum() + weights.square().sum()

    expected = torch.autograd.grad(loss(*inputs), inputs)
    detached = [x.detach() for x in inputs]
    torch.testing.assert_close(torch.func.grad(loss, argnums=(0, 1))(*detached), expected)
    torch.testing.assert_close(torch.autograd.grad(checkpoint(loss, *inputs, use_reentrant=False), inputs), expected)


def test_second_derivative_is_refused(inputs):
    (g,) = torch.autograd.grad(attention_pool(*inputs)[0].square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(g.sum(), inputs[0])


def test_maps_of_both_memory_formats():
    torch.manual_seed(2)
    features, logits = torch.randn(2, 6, 3, 4), torch.randn(2, 12)
    flat = features.flatten(2).transpose(1, 2)
    expected = attention_pool(flat.contiguous(), logits)
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.testing.assert_close(attention_pool(features.contiguous(memory_format=layout), logits), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_maps_as_large_as_a_network_has(dtype):
    torch.manual_seed(5)
    features = torch.randn(3, 196, 256).to(dtype).requires_grad_()
    logits = torch.randn(3, 196).to(dtype).requires_grad_()
    exact = [x.detach().double().requires_grad_() for x in (features, logits)]
    g = torch.randn(3, 256).to(dtype)
    ours = torch.autograd.grad(attention_pool(features, logits)[0], (features, logits), g)
    expected = torch.autograd.grad(reference.attention_pool(*exact)[0], exact, g.double())
    eps = torch.finfo(dtype).eps
    for a, b in zip(ours, expected, strict=True):
        assert (a.double() - b).norm() <= 2 * eps * b.norm()


def test_empty_batch():
    pooled, weights = attention_pool(torch.empty(0, 4, 3), torch.empty(0, 4))
    assert pooled.shape == (0, 3)
    assert weights.shape == (0, 4)


def test_module_under_autocast():
    torch.manual_seed(3)
    pool = AttentionPool(6, hidden=8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pooled, weights = pool(torch.randn(2, 6, 3, 3))
    assert pooled.shape == (2, 6)
    assert weights.dtype == torch.float32
    pooled.float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in pool.parameters())


@pytest.mark.parametrize(
    ("features", "logits", "error", "said"),
    [
        (torch.ones(2, 3, 4), torch.ones(2, 4), ValueError, r"\(2, 3\).*\(2, 4\)"),
        (torch.ones(2, 3, 4), torch.ones(3, 3), ValueError, r"\(3, 3\)"),
        (torch.ones(2, 3), torch.ones(2, 3), ValueError, r"\(2, 3\)"),
        (torch.ones(2, 0, 4), torch.ones(2, 0), ValueError, "at least one location"),
        (torch.ones(2, 3, 4, dtype=torch.int32), torch.ones(2, 3), TypeError, "int32"),
        (torch.ones(2, 3, 4).to_sparse(), torch.ones(2, 3), TypeError, "dense tensor, got torch.sparse_coo"),
        (torch.ones(2, 3, 4), [[0.0] * 3] * 2, TypeError, "list"),
        (torch.ones(2, 3, 4), torch.ones(2, 3, device="meta"), ValueError, "meta"),
    ],
)
def test_wrong_input_is_named(features, logits, error, said):
    with pytest.raises(error, match=said):
        attention_pool(features, logits)


def test_wrong_width_is_named():
    with pytest.raises(ValueError, match="0"):
        AttentionPool(4, hidden=0)


def test_threads_may_share_the_op():
    torch.manual_seed(4)
    features, logits = torch.randn(8, 49, 32), torch.randn(8, 49)
    expected, results = attention_pool(features, logits), [None] * 4
    threads = [
        threading.Thread(target=lambda i=i: results.__setitem__(i, attention_pool(features, logits))) for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(result[0], expected[0]) for result in results)


def test_the_caller_may_write_into_what_was_pooled():
    torch.manual_seed(3)
    features, logits = (torch.randn(2, 9, *rest).requires_grad_() for rest in ((5,), ()))
    found, expected = (
        torch.autograd.grad(relu(attention_pool(features, logits)[0]).square().sum(), (features, logits))
        for relu in (torch.relu_, torch.relu)
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
