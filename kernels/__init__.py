"""Fused contrastive-learning kernels; see ``vito_kernels.reference`` for their specification."""

from . import reference
from ._core.autograd import register_flop_formulas
from .attention_pool import AttentionPool, attention_pool
from .batch_norm.op import batch_norm
from .contrastive.info_nce import info_nce, similarity_lse
from .contrastive.losses import (
    CLIPLoss,
    CrossBatchMemory,
    InfoNCELoss,
    LiTLoss,
    MoCoLoss,
    NTXentLoss,
    SupConLoss,
    lit_loss,
    matryoshka_loss,
    moco_loss,
)
from .contrastive.multi_view import multi_view_info_nce
from .contrastive.normalize import normalize
from .contrastive.siglip import siglip_loss
from .contrastive.supcon import supcon_loss
from .contrastive.topk import topk_accuracy
from .contrastive.two_sided import clip_loss, ntxent
from .lars import FusedLars
from .photometric.op import photometric

__version__ = "0.1.0"

__all__ = [
    "AttentionPool",
    "CLIPLoss",
    "CrossBatchMemory",
    "FusedLars",
    "InfoNCELoss",
    "LiTLoss",
    "MoCoLoss",
    "NTXentLoss",
    "SupConLoss",
    "attention_pool",
    "batch_norm",
    "clip_loss",
    "info_nce",
    "lit_loss",
    "matryoshka_loss",
    "moco_loss",
    "multi_view_info_nce",
    "normalize",
    "ntxent",
    "photometric",
    "reference",
    "register_flop_formulas",
    "siglip_loss",
    "similarity_lse",
    "supcon_loss",
    "topk_accuracy",
]
