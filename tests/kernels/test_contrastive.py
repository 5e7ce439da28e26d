"""The contrastive primitive on the CPU path: exactness, extremes, memory, and everything PyTorch does with an op."""

from __future__ import annotations

import subprocess
import sys
from unittest.mock import Mock

import pytest
import torch
from contrastive_cases import (
    LAYOUTS,
    SHAPES,
    assert_at_most_twice_torch,
    assert_unseen_gets_nothing,
    embeddings,
    error,
    gradient_errors_under_autocast,
    layout,
    supcon_gradient_error_under_autocast,
    tight_classes,
    with_gradients,
)
from torch.utils.checkpoint import checkpoint

import vito_kernels
from vito_kernels import clip_loss, info_nce, ntxent, reference, siglip_loss, similarity_lse, supcon_loss
from vito_kernels.contrastive import cpu, cpu_tiles, small
from vito_kernels.contrastive.terms import LOG2E, Mask, SoftmaxGrad

FLOATS = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=[None, 16], ids=["whole", "many tiles"])
def tile_rows(request, monkeypatch):
    """The whole matrix at once, and with tiles so small that every shape has whole, ragged and diagonal ones, and a few
    of them are logit_cache."""
    if request.param:
        small_tiles(monkeypatch, request.param, logit_cache=3600)


def small_tiles(monkeypatch, rows, logit_cache):
    monkeypatch.setattr(small, "MOST_LOGITS", 0)
    monkeypatch.setattr(cpu_tiles, "tile_rows", lambda: rows)
    monkeypatch.setattr(cpu_tiles, "COLUMNS", rows + 8)
    monkeypatch.setattr(cpu_tiles, "CACHE_BYTES", logit_cache)  # bytes


@pytest.mark.parametrize("unit", [True, False], ids=["unit", "long"])
@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_info_nce_is_as_exact_as_torch(dtype, shape, kind, unit, tile_rows):
    m, n, width = shape
    q, k = (embeddings(rows, width, dtype, "cpu", i, unit) for i, rows in enumerate((m, n)))
    kwargs = layout(kind, m, n, "cpu") | {"temperature": 0.1, "reduction": "none"}
    floor = 4.0 if unit else 8.0  # a tie of logits of hundreds moves with their last bit
    fused, plain = (lambda *x, f=f: f(*x, **kwargs) for f in (info_nce, reference.info_nce))
    assert_at_most_twice_torch(fused, plain, [q, k], floor)


