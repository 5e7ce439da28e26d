"""What ``normalize`` and ``softplus_loss`` are compared with, on the CPU and by Triton."""

from __future__ import annotations

from pathlib import Path

import torch
from contrastive_cases import assert_at_most_twice_torch
from torch import Tensor

from vito_kernels import normalize, reference
from vito_kernels.contrastive.softplus_loss import softplus_loss
from vito_kernels.contrastive.terms import LOG2E

SHAPES = [(1, 1), (3, 16), (37, 100), (5, 1024)]


def fused_softplus_loss(logits: Tensor, *sides: Tensor) -> Tensor:
    """Of log-sum-exps whose rest is 1 / 8."""
    first, *second = ((lse2, torch.full_like(lse2, 0.125)) for lse2 in sides)
    return softplus_loss(*first, logits, *(second[0] if second else ()))


def plain_softplus_loss(logits: Tensor, *sides: Tensor) -> Tensor:
    over = ((lse2[:, None] - logits + 0.125) / LOG2E for lse2 in sides)
    return sum(torch.nn.functional.softplus(x, threshold=50).mean(1) for x in over) / len(sides)


def check_normalize(device: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """Value and gradient, of rows of all lengths, against float64; the gradient of a sum of unit rows would be none."""
    rows = shape[0]
    draw = torch.Generator().manual_seed(rows)
    weights = torch.randn(shape, generator=draw).to(device)
    x = torch.randn(shape, generator=draw) * torch.logspace(-2, 2, rows)[:, None]
    assert_at_most_twice_torch(
        lambda x: normalize(x) * weights, lambda x: reference.normalize(x) * weights, [x.to(device, dtype)]
    )
    assert normalize(x.to(device, dtype)).dtype == dtype


def check_rows_without_length(device: str) -> None:
    """As PyTorch: divided by 1e-12, and so is their gradient."""
    x = torch.tensor([[0.0, 0.0, 0.0], [3e-13, 0.0, 4e-13], [3.0, 0.0, 4.0]], device=device, requires_grad=True)
    weights = torch.tensor([1.0, 2.0, 3.0], device=device)
    for found, expected in zip(_both(normalize, x, weights), _both(reference.normalize, x, weights), strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-6, atol=1e-7)


def _both(function, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    unit = function(x)
    return unit.detach(), torch.autograd.grad((unit * weights).sum(), x)[0]


def check_strided_rows(device: str) -> None:
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(0)).to(device)
    for view in (x[::2, 8:40], x.T, x[:1].expand(4, 64)):
        torch.testing.assert_close(normalize(view), reference.normalize(view))


def check_softplus_loss(device: str, pairs: int, sides: int) -> None:
    draw = torch.Generator().manual_seed(pairs)
    lse2, logits = 30 * torch.randn(sides, 300, generator=draw), 20 * torch.randn(300, pairs, generator=draw)
    assert_at_most_twice_torch(fused_softplus_loss, plain_softplus_loss, [x.to(device) for x in (logits, *lse2)])


def check_softplus_loss_gradient_of_a_large_matrix(device: str, path: Path) -> None:
    """One column of it, whose last row begins 2^31 elements after the first: more than 32 bits count."""
    step = 1 << 30
    if device == "cpu":  # a file with holes: three of its pages exist, and a wrong address lies below the first row
        column = torch.from_file(str(path), shared=True, size=4 * step + 1)[2 * step :: step]
        path.unlink()
    else:
        column = torch.zeros(2 * step + 1, device=device)[::step]
    column.copy_(torch.tensor([0.5, 1.0, 2.0], device=device))
    lse2 = torch.tensor([1.0, 2.0, 3.0], device=device, requires_grad=True)
    value = softplus_loss(lse2, torch.zeros_like(lse2), torch.ones(3, 1, device=device))
    (found,) = torch.autograd.grad(value, lse2, column, retain_graph=True)
    assert torch.equal(found, torch.autograd.grad(value, lse2, column.contiguous())[0])


def check_softplus_loss_at_its_ends(device: str) -> None:
    """A row without negatives costs nothing, a confident one costs e^x and not 0, a hopeless one x."""
    lse2 = torch.tensor([-torch.inf, -40 * LOG2E, 0.0, 90 * LOG2E], device=device, requires_grad=True)
    logits = torch.zeros(4, 1, device=device, requires_grad=True)
    loss = softplus_loss(lse2, torch.zeros(4, device=device), logits)
    expected = torch.tensor([0.0, 4.248354e-18, 0.6931472, 90.0], device=device)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    g_lse2, g_logits = torch.autograd.grad(loss.sum(), (lse2, logits))
    shares = torch.tensor([0.0, 4.248354e-18, 0.5, 1.0], device=device)
    torch.testing.assert_close(g_lse2, shares / LOG2E, rtol=1e-5, atol=0)
    torch.testing.assert_close(g_logits, -shares[:, None] / LOG2E, rtol=1e-5, atol=0)
