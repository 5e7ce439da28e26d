"""``ClipLoader``: batches of augmented views from a store, the same on every run and for every number of ranks."""

import atexit
import contextlib
import functools
import os
import queue
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from vito_fast.data.fetch import Fetcher
from vito_fast.data.sampler import SamplerConfig
from vito_fast.data.store import Store
from vito_fast.errors import UserError

Batch = dict[str, Any]


@dataclass
class LoaderStats:
    """Counters since the loader was made; times in seconds."""

    samples: int = 0
    """Samples made."""
    failures: int = 0
    """Samples that could not be read or decoded, each replaced by another clip."""
    reasons: dict[str, int] = field(default_factory=dict)
    """Failures by kind."""
    bytes_read: int = 0
    packets: int = 0
    """Packets decoded."""
    frames: int = 0
    """Distinct frames used of them."""
    read_seconds: float = 0.0
    decode_seconds: float = 0.0
    augment_seconds: float = 0.0
    wait_seconds: float = 0.0
    """How long the consumer waited for batches."""


class ClipLoader:
    """An iterable over one epoch of batches, and again over the next.

    Batch b of epoch e on rank r holds the samples ``e * num_clips + b * G + r * B ... + B`` (G = B * world_size) of the
    sampler, which is a pure function of (seed, number): so batches are the same on every run, and their union over the
    ranks does not depend on their number. The incomplete last batch of an epoch is dropped. A sample that cannot be
    read or decoded is replaced by another clip of the same generator, counted, and logged.

    A batch is a dict: ``views``, a tuple of V tensors (B, 3, S, S) channels_last of ``dtype``, normalised
    (``augment=False``: (B, S, S, 3) uint8, the geometry alone); ``clip`` (B,) int64; ``video`` (B,) int64; ``frame``
    (B, V) int32, in presentation order; ``time`` (B, V) float64 seconds; ``sample`` (B,) int64. All but ``views`` are
    on the CPU.

    Args:
        store: the store's folder.
        batch_size: samples a batch **on this rank**.
        seed, rank, world_size: see above.
        sampler: what is drawn; default: the method's.
        augment: False leaves colour, blur and normalisation out.
        device: of the views, ``cpu`` or ``cuda``; a GPU decodes JPEG by nvJPEG and video by NVDEC.
        dtype: of the views.
        threads: decoding threads; 0 = as many as cores.
        prefetch: batches made ahead; memory is bounded by these and one or two in the making.
        max_bad_share: share of failed samples (counted over at least 1000) past which iteration raises RuntimeError.

    Raises UserError for a store that cannot be used or holds fewer clips than a global batch, ValueError for senseless
    numbers. Iterating raises RuntimeError past ``max_bad_share``.
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
        threads: int = 0,
        prefetch: int = 2,
        max_bad_share: float = 0.01,
    ):
        if batch_size < 1 or prefetch < 1 or threads < 0:
            raise ValueError(
                f"batch_size {batch_size} and prefetch {prefetch} must be at least 1, threads {threads} at least 0"
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank}, must be from 0 to world_size - 1 = {world_size - 1}")
        if not 0 <= max_bad_share <= 1:
            raise ValueError(f"max_bad_share is {max_bad_share}, must be within 0 and 1")
        threads = threads or len(os.sched_getaffinity(0))
        self.store = Store(store, threads=threads)
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.stats = LoaderStats()
        self.step = 0
        if len(self) == 0:
            raise UserError(
                f"{store} has {len(self.store)} clips, fewer than one batch of "
                f"{batch_size} x {world_size}: lower batch_size"
            )
        self._fetcher = Fetcher(
            self.store, batch_size, sampler or SamplerConfig(), seed, self.stats,
            augment=augment, device=torch.device(device), dtype=dtype, threads=threads, max_bad_share=max_bad_share,
        )  # fmt: skip
        self._prefetch = prefetch
        self._producer: _Producer | None = None

    def __len__(self) -> int:
        """Batches an epoch."""
        return len(self.store) // (self.batch_size * self.world_size)

    @property
    def epoch(self) -> int:
        return self.step // len(self)

    def state_dict(self) -> dict[str, int]:
        """The position: batches delivered since the start of epoch 0."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        if not isinstance(state.get("step"), int) or state["step"] < 0:
            raise ValueError(f"state is {state!r}, must be {{'step': batches delivered}}")
        self.step = state["step"]

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of ``epoch``, unless the position is within it already."""
        if epoch != self.epoch:
            self.step = epoch * len(self)

    def __iter__(self) -> Iterator[Batch]:
        """The rest of the current epoch, from the position on; at its end the position is the start of the next."""
        end = (self.epoch + 1) * len(self)
        while self.step < end:
            start = time.perf_counter()
            batch = self._next()
            self.stats.wait_seconds += time.perf_counter() - start
            self.step += 1
            yield batch

    def _next(self) -> Batch:
        if self._producer is None or self._producer.position != self.step:
            self.close()
            self._producer = _Producer(self._fetcher, self.numbers, self.step, self._prefetch)
        try:
            return self._producer.get()
        except BaseException:
            self.close()
            raise

    def numbers(self, step: int) -> np.ndarray:
        """Global sample numbers, (B,) int64, of this rank's batch ``step``."""
        epoch, batch = divmod(step, len(self))
        first = epoch * len(self.store) + (batch * self.world_size + self.rank) * self.batch_size
        return np.arange(first, first + self.batch_size, dtype=np.int64)

    def close(self) -> None:
        """Stops the background thread; iterating starts it again."""
        if self._producer is not None:
            self._producer.stop()
            self._producer = None

    def __enter__(self) -> "ClipLoader":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # a loader whose making failed
            self.close()


class _Producer:
    """Makes batches ``position``, ``position + 1``, ... in one thread, at most ``ahead`` of them before their use."""

    def __init__(self, fetcher: Fetcher, numbers, position: int, ahead: int):
        self.position = position
        self._queue: queue.Queue[Batch | BaseException] = queue.Queue(ahead)
        self._stopped = threading.Event()
        # the thread must not keep the loader alive: it holds a weak method
        method = weakref.WeakMethod(numbers)
        self._thread = threading.Thread(
            target=self._run, args=(fetcher, method, position), name="clip-loader", daemon=True
        )
        _running.add(self)
        _stop_at_exit()
        self._thread.start()

    def _run(self, fetcher: Fetcher, method, position: int) -> None:
        try:
            while not self._stopped.is_set():
                numbers = method()
                if numbers is None:
                    return
                wanted = numbers(position)
                del numbers
                self._put(fetcher.fetch(wanted))
                position += 1
        except BaseException as error:  # handed to the consumer, who raises it
            self._put(error)

    def _put(self, item: Batch | BaseException) -> None:
        while not self._stopped.is_set():
            try:
                return self._queue.put(item, timeout=0.2)
            except queue.Full:
                continue

    def get(self) -> Batch:
        item = self._queue.get()
        if isinstance(item, BaseException):
            raise item
        self.position += 1
        return item

    def stop(self) -> None:
        self._stopped.set()
        if self._thread is not threading.current_thread():
            self._thread.join()
        _running.discard(self)


_running: "weakref.WeakSet[_Producer]" = weakref.WeakSet()


def _stop_all() -> None:
    """No thread is inside DALI or torch when the interpreter goes."""
    for producer in list(_running):
        producer.stop()


@functools.cache
def _stop_at_exit() -> None:
    """Called once DALI is imported, so that the threads end before DALI's own clearing up at exit."""
    atexit.register(_stop_all)
