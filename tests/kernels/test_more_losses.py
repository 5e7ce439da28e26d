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


X, IDS = torch.ones(4, 16), torch.arange(4)
WRONG = [
    (ValueError, "key_labels is None", lambda: vk.supcon_loss(X, IDS, keys=X)),
    (ValueError, "keys is None", lambda: vk.supcon_loss(X, IDS, key_labels=IDS)),
    (ValueError, r"key_labels must have shape \(4,\)", lambda: vk.supcon_loss(X, IDS, keys=X, key_labels=IDS[:2])),
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
