"""The second pass: gradients that gather over the other side's softmax, one program per block of rows that it owns.

    s   = scale * x @ y.T                                       (M, N), never in memory (but see ``large_dim``)
    W   = x_weight[:, None] * exp(s - x_lse[:, None]) + y_weight * exp(s - y_lse)      either term may be absent
          (+ pull[:, None] + pull where two rows of one set have a group in common)
    out = W @ y                                                                (M, D)

The log-sum-exps are known, so every exponential is a probability: no maximum, no rescaling, no overflow, and 4 M N D
flops. With x the keys and y the queries this is the key gradient of a one-sided loss (only the second term); with
both terms it is one side of a two-sided loss, or all of a self-similarity, where p_ij and p_ji share a logit.
Deterministic: rows are owned by programs, partial sums over splits are added in order, and nothing is atomic.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vito_kernels._core.lazy_triton import Spec, jit, on_device, processors, use_triton
from vito_kernels.contrastive import cpu, epilogue, large_dim
from vito_kernels.contrastive.cpu import Mask, PositiveTerm, SoftmaxGrad
from vito_kernels.contrastive.device_functions import (
    LISTED,
    add_product,
    apply_mask,
    dot_rows,
    load_rows,
    plan_tiles,
    store_sums,
    zero_sums,
)
from vito_kernels.contrastive.tile_configs import (
    Matrix,
    Operand,
    cdiv,
    choose_tile,
    columns_of,
    matrices,
    on_tensor_cores,
    output_chunks,
    products,
    runs_on_triton,
)

if TYPE_CHECKING:
    import triton.language as tl


@jit
def _positive_weights(own, other, rows, group, pull):
    """As ``cpu.PositiveTerm``."""
    own_id = tl.load(group + own, mask=own < rows, other=-1)
    other_id = tl.load(group + other, mask=other < rows, other=-1)
    shared = (own_id[:, None] == other_id[None]) & (own[:, None] != other[None])
    mine = tl.load(pull + own, mask=own < rows, other=0.0)
    theirs = tl.load(pull + other, mask=other < rows, other=0.0)
    return tl.where(shared, mine[:, None] + theirs[None], 0.0)


@jit
def _similarity_lse_bwd_step(
    t, x, accs, y, y_tail, scale2, own, x_lse2, x_weight, y_lse2, y_weight, x_group, y_group, positive, term_group,
    pull, M, N, y_stride, diagonal, D: tl.constexpr, W: tl.constexpr, TAIL: tl.constexpr, FIRST: tl.constexpr,
    LAST: tl.constexpr, TILE: tl.constexpr, CHUNKS: tl.constexpr, CLEAN: tl.constexpr, GROUPS: tl.constexpr,
    DIAGONAL: tl.constexpr, POSITIVES: tl.constexpr, POSITIVE_TERM: tl.constexpr, X_SOFTMAX: tl.constexpr, Y_SOFTMAX:
    tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of y: the weights of its rows for each row of x, and their sum of y."""
    rows = load_rows(y, y_tail, t * TILE, N, y_stride, D, W, TAIL, TILE, CLEAN, TMA, PRECISION)
    other = t * TILE + tl.arange(0, TILE)
    s = dot_rows(x, rows, CHUNKS, PRECISION) * scale2
    if not CLEAN:
        s = apply_mask(s, own, other, M, N, x_group, y_group, positive, diagonal, GROUPS, DIAGONAL, POSITIVES, True)
    if Y_SOFTMAX:
        lse2 = tl.load(y_lse2 + other, mask=other < N, other=0.0)
        weights = tl.exp2(s - lse2[None]) * tl.load(y_weight + other, mask=other < N, other=0.0)[None]
        if X_SOFTMAX:
            weights += tl.exp2(s - x_lse2[:, None]) * x_weight[:, None]
    else:
        weights = tl.exp2(s - x_lse2[:, None]) * x_weight[:, None]
    if POSITIVE_TERM:
        weights += _positive_weights(own, other, M, term_group, pull)
    return add_product(accs, weights, rows, CHUNKS, FIRST, LAST, PRECISION)


