"""Encoders under evaluation: always in eval mode, their buffers untouched."""

import dataclasses

import torch
from torch import nn

from vito_fast.evaluate.result import Encoded


@dataclasses.dataclass
class Encoder:
    """A network and its identity."""

    backbone: nn.Module
    """(B,3,H,W) -> features of its stages, finest first."""
    record: Encoded
    device: torch.device