@pytest.mark.parametrize("temperature", [0.01, 0.013, 0.07, 2.0])
@pytest.mark.parametrize("grouped", [False, True])
def test_similarity_lse_and_its_scale(temperature, grouped, tile_rows):
    q, k = embeddings(40, 32, torch.float32, "cpu", 0), embeddings(70, 32, torch.float32, "cpu", 1)
    ids = {"q_group": torch.arange(40) // 3, "k_group": torch.arange(70) // 3} if grouped else {}
    scale = torch.tensor(1 / temperature)
    assert_at_most_twice_torch(
        lambda *x: similarity_lse(*x, **ids), lambda *x: reference.similarity_lse(*x, **ids), [q, k, scale]
    )


@pytest.mark.parametrize("loss", ["clip", "ntxent"])
@pytest.mark.parametrize("rows", [1, 2, 45])
@pytest.mark.parametrize("scale", [1.0, 14.0, 100.0])
def test_two_sided_losses(loss, rows, scale, tile_rows):
    x, y = embeddings(rows, 32, torch.float32, "cpu", 0), embeddings(rows, 32, torch.float32, "cpu", 1)
    pair = {"clip": (clip_loss, reference.clip_loss), "ntxent": (ntxent, reference.ntxent)}[loss]
    factor = torch.tensor(scale if loss == "clip" else 1 / scale)
    assert_at_most_twice_torch(*pair, [x, y, factor], floor=32)


@pytest.mark.parametrize("loss", ["clip", "ntxent", "supcon"])
@pytest.mark.parametrize("scale", [200.0, 1000.0, 5000.0])
def test_both_sides_take_the_same_logits(loss, scale, tile_rows):
    """A softmax of logits of thousands shows every rounding in which two computations of one of them differ."""
    x, y = (embeddings(200, 64, torch.float32, "cpu", i) for i in range(2))
    labels = torch.arange(400) // 4
    losses = {
        "clip": lambda m, x, y: m.clip_loss(x, y, scale),
        "ntxent": lambda m, x, y: m.ntxent(x, y, 1 / scale),
        "supcon": lambda m, x, y: m.supcon_loss(torch.cat([x, y]), labels, temperature=1 / scale),
    }
    ours, theirs = (lambda *sides, m=m: losses[loss](m, *sides) for m in (vito_kernels, reference))
    assert_at_most_twice_torch(ours, theirs, [x, y])


@pytest.mark.parametrize("p", [0.5, 0.99, 0.999, 0.9999])
def test_the_gradient_survives_a_confident_positive(p):
    """Peers put the positive into a low-precision product and lose what is left of 1 - p.

    The gradient in bfloat16 is one rounding of the true one: compared as computed, before it, the error is under 1e-3.
    """
    m, width = 64, 64
    k = embeddings(m, width, torch.bfloat16, "cpu", 0)
    q = (k.float() + 0.02 * embeddings(m, width, torch.float32, "cpu", 1)).bfloat16()
    low, high = 0.1, 60.0
    for _ in range(40):  # the scale at which the typical positive has probability p
        scale = (low + high) / 2
        typical = (scale * q.double() @ k.double().T).softmax(1).diagonal().median()
        low, high = (scale, high) if typical < p else (low, scale)
    truth = with_gradients(lambda a, b: reference.info_nce(a, b, temperature=1 / scale), [q, k], torch.float64)
    mine = with_gradients(lambda a, b: info_nce(a, b, temperature=1 / scale), [q, k])
    wide = with_gradients(lambda a, b: info_nce(a, b, temperature=1 / scale), [q.float(), k.float()])
    for found, whole, exact in zip(mine, wide, truth, strict=True):
        assert error(whole, exact) < 1e-3
        assert error(found, exact) < max(1e-3, 2**-8)  # half a unit in the last place of bfloat16


@pytest.mark.parametrize("scale", [86.0, 88.0, 90.0, 92.0, 94.0, 100.0])
@pytest.mark.parametrize("loss", [clip_loss, ntxent, lambda q, k, t: info_nce(q, k, temperature=t)])
def test_rows_far_from_all_others_have_the_little_gradient_that_is_left(loss, scale):
    """Softmaxes of 1e-37 and less, which neither underflow nor, brought to 1, overflow."""
    rows = torch.linalg.cholesky(torch.full((8, 8), 0.02, dtype=torch.float64).fill_diagonal_(1.0))
    number = scale if loss is clip_loss else 1 / scale
    mine, exact = (
        with_gradients(lambda q, k: loss(q, k, number), [rows.to(dtype), rows.to(dtype)])
        for dtype in (torch.float32, torch.float64)
    )
    for found, expected in zip(mine[1:], exact[1:], strict=True):
        assert found.isfinite().all()
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=2e-38)  # the smallest with all bits


@pytest.mark.parametrize(("dtype", "tiny"), [(torch.float32, 1e-39), (torch.float64, 1e-310)], ids=str)
def test_a_gradient_that_is_hardly_a_number(dtype, tiny):
    q, k = (embeddings(8, 16, torch.float32, "cpu", i).to(dtype).requires_grad_() for i in (0, 1))
    whole = torch.autograd.grad(info_nce(q, k), (q, k))
    share = torch.autograd.grad(info_nce(q, k), (q, k), torch.tensor(tiny, dtype=dtype))
    torch.testing.assert_close(list(share), [tiny * x for x in whole], rtol=1e-3, atol=tiny / 1e4)


def test_all_keys_excluded():
    q, k = (embeddings(n, 16, torch.float32, "cpu", n).requires_grad_() for n in (3, 5))
    same = {"q_group": torch.zeros(3, dtype=torch.long), "k_group": torch.zeros(5, dtype=torch.long)}
    lse = similarity_lse(q, k, 7.0, **same)
    assert (lse == -torch.inf).all()
    loss = info_nce(q, k, **same)
    loss.backward()
    assert loss == 0
    assert not q.grad.any()
    assert not k.grad.any()


def test_whatever_arrives_at_a_query_that_sees_no_key_is_lost():
    assert_unseen_gets_nothing("cpu")


