"""Photometric augmentation on the CPU: the reference against independent formulas, the fast path against it."""

import colorsys
import gc
import importlib
import math
import subprocess
import sys
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from photometric_cases import IDENTITY, gray_levels, photographs, random_params

from vito_kernels import photometric, reference
from vito_kernels.photometric import cpu as photometric_cpu
from vito_kernels.photometric.op import PARAMS
from vito_kernels.reference import IMAGENET_MEAN, IMAGENET_STD

module = importlib.import_module("vito_kernels.photometric.op")
PLAIN = {"mean": (0, 0, 0), "std": (1, 1, 1)}


def row(**values):
    params = IDENTITY.clone()
    for name, value in values.items():
        params[0, PARAMS.index(name)] = value
    return params


def augment(images, function=reference.photometric, **values):
    """(H, W, 3) in [0, 1], float64 by the reference."""
    dtype = {"dtype": torch.float64} if function is reference.photometric else {}
    return function(images, row(**values), **PLAIN, **dtype)[0].permute(1, 2, 0)


# ------------------------------------------------------------------------------------------------------ the reference


def test_reference_color_operations_pixel_by_pixel():
    """Against Python's own colorsys and the written formulas; jitter's four operations one at a time."""
    images = photographs(1, 6, 5)
    pixels = images[0].double() / 255
    means = pixels.mean((0, 1))
    done = {
        "brightness": augment(images, brightness=0.3, order=0),
        "contrast": augment(images, contrast=1.7, order=0),
        "saturation": augment(images, saturation=1.6, order=0),
        "hue": augment(images, hue=0.23, order=0),
        "gray": augment(images, gray=1),
    }
    for i in range(6):
        for j in range(5):
            r, g, b = pixels[i, j].tolist()
            h, s, v = colorsys.rgb_to_hsv(r, g, b)
            expected = {
                "brightness": [min(x + float(torch.tensor(0.3)), 1.0) for x in (r, g, b)],
                "contrast": [
                    min(max(float(torch.tensor(1.7)) * (x - m) + m, 0.0), 1.0)
                    for x, m in zip((r, g, b), means.tolist(), strict=True)
                ],
                "saturation": colorsys.hsv_to_rgb(h, min(s * float(torch.tensor(1.6)), 1.0), v),
                "hue": colorsys.hsv_to_rgb((h + float(torch.tensor(0.23))) % 1.0, s, v),
                "gray": [0.2989 * r + 0.5870 * g + 0.1140 * b] * 3,
            }
            for name, value in expected.items():
                torch.testing.assert_close(done[name][i, j], torch.tensor(value, dtype=torch.float64), msg=name)


def test_reference_clips_after_every_operation():
    """0.9 + 0.5 is clipped to 1 before contrast sees it; with one clip at the end the result would be another."""
    images = torch.tensor([[[[230] * 3, [26] * 3]]], dtype=torch.uint8)
    bright, dark = 230 / 255, 26 / 255
    first = [min(bright + 0.5, 1.0), dark + 0.5]
    mean = sum(first) / 2
    expected = [0.5 * (x - mean) + mean for x in first]
    got = augment(images, brightness=0.5, contrast=0.5, order=0)[0, :, 0]
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64))


def test_reference_orders_are_lexicographic():
    """Rank 6 is (contrast, brightness, saturation, hue): contrast comes before brightness."""
    images = torch.tensor([[[[200] * 3, [100] * 3]]], dtype=torch.uint8)
    mean = 150 / 255
    expected = [min(0.5 * (x / 255 - mean) + mean + 0.25, 1.0) for x in (200, 100)]
    got = augment(images, brightness=0.25, contrast=0.5, order=6)[0, :, 0]
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64))
    assert reference.photometric.__globals__["ORDERS"][23] == (3, 2, 1, 0)


