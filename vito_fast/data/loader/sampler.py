"""What each training sample is: clip, frames, crops, flips and colours, as a pure function of (seed, number, attempt).

There is no state: sample ``n`` is the same on every rank, in every order and after every restart, so the position in
the data is one integer. Random bits come from Philox4x32-10, the order of an epoch from a Feistel shuffle
(csrc/sampler.hpp).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from vito_fast.config import MAX_VIEWS, SamplerConfig
from vito_fast.data.store.index import Index, exact_array
from vito_fast.native import sampler as _sampler


class Samples(NamedTuple):
    """B samples of V views."""

    clip: npt.NDArray[np.int64]
    """(B,)"""
    video: npt.NDArray[np.int64]
    """(B,) number of the clip's source video."""
    frame: npt.NDArray[np.int32]
    """(B, V) in presentation order."""
    time: npt.NDArray[np.float64]
    """(B, V) the frame's own timestamp in seconds: ``index.times(clip)[frame]``."""
    crop: npt.NDArray[np.int32]
    """(B, V, 4) y, x, height, width in pixels of the decoded frame, before its rotation."""
    flip: npt.NDArray[np.uint8]
    """(B, V)"""
    params: npt.NDArray[np.float32]
    """(B, V, 8) the columns of ``vito_kernels.photometric``."""


class Sampler:
    """Samples by number. Pure and thread-safe; the GIL is released while it works.

    Number ``n`` is position ``n % num_clips`` of epoch ``n // num_clips``; every epoch visits each clip once, in an
    order of its own. ``attempt`` a > 0 replaces a sample that could not be read by another clip, with other parameters:
    the attempts 0 .. num_clips - 1 of one number visit every clip once.

    Raises ``ValueError`` for an empty index or a seed outside [0, 2^64).
    """

    def __init__(self, index: Index, config: SamplerConfig | None = None, seed: int = 0):
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed is {seed}, must be within 0 and 2^64 - 1")
        self.config = config or SamplerConfig()
        self.seed = seed
        self._native = _sampler.Sampler(index.native, _native(self.config), seed)

    def sample(self, numbers: npt.ArrayLike, attempt: npt.ArrayLike = 0) -> Samples:
        """Samples of ``numbers``, (B,) integers >= 0; ``attempt`` is one for all, or (B,).

        Raises ``ValueError`` for negative or fractional numbers and for a corrupt index.
        """
        return Samples(*self._native.sample(*self._arguments(numbers, attempt)))

    def clips(self, numbers: npt.ArrayLike, attempt: npt.ArrayLike = 0) -> npt.NDArray[np.int64]:
        """Only the clips of ``sample``, (B,): no access to the index."""
        return self._native.clips(*self._arguments(numbers, attempt))

    @staticmethod
    def _arguments(
        numbers: npt.ArrayLike, attempt: npt.ArrayLike
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint32]]:
        checked = exact_array(numbers, "int64", "numbers")
        attempts = exact_array(attempt, "uint32", "attempt")
        if attempts.ndim == 0:
            attempts = np.full(checked.shape, attempts, np.uint32)
        return checked, attempts


def _native(config: SamplerConfig) -> dict[str, object]:
    """The C++ sampler's configuration: logarithms of the aspect ratio, and one probability for each possible view."""
    low, high = config.crop_aspect

    def per_view(values: tuple[float, ...]) -> list[float]:
        return [values[min(view, len(values) - 1)] for view in range(MAX_VIEWS)]

    return {
        "views": config.views,
        "window": config.frame_window,
        "area": config.crop_area,
        "log_aspect": (math.log(low), math.log(high)),
        "flip": config.flip,
        "jitter": config.jitter,
        "brightness": config.brightness,
        "contrast": config.contrast,
        "saturation": config.saturation,
        "hue": config.hue,
        "grey": config.grayscale,
        "sigma": config.blur_sigma,
        "blur": per_view(config.blur),
        "solarise": per_view(config.solarize),
    }