def test_identical_keys_count_as_many():
    q, key = embeddings(4, 16, torch.float32, "cpu", 0), embeddings(1, 16, torch.float32, "cpu", 1)
    lse = similarity_lse(q, key.expand(1000, -1).contiguous(), 3.0)
    torch.testing.assert_close(lse, (3 * q @ key.T)[:, 0] + torch.log(torch.tensor(1000.0)))


@pytest.mark.parametrize("scale", [10.0, 100.0])
@pytest.mark.parametrize("loss", ["info_nce", "many", "clip", "ntxent"])
def test_the_loss_of_identical_keys(loss, scale, tile_rows):
    """Nothing but how many they are: a positive differs from none of its negatives, by no rounding either."""
    x = embeddings(1, 64, torch.float32, "cpu", 0).expand(150, -1)
    losses = {
        "info_nce": lambda m, x: m.info_nce(x, x, temperature=1 / scale),
        "many": lambda m, x: m.info_nce(x, x, temperature=1 / scale, positive=torch.arange(300).view(150, 2) % 150),
        "clip": lambda m, x: m.clip_loss(x, x, scale),
        "ntxent": lambda m, x: m.ntxent(x, x, 1 / scale),
    }
    found, expected = losses[loss](vito_kernels, x), losses[loss](reference, x.double())
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)


def test_strided_rows_are_read_in_place():
    wide = embeddings(40, 64, torch.float32, "cpu", 0)
    q, k = wide[::2, :32], wide[1::2, 32:]
    torch.testing.assert_close(similarity_lse(q, k, 5.0), similarity_lse(q.contiguous(), k.contiguous(), 5.0))
    torch.testing.assert_close(similarity_lse(q.T.contiguous().T, k, 5.0), similarity_lse(q, k, 5.0))


