"""Fused contrastive-learning kernels; see ``vito_kernels.reference`` for their specification."""

from .attention_pool import AttentionPool, attention_pool
from .photometric import photometric

__all__ = ["AttentionPool", "attention_pool", "photometric"]
