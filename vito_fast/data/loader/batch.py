"""One batch: its chunks on a pool of threads, its views in one block of memory."""

import math
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

import vito_kernels
from vito_fast.config import SamplerConfig
from vito_fast.data.loader.fetch import Chunk, Failure, Fetcher
from vito_fast.data.loader.mixture import Mixture
from vito_fast.data.loader.outage import Outage
from vito_fast.data.loader.sampler import Sampler, SequenceSampler
from vito_fast.data.store.description import NVDEC_CODECS
from vito_fast.data.store.labels import NO_LABEL, Labels
from vito_fast.data.store.store import Store

Tools = TypeVar("Tools")
Result = TypeVar("Result")
_Tasks = SimpleQueue[tuple[Future[Any], Callable[[Any], Any]] | None]

CPU_CHUNK, GPU_CHUNK = 16, 64
"""Largest number of samples in a chunk. On a CPU the chunk's pixels must stay in the cache and the cost per call must
be small: 8 to 32 differ by under 3 %. The number for a GPU is not measured."""
MAX_FAILURES_KEPT = 100
GPU_WORKERS = 8
"""Largest number of DALI pipelines on a GPU. One leaves NVDEC idle."""


class ThreadPool(Generic[Tools]):
    """Daemon threads that run tasks in the order of submission. They end by :meth:`close`, with the object, or at exit.

    The executor of the standard library joins its threads at exit only after all submitted tasks are done. This one
    drops tasks that have not begun. No thread is inside native code when the interpreter ends.

    Args:
        count: Number of threads.
        make_tools: Called in each thread before its first task. The tasks of the thread receive the result.
        interrupt: Called before the threads end. It wakes tasks that sleep.
    """

    def __init__(self, count: int, make_tools: Callable[[], Tools], interrupt: Callable[[], None] = lambda: None):
        self._tasks: _Tasks = SimpleQueue()
        ready = threading.Barrier(count + 1)
        threads = [
            threading.Thread(target=_work, args=(self._tasks, make_tools, ready), name=f"vito-data-{i}", daemon=True)
            for i in range(count)
        ]
        torch_threads = torch.get_num_threads()
        for thread in threads:
            thread.start()
        ready.wait()
        torch.set_num_threads(torch_threads)  # a worker's own call also sets the default of new threads
        self._finalizer = weakref.finalize(self, _stop, self._tasks, threads, interrupt, os.getpid())

    def submit(self, task: Callable[[Tools], Result]) -> "Future[Result]":
        """Queue ``task``, called with the tools of the thread that runs it."""
        future: Future[Result] = Future()
        self._tasks.put((future, task))
        return future

    def close(self) -> None:
        """Drop tasks that have not begun and wait for the others. Idempotent."""
        self._finalizer()


def _work(tasks: _Tasks, make_tools: Callable[[], Any], ready: threading.Barrier) -> None:
    torch.get_num_threads()  # the first query in a thread resets its number, so query before setting
    torch.set_num_threads(1)  # the pool alone runs in parallel
    ready.wait()
    tools = None
    while (entry := tasks.get()) is not None:
        future, task = entry
        if future.set_running_or_notify_cancel():
            try:
                if tools is None:
                    tools = make_tools()
                future.set_result(task(tools))
            except BaseException as error:
                future.set_exception(error)
        del entry, future, task  # hold no batch while idle


def _stop(tasks: _Tasks, threads: list[threading.Thread], interrupt: Callable[[], None], owner: int) -> None:
    if os.getpid() != owner:  # in a forked process there are no threads, and the queue may be locked for ever
        return
    interrupt()
    try:
        while (entry := tasks.get_nowait()) is not None:
            entry[0].cancel()
    except Empty:
        pass
    for _ in threads:
        tasks.put(None)
    for thread in threads:
        if thread is not threading.current_thread():  # the garbage collector may run in any thread
            thread.join()


class Buffers:
    """Host memory of batches. A block is used again once no tensor of its batch is left.

    Fresh blocks of this size, freed by other threads, would leave the heap in pieces that grow without end.

    Args:
        shape, dtype: Of the tensors.
        keep: Most free blocks.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, keep: int):
        self._shape, self._dtype = shape, dtype
        self._free: deque[npt.NDArray[np.uint8]] = deque(maxlen=keep)

    def take(self) -> Tensor:
        """A tensor, not initialized."""
        try:
            block = self._free.pop()
        except IndexError:
            block = np.empty(math.prod(self._shape) * self._dtype.itemsize, np.uint8)
        loan = block[:]  # tensors of the batch, and they alone, hold this object
        weakref.finalize(loan, self._free.append, block).atexit = False
        return torch.from_numpy(loan).view(self._dtype).view(self._shape)


def nvdec_codecs(device: torch.device) -> frozenset[str]:
    """FFmpeg's names of the codecs that the device decodes in hardware, at 8 bits per sample."""
    if device.type != "cuda":
        return frozenset()
    capability = torch.cuda.get_device_capability(device)
    av1 = capability >= (8, 6) and capability != (9, 0)  # not on A100 and H100, nor before
    return NVDEC_CODECS | ({"av1"} if av1 else set())


