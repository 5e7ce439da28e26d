"""The geometry's specification against independent ones, and DALI against the specification."""

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vito_fast._sampler import resize_cubic
from vito_fast.data.loader.dali import DecodeCropResize, DecodeError, mirrors
from vito_fast.data.loader.resize_reference import cubic_weights, view

CPU = torch.device("cpu")


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth waves with noise on them: what filters treat alike and what they do not."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin((x * a + y * b + seed) / 9) * 80 + 128 for a, b in ((1, 0.3), (-0.4, 1), (0.7, 0.7))]
    noise = np.random.default_rng(seed).normal(0, 20, (height, width, 3))
    return (np.stack(waves, -1) + noise).clip(0, 255).astype(np.uint8)


def jpeg(pixels: np.ndarray) -> np.ndarray:
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "JPEG", quality=92)
    return np.frombuffer(data.getvalue(), np.uint8)


def decoded(data: np.ndarray) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@given(st.integers(1, 60), st.integers(1, 60))
@settings(max_examples=60, deadline=None)
def test_weights_keep_a_constant_and_the_identity(source, target):
    weights = cubic_weights(source, target)
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-12)
    np.testing.assert_allclose(cubic_weights(source, source), np.eye(source), atol=1e-12)
    np.testing.assert_allclose(weights, weights[::-1, ::-1], atol=1e-12)  # no half-pixel shift


def test_weights_are_exact_for_straight_lines_inside():
    """Keys' cubic reproduces polynomials of second degree where all four taps are inside."""
    positions = (np.arange(40) + 0.5) * 90 / 40 - 0.5
    inside = (positions > 1) & (positions < 88)
    for power in (1, 2):
        got = cubic_weights(90, 40) @ np.arange(90.0) ** power
        np.testing.assert_allclose(got[inside], positions[inside] ** power, atol=1e-9)


def test_turn_and_flip_are_of_the_upright_view():
    square = picture(32, 32)
    whole = (0, 0, 32, 32)
    np.testing.assert_array_equal(view(square, whole, False, 32, 90), np.rot90(square, -1))
    np.testing.assert_array_equal(view(square, whole, True, 32, 270), np.rot90(square)[:, ::-1])


def test_view_refuses_a_window_outside():
    with pytest.raises(ValueError, match="not inside a picture of 32 x 32"):
        view(picture(32, 32), (0, 10, 10, 23), False, 8)


WINDOWS = [(0, 0, 90, 120), (3, 5, 61, 77), (7, 40, 83, 31), (89, 119, 1, 1), (20, 10, 17, 90)]


