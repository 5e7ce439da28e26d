"""Attention pooling at the two levels of a ResNet-50 at 224 px: forward, and backward to features and logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import vito_kernels
from bench.bench_infonce import usual
from bench.harness import Candidate, Work
from bench.limits import traffic
from bench.peers import compiled, not_compiled, truth_of, with_gradients
from vito_kernels import reference


@pytest.mark.parametrize(("l", "c"), [(196, 1024), (49, 2048)])
def test_pooling(race: Any, device: torch.device, quick: bool, l: int, c: int) -> None:
    b = 64 if device.type == "cuda" or l == 49 else 32  # maps of 24.5 MiB: of 49, a call mostly waits for fresh pages
    generator = torch.Generator().manual_seed(b * l + c)
    dtype = usual(device)
    features = torch.randn(b, l, c, generator=generator).to(device, dtype).requires_grad_()
    logits = torch.randn(b, l, generator=generator).to(device, dtype).requires_grad_()
    gradient = torch.randn(b, c, generator=generator).to(device)

    def through(pool: Any) -> Any:
        def call(features: Tensor, logits: Tensor) -> Tensor:
            pooled, _ = pool(features, logits)
            return (pooled * gradient.to(pooled.dtype)).sum()

        return call

    def attention_by_bmm(features: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        weights = torch.softmax(logits, 1)
        return torch.bmm(weights[:, None], features)[:, 0], weights

    candidates = [
        Candidate("vito_kernels", with_gradients(through(vito_kernels.attention_pool), features, logits), "ours"),
        Candidate("reference", with_gradients(through(reference.attention_pool), features, logits), "reference"),
        Candidate("torch softmax + bmm", with_gradients(through(attention_by_bmm), features, logits)),
        traffic([features.detach()], [(features.detach(), torch.empty_like(features.detach()))]),
    ]
    why = "each shape takes some 5 s to compile; raced in the full set"
    plain = through(reference.attention_pool)
    candidates.insert(3, not_compiled(why) if quick else compiled(plain, features, logits))
    amount = Work(flops=6.0 * b * l * c, bytes=3.0 * features.itemsize * b * l * c, items=b, unit="images")
    truth = truth_of(through(reference.attention_pool), features, logits)
    race("attention_pool", {"B": b, "L": l, "C": c}, candidates, truth=truth, work=amount)
