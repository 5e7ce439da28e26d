"""What the ops launch on a GPU compiles for one, in every combination of layouts and of gradients asked for: the
interpreter, which runs Python, takes code that Triton's compiler refuses.
"""

import importlib
import itertools

import pytest
import torch
from rehearsal import no_gpu

from vito_kernels._core import lazy_triton
from vito_kernels.contrastive import two_sided

if lazy_triton.interpreting():
    pytest.skip("kernels run in Triton's interpreter here, which compiles nothing", allow_module_level=True)
# Functions of the same names hide these modules.
attention_pool, info_nce, softplus_loss, normalize = (
    importlib.import_module(f"vito_kernels.{name}")
    for name in ("attention_pool", "contrastive.info_nce", "contrastive.softplus_loss", "contrastive.normalize")
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
    lse2, logits, mean, rest, logit_cache = call(info_nce.similarity_lse_op, q, k, scale, *masks, True, None, False)
    for asked in ASKED:
        call(
            info_nce.similarity_lse_backward_op,
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


@pytest.mark.parametrize("grouped", [False, True])
def test_one_set(grouped):
    z, scale = empty(ROWS, WIDTH, dtype=torch.bfloat16), empty()
    groups = (empty(ROWS, dtype=torch.int64), empty(ROWS, dtype=torch.int64)) if grouped else (None, None)
    lse2, _, rest, logit_cache = call(two_sided.self_lse_op, z, scale, *groups, None, False)
    for asked in ((True, True), (True, False), (False, True)):
        g_positive = empty(ROWS, 1)
        call(two_sided.self_lse_backward_op, lse2, g_positive, z, scale, *groups, lse2, rest, logit_cache, *asked, None)


def test_rows():
    x, row = empty(ROWS, WIDTH, dtype=torch.bfloat16), empty(ROWS)
    call(normalize.normalize_op, x)
    call(normalize.normalize_backward_op, x, x)
    for pairs, sides in itertools.product((1, 100), (1, 2)):
        given = row, row, *((row, row) if sides == 2 else (None, None)), empty(ROWS, pairs)
        call(softplus_loss.softplus_loss_op, *given)
        call(softplus_loss.softplus_loss_backward_op, row, *given)


def test_pooling():
    features, logits = empty(4, 100, WIDTH, dtype=torch.bfloat16), empty(4, 100)
    pooled, weights = call(attention_pool.attention_pool_op, features, logits)
    for g_weights in (None, weights):
        call(attention_pool.attention_pool_backward_op, pooled, g_weights, features, empty(0), weights, pooled)
