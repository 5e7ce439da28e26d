"""Fused contrastive-learning kernels; see ``vito_kernels.reference`` for their specification."""

from . import reference
from .attention_pool import AttentionPool, attention_pool
from .info_nce import info_nce, similarity_lse
from .photometric import photometric

__all__ = ["AttentionPool", "attention_pool", "info_nce", "photometric", "reference", "similarity_lse"]
