"""SigLIP, SupCon of two sets, decoupled losses and top-k accuracy on the CPU, in tiles and as whole matrices."""

from __future__ import annotations

import more_losses_cases as cases
import pytest
import torch

import vito_kernels as vk
from vito_kernels.contrastive import cpu_tiles, small


@pytest.fixture(params=["tiles", "whole"])
def way(request, monkeypatch):
    if request.param == "tiles":
        monkeypatch.setattr(small, "MOST_LOGITS", 0)
        monkeypatch.setattr(cpu_tiles, "tile_rows", lambda: 8)
        monkeypatch.setattr(cpu_tiles, "COLUMNS", 16)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", cases.NAMES)
def test_against_the_reference(name, dtype, reduction, way):
    cases.check(name, "cpu", dtype, reduction)


def test_pairs_of_probability_one(way):
    cases.check_likely_pairs("cpu")
    x = torch.eye(8, 16)
    torch.testing.assert_close(vk.siglip_loss(x, x, 60, -30.0), vk.reference.siglip_loss(x, x, 60, -30.0))


def test_accuracy(way):
    cases.check_accuracy("cpu")


@pytest.mark.parametrize("weights", [None, (1.0, 0.5)])
def test_nested_widths(weights):
    inputs = [cases.embeddings(cases.ROWS, cases.WIDTH, torch.float32, "cpu", i, False) for i in range(2)]
    ours, plain = (
        lambda x, y, m=m: m.matryoshka_loss(m.info_nce, (x, y), (8, 40), weights=weights) for m in (vk, vk.reference)
    )
    cases.assert_at_most_twice_torch(ours, plain, inputs, floor=32)


def test_a_memory_of_batches(way):
    """As the losses of the batch's rows among all rows that are there; then the oldest leave."""
    loss = vk.CrossBatchMemory(cases.WIDTH, 50, 0.2, reduction="none")
    seen, labels = [], []
    for step in range(4):
        z = cases.embeddings(cases.ROWS, cases.WIDTH, torch.float32, "cpu", step, False)
        ids = torch.randint(0, 6, (cases.ROWS,), generator=torch.Generator().manual_seed(step))
        others, their_ids = torch.cat([z[:0], *seen])[-50:], torch.cat([ids[:0], *labels])[-50:]

        def plain(x, others=others, ids=torch.cat([ids, their_ids])):
            both = torch.cat([x, others.to(x.dtype)])
            return vk.reference.supcon_loss(both, ids, temperature=0.2, reduction="none")[: cases.ROWS]

        def ours(x, ids=ids):
            return loss.eval()(x, ids)

        cases.assert_at_most_twice_torch(ours, plain, [z], floor=32)
        loss.train()(z, ids)
        seen.append(z), labels.append(ids)
    copy = vk.CrossBatchMemory(cases.WIDTH, 50, 0.2, reduction="none")
    copy.load_state_dict(loss.state_dict())
    assert torch.equal(copy.eval()(z, ids), loss.eval()(z, ids))
    assert "memory=(50, 40)" in repr(loss)


X, IDS = torch.ones(4, 16), torch.arange(4)
WRONG = [
    (ValueError, "key_labels is None", lambda: vk.supcon_loss(X, IDS, keys=X)),
    (ValueError, "keys is None", lambda: vk.supcon_loss(X, IDS, key_labels=IDS)),
    (ValueError, r"key_labels must have shape \(4,\)", lambda: vk.supcon_loss(X, IDS, keys=X, key_labels=IDS[:2])),
    (ValueError, r"in \[1, 16\], got \[8, 17\]", lambda: vk.matryoshka_loss(vk.info_nce, (X, X), (8, 17))),
    (
        ValueError,
        "as many as widths, got 1 and 2",
        lambda: vk.matryoshka_loss(vk.info_nce, (X, X), (8, 9), weights=[1]),
    ),
    (ValueError, "more than the memory of 3", lambda: vk.CrossBatchMemory(16, 3)(X, IDS)),
    (ValueError, "z and memory must have the same width", lambda: vk.CrossBatchMemory(8, 9)(X, IDS)),
    (ValueError, "negatives goes without q_group", lambda: vk.info_nce(X, X, negatives=X, q_group=IDS, k_group=IDS)),
    (
        ValueError,
        r"those of 4 queries, got shape \(2, 4, 16\)",
        lambda: vk.info_nce(X, X, negatives=X.expand(2, 4, 16)),
    ),
    (ValueError, "q and k must have as many rows", lambda: vk.info_nce(X, X[:3], negatives=X)),
    (ValueError, "q and negatives must have the same width", lambda: vk.info_nce(X, X, negatives=X[:, :8])),
    (ValueError, "decoupled=True goes without debias", lambda: vk.info_nce(X, X, decoupled=True, debias=0.1)),
    (TypeError, "decoupled must be True or False, got 'no'", lambda: vk.ntxent(X, X, 0.1, decoupled="no")),
    (ValueError, r"each at least 1, got \(0, 5\)", lambda: vk.topk_accuracy(X, X, (0, 5))),
    (ValueError, "one positive for each query, got 2", lambda: vk.topk_accuracy(X, X, positive=IDS.repeat(2, 1).T)),
    (TypeError, r"topk\[0\] must be a whole number, got 1.5", lambda: vk.topk_accuracy(X, X, (1.5,))),
    (ValueError, "x and y must have as many rows", lambda: vk.siglip_loss(X, X[:3], 1.0)),
    (TypeError, "bias must be a number or a tensor of one element, got str", lambda: vk.siglip_loss(X, X, 1.0, "1")),
]


@pytest.mark.parametrize(("kind", "message", "call"), WRONG, ids=[message for _, message, _ in WRONG])
def test_wrong_input_is_named(kind, message, call):
    with pytest.raises(kind, match=message):
        call()
