"""The sampler: known answers, purity, ranges and distributions, and clear errors for nonsense."""

from __future__ import annotations

import threading
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import SHARD, constant_clip, synthetic_index

from vito_fast import _sampler
from vito_fast.config import SamplerConfig
from vito_fast.data.loader.sampler import Sampler
from vito_fast.data.store.index import KEY, Index, write_index
from vito_kernels.photometric import PARAMS

NUMBERS = np.arange(20_000)
TWO = SamplerConfig(views=2)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return synthetic_index(tmp_path_factory.mktemp("store") / "index.bin", clips=13, frames=250)


PINNED = {
    "clip": [0, 12, 4],
    "frame": [[129, 175], [46, 62], [155, 117]],
    "crop": [[1, 71, 167, 215], [0, 102, 180, 178], [9, 158, 171, 137]],
    "retried": [[1, 71, 167, 215], [2, 16, 177, 184], [9, 158, 171, 137]],
    "params": [0.1778491, 0.7477631, 0.856211, -0.0060951, 12.0, 0.0, 0.0, 0.5],
}


def irregular_index(path: Path) -> Index:
    """Two clips of variable rate, decoded in another order than shown; ticks of a millisecond, not from zero."""
    rng = np.random.default_rng(1)
    clips = []
    for video in range(2):
        pts = np.cumsum(rng.integers(5, 200, 40)) + 1000 * (video + 1)
        decoding = np.concatenate([[0], 1 + np.arange(39).reshape(-1, 3)[:, [2, 0, 1]].ravel()])
        flags = np.where(np.arange(40) == 0, KEY, 0).astype(np.uint8)
        end = int(pts[-1]) + 30
        base = constant_clip(video, 40, codec="h264", flags=flags, time_base=Fraction(1, 1000), end=end)
        clips.append(type(base)(**{**base.__dict__, "pts": pts[decoding]}))
    write_index(path, clips, format="copy", shards=[(SHARD, 10**6)])
    return Index(path)


def test_philox_known_answers() -> None:
    """Random123's published vectors for philox4x32-10."""
    assert _sampler.philox(0, [0] * 4) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = 0xFFFFFFFF
    assert _sampler.philox(2**64 - 1, [ones] * 4) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]
    assert _sampler.philox(0x299F31D0A4093822, pi) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


@settings(derandomize=True, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**64 - 1), st.integers(0, 2**60))
def test_shuffle_is_a_bijection(size: int, seed: int, epoch: int) -> None:
    out = _sampler.shuffled(size, seed, epoch, np.arange(size))
    assert np.array_equal(np.sort(out), np.arange(size))


@pytest.mark.parametrize("size", [2**40, 2**40 - 12345, 2**39 + 1])
def test_shuffle_of_huge_sizes(size: int) -> None:
    positions = np.unique(np.random.default_rng(0).integers(0, size, 100_000))
    out = _sampler.shuffled(size, 1, 0, positions)
    assert out.min() >= 0
    assert out.max() < size
    assert len(np.unique(out)) == len(positions)
    assert abs(out.mean() / size - 0.5) < 0.005


def test_shuffle_errors() -> None:
    for size in (0, 2**40 + 1):
        with pytest.raises(ValueError, match=f"size is {size}"):
            _sampler.shuffled(size, 0, 0, np.arange(1))
    with pytest.raises(IndexError, match="position 5"):
        _sampler.shuffled(5, 0, 0, np.array([5]))


def test_epochs_visit_every_clip_once_in_orders_of_their_own(index: Index) -> None:
    orders = Sampler(index, TWO, seed=3).clips(np.arange(13 * 50)).reshape(50, 13)
    assert np.array_equal(np.sort(orders, axis=1), np.tile(np.arange(13), (50, 1)))
    assert len({tuple(order) for order in orders}) == 50


def test_samples_are_pure_functions_of_their_number(index: Index) -> None:
    sampler = Sampler(index, TWO, seed=3)
    whole = sampler.sample(NUMBERS[:500])
    backwards = Sampler(index, TWO, seed=3).sample(NUMBERS[:500][::-1])
    for a, b in zip(whole, backwards, strict=True):
        assert np.array_equal(a, b[::-1])
    alone = sampler.sample([123])
    for a, b in zip(whole, alone, strict=True):
        assert np.array_equal(a[123:124], b)
    assert not np.array_equal(whole.params, Sampler(index, TWO, seed=4).sample(NUMBERS[:500]).params)


