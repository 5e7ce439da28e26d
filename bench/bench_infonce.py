"""InfoNCE whose keys carry no gradient (momentum targets, queues, locked towers): loss and the queries' gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import vito_kernels
from bench.harness import Budget, Candidate, Work
from bench.limits import matmuls
from bench.peers import compiled, not_compiled, one_sided, peer, sampled, truth_of, truth_of_rows, with_gradients
from vito_kernels import reference

TEMPERATURE = 0.1
FULL = pytest.mark.full
AT_4096 = "each shape takes some 5 s to compile; raced at N=4096"


def usual(device: torch.device) -> torch.dtype:
    """What people train in there: bfloat16 on a GPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def pair(m: int, n: int, d: int, device: torch.device, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Raw embeddings whose positives are closer than chance: query i belongs to key i. In the ``usual`` dtype."""
    dtype = dtype or usual(device)
    generator = torch.Generator().manual_seed(m * 1_000_003 + n * 1009 + d)
    k = torch.randn(n, d, generator=generator)
    q = k[:m] + torch.randn(m, d, generator=generator)
    return q.to(device, dtype).requires_grad_(), k.to(device, dtype)


def ours(q: Tensor, k: Tensor) -> Tensor:
    return vito_kernels.info_nce(vito_kernels.normalize(q), vito_kernels.normalize(k), temperature=TEMPERATURE)


def plain(q: Tensor, k: Tensor) -> Tensor:
    return reference.info_nce(reference.normalize(q), reference.normalize(k), temperature=TEMPERATURE)


def work(m: int, n: int, d: int, size: int = 4) -> Work:
    """4 M N D flops; queries read twice, keys once, the gradient written once."""
    return Work(flops=4.0 * m * n * d, bytes=size * (3.0 * m * d + n * d), items=m, unit="queries")


@pytest.mark.parametrize(
    "n",
    [
        pytest.param(256, marks=FULL),
        pytest.param(1024, marks=FULL),
        2048,
        pytest.param(4096, marks=FULL),
        pytest.param(8192, marks=FULL),
    ],
)
def test_over_n(race: Any, device: torch.device, n: int) -> None:
    q, k = pair(n, n, 256, device)
    candidates = [
        Candidate("vito_kernels", with_gradients(ours, q, k), "ours"),
        Candidate("reference", with_gradients(plain, q, k), "reference"),
        *one_sided(q, k, TEMPERATURE),
        matmuls(q, k, 2),
    ]
    candidates.insert(2, compiled(plain, q, k) if n == 4096 else not_compiled(AT_4096))
    race("info_nce", {"N": n, "D": 256}, candidates, truth=truth_of(plain, q, k), work=work(n, n, 256, q.itemsize))


@pytest.mark.full
@pytest.mark.parametrize("n", [16384, 32768, 65536, 262144, 1048576])
def test_over_large_n(race: Any, device: torch.device, n: int) -> None:
    """Where the matrix takes gigabytes: ours and the limit alone on a CPU, for time and memory against N."""
    if device.type == "cpu" and n > 65536:
        pytest.skip("for a GPU: hours on a CPU")
    q, k = pair(n, n, 256, device)
    rows = torch.randperm(n, generator=torch.Generator().manual_seed(n))[:64].to(device)  # anywhere in a tile
    others = [other for other in one_sided(q, k, TEMPERATURE) if device.type == "cuda" or other.call is None]
    for other in others:
        if other.truth is not None:
            other.truth = truth_of_rows(q, k, TEMPERATURE, rows, two_sided=True)
    candidates = [Candidate("vito_kernels", with_gradients(ours, q, k), "ours"), *others]
    candidates.append(not_compiled("the reference makes whole matrices, of gigabytes; raced at N=4096"))
    if device.type == "cuda" or n < 32768:
        candidates.append(matmuls(q, k, 2))
    budget = Budget(seconds=1.0, fewest=3 if device.type == "cuda" else 1, most=60)
    race(
        "info_nce",
        {"N": n, "D": 256},
        candidates,
        truth=truth_of_rows(q, k, TEMPERATURE, rows),
        agree=sampled(rows),
        bound=1e-4 if q.dtype == torch.float32 else 2e-2,  # rounded logits and gradients, as the reference's
        work=work(n, n, 256, q.itemsize),
        budget=budget,
    )


@pytest.mark.full
@pytest.mark.parametrize("d", [64, 128, 192, 512, 1024])
def test_over_d(race: Any, device: torch.device, d: int) -> None:
    n = 4096 if device.type == "cuda" else 2048
    q, k = pair(n, n, d, device)
    candidates = [
        Candidate("vito_kernels", with_gradients(ours, q, k), "ours"),
        Candidate("reference", with_gradients(plain, q, k), "reference"),
        *one_sided(q, k, TEMPERATURE),
        matmuls(q, k, 2),
    ]
    candidates.insert(2, not_compiled(AT_4096))
    race("info_nce", {"N": n, "D": d}, candidates, truth=truth_of(plain, q, k), work=work(n, n, d, q.itemsize))


@pytest.mark.full
def test_other_precision(race: Any, device: torch.device) -> None:
    """bfloat16 on a CPU, float32 on a GPU: the unusual choices."""
    cuda = device.type == "cuda"
    n, dtype = (4096, torch.float32) if cuda else (1024, torch.bfloat16)
    q, k = pair(n, n, 256, device, dtype)
    candidates = [
        Candidate("vito_kernels", with_gradients(ours, q, k), "ours"),
        Candidate("reference", with_gradients(plain, q, k), "reference"),
        *one_sided(q, k, TEMPERATURE),
        matmuls(*((q, k) if cuda else (q.float(), k.float())), 2),  # CPUs multiply float32 faster
    ]
    candidates.insert(2, not_compiled(AT_4096))
    params = {"N": n, "D": 256, "dtype": str(dtype).removeprefix("torch.")}
    race("info_nce", params, candidates, truth=truth_of(plain, q, k), work=work(n, n, 256, q.itemsize))


@pytest.mark.parametrize("views", [2, pytest.param(3, marks=FULL), pytest.param(4, marks=FULL)])
def test_over_views(race: Any, device: torch.device, quick: bool, views: int) -> None:
    """All views' queries against all other views' keys of 1024 videos, keys of one's own video left out."""
    batch, d = 1024, 256
    q, k = pair(views * batch, views * batch, d, device)
    video = torch.arange(batch, device=device)

    def total(library: Any) -> Callable[[Tensor, Tensor], Tensor]:
        def call(q: Tensor, k: Tensor) -> Tensor:
            queries, keys = library.normalize(q).chunk(views), library.normalize(k).chunk(views)
            pairs = [(v, w) for v in range(views) for w in range(views) if v != w]
            options = {"temperature": TEMPERATURE, "q_group": video, "k_group": video}
            losses = [library.info_nce(queries[v], keys[w], **options) for v, w in pairs]
            return torch.stack(losses).sum()

        return call

    candidates = [
        Candidate("vito_kernels", with_gradients(total(vito_kernels), q, k), "ours"),
        Candidate("reference", with_gradients(total(reference), q, k), "reference"),
        matmuls(q, k[: (views - 1) * batch], 2),
    ]
    raced = views == 2 and not quick
    why = "each shape takes some 5 s to compile; raced at V=2 of the full set"
    candidates.insert(2, compiled(total(reference), q, k) if raced else not_compiled(why))
    flops = 4.0 * views * (views - 1) * batch**2 * d
    truth = truth_of(total(reference), q, k)
    amount = Work(flops, items=views * batch, unit="queries")
    race("info_nce_views", {"V": views, "B": batch}, candidates, truth=truth, work=amount)


@pytest.mark.parametrize("views", [pytest.param(2, marks=FULL), 3, pytest.param(4, marks=FULL)])
def test_multi_view(race: Any, device: torch.device, quick: bool, views: int) -> None:
    """VITO's loss: all ordered pairs of views, in one op and pair by pair."""
    batch, d = 1024, 256
    q, k = pair(views * batch, views * batch, d, device)
    pairs = [(a, b) for a in range(views) for b in range(views) if a != b]
    own = torch.arange(batch, device=device)

    def one_op(library: Any) -> Callable[[Tensor, Tensor], Tensor]:
        def call(q: Tensor, k: Tensor) -> Tensor:
            queries, keys = (library.normalize(x).unflatten(0, (views, batch)) for x in (q, k))
            return library.multi_view_info_nce(queries, keys, temperature=TEMPERATURE)

        return call

    def by_pair(term: Callable[[Tensor, Tensor], Tensor], library: Any) -> Callable[[Tensor, Tensor], Tensor]:
        def call(q: Tensor, k: Tensor) -> Tensor:
            queries, keys = (library.normalize(x).unflatten(0, (views, batch)) for x in (q, k))
            return torch.stack([term(queries[a], keys[b]) for a, b in pairs]).sum()

        return call

    def cross_entropy(q: Tensor, k: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy((q @ k.T).float() / TEMPERATURE, own)

    def info_nce(q: Tensor, k: Tensor) -> Tensor:
        return vito_kernels.info_nce(q, k, temperature=TEMPERATURE)

    plain = by_pair(cross_entropy, reference)
    candidates = [
        Candidate("vito_kernels", with_gradients(one_op(vito_kernels), q, k), "ours"),
        Candidate("reference", with_gradients(one_op(reference), q, k), "reference"),
        Candidate("torch cross_entropy, pair by pair", with_gradients(plain, q, k)),
        Candidate("info_nce, pair by pair", with_gradients(by_pair(info_nce, vito_kernels), q, k), "context"),
        matmuls(q, k[: (views - 1) * batch], 2),
    ]
    why = "each shape takes some 5 s to compile; raced at V=3 of the full set"
    candidates.insert(2, compiled(plain, q, k) if views == 3 and not quick else not_compiled(why))
    amount = Work(4.0 * views * (views - 1) * batch**2 * d, items=views * batch, unit="queries")
    race("multi_view_info_nce", {"V": views, "B": batch}, candidates, truth=truth_of(plain, q, k), work=amount)


@pytest.mark.parametrize("n", [16384, pytest.param(65536, marks=pytest.mark.full)])
def test_queue(race: Any, device: torch.device, n: int) -> None:
    """MoCo: few queries, each with its own key, against a long queue."""
    m, d = 256, 128
    q, k = pair(m, n + m, d, device)
    keys, queue = k[:m], k[m:]

    def moco(library: Any) -> Callable[[Tensor], Tensor]:
        """Normalizes everything in every call, as the peer always does."""

        def call(q: Tensor) -> Tensor:
            units = [library.normalize(t) for t in (q, keys.to(q.dtype), queue.to(q.dtype))]
            return library.moco_loss(*units, temperature=TEMPERATURE)

        return call

    def package() -> Callable[[Tensor], Tensor]:
        from info_nce import InfoNCE

        loss = InfoNCE(temperature=TEMPERATURE)
        return lambda q: loss(q, keys, queue)

    candidates = [
        Candidate("vito_kernels", with_gradients(moco(vito_kernels), q), "ours"),
        Candidate("reference", with_gradients(moco(reference), q), "reference"),
        compiled(moco(reference), q),
        peer("info-nce-pytorch", package, q, matrices=4.0 * 4 * m * n),
        matmuls(q, queue, 2),
    ]
    truth = truth_of(moco(reference), q)
    race("moco_loss", {"M": m, "N": n, "D": d}, candidates, truth=truth, work=work(m, n, d, q.itemsize))
