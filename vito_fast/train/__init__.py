"""Pretraining."""

from vito_fast.train.loop import train

__all__ = ["train"]
