"""Shape bias, kappa and saliency against known values and definitions."""

import contextlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from sklearn.metrics import cohen_kappa_score

from vito_fast.errors import UserError
from vito_fast.evaluate import human, saliency, tfrecord


def test_shape_bias():
    q = np.arange(200)
    shape, texture = q % 16, (3 * q + 2) % 16
    response = np.where(q % 3 != 0, shape, np.where(q % 2 == 1, texture, 7 * q % 16))
    assert human.shape_bias(response, shape, texture) == pytest.approx(0.8333333333333334, abs=1e-15)
    assert human.shape_bias(["cat"], ["cat"], ["dog"]) == 1
    assert human.shape_bias(["dog", "cat"], ["cat", "cat"], ["dog", "cat"]) == 0  # the second is no conflict
    assert np.isnan(human.shape_bias(["cat"], ["dog"], ["car"]))


def test_kappa():
    q = np.arange(160)
    a, b = 7 * q % 10 < 7, (7 * q + q // 9) % 10 < 6
    assert human.error_consistency(a, b) == pytest.approx(-0.005434782608695778, abs=1e-15)
    half = q % 2 == 0
    assert human.error_consistency(half, ~half) == -1
    assert human.error_consistency(np.ones(5, bool), np.ones(5, bool)) == 1
    assert human.error_consistency(np.zeros(5, bool), np.zeros(5, bool)) == 1
    assert human.error_consistency(np.ones(4, bool), [True, True, False, False]) == 0
    with pytest.raises(ValueError, match="one length"):
        human.error_consistency([True], [True, False])


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1))
def test_kappa_is_sklearns(pairs):
    a, b = map(np.array, zip(*pairs, strict=True))
    kappa = human.error_consistency(a, b)
    assert kappa == human.error_consistency(b, a)
    assert human.error_consistency(a, a) == 1
    if (a.all() and b.all()) or not (a.any() or b.any()):
        assert kappa == 1
    else:
        assert kappa == pytest.approx(cohen_kappa_score(a, b), abs=1e-12)


def test_conditions_weigh_alike():
    right, alternating = np.ones(4, bool), np.array([True, False, True, False])
    found = human.mean_error_consistency(
        {"easy": right, "hard": ~alternating}, {"easy": [right], "hard": [alternating] * 3}
    )
    assert found == 0


def test_few_classes_take_the_mean_of_their_members():
    probabilities = np.array([[0.5, 0.1, 0.4], [0.2, 0.2, 0.35]])
    assert human.to_16_classes(probabilities, {"cat": [0, 1], "car": [2]}) == ["car", "car"]
    assert human.to_16_classes(probabilities, {"cat": [0], "car": [2]}) == ["cat", "car"]


def g10():
    i, j = np.meshgrid(np.arange(24), np.arange(30), indexing="ij")
    first = (np.sin(i / 5) + 0.3 * np.cos(j / 3)).astype(np.float32)
    second = np.exp(-((i - 10) ** 2 + (j - 12) ** 2) / 60) + 0.05 * ((7 * i + 3 * j) % 5)
    return first, second.astype(np.float32)


def test_alignment_with_ties_and_a_ceiling():
    first, second = g10()
    assert saliency.spearman(first, second) == pytest.approx(0.3954473067775385, abs=1e-12)
    assert saliency.spearman(first, second.round(1)) == pytest.approx(0.38755750156042557, abs=1e-12)
    found = saliency.alignment(
        np.stack([first, first, first * 0]), torch.tensor(np.stack([second, second.round(1), second]))
    )
    assert found.score == pytest.approx(0.5954137517208067, abs=1e-12)
    assert found.constant == 1
    assert np.isnan(found.correlations[2])
    assert np.isnan(saliency.alignment(first[None] * 0, second[None]).score)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=30))
def test_spearman_is_scipys(pairs):
    a, b = map(np.array, zip(*pairs, strict=True))
    found = saliency.spearman(a, b)
    if len(set(a)) == 1 or len(set(b)) == 1:
        assert np.isnan(found)
    else:
        assert found == pytest.approx(spearmanr(a, b).statistic, abs=1e-12)
        assert saliency.spearman(a, -b) == pytest.approx(-found, abs=1e-12)
        assert saliency.spearman(a, a) == pytest.approx(1, abs=1e-12)


