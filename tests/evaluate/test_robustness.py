"""pm-k, corruptions and their folders against known values."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.color import hsv2rgb, rgb2hsv

from vito_fast.errors import UserError
from vito_fast.evaluate import corruptions, robustness


def g9():
    correct = {(v, t): (31 * v + 7 * t) % 61 != 3 for v in range(6) for t in range(41)}
    sets = {}
    for v in range(6):
        near = robustness.window_sets(41, 20 - v, 10)
        sets[v, 20 - v] = [(v, t) for t in near if not (v == 1 and t % 3 == 0)]
    return correct, sets


def test_pm_10():
    correct, sets = g9()
    found = robustness.pm_k(correct, sets)
    assert (found.anchor, found.worst, found.n) == (1, pytest.approx(0.6666666666666666, abs=1e-15), 6)
    table = np.array([[correct[v, t] for t in range(41)] for v in range(6)])
    assert robustness.pm_k(table, list(sets.items())) == found


@given(st.lists(st.booleans(), min_size=1, max_size=30), st.integers(0, 29), st.integers(0, 12))
def test_the_anchor_counts_and_more_neighbors_never_help(correct, anchor, k):
    anchor %= len(correct)
    near = robustness.window_sets(len(correct), anchor, k)
    assert sorted([*near, anchor]) == [t for t in range(len(correct)) if abs(t - anchor) <= k]
    found = robustness.pm_k(correct, {anchor: near})
    assert found.worst == all(correct[t] for t in [*near, anchor])
    assert robustness.pm_k(correct, {anchor: robustness.window_sets(len(correct), anchor, k + 1)}).worst <= found.worst
    assert robustness.pm_k(correct, {anchor: []}).worst == found.anchor == correct[anchor]


def test_frames_without_a_decision_are_named():
    with pytest.raises(ValueError, match="'b'"):
        robustness.pm_k({"a": True}, {"a": ["b"]})
    with pytest.raises(ValueError, match="at least one"):
        robustness.pm_k({}, {})
    with pytest.raises(ValueError, match="anchor 4"):
        robustness.window_sets(4, 4)


def vid_robust(root, **files):
    for name, value in {
        "metadata/pmsets.json": {"val/a/0.jpg": ["val/a/1.jpg"], "val/b/0.jpg": []},
        "metadata/labels.json": {"val/a/0.jpg": [1], "val/a/1.jpg": [1, 0], "val/b/0.jpg": [0]},
        "misc/rev_class_idx_map.json": {"0": [3], "1": [1, 4]},
    }.items():
        path = root / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(files.get(path.stem, value)))
    return root


def test_vid_robust_merges_the_members_of_a_class(tmp_path):
    data = robustness.vid_robust(vid_robust(tmp_path))
    assert data.frames == ["val/a/0.jpg", "val/a/1.jpg", "val/b/0.jpg"]
    logits = np.array([[9, 0, 9, 1, 2.0], [9, 3, 9, 4, 0], [9, 5, 9, 4, 0]])
    found = data.score(logits, data.frames)
    assert (found.anchor, found.worst) == (0.5, 0.5)
    with pytest.raises(UserError, match="leaves the data set"):
        robustness.vid_robust(vid_robust(tmp_path, pmsets={"../a": []}, labels={"../a": [0]}))
    with pytest.raises(UserError, match=r"no label for val/c\.jpg"):
        robustness.vid_robust(vid_robust(tmp_path, pmsets={"val/c.jpg": []}))
    (tmp_path / "metadata" / "pmsets.json").unlink()
    with pytest.raises(UserError, match=r"pmsets\.json"):
        robustness.vid_robust(tmp_path)


def test_corruption_folders_may_be_grouped(tmp_path):
    with pytest.raises(UserError, match="CORRUPTION/SEVERITY"):
        robustness.corruption_folders(tmp_path)
    for severity in range(1, 6):
        (tmp_path / "noise" / "gaussian_noise" / str(severity) / "n01440764").mkdir(parents=True)
        (tmp_path / "fog_3d" / str(severity)).mkdir(parents=True)
    assert {name for name, _ in robustness.corruption_folders(tmp_path)} == {"gaussian_noise", "fog_3d"}
    (tmp_path / "fog_3d" / "4").rmdir()
    with pytest.raises(UserError, match="fog_3d lacks severity 4"):
        robustness.corruption_folders(tmp_path)


def test_corruptions_weigh_alike():
    found = robustness.corrupted_accuracy(0.8, {("fog", 1): 0.6, ("fog", 2): 0.2, ("snow", 1): 0.8})
    assert (found.corrupted, found.relative) == (pytest.approx(0.6), pytest.approx(0.75))
    assert robustness.restricted_accuracy([[9, 1, 2], [9, 3, 2]], [1, 1], [1, 2]) == 0.5


def g11():
    i, j, c = np.meshgrid(np.arange(64), np.arange(96), np.arange(3), indexing="ij")
    image = 40 + 90 * (1 + np.sin(i / 9 + c)) + 35 * np.cos(j / 7 - c) + 20 * ((i // 8 + j // 8) % 2)
    return np.clip(image, 0, 255).astype(np.uint8)


G11 = {
    "brightness": (14.08, 24.64, 31.17, 35.40, 38.15),
    "contrast": (35.56, 41.45, 47.38, 53.30, 56.26),
    "saturate": (34.64, 44.62, 29.58, 45.41, 45.76),
    "pixelate": (3.68, 3.33, 6.10, 7.61, 6.94),
    "defocus_blur": (5.20, 6.57, 9.04, 10.99, 13.35),
    "gaussian_blur": (3.12, 5.81, 7.87, 9.62, 14.10),
    "zoom_blur": (8.36, 10.53, 12.69, 14.62, 16.79),
}
NOISE = {
    "gaussian_noise": (15.51, 22.76, 32.87, 44.85, 59.63),
    "shot_noise": (17.91, 26.90, 37.25, 54.31, 67.51),
    "impulse_noise": (3.78, 7.62, 11.53, 21.65, 34.53),
    "speckle_noise": (16.01, 20.87, 34.39, 42.53, 53.07),
    "glass_blur": (8.17, 7.19, 14.69, 12.16, 13.38),
    "motion_blur": (9.05, 13.96, 20.40, 27.13, 31.26),
    "snow": (40.62, 61.29, 61.37, 71.41, 81.75),
    "frost": (52.18, 57.85, 61.13, 57.72, 59.62),
    "fog": (42.38, 47.09, 51.07, 51.29, 53.61),
    "elastic_transform": (65.95, 74.34, 22.87, 23.31, 25.01),
    "spatter": (1.38, 4.80, 7.42, 12.68, 19.97),
}
"""Means over random draws of the published code, with OpenCV where it reads ImageMagick or OpenCV."""


def change(image, name, severity, seed=0):
    return np.abs(corruptions.corrupt(image, name, severity, seed).astype(int) - image).mean()


@pytest.mark.parametrize("name", G11)
def test_severities_are_the_published_ones(name):
    image = g11()
    assert image.sum() == 2722962
    assert [change(image, name, s) for s in range(1, 6)] == pytest.approx(G11[name], abs=0.03)


@pytest.mark.parametrize("name", NOISE)
def test_random_ones_are_within_four_deviations(name):
    image = g11()
    for severity, expected in enumerate(NOISE[name], 1):
        draws = [change(image, name, severity, seed) for seed in range(8)]
        assert abs(np.mean(draws) - expected) < 4 * np.std(draws) / np.sqrt(8) + 0.02 * expected


def test_every_corruption_of_imagenet_c_is_here():
    assert tuple(corruptions.CORRUPTIONS)[:15] == robustness.CORRUPTIONS_C
    assert len(corruptions.CORRUPTIONS) == 19 == len(G11) + len(NOISE) + len({"jpeg_compression"})


def test_glass_copies_pixels_one_after_the_other(monkeypatch):
    monkeypatch.setattr(corruptions, "_blurred", lambda x, sigma: x)
    image = np.random.default_rng(1).integers(0, 256, (19, 23, 3), dtype=np.uint8)
    for severity, reach, rounds in ((1, 1, 2), (3, 2, 3), (5, 4, 2)):
        rng, expected = np.random.default_rng(5), image.copy()
        for _ in range(rounds):
            rows, columns = 19 - 2 * reach, 23 - 2 * reach
            moves = rng.integers(-reach, reach, (2, rows, columns))
            for h in range(19 - reach, reach, -1):
                for w in range(23 - reach, reach, -1):
                    dy, dx = moves[:, h - reach - 1, w - reach - 1]
                    expected[h, w] = expected[h + dy, w + dx]
        assert np.array_equal(corruptions.corrupt(image, "glass_blur", severity, 5), expected)


@pytest.mark.parametrize("name", corruptions.CORRUPTIONS)
def test_the_seed_alone_decides(name):
    image = g11()
    first = corruptions.corrupt(image, name, 3, 7)
    assert first.shape == image.shape
    assert first.dtype == np.uint8
    assert np.array_equal(first, corruptions.corrupt(image.copy(), name, 3, 7))
    assert (name in NOISE) != np.array_equal(first, corruptions.corrupt(image, name, 3, 8))


@settings(max_examples=25)
@given(st.sampled_from(sorted(corruptions.CORRUPTIONS)), st.integers(1, 5), st.integers(1, 20), st.integers(1, 20))
def test_any_size(name, severity, height, width):
    image = np.random.default_rng(height * width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    assert corruptions.corrupt(image, name, severity, 0).shape == image.shape


def test_brightness_and_saturation_are_those_of_hsv():
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    image[:2] = image[:2, :, :1]  # grays

    for name, channel, scale, shift in (("brightness", 2, 1, 0.3), ("saturate", 1, 2, 0), ("saturate", 1, 5, 0.1)):
        severity = {("brightness", 0.3): 3, ("saturate", 0): 3, ("saturate", 0.1): 4}[name, shift]
        hsv = rgb2hsv(image / 255)
        hsv[..., channel] = np.clip(hsv[..., channel] * scale + shift, 0, 1)
        expected = (np.clip(hsv2rgb(hsv), 0, 1) * 255).astype(np.uint8)
        found = corruptions.corrupt(image, name, severity, 0)
        assert np.abs(found.astype(int) - expected).max() <= 1


def test_wrong_arguments_are_named():
    image = g11()
    with pytest.raises(ValueError, match="'rain'"):
        corruptions.corrupt(image, "rain", 1, 0)
    with pytest.raises(ValueError, match="not 6"):
        corruptions.corrupt(image, "contrast", 6, 0)
    with pytest.raises(ValueError, match="float64"):
        corruptions.corrupt(image / 255, "contrast", 1, 0)
