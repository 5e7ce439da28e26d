"""Specification of attention pooling in plain PyTorch."""

import torch
from torch import Tensor


def attention_pool(features: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted mean over all locations: ``weights = softmax(logits)``, ``pooled = sum_l weights_l features_l``.

    Args:
        features: (B, L, C), or (B, C, H, W) with L = H * W in row-major order.
        logits: (B, L), one score per location.

    Returns:
        ``pooled`` (B, C) in the features' dtype and ``weights`` (B, L). Softmax and sum run in float32, or in float64
        if either input is float64; the weights keep that dtype.
    """
    if features.ndim == 4:
        features = features.flatten(2).transpose(1, 2)
    dtype = torch.promote_types(torch.promote_types(features.dtype, logits.dtype), torch.float32)
    weights = torch.softmax(logits.to(dtype), dim=1)
    pooled = torch.einsum("bl,blc->bc", weights, features.to(dtype))
    return pooled.to(features.dtype), weights
