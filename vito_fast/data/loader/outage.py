"""Waiting for shards that cannot be reached: a fault of a disk or of the network, which may pass."""

import logging
import threading
import time
from collections.abc import Iterable

log = logging.getLogger("vito_fast.data")

UNREACHABLE = ("missing", "io")
"""Values of ``Read.code`` that say nothing about the data."""
PAUSE = 0.1, 10.0
"""Seconds before the second try, and most before any."""


class Outage:
    """The shards that cannot be reached now, for all workers of a loader.

    A shard is tried again for ``timeout`` seconds from its first failure. After that its samples fail at once, until it
    is read again.
    """

    def __init__(self, timeout: float):
        self._timeout = timeout
        self._since: dict[int, float] = {}
        self._closed = threading.Event()

    def open(self) -> None:
        self._closed.clear()

    def close(self) -> None:
        """Wake all that wait."""
        self._closed.set()

    def over(self, shards: Iterable[int]) -> None:
        """Note shards that were read."""
        for shard in shards if self._since else ():
            self._since.pop(shard, None)

    def wait(self, shards: Iterable[int], attempt: int) -> bool:
        """Pause after a failure of ``shards``. Returns whether to try again."""
        now = time.monotonic()
        left = 0.0
        for shard in shards:
            if shard not in self._since:
                log.warning("shard %d cannot be reached: trying again for %g s", shard, self._timeout)
            left = max(left, self._since.setdefault(shard, now) + self._timeout - now)
        if left <= 0:
            return False
        first, most = PAUSE
        return not self._closed.wait(min(left, most, first * 2.0**attempt))
