"""Shipped launches, each at the nominal size of a large batch: compiled by ``python -m vito_kernels.inspect``.

A spec calls the launcher of the op itself, on tensors that need no memory. The matrix specs take a ``device``, on which
they also run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from vito_kernels import lars
from vito_kernels.attention_pool import launch_attention_pool, launch_attention_pool_backward
from vito_kernels.batch_norm import triton_kernels as batch_norm
from vito_kernels.contrastive import epilogue, forward, large_dim, normalize, softplus_loss, two_sided_forward
from vito_kernels.contrastive.backward import launch_lse_backward
from vito_kernels.contrastive.other_sums import launch_label_lse, launch_sums
from vito_kernels.contrastive.terms import Mask, PositiveTerm, SoftmaxGrad
from vito_kernels.contrastive.tile_configs import choose_tile, matrices, on_tensor_cores, output_chunks, products
from vito_kernels.photometric import op as photometric
from vito_kernels.photometric.op import IMAGENET_MEAN, IMAGENET_STD

ROWS = 32768
WIDTHS = (64, 128, 192, 256, 512, 1024)
COMMON_WIDTHS = (128, 256, 512)
LISTED = {"positive": 1, "many positives": 32}  # positives a query, of the layouts that list them


@dataclass(frozen=True)
class Spec:
    """One launch.

    Args:
        name: unique.
        launch: calls the launcher.
        flops: or a function that asks Triton's driver: the GPU's tile decides how many launches a wide output takes.
        min_bytes: inputs read once, outputs written once.
        tensor_cores: whether its matrix kernels must use them, or a function that asks Triton's driver.
        rare: inspected only with ``--all``.
    """

    name: str
    launch: Callable[[], object]
    flops: float | Callable[[], float]
    min_bytes: float
    tensor_cores: bool | Callable[[], bool] = True
    rare: bool = False


@cache
def all_specs() -> tuple[Spec, ...]:
    products = (lse, multi_view, other_sums, two_sided, gradient)
    rows = (epilogues, softplus_losses, normalization, pooling, batch_norms, photometrics, optimizers)
    return tuple(spec for group in products + rows for spec in group())


def _rows(width: int, dtype: torch.dtype, device: str, rows: int) -> Tensor:
    return torch.randn(rows, width, dtype=dtype, device=device) / width**0.5


def _scale(device: str) -> Tensor:
    return torch.full((), 10.0, device=device)


def _mask(layout: str, rows: int, device: str) -> Mask:
    ids = torch.arange(rows, device=device)
    group = ids if layout == "groups" else None
    positive = ids[:, None].repeat(1, LISTED[layout]) if layout in LISTED else None
    return Mask(group, group, positive, 0 if layout in ("diagonal", "supcon", "both") else None)


# ---- contrastive


def lse(device: str = "meta") -> Iterator[Spec]:
    """The forward pass under every layout."""
    for width in WIDTHS:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for with_mean in (True, False):
                for layout in ("none", "diagonal", "groups", "positive"):
                    yield lse_spec(width, dtype, with_mean, layout, device)
    for width in (128, 256):
        yield lse_spec(width, torch.bfloat16, True, "many positives", device)


def lse_spec(
    width: int, dtype: torch.dtype, with_mean: bool, layout: str, device: str = "meta", rows: int = ROWS
) -> Spec:
    mask = _mask(layout, rows, device)

    def launch() -> None:
        x = _rows(width, dtype, device, rows)
        forward.launch_lse(x, x, _scale(device), mask, with_mean)

    def flops() -> float:
        """Of the variant that does the work. A launch for other columns of the mean computes the logits again."""
        if large_dim.supports("mean" if with_mean else "lse", width, dtype):
            return (2.0 + 2.0 * with_mean) * rows * rows * width
        variant = forward.VARIANTS[forward.online_only_dtype(dtype, with_mean)]
        launches = len(output_chunks(width, forward.lse_tile(variant, width, dtype, mask, True))) if with_mean else 1
        return (2.0 * launches + 2.0 * with_mean) * products(dtype, width) * rows * rows * width

    return Spec(
        f"similarity_lse {'with mean' if with_mean else 'alone'} D={width} {str(dtype)[6:]} {layout}",
        launch,
        flops,
        min_bytes=2.0 * rows * width * dtype.itemsize + rows * 4 + (rows * width * 4 if with_mean else 0),
        tensor_cores=partial(on_tensor_cores, dtype, width),
        rare=dtype != torch.bfloat16
        or width not in COMMON_WIDTHS
        or layout not in (("none", "diagonal", "groups") if with_mean else ("none",)),
    )


def other_sums(device: str = "meta") -> Iterator[Spec]:
    """The forward pass of SupCon, of SigLIP with and without the gradient of x, and of retrieval."""
    for width in WIDTHS:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for kind in ("labels", "sigmoid with mean", "sigmoid", "rank"):
                yield other_sums_spec(kind, width, dtype, device)


def other_sums_spec(kind: str, width: int, dtype: torch.dtype, device: str = "meta", rows: int = ROWS) -> Spec:
    with_mean, mask = "mean" in kind, Mask(diagonal=0)

    def launch() -> None:
        x, ids = _rows(width, dtype, device, rows), torch.arange(rows, device=device)
        if kind == "labels":
            launch_label_lse(x, x, _scale(device), mask, ids, ids)
        else:
            offset = torch.zeros(rows if kind == "rank" else (), device=device)
            launch_sums(kind.split()[0], x, x, _scale(device), offset, mask, with_mean)

    def flops() -> float:
        if kind.startswith("sigmoid") and large_dim.supports("mean" if with_mean else "lse", width, dtype):
            return (2.0 + 2.0 * with_mean) * rows * rows * width
        tile = forward.lse_tile("fixed", width, dtype, mask, with_mean, kind.split()[0])
        launches = len(output_chunks(width, tile)) if with_mean else 1
        return (2.0 * launches + 2.0 * with_mean) * products(dtype, width) * rows * rows * width

    return Spec(
        f"similarity {kind} D={width} {str(dtype)[6:]}",
        launch,
        flops,
        min_bytes=2.0 * rows * width * dtype.itemsize + rows * 16 + (rows * width * 4 if with_mean else 0),
        tensor_cores=partial(on_tensor_cores, dtype, width),
        rare=dtype != torch.bfloat16 or width not in COMMON_WIDTHS or kind in ("sigmoid", "rank"),
    )


def multi_view(device: str = "meta") -> Iterator[Spec]:
    """All ordered pairs of three views, and their epilogues."""
    for width in COMMON_WIDTHS:
        for layout in ("diagonal", "groups"):
            yield multi_view_spec(width, layout, device)
    for width in (256, 1024):
        yield multi_view_epilogue_spec(width)


def multi_view_spec(width: int, layout: str, device: str = "meta", rows: int = ROWS // 4, views: int = 3) -> Spec:
    mask = replace(_mask(layout, rows, device), diagonal=0)

    def launch() -> None:
        x = _rows(width, torch.bfloat16, device, views * rows)
        forward.launch_lse(x, x, _scale(device), mask, True, views)

    pairs = views * (views - 1)
    return Spec(
        f"multi-view lse V={views} D={width} bfloat16 {layout}",
        launch,
        flops=4.0 * pairs * rows * rows * width,
        min_bytes=2.0 * views * rows * width * 2 + pairs * rows * (4 + width * 4),
        rare=width != 256,
    )


def multi_view_epilogue_spec(width: int, rows: int = ROWS // 4, views: int = 3) -> Spec:
    pairs = views * (views - 1)
    q, mean, scale = _meta(views, rows, width, dtype=torch.bfloat16), _meta(pairs * rows, width), _meta()
    row, views_of = _meta(pairs * rows), q.flatten(0, 1)
    positives, done = softplus_loss.Positives(views_of, views_of, scale, views=views), softplus_loss.new_counter(q)

    def launch() -> None:
        softplus_loss.launch_softplus_loss([(row, row)], positives, 1.0, False, None, done)
        epilogue.multi_view_grad_q(q, q, scale, mean, row, scale, 0, True, True)

    return _memory_bound(f"multi-view epilogue V={views} D={width}", launch, 0, pairs * rows * width * 8, width != 256)


def two_sided(device: str = "meta") -> Iterator[Spec]:
    """The two-sided forward pass; its gradients are in ``gradient``."""
    for width in WIDTHS:
        for dtype in (torch.bfloat16, torch.float32):
            for diagonal in (0, None):
                yield two_sided_spec(width, dtype, diagonal, device)


def two_sided_spec(
    width: int, dtype: torch.dtype, diagonal: int | None, device: str = "meta", rows: int = ROWS
) -> Spec:
    """``diagonal`` is None where a block of another rank visits: no row has its pair there."""

    def launch() -> None:
        x = _rows(width, dtype, device, rows)
        two_sided_forward.launch_two_sided(x, x, _scale(device), Mask(diagonal=diagonal))

    return Spec(
        f"two-sided lse D={width} {str(dtype)[6:]}" + (" visiting" if diagonal is None else ""),
        launch,
        flops=lambda: 2.0 * products(dtype, width) * rows * rows * width,
        min_bytes=2.0 * rows * width * dtype.itemsize + rows * 8,
        tensor_cores=partial(on_tensor_cores, dtype, width),
        rare=dtype != torch.bfloat16 or width not in COMMON_WIDTHS,
    )


def gradient(device: str = "meta") -> Iterator[Spec]:
    """The key gradient under every layout, those of both sides of CLIP, and those of NT-Xent and SupCon."""
    cases = [("key gradient", layout) for layout in ("none", "diagonal", "groups", "positive")]
    cases += [("two-sided gradient", layout) for layout in ("none", "diagonal", "supcon", "both")]
    cases += [("sigmoid gradient", "diagonal")]
    for width in WIDTHS:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for name, layout in cases:
                yield gradient_spec(name, layout, width, dtype, device)
    for width in (128, 256):
        yield gradient_spec("key gradient", "many positives", width, torch.bfloat16, device)


def gradient_spec(
    name: str, layout: str, width: int, dtype: torch.dtype, device: str = "meta", rows: int = ROWS
) -> Spec:
    two_sided, sides = name == "two-sided gradient", 1 + (layout == "both")

    def launch() -> None:
        x = _rows(width, dtype, device, rows)
        y_softmax = SoftmaxGrad(torch.full((rows,), 10.0, device=device), torch.full((rows,), 1 / rows, device=device))
        x_softmax = y_softmax if two_sided else None
        ids = torch.arange(rows, device=device)
        term = PositiveTerm(ids, ids, y_softmax.weight) if layout == "supcon" else None
        mask = _mask(layout, rows, device)
        sigmoid = name == "sigmoid gradient"
        softmaxes, both = (x_softmax, y_softmax), layout == "both"
        launch_lse_backward(*matrices(x, x), _scale(device), *softmaxes, mask, term, sigmoid, both)

    def flops() -> float:
        """A launch for other columns of the output computes the logits again."""
        if layout != "supcon" and large_dim.supports("gradient", width, dtype):
            return sides * 4.0 * rows * rows * width
        tile = choose_tile("gradient both" if two_sided else "gradient one", width, dtype)
        return sides * (2.0 * len(output_chunks(width, tile)) + 2.0) * products(dtype, width) * rows * rows * width

    return Spec(
        f"{name} D={width} {str(dtype)[6:]} {layout}",
        launch,
        flops,
        min_bytes=2.0 * rows * width * dtype.itemsize + sides * rows * width * 4 + rows * 16,
        tensor_cores=partial(on_tensor_cores, dtype, width),
        rare=dtype != torch.bfloat16
        or width not in COMMON_WIDTHS
        or layout not in (("diagonal", "supcon", "both") if two_sided else ("none", "diagonal")),
    )


def _meta(*shape: int, dtype: torch.dtype = torch.float32, **options: Any) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", **options)


def _memory_bound(name: str, launch: Callable[[], object], flops: float, min_bytes: float, rare: bool = False) -> Spec:
    return Spec(name, launch, flops=float(flops), min_bytes=float(min_bytes), tensor_cores=False, rare=rare)


def epilogues(D: int = 256) -> Iterator[Spec]:
    q, grad, row, scale = _meta(ROWS, D, dtype=torch.bfloat16), _meta(ROWS, D), _meta(ROWS), _meta()

    def merge() -> None:
        epilogue.merge_splits(_meta(4, ROWS), _meta(4, ROWS), _meta(4, ROWS, D))

    def with_pairs() -> None:
        epilogue.grad_epilogue(grad, scale, q.dtype, weight=row, pair_weight=row, k=q, other=q)

    def both_sides() -> None:
        epilogue.grad_epilogues(grad, grad, scale, q, q, row[:, None], 0, row, True, True, scale)

    def views() -> None:
        epilogue.views_epilogue(grad[None], row[:, None], q, q[::2], q[::2], scale, scale, True, True)

    def without_pairs() -> None:
        epilogue.grad_epilogue(grad, scale, q.dtype, weight=row)
        epilogue.grad_epilogue(grad, scale, q.dtype)

    def sums() -> None:
        epilogue.finalize_lse(_meta(8, ROWS), scale, 100.0)
        epilogue.softmax_grad(row, row, row)

    yield _memory_bound(f"epilogue merge D={D}", merge, 0, 20 * ROWS * D)
    yield _memory_bound(f"epilogue gradient D={D}", with_pairs, 0, 10 * ROWS * D)
    yield _memory_bound(f"epilogue gradient of both sides D={D}", both_sides, 0, 16 * ROWS * D)
    yield _memory_bound(f"epilogue gradient of two views D={D}", views, 0, 12 * ROWS * D)
    yield _memory_bound(f"epilogue gradient without pairs D={D}", without_pairs, 0, 12 * ROWS * D)
    logits = partial(epilogue.positive_logits, q, q, scale, None, 0)
    yield _memory_bound(f"epilogue logits D={D}", logits, 0, 4 * ROWS * D)
    yield _memory_bound(f"epilogue sums D={D}", sums, 0, 64 * ROWS)


def softplus_losses(D: int = 256) -> Iterator[Spec]:
    """The end of a forward pass: of four key splits with their mean, of two sides, and of logits."""
    row, parts, scale, q = _meta(ROWS), _meta(4, ROWS), _meta(), _meta(ROWS, D, dtype=torch.bfloat16)
    positives, done = softplus_loss.Positives(q, q, scale), softplus_loss.new_counter(q)
    launch = softplus_loss.launch_softplus_loss
    splits = partial(launch, [(parts, parts)], positives, 1.0, False, _meta(4, ROWS, D), done)
    yield _memory_bound(f"softplus_loss of splits D={D}", splits, 0, 24 * ROWS * D)
    two = partial(launch, [(row, row), (row, row)], positives, 1.0, False, None, done)
    yield _memory_bound(f"softplus_loss of two sides D={D}", two, 0, 4 * ROWS * D)
    yield _memory_bound("softplus_loss", partial(launch, [(row, row)], row[:, None], None, True), 0, 24 * ROWS)


def normalization(D: int = 256) -> Iterator[Spec]:
    x = _meta(ROWS, D, dtype=torch.bfloat16)

    def launch() -> None:
        normalize.launch_normalize(x)
        normalize.launch_normalize_backward(x, x)

    def launch_pair() -> None:
        normalize.launch_normalize(x, x)
        normalize.launch_normalize_backward(x, x[::2], x[::2])

    yield _memory_bound(f"normalize D={D}", launch, 0, 10 * ROWS * D)
    yield _memory_bound(f"normalize of two views D={D}", launch_pair, 0, 14 * ROWS * D)


# ---- other ops


def pooling() -> Iterator[Spec]:
    """The two feature maps of a ResNet-50 at 224 pixels, channels_last bfloat16; and a row long enough to be split."""
    for batch, locations, channels in ((256, 196, 1024), (256, 49, 2048), (1, 65536, 512)):
        features = _meta(batch, locations, channels, dtype=torch.bfloat16)
        rows, mean = _meta(batch, locations), _meta(batch, channels)
        size, small = features.numel(), 8 * rows.numel() + 6 * mean.numel()
        shape = f"B={batch} L={locations} C={channels} bf16"
        forward = partial(launch_attention_pool, features, rows)
        yield _memory_bound(f"attention_pool {shape}", forward, 2 * size, 2 * size + small)
        given = features, rows, mean, mean.bfloat16(), rows, torch.bfloat16
        backward = partial(launch_attention_pool_backward, *given)
        yield _memory_bound(f"attention_pool_backward {shape}", backward, 3 * size, 4 * size + small)


def batch_norms() -> Iterator[Spec]:
    """The first, a middle and the last map of a ResNet-50 at 224 pixels, 512 images, channels_last bfloat16."""
    for channels, size in ((64, 112), (256, 14), (2048, 7)):
        x = _meta(512, channels, size, size, dtype=torch.bfloat16, memory_format=torch.channels_last)
        c, sums, count = _meta(channels), _meta(2, channels), _meta(1)
        parts = _meta(batch_norm.PROGRAMS, 2 * channels + 1)
        launches: dict[str, tuple[Any, int, int]] = {
            "statistics": (partial(batch_norm.launch_stats, x), 6, 2),
            "merge": (partial(batch_norm.launch_merge_stats, parts, None, (c, c, count), (c, c), 0.1, 1e-5), 0, 0),
            "apply, residual, relu": (partial(batch_norm.launch_forward, x, c, c, x, c, c, True), 4, 6),
            "apply, relu": (partial(batch_norm.launch_forward, x, c, c, None, c, c, True), 3, 4),
            "sums, residual, relu": (partial(batch_norm.launch_sums, x, x, x, c, c, c, c, True), 5, 8),
            "sums, relu": (partial(batch_norm.launch_sums, x, x, None, c, c, c, c, True), 6, 4),
            "gradient, relu": (partial(batch_norm.launch_backward, x, x, c, c, c, c, count, sums, True), 7, 6),
            "gradient": (partial(batch_norm.launch_backward, x, x, c, c, c, c, count, sums, False), 4, 6),
        }
        for name, (launch, flops, moved) in launches.items():
            yield _memory_bound(
                f"batch norm {name} C={channels} {size}x{size} bf16",
                launch,
                flops * x.numel(),
                moved * x.numel() or 4 * parts.numel(),
                rare=channels == 256 and "relu" in name,
            )


def photometrics() -> Iterator[Spec]:
    """Both views of a batch of 256 at 224 pixels in bfloat16, every image jittered and blurred."""
    batch, size, radius = 512, 224, 11
    images = _meta(batch, size, size, 3, dtype=torch.uint8)
    params, sums = _meta(batch, len(photometric.PARAMS)), _meta(batch, 3, photometric.SPLITS)
    half, out = _meta(*images.shape, dtype=torch.float16), _meta(*images.shape, dtype=torch.bfloat16)
    count, norm = images.numel(), (IMAGENET_MEAN, IMAGENET_STD)
    color = partial(photometric.launch_color, images, params, sums, out, torch.float16, radius, *norm)
    blur = partial(photometric.launch_blur, half, params)
    launches: dict[str, tuple[Any, int, int]] = {
        "sums": (partial(photometric.launch_sums, images, params), 20 * count, count),
        "color": (color, 40 * count, 3 * count),
        "blur rows": (partial(blur, half, radius, None), 3 * radius * count, 4 * count),
        "blur columns": (
            partial(blur, out, radius, (*IMAGENET_MEAN, *IMAGENET_STD)),
            3 * radius * count,
            4 * count,
        ),
    }
    for name, (launch, flops, moved) in launches.items():
        yield _memory_bound(f"photometric {name} B={batch} {size}x{size}", launch, flops, moved)


def optimizers() -> Iterator[Spec]:
    """LARS on 2^25 parameters, all adapted; gradients that lie in buckets may not be aligned."""
    tensors, size = 128, 1 << 18
    chunks = tensors * size // lars.CHUNK
    partials, finite = _meta(2, chunks), _meta(dtype=torch.bool)
    for aligned in (True, False):
        addresses, rows = _meta(3, tensors, dtype=torch.int64), _meta(chunks, 4, dtype=torch.int32)
        table, name = lars.Table(addresses, aligned, rows, chunks), "" if aligned else " not aligned"
        norms = partial(lars.launch_norms, table, finite, 1e-6)
        update = partial(lars.launch_update, table, partials, finite, 0.1, 0.9, 1e-6, 1e-3)
        yield _memory_bound(f"lars norms{name}", norms, 6 * tensors * size, 8 * tensors * size)
        yield _memory_bound(f"lars update{name}", update, 7 * tensors * size, 20 * tensors * size)
