"""The other losses on the same primitive: CLIP (both towers trained), NT-Xent, SupCon, SigLIP, mined negatives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import vito_kernels
from bench.bench_infonce import TEMPERATURE, pair
from bench.harness import Candidate, Work
from bench.limits import matmuls
from bench.peers import (
    compiled,
    not_compiled,
    paired,
    self_similar,
    sigmoid,
    supervised,
    truth_of,
    two_sided,
    with_gradients,
)
from vito_kernels import reference

FULL = pytest.mark.full
SECONDS = "each shape takes some 5 s to compile"


def both_trained(n: int, d: int, device: torch.device) -> tuple[Tensor, Tensor]:
    x, y = pair(n, n, d, device)
    return x, y.requires_grad_()


@pytest.mark.parametrize("n", [pytest.param(1024, marks=FULL), 2048, pytest.param(4096, marks=FULL)])
def test_clip(race: Any, device: torch.device, n: int) -> None:
    x, y = both_trained(n, 256, device)

    def ours(x: Tensor, y: Tensor) -> Tensor:
        return vito_kernels.clip_loss(vito_kernels.normalize(x), vito_kernels.normalize(y), 1 / TEMPERATURE)

    def plain(x: Tensor, y: Tensor) -> Tensor:
        return reference.clip_loss(reference.normalize(x), reference.normalize(y), 1 / TEMPERATURE)

    candidates = [
        Candidate("vito_kernels", with_gradients(ours, x, y), "ours"),
        Candidate("reference", with_gradients(plain, x, y), "reference"),
        *two_sided(x, y, TEMPERATURE),
        matmuls(x, y, 3),
    ]
    candidates.insert(2, compiled(plain, x, y) if n > 1024 else not_compiled(f"{SECONDS}; raced at N=2048 and 4096"))
    amount = Work(flops=6.0 * n * n * 256, bytes=x.itemsize * 6.0 * n * 256, items=n, unit="pairs")
    race("clip_loss", {"N": n, "D": 256}, candidates, truth=truth_of(plain, x, y), work=amount)


@pytest.mark.parametrize("n", [pytest.param(128, marks=FULL), 1024, pytest.param(2048, marks=FULL)])
def test_ntxent(race: Any, device: torch.device, n: int) -> None:
    """2N embeddings against each other."""
    if n == 2048 and device.type == "cpu":
        n = 1408  # malloc reuses the matrices. New pages for each call cost a fifth more in some passes.
    z1, z2 = both_trained(n, 128, device)

    def ours(z1: Tensor, z2: Tensor) -> Tensor:
        return vito_kernels.ntxent(z1, z2, TEMPERATURE)

    def plain(z1: Tensor, z2: Tensor) -> Tensor:
        return reference.ntxent(z1, z2, TEMPERATURE)

    z = torch.cat([z1, z2]).detach()  # no autograd node of the inputs may be older than a graph's capture
    candidates = [
        Candidate("vito_kernels", with_gradients(ours, z1, z2), "ours"),
        Candidate("reference", with_gradients(plain, z1, z2), "reference"),
        *self_similar(z1, z2, TEMPERATURE),
        matmuls(z, z, 2),
    ]
    candidates.insert(2, compiled(plain, z1, z2) if n > 128 else not_compiled(f"{SECONDS}; raced at larger N"))
    amount = Work(flops=4.0 * (2 * n) ** 2 * 128, bytes=z1.itemsize * 4.0 * n * 128, items=n, unit="pairs")
    race("ntxent", {"N": n, "D": 128}, candidates, truth=truth_of(plain, z1, z2), work=amount)


def test_supcon(race: Any, device: torch.device) -> None:
    """1536 embeddings of 512 classes, all positives of a row at once."""
    m, d = 1536, 128  # at 2048 a peer's int64 masks are exactly the largest block that malloc keeps, or does not
    z, _ = pair(m, m, d, device)
    labels = torch.arange(m, device=device) % 512

    def ours(z: Tensor) -> Tensor:
        return vito_kernels.supcon_loss(z, labels, temperature=TEMPERATURE)

    def plain(z: Tensor) -> Tensor:
        return reference.supcon_loss(z, labels, temperature=TEMPERATURE)

    candidates = [
        Candidate("vito_kernels", with_gradients(ours, z), "ours"),
        Candidate("reference", with_gradients(plain, z), "reference"),
        compiled(plain, z),
        supervised(z, labels, TEMPERATURE),
        matmuls(z, z, 2),
    ]
    amount = Work(flops=4.0 * m * m * d, bytes=z.itemsize * 2.0 * m * d, items=m, unit="embeddings")
    race("supcon_loss", {"M": m, "D": d}, candidates, truth=truth_of(plain, z), work=amount)


@pytest.mark.parametrize("n", [1024, pytest.param(4096, marks=FULL)])
def test_siglip(race: Any, device: torch.device, n: int) -> None:
    """At the scale and the bias that training begins with."""
    x, y = both_trained(n, 256, device)
    scale, bias = 10.0, -10.0

    def ours(x: Tensor, y: Tensor) -> Tensor:
        return vito_kernels.siglip_loss(vito_kernels.normalize(x), vito_kernels.normalize(y), scale, bias)

    def plain(x: Tensor, y: Tensor) -> Tensor:
        return reference.siglip_loss(reference.normalize(x), reference.normalize(y), scale, bias)

    candidates = [
        Candidate("vito_kernels", with_gradients(ours, x, y), "ours"),
        Candidate("reference", with_gradients(plain, x, y), "reference"),
        compiled(plain, x, y) if n > 1024 else not_compiled(f"{SECONDS}; raced at N=4096"),
        sigmoid(x, y, scale, bias),
        matmuls(x, y, 3),
    ]
    amount = Work(flops=6.0 * n * n * 256, bytes=x.itemsize * 6.0 * n * 256, items=n, unit="pairs")
    race("siglip_loss", {"N": n, "D": 256}, candidates, truth=truth_of(plain, x, y), work=amount)


def test_mined(race: Any, device: torch.device) -> None:
    """64 negatives of each query, with gradient."""
    m, n, d = 512, 64, 128
    q, k = both_trained(m, d, device)
    mined, _ = pair(m * n, m * n, d, device)
    negatives = mined.detach().view(m, n, d).requires_grad_()

    def of(library: Any) -> Any:
        def loss(q: Tensor, k: Tensor, negatives: Tensor) -> Tensor:
            units = [library.normalize(x.flatten(0, -2)).view(x.shape) for x in (q, k, negatives)]
            return library.info_nce(*units[:2], negatives=units[2], temperature=TEMPERATURE)

        return loss

    given = q, k, negatives
    candidates = [
        Candidate("vito_kernels", with_gradients(of(vito_kernels), *given), "ours"),
        Candidate("reference", with_gradients(of(reference), *given), "reference"),
        not_compiled(SECONDS),
        paired(*given, TEMPERATURE),
    ]
    amount = Work(flops=6.0 * m * n * d, bytes=q.itemsize * 3.0 * m * n * d, items=m, unit="queries")
    race("mined_info_nce", {"M": m, "N": n, "D": d}, candidates, truth=truth_of(of(reference), *given), work=amount)
