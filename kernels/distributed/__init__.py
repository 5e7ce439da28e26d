"""Contrastive losses whose negatives lie on all ranks of a process group."""

from .losses import PendingKeys, gather_keys, global_clip_loss, global_info_nce, global_ntxent

__all__ = ["PendingKeys", "gather_keys", "global_clip_loss", "global_info_nce", "global_ntxent"]