def test_reference_blur_is_zero_padded_and_as_wide_as_the_image_says():
    images = torch.zeros(1, 60, 61, 3, dtype=torch.uint8)
    images[0, 30, 20] = 255
    sigma = float(torch.tensor(1.3))
    taps = torch.tensor([math.exp(-i * i / (2 * sigma * sigma)) for i in range(-3, 4)], dtype=torch.float64)
    taps /= taps.sum()
    blurred = augment(images, sigma=1.3)[..., 1]
    torch.testing.assert_close(blurred[27:34, 17:24], taps[:, None] * taps)
    assert blurred[26, 20] == 0, "radius int(60 / 10 / 2) = 3"
    corner = augment(torch.full((1, 60, 61, 3), 255, dtype=torch.uint8), sigma=1.3)[0, 0, 0]
    torch.testing.assert_close(corner, taps[3:].sum() ** 2)


# ------------------------------------------------------------------------------------------------------- the fast path


@given(
    height=st.integers(1, 90),
    width=st.integers(1, 40),
    seed=st.integers(0, 999),
    kernel_size=st.sampled_from([None, 1, 3, 23]),
)
@settings(max_examples=40, deadline=None)
def test_equals_reference(height, width, seed, kernel_size):
    images, params = photographs(5, height, width, seed), random_params(5, seed)
    params[:, 7] = torch.where(params[:, 7] < 0.75, 0.5, 2.0)  # solarize is continuous only at one half
    expected = reference.photometric(images, params, kernel_size=kernel_size, dtype=torch.float64)
    ours = photometric(images, params, kernel_size=kernel_size)
    assert gray_levels(ours, expected) < 2e-3
    assert ours.is_contiguous(memory_format=torch.channels_last)


def test_a_threshold_of_zero_inverts_every_pixel():
    """Also those that saturation's rounding has left below zero."""
    images = photographs(24, 64, 64)
    params = torch.tensor([[0.1, 0.7, 1.4, 0.13, order, 0, 0, 0.0] for order in range(24)])
    assert gray_levels(photometric(images, params), reference.photometric(images, params, dtype=torch.float64)) < 1e-2


@given(seed=st.integers(0, 999))
@settings(max_examples=15, deadline=None)
def test_rows_do_not_touch_each_other(seed):
    images, params = photographs(4, 21, 18, seed), random_params(4, seed)
    together = photometric(images, params)
    apart = torch.cat([photometric(images[i : i + 1], params[i : i + 1]) for i in range(4)])
    assert torch.equal(together, apart)


def test_hue_of_a_third_of_a_turn_renames_the_channels():
    images = photographs(1, 9, 9)
    turned = augment(images, photometric, hue=1 / 3, order=0)
    torch.testing.assert_close(turned, (images[0].float() / 255).roll(1, dims=-1), rtol=0, atol=1e-5)


def test_half_as_exact_as_torch_in_float32_is_enough():
    images, params = photographs(24, 64, 48), random_params(24, seed=7)
    params[:, 4], params[:, 7] = torch.arange(24), 2.0
    exact = reference.photometric(images, params, dtype=torch.float64)
    error = (photometric(images, params).double() - exact).abs().max()
    assert error <= 2 * (reference.photometric(images, params).double() - exact).abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes_and_opcheck(dtype):
    images, params = photographs(3, 30, 20), random_params(3)
    ours = photometric(images, params, dtype=dtype)
    assert ours.dtype == dtype
    assert gray_levels(ours, reference.photometric(images, params, dtype=dtype)) <= 1.01
    torch.library.opcheck(module.photometric_op, (images, params, 1, [0.5] * 3, [0.2] * 3, dtype))


def test_compiles_whole():
    images, params = photographs(2, 30, 20), random_params(2)
    compiled = torch.compile(lambda i, p: photometric(i, p) * 2, fullgraph=True)
    torch.testing.assert_close(compiled(images, params), photometric(images, params) * 2)


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
def test_compiles_whole_where_the_normalization_varies(dynamic):
    images, params = photographs(2, 30, 20), random_params(2)
    compiled = torch.compile(
        lambda mean: photometric(images, params, mean=mean), fullgraph=True, backend="aot_eager", dynamic=dynamic
    )
    for mean in [(0.0, 0.1, 0.2), (0.1, 0.2, 0.3), (0.3, 0.3, 0.3)]:  # from the second on, symbols
        torch.testing.assert_close(compiled(mean), photometric(images, params, mean=mean))


