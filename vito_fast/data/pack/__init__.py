"""Packing videos into a store."""

from vito_fast.data.pack.clips import LabeledSpan, Span
from vito_fast.data.pack.pack import pack

__all__ = ["LabeledSpan", "Span", "pack"]
