"""Photometric augmentation of a batch: jitter in each image's own order, gray, blur, solarize, normalize.

Equivalent to ``vito_kernels.reference.photometric``, the color chain of BYOL and DetCon, on (B, H, W, 3) uint8 images
and a (B, 8) table of parameters. A GPU takes four launches for any parameters. The first sums the channels for
contrast, the second computes the color, and two blur the images that have a blur. An image without blur is read once or
twice as bytes and written once. Nothing depends on values on the host, so a CUDA graph can capture the op.
Deterministic: no atomics, sums in a fixed order. Not differentiable.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vito_kernels._core.autograd import register_flops
from vito_kernels._core.checks import without_autocast
from vito_kernels._core.lazy_triton import jit, on_device, use_triton
from vito_kernels.photometric import cpu as photometric_cpu
from vito_kernels.reference import IMAGENET_MEAN, IMAGENET_STD

if TYPE_CHECKING:
    import triton.language as tl

# The columns of ``params``; the identity is (0, 1, 1, 0, -1, 0, 0, 2).
PARAMS = (
    "brightness",  # delta added to intensities in [0, 1]
    "contrast",  # factor about each channel's mean
    "saturation",  # factor in HSV
    "hue",  # shift in turns
    "order",  # rank, 0 to 23, of the permutation of the four columns above in lexicographic order; -1 = no jitter
    "gray",  # 0 or 1
    "sigma",  # of the blur in pixels; 0 = none
    "solarize",  # threshold in [0, 1]; above 1 = none
)
SPLITS = 16  # programs that share the sums of an image
PIXELS, ELEMENTS, WARPS = 1024, 2048, 4  # per program of the color kernels and of the blur
MOST_TAPS = 4095
REACH = math.sqrt(48 * math.log(2))  # taps beyond REACH * sigma are below 2^-24 of the one in the middle

# ------------------------------------------------------------------------------------------------------------- kernels


@jit
def load_jitter(table, b):
    """One image's jitter; an invalid order counts as none. (Triton reserves the name ``params``.)"""
    row = table + b * 8
    order = tl.load(row + 4)
    order = tl.where((order >= 0) & (order <= 23), order, -1.0).to(tl.int32)
    return tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3), order


@jit
def load_rest(table, b):
    """One image's other parameters, and whether all are valid; without blur (sigma 0) if not."""
    row = table + b * 8
    order, gray, sigma, threshold = tl.load(row + 4), tl.load(row + 5), tl.load(row + 6), tl.load(row + 7)
    valid = tl.sum(tl.abs(tl.load(row + tl.arange(0, 8))), 0) < float("inf")
    valid &= (order >= -1) & (order <= 23) & (tl.floor(order) == order)
    valid &= ((gray == 0) | (gray == 1)) & (sigma >= 0)
    return gray, tl.where(valid, sigma, 0.0), threshold, valid


@jit
def unrank(order):
    """The permutation of 0..3 of this lexicographic rank, two bits an entry, the first lowest."""
    first = order // 6
    second = order % 6 // 2
    second += (second >= first).to(tl.int32)
    third = order % 2
    third += (third >= tl.minimum(first, second)).to(tl.int32)
    third += (third >= tl.maximum(first, second)).to(tl.int32)
    return first + 4 * second + 16 * third + 64 * (6 - first - second - third)


@jit
def load_pixels(image, pixel, pixels):
    inside = pixel < pixels
    r = tl.load(image + 3 * pixel, mask=inside, other=0).to(tl.float32)
    g = tl.load(image + 3 * pixel + 1, mask=inside, other=0).to(tl.float32)
    b = tl.load(image + 3 * pixel + 2, mask=inside, other=0).to(tl.float32)
    return tl.div_rn(r, 255.0), tl.div_rn(g, 255.0), tl.div_rn(b, 255.0)  # exact, as thresholds may fall on k / 255


@jit
def clip(x, low, high):
    return tl.minimum(tl.maximum(x, low), high)


