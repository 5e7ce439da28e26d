"""The losses by name: against their references, torch's cross_entropy, and the libraries they stand in for."""

from __future__ import annotations

import importlib.util
from unittest.mock import Mock

import pytest
import torch
from contrastive_cases import assert_at_most_twice_torch, embeddings, with_gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy, normalize

import vito_kernels as vk
from vito_kernels import reference
from vito_kernels.adapters.lightly import NTXentLoss as LightlyAdapter
from vito_kernels.adapters.open_clip import ClipLoss as ClipAdapter
from vito_kernels.contrastive import cpu, small

B, D = 24, 32


def pair(dtype=torch.float32, unit=True):
    return [embeddings(B, D, dtype, "cpu", i, unit) for i in range(2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_against_the_references(dtype, reduction):
    x, y = pair(dtype)
    labels = torch.arange(B) // 3
    queue = embeddings(50, D, dtype, "cpu", 9)
    how = {"reduction": reduction}
    cases = [
        (lambda m, a, b: m.info_nce(a, b, **how), [x, y]),
        (lambda m, a, b: m.ntxent(a, b, 0.2, **how), [x, y]),
        (lambda m, a: m.supcon_loss(a, labels, **how), [x]),
        (lambda m, a: m.moco_loss(a, y.to(a.dtype), queue.to(a.dtype), **how), [x]),
        (lambda m, a: m.lit_loss(y.to(a.dtype), a, 14.0), [x]),
        (lambda m, a, b: m.clip_loss(a, b, 14.0), [x, y]),
    ]
    for loss, inputs in cases:
        fused, plain = (lambda *t, f=loss, m=m: f(m, *t) for m in (vk, reference))
        assert_at_most_twice_torch(fused, plain, inputs, floor=16)


@pytest.mark.parametrize(
    "options",
    [
        {"label_smoothing": 0.1},
        *({"hard_negatives": beta} for beta in (1e-3, 0.7, 20.0)),
        {"debias": 0.1},
        {"debias": 0.05, "hard_negatives": 1.0},
    ],
    ids=str,
)
def test_options_of_info_nce(options):
    ids = {} if "label_smoothing" in options else {"q_group": torch.arange(B) // 2, "k_group": torch.arange(B) // 2}
    fused, plain = (lambda a, b, t, m=m: m.info_nce(a, b, temperature=t, **options, **ids) for m in (vk, reference))
    assert_at_most_twice_torch(fused, plain, [*pair(), torch.tensor(0.5)], floor=32)


def test_hard_negatives_take_two_passes(monkeypatch):
    """And one over 16 columns, which counts the negatives."""
    forward = Mock(wraps=cpu.lse_forward)
    monkeypatch.setattr(cpu, "lse_forward", forward)
    monkeypatch.setattr(small, "MOST_LOGITS", 0)
    x, y = (t.requires_grad_() for t in pair())
    for options, widths in (({}, [D]), ({"debias": 0.1}, [D, 16]), ({"hard_negatives": 0.7}, [D, 16, D])):
        forward.reset_mock()
        vk.info_nce(x, y, **options)
        assert [call.args[0].shape[1] for call in forward.call_args_list] == widths


def test_a_query_without_negatives_has_no_loss_under_any_option():
    x, y = (t[:1].requires_grad_() for t in pair())
    for options in ({"hard_negatives": 0.5}, {"debias": 0.1}, {"debias": 0.1, "hard_negatives": 2.0}):
        loss = vk.info_nce(x, y, **options)
        assert loss == 0
        assert not any(g.any() or g.isnan().any() for g in torch.autograd.grad(loss, (x, y)))


def test_label_smoothing_is_that_of_cross_entropy():
    x, y = pair()
    expected = cross_entropy(x @ y.T / 0.1, torch.arange(B), label_smoothing=0.2)
    torch.testing.assert_close(vk.InfoNCELoss(0.1, label_smoothing=0.2)(x, y), expected)


def test_modules_are_their_functions():
    x, y = pair()
    labels = torch.arange(B) // 2
    assert torch.equal(vk.InfoNCELoss(0.2)(x, y), vk.info_nce(x, y, temperature=0.2))
    assert torch.equal(vk.CLIPLoss()(x, y, 9.0), vk.clip_loss(x, y, 9.0))
    assert torch.equal(vk.LiTLoss()(x, y, 9.0), vk.lit_loss(x, y, 9.0))
    assert torch.equal(vk.NTXentLoss(0.2)(x, y), vk.ntxent(x, y, 0.2))
    assert torch.equal(vk.SupConLoss(0.2)(x, labels), vk.supcon_loss(x, labels, temperature=0.2))


def test_moco_replaces_its_oldest_keys_after_the_loss():
    torch.manual_seed(0)
    moco = vk.MoCoLoss(D, queue_size=40, temperature=0.2)
    x, y = pair()
    x.requires_grad_()
    before = moco.queue.clone()
    loss = moco(x, y)
    torch.testing.assert_close(loss, reference.moco_loss(x, y, before, temperature=0.2))
    loss.backward()  # although the queue has changed since
    assert torch.equal(moco.queue, torch.cat([y, before[B:]]))
    moco(x, y + 1)
    assert torch.equal(moco.queue[B:], (y + 1)[: 40 - B])
    assert torch.equal(moco.queue[: 2 * B - 40], (y + 1)[40 - B :])
    moco.eval()(x, y + 2)
    assert not torch.isin(moco.queue, y + 2).any()
    assert moco.state_dict()["oldest"] == 2 * B - 40


def test_pytorch_metric_learning():
    peer = pytest.importorskip("pytorch_metric_learning.losses")
    x, y = pair(unit=False)
    labels = torch.arange(B) // 3
    torch.testing.assert_close(vk.supcon_loss(x, labels), peer.SupConLoss(temperature=0.1)(x, labels))
    both = torch.cat([x, y]), torch.arange(B).repeat(2)
    torch.testing.assert_close(vk.ntxent(x, y, 0.1), peer.NTXentLoss(temperature=0.1)(*both))


def test_info_nce_pytorch():
    if importlib.util.find_spec("info_nce") is None:
        pytest.skip("info-nce-pytorch is not installed")
    from info_nce import info_nce

    x, y = pair()
    torch.testing.assert_close(vk.info_nce(x, y, temperature=0.1), info_nce(x, y, temperature=0.1))


shapes = st.tuples(st.integers(1, 12), st.integers(1, 20), st.integers(1, 24), st.integers(0, 2**31))


@settings(max_examples=60, deadline=None)
@given(shapes, st.floats(0.01, 3.0), st.booleans())
def test_any_shape_and_temperature(shape, temperature, unit):
    m, n, width, seed = shape
    draw = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(rows, width, generator=draw, dtype=torch.float64) for rows in (m, n))
    q, k = (normalize(q, dim=1), normalize(k, dim=1)) if unit else (q, k)
    ids = {"q_group": torch.randint(0, 3, (m,), generator=draw), "k_group": torch.randint(0, 3, (n,), generator=draw)}
    fused, plain = (
        lambda a, b, f=f: f(a, b, 1 / temperature, **ids) for f in (vk.similarity_lse, reference.similarity_lse)
    )
    for found, truth in zip(with_gradients(fused, [q, k]), with_gradients(plain, [q, k]), strict=True):
        torch.testing.assert_close(found, truth, rtol=1e-9, atol=1e-10)


@settings(max_examples=40, deadline=None)
@given(shapes, st.floats(-20, 20))
def test_invariances(shape, shift):
    """Keys may come in any order; a constant added to every logit is added to their log-sum-exp."""
    m, n, width, seed = shape
    draw = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(rows, width, generator=draw, dtype=torch.float64) for rows in (m, n))
    lse = vk.similarity_lse(q, k, 2.0)
    torch.testing.assert_close(vk.similarity_lse(q, k[torch.randperm(n, generator=draw)], 2.0), lse)
    ones = [torch.cat([x, x.new_full((len(x), 1), v)], 1) for x, v in ((q, shift / 2), (k, 1.0))]
    torch.testing.assert_close(vk.similarity_lse(*ones, 2.0), lse + shift)


X = torch.ones(4, 16)
IDS = torch.arange(4)
WRONG = [
    (ValueError, r"q must have shape.*\(4,\)", lambda: vk.info_nce(X[:, 0], X)),
    (ValueError, r"k must not be empty.*\(0, 16\)", lambda: vk.similarity_lse(X, X[:0], 1.0)),
    (ValueError, "same width, got 16 and 8", lambda: vk.similarity_lse(X, X[:, :8], 1.0)),
    (TypeError, "same dtype.*float32.*float64", lambda: vk.similarity_lse(X, X.double(), 1.0)),
    (TypeError, "int64", lambda: vk.similarity_lse(X.long(), X.long(), 1.0)),
    (TypeError, "list", lambda: vk.similarity_lse([1.0], X, 1.0)),
    (ValueError, "k is on meta", lambda: vk.similarity_lse(X, X.to("meta"), 1.0)),
    (ValueError, "finite, got nan", lambda: vk.similarity_lse(X, X, float("nan"))),
    (ValueError, "finite, got nan", lambda: vk.similarity_lse(X, X, torch.tensor(float("nan")))),
    (ValueError, "finite, got nan", lambda: vk.clip_loss(X, X, torch.tensor(float("nan")))),
    (ValueError, "positive and finite, got -1", lambda: vk.info_nce(X, X, temperature=torch.tensor(-1.0))),
    (ValueError, "positive and finite, got inf", lambda: vk.ntxent(X, X, torch.tensor(float("inf")))),
    (TypeError, "floating-point tensor, got torch.int64", lambda: vk.ntxent(X, X, torch.tensor(1))),
    (TypeError, "dense tensor, got torch.sparse_coo", lambda: vk.clip_loss(X, X.to_sparse(), 1.0)),
    (TypeError, "scale must be a number.*str", lambda: vk.similarity_lse(X, X, "1")),
    (ValueError, r"one element, got shape \(2,\)", lambda: vk.similarity_lse(X, X, torch.ones(2))),
    (ValueError, "temperature must be positive.*0", lambda: vk.info_nce(X, X, temperature=0.0)),
    (ValueError, "k_group is None", lambda: vk.similarity_lse(X, X, 1.0, q_group=IDS)),
    (ValueError, r"k_group must have shape \(4,\).*\(3,\)", lambda: vk.info_nce(X, X, q_group=IDS, k_group=IDS[:3])),
    (TypeError, "q_group must be int64.*float32", lambda: vk.info_nce(X, X, q_group=IDS.float(), k_group=IDS)),
    (ValueError, r"positive must lie in \[0, 4\), got 9", lambda: vk.info_nce(X, X, positive=IDS * 3)),
    (ValueError, r"positive must have shape.*\(3,\)", lambda: vk.info_nce(X, X, positive=IDS[:3])),
    (TypeError, "positive must hold int64.*float32", lambda: vk.info_nce(X, X, positive=IDS.float())),
    (ValueError, "4 queries and 3 keys", lambda: vk.info_nce(X, X[:3])),
    (ValueError, "reduction must be one of.*'avg'", lambda: vk.info_nce(X, X, reduction="avg")),
    (ValueError, r"label_smoothing must lie in \[0, 1\), got 1.5", lambda: vk.info_nce(X, X, label_smoothing=1.5)),
    (ValueError, "label_smoothing=0.1 needs", lambda: vk.info_nce(X, X, label_smoothing=0.1, debias=0.1)),
    (ValueError, "hard_negatives.*got -1", lambda: vk.InfoNCELoss(hard_negatives=-1)),
    (ValueError, "queue requires grad", lambda: vk.moco_loss(X, X, X.clone().requires_grad_())),
    (ValueError, "locked requires grad", lambda: vk.lit_loss(X.clone().requires_grad_(), X, 1.0)),
    (ValueError, "x and y must have as many rows, got 4 and 3", lambda: vk.clip_loss(X, X[:3], 1.0)),
    (ValueError, "z1 and z2 must have as many rows", lambda: vk.ntxent(X, X[:3], 0.1)),
    (ValueError, "labels must have shape", lambda: vk.supcon_loss(X, IDS[:2])),
    (ValueError, "more than the queue of 3", lambda: vk.MoCoLoss(16, 3)(X, X)),
    (ValueError, "k and queue must have the same width, got 8 and 16", lambda: vk.MoCoLoss(16, 8).enqueue(X[:, :8])),
    (TypeError, "k must be a tensor, got list", lambda: vk.MoCoLoss(16, 8).enqueue([1.0])),
    (TypeError, "debias must be a number, got str", lambda: vk.InfoNCELoss(debias="0.1")),
    (TypeError, "hard_negatives must be a number, got Tensor", lambda: vk.info_nce(X, X, hard_negatives=X[0])),
    (ValueError, r"temperature\) is on meta", lambda: vk.info_nce(X, X, temperature=torch.ones((), device="meta"))),
    (ValueError, "temperature must be positive and finite, got nan", lambda: LightlyAdapter(float("nan"), (8, 16))),
    (ValueError, "Illegal temperature", lambda: LightlyAdapter(0.0)),
    (ValueError, "use_horovod", lambda: ClipAdapter(use_horovod=True)),
    (ValueError, "memory bank size -7", lambda: LightlyAdapter(memory_bank_size=-7)),
]


@pytest.mark.parametrize(("kind", "message", "call"), WRONG, ids=[message for _, message, _ in WRONG])
def test_wrong_input_is_named(kind, message, call):
    with pytest.raises(kind, match=message):
        call()


def test_tracing_and_distributed_tensors_are_refused_in_one_line():
    x, y = pair()
    with pytest.raises(RuntimeError, match=r"use torch\.compile or"):
        torch.jit.trace(vk.info_nce, (x, y))
    sharded = type("DTensor", (torch.Tensor,), {})
    with pytest.raises(TypeError, match=r"x is a DTensor; pass x.to_local\(\)"):
        vk.clip_loss(x.as_subclass(sharded), y, 9.0)


def test_modules_show_their_options():
    assert repr(vk.InfoNCELoss(0.2, debias=0.1)) == (
        "InfoNCELoss(temperature=0.2, label_smoothing=0.0, hard_negatives=0.0, debias=0.1, decoupled=False, "
        "reduction=mean)"
    )
    assert "queue=(20, 8)" in repr(vk.MoCoLoss(8, 20))
    assert "world_size=2" in repr(ClipAdapter(local_loss=True, world_size=2))
    assert "temperature=0.1, memory_bank_size=(20, 8)" in repr(LightlyAdapter(0.1, (20, 8)))
