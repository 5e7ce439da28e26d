"""J and F against the official tool's values and a dilation by hand, trees of results, and the copy's checks."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.ndimage import binary_dilation
from torch.nn.functional import avg_pool2d

from vito_fast.errors import UserError
from vito_fast.evaluate import davis
from vito_fast.evaluate.propagate import PRESETS

A = np.zeros((240, 320), bool)
A[60:140, 90:210] = True


def rect(shape, y0, y1, x0, x1):
    mask = np.zeros(shape, bool)
    mask[max(y0, 0) : max(y1, 0), max(x0, 0) : max(x1, 0)] = True
    return mask


def disc(shape, cy, cx, r):
    y, x = np.ogrid[: shape[0], : shape[1]]
    return (y - cy) ** 2 + (x - cx) ** 2 < r**2


G1 = {
    "rolled 3, 5": (A, np.roll(A, (3, 5), (0, 1)), 0.8559690671822137, 0.615),
    "rolled 0, -6": (A, np.roll(A, (0, -6), (0, 1)), 0.9047619047619048, 0.615),
    "hole": (A, A & ~rect(A.shape, 90, 110, 140, 160), 0.9583333333333334, 0.9090909090909091),
    "rectangle": (A, rect(A.shape, 0, 80, 0, 120), 0.03225806451612903, 0.06010016694490819),
    "one pixel": (A, rect(A.shape, 100, 101, 150, 151), 0.00010416666666666667, 0),
    "all true": (A, np.ones_like(A), 0.125, 0),
    "discs": (disc(A.shape, 120, 160, 60), disc(A.shape, 120, 166, 55), 0.8323321554770318, 0.4673012733341575),
    "full against empty": (np.ones_like(A), np.zeros_like(A), 0, 1),
    "both empty": (np.zeros_like(A), np.zeros_like(A), 1, 1),
    "itself": (A, A, 1, 1),
    "against empty": (A, np.zeros_like(A), 0, 0),
}


@pytest.mark.parametrize(("truth", "result", "j", "f"), G1.values(), ids=G1)
def test_measures_are_the_official_tools(truth, result, j, f):
    assert davis.region_similarity(truth, result) == pytest.approx(j, abs=1e-15)
    assert davis.boundary_f(truth, result) == pytest.approx(f, abs=1e-15)


@pytest.mark.parametrize(
    ("shift", "j", "f"),
    [(1, 0.960784, 1), (8, 0.724138, 1), (9, 0.694915, 0.58), (12, 0.612903, 0.55), (20, 0.428571, 0.47)],
)
def test_boundaries_match_within_the_tolerance(shift, j, f):
    shape = 480, 854
    truth, result = rect(shape, 200, 250, 300, 350), rect(shape, 200, 250, 300 + shift, 350 + shift)
    assert davis.region_similarity(truth, result) == pytest.approx(j, abs=5e-7)
    assert davis.boundary_f(truth, result) == pytest.approx(f, abs=1e-12)


def boundary_f_by_dilation(truth, result):
    """F from its definition: boundary pixels under the other boundary, dilated by a disk."""
    radius = int(np.ceil(0.008 * np.hypot(*truth.shape)))
    y, x = np.ogrid[-radius : radius + 1, -radius : radius + 1]
    disk = x**2 + y**2 <= radius**2

    def boundary(mask):
        found = np.zeros_like(mask)
        for i, j in np.ndindex(mask.shape):
            neighbors = [(i, j + 1), (i + 1, j), (i + 1, j + 1)]
            found[i, j] = any(
                mask[min(a, mask.shape[0] - 1), min(b, mask.shape[1] - 1)] != mask[i, j] for a, b in neighbors
            )
        return found

    expected, found = boundary(truth), boundary(result)
    if not expected.any() or not found.any():
        return float(expected.any() == found.any())
    precision = (found & binary_dilation(expected, disk)).sum() / found.sum()
    recall = (expected & binary_dilation(found, disk)).sum() / expected.sum()
    return 0.0 if precision + recall == 0 else 2 * precision * recall / (precision + recall)


@settings(max_examples=40)
@given(st.integers(0, 2**32 - 1), st.integers(1, 50), st.integers(1, 60), st.sampled_from([0.0, 0.02, 0.5, 0.98]))
def test_boundary_f_is_a_dilation_by_a_disk(seed, height, width, density):
    rng = np.random.default_rng(seed)
    truth = disc((height, width), rng.integers(height), rng.integers(width), rng.integers(30))
    result = truth ^ (rng.random((height, width)) < density * rng.integers(2))
    f = davis.boundary_f(truth, result)
    assert f == pytest.approx(boundary_f_by_dilation(truth, result), abs=1e-12)
    assert f == davis.boundary_f(result, truth)
    assert davis.region_similarity(truth, result) == davis.region_similarity(result, truth)
    assert davis.boundary_f(truth[::-1, ::-1].T, truth[::-1, ::-1].T) == 1


def test_void_pixels_are_neither_object_nor_error():
    void = rect(A.shape, 50, 150, 200, 320)
    worse = A | rect(A.shape, 60, 140, 200, 300)
    assert davis.region_similarity(A, worse) < davis.region_similarity(A, worse, void) == 1
    assert davis.boundary_f(A, worse) < davis.boundary_f(A, worse, void) == 1


def test_statistics_have_the_official_quirks():
    found = davis.statistics([0.2, 0.9, 0.4, 0.8, 0.6])
    assert (found.mean, found.recall, found.decay) == pytest.approx((0.58, 0.6, -0.15), abs=1e-12)
    found = davis.statistics(np.arange(9, 0, -1) / 10)
    assert (found.mean, found.recall, found.decay) == pytest.approx((0.5, 4 / 9, 0.6), abs=1e-12)
    assert davis.statistics([0.5, 0.5]).recall == 0  # strictly above
    with pytest.warns(UserWarning, match="8-bit"):
        davis.statistics(np.ones(300))
    with pytest.raises(ValueError, match="at least one"):
        davis.statistics([])


def write(folder, frames):
    folder.mkdir(parents=True)
    for t, ids in enumerate(frames):
        Image.fromarray(ids.astype(np.uint8)).save(folder / f"{t:05d}.png")


def stack(*masks):
    """Later ids over earlier ones."""
    ids = np.zeros(masks[0].shape, np.uint8)
    for number, mask in enumerate(masks, 1):
        ids[mask] = number
    return ids


@pytest.fixture
def tree(tmp_path):
    """G2: three sequences in the official layout, and results."""
    shape, none = (120, 160), np.zeros((120, 160), bool)
    truth, result = {}, {}
    truth["alpha"] = [
        stack(rect(shape, 30, 70, 20 + 8 * t, 60 + 8 * t), disc(shape, 80, 120 - 6 * t, 18)) for t in range(7)
    ]
    result["alpha"] = [
        stack(
            rect(shape, 30 + t % 3, 70 + t % 3, 20 + 8 * t, 60 + 8 * t),
            disc(shape, 80, 120 - 6 * t, 18 - t) if t != 4 else none,
        )
        for t in range(7)
    ]
    truth["beta"] = [stack(disc(shape, 60, 40 + 10 * t, 20 if t != 3 else 0)) for t in range(6)]
    result["beta"] = [stack(disc(shape, 60, 40, 20)) for t in range(6)]
    truth["gamma"] = [stack(rect(shape, 10, 50, 10, 50), rect(shape, 60, 110, 80 + t, 150)) for t in range(5)]
    result["gamma"] = [stack(rect(shape, 10, 50, 10, 50)) for t in range(5)]
    for name in truth:
        write(tmp_path / "DAVIS" / "Annotations" / "480p" / name, truth[name])
        write(tmp_path / "results" / name, result[name])
    listing = tmp_path / "DAVIS" / "ImageSets" / "2017" / "val.txt"
    listing.parent.mkdir(parents=True)
    listing.write_text("alpha\nbeta\ngamma\n")
    return tmp_path


def test_a_tree_scores_as_the_official_tool_scores_it(tree):
    scores = davis.evaluate_results(tree / "results", tree / "DAVIS")
    expected = {
        "J&F-Mean": 0.511557025217,
        "J-Mean": 0.538826142033,
        "J-Recall": 0.61,
        "J-Decay": 0.200297514673,
        "F-Mean": 0.4842879084,
        "F-Recall": 0.48,
        "F-Decay": 0.228519410823,
    }
    assert scores.summary == pytest.approx(expected, abs=1e-11)
    assert scores.per_object == {
        "alpha_1": pytest.approx((0.92660454179, 0.94614266787), abs=1e-11),
        "alpha_2": pytest.approx((0.57631840796, 0.382348156182), abs=1e-11),
        "beta_1": pytest.approx((0.191207760415, 0.092948717949), abs=1e-11),
        "gamma_1": (1, 1),
        "gamma_2": (0, 0),
    }
    assert scores.per_sequence["gamma"] == 0.5


def test_perfect_and_empty_results(tree):
    truth = tree / "DAVIS" / "Annotations" / "480p"
    assert davis.evaluate_results(truth, tree / "DAVIS").summary == {
        "J&F-Mean": 1, "J-Mean": 1, "J-Recall": 1, "J-Decay": 0, "F-Mean": 1, "F-Recall": 1, "F-Decay": 0,
    }  # fmt: skip
    for path in (tree / "results").rglob("*.png"):
        Image.new("L", (160, 120)).save(path)
    summary = davis.evaluate_results(tree / "results", tree / "DAVIS").summary
    assert summary["J-Mean"] == pytest.approx(0.25 / 5)  # beta's object is absent in one of four scored frames
    assert summary["F-Mean"] == pytest.approx(0.25 / 5)


def test_wrong_results_are_one_line(tree):
    def score():
        return davis.evaluate_results(tree / "results", tree / "DAVIS")

    frame = tree / "results" / "beta" / "00002.png"
    Image.fromarray(np.full((120, 160), 2, np.uint8)).save(frame)
    with pytest.raises(UserError, match="beta: the results have object 2, the first frame has 1"):
        score()
    Image.new("RGB", (160, 120)).save(frame)
    with pytest.raises(UserError, match="is a RGB image"):
        score()
    Image.new("L", (80, 60)).save(frame)
    with pytest.raises(UserError, match="not of the truth's size"):
        score()
    frame.unlink()
    with pytest.raises(UserError, match=r"00002\.png is missing"):
        score()
    with pytest.raises(UserError, match="no split"):
        davis.evaluate_results(tree / "results", tree / "DAVIS", split="test")


def test_a_wrong_copy_is_refused(tree):
    dataset = tree / "DAVIS"
    found = davis.problems(dataset)
    assert "val.txt lacks bike-packing" in found
    assert any("alpha, which the benchmark lacks" in line for line in found)
    (dataset / "Annotations").rename(dataset / "Annotations_unsupervised")
    assert "unsupervised track" in davis.problems(dataset)[0]
    with pytest.raises(UserError, match="unsupervised track"):
        davis.evaluate_results(tree / "results", dataset)
    (dataset / "ImageSets" / "2017" / "val.txt").write_text("../results\n")
    (dataset / "Annotations_unsupervised").rename(dataset / "Annotations")
    with pytest.raises(UserError, match="no name of a sequence"):
        davis.sequences(dataset)
    assert "JPEGImages" in davis.problems(tree)[0]


def test_counts_of_the_benchmark():
    assert (len(davis.VAL_FRAMES), sum(davis.VAL_FRAMES.values())) == (30, 1999)


@pytest.mark.parametrize("preset", ["vfs", "crw", "dino"])
def test_an_encoder_that_tells_colors_follows_moving_squares(preset):
    ids = np.zeros((6, 128, 192), np.uint8)
    for t in range(6):
        ids[t, 32:64, 32 + 16 * t : 80 + 16 * t] = 1
        ids[t, 80:112, 112 - 16 * t : 144 - 16 * t] = 2
    colors = np.array([[20, 30, 200], [220, 40, 30], [30, 200, 60]], np.uint8)
    protocol = dataclasses.replace(PRESETS[preset], resize="none")
    masks = np.stack(list(davis.propagate(lambda x: avg_pool2d(x, 8), colors[ids], ids[0], protocol)))
    scores = davis.score_sequence("squares", ids, masks)
    assert min(score.j.mean for score in scores) > 0.9
    assert np.array_equal(masks[0], ids[0])
