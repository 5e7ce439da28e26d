"""Attention against masks: the rank formula, the center prior beside it, and runs alone."""

import numpy as np
import pytest
from PIL import Image
from torch import nn

from vito_fast.errors import UserError
from vito_fast.evaluate.attention_task import Attention, auc
from vito_fast.evaluate.encoders import load
from vito_fast.evaluate.task import find_preset


class Bright(nn.Module):
    """A pool that looks where the features are large."""

    def forward(self, features):
        weights = features.mean(1).flatten(1).mul(20).softmax(1)
        return (features.flatten(2) * weights[:, None]).sum(2), weights


@pytest.fixture
def data(tmp_path):
    for name, corner in {"a": (0, 0), "b": (32, 64)}.items():
        for folder in ("JPEGImages", "Annotations"):
            (tmp_path / folder / "480p" / name).mkdir(parents=True)
        for number in range(3):
            mask = np.zeros((64, 96), np.uint8)
            mask[corner[0] : corner[0] + 32, corner[1] : corner[1] + 32] = 1
            Image.fromarray(mask).save(tmp_path / "Annotations" / "480p" / name / f"{number:05d}.png")
            Image.fromarray(250 * mask).save(tmp_path / "JPEGImages" / "480p" / name / f"{number:05d}.jpg")
    return tmp_path


def test_attention_on_a_bright_object_beats_the_center_prior(data, tmp_path):
    encoder = load("pixels")
    encoder.pools = nn.ModuleList([Bright()])
    preset = find_preset(Attention(), None).with_options({"subset": True, "size": 64, "frames": 2})
    result = Attention().run(encoder, data, preset, tmp_path / "out")
    assert list(result.metrics) == ["auc_stride_32", "center_prior"]
    assert result.metrics["auc_stride_32"].value > 0.9
    assert result.metrics["center_prior"].value < 0.5  # the objects lie in corners
    assert list(result.media) == ["a: frame, auc_stride_32, center_prior", "b: frame, auc_stride_32, center_prior"]
    assert set(result.items) == {"a", "b"}


def test_auc_is_the_ranks_formula():
    values, mask = np.array([[0.1, 0.4, 0.4], [0.8, 0.2, 0.9]]), np.array([[0, 1, 0], [1, 0, 255]])
    pairs = [(v > w) + (v == w) / 2 for v in (0.4, 0.8) for w in (0.1, 0.4, 0.2)]
    assert auc(values, mask) == pytest.approx(np.mean(pairs))
    assert auc((mask == 1).astype(float), mask) == 1.0


def test_encoders_without_pools_say_so(data, tmp_path):
    preset = find_preset(Attention(), None).with_options({"subset": True})
    with pytest.raises(UserError, match="has no attention pools"):
        Attention().run(load("pixels"), data, preset, tmp_path / "out")
