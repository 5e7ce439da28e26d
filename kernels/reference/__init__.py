"""The specification of every op: plain PyTorch, the same names and arguments, differentiable, any float dtype."""

from .batch_norm import batch_norm
from .contrastive import (
    clip_loss,
    info_nce,
    lit_loss,
    moco_loss,
    multi_view_info_nce,
    normalize,
    ntxent,
    similarity_lse,
    supcon_loss,
)
from .photometric import photometric
from .pooling import attention_pool

__all__ = [
    "attention_pool",
    "batch_norm",
    "clip_loss",
    "info_nce",
    "lit_loss",
    "moco_loss",
    "multi_view_info_nce",
    "normalize",
    "ntxent",
    "photometric",
    "similarity_lse",
    "supcon_loss",
]
