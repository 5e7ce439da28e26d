"""Video in, training views out: packing (:mod:`.pack`), the store (:mod:`.store`) and :class:`ClipLoader`.

``ClipLoader``, ``Store``, ``frames`` and ``SamplerConfig`` are loaded when first asked for, so that a packing
process does not load torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vito_fast.data.loader.loader import ClipLoader
    from vito_fast.data.loader.sampler import SamplerConfig
    from vito_fast.data.pack.pack import Report
    from vito_fast.data.store.store import Store, frames

__all__ = ["ClipLoader", "Report", "SamplerConfig", "Store", "frames"]

_HOMES = {
    "ClipLoader": "loader.loader",
    "Report": "pack.pack",
    "SamplerConfig": "loader.sampler",
    "Store": "store.store",
    "frames": "store.store",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"vito_fast.data.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