@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
@pytest.mark.parametrize("source", ["image", "frames"])
@pytest.mark.parametrize("native", [True, False])
def test_views_are_within_one_gray_level(source, rotation, native):
    """Crop, cubic, mirror and rotate, DALI's and our own, of every window, of both flips."""
    files = [jpeg(picture(90, 120, seed)) for seed in range(2 * len(WINDOWS))]
    crop = np.array(WINDOWS * 2, np.int32).reshape(-1, 2, 4)
    flip = np.array([0, 1, 1, 0, 0, 1, 1, 0, 0, 1], np.uint8).reshape(-1, 2)
    windows = [
        np.ascontiguousarray(decoded(file)[y : y + h, x : x + w])
        for file, (y, x, h, w) in zip(files, crop.reshape(-1, 4), strict=True)
    ]
    pipeline = DecodeCropResize(source, 56, 2, len(crop), device=CPU, native=native)
    mirrored = np.arange(len(crop)) % 2 > 0
    mirror = mirrors(flip, np.full(len(crop), rotation), mirrored)
    views = pipeline(files if source == "image" else windows, crop, mirror)
    assert [tuple(v.shape) for v in views] == [(len(crop), 56, 56, 3)] * 2
    for i in range(len(crop)):
        for v in range(2):
            expected = view(
                decoded(files[2 * i + v]), tuple(crop[i, v]), bool(flip[i, v]), 56, rotation, bool(mirrored[i])
            )
            got = np.rot90(views[v][i].numpy(), -rotation // 90)
            distance = np.abs(got.astype(int) - expected.astype(int))
            assert distance.max() <= 1, (i, v)
            assert distance.mean() < (1e-3 if native else 0.02), (i, v)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_the_native_resize(data):
    """Any window of any picture, rows with gaps between them, both mirrors: rounding apart the specification."""
    height, width, size = (data.draw(st.integers(1, 60)) for _ in range(3))
    h, w = data.draw(st.integers(1, height)), data.draw(st.integers(1, width))
    window = data.draw(st.integers(0, height - h)), data.draw(st.integers(0, width - w)), h, w
    upside, sideways = data.draw(st.booleans()), data.draw(st.booleans())
    pixels = np.random.default_rng(data.draw(st.integers(0, 99))).integers(0, 256, (height, width + 3, 3), np.uint8)
    out = np.full((size, size, 3), 77, np.uint8)
    resize_cubic(pixels[:, :width], window, upside, sideways, out)
    y, x, _, _ = window
    inside = pixels[y : y + h, x : x + w].astype(np.float64)
    exact = np.einsum("ih,hwc,jw->ijc", cubic_weights(h, size), inside, cubic_weights(w, size)).clip(0, 255)
    upright = out[:: -1 if upside else 1, :: -1 if sideways else 1]
    assert np.abs(upright - exact).max() <= 0.5 + 1e-3  # either neighbor of an exact tie is right


@pytest.mark.parametrize("window", [(0, 0, 0, 5), (0, 0, 11, 5), (6, 0, 5, 5), (0, 8, 5, 5), (2**63, 0, 5, 5)])
def test_the_native_resize_refuses_a_window_outside(window):
    with pytest.raises(ValueError, match="is not inside a picture of 10 x 12"):
        resize_cubic(picture(10, 12), window, False, False, np.empty((4, 4, 3), np.uint8))


def test_the_native_resize_refuses_other_layouts():
    out = np.empty((4, 4, 3), np.uint8)
    for bad in (picture(10, 12)[:, ::2], picture(10, 12)[::-1], picture(10, 12)[..., :2], picture(10, 12)[..., ::-1]):
        with pytest.raises(ValueError, match="picture must be"):
            resize_cubic(bad, (0, 0, 1, 1), False, False, out)
    with pytest.raises(ValueError, match="out must be"):
        resize_cubic(picture(10, 12), (0, 0, 1, 1), False, False, np.empty((4, 5, 3), np.uint8))


def test_a_view_does_not_depend_on_its_batch():
    files = [jpeg(picture(90, 120, seed)) for seed in range(8)]
    crop = np.tile(np.array(WINDOWS[1:3], np.int32), (4, 1, 1))
    mirror = np.zeros((4, 2, 2), bool)
    pipeline = DecodeCropResize("image", 56, 2, 4, device=CPU)
    together = [v.clone() for v in pipeline(files, crop, mirror)]
    other = DecodeCropResize("image", 56, 2, 4, device=CPU, threads=2)
    for i in range(4):
        alone = other(files[2 * i : 2 * i + 2], crop[i : i + 1], mirror[i : i + 1])
        assert all(torch.equal(whole[i], part[0]) for whole, part in zip(together, alone, strict=True))


@pytest.mark.parametrize("bad", [b"", b"no picture at all", bytes(5000)])
def test_the_pipeline_survives_what_dali_refuses(bad, capfd):
    file = jpeg(picture(90, 120))
    crop, mirror = np.array([[WINDOWS[1]], [WINDOWS[2]]], np.int32), np.zeros((2, 1, 2), bool)
    pipeline = DecodeCropResize("image", 32, 1, 2, device=CPU)
    (before,) = (v.clone() for v in pipeline([file, file], crop, mirror))
    with pytest.raises(DecodeError):
        pipeline([file, np.frombuffer(bad, np.uint8)], crop, mirror)
    assert torch.equal(pipeline([file, file], crop, mirror)[0], before)
    truncated = file[: len(file) // 2]
    with pytest.raises(DecodeError):
        pipeline([truncated, file], crop, mirror)
    capfd.readouterr()
