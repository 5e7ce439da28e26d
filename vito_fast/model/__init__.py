"""Backbones, attention-pooling heads, and the online and target pair."""

from vito_fast.model.pair import Branch, BranchOutput, VitoModel
from vito_fast.model.resnet import RESNETS, ResNet

__all__ = ["RESNETS", "Branch", "BranchOutput", "ResNet", "VitoModel"]