def test_autocast_changes_nothing():
    images, params = photographs(2, 40, 40), random_params(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = photometric(images, params)
    assert torch.equal(cast, photometric(images, params))


def test_callers_modes_change_nothing():
    """The buffers ignore inference mode, default dtype and device."""
    images, params = photographs(4, 40, 40), random_params(4)
    expected = photometric(images, params)
    photometric(images[:, 1:], params)  # another size: the next call makes its buffers anew
    with torch.inference_mode():
        assert torch.equal(photometric(images, params), expected)
        assert torch.equal(photometric(images.clone(), params.clone()), expected)
    assert torch.equal(photometric(images, params), expected)
    photometric(images[:, 1:], params)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            assert torch.equal(photometric(images, params), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_strided_views_and_empty_batches():
    images, params = photographs(4, 20, 30), random_params(4)
    flipped = images.flip(2).transpose(1, 2)
    assert torch.equal(photometric(flipped, params), photometric(flipped.contiguous(), params))
    assert torch.equal(photometric(images[::2], params[::2]), photometric(images[::2].contiguous(), params[::2]))
    assert photometric(images[:0], params[:0]).shape == (0, 3, 20, 30)


def test_large_images_leave_no_buffers(monkeypatch):
    assert photometric_cpu._augment(224, 224, 11) is photometric_cpu._augment(224, 224, 11)
    made, make = [], photometric_cpu._Blur
    monkeypatch.setattr(photometric_cpu, "_Blur", lambda *size: made.append(weakref.ref(x := make(*size))) or x)
    gc.disable()
    try:
        photometric(photographs(1, 600, 500), row(sigma=2.0))
        left = [x() for x in made]
    finally:
        gc.enable()
    assert left == [None]


def test_callers_threads_may_call_at_once():
    sizes = [(31 + i % 2, 24) for i in range(6)]
    cases = [(photographs(5, *size, seed), random_params(5, seed)) for seed, size in enumerate(sizes)]
    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(lambda case: photometric(*case), cases))
    for case, together in zip(cases, results, strict=True):
        assert torch.equal(together, photometric(*case))


def test_callers_threads_are_left_as_they_were():
    code = (
        "import torch, threading; from vito_kernels import photometric; torch.set_num_threads(3)\n"
        "p = torch.tensor([[.1, 1.2, .9, .05, 3, 0, 1.1, .5]]).expand(6, 8)\n"
        "photometric(torch.zeros(6, 40, 40, 3, dtype=torch.uint8), p)\n"
        "seen = []; t = threading.Thread(target=lambda: seen.append(torch.get_num_threads())); t.start(); t.join()\n"
        "assert torch.get_num_threads() == 3 and seen == [3], (torch.get_num_threads(), seen)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_number_of_threads_changes_nothing():
    images, params = photographs(4, 224, 200), random_params(4)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(photometric(images, params))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"images": torch.zeros(2, 8, 8, 3)}, TypeError, "float32"),
        ({"images": torch.zeros(2, 3, 8, 8, dtype=torch.uint8)}, ValueError, r"\(2, 3, 8, 8\)"),
        ({"params": torch.zeros(2, 7)}, ValueError, r"\(2, 7\)"),
        ({"params": torch.zeros(3, 8)}, ValueError, r"\(3, 8\)"),
        ({"params": torch.zeros(2, 8, dtype=torch.float64)}, TypeError, "float64"),
        ({"params": torch.zeros(2, 8, device="meta")}, ValueError, "meta"),
        ({"kernel_size": 4}, ValueError, "4"),
        ({"kernel_size": -1}, ValueError, "-1"),
        ({"kernel_size": 10**9 + 1}, ValueError, "1000000001"),
        ({"kernel_size": 3.0}, TypeError, "3.0"),
        ({"dtype": torch.float64}, TypeError, "float64"),
        ({"std": (1, 0, 1)}, ValueError, r"\[1.0, 0.0, 1.0\]"),
        ({"std": (1, math.inf, 1)}, ValueError, r"finite.*inf"),
        ({"mean": (0, 0)}, ValueError, r"\[0.0, 0.0\]"),
        ({"mean": (0, 0, math.nan)}, ValueError, "nan"),
        ({"mean": 0.5}, TypeError, "0.5"),
        ({"std": "one"}, TypeError, "'one'"),
        ({"params": row(order=24).expand(2, -1)}, ValueError, "order.*24"),
        ({"params": row(order=1.5).expand(2, -1)}, ValueError, "1.5"),
        ({"params": row(gray=2).expand(2, -1)}, ValueError, "gray"),
        ({"params": row(sigma=-1).expand(2, -1)}, ValueError, "sigma"),
        ({"params": row(contrast=float("nan")).expand(2, -1)}, ValueError, "nan"),
    ],
)
def test_wrong_input_is_named(change, error, said):
    arguments = {"images": photographs(2, 8, 8), "params": IDENTITY.expand(2, -1), **change}
    images, params = arguments.pop("images"), arguments.pop("params")
    with pytest.raises(error, match=said):
        photometric(images, params, **arguments)


