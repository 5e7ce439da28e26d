"""Contrastive losses and batch norm over all ranks of a process group."""

from .losses import (
    PendingKeys,
    gather_keys,
    global_clip_loss,
    global_info_nce,
    global_multi_view_info_nce,
    global_ntxent,
    global_siglip_loss,
    global_supcon_loss,
)
from .sync_batch_norm import sync_batch_norm

__all__ = [
    "PendingKeys",
    "gather_keys",
    "global_clip_loss",
    "global_info_nce",
    "global_multi_view_info_nce",
    "global_ntxent",
    "global_siglip_loss",
    "global_supcon_loss",
    "sync_batch_norm",
]
