"""The weighted vote against known counts and a loop over queries."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from vito_fast.evaluate import neighbours


@pytest.mark.parametrize(
    ("k", "temperature", "right"), [(1, 0.07, 770), (10, 0.07, 766), (20, 0.07, 762), (100, 0.07, 744), (200, 0.1, 728)]
)
def test_digits(k, temperature, right):
    images, labels = load_digits(return_X_y=True)
    images, labels = torch.tensor(images, dtype=torch.float32), torch.tensor(labels)
    found = neighbours.knn(images[:1000], labels[:1000], images[1000:], k=k, temperature=temperature)
    assert int((found == labels[1000:]).sum()) == right


@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 5), st.integers(1, 12), st.floats(0.01, 2))
def test_votes_by_hand(seed, n, classes, k, temperature):
    rng = np.random.default_rng(seed)
    train, queries, labels = rng.normal(size=(n, 6)), rng.normal(size=(5, 6)), rng.integers(0, classes, n)
    found = neighbours.votes(
        *map(torch.tensor, (train, labels, queries)), k=k, temperature=temperature, classes=classes
    )  # fmt: skip
    for query, votes in zip(queries, found.tolist(), strict=True):
        similar = train @ query / np.linalg.norm(train, axis=1) / np.linalg.norm(query)
        expected = [0.0] * classes
        best = sorted(range(n), key=lambda i: -similar[i])[:k]
        for i in best:
            expected[labels[i]] += math.exp((similar[i] - similar[best[0]]) / temperature)
        assert votes == pytest.approx([value / sum(expected) for value in expected], abs=1e-4)


def test_a_training_image_finds_itself_and_chunks_change_nothing(monkeypatch):
    train, labels = torch.randn(50, 8, generator=torch.Generator().manual_seed(0)), torch.arange(50) % 7
    assert torch.equal(neighbours.knn(train, labels, 3 * train, k=1), labels)
    whole = neighbours.votes(train, labels, train, k=5)
    monkeypatch.setattr(neighbours, "CHUNK", 100)
    torch.testing.assert_close(neighbours.votes(train, labels, train, k=5), whole)
    assert neighbours.knn(train, labels, train[:0]).shape == (0,)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"\(4, 3\), \(5,\) and \(2, 3\)"):
        neighbours.knn(torch.zeros(4, 3), torch.zeros(5), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="not 0"):
        neighbours.knn(torch.zeros(4, 3), torch.zeros(4), torch.zeros(2, 3), k=0)
