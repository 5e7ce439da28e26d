"""Pretraining."""

from vito_fast.train.callbacks import Callback
from vito_fast.train.loop import train

__all__ = ["Callback", "train"]
