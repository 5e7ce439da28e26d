"""Video data: packing into a store, reading a store, and the training loader.

- :func:`vito_fast.data.pack.pack` writes a store.
- :class:`Store` and :func:`frames` read one.
- :class:`ClipLoader` makes training batches from one.

Names load on first use, so that a packing process does not load torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vito_fast.config import SamplerConfig
    from vito_fast.data.loader.loader import ClipLoader
    from vito_fast.data.store.description import Report
    from vito_fast.data.store.store import Store, frames

__all__ = ["ClipLoader", "Report", "SamplerConfig", "Store", "frames"]

_MODULES = {
    "ClipLoader": "vito_fast.data.loader.loader",
    "Report": "vito_fast.data.store.description",
    "SamplerConfig": "vito_fast.config",
    "Store": "vito_fast.data.store.store",
    "frames": "vito_fast.data.store.store",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
