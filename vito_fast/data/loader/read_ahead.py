"""Reading ahead from remote stores: the sampler says which blocks the coming batches need."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial

import numpy as np
import numpy.typing as npt

from vito_fast.data.loader.batch import LoaderSpec, ThreadPool
from vito_fast.data.store.remote_store import RemoteReader

STEPS = 4
"""Batches beyond those that have begun."""
SHARE = 1 / 32
"""Of the cache at most, for all of them."""

Numbers = npt.NDArray[np.int64]


class ReadAhead:
    """Fetches the blocks of coming batches in one thread, so that the workers find them in the cache.

    Args:
        spec: The loader's.
    """

    def __init__(self, spec: LoaderSpec):
        self._spec = spec
        remotes = [store.remote for store in spec.stores if store.remote]
        samples = spec.batch_size * spec.samplers[0].views
        self._steps = min((remote.room(SHARE, samples, STEPS) for remote in remotes), default=0)
        self._pool = ThreadPool(1, lambda: None) if self._steps else None
        self._queue: deque[tuple[int, Future[None]]] = deque()

    def begin(self, step: int, numbers: Callable[[int], Numbers]) -> None:
        """Note that the batch of ``step`` begins: the next ones are fetched, and no others.

        Args:
            numbers: The sample numbers of a step on this rank.
        """
        if self._pool is None:
            return
        while self._queue and not step < self._queue[0][0] <= step + self._steps:
            self._queue.popleft()[1].cancel()
        first = self._queue[-1][0] if self._queue else step
        for each in range(first + 1, step + self._steps + 1):
            self._queue.append((each, self._pool.submit(partial(_fetch, self._spec, numbers(each)))))

    def close(self) -> None:
        """End the thread."""
        if self._pool is not None:
            self._pool.close()


def _fetch(spec: LoaderSpec, numbers: Numbers, _: None) -> None:
    sources, own = spec.mixture.assign(numbers) if spec.mixture else (np.zeros_like(numbers), numbers)
    for source, (store, sampler) in enumerate(zip(spec.stores, spec.samplers, strict=True)):
        rows = own[sources == source]
        if not isinstance(store.reader, RemoteReader) or not len(rows):
            continue
        try:
            drawn = sampler.sample(rows)
        except ValueError:  # a corrupt entry; the fetcher reports it
            continue
        store.reader.prefetch(drawn.clip, drawn.frame, single_stream=spec.on_gpu)
