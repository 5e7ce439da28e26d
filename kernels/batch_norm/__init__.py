"""Batch norm with the residual sum and ReLU that follow it, as one op."""

from .op import batch_norm

__all__ = ["batch_norm"]