def test_gradients_of_a_linear_classifier_are_its_weights():
    weights = torch.randn(5, 3, 6, 7, generator=torch.Generator().manual_seed(0))
    images, labels = torch.randn(4, 3, 6, 7), torch.tensor([0, 3, 3, 1])
    with torch.no_grad():
        found = saliency.gradient_saliency(lambda x: torch.einsum("bchw,nchw->bn", x, weights), images, labels)
    torch.testing.assert_close(found, weights[labels].abs().amax(1))


def test_the_human_map_is_blurred_by_an_even_kernel():
    """The correlation by hand: kernel columns at -5 to 4, rows at 4 to -5, zeros outside, 4 of them before."""
    small = np.random.default_rng(0).integers(0, 256, (64, 64))
    padded = np.pad(small.astype(float), ((4, 5), (4, 5)))
    weights = {(a, b): np.exp(-((4 - a) ** 2 + (b - 5) ** 2) / 200) for a in range(10) for b in range(10)}
    blurred = sum(w * padded[a : a + 64, b : b + 64] for (a, b), w in weights.items()) / sum(weights.values())
    found = saliency.human_map(torch.tensor(small.repeat(4, 0).repeat(4, 1))[None])
    expected = torch.nn.functional.interpolate(torch.tensor(blurred)[None, None], (224, 224), mode="bilinear")[0]
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-3)


def test_a_center_prior_falls_with_the_distance():
    prior = saliency.center_prior(5, 7)
    assert prior.argmax() == 2 * 7 + 3
    assert torch.equal(prior, prior.flip(0))
    assert torch.equal(prior, prior.flip(1))


def varint(value):
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def field(number, data):
    return varint(number << 3 | 2) + varint(len(data)) + data


def encode(features):
    entries = b""
    for name, values in features.items():
        if isinstance(values[0], bytes):
            kind = field(1, b"".join(field(1, value) for value in values))
        elif isinstance(values[0], float):
            kind = field(2, field(1, np.array(values, "<f4").tobytes()))
        else:
            kind = field(3, field(1, b"".join(varint(value % 2**64) for value in values)))
        entries += field(1, field(1, name.encode()) + field(2, kind))
    return field(1, entries)


def write_records(path, payloads):
    with open(path, "wb") as file:
        for data in payloads:
            length = len(data).to_bytes(8, "little")
            file.write(length + tfrecord.masked_crc32c(length).to_bytes(4, "little"))
            file.write(data + tfrecord.masked_crc32c(data).to_bytes(4, "little"))


def test_the_checksum_is_castagnolis():
    def unmasked(data):
        value = (tfrecord.masked_crc32c(data) - 0xA282EAD8) % 2**32
        return (value << 15 | value >> 17) % 2**32

    assert unmasked(b"123456789") == 0xE3069283
    assert unmasked(bytes(32)) == 0x8A9136AA


@given(
    st.dictionaries(
        st.text(max_size=5),
        st.lists(st.binary(max_size=150), min_size=1, max_size=3)
        | st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=3)
        | st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=3),
        max_size=3,
    )
)
@settings(max_examples=40)
def test_examples_are_read_as_written(features):
    assert tfrecord.example(encode(features)) == features


@given(st.binary(max_size=60))
def test_other_bytes_are_no_example(data):
    with contextlib.suppress(ValueError):
        tfrecord.example(data)


def test_torn_files_are_noticed(tmp_path):
    path = tmp_path / "val-0.tfrecords"
    write_records(path, [b"one", b"", b"three" * 100])
    assert list(tfrecord.records(path)) == [b"one", b"", b"three" * 100]
    whole = path.read_bytes()
    for size in (len(whole) - 1, len(whole) - 300, 5):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"val-0\.tfrecords .*byte"):
            list(tfrecord.records(path))
    path.write_bytes(b"<html>no such file</html>" * 3)
    with pytest.raises(UserError, match="no TFRecord file"):
        list(tfrecord.records(path))
