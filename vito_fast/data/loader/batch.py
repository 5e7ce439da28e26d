"""One batch in the making: its parts on the workers, its views in one piece of memory."""

from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

import vito_kernels
from vito_fast.data.loader.fetch import Fetcher, Part
from vito_fast.data.loader.sampler import Sampler
from vito_fast.data.loader.thread_pool import Workers
from vito_fast.data.store.store import Store

CPU_PART, GPU_PART = 16, 64
"""The most samples of a part. On a CPU: small enough that its pictures stay in the cache, large enough that calls cost
nothing (measured: 8 to 32 differ by under 3 %). On a GPU: what keeps a decoder busy; not measured."""
GPU_WORKERS = 8
"""Pipelines at once on a GPU at most: one leaves NVDEC idle."""


def nvdec_codecs(device: torch.device) -> frozenset[str]:
    """What the device decodes in hardware, 8 bits a sample. A100 and H100 lack AV1, as do GPUs before them."""
    if device.type != "cuda":
        return frozenset()
    capability = torch.cuda.get_device_capability(device)
    av1 = capability >= (8, 6) and capability != (9, 0)
    return frozenset({"h264", "hevc", "vp9"} | ({"av1"} if av1 else set()))


@dataclass(frozen=True)
class Recipe:
    """All that batches of one loader have in common."""

    store: Store
    sampler: Sampler
    device: torch.device
    dtype: torch.dtype
    augment: bool
    threads: int
    batch_size: int

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"

    @cached_property
    def workers(self) -> int:
        return min(self.threads, GPU_WORKERS) if self.gpu else self.threads

    @cached_property
    def max_part(self) -> int:
        return min(GPU_PART if self.gpu else CPU_PART, -(-self.batch_size // self.workers))

    def fetcher(self) -> Fetcher:
        threads = max(1, self.threads // self.workers)
        return Fetcher(
            self.store, self.sampler, self.max_part,
            device=self.device, threads=threads, video_codecs=nvdec_codecs(self.device),
        )  # fmt: skip

    def bucketed(self, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Places of ``numbers``, clips of one codec and size side by side: a decoder that need not change is faster."""
        if self.store.format == "jpeg":
            return np.arange(len(numbers))
        kinds = []
        for clip in self.sampler.clips(numbers):
            try:
                info = self.store.index.clip(int(clip))
                kinds.append((info.codec, info.width, info.height))
            except ValueError:  # a corrupt entry, found again and reported where it is used
                kinds.append(("", 0, 0))
        return np.array(sorted(range(len(kinds)), key=kinds.__getitem__), np.int64)


def sent(x: Tensor, device: torch.device) -> Tensor:
    """``x`` on ``device``, for which the host does not wait."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


class Batch:
    """The samples ``numbers``, begun; :meth:`wait`, then :meth:`finish`. On a GPU, use within one stream.

    On a CPU the workers augment, each its own pictures while they are in its cache. On a GPU they deliver bytes and one
    launch for the whole batch follows.
    """

    def __init__(self, recipe: Recipe, workers: Workers[Fetcher], numbers: npt.NDArray[np.int64], budget: float):
        self.recipe, self.numbers = recipe, numbers
        config = recipe.sampler.config
        on_arrival = recipe.augment and not recipe.gpu
        self._views = torch.empty(
            (config.views, len(numbers), config.size, config.size, 3),
            dtype=recipe.dtype if on_arrival else torch.uint8, device=recipe.device,
        )  # fmt: skip
        self._augment = on_arrival
        self._ready = None
        if recipe.gpu:  # the memory may still be read by kernels launched before
            self._ready = torch.cuda.Event()
            self._ready.record(torch.cuda.current_stream(recipe.device))
        places = recipe.bucketed(numbers)
        self._places = np.split(places, range(recipe.max_part, len(places), recipe.max_part))
        self._futures: list[Future[Part]] = [
            workers.submit(partial(self._make, places=part, budget=budget)) for part in self._places
        ]

    def _make(self, fetcher: Fetcher, places: npt.NDArray[np.int64], budget: float) -> Part:
        def put(rows: npt.NDArray[np.int64], views: list[Tensor], params: npt.NDArray[np.float32]) -> None:
            where = torch.from_numpy(places[rows])
            for view, (target, squares) in enumerate(zip(self._views, views, strict=True)):
                if self._augment:
                    row = torch.from_numpy(np.ascontiguousarray(params[:, view]))
                    squares = vito_kernels.photometric(squares.contiguous(), row, dtype=self.recipe.dtype)
                    squares = squares.permute(0, 2, 3, 1)
                target.index_copy_(0, where.to(target.device), squares)

        if self._ready is None:
            return fetcher.fetch(self.numbers[places], put, budget)
        with torch.cuda.device(self.recipe.device), torch.cuda.stream(torch.cuda.Stream()) as _:
            stream = torch.cuda.current_stream()
            stream.wait_event(self._ready)

            def put_and_wait(rows: npt.NDArray[np.int64], views: list[Tensor], params: npt.NDArray[np.float32]) -> None:
                put(rows, views, params)
                stream.synchronize()  # DALI's memory is free again, and whoever waits for the part finds it whole

            return fetcher.fetch(self.numbers[places], put_and_wait, budget)

    def wait(self) -> list[Part]:
        return [future.result() for future in self._futures]

    def cancel(self) -> None:
        for future in self._futures:
            future.cancel()

    def finish(self, parts: list[Part]) -> dict[str, Any]:
        """The batch as ``ClipLoader`` documents it."""
        order = np.argsort(np.concatenate(self._places))
        samples = {
            name: np.concatenate([getattr(part.samples, name) for part in parts])[order]
            for name in ("clip", "video", "frame", "time", "params")
        }
        params = torch.from_numpy(samples.pop("params"))
        views = self._views
        if self.recipe.augment:
            if not self._augment:
                rows = sent(params.transpose(0, 1).flatten(0, 1), views.device)
                flat = vito_kernels.photometric(views.flatten(0, 1), rows, dtype=self.recipe.dtype)
                views = flat.permute(0, 2, 3, 1).unflatten(0, views.shape[:2])
            views = views.permute(0, 1, 4, 2, 3)
        return {
            "views": tuple(views.unbind()),
            **{name: torch.from_numpy(values) for name, values in samples.items()},
            "sample": torch.from_numpy(self.numbers),
        }