@jit
def shift_hue(r, g, b, turns):
    """See ``photometric_cpu._Color._hue``, step by step the same."""
    thirds = tl.floor(3 * turns + 0.5)
    rest = 6 * turns - 2 * thirds
    bottom = tl.minimum(tl.minimum(r, g), b)
    chroma = tl.maximum(tl.maximum(r, g), b) - bottom
    u = (g + b - r - bottom + chroma) / tl.maximum(chroma, 1e-30)
    u = tl.where(g >= b, u, -u) + rest
    r = bottom + chroma * hue_profile(u, -2 * thirds)
    g = bottom + chroma * hue_profile(u, 2 - 2 * thirds)
    b = bottom + chroma * hue_profile(u, 4 - 2 * thirds)
    return r, g, b


@jit
def hue_profile(u, own):
    """Share of the chroma in the channel whose own hue is ``own``, at hue u, both in sixths of a turn."""
    own = own + 3 - 6 * tl.floor((own + 3) / 6) - 3
    return clip(tl.abs(tl.abs(u - own) - 3) - 1, 0.0, 1.0)


@jit
def jitter(r, g, b, operations, count, brightness, contrast, saturation, hue, mean_r, mean_g, mean_b):
    """The first ``count`` operations, each clipped to [0, 1]."""
    for i in range(count):
        operation = (operations >> (2 * i)) & 3
        if operation == 0:
            r, g, b = r + brightness, g + brightness, b + brightness
        elif operation == 1:
            r = contrast * (r - mean_r) + mean_r
            g = contrast * (g - mean_g) + mean_g
            b = contrast * (b - mean_b) + mean_b
        elif operation == 2:
            top = tl.maximum(tl.maximum(r, g), b)
            chroma = top - tl.minimum(tl.minimum(r, g), b)
            factor = tl.minimum(tl.maximum(saturation, 0.0), top / tl.maximum(chroma, 1e-30))
            r, g, b = top - (top - r) * factor, top - (top - g) * factor, top - (top - b) * factor
        else:
            r, g, b = shift_hue(r, g, b, hue)
        r, g, b = clip(r, 0.0, 1.0), clip(g, 0.0, 1.0), clip(b, 0.0, 1.0)
    return r, g, b


@jit
def finish(x, threshold, valid, mean, std):
    """Solarize and normalize; NaN if the parameters are not valid."""
    x = clip(tl.where(x < threshold, x, 1 - x), 0.0, 1.0)
    return tl.where(valid, (x - mean) / std, float("nan"))


