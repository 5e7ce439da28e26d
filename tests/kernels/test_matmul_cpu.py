"""Products of the CPU path by either library, whichever this processor would take."""

from __future__ import annotations

import pytest
import torch
from contrastive_cases import embeddings
from torch.nn.functional import normalize

import vito_kernels
from vito_kernels import reference
from vito_kernels.contrastive import cpu_matmul, cpu_tiles
from vito_kernels.contrastive.cpu_matmul import add_product, product

SHAPES = [(1, 1, 1), (1, 7, 16), (7, 1, 100), (33, 65, 17), (96, 512, 256), (40, 24, 1000)]
LAYOUTS = {
    "rows": lambda x: x,
    "columns": lambda x: x.T.contiguous().T,
    "strided rows": lambda x: torch.cat([x, x], dim=1)[:, : x.shape[1]],
    "strided columns": lambda x: torch.cat([x.T, x.T], dim=1)[:, : x.shape[0]].T,
}


@pytest.fixture(params=["oneDNN", "MKL"], autouse=True)
def library(request, monkeypatch):
    if request.param == "oneDNN" and not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("PyTorch was built without oneDNN")
    monkeypatch.setattr(cpu_matmul, "_mkl_is_slow", lambda: request.param == "oneDNN")


@pytest.mark.parametrize("y_layout", LAYOUTS)
@pytest.mark.parametrize("x_layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_products_of_any_layout(shape, x_layout, y_layout):
    m, n, k = shape
    generator = torch.Generator().manual_seed(m)
    x, y, onto = (torch.randn(*size, generator=generator) for size in ((m, k), (n, k), (n, m)))
    true = x.double() @ y.double().T
    x, y = LAYOUTS[x_layout](x), LAYOUTS[y_layout](y)
    torch.testing.assert_close(product(x, y).double(), true, rtol=1e-5, atol=1e-6 * k)
    expected = onto.T.double() + true
    add_product(onto.T, x, y)  # in place, into columns
    torch.testing.assert_close(onto.T.double(), expected, rtol=1e-5, atol=1e-6 * k)


def test_float64_keeps_its_precision():
    x, y = (torch.randn(5, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(2))
    assert product(x, y).equal(x @ y.T)


@pytest.mark.parametrize("temperature", [0.1, 0.005], ids=["direct", "online"])
@pytest.mark.parametrize("loss", ["info_nce", "clip_loss", "ntxent"])
def test_losses_by_either_library(loss, temperature):
    q, k = (normalize(embeddings(rows, 48, torch.float32, "cpu", i), dim=1) for i, rows in enumerate((900, 900)))
    call = {
        "info_nce": lambda of, *x: of.info_nce(*x, temperature=temperature),
        "clip_loss": lambda of, *x: of.clip_loss(*x, 1 / temperature),
        "ntxent": lambda of, *x: of.ntxent(*x, temperature),
    }[loss]
    sides = [x.requires_grad_() for x in (q, k)]
    ours = torch.autograd.grad(call(vito_kernels, *sides), sides)
    wide = [x.detach().double().requires_grad_() for x in sides]
    for gradient, true in zip(ours, torch.autograd.grad(call(reference, *wide), wide), strict=True):
        assert (gradient - true).norm() <= 2e-5 * true.norm()


@pytest.mark.parametrize("temperature", [0.1, 0.005], ids=["direct", "online"])
@pytest.mark.parametrize("loss", ["info_nce", "clip_loss"])
def test_autocast_rounds_embeddings_and_nothing_else(loss, temperature, monkeypatch):
    """Nor in a backward pass within its block, of tiles that are not cached."""
    monkeypatch.setattr(cpu_tiles, "CACHE_BYTES", 4000)
    q, k = (normalize(embeddings(600, 48, torch.float32, "cpu", i), dim=1).requires_grad_() for i in range(2))

    def gradients(of, *sides):
        value = getattr(of, loss)(
            *sides, **{"temperature": temperature} if loss == "info_nce" else {"scale": 1 / temperature}
        )
        return torch.autograd.grad(value, sides)

    with torch.autocast("cpu", torch.bfloat16):
        ours = gradients(vito_kernels, q, k)
    rounded = [x.detach().bfloat16().double().requires_grad_() for x in (q, k)]
    for gradient, true in zip(ours, gradients(reference, *rounded), strict=True):
        assert (gradient - true).norm() <= 2e-5 * true.norm()
