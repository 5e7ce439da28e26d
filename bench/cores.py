"""Whether PyTorch's threads have a core each, to themselves, and share a cache, which on a virtual machine changes from
second to second.

Its host moves virtual cores about, and no counter tells:

- Two of them share a third-level cache at one time and have one each at another: a cache line goes from core to core in
  30 ns or in 190 ns (EPYC 9004, measured by two threads that toss one to and fro). Where they are apart, a bare copy
  runs 1.5 times as fast, for it has two caches, and LARS, whose threads read what others wrote, takes twice as long;
  losses against their reference move by 5 to 18 %.
- Two of them are the two hardware threads of one core, or have a neighbour there: exponentials take 1.3 to 2 times as
  long, matrix products 1.15, and losses against their reference move by 5 to 20 %.

With rounds of all kinds mixed as they come, no number of them makes two runs agree; among those that nothing disturbs,
medians of any twenty seconds do within 4 %. Threads that sleep are soon put beside one cache, after 0.1 to 4 s, and
those that compute are soon given a core each: a wait is the one or the other, and hardly ever takes a second.
"""

from __future__ import annotations

import math
import statistics
import time

import torch

CHUNK = 32768  # elements: what PyTorch gives a thread at least, and the most that it gives to one alone
APART = 1.45  # times as long: 1.0 to 1.3 were seen where cores share a cache, 1.6 to 3.5 where not
CROWDED = 1.2  # times as long: up to 1.13 was seen on a core of its own, 1.3 to 2.1 on a shared one
PAUSE = 0.03  # seconds
A_RACE = 2.0  # seconds of patience for one race, so that the first do not use up that of all


class Cores:
    """Waits up to ``patience`` seconds in all for cores that nothing disturbs."""

    def __init__(self, patience: float) -> None:
        self.patience, self.waited = patience, 0.0
        self._shared = torch.zeros(torch.get_num_threads() * CHUNK)
        self._zeros, self._ones = torch.zeros_like(self._shared), torch.zeros_like(self._shared)
        self._fastest, self._nearest = math.inf, math.inf
        self.start_race()
        for _ in range(60):  # of threads that compute, which hardly ever share a core for two seconds
            self._compute()
            self.together()
            self.alone()

    def start_race(self) -> None:
        """Patience for one more race."""
        self._left = min(A_RACE, self.patience - self.waited)

    def undisturbed(self) -> bool:
        return self.together() and self.alone()

    def together(self) -> bool:
        """Whether to write what another thread has just written takes hardly longer than to write it again, or than it
        ever did: many processors have a cache for every few cores.
        """
        farthest = max(map(self._distance, self._shared[CHUNK:].split(CHUNK)), default=1.0)
        self._nearest = min(self._nearest, farthest)
        return farthest < max(APART, CROWDED * self._nearest)

    def alone(self) -> bool:
        """Whether arithmetic takes hardly longer than the fastest that was seen, which needs a whole core each."""
        times = []
        for _ in range(7):
            start = time.perf_counter()
            torch.exp(self._zeros, out=self._ones)  # MKL's, by all threads
            times.append(time.perf_counter() - start)
        self._fastest = min(self._fastest, *times)
        return min(times) < CROWDED * self._fastest

    def _distance(self, other: torch.Tensor) -> float:
        first, again = [], []
        for _ in range(15):
            self._shared.add_(1)  # every thread its chunk
            start = time.perf_counter()
            other.add_(1)
            middle = time.perf_counter()
            other.add_(1)
            first.append(middle - start)
            again.append(time.perf_counter() - middle)
        return statistics.median(first) / statistics.median(again)

    def _compute(self) -> None:
        until = time.perf_counter() + PAUSE
        while time.perf_counter() < until:
            torch.exp(self._zeros, out=self._ones)

    def gather(self) -> bool:
        """``undisturbed()``, after a wait for it if need be."""
        start = time.perf_counter()
        while not (found := self.undisturbed()) and time.perf_counter() - start < self._left:
            if self.together():
                self._compute()
            else:
                time.sleep(PAUSE)
        if (taken := time.perf_counter() - start) > PAUSE:
            self.bear(taken)
        return found

    def bear(self, seconds: float) -> bool:
        """Takes these seconds, which were in vain, from the patience; False if none is left."""
        if self._left <= 0:
            return False
        self.waited += seconds
        self._left -= seconds
        return self._left > 0
