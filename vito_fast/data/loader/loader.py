"""``ClipLoader``: batches of augmented views from a store, the same on every run and for every number of ranks."""

import logging
import os
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vito_fast.config import SamplerConfig
from vito_fast.data.loader.batch import Batch, Recipe
from vito_fast.data.loader.fetch import Failure, Fetcher, Part
from vito_fast.data.loader.sampler import Sampler
from vito_fast.data.loader.thread_pool import Workers
from vito_fast.data.store.store import Store
from vito_fast.errors import UserError

log = logging.getLogger("vito_fast.data")

LEAST = 1000
"""Samples over which the share of bad ones is taken at least."""
REMEMBERED = 100
"""Failures kept with clip and reason."""


@dataclass
class LoaderStats:
    """Counters of what was delivered since the loader was made. JSON-able by :meth:`as_dict`."""

    samples: int = 0
    failures: int = 0
    """Samples that could not be read or decoded, each replaced by another clip."""
    reasons: dict[str, int] = field(default_factory=dict)
    """Failures by kind: ``Read.code``, or ``decode``."""
    last_failures: list[Failure] = field(default_factory=list)
    """The most recent, at most 100."""
    refused: int = 0
    """Samples that DALI refused and that were decoded in software instead."""
    bytes_read: int = 0
    packets: int = 0
    """Packets decoded, d."""
    frames: int = 0
    """Distinct frames used of them, u."""
    read_seconds: float = 0.0
    """Reading, decoding (with crop and resize) and augmenting, summed over the workers."""
    decode_seconds: float = 0.0
    augment_seconds: float = 0.0
    wait_seconds: float = 0.0
    """How long the consumer waited for batches."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def add(self, part: Part) -> None:
        self.samples += len(part.samples.clip)
        self.failures += len(part.failures)
        for failure in part.failures:
            self.reasons[failure.code] = self.reasons.get(failure.code, 0) + 1
        self.last_failures = (self.last_failures + part.failures)[-REMEMBERED:]
        for name in ("refused", "bytes_read", "packets", "frames", "read_seconds", "decode_seconds", "augment_seconds"):
            setattr(self, name, getattr(self, name) + getattr(part, name))


class ClipLoader:
    """An iterable over one epoch of batches, and again over the next.

    Batch b of epoch e on rank r holds the samples ``e * num_clips + b * G + r * B ... + B`` (G = B * world_size) of the
    sampler, which is a pure function of (seed, number): so batches are the same on every run, whatever ``threads`` and
    ``prefetch``, and their union over the ranks does not depend on their number. The incomplete last batch of an epoch
    is dropped. A sample that cannot be read or decoded is replaced by another clip of the same generator, counted in
    ``stats`` and logged (logger ``vito_fast.data``); never is a black or a wrong frame delivered in its stead.

    A batch is a dict: ``views``, a tuple of V tensors (B, 3, S, S) channels_last of ``dtype``, normalised
    (``augment=False``: (B, S, S, 3) uint8, the geometry alone); ``clip`` (B,) int64; ``video`` (B,) int64; ``frame``
    (B, V) int32, of the clip in presentation order; ``time`` (B, V) float64, its second in the source; ``sample``
    (B,) int64. All but ``views`` are on the CPU.

    Args:
        store: the store's folder.
        batch_size: samples a batch **on this rank**.
        seed, rank, world_size: see above.
        sampler: what is drawn; default: the method's.
        augment: False leaves colour, blur and normalisation out.
        device: of the views, ``cpu`` or ``cuda``; a GPU decodes JPEG by nvJPEG and video by NVDEC.
        dtype: of the views, a floating-point one.
        threads: workers; 0 or None = the cores this process may use.
        prefetch: batches made ahead of the one in use; these bound the memory.
        max_bad_share: share of failed samples (of at least 1000) past which iteration raises UserError.

    Raises UserError for a store that cannot be used or holds fewer clips than a global batch, ValueError for senseless
    numbers. Its threads end with :meth:`close`, with the loader, or with the interpreter.
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
        self._turn = 0  # which iterator is the current one
        self._own: Iterator[dict[str, Any]] | None = None  # that of next(loader)
        self._ahead: deque[Batch] = deque()  # those of steps self._step, self._step + 1, ...
        if len(self) == 0:
            raise UserError(
                f"{store} has {len(self.store)} clips, fewer than one batch of {batch_size} x {world_size}: "
                "lower batch_size or pack more videos"
            )
        self._recipe = Recipe(
            self.store,
            Sampler(self.store.index, sampler, seed),
            _numbered(torch.device(device)),
            dtype,
            augment,
            threads,
            batch_size,
        )
        self._workers: Workers[Fetcher] | None = None

    def __len__(self) -> int:
        """Batches an epoch."""
        return len(self.store) // (self.batch_size * self.world_size)

    @property
    def step(self) -> int:
        """Batches delivered since the start of epoch 0."""
        return self._step

    @property
    def epoch(self) -> int:
        return self._step // len(self)

    def state_dict(self) -> dict[str, int]:
        """The position; what was made ahead and not delivered does not count."""
        return {"step": self._step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to a position. Raises ValueError for what is no ``state_dict``."""
        step = state.get("step")
        if not isinstance(step, int) or step < 0:
            raise ValueError(f"state is {state!r}, must be {{'step': batches delivered}}")
        self._forget()
        self._step = step

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of ``epoch``, unless the position is within it already."""
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
        """The rest of the current epoch, from the position on; at its end the position is the start of the next.

        One iterator at a time: an older one raises RuntimeError once a newer has begun or the position was set.
        """
        self._turn, self._own = self._turn + 1, None
        return self._batches(self._turn)

    def __next__(self) -> dict[str, Any]:
        """The next batch, as DALI's iterators: StopIteration at an epoch's end, and then the next epoch's."""
        self._own = self._own or iter(self)
        try:
            return next(self._own)
        except StopIteration:
            self._own = None
            raise

    def reset(self) -> None:
        """To the start of the next epoch from within one, as DALI's iterators."""
        if self._step % len(self):
            self.set_epoch(self.epoch + 1)

    def _batches(self, turn: int) -> Iterator[dict[str, Any]]:
        for step in range(self._step, (self.epoch + 1) * len(self)):
            if turn != self._turn:
                raise RuntimeError("this iterator is stale: its loader was iterated anew or moved")
            while len(self._ahead) <= self.prefetch:  # past the epoch's end too: the next one shall not begin idle
                self._ahead.append(self._begin(step + len(self._ahead)))
            try:
                batch = self._deliver(self._ahead.popleft())
            except BaseException:
                self._forget()  # what is ahead would follow a step that was not delivered
                raise
            self._step = step + 1
            yield batch
            del batch  # the consumer's alone: as many ahead as prefetch says and one in use, no more

    def _forget(self) -> None:
        """Nothing is begun any longer, and no iterator is the current one."""
        self._turn, self._own = self._turn + 1, None
        for begun in self._ahead:
            begun.cancel()
        self._ahead.clear()

    def batch(self, step: int) -> dict[str, Any]:
        """The batch of any step, made now; the position stays."""
        return self._deliver(self._begin(step))

    def _begin(self, step: int) -> Batch:
        if self._workers is None:
            self._workers = Workers(self._recipe.workers, self._recipe.fetcher)
        budget = self.max_bad_share * max(LEAST, self.stats.samples + self.batch_size)
        return Batch(self._recipe, self._workers, self.numbers(step), budget)

    def _deliver(self, batch: Batch) -> dict[str, Any]:
        start = time.perf_counter()
        try:
            parts = batch.wait()
        except BaseException:
            batch.cancel()
            raise
        self.stats.wait_seconds += time.perf_counter() - start
        for part in parts:
            self.stats.add(part)
            for failure in part.failures:
                log.warning(
                    "sample %d: clip %d (%s) replaced by another: %s: %s",
                    failure.sample, failure.clip, failure.source, failure.code, failure.reason,
                )  # fmt: skip
        allowed = self.max_bad_share * max(LEAST, self.stats.samples)
        if self.stats.failures > allowed or any(part.hopeless for part in parts):
            last = self.stats.last_failures[-1]
            raise UserError(
                f"{self.stats.failures} failures in {self.stats.samples} samples of {self.store.path}, more than "
                f"max_bad_share = {self.max_bad_share} allows; the last: clip {last.clip} ({last.source}): "
                f"{last.code}: {last.reason}; see `vito-fast inspect-store {self.store.path}`"
            )
        return batch.finish(parts)

    def close(self) -> None:
        """Ends the threads; iterating starts them again."""
        self._forget()
        if self._workers is not None:
            self._workers.close()
            self._workers = None

    def __enter__(self) -> "ClipLoader":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _numbered(device: torch.device) -> torch.device:
    """This thread's GPU by its number: to the workers' threads, a mere ``cuda`` is the first one."""
    if device.type != "cuda" or device.index is not None or not torch.cuda.is_available():
        return device
    return torch.device("cuda", torch.cuda.current_device())