def test_gradcheck_in_float64(tile_rows):
    q, k = (embeddings(n, 4, torch.float64, "cpu", n).requires_grad_() for n in (3, 28))
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    ids = {"q_group": torch.arange(3) // 2, "k_group": torch.arange(28) // 4}
    many = torch.tensor([[0, 3], [1, 1], [27, 18]])
    torch.autograd.gradcheck(lambda *x: similarity_lse(*x, **ids), (q, k, scale))
    torch.autograd.gradcheck(lambda a, b, t: info_nce(a, b, temperature=t, positive=many), (q, k, scale))
    torch.autograd.gradcheck(lambda b, s: clip_loss(b, b.roll(1, 0), s), (k, scale))
    torch.autograd.gradcheck(lambda b, t: ntxent(b[:14], b[14:], t), (k, scale))


def test_gradcheck_where_a_running_maximum_is_needed():
    q, k = (4 * embeddings(n, 4, torch.float64, "cpu", n) for n in (4, 7))
    scale = torch.tensor(30.0, dtype=torch.float64)
    q, k = q.detach().requires_grad_(), k.detach().requires_grad_()
    torch.autograd.gradcheck(lambda a, b: similarity_lse(a, b, scale), (q, k), rtol=1e-4)
    torch.autograd.gradcheck(lambda a, b: clip_loss(a, b[:4], scale), (q, k), rtol=1e-4)


def test_ops_are_registered_in_full():
    q, k = (embeddings(n, 16, torch.float32, "cpu", n).requires_grad_() for n in (6, 9))
    scale = torch.tensor(3.0, requires_grad=True)
    ids = (torch.arange(6) // 2, torch.arange(9) // 2)
    ops = torch.ops.vito_kernels
    locked, listed = k.detach(), torch.tensor([[1]] * 6)
    for args in (
        (q, k, scale, None, None, None, 0, True),
        (q, k, scale, *ids, None, None, True),
        (q, locked, scale.detach(), None, None, listed, None, True),
    ):
        torch.library.opcheck(ops.similarity_lse.default, args)
    for args in (
        (q, k, None, scale, None, None, None, 0, True, "mean", False),
        (q, locked, None, scale.detach(), *ids, listed, None, True, "none", True),
        (q, k, k[:6], scale, None, None, None, None, True, "sum", False),
    ):
        torch.library.opcheck(ops.one_sided_loss.default, args)
    label, key_label, bias = torch.tensor([0, 0, 2, 2, 2, 5]), torch.arange(9) // 2, torch.tensor(-1.0)
    for diagonal in (0, None):
        torch.library.opcheck(ops.siglip.default, (q, k, scale, bias.requires_grad_(), diagonal, True, "mean"))
    torch.library.opcheck(ops.per_query_lse.default, (q, k[:6, None].expand(6, 3, 16).contiguous(), scale, True))
    torch.library.opcheck(ops.positive_rank.default, (q.detach(), k.detach(), bias.detach(), *ids, None))
    for cache_logits in (False, True):
        torch.library.opcheck(ops.similarity_lse.default, (q, k, scale, None, None, None, 0, True, None, cache_logits))
        torch.library.opcheck(ops.two_sided_lse.default, (q, k, scale, 1, None, cache_logits))
        for times in (1, 100):  # by exponentials, and with a running maximum
            torch.library.opcheck(ops.two_sided_loss.default, (q, k[:6], times * scale, None, cache_logits))
            given = k[:6], q, times * scale, "none" if cache_logits else "mean", False
            torch.library.opcheck(ops.ntxent.default, (*given, None, cache_logits))
            given = q, None, times * scale, label, None, 0
            torch.library.opcheck(ops.supcon.default, (*given, "mean", None, cache_logits))
        torch.library.opcheck(ops.supcon.default, (q, k, scale, label, key_label, 1, "none", None, cache_logits))


@pytest.mark.parametrize(
    "loss",
    [
        lambda q, k: info_nce(q, k, temperature=0.2),
        lambda q, k: info_nce(q, k, hard_negatives=1.0, debias=0.1),
        lambda q, k: similarity_lse(q, k, 4.0, q_group=torch.arange(6), k_group=torch.arange(9)).sum(),
        lambda q, k: clip_loss(q, k[:6], 4.0),
        lambda q, k: ntxent(q, k[:6], 0.3),
        lambda q, k: siglip_loss(q, k[:6], 4.0, torch.tensor(-2.0)),
        lambda q, k: supcon_loss(q, torch.arange(6) // 2, keys=k, key_labels=torch.arange(9) // 3),
        lambda q, k: ntxent(q, k[:6], 0.3, decoupled=True),
    ],
    ids=["info_nce", "options", "lse", "clip", "ntxent", "siglip", "supcon", "decoupled"],
)
def test_under_every_transform_of_pytorch(loss):
    q, k = (embeddings(n, 16, torch.float32, "cpu", n).requires_grad_() for n in (6, 9))
    expected = torch.autograd.grad(loss(q, k), (q, k))
    again = torch.func.grad(loss, argnums=(0, 1))(q.detach(), k.detach())
    held = torch.autograd.grad(checkpoint(loss, q, k, use_reentrant=False), (q, k))
    for found in (again, held):  # of few rows, the plain call has another way than the transformed one
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    first = torch.autograd.grad(loss(q, k), q, create_graph=True)[0]
    with pytest.raises(RuntimeError, match=r"no second derivative.*vito_kernels\.reference"):
        first.sum().backward()
    with pytest.raises(RuntimeError, match="has no vmap; loop over the batch"):
        torch.vmap(loss, (0, None))(q[None], k)
    with pytest.raises(RuntimeError, match="has no vmap; loop over the batch"):
        torch.autograd.grad(loss(q, k), q, torch.ones(3), is_grads_batched=True)


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
def test_compiles_without_a_graph_break(dynamic):
    q, k = (embeddings(n, 16, torch.float32, "cpu", n).requires_grad_() for n in (6, 9))

    def step(q, k):
        return info_nce(2 * q, k, temperature=0.2) + clip_loss(q, k[:6], 4.0) + ntxent(q, k[:6], 0.3)

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k), step(q, k))
    torch.testing.assert_close(torch.autograd.grad(compiled(q, k), (q, k)), torch.autograd.grad(step(q, k), (q, k)))


def test_autocast_rounds_the_embeddings_and_nothing_else():
    q, k = (embeddings(n, 16, torch.float32, "cpu", n).requires_grad_() for n in (6, 9))
    with torch.autocast("cpu", torch.bfloat16):
        loss = info_nce(q, k, temperature=0.07)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, info_nce(q.bfloat16(), k.bfloat16(), temperature=0.07), rtol=3e-7, atol=0)
    assert torch.autograd.grad(loss, q)[0].dtype == torch.float32


