"""Packing videos into a store."""

from vito_fast.data.pack.pack import pack
from vito_fast.data.store.description import Report

__all__ = ["Report", "pack"]
