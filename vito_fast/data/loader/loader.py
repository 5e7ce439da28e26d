"""``ClipLoader``: batches of augmented views from a store, equal on every run and for every number of ranks."""

import hashlib
import logging
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vito_fast.config import ClipFilter, SamplerConfig
from vito_fast.data.loader.batch import Batch, LoaderSpec, LoaderStats, ThreadPool
from vito_fast.data.loader.mixture import Mixture
from vito_fast.data.loader.outage import Outage
from vito_fast.data.loader.read_ahead import ReadAhead
from vito_fast.data.loader.sampler import Sampler, SequenceSampler
from vito_fast.data.store.labels import share_numbers
from vito_fast.data.store.selection import select
from vito_fast.data.store.store import Store
from vito_fast.errors import UserError

log = logging.getLogger("vito_fast.data")

SEED_STEP = 0x9E3779B97F4A7C15
"""Between the seeds of several stores."""
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
    - ``store``: (B,) int64, if there are several: the number of the sample's store, whose clip ``clip`` is.
    - ``label``: (B,) int64, classes by ``labels.parquet`` of the store, -1 where a clip has none. It is left out, as
      ``id`` is, if no store has the file. Classes of one name have one number in all stores, that of the first.
    - ``id``: list of B clip names by that file, "" where a clip has none.
    - ``group``: list of B names of groups, "" where a clip has none. It is left out if no store has groups.
    - ``frame``: (B, V) int32, frame numbers of the clip in presentation order.
    - ``time``: (B, V) float64, timestamps in the source in seconds.

    Args:
        store: The store's folder or address, or several with their weights. Of all samples each then has its share. A
            sample remains a pure function of (seed, number), and an epoch has as many samples as all stores have clips.
        batch_size: Samples per batch **on this rank**.
        seed, rank, world_size: See above.
        sampler: Distribution of the samples. None: the method's.
        frames: T. A sample is then T frames of its clip, ``stride`` apart, with one crop, flip and color of all. The
            batch has ``sequence`` (B, T, 3, S, S) in place of ``views``, and ``frame`` and ``time`` are (B, T). In a
            clip that is too short, the last frame repeats. None: the views of the method.
        stride: Distance of neighbors in frames of the clip.
        augment: Whether to augment color, blur and normalize.
        device: Device of the views, ``cpu`` or ``cuda``. A GPU decodes JPEG by nvJPEG and video by NVDEC.
        dtype: Floating-point type of the views.
        threads: Workers. 0 or None: one per core that this process may use.
        prefetch: Batches prepared ahead of the one in use. Bounds the memory.
        max_bad_share: Share of failed samples (of at least 1000) above which iteration raises UserError.
        io_timeout: Seconds for which a shard that cannot be reached is tried again, with growing pauses, before its
            samples fail.
        labels: Whether to read ``labels.parquet``, which needs pyarrow.
        cache, cache_gib: Of remote stores, as of :class:`Store`.
        where: Filter of the clips of every store. The loader then is as of a store of these clips alone, except that
            ``clip`` and ``video`` are numbers in the whole store.

    Raises:
        UserError: The store or its labels cannot be used, no clip of it passes the filter, or fewer clips are left than
            a global batch has.
        ValueError: A number is out of range.

    Its threads end with :meth:`close`, with the loader, or with the interpreter. It can be pickled: the copy opens the
    store again and stands at the same step. A loader that was used raises RuntimeError in a forked process, which has
    none of its threads.

    Attributes:
        stores: The opened stores.
        chosen: Of each store, the numbers of the clips that pass the filter, ascending, int64.
        num_clips: Clips in all, which are the samples of an epoch.
    """

    def __init__(
        self,
        store: str | os.PathLike[str] | Mapping[str, float],
        batch_size: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        sampler: SamplerConfig | None = None,
        frames: int | None = None,
        stride: int = 1,
        augment: bool = True,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        threads: int | None = 0,
        prefetch: int = 2,
        max_bad_share: float = 0.05,
        io_timeout: float = 60.0,
        labels: bool = True,
        cache: str | os.PathLike[str] = "",
        cache_gib: float = 0.0,
        where: ClipFilter = ClipFilter(),
    ):
        self._arguments = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        threads = threads or 0
        for name, value, least in (("batch_size", batch_size, 1), ("prefetch", prefetch, 0), ("threads", threads, 0)):
            if value < least:
                raise ValueError(f"{name} is {value}, must be at least {least}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank}, must be from 0 to world_size - 1 = {world_size - 1}")
        if not 0 <= max_bad_share <= 1:
            raise ValueError(f"max_bad_share is {max_bad_share}, must be within 0 and 1")
        if frames is None and stride != 1:
            raise ValueError(f"stride is {stride}, but frames is None: say how many frames a sample has")
        if not io_timeout >= 0:
            raise ValueError(f"io_timeout is {io_timeout}, must be at least 0")
        if not dtype.is_floating_point:
            raise ValueError(f"dtype is {dtype}, must be a floating-point one")
        threads = threads or len(os.sched_getaffinity(0))
        weights = dict(store) if isinstance(store, Mapping) else {store: 1.0}
        if not weights:
            raise ValueError("store is an empty mapping, must name a store")
        self.stores = tuple(Store(path, threads=max(4, threads), cache=cache, cache_gib=cache_gib) for path in weights)
        self.store = self.stores[0]
        self.chosen = tuple(select(each, where) for each in self.stores)
        self.num_clips = sum(map(len, self.chosen))
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.prefetch, self.max_bad_share = prefetch, max_bad_share
        self.stats = LoaderStats()
        self._step = 0
        self._iteration = 0  # number of the current iterator; older ones are stale
        self._end: int | None = None  # the step at which the epoch of next(loader) ends
        self._user = 0  # number of the process that started the threads
        pairs = list(zip(self.stores, self.chosen, strict=True))
        self._digests = [each.digest + _digest(clips) * (len(clips) < len(each)) for each, clips in pairs]
        self._ahead: deque[Batch] = deque()  # batches of steps self._step, self._step + 1, ...
        if len(self) == 0:
            raise UserError(
                f"{store} has {self.num_clips} clips, fewer than one batch of {batch_size} x {world_size}: "
                "lower batch_size or pack more videos"
            )
        make_sampler = Sampler if frames is None else partial(SequenceSampler, frames=frames, stride=stride)
        self._spec = LoaderSpec(
            stores=self.stores,
            samplers=tuple(
                make_sampler(
                    each.index, sampler, (seed + number * SEED_STEP) % 2**64, clips if len(clips) < len(each) else None
                )
                for number, (each, clips) in enumerate(pairs)
            ),
            mixture=Mixture(list(weights.values()), seed) if isinstance(store, Mapping) else None,
            device=_with_index(torch.device(device)),
            dtype=dtype,
            augment=augment,
            threads=threads,
            batch_size=batch_size,
            prefetch=prefetch,
            outages=tuple(Outage(io_timeout) for _ in self.stores),
            labels=share_numbers([(each.name, each.labels()) for each in self.stores]) if labels else (),
        )
        self._pool: ThreadPool[Any] | None = None
        self._read_ahead: ReadAhead | None = None

    def __len__(self) -> int:
        """Batches per epoch."""
        return self.num_clips // (self.batch_size * self.world_size)

    @property
    def step(self) -> int:
        """Batches delivered since the start of epoch 0."""
        return self._step

    @property
    def epoch(self) -> int:
        """The epoch of the next batch."""
        return self._step // len(self)

    @property
    def global_batch(self) -> int:
        """Samples per batch on all ranks together."""
        return self.batch_size * self.world_size

    def state_dict(self) -> dict[str, int | str]:
        """The position: the number of the next global sample, the global batch, the seed, and store and chosen clips.

        Batches that were prepared but not delivered do not count.
        """
        epoch, batch = divmod(self._step, len(self))
        sample = epoch * self.num_clips + batch * self.global_batch
        store = self._digests[0]
        if mixture := self._spec.mixture:
            parts = zip(self._digests, mixture.counts.tolist(), strict=True)
            store = ",".join(f"{digest}:{count}" for digest, count in parts)
        return {"sample": sample, "batch": self.global_batch, "seed": self._spec.samplers[0].seed, "store": store}

    def load_state_dict(self, state: Mapping[str, int | str]) -> None:
        """Go to the position of a ``state_dict``, of any number of ranks.

        Another global batch continues at the same sample.

        Raises:
            ValueError: The state is of another seed or store, its sample is within a batch of this loader, or it is
                none.
        """
        own = self.state_dict()
        if state.keys() != own.keys() or not isinstance(sample := state["sample"], int) or sample < 0:
            raise ValueError(f"state is {dict(state)!r}, must be a state_dict: {', '.join(own)}")
        for name in ("seed", "store"):
            if state[name] != own[name]:
                raise ValueError(f"state is of {name} {state[name]}, this loader is of {name} {own[name]}")
        epoch, place = divmod(sample, self.num_clips)
        batch, within = divmod(place, self.global_batch)
        if within:
            raise ValueError(
                f"state is at sample {place} of an epoch, in batches of {state['batch']}; a global batch of "
                f"{self.global_batch} does not begin there: choose one that divides {place}"
            )
        self.seek(epoch * len(self) + batch)

    def seek(self, step: int) -> None:
        """Go to a step: the number of batches delivered before. Raises ValueError if it is negative."""
        if step < 0:
            raise ValueError(f"step is {step}, must be at least 0")
        self._drop_ahead()
        self._step = step

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of ``epoch``, unless the position is already within it."""
        if epoch < 0:
            raise ValueError(f"epoch is {epoch}, must be at least 0")
        if epoch != self.epoch:
            self.seek(epoch * len(self))

    def numbers(self, step: int) -> npt.NDArray[np.int64]:
        """Global sample numbers, (B,) int64, of this rank's batch ``step``."""
        epoch, batch = divmod(step, len(self))
        first = epoch * self.num_clips + (batch * self.world_size + self.rank) * self.batch_size
        return np.arange(first, first + self.batch_size, dtype=np.int64)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The rest of the current epoch. At its end the position is the start of the next one.

        One iterator at a time: an older one raises RuntimeError once a newer one was made or the position was set.
        """
        self._iteration, self._end = self._iteration + 1, None
        return self._batches(self._iteration)

    def __next__(self) -> dict[str, Any]:
        """The next batch, as DALI's iterators: StopIteration at an epoch's end, and then the next epoch's first."""
        if self._end is None:
            self._iteration, self._end = self._iteration + 1, (self.epoch + 1) * len(self)
        if self._step >= self._end:
            self._end = None
            raise StopIteration
        return self._next()

    def reset(self) -> None:
        """Go to the start of the next epoch, unless at the start of one, as DALI's iterators."""
        if self._step % len(self):
            self.set_epoch(self.epoch + 1)

    def _batches(self, iteration: int) -> Iterator[dict[str, Any]]:
        for _ in range(self._step, (self.epoch + 1) * len(self)):
            if iteration != self._iteration:
                raise RuntimeError("this iterator is stale: its loader was iterated again or moved")
            yield self._next()  # no name holds it: memory holds prefetch batches and the one in use

    def _next(self) -> dict[str, Any]:
        """Deliver the batch of this step and go to the next one."""
        while len(self._ahead) <= self.prefetch:  # also past the epoch's end, so that the next one begins at once
            step = self._step + len(self._ahead)
            self._ahead.append(self._begin(step))
            assert self._read_ahead is not None
            self._read_ahead.begin(step, self.numbers)
        try:
            batch = self._deliver(self._ahead.popleft())
        except BaseException:
            self._drop_ahead()  # these would follow a step that was not delivered
            raise
        self._step += 1
        return batch

    def _drop_ahead(self) -> None:
        """Drop the prepared batches. All iterators become stale."""
        self._iteration, self._end = self._iteration + 1, None
        for batch in self._ahead:
            batch.cancel()
        self._ahead.clear()

    def batch(self, step: int) -> dict[str, Any]:
        """Make the batch of any step. The position does not change."""
        return self._deliver(self._begin(step))

    def _begin(self, step: int) -> Batch:
        if self._pool is None:
            self._user = os.getpid()
            for outage in self._spec.outages:
                outage.open()
            self._pool = ThreadPool(self._spec.workers, self._spec.fetchers, partial(_close, self._spec.outages))
            self._read_ahead = ReadAhead(self._spec)
        if self._user != os.getpid():
            raise RuntimeError(
                "this loader was used before its process was forked, and its threads are not here: make the loader in "
                "the worker, or start workers by spawn"
            )
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
            last, paths = self.stats.last_failures[-1], ", ".join(each.name for each in self.stores)
            raise UserError(
                f"{self.stats.failures} failures in {self.stats.samples} samples of {paths}, more than "
                f"max_bad_share = {self.max_bad_share} allows; the last: clip {last.clip} ({last.source}): "
                f"{last.code}: {last.reason}; see `vito-fast inspect-store {paths}`"
            )
        return batch.finish(chunks)

    def close(self) -> None:
        """End the threads. Iterating starts them again."""
        self._drop_ahead()
        if self._pool is not None:
            self._pool.close()
            self._pool = None
        if self._read_ahead is not None:
            self._read_ahead.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (self._arguments, self._step)

    def __enter__(self) -> "ClipLoader":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _close(outages: Iterable[Outage]) -> None:
    for outage in outages:
        outage.close()


def _digest(clips: npt.NDArray[np.int64]) -> str:
    return "/" + hashlib.sha256(clips.astype("<i8").tobytes()).hexdigest()[:16]


def _restored(arguments: dict[str, Any], step: int) -> ClipLoader:
    """A loader from its pickle."""
    loader = ClipLoader(**arguments)
    loader.seek(step)
    return loader


def _with_index(device: torch.device) -> torch.device:
    """This thread's GPU by its index. In the workers' threads, a bare ``cuda`` would be GPU 0."""
    if device.type != "cuda" or device.index is not None or not torch.cuda.is_available():
        return device
    return torch.device("cuda", torch.cuda.current_device())