@pytest.mark.parametrize("options", [{"label_smoothing": 0.5}, {"hard_negatives": 1.0}, {"debias": 0.1}], ids=str)
def test_options_under_autocast_are_those_of_the_rounded_embeddings(options):
    """Of embeddings that have a direction in common, so that the mean over the keys is no rounding error."""
    q, k = (embeddings(40, 32, torch.float32, "cpu", i) + 0.1 for i in range(2))
    truth = with_gradients(
        lambda a, b: reference.info_nce(a, b, temperature=0.05, **options),
        [x.bfloat16().double() for x in (q, k)],
    )
    with torch.autocast("cpu", torch.bfloat16):
        found = with_gradients(lambda a, b: info_nce(a, b, temperature=0.05, **options), [q, k])
    for mine, exact in zip(found, truth, strict=True):
        assert error(mine, exact) < 1e-5


@pytest.mark.parametrize("p_positive", [0.9, 0.99, 0.999, 0.9999])
def test_gradients_under_autocast_are_not_rounded(p_positive):
    errors = gradient_errors_under_autocast("cpu", p_positive)
    assert max(errors.values()) < 1e-3, errors


@pytest.mark.parametrize(("p_positive", "bound"), [(0.9, 1e-5), (0.99, 1e-4), (0.999, 1e-3), (0.9999, 5e-3)])
def test_supcon_keeps_what_likely_positives_leave(p_positive, bound):
    """1 - p to the last bit of p in float32, as torch's softmax in float32 has it."""
    assert supcon_gradient_error_under_autocast("cpu", p_positive) < bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("classes", [1, 4])
def test_supcon_of_tight_classes_is_as_exact_as_torch(dtype, classes, tile_rows):
    z, labels = tight_classes(300, 64, classes, 0.02)
    pair = [lambda x, f=f: f(x, labels) for f in (supcon_loss, reference.supcon_loss)]
    assert_at_most_twice_torch(*pair, [z.to(dtype)], floor=32)


def test_a_small_share_of_a_large_loss_has_its_gradient():
    """Times 2^-lse it would be below the smallest float."""
    k = embeddings(20, 32, torch.float32, "cpu", 0)
    q = (k + 0.01).requires_grad_()
    k.requires_grad_()
    whole = torch.autograd.grad(similarity_lse(q, k, 60.0).sum(), (q, k))
    share = torch.autograd.grad(similarity_lse(q, k, 60.0).sum() * 2.0**-60, (q, k))
    torch.testing.assert_close([2.0**60 * x for x in share], list(whole), rtol=1e-6, atol=0)


def test_no_gradient_costs_half():
    """Without a gradient the mean of the keys is not made; with one, the backward pass of q is a scaling."""
    q, k = (embeddings(n, 16, torch.float32, "cpu", n) for n in (6, 9))
    seen = []
    ops = torch.ops.vito_kernels
    original = cpu.lse_forward

    def spy(*args):
        seen.append(args[4:])
        return original(*args)

    cpu.lse_forward = spy
    try:
        similarity_lse(q, k, 2.0)
        similarity_lse(q, k.requires_grad_(), 2.0)
        similarity_lse(q.requires_grad_(), k, 2.0)
        with torch.no_grad():
            similarity_lse(q, k, 2.0)
    finally:
        cpu.lse_forward = original
    assert [(compute_grad_q, logit_cache.numel() > 0) for compute_grad_q, _, logit_cache in seen] == [
        (False, False), (False, True), (True, True), (False, False)
    ]  # fmt: skip
    assert ops.similarity_lse(q, k, torch.tensor(2.0), None, None, None, None, False)[2].shape == (0, 16)


LOSSES = {
    "info_nce": lambda x, y, scale: info_nce(x, y, temperature=1 / scale),
    "groups": lambda x, y, scale: similarity_lse(x, y, scale, q_group=GROUPS, k_group=GROUPS).sum(),
    "clip": clip_loss,
    "ntxent": lambda x, y, scale: ntxent(x, y, 1 / scale),
}
GROUPS = torch.arange(50) // 2