def test_samples_are_pinned(index: Index) -> None:
    """What a seed means must not change by accident: a resumed run would see other data."""
    out = Sampler(index, TWO, seed=2024).sample([0, 7, 10**12], attempt=[0, 1, 5])
    assert out.clip.tolist() == PINNED["clip"]
    assert out.frame.tolist() == PINNED["frame"]
    assert out.crop[:, 0].tolist() == PINNED["crop"]
    retry = Sampler(index, SamplerConfig(views=2, crop_fit="retry"), seed=2024)
    assert retry.sample([0, 7, 10**12], attempt=[0, 1, 5]).crop[:, 0].tolist() == PINNED["retried"]
    assert out.params[1, 1].tolist() == pytest.approx(PINNED["params"], abs=1e-6)


def test_attempts_replace_the_clip_and_every_parameter(index: Index) -> None:
    sampler = Sampler(index, TWO, seed=3)
    clips = np.stack([sampler.clips(NUMBERS[:100], attempt) for attempt in range(13)])
    assert np.array_equal(np.sort(clips, axis=0), np.tile(np.arange(13)[:, None], (1, 100)))
    first, second = sampler.sample(NUMBERS[:100]), sampler.sample(NUMBERS[:100], 1)
    assert not np.any(np.all(first.params == second.params, axis=(1, 2)))
    mixed = sampler.sample(NUMBERS[:100], np.arange(100) % 2)
    for a, b, c in zip(first, second, mixed, strict=True):
        assert np.array_equal(c[::2], a[::2])
        assert np.array_equal(c[1::2], b[1::2])


def test_shapes_and_dtypes(index: Index) -> None:
    for views in (1, 2, 3, 4):
        out = Sampler(index, SamplerConfig(views=views)).sample(np.arange(5))
        shapes = [(5,), (5,), (5, views), (5, views), (5, views, 4), (5, views), (5, views, 8)]
        dtypes = ["int64", "int64", "int32", "float64", "int32", "uint8", "float32"]
        assert [a.shape for a in out] == shapes
        assert [a.dtype for a in out] == [np.dtype(d) for d in dtypes]
    assert Sampler(index, TWO).sample([]).frame.shape == (0, 2)


def test_times_of_a_constant_rate(index: Index) -> None:
    out = Sampler(index, TWO).sample(NUMBERS)
    assert np.array_equal(out.video, out.clip)
    assert np.array_equal(out.time, out.frame / 25)
    gap = np.abs(out.frame[:, 0] - out.frame[:, 1])
    assert gap.max() == 64  # 2.56 s at 25 frames a second
    assert abs(gap.mean() - 64 / 3) < 0.5  # the mean distance of two uniform times
    # The window is uniform in the clip, so the middle of the clip is seen evenly.
    counts, _ = np.histogram(out.frame, bins=10, range=(64, 186))
    assert counts.min() > 0.9 * counts.mean()


def test_times_of_a_variable_rate(tmp_path: Path) -> None:
    index = irregular_index(tmp_path / "index.bin")
    out = Sampler(index, SamplerConfig(views=2, frame_window=0.5)).sample(np.arange(20_000))
    for clip in range(2):
        times = index.times(clip)
        assert np.all(np.diff(times) > 0)
        mine = out.clip == clip
        assert np.array_equal(out.time[mine], times[out.frame[mine]])
        # Frames are seen in proportion to how long they are shown (away from the ends, where windows are fewer).
        shown = np.diff(np.append(times, index.clip(clip).end))
        seen = np.bincount(out.frame[mine].ravel(), minlength=40) / mine.sum() / 2
        inner = (times > times[0] + 0.5) & (times < times[-1] - 0.7)
        expected = shown / (index.clip(clip).end - times[0] - 0.5)
        assert np.allclose(seen[inner], expected[inner], rtol=0.25)
    assert np.max(np.abs(out.time[:, 0] - out.time[:, 1])) < 0.5 + 0.2


def test_window_of_zero_gives_one_frame_to_all_views(index: Index) -> None:
    out = Sampler(index, SamplerConfig(frame_window=0, views=4)).sample(NUMBERS)
    assert np.all(out.frame == out.frame[:, :1])
    assert len(np.unique(out.frame)) == 250


def test_window_longer_than_the_clip_is_the_clip(index: Index) -> None:
    out = Sampler(index, SamplerConfig(views=2, frame_window=1e9)).sample(NUMBERS)
    counts = np.bincount(out.frame.ravel(), minlength=250)
    assert len(counts) == 250
    assert counts.min() > 0.5 * counts.mean()