@dataclass(frozen=True)
class LoaderSpec:
    """Everything that the batches of one loader have in common."""

    stores: tuple[Store, ...]
    samplers: tuple[Sampler, ...]
    """One for each store. They differ in their seeds alone."""
    mixture: Mixture | None
    """Of several stores."""
    device: torch.device
    dtype: torch.dtype
    augment: bool
    threads: int
    batch_size: int
    prefetch: int
    outages: tuple[Outage, ...]
    labels: tuple[Labels | None, ...]
    """Of each store, or none if they are not read."""

    @property
    def config(self) -> SamplerConfig:
        return self.samplers[0].config

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @cached_property
    def workers(self) -> int:
        return min(self.threads, GPU_WORKERS) if self.on_gpu else self.threads

    @cached_property
    def max_chunk(self) -> int:
        return min(GPU_CHUNK if self.on_gpu else CPU_CHUNK, -(-self.batch_size // self.workers))

    @cached_property
    def buffers(self) -> Buffers:
        size = self.config.size
        shape = (self.samplers[0].views, self.batch_size, size, size, 3)
        return Buffers(shape, self.dtype if self.augment else torch.uint8, self.prefetch + 2)

    @cached_property
    def first_videos(self) -> npt.NDArray[np.int64]:
        """By how much the video numbers of each store are raised, so that no two stores share one."""
        lasts = [store.index.clip(store.index.num_clips - 1).video + 1 for store in self.stores[:-1]]
        return np.cumsum([0, *lasts], dtype=np.int64)

    def labels_of(self, sources: npt.NDArray[np.int64], clips: npt.NDArray[np.int64]) -> dict[str, Any]:
        """``label``, ``id`` and ``group`` of clips of ``sources``, without those that no store has."""
        if not any(self.labels):
            return {}
        label, ids, groups = np.full(len(clips), NO_LABEL), [""] * len(clips), [""] * len(clips)
        for source, own in enumerate(self.labels):
            rows = np.flatnonzero(sources == source)
            if own:
                label[rows] = own.label[clips[rows]]
                for row, name, group in zip(rows.tolist(), own.ids(clips[rows]), own.groups(clips[rows]), strict=True):
                    ids[row], groups[row] = name, group
        grouped = any(own.grouped for own in self.labels if own)
        return {"label": torch.from_numpy(label), "id": ids, **({"group": groups} if grouped else {})}

    def fetchers(self) -> list[Fetcher]:
        """Make the tools of one worker, for each store."""
        threads = max(1, self.threads // self.workers)
        return [
            Fetcher(
                store, sampler, self.max_chunk,
                device=self.device, threads=threads, hardware_codecs=nvdec_codecs(self.device), outage=outage,
            )
            for store, sampler, outage in zip(self.stores, self.samplers, self.outages, strict=True)
        ]  # fmt: skip

    def bucketed(self, source: int, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Places of ``numbers`` such that clips of one codec and size are neighbors: decoders then rarely restart."""
        store = self.stores[source]
        if store.format.still:
            return np.arange(len(numbers))
        keys = []
        for clip in self.samplers[source].clips(numbers):
            try:
                info = store.index.clip(int(clip))
                keys.append((info.codec, info.width, info.height))
            except ValueError:  # a corrupt entry; the fetcher reports it
                keys.append(("", 0, 0))
        return np.array(sorted(range(len(keys)), key=keys.__getitem__), np.int64)


@dataclass
class LoaderStats:
    """Counters since the loader was made."""

    samples: int = 0
    failures: int = 0
    """Samples that could not be read or decoded, each replaced by another clip."""
    reasons: dict[str, int] = field(default_factory=dict)
    """Failures by kind: ``Read.code``, or ``decode``."""
    last_failures: list[Failure] = field(default_factory=list)
    """The most recent, at most 100."""
    refused: int = 0
    """Samples that DALI rejected and that were decoded in software."""
    bytes_read: int = 0
    packets: int = 0
    """Packets decoded, d."""
    frames: int = 0
    """Distinct frames used, u."""
    read_seconds: float = 0.0
    """Summed over the workers, as are the next two."""
    decode_seconds: float = 0.0
    """With crop and resize."""
    augment_seconds: float = 0.0
    wait_seconds: float = 0.0
    """Time that the consumer waited for batches."""

    def as_dict(self) -> dict[str, Any]:
        """The counters as JSON values."""
        return asdict(self)

    def add(self, chunk: Chunk) -> None:
        """Count the samples of one chunk."""
        self.samples += len(chunk.samples.clip)
        self.failures += len(chunk.failures)
        for failure in chunk.failures:
            self.reasons[failure.code] = self.reasons.get(failure.code, 0) + 1
        self.last_failures = (self.last_failures + chunk.failures)[-MAX_FAILURES_KEPT:]
        for name in ("refused", "bytes_read", "packets", "frames", "read_seconds", "decode_seconds", "augment_seconds"):
            setattr(self, name, getattr(self, name) + getattr(chunk, name))


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """``x`` on ``device``. The host does not wait for the copy."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


class Batch:
    """A batch in progress: :meth:`wait`, then :meth:`finish`. On a GPU, use within one stream.

    On a CPU each worker augments its own views while they are in its cache. On a GPU the workers deliver uint8 views,
    and one launch augments the whole batch.

    Args:
        spec: The loader's.
        pool: The workers.
        numbers: (B,) sample numbers.
        budget: Number of failures after which a chunk gives up.
    """

    def __init__(
        self, spec: LoaderSpec, pool: ThreadPool[list[Fetcher]], numbers: npt.NDArray[np.int64], budget: float
    ):
        self.spec, self.numbers = spec, numbers
        self._workers_augment = spec.augment and not spec.on_gpu
        if spec.on_gpu:
            shape = (spec.samplers[0].views, len(numbers), spec.config.size, spec.config.size, 3)
            self._views = torch.empty(shape, dtype=torch.uint8, device=spec.device)
        else:
            self._views = spec.buffers.take()
        self._ready = None
        if spec.on_gpu:  # kernels launched before may still read this memory
            self._ready = torch.cuda.Event()
            self._ready.record(torch.cuda.current_stream(spec.device))
        self.sources, self._own = np.zeros_like(numbers), numbers
        if spec.mixture:
            self.sources, self._own = spec.mixture.assign(numbers)
        self._places: list[npt.NDArray[np.int64]] = []
        self._futures: list[Future[Chunk]] = []
        for source in np.unique(self.sources):
            places = np.flatnonzero(self.sources == source)
            places = places[spec.bucketed(int(source), self._own[places])]
            for chunk in np.split(places, range(spec.max_chunk, len(places), spec.max_chunk)):
                self._places.append(chunk)
                self._futures.append(pool.submit(partial(self._fetch, places=chunk, budget=budget)))

    def _fetch(self, fetchers: list[Fetcher], places: npt.NDArray[np.int64], budget: float) -> Chunk:
        source = int(self.sources[places[0]])
        fetcher, first_video = fetchers[source], self.spec.first_videos[source]
        chunk = self._fetch_from(fetcher, places, budget)
        chunk.samples.video[:] += first_video
        return chunk

    def _fetch_from(self, fetcher: Fetcher, places: npt.NDArray[np.int64], budget: float) -> Chunk:
        def put(rows: npt.NDArray[np.int64], views: list[Tensor], params: npt.NDArray[np.float32]) -> None:
            where = torch.from_numpy(places[rows])
            for view, (target, squares) in enumerate(zip(self._views, views, strict=True)):
                if self._workers_augment:
                    table = torch.from_numpy(np.ascontiguousarray(params[:, view]))
                    squares = vito_kernels.photometric(squares.contiguous(), table, dtype=self.spec.dtype)
                    squares = squares.permute(0, 2, 3, 1)
                target.index_copy_(0, where.to(target.device), squares)

        if self._ready is None:
            return fetcher.fetch(self._own[places], put, budget)
        with torch.cuda.device(self.spec.device), torch.cuda.stream(torch.cuda.Stream()) as _:
            stream = torch.cuda.current_stream()
            stream.wait_event(self._ready)

            def put_and_wait(rows: npt.NDArray[np.int64], views: list[Tensor], params: npt.NDArray[np.float32]) -> None:
                put(rows, views, params)
                stream.synchronize()  # frees DALI's memory, and completes the chunk for whoever waits for it

            return fetcher.fetch(self._own[places], put_and_wait, budget)

    def wait(self) -> list[Chunk]:
        """Wait for all chunks."""
        return [future.result() for future in self._futures]

    def cancel(self) -> None:
        """Drop the chunks that have not begun."""
        for future in self._futures:
            future.cancel()

    def finish(self, chunks: list[Chunk]) -> dict[str, Any]:
        """Build the batch that ``ClipLoader`` documents."""
        order = np.argsort(np.concatenate(self._places))
        samples = {
            name: np.concatenate([getattr(chunk.samples, name) for chunk in chunks])[order]
            for name in ("clip", "video", "frame", "time", "params")
        }
        params = torch.from_numpy(samples.pop("params"))
        views = self._views
        if self.spec.augment:
            if not self._workers_augment:
                table = to_device(params.transpose(0, 1).flatten(0, 1), views.device)
                flat = vito_kernels.photometric(views.flatten(0, 1), table, dtype=self.spec.dtype)
                views = flat.permute(0, 2, 3, 1).unflatten(0, views.shape[:2])
            views = views.permute(0, 1, 4, 2, 3)
        if self.spec.mixture:
            samples["store"] = self.sources
        sequence = isinstance(self.spec.samplers[0], SequenceSampler)
        return {
            **({"sequence": views.transpose(0, 1)} if sequence else {"views": tuple(views.unbind())}),
            **{name: torch.from_numpy(values) for name, values in samples.items()},
            **self.spec.labels_of(self.sources, samples["clip"]),
            "sample": torch.from_numpy(self.numbers),
        }
