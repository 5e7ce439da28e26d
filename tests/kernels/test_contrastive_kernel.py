"""The contrastive Triton kernels, on a GPU or in the interpreter: exactness, layouts, extremes, determinism."""

from __future__ import annotations

from unittest.mock import Mock
from weakref import ref

import pytest
import torch
from contrastive_cases import (
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
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vito_kernels import clip_loss, info_nce, ntxent, reference, similarity_lse, supcon_loss
from vito_kernels._core.lazy_triton import interpreting, use_triton
from vito_kernels.contrastive import cpu, forward, large_dim, tile_configs, two_sided_forward
from vito_kernels.contrastive.gpu import path_of
from vito_kernels.contrastive.one_sided import similarity_lse_op
from vito_kernels.contrastive.terms import LOG2E, Mask
from vito_kernels.contrastive.tile_configs import Tile
from vito_kernels.contrastive.two_sided_forward import launch_two_sided
from vito_kernels.distributed import ring

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy warns of the overflow that the kernels detect
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def test_these_tests_run_triton(device):
    assert use_triton(torch.ones(1, device=device))


@pytest.mark.parametrize("kind", ["none", "groups", "positive", "many", "dozen"])
@pytest.mark.parametrize("shape", [(5, 9, 16), (35, 70, 48), (18, 33, 100)])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_info_nce_is_as_exact_as_torch(device, dtype, shape, kind):
    m, n, width = shape
    q, k = (embeddings(rows, width, dtype, device, i) for i, rows in enumerate((m, n)))
    kwargs = layout(kind, m, n, device) | {"temperature": 0.1, "reduction": "none"}
    assert_at_most_twice_torch(lambda *x: info_nce(*x, **kwargs), lambda *x: reference.info_nce(*x, **kwargs), [q, k])


@pytest.fixture
def products(device, monkeypatch):
    """Sets how float32 products are taken; the interpreter takes them in parts only when told to."""
    chosen = {"highest": "bf16x6", "high": "bf16x3"}
    before = torch.get_float32_matmul_precision()

    def choose(precision):
        torch.set_float32_matmul_precision(precision)
        if interpreting():
            monkeypatch.setattr(tile_configs, "precision", lambda dtype, D: chosen[precision])

    yield choose
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("scale", [10.0, 100.0])
@pytest.mark.parametrize("shape", [(18, 33, 100), (20, 20, 48)], ids=str)
def test_float32_in_three_parts_is_as_exact_as_torch(device, products, shape, scale):
    m, n, width = shape
    q, k = (embeddings(rows, width, torch.float32, device, i) for i, rows in enumerate((m, n)))
    products("highest")
    factor = torch.tensor(scale, device=device)
    assert_at_most_twice_torch(similarity_lse, reference.similarity_lse, [q, k, factor])
    if m == n:
        assert_at_most_twice_torch(clip_loss, reference.clip_loss, [q, k, factor], floor=32)


def test_float32_in_two_parts_keeps_sixteen_bits(device, products):
    q, k = (embeddings(20, 64, torch.float32, device, i) for i in range(2))
    products("high")
    scale = torch.tensor(20.0, device=device)
    truth = with_gradients(reference.similarity_lse, [q, k, scale], torch.float64)
    errors = [error(x, y) for x, y in zip(with_gradients(similarity_lse, [q, k, scale]), truth, strict=True)]
    assert 2**-24 < max(errors) < 2**-14, errors


def test_a_matrix_is_split_once_in_each_pass(device, products, monkeypatch):
    """Whatever launches read it, as rows or as columns."""
    splits = Mock(wraps=tile_configs.split)
    monkeypatch.setattr(tile_configs, "split", splits)
    products("highest")
    x, y = (embeddings(20, 48, torch.float32, device, i).requires_grad_() for i in range(2))
    in_parts = tile_configs.precision(torch.float32, 48) in tile_configs.PARTS  # not on every GPU
    for loss, matrices in ((info_nce, 2), (lambda x, y: clip_loss(x, y, 5.0), 2), (lambda x, y: ntxent(x, y, 0.2), 1)):
        splits.reset_mock()
        value = loss(x, y)
        assert splits.call_count == matrices * in_parts
        value.backward()
        assert splits.call_count == 2 * matrices * in_parts


def test_numbers_whose_small_parts_alone_would_overflow(device, products):
    products("highest")
    q = 1e22 * torch.rand(3, 16, generator=torch.Generator().manual_seed(0)).to(device)
    assert similarity_lse(q, -q, 1.0).tolist() == [-torch.inf] * 3


@pytest.mark.parametrize("unit", [True, False], ids=["unit", "long"])
@pytest.mark.parametrize("temperature", [0.01, 0.07])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_what_the_fixed_shift_cannot_hold_is_repeated(device, dtype, temperature, unit):
    """On a grid on which q . k is exact, in whatever order it is summed: where a softmax is saturated, a key gradient
    is only as good as its second q . k agrees with the first, and NumPy's depends on which of the two stands left.
    """
    grid = 2.0**11 if unit else 2.0**6
    q, k = ((embeddings(rows, 32, dtype, device, rows, unit) * grid).round() / grid for rows in (20, 40))
    scale = torch.tensor(1 / temperature, device=device)
    assert_at_most_twice_torch(similarity_lse, reference.similarity_lse, [q, k, scale])


def test_opposite_vectors_underflow_the_fixed_shift_only(device):
    """At temperature 0.01 a logit of -100 is 289 powers of two below the largest possible one."""
    q = torch.zeros(3, 16, device=device, dtype=torch.bfloat16)
    q[:, 0] = 1
    lse = similarity_lse(q, -q, 100.0)
    torch.testing.assert_close(lse, torch.full((3,), -100.0, device=device) + torch.log(torch.tensor(3.0)))


@pytest.mark.parametrize("rows", [1, 20, 37])
@pytest.mark.parametrize("scale", [5.0, 100.0])
def test_two_sided_losses(device, rows, scale):
    x, y = (embeddings(rows, 40, torch.float32, device, i) for i in range(2))
    factor = torch.tensor(scale, device=device)
    assert_at_most_twice_torch(clip_loss, reference.clip_loss, [x, y, factor], floor=32)
    assert_at_most_twice_torch(ntxent, reference.ntxent, [x, y, 1 / factor], floor=32)


@pytest.mark.parametrize("diagonal", [0, None], ids=["pairs", "visiting"])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (20, 37), (37, 20)])
def test_two_sided_sums_in_bfloat16(device, rows, columns, diagonal):
    """The transposed tile, which float32 does not take; ``visiting`` is the ring's, where nothing is masked."""
    x, y = (embeddings(n, 40, torch.bfloat16, device, n) for n in (rows, columns))
    scale = torch.tensor(20.0, device=device)
    found = launch_two_sided(x, y, scale, Mask(diagonal=diagonal))
    masked = torch.eye(rows, columns, dtype=torch.bool, device=device) & (diagonal is not None)
    logits = (20 * x.double() @ y.double().T).masked_fill(masked, -torch.inf)
    for (sums, rest), dim in zip(found, (1, 0), strict=True):
        torch.testing.assert_close((sums.double() + rest) / LOG2E, logits.logsumexp(dim), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("diagonal", [0, 3, None])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_two_sided_sums_in_strips_of_rows(device, monkeypatch, dtype, diagonal):
    """Each strip knows where on the diagonal it lies; the last one is ragged, and one strip is what it was."""
    own = tile_configs.choose_tile("two_sided", 40, dtype).block_m
    x, y = embeddings(5 * own - 3, 40, dtype, device, 0), embeddings(5 * own + 2, 40, dtype, device, 1)
    scale = torch.tensor(20.0, device=device)

    def run(blocks):
        monkeypatch.setattr(two_sided_forward, "STRIP_BYTES", 4 * len(y) * blocks)
        return launch_two_sided(x, y, scale, Mask(diagonal=diagonal))

    strips = run(2)
    for one, other in ((run(5), run(1000)), (strips, run(2))):
        assert all(map(torch.equal, (*one[0], *one[1]), (*other[0], *other[1])))
    logits = 20 * x.double() @ y.double().T
    if diagonal is not None:
        logits.diagonal(diagonal).fill_(-torch.inf)
    for (sums, rest), dim in zip(strips, (1, 0), strict=True):
        torch.testing.assert_close((sums.double() + rest) / LOG2E, logits.logsumexp(dim), rtol=1e-6, atol=1e-6)


class Peak(TorchDispatchMode):
    """The most bytes that tensors created within it took at a time."""

    def __init__(self):
        super().__init__()
        self.alive, self.bytes = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        self.alive = [known for known in self.alive if known() is not None] + [ref(x) for x in tree_leaves(found)]
        storages = [known().untyped_storage() for known in self.alive]
        self.bytes = max(self.bytes, sum({storage._cdata: storage.nbytes() for storage in storages}.values()))
        return found


class Silent:
    """A kernel that does not run."""

    launches = 0

    def __getitem__(self, grid):
        self.launches += 1
        return lambda *_, **__: None


@pytest.mark.parametrize(("rows", "width"), [(1 << 20, 128), (1 << 19, 1024)])
def test_memory_of_two_sides_is_not_quadratic(monkeypatch, rows, width):
    """On tensors without memory, of which only the sizes count."""
    kernel = Silent()
    for module, name in (
        (two_sided_forward, "two_sided_lse_fwd_kernel"),
        (large_dim, "large_dim_weights_kernel"),
    ):
        monkeypatch.setattr(module, name, kernel)
    monkeypatch.setattr(forward, "summed_lse_fwd_kernel", Silent())
    monkeypatch.setattr(tile_configs, "interpreting", lambda: True)
    monkeypatch.setattr(large_dim, "_sizes", lambda: (128, 64, "native"))
    monkeypatch.setattr(large_dim, "supports", lambda *_: width == 1024)
    for module in (forward, two_sided_forward):
        monkeypatch.setattr(module, "choose_tile", lambda *_: Tile(32, 16, 128, 4, 2))
    x, scale = torch.empty(rows, width, dtype=torch.bfloat16, device="meta"), torch.empty((), device="meta")
    with Peak() as peak:
        launch_two_sided(x, x, scale, Mask(diagonal=0))
    assert kernel.launches > 50
    assert peak.bytes < 1 << 30  # of which x, where strips of it are seen, takes a quarter


@pytest.mark.parametrize("p_positive", [0.9, 0.9999])
def test_gradients_under_autocast_are_not_rounded(device, p_positive):
    errors = gradient_errors_under_autocast(device, p_positive)
    assert max(errors.values()) < 1e-3, errors


@pytest.mark.parametrize(("p_positive", "bound"), [(0.9, 3e-3), (0.999, 3e-3), (0.9999, 1e-2)])
def test_supcon_keeps_what_likely_positives_leave(device, p_positive, bound):
    assert supcon_gradient_error_under_autocast(device, p_positive) < bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_supcon_of_tight_classes(device, dtype):
    z, labels = tight_classes(48, 32, 3, 0.05)
    pair = [lambda x, f=f: f(x, labels.to(x.device)) for f in (supcon_loss, reference.supcon_loss)]
    assert_at_most_twice_torch(*pair, [z.to(device, dtype)], floor=32)


@pytest.mark.parametrize("loss", [lambda x, y: info_nce(x, y), lambda x, y: clip_loss(x, y, 9.0)], ids=["one", "two"])
def test_autocast_mixes_dtypes(device, loss):
    """Sides of 16 bits give what float32 of their values gives, but for the rounding of their gradient."""
    grid = (64 * embeddings(20, 32, torch.float32, device, i) for i in range(2))
    x, y = (x.round().div(64).bfloat16() for x in grid)
    results = []
    for sides in ((x.float(), y.float()), (x, y.float()), (x.float(), y), (x, y.half()), (x.half(), y.float())):
        leaves = [side.detach().requires_grad_() for side in sides]
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            value = loss(*leaves)
        results.append([value, *torch.autograd.grad(value, leaves)])
    for found in results[1:]:
        for one, exact in zip(found, results[0], strict=True):
            torch.testing.assert_close(one, exact.to(one.dtype), rtol=0, atol=0)


def test_supcon(device):
    labels = torch.randint(0, 7, (30,), generator=torch.Generator().manual_seed(0)).to(device)
    z = embeddings(30, 32, torch.float32, device, 0, unit=False)
    pair = [lambda x, f=f: f(x, labels) for f in (supcon_loss, reference.supcon_loss)]
    assert_at_most_twice_torch(*pair, [z], floor=32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_far_from_all_others_have_a_gradient(device, dtype):
    """Softmaxes of 1e-37 and less, which brought to 1 would overflow."""
    rows = torch.linalg.cholesky(torch.full((8, 8), 0.02, dtype=torch.float64).fill_diagonal_(1.0))
    x, y = (rows.to(device, dtype).repeat(1, 2).requires_grad_() for _ in range(2))
    for scale in (44.0, 45.0, 46.0, 50.0):
        for loss in (clip_loss(x, y, scale), info_nce(x, y, temperature=1 / scale), ntxent(x, y, 1 / scale)):
            for gradient in torch.autograd.grad(loss, (x, y)):
                assert gradient.isfinite().all()
                assert gradient.any() or dtype == torch.float16 or scale == 50.0


def test_all_keys_excluded_and_one_of_each(device):
    q, k = (embeddings(n, 16, torch.float32, device, n).requires_grad_() for n in (3, 20))
    ids = {"q_group": torch.zeros(3, dtype=torch.long, device=device)}
    ids["k_group"] = torch.zeros(20, dtype=torch.long, device=device)
    lse = similarity_lse(q, k, 7.0, **ids)
    assert (lse == -torch.inf).all()
    info_nce(q, k, **ids).backward()
    assert not q.grad.any()
    assert not k.grad.any()
    assert info_nce(q[:1], k[:1]) == 0


def test_logits_that_overflow_downwards_count_as_masked(device):
    """Whole tiles of them, alone and before keys that are seen."""
    q, k = torch.full((20, 16), 1e20, device=device), torch.full((40, 16), -1e20, device=device)
    assert similarity_lse(q, k, 1.0).tolist() == [-torch.inf] * 20
    k[36] = 1e-20
    torch.testing.assert_close(similarity_lse(q, k, 1.0), torch.full((20,), 16.0, device=device))


def test_few_queries_split_the_keys(device):
    """Two queries against 3000 keys: several programs share them, and their parts are merged."""
    q, k = (embeddings(n, 24, torch.float32, device, n) for n in (2, 3000))
    assert_at_most_twice_torch(
        lambda a, b: similarity_lse(a, b, 12.0), lambda a, b: reference.similarity_lse(a, b, 12.0), [q, k], floor=32
    )


@pytest.mark.parametrize("compute_grad_q", [True, False])
@pytest.mark.parametrize("second", [0, 1])
def test_what_a_visiting_block_adds_is_merged_by_one_kernel(device, monkeypatch, second, compute_grad_q):
    """The queries' groups apply_mask the first block of keys, the second, both or none of them."""
    monkeypatch.setattr(cpu, "merge_splits", Mock(side_effect=AssertionError))
    q, k = (embeddings(n, 40, torch.float32, device, n) for n in (20, 30))
    ids, visitors = torch.arange(20, device=device) % 3, torch.arange(30, device=device) // 15 * second
    scale = torch.tensor(12.0, device=device)

    def sums(block):
        lse2, _, mean, rest, _ = similarity_lse_op(q, k[block], scale, ids, visitors[block], None, None, compute_grad_q)
        return lse2, rest, mean

    blocks, whole = [sums(slice(15)), sums(slice(15, 30))], sums(slice(30))
    found = ring._merge(path_of(q), *blocks)
    for mine, expected in ((found[0], whole[0]), (found[2], whole[2])):
        torch.testing.assert_close(mine, expected, rtol=1e-6, atol=1e-6)
    assert (found[0][ids == 0] == -torch.inf).all() == (second == 0)
    for mine, expected in zip(ring._merge(path_of(q), *(block[:2] for block in blocks)), found, strict=False):
        assert torch.equal(mine, expected)


def test_whatever_arrives_at_a_query_that_sees_no_key_is_lost(device):
    assert_unseen_gets_nothing(device)


def test_identical_keys_count_as_many(device):
    q, key = embeddings(4, 16, torch.float32, device, 0), embeddings(1, 16, torch.float32, device, 1)
    lse = similarity_lse(q, key.expand(300, -1), 3.0)
    torch.testing.assert_close(lse, (3 * q @ key.T)[:, 0] + torch.log(torch.tensor(300.0, device=device)))


def test_strided_rows_and_twice_the_same(device):
    wide = embeddings(40, 64, torch.float32, device, 0)
    q, k = wide[::2, :32], wide[1::2, 32:]
    first, again = similarity_lse(q, k, 5.0), similarity_lse(q.contiguous(), k.T.contiguous().T, 5.0)
    assert torch.equal(first, again)


def test_ids_that_are_not_dense(device):
    """Every second group of a tensor, positives by column, and a gradient that is one number for all."""
    q, k = (embeddings(n, 32, torch.float32, device, n) for n in (20, 40))
    ids = torch.arange(80, device=device) % 7
    positive = (torch.arange(60, device=device) % 40).view(3, 20).T
    options = {"q_group": ids[:40:2], "k_group": ids[::2], "positive": positive}
    assert_at_most_twice_torch(lambda *x: info_nce(*x, **options), lambda *x: reference.info_nce(*x, **options), [q, k])
    sums = [q.clone().requires_grad_() for _ in range(2)]
    for f, x in zip((similarity_lse, reference.similarity_lse), sums, strict=True):
        f(x, k, 3.0).backward(torch.ones(1, device=device).expand(20))
    torch.testing.assert_close(sums[0].grad, sums[1].grad)


def test_a_wider_output_than_a_program_keeps(device):
    q, k = (embeddings(n, 130, torch.float32, device, n) for n in (6, 20))
    assert_at_most_twice_torch(
        lambda a, b: info_nce(a, b, temperature=0.2), lambda a, b: reference.info_nce(a, b, temperature=0.2), [q, k]
    )


def test_columns_that_no_launch_would_bring_are_an_error(device, monkeypatch):
    """The fixed variant's launches go along with the online one's, which here begin at the first column only."""
    output_chunks = {"fixed": 32, "online": 128}
    monkeypatch.setattr(
        forward, "choose_tile", lambda kernel, *_: Tile(16, 16, 32, 4, 2, out_columns=output_chunks[kernel.split()[1]])
    )
    x = embeddings(20, 80, torch.bfloat16, device, 0).requires_grad_()
    with pytest.raises(AssertionError):
        similarity_lse(x, x, 1.0)


@pytest.mark.parametrize("unit", [True, False], ids=["unit", "long"])
def test_the_online_variant_may_take_more_launches(device, monkeypatch, unit):
    """As on sm_80 at D = 512: the fixed variant brings all columns in one launch, the online one repairs in three."""
    output_chunks = {"fixed": 128, "online": 32}
    monkeypatch.setattr(
        forward, "choose_tile", lambda kernel, *_: Tile(16, 16, 32, 4, 2, out_columns=output_chunks[kernel.split()[1]])
    )
    q, k = (embeddings(rows, 80, torch.bfloat16, device, rows, unit) for rows in (20, 40))
    scale = torch.tensor(100.0, device=device)
    assert_at_most_twice_torch(similarity_lse, reference.similarity_lse, [q, k, scale])


@pytest.mark.parametrize("width", [16, 32])
def test_products_that_cancel_to_nan_are_taken_again(device, width):
    """Two keys of 800 and -800 times e^13.9 in one column: at a fixed shift inf - inf, nothing else is."""
    q, k = torch.zeros(3, width, device=device), torch.zeros(4, width, device=device)
    q[:, 1] = 1
    k[:2, 1], k[0, 0], k[1, 0] = 13.9, 800, -800
    q, k = q.bfloat16().requires_grad_(), k.bfloat16()
    (found,) = torch.autograd.grad(similarity_lse(q, k, 1.0).sum(), q)
    expected = torch.zeros_like(found)
    expected[:, 1] = 13.875
    torch.testing.assert_close(found, expected)