def test_crops(index: Index) -> None:
    crop = Sampler(index, TWO).sample(NUMBERS).crop.reshape(-1, 4).astype(float)
    y, x, height, width = crop.T
    assert np.all((y >= 0) & (x >= 0) & (y + height <= 180) & (x + width <= 320))
    area, aspect = height * width / (320 * 180), width / height
    assert area.min() > 0.39
    assert area.max() <= 1
    assert aspect.min() > 0.73
    assert aspect.max() < 1.55  # a clipped height leaves a wider crop
    # Positions are uniform in what room there is.
    room = 320 - width
    assert abs((x[room > 0] / room[room > 0]).mean() - 0.5) < 0.01


@pytest.mark.parametrize(("fit", "mean"), [("clip", 0.61), ("retry", 0.52)])
def test_crops_follow_the_published_procedures(index: Index, fit: str, mean: float) -> None:
    """Those of BYOL and DetCon (clip) and of torchvision (retry), drawn here independently on 16:9."""
    rng = np.random.default_rng(0)
    expected = []
    for _ in range(20_000):
        for _ in range(10):
            area = rng.uniform(0.4, 1.0) * 320 * 180
            aspect = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
            width, height = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
            if fit == "clip":
                width, height = min(width, 320), min(height, 180)
            if width <= 320 and height <= 180:
                break
        else:
            width, height = 240, 180
        expected.append((height, width))
    config = SamplerConfig(views=2, crop_fit=fit)
    drawn = Sampler(index, config).sample(NUMBERS).crop.reshape(-1, 4)[:, 2:]
    for side in range(2):
        grid = np.quantile(np.array(expected)[:, side], np.linspace(0.05, 0.95, 19))
        theirs = np.searchsorted(np.sort(np.array(expected)[:, side]), grid, "right") / 20_000
        ours = np.searchsorted(np.sort(drawn[:, side]), grid, "right") / 40_000
        assert np.abs(theirs - ours).max() < 0.02
    assert abs(drawn.prod(1).mean() / (320 * 180) - mean) < 0.01


def test_a_third_view_is_drawn_as_the_first(index: Index) -> None:
    params = Sampler(index, SamplerConfig(views=4)).sample(NUMBERS).params
    blurred, solarized = (params[..., PARAMS.index(name)] for name in ("sigma", "solarize"))
    assert np.abs((blurred > 0).mean(0) - [1, 0.1, 1, 1]).max() < 0.01
    assert np.abs((solarized == 0.5).mean(0) - [0, 0.2, 0, 0]).max() < 0.01


def test_fixed_frames_depend_on_the_clip_alone(index: Index) -> None:
    drawn = Sampler(index, SamplerConfig(views=2, fixed_frames=True)).sample(NUMBERS[:200], attempt=NUMBERS[:200] % 3)
    pairs = {int(clip): {tuple(f) for f in drawn.frame[drawn.clip == clip].tolist()} for clip in range(13)}
    assert all(len(found) == 1 for found in pairs.values())
    assert len({next(iter(found)) for found in pairs.values()}) > 10
    assert len(np.unique(drawn.crop.reshape(-1, 4), axis=0)) > 390  # all else is drawn anew


def test_columns_are_those_of_the_kernel() -> None:
    assert _sampler.PARAMS == PARAMS


def test_photometric_parameters(index: Index) -> None:
    out = Sampler(index, TWO).sample(NUMBERS)
    column = dict(zip(PARAMS, np.moveaxis(out.params, -1, 0), strict=True))
    jittered = column["order"] >= 0
    assert abs(jittered.mean() - 0.8) < 0.01
    assert np.all(out.params[~jittered][:, :5] == [0, 1, 1, 0, -1])
    for name, center, spread in (("brightness", 0, 0.4), ("contrast", 1, 0.4), ("saturation", 1, 0.2), ("hue", 0, 0.1)):
        values = column[name][jittered]
        assert abs(values - center).max() <= spread + 1e-6
        assert np.allclose(
            np.quantile(values, [0.25, 0.5, 0.75]), center + spread * np.array([-0.5, 0, 0.5]), atol=0.01
        )
    counts = np.bincount(column["order"][jittered].astype(int), minlength=24)
    assert len(counts) == 24
    assert counts.min() > 0.9 * counts.mean()
    assert abs(column["gray"].mean() - 0.2) < 0.01
    blurred = column["sigma"] > 0
    assert blurred[:, 0].all()
    assert abs(blurred[:, 1].mean() - 0.1) < 0.01
    assert column["sigma"][blurred].min() >= 0.1
    assert column["sigma"].max() <= 2
    solarized = column["solarize"] == 0.5
    assert not solarized[:, 0].any()
    assert abs(solarized[:, 1].mean() - 0.2) < 0.01
    assert np.all(column["solarize"][~solarized] == 2)
    assert abs(out.flip.mean() - 0.5) < 0.01


