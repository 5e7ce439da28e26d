"""Wide embeddings, whose exponentials go through memory: on a GPU at such a width, in the interpreter at any."""

from __future__ import annotations

import pytest
import torch
from contrastive_cases import LAYOUTS, assert_at_most_twice_torch, embeddings, layout, with_gradients

from vito_kernels import clip_loss, info_nce, ntxent, reference, siglip_loss, similarity_lse, supcon_loss
from vito_kernels.contrastive import large_dim, replay

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy warns of the overflow that the kernels detect


class Counted:
    """``large_dim._run`` in strips of two tiles of keys and of rows, where there are that many."""

    def __init__(self, run):
        self.run, self.calls, self.tiles = run, 0, 2

    def __call__(self, x, *rest, **how):
        self.calls += 1
        with pytest.MonkeyPatch.context() as patch:
            height = 2 * large_dim._sizes()[0]
            patch.setattr(large_dim, "STRIP_ROWS", height)
            patch.setattr(large_dim, "STRIP_BYTES", 2 * min(height, len(x)) * self.tiles * large_dim._sizes()[0])
            return self.run(x, *rest, **how)


@pytest.fixture(autouse=True)
def run(device, monkeypatch):
    if device == "cpu":
        monkeypatch.setattr(large_dim, "WIDER_THAN", dict.fromkeys(large_dim.WIDER_THAN, 0))
    monkeypatch.setattr(replay, "ENABLED", False)  # a replayed call passes by what is counted here
    monkeypatch.setattr(large_dim, "_run", counted := Counted(large_dim._run))
    yield counted
    assert counted.calls > 0


@pytest.fixture
def width(device):
    return 40 if device == "cpu" else 744


def rows(device, count, width, seed, unit=True, dtype=torch.bfloat16):
    return embeddings(count, width, dtype, device, seed, unit)


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("shape", [(5, 9), (50, 33), (20, 300), (300, 70)], ids=str)
def test_info_nce_is_as_exact_as_torch(device, width, shape, kind):
    q, k = (rows(device, n, width, i) for i, n in enumerate(shape))
    kwargs = layout(kind, *shape, device) | {"temperature": 0.1, "reduction": "none"}
    assert_at_most_twice_torch(lambda *x: info_nce(*x, **kwargs), lambda *x: reference.info_nce(*x, **kwargs), [q, k])


@pytest.mark.parametrize("count", [7, 37])
@pytest.mark.parametrize("scale", [3.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_losses_of_two_sides(device, width, dtype, count, scale):
    x, y = (rows(device, count, width, i, dtype=dtype) for i in range(2))
    labels = torch.arange(count, device=device) // 3
    for ours, plain in (
        (lambda a, b: clip_loss(a, b, scale), lambda a, b: reference.clip_loss(a, b, scale)),
        (lambda a, b: ntxent(a, b, 1 / scale), lambda a, b: reference.ntxent(a, b, 1 / scale)),
        (lambda a, b: siglip_loss(a, b, scale, -2.0), lambda a, b: reference.siglip_loss(a, b, scale, -2.0)),
        (lambda a, b: supcon_loss(a + b, labels), lambda a, b: reference.supcon_loss(a + b, labels)),
    ):
        assert_at_most_twice_torch(ours, plain, [x, y], floor=16)


def test_few_queries_share_the_keys(device, width, run):
    """More keys than one program takes for two queries: their sums over the strip are added up."""
    run.tiles = 1000
    q, k = rows(device, 2, width, 0), rows(device, 2100, width, 1)
    assert_at_most_twice_torch(
        lambda a, b: similarity_lse(a, b, 12.0), lambda a, b: reference.similarity_lse(a, b, 12.0), [q, k], floor=8
    )


@pytest.mark.parametrize("length", [30.0, 1e-3], ids=["long", "short"])
def test_vectors_of_other_lengths(device, width, length):
    """Sums that leave the range of the fixed shift are repeated."""
    q, k = (length * rows(device, n, width, n, unit=False) for n in (20, 40))
    scale = torch.tensor(10.0, device=device)
    assert_at_most_twice_torch(similarity_lse, reference.similarity_lse, [q, k, scale])


def test_a_mean_that_overflows_is_repeated(device, width):
    q = rows(device, 20, width, 0)
    k = torch.zeros(40, width, dtype=torch.bfloat16, device=device)
    k[:, 0] = 3e15 * q[0, 0].sign()
    q[:, 0] = 0
    (lse, dq, _, _) = with_gradients(similarity_lse, [q, k, torch.tensor(10.0, device=device)])
    assert lse.isfinite().all()
    torch.testing.assert_close(dq[:, 0], 10 * k[0, 0].double().expand(20), rtol=1e-2, atol=0)


def test_no_key_is_seen(device, width):
    q, k = rows(device, 6, width, 0), rows(device, 9, width, 1)
    group = torch.zeros(15, dtype=torch.long, device=device)
    lse, dq, dk = with_gradients(lambda a, b: similarity_lse(a, b, 5.0, q_group=group[:6], k_group=group[:9]), [q, k])
    assert lse.tolist() == [-torch.inf] * 6
    assert not dq.any()
    assert not dk.any()


def test_strided_rows_and_twice_the_same(device, width):
    both = torch.cat([rows(device, 40, width, i) for i in range(2)], 1)
    q, k = both[::2, :width].requires_grad_(), both[1::2, width:].detach().requires_grad_()
    first = torch.autograd.grad(info_nce(q, k), (q, k))
    dense = [x.detach().clone().requires_grad_() for x in (q, k)]
    for one, other in zip(first, torch.autograd.grad(info_nce(*dense), dense), strict=True):
        assert torch.equal(one, other)


def test_sums_of_many_strips(device, width):
    """Of rows and of keys, without a mean: what one strip leaves is added up before the next one takes its place."""
    x, y = (rows(device, 150, width, i) for i in range(2))
    assert_at_most_twice_torch(lambda a, b: clip_loss(a, b, 20.0), lambda a, b: reference.clip_loss(a, b, 20.0), [x, y])
    with torch.no_grad():
        lse = similarity_lse(x, y, 20.0)
    truth = reference.similarity_lse(x.double(), y.double(), 20.0)
    torch.testing.assert_close(lse.double(), truth, rtol=1e-6, atol=1e-6)
