"""The training loader: a store in, batches of augmented views out."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vito_fast.data.loader.loader import ClipLoader

__all__ = ["ClipLoader"]


def __getattr__(name: str) -> Any:
    if name == "ClipLoader":  # loads torch, which packing does not need for the sampler
        from vito_fast.data.loader.loader import ClipLoader

        return ClipLoader
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