@jit
def similarity_lse_bwd_kernel(
    x, x_tail, y, y_tail, scale, out, x_lse2, x_weight, y_lse2, y_weight, x_group, y_group, positive, term_group, pull,
    M, N, x_stride, y_stride, diagonal, split_tiles, D: tl.constexpr, W: tl.constexpr, TAIL: tl.constexpr,
    FIRST: tl.constexpr, LAST: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
    GROUPS: tl.constexpr, DIAGONAL: tl.constexpr, POSITIVES: tl.constexpr, POSITIVE_TERM: tl.constexpr, X_SOFTMAX:
    tl.constexpr,
    Y_SOFTMAX: tl.constexpr, X_TMA: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Column chunks FIRST .. LAST of out (splits, M, D): one program per block of rows of x and split of y."""
    CHUNKS: tl.constexpr = D // W + (TAIL > 0)
    MASKED: tl.constexpr = (
        GROUPS or POSITIVES > 0 or POSITIVE_TERM or (D > 128 and PRECISION == "bf16x6")
    )  # as in ``lse``
    row, split = tl.program_id(0) * BLOCK, tl.program_id(1)
    own = row + tl.arange(0, BLOCK)
    scale2 = tl.load(scale) * 1.4426950408889634
    top = own
    weight = own
    if X_SOFTMAX:
        top = tl.load(x_lse2 + own, mask=own < M, other=0.0)
        weight = tl.load(x_weight + own, mask=own < M, other=0.0)
    rows = load_rows(x, x_tail, row, M, x_stride, D, W, TAIL, BLOCK, False, X_TMA, PRECISION)
    accs = zero_sums(BLOCK, D, W, TAIL, FIRST, LAST)

    first = split * split_tiles
    last = tl.minimum(first + split_tiles, tl.cdiv(N, TILE))
    crossed, crossing, full = plan_tiles(row, N, first, last, diagonal, BLOCK, TILE, DIAGONAL)
    if MASKED:
        crossed, crossing, full = first, last - first, last
    else:
        for i in tl.range(first, full - crossing, num_stages=STAGES):
            t = tl.where(i < crossed, i, i + crossing)
            accs = _similarity_lse_bwd_step(
                t, rows, accs, y, y_tail, scale2, own, top, weight, y_lse2, y_weight, x_group, y_group, positive,
                term_group, pull, M, N, y_stride, diagonal, D, W, TAIL, FIRST, LAST, TILE, CHUNKS, True, GROUPS,
                DIAGONAL, POSITIVES, POSITIVE_TERM, X_SOFTMAX, Y_SOFTMAX, TMA, PRECISION,
            )  # fmt: skip
    # As in ``lse``; in SupCon's exact products hoisted addresses spill 8 bytes on sm_100.
    HOISTED: tl.constexpr = MASKED and not (POSITIVE_TERM and D > 512 and PRECISION == "ieee")
    for i in tl.range(0, crossing + last - full, num_stages=STAGES if MASKED else 1, disable_licm=not HOISTED):
        t = tl.where(i < crossing, crossed + i, full)
        accs = _similarity_lse_bwd_step(
            t, rows, accs, y, y_tail, scale2, own, top, weight, y_lse2, y_weight, x_group, y_group, positive,
            term_group, pull, M, N, y_stride, diagonal, D, W, TAIL, FIRST, LAST, TILE, CHUNKS, False, GROUPS, DIAGONAL,
            POSITIVES, POSITIVE_TERM, X_SOFTMAX, Y_SOFTMAX, TMA, PRECISION,
        )  # fmt: skip
    store_sums(out + tl.cast(split, tl.int64) * M * D, accs, row, M, D, W, TAIL, BLOCK, FIRST, LAST)


def launch_gradient(
    x: Matrix,
    y: Matrix,
    scale: Tensor,
    x_softmax: SoftmaxGrad | None,
    y_softmax: SoftmaxGrad | None,
    mask: Mask,
    pull: PositiveTerm | None = None,
) -> Tensor:
    """``W @ y`` (M, D) float32, not yet times ``scale``. ``mask`` is seen from y: its queries are the rows of y.
    ``pull`` where y is x.
    """
    gain = _gain(x.tensor, x_softmax, y_softmax)
    x_softmax, y_softmax = _usable(x_softmax, gain), _usable(y_softmax, gain)
    if pull is None and large_dim.supports("gradient", x.tensor.shape[1], x.tensor.dtype):
        total = large_dim.gradient(x.tensor, y.tensor, scale, x_softmax, y_softmax, mask)
    else:
        pull = pull if pull is None or gain is None else PositiveTerm(pull.group, pull.weight * gain)
        total = _run_gradient(x, y, scale, x_softmax, y_softmax, mask, pull)
    return total if gain is None else total.div_(gain)


def _run_gradient(
    x: Matrix,
    y: Matrix,
    scale: Tensor,
    x_softmax: SoftmaxGrad | None,
    y_softmax: SoftmaxGrad | None,
    mask: Mask,
    pull: PositiveTerm | None,
) -> Tensor:
    """By the kernel above."""
    (M, D), N, device = x.tensor.shape, y.tensor.shape[0], x.tensor.device
    tile = choose_tile("gradient both" if x_softmax and y_softmax else "gradient one", D, x.tensor.dtype)
    left, right = Operand(x, tile.own, tile), Operand(y, tile.other, tile)
    blocks, tiles = cdiv(M, tile.own), cdiv(N, tile.other)
    split_tiles = cdiv(tiles, max(1, min(processors(device) // blocks, tiles // 4)))
    splits = cdiv(tiles, split_tiles)
    out = scale.new_empty(splits, M, D)
    with on_device(x.tensor):
        for first, last in output_chunks(D, tile):
            similarity_lse_bwd_kernel[(blocks, splits)](
                left.source, left.tail_source, right.source, right.tail_source, scale, out, x_softmax and
                x_softmax.lse2,
                x_softmax and x_softmax.weight, y_softmax and y_softmax.lse2, y_softmax and y_softmax.weight,
                mask.k_group,
                mask.q_group, mask.positive, pull and pull.group, pull and pull.weight, M, N, left.stride,
                right.stride, -(mask.diagonal or 0), split_tiles, D, left.chunk, left.tail, first, last,
                tile.own, tile.other, tile.stages, GROUPS=mask.q_group is not None,
                DIAGONAL=mask.blocks, POSITIVES=columns_of(mask.positive), POSITIVE_TERM=pull is not None,
                X_SOFTMAX=x_softmax is not None, Y_SOFTMAX=y_softmax is not None, X_TMA=left.tma, TMA=right.tma,
                PRECISION=left.precision, num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
    return out[0] if splits == 1 else out.sum(0)


def _gain(x: Tensor, *roles: SoftmaxGrad | None) -> Tensor | None:
    """For float16, what brings the largest weight to 2^14, or as close as a float can: its W would lose the small
    gradients of a mean over a batch.
    """
    if x.dtype != torch.float16:
        return None
    largest = torch.stack([role.weight.abs().max() for role in roles if role is not None]).max()
    return torch.where(largest > 0, (2.0**14 / largest).clamp(max=2.0**126), 1.0)


def _usable(role: SoftmaxGrad | None, gain: Tensor | None) -> SoftmaxGrad | None:
    role = role and role.settled()
    return role if role is None or gain is None else SoftmaxGrad(role.lse2, role.weight * gain, seen=True)


def softmax_grad(lse2: Tensor, lse_residual: Tensor, gradient: Tensor) -> SoftmaxGrad:
    """The role of a softmax with a log-sum-exp in two parts (M,), at which ``gradient`` (M,) of lse2 arrives."""
    return (
        epilogue.role(lse2, lse_residual, gradient)
        if use_triton(lse2)
        else SoftmaxGrad.of(lse2, lse_residual, gradient * cpu.LOG2E)
    )


def pair_gradient(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    x_softmax: SoftmaxGrad | None,
    y_softmax: SoftmaxGrad | None,
    mask: Mask,
    need_x: bool,
    need_y: bool,
    logit_cache: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(W y, W^T x) as ``cpu.gradient``: on the CPU from one pass over s, by Triton in a pass for each side."""
    if not runs_on_triton(x):
        return cpu.gradient(x, y, scale, x_softmax, y_softmax, mask, need_x, need_y, logit_cache)
    (left, right), gx, gy = matrices(x, y), scale.new_empty(0, x.shape[1]), scale.new_empty(0, y.shape[1])
    if need_x:  # seen from y, the other way round; lists of positives only ever come with need_y
        gx = launch_gradient(left, right, scale, x_softmax, y_softmax, mask.transposed())
    if need_y:
        gy = launch_gradient(right, left, scale, y_softmax, x_softmax, mask)
    return gx, gy


def specs(device: str = "meta") -> list[Spec]:
    """The key gradient under every layout, and the two-role pass of two-sided losses, self-similarity and SupCon."""
    cases = [("key gradient", layout) for layout in ("none", "diagonal", "groups", "positive")]
    cases += [("two-sided gradient", layout) for layout in ("none", "diagonal", "supcon")]
    return [
        _spec(name, layout, width, dtype, device)
        for width in (64, 128, 192, 256, 512, 1024)
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
        for name, layout in cases
    ] + [_spec("key gradient", "many positives", width, torch.bfloat16, device) for width in (128, 256)]


def _spec(name: str, layout: str, width: int, dtype: torch.dtype, device: str = "meta", rows: int = 32768) -> Spec:
    def launch() -> None:
        x = torch.randn(rows, width, dtype=dtype, device=device) / width**0.5
        ids = torch.arange(rows, device=device)
        role = SoftmaxGrad(torch.full((rows,), 10.0, device=device), torch.full((rows,), 1 / rows, device=device))
        group = ids if layout == "groups" else None
        positive = ids[:, None].repeat(1, LISTED[layout]) if layout in LISTED else None
        mask = Mask(group, group, positive, 0 if layout in ("diagonal", "supcon") else None)
        own_softmax = role if name == "two-sided gradient" else None
        pull = PositiveTerm(ids.int(), role.weight) if layout == "supcon" else None
        launch_gradient(*matrices(x, x), torch.full((), 10.0, device=device), own_softmax, role, mask, pull)

    def flops() -> float:
        """A launch for other columns of the output computes the logits again."""
        if layout != "supcon" and large_dim.supports("gradient", width, dtype):
            return 4.0 * rows * rows * width
        tile = choose_tile("gradient both" if name == "two-sided gradient" else "gradient one", width, dtype)
        return (2.0 * len(output_chunks(width, tile)) + 2.0) * products(dtype, width) * rows * rows * width

    return Spec(
        f"{name} D={width} {str(dtype)[6:]} {layout}",
        launch,
        flops,
        min_bytes=2.0 * rows * width * dtype.itemsize + rows * width * 4 + rows * 16,
        tensor_cores=partial(on_tensor_cores, dtype, width),
        rare=dtype != torch.bfloat16
        or width not in (128, 256, 512)
        or layout not in (("none", "diagonal") if name == "key gradient" else ("diagonal", "supcon")),
    )
