"""Pretraining."""

from vito_fast.train.loop import train
from vito_fast.train.run import Callback

__all__ = ["Callback", "train"]