@pytest.mark.parametrize("scale", [10.0, 200.0], ids=["direct", "online"])
@pytest.mark.parametrize("loss", LOSSES)
def test_cached_logits_change_no_gradient(loss, scale, monkeypatch):
    """Nor does a second backward pass, or one that would divide the logits into other tiles, as with more threads."""
    x, y = (embeddings(50, 16, torch.float32, "cpu", i, True).requires_grad_() for i in range(2))
    products = Mock(wraps=torch.mm)
    monkeypatch.setattr(torch, "mm", products)

    def gradients(logit_cache):
        small_tiles(monkeypatch, 16, logit_cache)
        value = LOSSES[loss](x, y, scale)
        small_tiles(monkeypatch, 16 if logit_cache == 0 else 20, logit_cache)
        monkeypatch.setattr(cpu_tiles, "COLUMNS", 24)
        products.reset_mock()
        return [torch.autograd.grad(value, (x, y), retain_graph=True) for _ in range(2)]

    expected = gradients(0)[0]
    computed = products.call_count
    for logit_cache, share in ((700, 0.9), (1 << 20, 0.0)):
        for found in gradients(logit_cache):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert products.call_count <= share * computed


def test_listed_positives_give_keys_the_same_gradient_every_time():
    """Thousands of queries share a few keys, whose gradients several threads could add up in any order."""
    q, k = embeddings(4096, 128, torch.float32, "cpu", 0), embeddings(64, 128, torch.float32, "cpu", 1)
    positive = torch.randint(0, 64, (4096,), generator=torch.Generator().manual_seed(0))
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        first, *others = (with_gradients(lambda b: info_nce(q, b, positive=positive), [k])[1] for _ in range(12))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(first, other) for other in others)


def test_one_sided_key_gradient_equals_the_two_sided_form():
    x, y = embeddings(30, 16, torch.float32, "cpu", 0), embeddings(20, 16, torch.float32, "cpu", 1)
    scale, weight = torch.tensor(6.0), torch.rand(30)
    lse = similarity_lse(x, y, scale)
    alone = cpu.lse_backward(x, y, scale, SoftmaxGrad(lse * LOG2E, weight), None, Mask(), False, True)[1]
    columns = SoftmaxGrad(similarity_lse(y, x, scale) * LOG2E, torch.zeros(20))
    torch.testing.assert_close(
        alone, cpu.lse_backward(x, y, scale, SoftmaxGrad(lse * LOG2E, weight), columns, Mask(), True, True)[1]
    )


MEMORY = """
import resource, torch
from vito_kernels import info_nce
q = torch.nn.functional.normalize(torch.randn({n}, 256), dim=1).requires_grad_()
k = torch.nn.functional.normalize(torch.randn({n}, 256), dim=1)
info_nce(q[:64], k[:64]).backward()
q.grad = None
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
info_nce(q, k).backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_memory_does_not_grow_with_the_matrix():
    """At M = N = 12288 the matrix alone would take 576 MiB, and autograd three of it."""
    run = subprocess.run([sys.executable, "-c", MEMORY.format(n=12288)], capture_output=True, text=True, check=True)
    assert float(run.stdout) < 100


def test_runs_where_triton_is_not_installed():
    """Importing leaves triton alone; a machine without it has the CPU path."""
    script = """
import sys
sys.modules["triton"] = None
import torch, vito_kernels
q, k = torch.ones(2, 3, 16)
vito_kernels.info_nce(q.requires_grad_(), k).backward()
"""
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    script = "import sys, vito_kernels; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


@pytest.mark.parametrize("gap", [60.0, 86.0, 88.5, 95.0, 103.0, 2000.0])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_positive_whose_probability_underflows_has_its_loss(gap, reduction):
    q, k = torch.eye(4), torch.eye(4).roll(1, 0)
    k[0] = q[0]  # of two keys alike
    s = gap * q.double() @ k.double().T
    rows, columns = (torch.nn.functional.cross_entropy(x, torch.arange(4), reduction=reduction) for x in (s, s.T))
    found = info_nce(q, k, temperature=1 / gap, reduction=reduction)
    torch.testing.assert_close(found.double(), rows, rtol=1e-6, atol=0.0)
    if reduction == "mean":
        torch.testing.assert_close(clip_loss(q, k, gap).double(), (rows + columns) / 2, rtol=1e-6, atol=0.0)
