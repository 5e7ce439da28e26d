"""Log-sum-exp over keys and InfoNCE on it, without ever building the M x N matrix of logits.

    logits = scale * q @ k.T                                        (M, N), never in memory
    lse    = logits.masked_fill(excluded, -inf).logsumexp(1)        similarity_lse
    loss   = softplus(lse - scale * (q * k[positive]).sum(1))       info_nce: excluded holds the positive

q (M, D), k (N, D): float32, bfloat16 or float16; sums in float32. The forward pass keeps the keys' mean under the
softmax,

    mean   = logits.masked_fill(excluded, -inf).softmax(1) @ k      (M, D), d lse / d q = scale * mean

which makes it FlashAttention's forward with V = K, and the backward pass of q a scaling: 4 M N D flops for both. Every
output row is owned by one program and summed in a fixed order: deterministic, no atomics.

Two variants. *Fixed shift*: exponents are relative to a constant, |scale| log2(e) - 100, so that nothing is rescaled
and no maximum is taken. For unit vectors every logit is at most |scale|, so the largest term is 2^100 and 2^27 keys
cannot overflow; what underflows is 226 powers of two below the largest possible. For other inputs it may fail, and it
says so: a row whose sum left [2^-64, 2^120] or whose mean is not finite is not trusted, as terms lost below 2^-126
are negligible in any other. *Online*: a running maximum, right for every input. The rule: float32 runs online (a
shift of 100 would round its exponents to 2^-18), and so does float16 with the mean (its P cannot hold 2^100);
otherwise the fixed shift runs first, and the online kernel behind it repeats the blocks that were not trusted and
leaves the others at once. No value is read by the host.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vito_kernels import options, tiled
from vito_kernels._ops import autograd_op, refuse_double_backward
from vito_kernels._tiles import (
    Operand,
    add_product,
    cdiv,
    choose_tile,
    columns_of,
    dot_rows,
    hide,
    load_rows,
    plan_tiles,
    precision,
    rows_contiguous,
    spans,
    store_sums,
    zero_sums,
)
from vito_kernels._triton import Spec, jit, on_device, processors, use_triton
from vito_kernels.checks import (
    check_groups,
    check_options,
    check_pair,
    check_positive_range,
    inverse_temperature,
    positive_columns,
    reduce,
    scale_tensor,
)
from vito_kernels.gradient import pair_gradient
from vito_kernels.tiled import Exclusion, Role

if TYPE_CHECKING:
    import triton.language as tl

# ---- Triton kernels


@jit
def _lse_step(
    t, q, accs, total, top, k, k_tail, scale2, shift, own, own_group, other_group, positive, M, N, k_stride, diagonal,
    D: tl.constexpr, W: tl.constexpr, TAIL: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, TILE: tl.constexpr,
    LANES: tl.constexpr, CHUNKS: tl.constexpr, CLEAN: tl.constexpr, GROUPS: tl.constexpr, DIAGONAL: tl.constexpr,
    POSITIVES: tl.constexpr, ONLINE: tl.constexpr, HEADROOM: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of keys: s = q k^T, p = 2^(s - shift), sums of p by row and of p k by row and column."""
    BLOCK: tl.constexpr = total.shape[0]
    keys = load_rows(k, k_tail, t * TILE, N, k_stride, D, W, TAIL, TILE, CLEAN, TMA)
    s = dot_rows(q, keys, CHUNKS, PRECISION) * scale2
    if not ONLINE:
        s -= shift
    if not CLEAN:
        other = t * TILE + tl.arange(0, TILE)
        s = hide(s, own, other, M, N, own_group, other_group, positive, diagonal, GROUPS, DIAGONAL, POSITIVES, False)
    if ONLINE:
        new_top = tl.maximum(top, tl.max(s, 1))
        base = tl.where(new_top == -float("inf"), 0.0, new_top)  # a row that has seen no key yet
        old = tl.exp2(top - base)
        p = tl.exp2(s - (base - HEADROOM)[:, None])
        top = new_top
        total *= old[:, None]
        scaled = ()  # type: tuple
        for c in tl.static_range(FIRST, LAST):
            scaled += (accs[c - FIRST] * old[:, None],)
        accs = scaled
    else:
        p = tl.exp2(s)
    total += tl.sum(tl.reshape(p, (BLOCK, TILE // LANES, LANES)), 1)  # within a thread: no shuffle in the loop
    return add_product(accs, p, keys, FIRST, LAST, PRECISION), total, top


@jit
def _lse_kernel(
    q, k, k_tail, scale, lse2, rest, mean, trusted, q_group, k_group, positive, M, N, q_stride, k_stride, diagonal,
    split_tiles, D: tl.constexpr, W: tl.constexpr, TAIL: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, BLOCK:
    tl.constexpr, TILE: tl.constexpr, LANES: tl.constexpr, STAGES: tl.constexpr, GROUPS: tl.constexpr, DIAGONAL:
    tl.constexpr, POSITIVES: tl.constexpr, ONLINE: tl.constexpr, REPEAT: tl.constexpr, HEADROOM: tl.constexpr, TMA:
    tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """lse2 and rest (splits, M) and, in column chunks FIRST .. LAST, mean (splits, M, D): one program per block of
    rows and split.
    """
    CHUNKS: tl.constexpr = D // W + (TAIL > 0)
    MASKED: tl.constexpr = GROUPS or POSITIVES > 0  # an excluded key may be anywhere
    row, split = tl.program_id(0) * BLOCK, tl.program_id(1)
    own = row + tl.arange(0, BLOCK)
    if REPEAT:  # noqa: SIM102 (one is decided when compiling, the other when running)
        if tl.min(tl.load(trusted + tl.cast(split, tl.int64) * M + own, mask=own < M, other=1).to(tl.int32), 0) > 0:
            return
    scale2 = tl.load(scale) * 1.4426950408889634
    shift = tl.abs(scale2) - HEADROOM
    queries = load_rows(q, q, row, M, q_stride, D, W, TAIL, BLOCK, False, False)
    accs = zero_sums(BLOCK, D, W, TAIL, FIRST, LAST)
    total = tl.zeros((BLOCK, LANES), tl.float32)
    top = tl.full((BLOCK,), -float("inf"), tl.float32)

    first = split * split_tiles
    last = tl.minimum(first + split_tiles, tl.cdiv(N, TILE))
    crossed, crossing, full = plan_tiles(row, N, first, last, diagonal, BLOCK, TILE, DIAGONAL)
    if MASKED:
        crossed, crossing, full = first, last - first, last
    else:
        for i in tl.range(first, full - crossing, num_stages=STAGES):
            t = tl.where(i < crossed, i, i + crossing)
            accs, total, top = _lse_step(
                t, queries, accs, total, top, k, k_tail, scale2, shift, own, q_group, k_group, positive, M, N, k_stride,
                diagonal, D, W, TAIL, FIRST, LAST, TILE, LANES, CHUNKS, True, GROUPS, DIAGONAL, POSITIVES, ONLINE,
                HEADROOM, TMA, PRECISION,
            )  # fmt: skip
    for i in tl.range(0, crossing + last - full, num_stages=STAGES if MASKED else 1):
        t = tl.where(i < crossing, crossed + i, full)
        accs, total, top = _lse_step(
            t, queries, accs, total, top, k, k_tail, scale2, shift, own, q_group, k_group, positive, M, N, k_stride,
            diagonal, D, W, TAIL, FIRST, LAST, TILE, LANES, CHUNKS, False, GROUPS, DIAGONAL, POSITIVES, ONLINE,
            HEADROOM, TMA, PRECISION,
        )  # fmt: skip

    z = tl.sum(total, 1)
    if ONLINE:
        shift = tl.where(top == -float("inf"), 0.0, top) - HEADROOM
    else:
        safe = (z > 2.0**-64) & (z < 2.0**120)
        for c in tl.static_range(FIRST, LAST):
            safe &= tl.max(tl.abs(accs[c - FIRST]), 1) < float("inf")
        tl.store(trusted + tl.cast(split, tl.int64) * M + own, safe.to(tl.int8), mask=own < M)
    log_z = tl.log2(z)
    whole = log_z + shift
    lost = tl.where(z == 0.0, 0.0, shift - whole + log_z)  # what the sum rounds away, as ``tiled.split_sum``
    part = tl.cast(split, tl.int64) * M + own
    tl.store(lse2 + part, whole, mask=own < M)
    tl.store(rest + part, lost, mask=own < M)
    means = ()  # type: tuple
    for c in tl.static_range(FIRST, LAST):
        means += (accs[c - FIRST] / tl.where(z == 0.0, 1.0, z)[:, None],)
    store_sums(mean + tl.cast(split, tl.int64) * M * D, means, row, M, D, W, TAIL, BLOCK, FIRST, LAST)


# ---- launcher

VARIANTS = ("fixed", "online")


def launch_lse(
    q: Tensor, k: Tensor, scale: Tensor, exclusion: Exclusion, bring_mean: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(lse2 (M,), rest (M,), mean (M, D) or (0, D)) by the kernels above; keys are split among programs where queries
    are few.
    """
    M, D = q.shape
    q, k = rows_contiguous(q), rows_contiguous(k)
    kind = "mean" if bring_mean else "lse"
    tiles = [choose_tile(f"{kind} {variant}", D, q.dtype) for variant in VARIANTS]
    split_keys = cdiv(k.shape[0], max(1, min(processors(q.device) // cdiv(M, tiles[0].own), k.shape[0] // 256)))
    split_keys = cdiv(split_keys, tiles[0].other * tiles[1].other) * tiles[0].other * tiles[1].other
    splits = cdiv(k.shape[0], split_keys)
    lse2, rest = scale.new_empty(splits, M), scale.new_empty(splits, M)
    mean = scale.new_empty(splits, M if bring_mean else 0, D)
    trusted = torch.empty(splits, M, dtype=torch.int8, device=q.device)
    online_only = q.dtype == torch.float32 or (q.dtype == torch.float16 and bring_mean)
    for span in spans(D, tiles[0]) if bring_mean else [(0, 0)]:
        if not online_only:
            run_lse("fixed", q, k, scale, exclusion, lse2, rest, mean, trusted, span, split_keys)
        run_lse("online", q, k, scale, exclusion, lse2, rest, mean, None if online_only else trusted, span, split_keys)
    return tiled.merge_splits(lse2, rest, mean)


def run_lse(
    variant: str,
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    exclusion: Exclusion,
    lse2: Tensor,
    rest: Tensor,
    mean: Tensor,
    trusted: Tensor | None,
    span: tuple[int, int],
    split_keys: int,
) -> None:
    """Fills lse2 (S, M) and the column chunks ``span`` of mean (S, M, D). ``trusted`` (S, M): written by the fixed
    variant, obeyed by the online one, which without it does every row.
    """
    (M, D), N = q.shape, k.shape[0]
    tile = choose_tile(f"{'mean' if mean.shape[1] else 'lse'} {variant}", D, q.dtype)
    left, right = Operand(q, tile.own, tile), Operand(k, tile.other, tile)
    online = variant == "online"
    headroom = 100.0 if not online else 14.0 if q.dtype == torch.float16 else 0.0  # float16: P from 2^14 down to 2^-24
    with on_device(q):
        _lse_kernel[(cdiv(M, tile.own), lse2.shape[0])](
            q, right.wide, right.narrow, scale, lse2, rest, mean, trusted, exclusion.q_group, exclusion.k_group,
            exclusion.positive, M, N, q.stride(0), k.stride(0), exclusion.diagonal or 0, split_keys // tile.other, D,
            left.chunk, left.tail, *span, tile.own, tile.other, tile.lanes or tile.other, tile.stages,
            GROUPS=exclusion.q_group is not None, DIAGONAL=exclusion.blocks, POSITIVES=columns_of(exclusion.positive),
            ONLINE=online, REPEAT=online and trusted is not None, HEADROOM=headroom, TMA=right.tma,
            PRECISION=precision(), num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip


def specs(device: str = "meta") -> list[Spec]:
    """Every shipped launch of this file, at the nominal size of a large contrastive batch."""
    return [
        _spec(width, dtype, bring_mean, layout, device)
        for width in (64, 128, 192, 256, 512, 1024)
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
        for bring_mean in (True, False)
        for layout in ("none", "diagonal", "groups", "positive")
    ]


def _spec(
    width: int, dtype: torch.dtype, bring_mean: bool, layout: str, device: str = "meta", rows: int = 32768
) -> Spec:
    def launch() -> None:
        x = torch.randn(rows, width, dtype=dtype, device=device) / width**0.5
        ids = torch.arange(rows, device=device)
        group, positive = ids if layout == "groups" else None, ids[:, None] if layout == "positive" else None
        scale = torch.full((), 10.0, device=device)
        exclusion = Exclusion(group, group, positive, 0 if layout == "diagonal" else None)
        launch_lse(x, x, scale, exclusion, bring_mean)

    return Spec(
        f"similarity_lse {'with mean' if bring_mean else 'alone'} D={width} {str(dtype)[6:]} {layout}",
        launch,
        flops=(4.0 if bring_mean else 2.0) * rows * rows * width,
        min_bytes=2.0 * rows * width * dtype.itemsize + rows * 4 + (rows * width * 4 if bring_mean else 0),
        tensor_cores=dtype != torch.float32,
        rare=dtype != torch.bfloat16
        or width not in (128, 256, 512)
        or layout not in (("none", "diagonal", "groups") if bring_mean else ("none",)),
    )


# ---- custom op


@torch.library.custom_op("vito_kernels::contrast", mutates_args=())
def contrast(
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    q_group: Tensor | None,
    k_group: Tensor | None,
    positive: Tensor | None,
    diagonal: int | None,
    bring_mean: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(lse2 (M,), in units of log 2, over the keys that a query may see, logits of its positives (M, P), mean (M, D)
    of the keys under the softmax).

    Keys of the query's group, its positives, and key ``i + diagonal`` are not seen; the latter counts as its only
    positive. ``mean`` is what the gradient of q needs: with ``bring_mean`` forward and backward together cost 4 M N D
    flops.
    """
    if positive is not None and not positive.is_cuda:
        check_positive_range(positive, k.shape[0])
    if not scale.is_cuda and not bool(torch.isfinite(scale)):
        raise ValueError(f"scale must be finite, got {scale.item()}")
    exclusion = Exclusion(q_group, k_group, positive, diagonal)
    run = launch_lse if use_triton(q) else tiled.forward
    lse2, rest, mean = run(q, k, scale, exclusion, bring_mean)
    return lse2, _positive_logits(q, k, scale, positive, diagonal), mean, rest


@contrast.register_fake
def _(q, k, scale, q_group, k_group, positive, diagonal, bring_mean):
    count = positive.shape[1] if positive is not None else int(diagonal is not None)
    rows, width = q.shape
    new = lambda *shape: scale.new_empty(shape)  # noqa: E731
    return new(rows), new(rows, count), new(rows if bring_mean else 0, width), new(rows)


@torch.library.custom_op("vito_kernels::contrast_backward", mutates_args=())
def contrast_backward(
    g_lse2: Tensor,
    g_positive: Tensor,
    q: Tensor,
    k: Tensor | None,
    scale: Tensor,
    q_group: Tensor | None,
    k_group: Tensor | None,
    positive: Tensor | None,
    diagonal: int | None,
    lse2: Tensor,
    rest: Tensor,
    mean: Tensor,
    need_q: bool,
    need_k: bool,
    need_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dscale) of ``contrast``, each rounded once to its input's dtype; what is not needed comes back empty."""
    dq, dk, dscale = q.new_empty(0), q.new_empty(0), scale.new_empty(0)
    g_lse = g_lse2 * tiled.LOG2E
    if need_q or need_scale:
        pull = mean * g_lse[:, None]
        for p, keys in enumerate(_positive_keys(len(q), positive, diagonal)):
            assert k is not None
            pull.addcmul_(k[keys].to(pull.dtype), g_positive[:, p, None])
        if need_scale:
            dscale = (pull * q).sum()
        if need_q:
            dq = pull.mul_(scale).to(q.dtype)
    if need_k and k is not None:
        exclusion = Exclusion(q_group, k_group, positive, diagonal)
        _, push = pair_gradient(q, k, scale, Role.of(lse2, rest, g_lse), None, exclusion, need_x=False, need_y=True)
        for p, keys in enumerate(_positive_keys(len(q), positive, diagonal)):
            part = q.to(push.dtype) * g_positive[:, p, None]
            if isinstance(keys, slice):
                push[keys] += part
            else:
                push.index_put_((keys,), part, accumulate=True)  # sorts on a GPU: no atomics, the same sum every time
        dk = push.mul_(scale).to(k.dtype)
    return dq, dk, dscale


@contrast_backward.register_fake
def _(
    g_lse2, g_positive, q, k, scale, q_group, k_group, positive, diagonal, lse2, rest, mean, need_q, need_k, need_scale
):
    return (
        q.new_empty(q.shape if need_q else 0),
        q.new_empty(k.shape if need_k else 0),
        scale.new_empty(() if need_scale else 0),
    )


def _positive_keys(queries: int, positive: Tensor | None, diagonal: int | None) -> list[slice | Tensor]:
    """The positive keys of all queries, one entry for each column of positives."""
    if diagonal is not None:
        return [slice(diagonal, diagonal + queries)]
    return [] if positive is None else list(positive.unbind(1))


def _positive_logits(q: Tensor, k: Tensor, scale: Tensor, positive: Tensor | None, diagonal: int | None) -> Tensor:
    columns = _positive_keys(len(q), positive, diagonal)
    logits = scale.new_empty(q.shape[0], len(columns))
    wide = q.to(scale.dtype)
    for p, keys in enumerate(columns):
        torch.sum(wide * k[keys], 1, dtype=scale.dtype, out=logits[:, p])
    return logits.mul_(scale)


def _setup_context(ctx, inputs, output):
    q, k, scale, q_group, k_group, positive, ctx.diagonal, _ = inputs
    lse2, _, mean, rest = output
    # Locked keys without positives are not kept: a queue may take new keys before the backward pass.
    keep = k.requires_grad or positive is not None or ctx.diagonal is not None
    ctx.save_for_backward(q, k if keep else None, scale, q_group, k_group, positive, lse2, rest, mean)
    ctx.set_materialize_grads(False)


def _backward(ctx, g_lse2, g_positive, *_):  # mean and rest do not leave this module: no gradient comes to them
    q, k, scale, q_group, k_group, positive, lse2, rest, mean = ctx.saved_tensors
    need_q, need_k, need_scale = ctx.needs_input_grad[:3]
    count = positive.shape[1] if positive is not None else int(ctx.diagonal is not None)
    g_lse2 = torch.zeros_like(lse2) if g_lse2 is None else g_lse2
    g_positive = lse2.new_zeros(lse2.shape[0], count) if g_positive is None else g_positive
    dq, dk, dscale = apply_contrast_backward(
        g_lse2,
        g_positive,
        q,
        k,
        scale,
        q_group,
        k_group,
        positive,
        ctx.diagonal,
        lse2,
        rest,
        mean,
        need_q,
        need_k,
        need_scale,
    )
    return dq if need_q else None, dk if need_k else None, dscale if need_scale else None, None, None, None, None, None


apply_contrast = autograd_op(contrast, _setup_context, _backward)
apply_contrast_backward = refuse_double_backward(contrast_backward)

# ---- public functions


def autocast(*tensors: Tensor) -> list[Tensor]:
    """As autocast does for a matmul: float32 embeddings become its dtype. Sums and losses stay in float32."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return list(tensors)
    return [x.to(torch.get_autocast_dtype(kind)) if x.dtype == torch.float32 else x for x in tensors]


def differentiable(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def similarity_lse(
    q: Tensor, k: Tensor, scale: float | Tensor, *, q_group: Tensor | None = None, k_group: Tensor | None = None
) -> Tensor:
    """Log-sum-exp of ``scale * q_i . k_j`` over the keys j whose group differs from the query's; (M,) float32.

    Equivalent: ``(scale * q @ k.T).masked_fill(q_group[:, None] == k_group[None], -inf).logsumexp(1)``.

    q (M, D) and k (N, D) share a dtype (float32, bfloat16, float16; float64 runs in PyTorch) and a device; rows may
    be strided. ``scale`` is a number or a tensor of one element, which may require grad. Groups are int64 or int32,
    (M,) and (N,); without them every key counts. A query that sees no key has lse = -inf and no gradient.

    Sums are in float32 (float64 for float64, and so is the result). Under autocast float32 embeddings take its dtype.
    The gradient of q comes with the forward pass: 4 M N D flops for both together, 2 M N D without a gradient; keys
    that require grad cost 4 M N D more. Deterministic. No second derivative: double backward raises RuntimeError.

    Raises ValueError or TypeError for a wrong shape, dtype, device, number of groups or a scale that is not finite.
    """
    check_pair(q, k)
    check_groups(q_group, k_group, q, k)
    q, k = autocast(q, k)
    scale = scale_tensor(scale, q)
    return apply_contrast(q, k, scale, q_group, k_group, None, None, differentiable(q, scale))[0] / tiled.LOG2E


def info_nce(
    q: Tensor,
    k: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    positive: Tensor | None = None,
    q_group: Tensor | None = None,
    k_group: Tensor | None = None,
    label_smoothing: float = 0.0,
    hard_negatives: float = 0.0,
    debias: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """InfoNCE of queries against keys: each query's positive against its negatives, ``softplus(lse_negatives -
    logit_positive)``.

    Equivalent, for one positive and no groups: ``cross_entropy(q @ k.T / temperature, positive)``. In this form the
    positive is not part of the sum, so the gradient does not cancel when its probability is close to one.

    q (M, D), k (N, D): as for ``similarity_lse``; nothing is normalised here. ``positive`` (M,) or (M, P) holds key
    indices, default ``arange(M)``; with P positives the loss of a query is the mean over them, each against the same
    negatives. The negatives are the keys that are no positive of the query and, given groups, whose ``k_group``
    differs from its ``q_group``. ``temperature`` is a positive number or a tensor of one element, which may require
    grad.

    ``label_smoothing`` in [0, 1) is that of ``cross_entropy``, and needs one positive and no groups.
    ``hard_negatives`` >= 0 weights each negative by ``exp(hard_negatives * logit)``, normalised to mean 1 (Robinson
    et al., arXiv 2010.04592), at the cost of a second pass; ``debias`` in [0, 1) is the share of the positive's class
    among the negatives, which is subtracted (Chuang et al., arXiv 2007.00224; for unit vectors). Both count the
    negatives as n of them.

    Returns a float32 scalar, or (M,) with ``reduction="none"``; a query without negatives has loss 0. Dtypes, cost,
    errors and determinism as for ``similarity_lse``.
    """
    check_pair(q, k)
    check_groups(q_group, k_group, q, k)
    check_options(label_smoothing, hard_negatives, debias, positive, q_group)
    columns = positive_columns(positive, q, k)
    scale = inverse_temperature(temperature)
    groups = (q_group, k_group)
    negatives, logits = negatives_and_positives(q, k, scale, columns, 0, *groups)
    if hard_negatives or debias:

        def over_negatives(scale: float | Tensor, width: int = q.shape[1]) -> Tensor:
            return negatives_and_positives(q[:, :width], k[:, :width], scale, columns, 0, *groups)[0]

        with torch.no_grad():  # at a scale of zero, the logarithm of how many keys are seen
            log_count = over_negatives(0.0, 16)
        if hard_negatives:
            harder = over_negatives(scale * (1 + hard_negatives)) - over_negatives(scale * hard_negatives) + log_count
            negatives = torch.where(negatives == -torch.inf, negatives, harder)
        sums = options.debiased(negatives, logits, log_count, scale, debias) if debias else negatives[:, None]
    else:
        sums = negatives[:, None]
    loss = torch.nn.functional.softplus(sums - logits).mean(1)
    if label_smoothing:
        loss = loss + label_smoothing * (logits[:, 0] - options.mean_logit(q, k, scale))
    return reduce(loss, reduction)


def negatives_and_positives(
    q: Tensor,
    k: Tensor,
    scale: float | Tensor,
    positive: Tensor | None,
    diagonal: int,
    q_group: Tensor | None = None,
    k_group: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(lse over the negatives (M,), logits of the positives (M, P)): what every loss here is made of.

    ``positive`` (M, P), or None where the positive of query i is key ``i + diagonal``: that layout needs no mask
    elsewhere.
    """
    q, k = autocast(q, k)
    scale = scale_tensor(scale, q)
    lse2, logits, *_ = apply_contrast(
        q, k, scale, q_group, k_group, positive, None if positive is not None else diagonal, differentiable(q, scale)
    )
    return lse2 / tiled.LOG2E, logits
