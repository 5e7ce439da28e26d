"""``normalize`` and ``softplus_loss`` on the CPU, and as ops of PyTorch."""

from __future__ import annotations

import pytest
import rows_cases as cases
import torch
from torch.utils.checkpoint import checkpoint

from vito_kernels import normalize
from vito_kernels.contrastive.softplus_loss import softplus_loss


@pytest.mark.parametrize("shape", cases.SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_normalize_is_as_exact_as_torch(dtype, shape):
    cases.check_normalize("cpu", dtype, shape)


def test_rows_without_length():
    cases.check_rows_without_length("cpu")


def test_strided_rows():
    cases.check_strided_rows("cpu")


@pytest.mark.parametrize(("pairs", "sides"), [(1, 1), (3, 1), (1, 2), (3, 2)])
def test_softplus_loss_is_as_exact_as_torch(pairs, sides):
    cases.check_softplus_loss("cpu", pairs, sides)


def test_softplus_loss_at_its_ends():
    cases.check_softplus_loss_at_its_ends("cpu")


def test_gradcheck_in_float64():
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(normalize, x)
    sides = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    rests = torch.randn(2, 4, dtype=torch.float64)
    torch.autograd.gradcheck(lambda sides, x: softplus_loss(sides[0], rests[0], x), (sides, x))
    torch.autograd.gradcheck(lambda sides, x: softplus_loss(sides[0], rests[0], x, sides[1], rests[1]), (sides, x))


@pytest.mark.parametrize(
    "loss",
    [
        lambda x: normalize(x)[:, 0].sum(),
        lambda x: cases.fused_softplus_loss(x, x[:, 0]).sum(),
        lambda x: cases.fused_softplus_loss(x, x[:, 0], x[:, 1]).sum(),
    ],
)
def test_under_every_transform_of_pytorch(loss):
    x = torch.randn(4, 16, requires_grad=True)
    for rows in (x, torch.randn(16, 4).T.requires_grad_()):
        torch.library.opcheck(torch.ops.vito_kernels.normalize.default, (rows,))
    rest = torch.zeros(4)
    for second in ((None, None), (x[:, 1], rest)):
        torch.library.opcheck(torch.ops.vito_kernels.softplus_loss.default, (x[:, 0], rest, *second, x, False))
    (expected,) = torch.autograd.grad(loss(x), x)
    (held,) = torch.autograd.grad(checkpoint(loss, x, use_reentrant=False), x)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for found in (torch.func.grad(loss)(x.detach()), held, torch.autograd.grad(compiled(x), x)[0]):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    (first,) = torch.autograd.grad(loss(x), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        first.sum().backward()


@pytest.mark.parametrize(
    ("x", "error", "said"),
    [
        (torch.ones(3), ValueError, r"\(3,\)"),
        (torch.ones(3, 2, dtype=torch.int32), TypeError, "int32"),
        (torch.ones(0, 2), ValueError, r"\(0, 2\)"),
        ("rows", TypeError, "str"),
    ],
)
def test_what_cannot_be_normalized_is_named(x, error, said):
    with pytest.raises(error, match=said):
        normalize(x)
