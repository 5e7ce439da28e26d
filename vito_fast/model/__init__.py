"""Backbones, attention-pooling heads, and the online and target pair."""

from vito_fast.model.backbones import RESNETS, ResNet
from vito_fast.model.pair import Branch, BranchOutput, VitoModel

__all__ = ["RESNETS", "Branch", "BranchOutput", "ResNet", "VitoModel"]
