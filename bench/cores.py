"""Whether the cores that PyTorch's threads run on share a cache, which on a virtual machine changes from second to
second.

Its host moves virtual cores about. Two of them share a third-level cache at one time and have one each at another: a
cache line goes from core to core in 30 ns or in 190 ns (EPYC 9004, measured by two threads that toss one to and
fro). Where they are apart, a bare copy runs 1.5 times as fast, for it has two caches, and LARS, whose threads read what
others wrote, takes twice as long; losses against their reference move by 5 to 10 %. With rounds of either kind mixed
as they come, no number of them makes two runs agree; among rounds of one kind, medians of any twenty seconds do
within 4 %.
"""

from __future__ import annotations

import statistics
import time

import torch

CHUNK = 32768  # elements: what PyTorch gives a thread at least, and the most that it gives to one alone
APART = 1.45  # times as long: 1.0 to 1.3 were seen where cores share a cache, 1.6 to 3.5 where not
PAUSE = 0.1  # seconds


class Cores:
    """Waits up to ``patience`` seconds in all for cores that share a cache, which sleeping threads get back soon: after
    0.1 to 4 s, where threads that compute may be apart for a minute.
    """

    def __init__(self, patience: float) -> None:
        self.patience, self.waited = patience, 0.0
        self._shared = torch.zeros(torch.get_num_threads() * CHUNK)

    def together(self) -> bool:
        """Whether to write what another thread has just written takes hardly longer than to write it again."""
        others = self._shared[CHUNK:].split(CHUNK)
        return all(self._distance(other) < APART for other in others)

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

    def gather(self) -> bool:
        """``together()``, after a wait for it if need be."""
        start = time.perf_counter()
        while not (found := self.together()) and self.waited + time.perf_counter() - start < self.patience:
            time.sleep(PAUSE)
        if (taken := time.perf_counter() - start) > PAUSE:
            self.waited += taken
        return found
