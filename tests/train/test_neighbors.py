"""Nearest neighbors among other clips: right values on cases small enough to count by hand."""

import math

import pytest
import torch

from vito_fast.train.neighbors import color_histogram, knn_accuracy, thumbnails


def test_own_clip_never_votes():
    """Each frame's nearest is its own clip's; without it label 1's frames meet only label 0's."""
    features = torch.tensor([[1.0, 0], [1, 0.01], [1, 0.5], [1, 0.51], [0, 1], [0.01, 1]])
    labels = torch.tensor([0, 0, 0, 0, 1, 1])
    clips = torch.tensor([7, 7, 9, 9, 3, 3])
    value, error = knn_accuracy(features, labels, clips, k=1)
    assert value == pytest.approx(2 / 3)
    assert error == pytest.approx(torch.tensor([1.0, 1, 0]).std().item() / math.sqrt(3))


def test_most_votes_then_larger_cosines():
    features = torch.tensor([[1.0, 0.0], [0.99, 0.1], [0.8, 0.6], [0.8, 0.61], [0.6, 0.8]])
    clips = torch.arange(5)
    assert knn_accuracy(features, torch.tensor([1, 0, 1, 1, 0]), clips, k=3).value == pytest.approx(1 / 5)
    pair = torch.tensor([[1.0, 0.0], [0.99, 0.1], [0.8, 0.6]])
    assert knn_accuracy(pair, torch.tensor([0, 0, 1]), torch.arange(3), k=2).value == pytest.approx(2 / 3)


@pytest.mark.parametrize("k", [1, 5])
def test_clusters_are_found_and_noise_is_at_chance(k):
    generator = torch.Generator().manual_seed(0)
    labels, clips = torch.arange(240).div(6, rounding_mode="floor"), torch.arange(240)
    centers = torch.randn(40, 64, generator=generator)
    noise = torch.randn(240, 64, generator=generator)
    assert knn_accuracy(centers[labels] + 0.1 * noise, labels, clips, k=k) == (1.0, 0.0)
    chance = knn_accuracy(noise, labels, clips, k=k)
    assert chance.value < 0.08
    assert 0 < chance.error < 0.02


def test_scale_and_copies_change_nothing():
    generator = torch.Generator().manual_seed(1)
    features, labels = torch.randn(60, 8, generator=generator), torch.arange(60) % 5
    one = knn_accuracy(features, labels, torch.arange(60))
    assert knn_accuracy(features * 3.0, labels, torch.arange(60)) == one
    assert knn_accuracy(features.double(), labels, 10 * torch.arange(60)) == one


def test_not_finite_and_wrong_lengths():
    features = torch.full((4, 2), torch.nan)
    assert math.isnan(knn_accuracy(features, torch.zeros(4).long(), torch.arange(4)).value)
    with pytest.raises(ValueError, match="4 features, 3 labels and 4 clips"):
        knn_accuracy(features, torch.zeros(3).long(), torch.arange(4))
    with pytest.raises(ValueError, match="frames of 1 clips: at least 2"):
        knn_accuracy(features, torch.zeros(4).long(), torch.zeros(4).long())


def test_color_histogram():
    images = torch.zeros(2, 3, 4, 4)
    images[1, 0, :2] = 1.0  # the upper half is red
    rows = color_histogram(images, bins=2)
    expected = torch.zeros(2, 8)
    expected[0, 0] = 1
    expected[1, 0] = expected[1, 4] = math.sqrt(0.5)
    torch.testing.assert_close(rows, expected)
    moved = images.roll(1, 2)
    torch.testing.assert_close(color_histogram(moved, bins=2), expected)


def test_thumbnails():
    images = torch.rand(5, 3, 32, 48, generator=torch.Generator().manual_seed(2))
    rows = thumbnails(images, side=2)
    assert rows.shape == (5, 12)
    torch.testing.assert_close(rows.mean(0), torch.zeros(12), atol=1e-6, rtol=0)
    difference = images[0, 0, :16, :24].mean() - images[1, 0, :16, :24].mean()
    torch.testing.assert_close(rows[0, 0] - rows[1, 0], difference)
