"""``ClipLoader``: batches of augmented views from a store, equal on every run and for every number of ranks."""

import logging
import os
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vito_fast.config import SamplerConfig
from vito_fast.data.loader.batch import Batch, LoaderSpec, LoaderStats, ThreadPool
from vito_fast.data.loader.sampler import Sampler
from vito_fast.data.store.store import Store
from vito_fast.errors import UserError

log = logging.getLogger("vito_fast.data")

MIN_SAMPLES = 1000
"""The share of failures is taken over at least this many samples."""


class ClipLoader:
    """Iterates over one epoch of batches, and when iterated again over the next.

    Batch b of epoch e on rank r holds the samples ``e * num_clips + b * G + r * B ... + B``, G = B * world_size. A
    sample is a pure function of (seed, number). So batches are equal on every run, for any ``threads`` and
    ``prefetch``, and the ranks' batches together do not depend on the number of ranks. The incomplete last batch of an
    epoch is dropped.

    A sample that cannot be read or decoded is replaced by another clip of the same generator. It is counted in
    ``stats`` and logged by ``vito_fast.data``. A black or wrong frame is never delivered.

    A batch is a dict. All but ``views`` are on the CPU:

    - ``views``: V tensors (B, 3, S, S) channels_last of ``dtype``, normalized. With ``augment=False``: (B, S, S, 3)
      uint8, cropped and flipped only.
    - ``clip``, ``video``, ``sample``: (B,) int64.
    - ``frame``: (B, V) int32, frame numbers of the clip in presentation order.
    - ``time``: (B, V) float64, timestamps in the source in seconds.

    Args:
        store: The store's folder.
        batch_size: Samples per batch **on this rank**.
        seed, rank, world_size: See above.
        sampler: Distribution of the samples. None: the method's.
        augment: Whether to augment color, blur and normalize.
        device: Device of the views, ``cpu`` or ``cuda``. A GPU decodes JPEG by nvJPEG and video by NVDEC.
        dtype: Floating-point type of the views.
        threads: Workers. 0 or None: one per core that this process may use.
        prefetch: Batches prepared ahead of the one in use. Bounds the memory.
        max_bad_share: Share of failed samples (of at least 1000) above which iteration raises UserError.

    Raises:
        UserError: The store cannot be used, or has fewer clips than a global batch.
        ValueError: A number is out of range.

    Its threads end with :meth:`close`, with the loader, or with the interpreter.
    """

    def __init__(
        self,
        store: str | os.PathLike[str],
        batch_size: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        sampler: SamplerConfig | None = None,
        augment: bool = True,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        threads: int | None = 0,
        prefetch: int = 2,
        max_bad_share: float = 0.05,
    ):
        threads = threads or 0
        for name, value, least in (("batch_size", batch_size, 1), ("prefetch", prefetch, 0), ("threads", threads, 0)):
            if value < least:
                raise ValueError(f"{name} is {value}, must be at least {least}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank}, must be from 0 to world_size - 1 = {world_size - 1}")
        if not 0 <= max_bad_share <= 1:
            raise ValueError(f"max_bad_share is {max_bad_share}, must be within 0 and 1")
        if not dtype.is_floating_point:
            raise ValueError(f"dtype is {dtype}, must be a floating-point one")
        threads = threads or len(os.sched_getaffinity(0))
        self.store = Store(store, threads=max(4, threads))
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.prefetch, self.max_bad_share = prefetch, max_bad_share
        self.stats = LoaderStats()
        self._step = 0
        self._iteration = 0  # number of the current iterator; older ones are stale
        self._own: Iterator[dict[str, Any]] | None = None  # the iterator of next(loader)
        self._ahead: deque[Batch] = deque()  # batches of steps self._step, self._step + 1, ...
        if len(self) == 0:
            raise UserError(
                f"{store} has {len(self.store)} clips, fewer than one batch of {batch_size} x {world_size}: "
                "lower batch_size or pack more videos"
            )
        self._spec = LoaderSpec(
            store=self.store,
            sampler=Sampler(self.store.index, sampler, seed),
            device=_with_index(torch.device(device)),
            dtype=dtype,
            augment=augment,
            threads=threads,
            batch_size=batch_size,
        )
        self._pool: ThreadPool[Any] | None = None

    def __len__(self) -> int:
        """Batches per epoch."""
        return len(self.store) // (self.batch_size * self.world_size)

    @property
    def step(self) -> int:
        """Batches delivered since the start of epoch 0."""
        return self._step

    @property
    def epoch(self) -> int:
        """The epoch of the next batch."""
        return self._step // len(self)

    def state_dict(self) -> dict[str, int]:
        """The position. Batches that were prepared but not delivered do not count."""
        return {"step": self._step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to the position of a ``state_dict``. Raises ValueError for anything else."""
        step = state.get("step")
        if not isinstance(step, int) or step < 0:
            raise ValueError(f"state is {state!r}, must be {{'step': batches delivered}}")
        self._drop_ahead()
        self._step = step

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of ``epoch``, unless the position is already within it."""
        if epoch < 0:
            raise ValueError(f"epoch is {epoch}, must be at least 0")
        if epoch != self.epoch:
            self.load_state_dict({"step": epoch * len(self)})

    def numbers(self, step: int) -> npt.NDArray[np.int64]:
        """Global sample numbers, (B,) int64, of this rank's batch ``step``."""
        epoch, batch = divmod(step, len(self))
        first = epoch * len(self.store) + (batch * self.world_size + self.rank) * self.batch_size
        return np.arange(first, first + self.batch_size, dtype=np.int64)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The rest of the current epoch. At its end the position is the start of the next one.

        One iterator at a time: an older one raises RuntimeError once a newer one was made or the position was set.
        """
        self._iteration, self._own = self._iteration + 1, None
        return self._batches(self._iteration)

    def __next__(self) -> dict[str, Any]:
        """The next batch, as DALI's iterators: StopIteration at an epoch's end, and then the next epoch's first."""
        self._own = self._own or iter(self)
        try:
            return next(self._own)
        except StopIteration:
            self._own = None
            raise

    def reset(self) -> None:
        """Go to the start of the next epoch, unless at the start of one, as DALI's iterators."""
        if self._step % len(self):
            self.set_epoch(self.epoch + 1)

    def _batches(self, iteration: int) -> Iterator[dict[str, Any]]:
        for step in range(self._step, (self.epoch + 1) * len(self)):
            if iteration != self._iteration:
                raise RuntimeError("this iterator is stale: its loader was iterated again or moved")
            while len(self._ahead) <= self.prefetch:  # also past the epoch's end, so that the next one begins at once
                self._ahead.append(self._begin(step + len(self._ahead)))
            try:
                batch = self._deliver(self._ahead.popleft())
            except BaseException:
                self._drop_ahead()  # these would follow a step that was not delivered
                raise
            self._step = step + 1
            yield batch
            del batch  # keep no reference: memory holds prefetch batches and the one in use

    def _drop_ahead(self) -> None:
        """Drop the prepared batches. All iterators become stale."""
        self._iteration, self._own = self._iteration + 1, None
        for batch in self._ahead:
            batch.cancel()
        self._ahead.clear()

    def batch(self, step: int) -> dict[str, Any]:
        """Make the batch of any step. The position does not change."""
        return self._deliver(self._begin(step))

    def _begin(self, step: int) -> Batch:
        if self._pool is None:
            self._pool = ThreadPool(self._spec.workers, self._spec.fetcher)
        budget = self.max_bad_share * max(MIN_SAMPLES, self.stats.samples + self.batch_size)
        return Batch(self._spec, self._pool, self.numbers(step), budget)

    def _deliver(self, batch: Batch) -> dict[str, Any]:
        start = time.perf_counter()
        try:
            chunks = batch.wait()
        except BaseException:
            batch.cancel()
            raise
        self.stats.wait_seconds += time.perf_counter() - start
        for chunk in chunks:
            self.stats.add(chunk)
            for failure in chunk.failures:
                log.warning(
                    "sample %d: clip %d (%s) replaced by another: %s: %s",
                    failure.sample, failure.clip, failure.source, failure.code, failure.reason,
                )  # fmt: skip
        allowed = self.max_bad_share * max(MIN_SAMPLES, self.stats.samples)
        if self.stats.failures > allowed or any(chunk.gave_up for chunk in chunks):
            last = self.stats.last_failures[-1]
            raise UserError(
                f"{self.stats.failures} failures in {self.stats.samples} samples of {self.store.path}, more than "
                f"max_bad_share = {self.max_bad_share} allows; the last: clip {last.clip} ({last.source}): "
                f"{last.code}: {last.reason}; see `vito-fast inspect-store {self.store.path}`"
            )
        return batch.finish(chunks)

    def close(self) -> None:
        """End the threads. Iterating starts them again."""
        self._drop_ahead()
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def __enter__(self) -> "ClipLoader":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _with_index(device: torch.device) -> torch.device:
    """This thread's GPU by its index. In the workers' threads, a bare ``cuda`` would be GPU 0."""
    if device.type != "cuda" or device.index is not None or not torch.cuda.is_available():
        return device
    return torch.device("cuda", torch.cuda.current_device())
