"""Attention pooling: a softmax over the locations of a feature map, and the weighted sum of its features."""

import torch
from torch import Tensor, nn

from .reference import pooling


def attention_pool(features: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`vito_kernels.reference.attention_pool`."""
    return pooling.attention_pool(features, logits)


class AttentionPool(nn.Module):
    """Pools a feature map by attention whose logits come from a two-layer MLP applied at every location.

    Args:
        channels: C of the features.
        hidden: width of the MLP; by default ``channels``.
    """

    def __init__(self, channels: int, hidden: int | None = None):
        super().__init__()
        hidden = hidden or channels
        self.hidden = nn.Linear(channels, hidden)
        self.score = nn.Linear(hidden, 1)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """features (B, C, H, W) -> pooled (B, C), weights (B, H * W)."""
        x = features.permute(0, 2, 3, 1).flatten(1, 2)
        logits = self.score(torch.relu(self.hidden(x))).squeeze(-1)
        return attention_pool(x, logits)
