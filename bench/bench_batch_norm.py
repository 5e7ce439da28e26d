"""relu(batch norm + residual) in training, as it ends each block of a ResNet-50 at 224 px: forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import vito_kernels
from bench.bench_infonce import usual
from bench.harness import Candidate, Result, Work
from bench.limits import traffic
from bench.peers import not_compiled

IMAGES, EPS, MOMENTUM = 64, 1e-5, 0.1


def by_torch(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, **options: Any) -> Tensor:
    """The four ops that a network runs without us."""
    y = F.batch_norm(x, mean, var, weight, bias, True, options["momentum"], options["eps"])
    y += options["residual"]
    return F.relu(y, inplace=True)


@pytest.mark.parametrize(("channels", "side"), [(256, 56), (512, 28), (1024, 14), (2048, 7)])
def test_batch_norm(race: Any, device: torch.device, channels: int, side: int) -> None:
    if device.type == "cpu":
        pytest.skip("on a CPU it is torch's ops")
    generator, dtype = torch.Generator().manual_seed(channels), usual(device)

    def image() -> Tensor:
        x = torch.randn(IMAGES, channels, side, side, generator=generator)
        return x.to(device, dtype).contiguous(memory_format=torch.channels_last)

    x, residual, gradient = image().requires_grad_(), image().requires_grad_(), image()
    weight, bias = (torch.rand(channels, generator=generator).to(device).requires_grad_() for _ in range(2))

    def through(norm: Any, exact: bool = False) -> Any:
        given = [t.detach().double().requires_grad_() if exact else t for t in (x, weight, bias, residual)]
        running = [torch.full((channels,), value, dtype=given[1].dtype, device=device) for value in (0.0, 1.0)]
        options = {"momentum": MOMENTUM, "eps": EPS, "residual": given[3]}
        if norm is not by_torch:
            options["relu"] = True

        def call() -> Result:
            y = norm(*given[:3], *running, **options)
            return (y, *torch.autograd.grad(y, given, gradient.to(y.dtype)))

        return call

    candidates = [
        Candidate("vito_kernels", through(vito_kernels.batch_norm), "ours"),
        Candidate("torch batch_norm, add, relu", through(by_torch), "reference"),
        not_compiled("it fuses with the network around it: python -m bench.step_modes times compiled steps"),
        traffic([x.detach()], [(gradient, torch.empty_like(gradient)) for _ in range(5)]),
    ]
    # forward: x, x, residual, y. backward: gradient, x, y, masked gradient. Then masked gradient, x, dx
    work = Work(bytes=11.0 * x.numel() * x.itemsize, items=IMAGES, unit="images")
    truth = through(vito_kernels.reference.batch_norm, exact=True)
    race("batch_norm", {"B": IMAGES, "C": channels, "side": side}, candidates, truth=truth, work=work)
