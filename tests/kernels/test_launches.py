"""What the ops launch on a GPU compiles for one, in every combination of layouts and of gradients asked for: the
interpreter, which runs Python, takes code that Triton's compiler refuses.
"""

import importlib
import itertools

import pytest
import torch
from rehearsal import no_gpu

import vito_kernels
from vito_kernels._core import lazy_triton
from vito_kernels.contrastive import replay, two_sided
from vito_kernels.inspect.compiled import StandInLauncher

if lazy_triton.interpreting():
    pytest.skip("kernels run in Triton's interpreter here, which compiles nothing", allow_module_level=True)
# Functions of the same names hide these modules.
attention_pool, one_sided, softplus_loss, normalize, supcon, per_query, siglip, topk = (
    importlib.import_module(f"vito_kernels.{name}")
    for name in (
        "attention_pool",
        *(
            f"contrastive.{name}"
            for name in ("one_sided", "softplus_loss", "normalize", "supcon", "per_query", "siglip", "topk")
        ),
    )
)
ROWS, WIDTH = 300, 64
ASKED = [(True, True, True), (True, False, False), (False, True, False), (False, False, True)]


def empty(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.fixture(autouse=True)
def gpu():
    with no_gpu(90) as driver:
        yield
    assert driver.launched


def call(op, *args):
    """The op's own code, which meta tensors would not get to."""
    return op._init_fn(*args)


@pytest.mark.parametrize("layout", ["no positives", "diagonal", "groups", "listed"])
def test_one_sided(layout):
    q, k, scale = empty(ROWS, WIDTH, dtype=torch.bfloat16), empty(ROWS, WIDTH, dtype=torch.bfloat16), empty()
    group = empty(ROWS, dtype=torch.int64) if layout == "groups" else None
    positive = empty(ROWS, 9, dtype=torch.int64) if layout == "listed" else None
    masks = group, group, positive, 0 if layout in ("diagonal", "groups") else None
    lse2, logits, mean, rest, logit_cache = call(one_sided.similarity_lse_op, q, k, scale, *masks, True, None, False)
    for asked in ASKED:
        call(
            one_sided.similarity_lse_backward_op,
            lse2,
            logits,
            q,
            k,
            scale,
            *masks,
            lse2,
            rest,
            mean,
            logit_cache,
            *asked,
            None,
        )


def test_two_sided():
    x, y, scale = empty(ROWS, WIDTH, dtype=torch.bfloat16), empty(ROWS, WIDTH, dtype=torch.bfloat16), empty()
    row, column, pairs, *rests, logit_cache = call(two_sided.two_sided_lse_op, x, y, scale, 0, None, False)
    for asked in ASKED:
        grads = row, column, pairs
        saved = row, column, *rests, logit_cache
        call(two_sided.two_sided_lse_backward_op, *grads, x, y, scale, 0, *saved, *asked, None)


@pytest.mark.parametrize("layout", ["diagonal", "groups", "listed", "own keys"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_losses_of_one_side(layout, reduction):
    q, scale = empty(ROWS, WIDTH, dtype=torch.bfloat16), empty()
    own = q if layout == "own keys" else None
    group = empty(ROWS, dtype=torch.int64) if layout == "groups" else None
    positive = empty(ROWS, 9, dtype=torch.int64) if layout == "listed" else None
    given = q, q, own, scale, group, group, positive, 0 if layout in ("diagonal", "groups") else None
    loss, *saved = call(one_sided.one_sided_loss_op, *given, True, reduction, False, None, False)
    for x, y, z in ASKED:
        call(one_sided.one_sided_loss_backward_op, loss, *given, *saved, x, y, y and own is not None, z, None)


def test_losses_of_two_sides():
    x, scale = empty(ROWS, WIDTH, dtype=torch.bfloat16), empty()
    loss, *saved = call(two_sided.two_sided_loss_op, x, x, scale, None, False)
    for asked in ASKED:
        call(two_sided.two_sided_loss_backward_op, loss, x, x, scale, *saved, *asked, None)
    for reduction, dtype in (("mean", torch.bfloat16), ("none", None)):
        z = x if dtype is None else x.float()
        loss, *saved = call(two_sided.ntxent_op, z, z, scale, reduction, False, dtype, False)
        for asked in ((True, True), (True, False), (False, True)):
            call(two_sided.ntxent_backward_op, loss, z, z, scale, *saved, *asked)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("diagonal", [None, 7])
def test_labels(reduction, diagonal):
    z, scale, label = empty(ROWS, WIDTH, dtype=torch.bfloat16), empty(), empty(ROWS, dtype=torch.int64)
    for keys, key_label in ((None, None), (empty(2 * ROWS, WIDTH, dtype=torch.bfloat16), empty(2 * ROWS).int())):
        given = z, keys, scale, label, key_label, 0 if keys is None else diagonal
        loss, *saved = call(supcon.supcon_op, *given, reduction, None, False)
        for asked in ASKED:
            call(supcon.supcon_backward_op, loss, *given, *saved, *asked, None)


@pytest.mark.parametrize("width", [WIDTH, 576])
def test_sums_over_all_pairs(width):
    x, scale, group = empty(ROWS, width, dtype=torch.bfloat16), empty(), empty(ROWS, dtype=torch.int64)
    for diagonal, reduction in ((5, "none"), (0, "mean"), (None, "sum")):
        given = x, x, scale, scale, diagonal
        loss, *saved = call(siglip.siglip_op, *given, True, reduction, None)
        for asked in ASKED:
            call(siglip.siglip_backward_op, loss, *given, *saved, *asked, True, None)
    for positive in (None, empty(ROWS, 1, dtype=torch.int64)):
        call(topk.positive_rank_op, x, x, scale, group, group, positive, None)
    q, negatives = empty(7, width, dtype=torch.bfloat16), empty(7, 50, width, dtype=torch.bfloat16)
    saved = call(per_query.per_query_lse_op, q, negatives, scale, True)
    for asked in ASKED:
        call(per_query.per_query_lse_backward_op, saved[0], q, negatives, scale, *saved, *asked)


def test_rows():
    x, row = empty(ROWS, WIDTH, dtype=torch.bfloat16), empty(ROWS)
    call(normalize.normalize_op, x)
    call(normalize.normalize_backward_op, x, x)
    call(normalize.normalize_pair_op, x, x)
    call(normalize.normalize_pair_backward_op, x, x[::2], x[1::2])
    for pairs, sides in itertools.product((1, 100), (1, 2)):
        given = row, row, *((row, row) if sides == 2 else (None, None)), empty(ROWS, pairs)
        for decoupled in (False, True):
            call(softplus_loss.softplus_loss_op, *given, decoupled)


# Kernels of the forward and of the backward pass at 2048 rows of 16 bits, whose keys are split among programs.
LAUNCHES = {
    "clip_loss": (3, 2),
    "ntxent": (4, 2),
    "info_nce": (3, 2),
    "locked keys": (3, 1),
    "groups": (3, 1),
    "listed positives": (3, 1),
    "moco_loss": (3, 1),
    "supcon_loss": (4, 3),
    "siglip_loss": (2, 2),
    "multi_view_info_nce": (3, 1),
    "float32": (4, 4),
}


@pytest.mark.parametrize("name", LAUNCHES)
def test_number_of_launches(name, monkeypatch):
    dtype = torch.float32 if name == "float32" else torch.bfloat16
    q, k = (torch.randn(2048, WIDTH, dtype=dtype).requires_grad_() for _ in range(2))
    locked, views, ids = k.detach(), torch.stack([q, k]), torch.arange(2048) // 2
    losses = {
        "clip_loss": lambda: vito_kernels.clip_loss(q, k, 10.0),
        "ntxent": lambda: vito_kernels.ntxent(q, k, 0.1),
        "info_nce": lambda: vito_kernels.info_nce(q, k),
        "locked keys": lambda: vito_kernels.info_nce(q, locked),
        "groups": lambda: vito_kernels.info_nce(q, locked, q_group=ids, k_group=ids),
        "listed positives": lambda: vito_kernels.info_nce(q, locked, positive=ids),
        "moco_loss": lambda: vito_kernels.moco_loss(q, locked, locked),
        "supcon_loss": lambda: vito_kernels.supcon_loss(q, ids),
        "siglip_loss": lambda: vito_kernels.siglip_loss(q, k, 10.0, -10.0),
        "multi_view_info_nce": lambda: vito_kernels.multi_view_info_nce(views, views.detach()),
        "float32": lambda: vito_kernels.info_nce(q, k),
    }
    monkeypatch.setattr(replay, "ENABLED", False)
    passes = [], []

    def count(kernel, grid, *args, **kwargs):
        passes[found is not None].append(kernel.__name__)
        kernel.compiled[grid](*args, **kwargs)

    found = None
    with lazy_triton.record_launches(count), torch.autograd.set_multithreading_enabled(False):
        found = losses[name]()
        torch.autograd.grad(found, q)
    assert tuple(map(len, passes)) == LAUNCHES[name], passes


def test_pooling():
    features, logits = empty(4, 100, WIDTH, dtype=torch.bfloat16), empty(4, 100)
    pooled, weights, mean = call(attention_pool.attention_pool_op, features, logits)
    for g_weights in (None, weights):
        call(attention_pool.attention_pool_backward_op, pooled, g_weights, features, empty(0), weights, mean)


def test_lars():
    for first in (0, 1):  # aligned, and not
        lists = [[torch.zeros(ROWS + 1)[first : ROWS + first] for _ in range(2)] for _ in range(3)]
        for finite in (None, torch.tensor(True)):
            assert vito_kernels.FusedLars(1, 0.9, 1e-6, 1e-3).step(*lists, 0.1, finite)


def test_a_replay_works_on_the_memory_of_its_call(monkeypatch):
    """Also where the arguments of an earlier call are taken again: for the same tensors, and then for others."""
    launcher, given = StandInLauncher.__call__, []
    monkeypatch.setattr(
        StandInLauncher, "__call__", lambda self, *args: (given.extend(args[9:]), launcher(self, *args))
    )
    k = torch.randn(96, WIDTH, dtype=torch.bfloat16)
    known = [torch.randn(96, WIDTH, dtype=torch.bfloat16).requires_grad_() for _ in range(12)]
    for call in (0, 1, 2, 3, 3, 2, *range(12), 11, 0):
        q = known[call]
        given.clear()
        vito_kernels.info_nce(q, k).backward()
        bases = [getattr(x, "base", x) for x in given]
        pointers = {
            x if isinstance(x, int) else x.data_ptr() for x in bases if isinstance(x, int) or hasattr(x, "data_ptr")
        }
        assert {q.data_ptr(), k.data_ptr()} <= pointers
        assert not pointers & {x.data_ptr() for x in known if x is not q}