# ------------------------------------------------------------------------------------------------------------- speed


def eager_chain(images, params):
    """The same chain by torch's operators, each on the whole image, with a depthwise conv2d for the blur."""
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
    spec = reference.photometric.__globals__
    out = []
    for image, values in zip(images, params, strict=True):
        x = image.float() / 255
        brightness, contrast, saturation, hue, order, gray, sigma, threshold = values
        operations = (
            lambda x, d=brightness: x + d,
            lambda x, f=contrast: spec["adjust_contrast"](x, f),
            lambda x, f=saturation: spec["adjust_saturation"](x, f),
            lambda x, d=hue: spec["adjust_hue"](x, d),
        )
        for operation in spec["ORDERS"][int(order)] if order >= 0 else ():
            x = operations[operation](x).clamp(0, 1)
        if gray:
            x = (x @ torch.tensor(spec["GRAY_WEIGHTS"]))[..., None].expand(-1, -1, 3)
        x = x.permute(2, 0, 1)[None].contiguous(memory_format=torch.channels_last)
        offsets = torch.arange(-11.0, 12.0)
        taps = torch.exp(offsets.square() / (-2 * sigma * sigma))
        taps = (taps / taps.sum()).expand(3, 1, 1, -1)
        x = F.conv2d(F.conv2d(x, taps, padding=(0, 11), groups=3), taps.transpose(2, 3), padding=(11, 0), groups=3)[0]
        x = torch.where(x < threshold, x, 1 - x).clamp(0, 1)
        out.append((x - mean) / std)
    return torch.stack(out)


def test_faster_than_eager():
    """Processor time of one thread, interleaved, medians; conv2d is given its fastest format. Seen: 2.7 to 6."""
    images, params = photographs(4, 224, 224), random_params(4, hue=0.1)
    params[:, 6] = params[:, 6].clamp(0.5, 2)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        ratio = measured_ratio(images, params)
    finally:
        torch.set_num_threads(threads)
    assert ratio > 1.5, f"{ratio:.2f} times as fast as eager"


def measured_ratio(images, params):
    expected, ours = eager_chain(images, params), photometric(images, params)
    assert gray_levels(ours, expected) < 1
    times = {photometric: [], eager_chain: []}
    for _ in range(5):
        for function, taken in times.items():
            started = time.thread_time()
            function(images, params)
            taken.append(time.thread_time() - started)
    fast, slow = (sorted(taken)[2] for taken in times.values())
    return slow / fast
