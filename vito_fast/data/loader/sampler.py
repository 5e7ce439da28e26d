"""The clip, frames, crops, flips and colors of each training sample: a pure function of (seed, number, attempt).

There is no state. Sample ``n`` is the same on every rank, in every order and after every restart, so the position in
the data is one integer. Random bits come from Philox4x32-10, the order of an epoch from a Feistel shuffle
(csrc/sampler.hpp).
"""

from __future__ import annotations

import math
from dataclasses import replace
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
    """(B, V) timestamps of the frames in seconds: ``index.times(clip)[frame]``."""
    crop: npt.NDArray[np.int32]
    """(B, V, 4) y, x, height, width in pixels of the decoded frame, before its rotation."""
    flip: npt.NDArray[np.uint8]
    """(B, V)"""
    params: npt.NDArray[np.float32]
    """(B, V, P) the columns ``vito_kernels.photometric.PARAMS``."""


def empty_samples(batch: int, views: int) -> Samples:
    """Zeroed samples, to be filled in by row."""
    return Samples(
        clip=np.zeros(batch, np.int64),
        video=np.zeros(batch, np.int64),
        frame=np.zeros((batch, views), np.int32),
        time=np.zeros((batch, views)),
        crop=np.zeros((batch, views, 4), np.int32),
        flip=np.zeros((batch, views), np.uint8),
        params=np.zeros((batch, views, len(_sampler.PARAMS)), np.float32),
    )


class Sampler:
    """Draws samples by number. Pure and thread-safe. Releases the GIL while it works.

    Number ``n`` is position ``n % num_clips`` of epoch ``n // num_clips``. Every epoch visits each clip once, in an
    order of its own.

    Args:
        index: The store's index.
        config: Distribution of the samples. None: the method's.
        seed: 0 to 2^64 - 1.
        chosen: Numbers of the clips to draw, at least one. None: all.

    Raises:
        ValueError: The index or ``chosen`` is empty, or a number is out of range.
    """

    def __init__(
        self, index: Index, config: SamplerConfig | None = None, seed: int = 0, chosen: npt.ArrayLike | None = None
    ):
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed is {seed}, must be within 0 and 2^64 - 1")
        self.config = config or SamplerConfig()
        self.seed = seed
        clips = exact_array([] if chosen is None else chosen, "int64", "chosen")
        if chosen is not None and not clips.size:
            raise ValueError("chosen is empty, must have a clip")
        self._native = _sampler.Sampler(index.native, _native_config(self.config), seed, clips)

    @property
    def num_clips(self) -> int:
        """Clips to draw, and samples of an epoch."""
        return self._native.num_clips

    @property
    def views(self) -> int:
        """Frames of a sample."""
        return self.config.views

    def sample(self, numbers: npt.ArrayLike, attempt: npt.ArrayLike = 0) -> Samples:
        """Draw samples.

        Args:
            numbers: (B,) integers, 0 or more.
            attempt: One integer for all, or (B,). An attempt above 0 replaces a sample that could not be read by
                another clip, with other parameters. Attempts 0 to num_clips - 1 of a number visit every clip once.

        Raises:
            ValueError: A number is negative or no integer, or the index is corrupt.
        """
        return Samples(*self._native.sample(*_arguments(numbers, attempt)))

    def clips(self, numbers: npt.ArrayLike, attempt: npt.ArrayLike = 0) -> npt.NDArray[np.int64]:
        """Only the clips of :meth:`sample`, (B,). Does not read the index."""
        return self._native.clips(*_arguments(numbers, attempt))


class SequenceSampler(Sampler):
    """Draws frames at even distances, with one crop, flip and color of all frames of a sample.

    The first frame is that of a sampler of one view, or earlier, so that the sequence fits its clip. In a clip that is
    too short, the last frame repeats.

    Args:
        index, config, seed, chosen: As of :class:`Sampler`. ``config.views`` is ignored.
        frames: T, frames of a sample.
        stride: Distance of neighbors in frames.

    Raises:
        ValueError: ``frames`` or ``stride`` is below 1, or as of :class:`Sampler`.
    """

    def __init__(
        self,
        index: Index,
        config: SamplerConfig | None,
        seed: int,
        chosen: npt.ArrayLike | None = None,
        *,
        frames: int,
        stride: int,
    ):
        for name, value in (("frames", frames), ("stride", stride)):
            if value < 1:
                raise ValueError(f"{name} is {value}, must be at least 1")
        super().__init__(index, replace(config or SamplerConfig(), views=1), seed, chosen)
        self._index, self._steps = index, np.arange(frames, dtype=np.int64) * stride

    @property
    def views(self) -> int:
        return len(self._steps)

    def sample(self, numbers: npt.ArrayLike, attempt: npt.ArrayLike = 0) -> Samples:
        drawn = super().sample(numbers, attempt)
        lasts = np.array([self._index.clip(int(clip)).num_frames - 1 for clip in drawn.clip])[:, None]
        first = np.clip(drawn.frame, 0, np.maximum(lasts - self._steps[-1], 0))
        frame = np.minimum(first + self._steps, lasts).astype(np.int32)
        time = np.stack([self._index.times(int(clip))[row] for clip, row in zip(drawn.clip, frame, strict=True)])
        each = {name: getattr(drawn, name).repeat(self.views, axis=1) for name in ("crop", "flip", "params")}
        return Samples(clip=drawn.clip, video=drawn.video, frame=frame, time=time, **each)


def _arguments(numbers: npt.ArrayLike, attempt: npt.ArrayLike) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint32]]:
    checked = exact_array(numbers, "int64", "numbers")
    attempts = exact_array(attempt, "uint32", "attempt")
    if attempts.ndim == 0:
        attempts = np.full(checked.shape, attempts, np.uint32)
    return checked, attempts


def _native_config(config: SamplerConfig) -> dict[str, object]:
    """The C++ sampler's configuration: the aspect ratio's logarithm, and one probability for each possible view."""
    elsewhere = ("size", "crop_aspect", "crop_fit", "small_crops", "small_size", "small_area")
    values = {name: value for name, value in vars(config).items() if name not in elsewhere}
    values["crop_retry"] = config.crop_fit == "retry"
    values["log_aspect"] = tuple(math.log(ratio) for ratio in config.crop_aspect)
    for name in ("blur", "solarize"):
        values[name] = [values[name][min(view, len(values[name]) - 1)] for view in range(MAX_VIEWS)]
    return values
