"""Attention pooling: a softmax over the locations of a feature map, and the mean of its features under it.

    weights = softmax(logits, dim=1)                                      (B, L)
    pooled  = (weights[:, :, None] * features).sum(dim=1)                 (B, C)

Forward and backward each read the features once, in any layout. (B, L, C), (B, C, H, W) channels_last and (B, C, H, W)
contiguous are strides, never copies. The backward writes d features_l = weights_l g and
d logits_l = weights_l (g . features_l - g . pooled). features float32, bfloat16 or float16; sums and weights float32.
Deterministic: no atomics, sums in a fixed order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vito_kernels._core.autograd import autograd_op, refuse_double_backward, register_flops
from vito_kernels._core.checks import FLOATS, check_integers, without_autocast
from vito_kernels._core.lazy_triton import jit, num_sms, on_device, use_triton

if TYPE_CHECKING:
    import triton.language as tl

# One tile for all targets: streaming depends on the 16 kB in flight per program and not on the architecture.
BLOCK_L, BLOCK_C, WARPS = 32, 128, 4
LOGITS_BLOCK = 1024  # logits of a row are reread from cache in chunks of at most this many

# ------------------------------------------------------------------------------------------------------------- kernels


@jit
def attention_pool_fwd_kernel(
    features, logits, parts, pooled, weights,
    L, C, split_rows, stride_b, stride_l, stride_c, part_stride,
    BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr, LOGITS_BLOCK: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_C channels of one row, and the locations of one split: its part of the mean.

    A single split writes the mean twice: in float32 for the backward, and as ``pooled`` in the features' dtype.
    """
    channel_blocks = tl.cdiv(C, BLOCK_C)
    b = (tl.program_id(0) // channel_blocks).to(tl.int64)
    block = tl.program_id(0) % channel_blocks
    split = tl.program_id(1)
    logits += b * L
    top = tl.full((LOGITS_BLOCK,), float("-inf"), tl.float32)
    for start in range(0, L, LOGITS_BLOCK):
        l = start + tl.arange(0, LOGITS_BLOCK)
        top = tl.maximum(top, tl.load(logits + l, mask=l < L, other=float("-inf")).to(tl.float32))
    highest = tl.max(top, 0)
    total = tl.zeros((LOGITS_BLOCK,), tl.float32)
    for start in range(0, L, LOGITS_BLOCK):
        l = start + tl.arange(0, LOGITS_BLOCK)
        total += tl.exp(tl.load(logits + l, mask=l < L, other=float("-inf")).to(tl.float32) - highest)
    normalizer = tl.sum(total, 0)

    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    columns = features + b * stride_b + c.to(tl.int64) * stride_c
    acc = tl.zeros((BLOCK_L, BLOCK_C), tl.float32)
    first = split * split_rows
    last = tl.minimum(first + split_rows, L)
    for start in range(first, last, BLOCK_L):
        l = start + tl.arange(0, BLOCK_L)
        x = tl.load(logits + l, mask=l < last, other=float("-inf")).to(tl.float32)
        w = tl.exp(x - highest) / normalizer
        if block == 0:
            tl.store(weights + b * L + l, w, mask=l < last)
        inside = (l < last)[:, None] & (c < C)[None, :]
        f = tl.load(columns[None, :] + l.to(tl.int64)[:, None] * stride_l, mask=inside, other=0.0)
        acc += w[:, None] * f.to(tl.float32)
    part = tl.sum(acc, 0)
    tl.store(parts + split * part_stride + b * C + c, part, mask=c < C)
    if pooled is not None:
        tl.store(pooled + b * C + c, part.to(pooled.dtype.element_ty), mask=c < C)


@jit
def attention_pool_bwd_kernel(
    features, weights, mean, g_pooled, g_weights, d_features, d_logits,
    L, C, stride_b, stride_l, stride_c, d_stride_b, d_stride_l, d_stride_c,
    HAS_G_WEIGHTS: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr, LOGITS_BLOCK: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_L locations of one row, and goes through all channels."""
    row_blocks = tl.cdiv(L, BLOCK_L)
    b = (tl.program_id(0) // row_blocks).to(tl.int64)
    l = (tl.program_id(0) % row_blocks) * BLOCK_L + tl.arange(0, BLOCK_L)
    w = tl.load(weights + b * L + l, mask=l < L, other=0.0)
    rows = features + b * stride_b + l.to(tl.int64) * stride_l
    d_rows = d_features + b * d_stride_b + l.to(tl.int64) * d_stride_l
    dots = tl.zeros((BLOCK_L, BLOCK_C), tl.float32)
    means = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        inside = (l < L)[:, None] & (c < C)[None, :]
        g = tl.load(g_pooled + b * C + c, mask=c < C, other=0.0).to(tl.float32)
        means += g * tl.load(mean + b * C + c, mask=c < C, other=0.0)
        f = tl.load(rows[:, None] + c.to(tl.int64)[None, :] * stride_c, mask=inside, other=0.0)
        dots += g[None, :] * f.to(tl.float32)
        d = (w[:, None] * g[None, :]).to(d_features.dtype.element_ty)
        tl.store(d_rows[:, None] + c.to(tl.int64)[None, :] * d_stride_c, d, mask=inside)
    pull = tl.sum(dots, 1) - tl.sum(means, 0)
    if HAS_G_WEIGHTS:
        shift = tl.zeros((LOGITS_BLOCK,), tl.float32)
        for start in range(0, L, LOGITS_BLOCK):
            j = start + tl.arange(0, LOGITS_BLOCK)
            w_j = tl.load(weights + b * L + j, mask=j < L, other=0.0)
            shift += w_j * tl.load(g_weights + b * L + j, mask=j < L, other=0.0)
        pull += tl.load(g_weights + b * L + l, mask=l < L, other=0.0) - tl.sum(shift, 0)
    tl.store(d_logits + b * L + l, (w * pull).to(d_logits.dtype.element_ty), mask=l < L)


# ----------------------------------------------------------------------------------------------------------- launchers


def _logits_block(locations: int) -> int:
    return min(LOGITS_BLOCK, 1 << max(locations - 1, 15).bit_length())


def launch_attention_pool(features: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Splits the locations of a row among programs if rows and channels alone would leave the GPU idle.

    Returns what ``attention_pool_op`` does.
    """
    batch, locations, channels = features.shape
    channel_blocks = -(-channels // BLOCK_C)
    wanted = -(-2 * num_sms(features.device) // (batch * channel_blocks))
    split_rows = BLOCK_L * max(2, -(-locations // (wanted * BLOCK_L)))
    splits = -(-locations // split_rows)
    parts = features.new_empty((batch, channels) if splits == 1 else (splits, batch, channels), dtype=torch.float32)
    pooled = features.new_empty((batch, channels)) if splits == 1 else None
    weights = features.new_empty((batch, locations), dtype=torch.float32)
    attention_pool_fwd_kernel[(batch * channel_blocks, splits)](
        features, logits, parts, pooled, weights, locations, channels, split_rows, *features.stride(), batch * channels,
        BLOCK_L=BLOCK_L, BLOCK_C=BLOCK_C, LOGITS_BLOCK=_logits_block(locations), num_warps=WARPS,
    )  # fmt: skip
    if pooled is not None:
        return pooled, weights, parts
    mean = parts.sum(0)
    return mean.to(features.dtype, copy=True), weights, mean


def launch_attention_pool_backward(
    features: Tensor, weights: Tensor, mean: Tensor, g_pooled: Tensor, g_weights: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    batch, locations, channels = features.shape
    d_features, d_logits = torch.empty_like(features), torch.empty_like(weights, dtype=dtype)
    attention_pool_bwd_kernel[(batch * -(-locations // BLOCK_L),)](
        features, weights, mean, g_pooled, g_weights, d_features, d_logits,
        locations, channels, *features.stride(), *d_features.stride(), HAS_G_WEIGHTS=g_weights is not None,
        BLOCK_L=BLOCK_L, BLOCK_C=BLOCK_C, LOGITS_BLOCK=_logits_block(locations), num_warps=WARPS,
    )  # fmt: skip
    return d_features, d_logits


# ----------------------------------------------------------------------------------------------------------- custom op


@torch.library.custom_op("vito_kernels::attention_pool", mutates_args=())
def attention_pool_op(features: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """features (B, L, C), logits (B, L) -> pooled (B, C) in the features' dtype, weights (B, L), and ``pooled`` again.

    The last two are float32 (float64 if either input is). The backward reads the last, which no caller may write to.
    """
    dtype = _compute_dtype(features, logits)
    if features.shape[0] and dtype == torch.float32 and use_triton(features):
        with on_device(features):
            return launch_attention_pool(features, logits.contiguous())
    weights = torch.softmax(logits.to(dtype), 1)
    mean = _row_products(weights, features)
    return mean.to(features.dtype, copy=True), weights, mean


@attention_pool_op.register_fake
def _(features: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dtype, pooled = _compute_dtype(features, logits), features.new_empty(features.shape[::2])
    return pooled, features.new_empty(logits.shape, dtype=dtype), pooled.new_empty(pooled.shape, dtype=dtype)


@torch.library.custom_op("vito_kernels::attention_pool_backward", mutates_args=())
def attention_pool_backward_op(
    g_pooled: Tensor, g_weights: Tensor | None, features: Tensor, logits_like: Tensor, weights: Tensor, mean: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of ``features`` and of the logits, in the dtypes and layouts of the inputs."""
    g_pooled = g_pooled.contiguous()
    g_weights = None if g_weights is None else g_weights.contiguous()
    if features.shape[0] and weights.dtype == torch.float32 and use_triton(features):
        with on_device(features):
            return launch_attention_pool_backward(features, weights, mean, g_pooled, g_weights, logits_like.dtype)
    g_pooled = g_pooled.to(weights.dtype)
    pull = _row_products(g_pooled, features.transpose(1, 2))
    pull = pull if g_weights is None else pull + g_weights
    d_logits = weights * (pull - (weights * pull).sum(1, keepdim=True))
    d_features = torch.empty_like(features)
    torch.mul(weights[:, :, None], g_pooled[:, None], out=d_features)
    return d_features, d_logits.to(logits_like.dtype)


@attention_pool_backward_op.register_fake
def _(
    g_pooled: Tensor, g_weights: Tensor | None, features: Tensor, logits_like: Tensor, weights: Tensor, mean: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(features), weights.new_empty(weights.shape, dtype=logits_like.dtype)


def _row_products(vectors: Tensor, matrices: Tensor) -> Tensor:
    """(B, M) times (B, M, N) in the vectors' dtype. A vector on the right takes a CPU four times as long."""
    products = vectors.new_empty(len(vectors), matrices.shape[2])  # not a view, which an op may not return
    with without_autocast(matrices):
        torch.bmm(vectors[:, None], matrices.to(vectors.dtype), out=products[:, None])
    return products


def _compute_dtype(features: Tensor, logits: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(features.dtype, logits.dtype), torch.float32)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    features, logits = inputs
    _, weights, mean = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mean)
    ctx.save_for_backward(features, logits.new_empty(0), weights, mean)


def _backward(
    ctx: Any, g_pooled: Tensor | None, g_weights: Tensor | None, _: None
) -> tuple[Tensor | None, Tensor | None]:
    if g_pooled is None and g_weights is None:
        return None, None
    features, logits_like, weights, mean = ctx.saved_tensors
    g_pooled = torch.zeros_like(mean) if g_pooled is None else g_pooled
    return _apply_backward(g_pooled, g_weights, features, logits_like, weights, mean)


register_flops(attention_pool_op)
register_flops(attention_pool_backward_op)
_apply = autograd_op(attention_pool_op, _setup_context, _backward)
_apply_backward = refuse_double_backward(attention_pool_backward_op)

# ------------------------------------------------------------------------------------------------------ public function


def attention_pool(features: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of the features of all locations under the softmax of their logits.

    Equivalent to ``weights = logits.softmax(1); pooled = (weights[:, :, None] * features).sum(1)``, in float32.

    Args:
        features: (B, L, C), or (B, C, H, W) in either memory format with L = H * W in row-major order. float32,
            bfloat16, float16 or float64; not copied.
        logits: (B, L), any of these dtypes. A logit of -inf masks its location; a row of nothing else gives NaN.

    Returns:
        ``pooled`` (B, C) in the features' dtype and ``weights`` (B, L) in float32 (float64 if an input is). Both carry
        gradients; a second derivative raises RuntimeError.

    Raises:
        TypeError: an input is no tensor of one of these dtypes.
        ValueError: shapes or devices do not match, or there is no location or channel.

    Deterministic.
    """
    _check(features, logits)
    if features.ndim == 4:
        features = features.permute(0, 2, 3, 1).flatten(1, 2)
    pooled, weights, _ = _apply(features, logits)
    return pooled, weights


def _check(features: Tensor, logits: Tensor) -> None:
    for name, x in (("features", features), ("logits", logits)):
        if not isinstance(x, Tensor) or x.dtype not in FLOATS:
            got = getattr(x, "dtype", type(x).__name__)
            raise TypeError(f"{name} must be a tensor of float32, bfloat16, float16 or float64, got {got}")
        if x.layout != torch.strided:
            raise TypeError(f"{name} must be a dense tensor, got {x.layout}")
    if features.ndim not in (3, 4):
        raise ValueError(f"features must be (B, L, C) or (B, C, H, W), got shape {tuple(features.shape)}")
    batch = features.shape[0]
    locations = features.shape[1] if features.ndim == 3 else features.shape[2] * features.shape[3]
    channels = features.shape[2] if features.ndim == 3 else features.shape[1]
    if logits.ndim != 2 or logits.shape[0] != batch or logits.shape[1] != locations:
        raise ValueError(
            f"logits must be (B, L) = ({batch}, {locations}) for features of shape {tuple(features.shape)}, "
            f"got shape {tuple(logits.shape)}"
        )
    if locations == 0 or channels == 0:
        raise ValueError(f"features must have at least one location and one channel, got shape {tuple(features.shape)}")
    if features.device != logits.device:
        raise ValueError(f"features are on {features.device} but logits on {logits.device}")


class AttentionPool(nn.Module):
    """Pools a feature map by attention whose logits come from a two-layer MLP applied at every location.

    Args:
        channels: C of the features.
        hidden: width of the MLP; by default ``channels``.

    Raises:
        TypeError, ValueError: a width that is no whole number, or below 1.
    """

    def __init__(self, channels: int, hidden: int | None = None):
        super().__init__()
        hidden = channels if hidden is None else hidden
        check_integers(channels=channels, hidden=hidden)
        if channels < 1 or hidden < 1:
            raise ValueError(f"channels and hidden must be positive, got {channels} and {hidden}")
        self.hidden = nn.Linear(channels, hidden)
        self.score = nn.Linear(hidden, 1)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """features (B, C, H, W) -> pooled (B, C), weights (B, H * W)."""
        channels = self.hidden.in_features
        if not isinstance(features, Tensor) or features.ndim != 4 or features.shape[1] != channels:
            got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(f"features must be a tensor (B, {channels}, H, W), got {got}")
        x = features.permute(0, 2, 3, 1).flatten(1, 2)
        logits = self.score(torch.relu(self.hidden(x))).squeeze(-1)
        return attention_pool(x, logits)
