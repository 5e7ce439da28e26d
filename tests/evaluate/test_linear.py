"""The linear probe against scikit-learn's, and correspondence against shifts and the real stereo pair."""

from pathlib import Path

import numpy as np
import pytest
import skimage
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from vito_fast.errors import UserError
from vito_fast.evaluate import correspondence, linear


def digits(n=500):
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images[:n], dtype=torch.float32), torch.tensor(labels[:n])


@pytest.mark.parametrize("l2", [1e-1, 1e-3])
def test_the_minimum_is_scikit_learns(l2):
    features, labels = digits()

    scaled = (features - features.mean(0)) / features.std(0, correction=0).clamp_min(1e-6)
    oracle = LogisticRegression(C=1 / (l2 * len(labels)), tol=1e-8, max_iter=5000).fit(scaled, labels)
    found = linear.fit(features, labels, 10, l2=l2)
    expected = torch.tensor(oracle.decision_function(scaled)).float()
    logits = found.logits(features)
    torch.testing.assert_close(logits - logits.mean(1, True), expected - expected.mean(1, True), rtol=1e-3, atol=5e-3)


def test_start_and_chunks_do_not_move_the_minimum(monkeypatch):
    features, labels = digits(200)
    first = linear.fit(features, labels, 10, l2=1e-2)
    monkeypatch.setattr(linear, "CHUNK", 64)
    second = linear.fit(features, labels, 10, l2=1e-2, start=linear.fit(features, labels, 10, l2=1.0))
    torch.testing.assert_close(second.logits(features), first.logits(features), rtol=1e-3, atol=1e-3)


def test_the_choice_reads_no_other_examples():
    features, labels = digits()
    order = torch.randperm(500, generator=torch.Generator().manual_seed(0))
    features, labels = features[order], labels[order]
    l2, accuracies = linear.choose_l2(features, labels, 10, strengths=(1e-4, 1e-2, 100.0))
    assert l2 < 1
    assert accuracies[l2] == max(accuracies.values()) > 0.9
    with pytest.raises(ValueError, match="held out"):
        linear.choose_l2(features[:3], torch.tensor([0, 1, 2]), 3)


def test_a_probe_is_saved(tmp_path):
    probe = linear.LinearProbe(torch.randn(3, 4), torch.randn(3), 0.1)
    probe.save(tmp_path / "head.safetensors", classes="a b c")
    loaded, notes = linear.load_probe(tmp_path / "head.safetensors")
    assert torch.equal(loaded.weight, probe.weight)
    assert (loaded.l2, notes) == (0.1, {"classes": "a b c"})
    (tmp_path / "head.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match=r"head\.safetensors"):
        linear.load_probe(tmp_path / "head.safetensors")


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="labels are 0 to 3, there are 3"):
        linear.fit(torch.zeros(2, 4), torch.tensor([0, 3]), 3)
    with pytest.raises(ValueError, match="not 0"):
        linear.fit(torch.zeros(2, 4), torch.tensor([0, 1]), 3, l2=0)
    with pytest.raises(ValueError, match="features"):
        linear.fit(torch.zeros(2, 4), torch.tensor([0]), 3)


def test_a_shifted_image_is_found():
    """A shift by whole cells moves every point by as many pixels, but those that leave the image."""
    features = torch.randn(8, 12, 20, generator=torch.Generator().manual_seed(0))
    y, x = torch.meshgrid(torch.arange(12.0), torch.arange(5, 20.0), indexing="ij")
    centers = torch.stack([y.flatten(), x.flatten()], 1) * 8 + 3.5
    found = correspondence.match(features, features.roll(-3, 2), centers, (96, 160))
    truth = centers - torch.tensor([0, 24.0])
    torch.testing.assert_close(found, truth)
    assert correspondence.pck(found, truth, 0.5) == 1
    assert correspondence.pck(found, centers, 23.9) == 0
    assert correspondence.pck(found, centers, 24.1) == 1


def test_stereo_pairs_in_both_layouts(tmp_path):
    with pytest.raises(UserError, match="has no pairs"):
        correspondence.find_pairs(tmp_path)
    disparity = np.arange(24, dtype=np.float32).reshape(4, 6)
    disparity[0, 0] = np.inf
    (tmp_path / "Adirondack").mkdir()
    for name in ("a_left.png", "a_right.png", "Adirondack/im0.png", "Adirondack/im1.png"):
        Image.new("RGB", (6, 4)).save(tmp_path / name)
    np.savez(tmp_path / "a_disp.npz", disparity)
    (tmp_path / "Adirondack" / "disp0.pfm").write_bytes(b"Pf\n6 4\n-1.0\n" + disparity[::-1].astype("<f4").tobytes())
    pairs = correspondence.find_pairs(tmp_path)
    assert [pair.name for pair in pairs] == ["a", "Adirondack"]
    for pair in pairs:
        assert np.array_equal(correspondence.read_pair(pair)[2], disparity)
    left, right = correspondence.true_points(disparity.astype(float), 1)
    assert left.tolist() == [[0, x] for x in range(1, 6)]  # elsewhere the point leaves the right view
    assert right.tolist() == [[0, 0]] * 5
    np.savez(tmp_path / "a_disp.npz", disparity[:2])
    with pytest.raises(UserError, match="differ in size"):
        correspondence.read_pair(pairs[0])
    (tmp_path / "a_disp.npz").write_bytes(b"no zip")
    with pytest.raises(UserError, match="cannot read the disparity"):
        correspondence.read_pair(pairs[0])


def test_the_real_pair_that_installs():
    """Pixels find more than nothing on the real pair; the truth itself finds everything."""
    pairs = correspondence.find_pairs(Path(skimage.__file__).parent / "data")
    left, right, disparity = correspondence.read_pair(pairs[0])
    points, truth = correspondence.true_points(disparity, 16)
    assert len(points) > 500
    size = left.shape[1], left.shape[2]
    features = [torch.nn.functional.avg_pool2d(view[None] / 255 - 0.5, 4)[0] for view in (left, right)]
    found = correspondence.match(*features, points, size)
    assert 0.02 < correspondence.pck(found, truth, 8) < 0.6
    assert correspondence.pck(truth, truth, 0) == 1