def test_parameters_are_independent(index: Index) -> None:
    out = Sampler(index, SamplerConfig(views=2, jitter=1, blur=(1,))).sample(NUMBERS)
    columns = np.concatenate(
        [out.crop.reshape(len(NUMBERS), -1), out.params[..., :7].reshape(len(NUMBERS), -1), out.flip, out.frame[:, :1]],
        1,
    ).astype(float)
    for view in range(2):  # position and size of one crop belong together
        columns = np.delete(columns, [0, 1] if view == 0 else [2, 3], axis=1)
    correlation = np.corrcoef(columns.T)
    np.fill_diagonal(correlation, 0)
    correlation[:4, :4] = 0
    assert np.abs(correlation).max() < 0.04


def test_no_augmentation(index: Index) -> None:
    config = SamplerConfig(
        crop_area=(1, 1), crop_aspect=(16 / 9, 16 / 9), flip=0, jitter=0, grayscale=0, blur=(0,), solarize=(0,)
    )
    out = Sampler(index, config).sample(NUMBERS[:100])
    assert np.all(out.crop == [0, 0, 180, 320])
    assert np.all(out.params == [0, 1, 1, 0, -1, 0, 0, 2])
    assert not out.flip.any()


NAN, INF = float("nan"), float("inf")
BAD = {
    "size": [0, -1, 2.5], "views": [0, 5, 2.0], "frame_window": [-1, NAN, INF], "flip": [-0.1, 1.1, NAN], "jitter": [2],
    "crop_fit": ["no"],
    "crop_area": [(0, 1), (0.5, 0.4), (0.5, 1.1), (1,)], "crop_aspect": [(0, 1), (2, 1), (1, NAN)], "brightness": [-1],
    "contrast": [1.5], "saturation": [-1], "hue": [0.6], "grayscale": [-1], "blur_sigma": [(0, 1), (2, 1)],
    "blur": [(), (0.5, 2), (0,) * 5], "solarize": [(-1,)],
}  # fmt: skip


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in BAD.items() for value in values])
def test_nonsense_names_field_and_value(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"sampler.{field} is ") as error:
        SamplerConfig(**{field: value})
    assert repr(value) in str(error.value)


def test_bad_arguments(index: Index, tmp_path: Path) -> None:
    sampler = Sampler(index, TWO)
    with pytest.raises(ValueError, match="sample number -1 is negative"):
        sampler.sample([0, -1])
    with pytest.raises(ValueError, match="numbers has dtype float64"):
        sampler.sample([0.5])
    with pytest.raises(ValueError, match=r"numbers has shape \(1, 2\)"):
        sampler.sample([[1, 2]])
    with pytest.raises(ValueError, match=r"attempt has shape \(2,\), must be \(3,\)"):
        sampler.sample([1, 2, 3], [0, 1])
    with pytest.raises(ValueError, match="attempt has values from -1"):
        sampler.sample([1], -1)
    for seed in (-1, 2**64):
        with pytest.raises(ValueError, match=f"seed is {seed}"):
            Sampler(index, TWO, seed=seed)
    write_index(tmp_path / "empty.bin", [], format="jpeg", shards=[])
    with pytest.raises(ValueError, match="has no clips"):
        Sampler(Index(tmp_path / "empty.bin"))


def test_a_corrupt_index_raises(tmp_path: Path) -> None:
    path = tmp_path / "index.bin"
    synthetic_index(path, clips=3)
    data = bytearray(path.read_bytes())
    data[-60] ^= 1  # in the last record
    path.write_bytes(data)
    with pytest.raises(ValueError, match="clip 2: its record's checksum is wrong"):
        Sampler(Index(path)).sample(np.arange(3))


def test_threads_agree(index: Index) -> None:
    sampler = Sampler(index, TWO, seed=1)
    expected = sampler.sample(NUMBERS)
    results: list[bool] = []

    def work() -> None:
        results.append(all(np.array_equal(a, b) for a, b in zip(sampler.sample(NUMBERS), expected, strict=True)))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 4
