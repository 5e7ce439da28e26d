"""Several stores in one run: which store a sample comes from, and its number there, by arithmetic alone."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from vito_fast.native import sampler as _sampler

Numbers = npt.NDArray[np.int64]

PERIOD = 10_000
"""Samples in which each store has its exact share. Weights are met to half of 1 / PERIOD."""


class Mixture:
    """Shares out sample numbers among stores. A pure function of the seed and the number.

    Of each ``PERIOD`` numbers, the store s has a fixed count, at places that a shuffle of the period draws. So the
    number of a sample within its store is known without a look at the others.

    Args:
        weights: One of each store, above 0. They need not sum to 1.
        seed: Of the shuffle.

    Raises:
        ValueError: A weight is not above 0, or below a share of half of 1 / ``PERIOD``.
    """

    def __init__(self, weights: Sequence[float], seed: int):
        for weight in weights:
            if not 0 < weight < float("inf"):
                raise ValueError(f"a weight is {weight}, must be above 0 and finite")
        ends = np.rint(np.cumsum(weights) / np.sum(weights) * PERIOD).astype(np.int64)
        self._starts = np.concatenate([[0], ends[:-1]])
        self.counts = ends - self._starts
        """Samples of each store in a period."""
        if not self.counts.min():
            raise ValueError(f"weight {weights[int(self.counts.argmin())]} is less than 1 / {PERIOD} of all weights")
        self._seed = seed

    def assign(self, numbers: Numbers) -> tuple[Numbers, Numbers]:
        """The store of each sample, (B,), and the sample's number in that store, (B,)."""
        periods, slots = np.divmod(numbers, PERIOD)
        places = np.empty_like(slots)
        for period in np.unique(periods):
            rows = periods == period
            places[rows] = _sampler.shuffled(PERIOD, self._seed, int(period), np.ascontiguousarray(slots[rows]))
        stores = np.searchsorted(self._starts, places, "right") - 1
        return stores, periods * self.counts[stores] + places - self._starts[stores]
