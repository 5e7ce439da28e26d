"""The options of the reference's InfoNCE: against their formulas, and where these overflow or have nothing to sum."""

from __future__ import annotations

import math

import pytest
import torch
from contrastive_cases import embeddings, with_gradients

from vito_kernels import info_nce, reference

M, N = 12, 20
OPTIONS = [
    {"hard_negatives": 0.7},
    {"debias": 0.1},
    {"debias": 0.9},  # the floor holds for some
    {"debias": 0.05, "hard_negatives": 3.0},
]


def inputs():
    pair = [embeddings(rows, 8, torch.float64, "cpu", i, True) for i, rows in enumerate((M, N))]
    return [*pair, torch.tensor(0.3, dtype=torch.float64)]


def as_written(q, k, temperature, positive, hard_negatives=0.0, debias=0.0):
    """One query and one positive at a time, in plain exponentials."""
    losses = []
    for i, own in enumerate(positive.tolist()):
        logits = k @ q[i] / temperature
        others = logits[[j for j in range(len(k)) if j not in own]]
        weights = (hard_negatives * others).exp()
        hard = (weights / weights.mean() * others.exp()).sum()
        of_query = []
        for logit in logits[own]:
            left = (hard - debias * len(others) * logit.exp()) / (1 - debias)
            negatives = torch.maximum(left, len(others) * (-1 / temperature).exp()) if debias else hard
            of_query.append(-torch.log(logit.exp() / (logit.exp() + negatives)))
        losses.append(torch.stack(of_query).mean())
    return torch.stack(losses)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("positives", [1, 3])
def test_options_are_their_formulas(positives, options):
    positive = torch.randint(0, N, (M, positives), generator=torch.Generator().manual_seed(0))
    found = with_gradients(
        lambda q, k, t: reference.info_nce(q, k, temperature=t, positive=positive, reduction="none", **options),
        inputs(),
    )
    expected = with_gradients(lambda q, k, t: as_written(q, k, t, positive, **options), inputs())
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("debias", [0.0, 0.1])
def test_exponents_of_thousands(debias):
    q, k, _ = inputs()
    options = {"temperature": 0.01, "hard_negatives": 50.0, "debias": debias}
    found, fused = (with_gradients(lambda *x, f=f: f(*x, **options), [q, k]) for f in (reference.info_nce, info_nce))
    assert math.isfinite(found[0])
    torch.testing.assert_close(found, fused, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_query_without_negatives_has_no_loss(options):
    q, k, _ = inputs()
    everything = torch.arange(N).expand(M, N)
    for result in with_gradients(lambda *x: reference.info_nce(*x, positive=everything, **options), [q, k]):
        assert not result.any()