@jit
def photometric_sums_kernel(images, table, sums, pixels, SPLITS: tl.constexpr, PIXELS: tl.constexpr):
    """A program sums one split of one image, after the operations that precede contrast."""
    b_id = (tl.program_id(0) // SPLITS).to(tl.int64)
    split = tl.program_id(0) % SPLITS
    brightness, contrast, saturation, hue, order = load_jitter(table, b_id)
    if order < 0:
        return
    operations = unrank(order)
    before = 0
    for i in range(3):
        before += (before == i) & (((operations >> (2 * i)) & 3) != 1)
    image = images + b_id * pixels * 3
    share = tl.cdiv(tl.cdiv(pixels, SPLITS), PIXELS) * PIXELS
    sum_r = tl.zeros((PIXELS,), tl.float32)
    sum_g = tl.zeros((PIXELS,), tl.float32)
    sum_b = tl.zeros((PIXELS,), tl.float32)
    last = tl.minimum((split + 1) * share, pixels)
    for start in range(split * share, last, PIXELS):
        pixel = start + tl.arange(0, PIXELS)
        r, g, b = load_pixels(image, pixel, last)
        r, g, b = jitter(r, g, b, operations, before, brightness, contrast, saturation, hue, 0.0, 0.0, 0.0)
        inside = pixel < last
        sum_r += tl.where(inside, r, 0.0)
        sum_g += tl.where(inside, g, 0.0)
        sum_b += tl.where(inside, b, 0.0)
    target = sums + (b_id * 3) * SPLITS + split
    tl.store(target, tl.sum(sum_r, 0))
    tl.store(target + SPLITS, tl.sum(sum_g, 0))
    tl.store(target + 2 * SPLITS, tl.sum(sum_b, 0))


@jit
def photometric_color_kernel(
    images, table, sums, blurred, out, pixels, radius, reach_per_sigma,
    mean_r, mean_g, mean_b, std_r, std_g, std_b,
    SPLITS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """A program takes PIXELS pixels of one image through jitter and gray: to ``blurred``, or finished to ``out``."""
    blocks = tl.cdiv(pixels, PIXELS)
    b_id = (tl.program_id(0) // blocks).to(tl.int64)
    pixel = (tl.program_id(0) % blocks) * PIXELS + tl.arange(0, PIXELS)
    brightness, contrast, saturation, hue, order = load_jitter(table, b_id)
    gray, sigma, threshold, valid = load_rest(table, b_id)
    r, g, b = load_pixels(images + b_id * pixels * 3, pixel, pixels)
    if order >= 0:
        part = sums + b_id * 3 * SPLITS + tl.arange(0, SPLITS)
        center_r = tl.sum(tl.load(part), 0) / pixels
        center_g = tl.sum(tl.load(part + SPLITS), 0) / pixels
        center_b = tl.sum(tl.load(part + 2 * SPLITS), 0) / pixels
        operations = unrank(order)
        r, g, b = jitter(
            r, g, b, operations, 4, brightness, contrast, saturation, hue, center_r, center_g, center_b
        )  # fmt: skip
    if gray > 0:
        luma = 0.2989 * r + 0.5870 * g + 0.1140 * b
        r, g, b = luma, luma, luma
    inside = pixel < pixels
    target = b_id * pixels * 3 + 3 * pixel
    if (sigma * reach_per_sigma >= 1) & (radius > 0):
        tl.store(blurred + target, r.to(blurred.dtype.element_ty), mask=inside)
        tl.store(blurred + target + 1, g.to(blurred.dtype.element_ty), mask=inside)
        tl.store(blurred + target + 2, b.to(blurred.dtype.element_ty), mask=inside)
    else:
        r = finish(r, threshold, valid, mean_r, std_r)
        g = finish(g, threshold, valid, mean_g, std_g)
        b = finish(b, threshold, valid, mean_b, std_b)
        tl.store(out + target, r.to(out.dtype.element_ty), mask=inside)
        tl.store(out + target + 1, g.to(out.dtype.element_ty), mask=inside)
        tl.store(out + target + 2, b.to(out.dtype.element_ty), mask=inside)


@jit
def photometric_blur_kernel(
    x, table, out, elements, period, step, radius, reach_per_sigma,
    mean_r, mean_g, mean_b, std_r, std_g, std_b,
    TAPS: tl.constexpr, FINISH: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    """Gaussian along one axis of the flattened image: neighbors are ``step`` elements apart within each ``period``.

    Along rows the period is a row of 3 W elements and the step 3; along columns the period is the image and the step 3
    W.
    """
    blocks = tl.cdiv(elements, ELEMENTS)
    b_id = (tl.program_id(0) // blocks).to(tl.int64)
    _, sigma, threshold, valid = load_rest(table, b_id)
    reach = tl.minimum((sigma * reach_per_sigma).to(tl.int32), radius)
    if reach == 0:
        return
    element = (tl.program_id(0) % blocks) * ELEMENTS + tl.arange(0, ELEMENTS)
    inside = element < elements
    position = element % period
    x += b_id * elements
    power = -0.7213475204444817 / (sigma * sigma)  # log2(e) / 2
    tap = tl.arange(0, TAPS)
    taps = tl.exp2(power * (tap * tap).to(tl.float32))
    total = 2 * tl.sum(tl.where(tap <= radius, taps, 0.0), 0) - 1
    acc = tl.load(x + element, mask=inside, other=0.0).to(tl.float32)
    for i in range(1, reach + 1):
        offset = i * step
        low = tl.load(x + element - offset, mask=inside & (position >= offset), other=0.0).to(tl.float32)
        high = tl.load(x + element + offset, mask=inside & (position < period - offset), other=0.0).to(tl.float32)
        acc += tl.exp2(power * (i * i)) * (low + high)
    acc = acc / total
    if FINISH:
        channel = element % 3
        mean = tl.where(channel == 0, mean_r, tl.where(channel == 1, mean_g, mean_b))
        std = tl.where(channel == 0, std_r, tl.where(channel == 1, std_g, std_b))
        acc = finish(acc, threshold, valid, mean, std)
    tl.store(out + b_id * elements + element, acc.to(out.dtype.element_ty), mask=inside)


# ------------------------------------------------------------------------------------------------------------ launcher


def launch(
    images: Tensor, params: Tensor, radius: int, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype
) -> Tensor:
    """(B, H, W, 3) uint8 to (B, H, W, 3) ``dtype``. Between passes: float32, or float16 for 16-bit results."""
    out = images.new_empty(images.shape, dtype=dtype)
    sums = launch_sums(images, params)
    between = torch.float32 if dtype == torch.float32 else torch.float16
    colored = launch_color(images, params, sums, out, between, radius, mean, std)
    if radius > 0:
        halfway = launch_blur(colored, params, torch.empty_like(colored), radius, None)
        launch_blur(halfway, params, out, radius, (*mean, *std))
    return out


def launch_sums(images: Tensor, params: Tensor) -> Tensor:
    batch, height, width, _ = images.shape
    sums = images.new_empty((batch, 3, SPLITS), dtype=torch.float32)
    photometric_sums_kernel[(batch * SPLITS,)](
        images, params, sums, height * width, SPLITS=SPLITS, PIXELS=PIXELS, num_warps=WARPS, num_stages=1
    )  # fmt: skip
    return sums


def launch_color(
    images: Tensor, params: Tensor, sums: Tensor, out: Tensor, between: torch.dtype,
    radius: int, mean: Sequence[float], std: Sequence[float],
) -> Tensor:  # fmt: skip
    """Finishes images without blur into ``out``, and returns the others' colors."""
    batch, height, width, _ = images.shape
    colored = images.new_empty(images.shape if radius > 0 else (1,), dtype=between)
    photometric_color_kernel[(batch * -(-height * width // PIXELS),)](
        images, params, sums, colored, out, height * width, radius, REACH, *mean, *std,
        SPLITS=SPLITS, PIXELS=PIXELS, num_warps=WARPS, num_stages=1,
    )  # fmt: skip
    return colored


def launch_blur(x: Tensor, params: Tensor, out: Tensor, radius: int, normalize: Sequence[float] | None) -> Tensor:
    """Blurs rows or, with ``normalize`` (three means, three deviations), columns; the latter finishes into ``out``."""
    batch, height, width, _ = x.shape
    elements = height * width * 3
    last = normalize is not None
    period, step = (elements, width * 3) if last else (width * 3, 3)
    photometric_blur_kernel[(batch * -(-elements // ELEMENTS),)](
        x, params, out, elements, period, step, radius, REACH, *(normalize or (0.0,) * 6),
        TAPS=1 << radius.bit_length(), FINISH=last, ELEMENTS=ELEMENTS, num_warps=WARPS, num_stages=1,
    )  # fmt: skip
    return out


# ----------------------------------------------------------------------------------------------------------- custom op


@torch.library.custom_op("vito_kernels::photometric", mutates_args=())
def photometric_op(
    images: Tensor, params: Tensor, radius: int, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype
) -> Tensor:
    """The chain on checked arguments, (B, H, W, 3) throughout."""
    images, params = images.contiguous(), params.contiguous()
    if not images.is_cuda:
        _check_values(params)
    if images.shape[0] and use_triton(images):
        with on_device(images):
            return launch(images, params, radius, mean, std, dtype)
    with without_autocast(images):
        done = photometric_cpu.photometric(images.cpu(), params.cpu(), radius, mean, std, dtype)
    return done.to(images.device)  # of a GPU that Triton's kernels do not serve


@photometric_op.register_fake
def _(
    images: Tensor, params: Tensor, radius: int, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype
) -> Tensor:
    return images.new_empty(images.shape, dtype=dtype)


register_flops(photometric_op)

# ------------------------------------------------------------------------------------------------------ public function


def photometric(
    images: Tensor,
    params: Tensor,
    *,
    kernel_size: int | None = None,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Jitter, gray, blur, solarize and normalize each image by its own row of parameters.

    Computes ``vito_kernels.reference.photometric``, which has the formulas and their source.

    Args:
        images: (B, H, W, 3) uint8, on a GPU or CPU.
        params: (B, 8) float32 on the same device; columns as in ``from vito_kernels.photometric import PARAMS``.
        kernel_size: odd number of taps of the blur, at most 4095; by default ``2 * int(H / 10 / 2) + 1``, 23 for
            224 rows.
        mean, std: per-channel normalization, in units of [0, 1] intensities.
        dtype: of the result: float32, bfloat16 or float16. Arithmetic is in float32.

    Returns:
        (B, 3, H, W), channels_last; no gradient.

    Raises:
        TypeError: images are not uint8, params not float32, dtype is another, or kernel_size is no int.
        ValueError: a shape, device, kernel size, mean or deviation is wrong. On a CPU also a parameter out of range:
            not finite, an order other than -1 to 23, gray other than 0 and 1, or a negative sigma. Reading values
            would stall a GPU, so an image with such parameters is NaN there.

    Deterministic.
    """
    _check(images, params, mean, std, dtype)
    if kernel_size is not None:
        if isinstance(kernel_size, bool) or not isinstance(kernel_size, int):
            raise TypeError(f"kernel_size must be an int, got {kernel_size!r}")
        if kernel_size % 2 == 0 or not 1 <= kernel_size <= MOST_TAPS:
            raise ValueError(f"kernel_size must be odd and from 1 to {MOST_TAPS}, got {kernel_size}")
    radius = kernel_size // 2 if kernel_size is not None else int(images.shape[1] / 10 / 2)
    mean, std = [float(m) for m in mean], [float(s) for s in std]
    return photometric_op(images, params.detach(), radius, mean, std, dtype).permute(0, 3, 1, 2)


def _check(images: Tensor, params: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype) -> None:
    for name, x, wanted in (("images", images, torch.uint8), ("params", params, torch.float32)):
        if not isinstance(x, Tensor) or x.dtype != wanted:
            raise TypeError(f"{name} must be a {wanted} tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    if images.ndim != 4 or images.shape[3] != 3 or 0 in images.shape[1:]:
        raise ValueError(f"images must be (B, H, W, 3) with H and W at least 1, got shape {tuple(images.shape)}")
    if params.ndim != 2 or params.shape[0] != images.shape[0] or params.shape[1] != len(PARAMS):
        raise ValueError(
            f"params must be (B, {len(PARAMS)}) with B = {images.shape[0]} in images, got shape {tuple(params.shape)}"
        )
    if params.device != images.device:
        raise ValueError(f"images are on {images.device} but params on {params.device}")
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"dtype must be torch.float32, torch.bfloat16 or torch.float16, got {dtype}")
    try:
        mean, std = [float(m) for m in mean], [float(s) for s in std]
    except (TypeError, ValueError):
        raise TypeError(f"mean and std must be three numbers each, got {mean!r} and {std!r}") from None
    if len(mean) != 3 or len(std) != 3 or not all(-math.inf < m < math.inf for m in mean):
        raise ValueError(f"mean and std must be three finite numbers each, got {mean} and {std}")
    if not all(0 < s < math.inf for s in std):
        raise ValueError(f"std must be positive and finite, got {std}")


def _check_values(params: Tensor) -> None:
    """Raises for the first row that has a value out of its range."""
    order, gray, sigma = params[:, 4], params[:, 5], params[:, 6]
    faults = {
        "finite numbers": ~params.isfinite().all(1),
        "an integer order from -1 to 23": (order < -1) | (order > 23) | (order != order.floor()),
        "gray 0 or 1": (gray != 0) & (gray != 1),
        "sigma >= 0": sigma < 0,
    }
    for rule, broken in faults.items():
        if bool(broken.any()):
            row = int(broken.nonzero()[0])
            values = dict(zip(PARAMS, params[row].tolist(), strict=True))
            raise ValueError(f"params must have {rule}, got row {row}: {values}")
