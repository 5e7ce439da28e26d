"""Packing videos into a store."""

from vito_fast.data.pack.clips import Span, TimeSpan
from vito_fast.data.pack.pack import pack

__all__ = ["Span", "TimeSpan", "pack"]
