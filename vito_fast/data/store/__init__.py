"""Reading a store: its description, index, packets and frames. Nothing here imports packing or torch."""

from vito_fast.data.store.description import PackOptions, Report
from vito_fast.data.store.store import Store, frames

__all__ = ["PackOptions", "Report", "Store", "frames"]
