"""Peers compute what they are raced for; who cannot take part is named with the reason."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

from bench import peers
from bench.harness import relative_error
from vito_kernels import reference

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {
    "info-nce-pytorch": "info_nce",
    "pytorch-metric-learning": "pytorch_metric_learning",
    "open_clip": "open_clip",
    "open_clip ClipLoss": "open_clip",
    "open_clip SigLipLoss": "open_clip",
    "lightly": "lightly",
    "memeff (LiT)": "memeff",
    "memeff (CLIP)": "memeff",
    "inf-cl (flash)": "inf_cl",
}
T = 0.2


def pair(n=48, d=32):
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(0))
    y = x + torch.randn(n, d, generator=torch.Generator().manual_seed(1))
    return x.requires_grad_(), y


def info_nce(q, k):
    return reference.info_nce(normalize(q, dim=1), normalize(k, dim=1), temperature=T)


def families():
    q, k = pair()
    x, y = (z.detach().requires_grad_() for z in pair())
    labels = torch.arange(len(q)) % 12
    yield from ((c, peers.truth_of(info_nce, q, k)) for c in peers.one_sided(q, k, T))
    clip = peers.truth_of(lambda x, y: peers._reference_clip(x, y, T), x, y)
    yield from ((c, clip) for c in peers.two_sided(x, y, T))
    yield from ((c, peers.truth_of(lambda a, b: reference.ntxent(a, b, T), x, y)) for c in peers.self_similar(x, y, T))
    supcon = peers.truth_of(lambda z: reference.supcon_loss(z, labels, temperature=T), q)
    yield peers.supervised(q, labels, T), supcon
    units = reference.normalize
    siglip = peers.truth_of(lambda a, b: reference.siglip_loss(units(a), units(b), 1 / T, -1.0), x, y)
    yield peers.sigmoid(x, y, 1 / T, -1.0), siglip
    negatives = torch.stack([y.detach().roll(i, 0) for i in range(len(x))]).requires_grad_()
    mined = lambda a, b, c: reference.info_nce(  # noqa: E731
        units(a), units(b), negatives=c / c.norm(dim=2, keepdim=True), temperature=T
    )
    yield peers.paired(x, y, negatives, T), peers.truth_of(mined, x, y, negatives)


@pytest.mark.parametrize("number", range(13))
def test_a_peer_is_right_or_named(number):
    candidate, truth = list(families())[number]
    if candidate.call is not None:
        assert relative_error(candidate.call(), (candidate.truth or truth)()) < 1e-5
    elif importlib.util.find_spec(PACKAGES[candidate.name]) is None:
        assert candidate.note.startswith(("not installed", "runs on CUDA only"))
    else:
        assert candidate.note == "runs on CUDA only"


def test_every_family_is_covered():
    assert len(list(families())) == 13


def test_a_peer_too_large_for_the_machine_is_named():
    q, k = pair()
    candidate = peers.peer("huge", lambda: info_nce, q, k, matrices=2.0**40)
    assert (candidate.call, candidate.note) == (None, "its M x N temporaries need about 1024.0 GiB")


@pytest.mark.parametrize("two_sided", [False, True])
def test_where_the_truth_takes_some_rows_alone_they_are_those_of_all(two_sided):
    q, k = pair(1500, 16)
    rows = torch.tensor([3, 0, 1499, 1023, 1024])
    whole = peers.truth_of((lambda x, y: peers._reference_clip(x, y, T)) if two_sided else info_nce, q, k)()
    agree, some = peers.sampled(rows), peers.truth_of_rows(q, k, T, rows, two_sided)()
    assert agree(whole, some) < 1e-6
    for broken in [(whole[0] * 1.01, whole[1]), (whole[0], whole[1].clone().index_fill_(0, rows[3:4], 0.0))]:
        assert agree(broken, some) > 5e-3
    assert agree((whole[0], whole[1].clone().index_fill_(0, torch.tensor(7), torch.nan)), some) == float("inf")


def test_a_peer_whose_import_fails_is_named(monkeypatch):
    def raises(name):
        raise RuntimeError("built for another torch\nand more")

    monkeypatch.setattr(peers, "import_module", raises)
    q, k = pair()
    assert peers.two_sided(q, k, T)[0].note == "does not import (RuntimeError: built for another torch)"
