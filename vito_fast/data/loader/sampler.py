"""What each training sample is: clip, frames, crops, flips and colours, as a pure function of (seed, number, attempt).

There is no state: sample ``n`` is the same on every rank, in every order and after every restart, so the position in
the data is one integer. Random bits come from Philox4x32-10, the order of an epoch from a Feistel shuffle
(csrc/sampler.hpp).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from vito_fast.data.store.index import Index, exact_array
from vito_fast.native import sampler as _sampler

MAX_VIEWS = 4


@dataclass(frozen=True)
class SamplerConfig:
    """How samples are drawn. A value that makes no sense raises ``ValueError`` naming field and value.

    Provenance: *paper* is VITO (arXiv 2210.06433) as recalled, *ancestor* the public code of BYOL and DetCon.
    """

    size: int = 224
    """Side of a view in pixels, after the crop is resized (ancestor)."""
    views: int = 2
    """Views a clip, 1 to 4 (paper: 2)."""
    window: float = 2.56
    """Seconds within which a clip's views lie (paper, recalled); 0 = all views are one frame (the MoCLR baseline)."""
    area: tuple[float, float] = (0.4, 1.0)
    """Area of a crop as a share of the frame, uniform (lower bound: paper, recalled; ancestor: 0.08)."""
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    """Width / height of a crop, log-uniform (ancestor)."""
    flip: float = 0.5
    """Probability of a horizontal flip (ancestor)."""
    jitter: float = 0.8
    """Probability of the four colour changes, in random order (ancestor)."""
    brightness: float = 0.4
    """Largest shift (ancestor)."""
    contrast: float = 0.4
    """Largest change of the factor 1 (ancestor)."""
    saturation: float = 0.2
    """Largest change of the factor 1 (ancestor)."""
    hue: float = 0.1
    """Largest shift in turns (ancestor)."""
    grey: float = 0.2
    """Probability of losing colour (ancestor)."""
    sigma: tuple[float, float] = (0.1, 2.0)
    """Standard deviation of the blur in pixels of the view, uniform (ancestor)."""
    blur: tuple[float, ...] = (1.0, 0.1)
    """Probability of blur in each view; the last repeats (ancestor)."""
    solarise: tuple[float, ...] = (0.0, 0.2)
    """Probability of solarising at 0.5 in each view; the last repeats (ancestor)."""

    def __post_init__(self) -> None:
        for name in ("size", "views"):
            self._check(
                name, isinstance(getattr(self, name), int) and getattr(self, name) >= 1, "an integer of at least 1"
            )
        self._check("views", self.views <= MAX_VIEWS, f"at most {MAX_VIEWS}")
        for name in ("window", "brightness"):
            self._check(name, _within(getattr(self, name), 0, math.inf), "finite and at least 0")
        for name in ("flip", "jitter", "grey", "contrast", "saturation"):
            self._check(name, _within(getattr(self, name), 0, 1), "within 0 and 1")
        self._check("hue", _within(self.hue, 0, 0.5), "within 0 and 0.5 turns")
        self._check("area", _is_range(self.area) and self.area[0] > 0 and self.area[1] <= 1, "a range within (0, 1]")
        self._check(
            "aspect",
            _is_range(self.aspect) and self.aspect[0] >= 1e-3 and self.aspect[1] <= 1e3,
            "a range within 0.001 and 1000",
        )
        self._check("sigma", _is_range(self.sigma) and self.sigma[0] > 0, "a range above 0")
        for name in ("blur", "solarise"):
            values = getattr(self, name)
            good = 1 <= len(values) <= MAX_VIEWS and all(_within(value, 0, 1) for value in values)
            self._check(name, good, f"1 to {MAX_VIEWS} probabilities within 0 and 1")

    def _check(self, name: str, good: bool, rule: str) -> None:
        if not good:
            raise ValueError(f"sampler.{name} is {getattr(self, name)!r}, must be {rule}")

    def native(self) -> dict[str, object]:
        """What the C++ sampler takes: the aspect ratio's logarithm, and one probability for each possible view."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("size", "aspect")}
        values["log_aspect"] = (math.log(self.aspect[0]), math.log(self.aspect[1]))
        for name in ("blur", "solarise"):
            values[name] = [values[name][min(view, len(values[name]) - 1)] for view in range(MAX_VIEWS)]
        return values


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
        self._native = _sampler.Sampler(index.native, self.config.native(), seed)

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


def _within(value: float, low: float, high: float) -> bool:
    return isinstance(value, (int, float)) and low <= value <= high and math.isfinite(value)


def _is_range(value: tuple[float, float]) -> bool:
    return len(value) == 2 and all(_within(v, 0, math.inf) for v in value) and value[0] <= value[1]
