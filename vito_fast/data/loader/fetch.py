"""From sample numbers to views: draw, read, decode, crop, resize. A sample that fails is replaced by another clip.

Several workers make a batch in chunks of a few samples. A sample depends on its number alone, so neither the chunks nor
the workers change the result.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vito_fast.data.loader.dali import DecodeCropResize, DecodeError, mirrors
from vito_fast.data.loader.outage import UNREACHABLE, Outage
from vito_fast.data.loader.sampler import Sampler, Samples, empty_samples
from vito_fast.data.store.description import Route
from vito_fast.data.store.index import ClipInfo, Read
from vito_fast.data.store.store import BadPackets, Decoder, Store

Put = Callable[[npt.NDArray[np.int64], list[Tensor], npt.NDArray[np.float32]], None]
"""Takes rows (N,) of the chunk, V tensors (N, S, S, 3) uint8 valid during the call, and params (N, V, 8)."""


@dataclass(frozen=True)
class Failure:
    """A sample that could not be read or decoded, and was replaced."""

    sample: int
    attempt: int
    clip: int
    source: str
    code: str
    """``Read.code``, or ``decode``."""
    reason: str


@dataclass
class Chunk:
    """Some samples of a batch and their cost. Seconds are those of one worker."""

    samples: Samples
    failures: list[Failure] = field(default_factory=list)
    gave_up: bool = False
    """Whether more samples failed than the whole run allows so far."""
    refused: int = 0
    """Samples that DALI rejected and that were decoded in software."""
    bytes_read: int = 0
    packets: int = 0
    frames: int = 0
    read_seconds: float = 0.0
    decode_seconds: float = 0.0
    augment_seconds: float = 0.0

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the time inside to the field ``name``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            setattr(self, name, getattr(self, name) + time.perf_counter() - start)


@dataclass
class _Sample:
    """A sample that is not delivered yet."""

    row: int
    number: int
    attempt: int = 0
    failed: bool = False
    info: ClipInfo | None = None
    read: Read | None = None


class Fetcher:
    """The tools of one worker: DALI pipelines and codec contexts, made on first use. Use from one thread at a time.

    Args:
        store: The store to read.
        sampler: Draws the samples.
        max_chunk: Largest number of samples per call.
        device: Device of the views.
        threads: DALI's own threads.
        hardware_codecs: Codecs that DALI decodes, from mini-clips. Video of any other is decoded in software.
        outage: Waits for shards that cannot be reached.
    """

    def __init__(
        self,
        store: Store,
        sampler: Sampler,
        max_chunk: int,
        *,
        device: torch.device,
        threads: int = 1,
        hardware_codecs: Iterable[str] = (),
        outage: Outage = Outage(0),
    ):
        self.store, self.sampler, self.max_chunk, self.device, self.threads = store, sampler, max_chunk, device, threads
        self.hardware_codecs, self._outage = frozenset(hardware_codecs), outage
        self._decoder = Decoder()
        self._pipelines: dict[Route, DecodeCropResize] = {}

    def fetch(self, numbers: npt.NDArray[np.int64], put: Put, budget: float) -> Chunk:
        """Make samples and pass their views to ``put``, in one or more calls.

        Args:
            numbers: (B,) sample numbers, B <= ``max_chunk``.
            put: Receives the views.
            budget: Number of failures after which to give up. One sample that fails with every clip ends it too.
        """
        chunk = Chunk(empty_samples(len(numbers), self.sampler.views))
        todo = [_Sample(row, int(number)) for row, number in enumerate(numbers)]
        while todo and not chunk.gave_up:
            for route, samples in self._by_route(self._draw(chunk, todo)).items():
                self._make(chunk, route, self._read(chunk, samples, miniclip=route == "video"), put)
            todo = [sample for sample in todo if sample.failed]
            attempts = max((sample.attempt for sample in todo), default=0)
            chunk.gave_up = len(chunk.failures) > budget or attempts >= self.sampler.num_clips
        return chunk

    def _draw(self, chunk: Chunk, samples: list[_Sample]) -> list[_Sample]:
        """Fill the samples' rows of ``chunk.samples``. Fails those whose clip is corrupt in the index."""
        numbers, attempts = [s.number for s in samples], [s.attempt for s in samples]
        try:
            drawn = self.sampler.sample(numbers, attempts)
        except ValueError as error:
            if len(samples) > 1:
                return [good for sample in samples for good in self._draw(chunk, [sample])]
            self._fail(chunk, samples[0], int(self.sampler.clips(numbers, attempts)[0]), "index", str(error))
            return []
        rows = _rows(samples)
        for name in Samples._fields:
            getattr(chunk.samples, name)[rows] = getattr(drawn, name)
        for sample, clip in zip(samples, drawn.clip, strict=True):
            sample.failed = False
            try:
                sample.info = self.store.index.clip(int(clip))
            except ValueError as error:
                self._fail(chunk, sample, int(clip), "index", str(error))
        return [sample for sample in samples if not sample.failed]

    def _by_route(self, samples: list[_Sample]) -> dict[Route, list[_Sample]]:
        routes: dict[Route, list[_Sample]] = {}
        for sample in samples:
            assert sample.info is not None
            route = self.store.format.route(sample.info.codec, self.hardware_codecs)
            routes.setdefault(route, []).append(sample)
        return routes

    def _read(self, chunk: Chunk, samples: list[_Sample], *, miniclip: bool) -> list[_Sample]:
        """Read the samples' packets. Fails those that cannot be read whole."""
        rows = _rows(samples)
        with chunk.timed("read_seconds"):
            clips, frames = chunk.samples.clip[rows], chunk.samples.frame[rows]
            reads = self.store.reader.read(clips, frames, miniclip=miniclip, single_stream=False)
            attempt = 0
            while failed := [row for row, read in enumerate(reads) if read.code in UNREACHABLE]:
                if not self._outage.wait({_shard(samples[row]) for row in failed}, attempt):
                    break
                attempt += 1
                again = self.store.reader.read(clips[failed], frames[failed], miniclip=miniclip, single_stream=False)
                for row, read in zip(failed, again, strict=True):
                    reads[row] = read
            self._outage.over(
                {_shard(sample) for sample, read in zip(samples, reads, strict=True) if read.code == "ok"}
            )
        for sample, clip, read in zip(samples, clips, reads, strict=True):
            if read.code != "ok":
                self._fail(chunk, sample, int(clip), read.code, read.error)
                continue
            sample.read = read
            chunk.bytes_read += int(read.sizes.sum())
            chunk.packets += len(read.packets)
            chunk.frames += len(set(read.pictures.tolist()))
        return [sample for sample in samples if not sample.failed]

    def _make(self, chunk: Chunk, route: Route, samples: list[_Sample], put: Put) -> None:
        """Decode, crop and resize. Software decodes a batch that DALI rejects, and there each sample fails alone."""
        if not samples:
            return
        with chunk.timed("decode_seconds"):
            try:
                views = self._in_software(chunk, samples) if route == "frames" else self._by_dali(chunk, route, samples)
            except DecodeError:
                chunk.refused += len(samples)
                if route == "video":
                    samples = self._read(chunk, samples, miniclip=False)
                views = self._in_software(chunk, samples)
            samples = [sample for sample in samples if not sample.failed]
            views = self._upright(samples, views)
        if samples:
            rows = _rows(samples)
            with chunk.timed("augment_seconds"):
                put(rows, views, chunk.samples.params[rows])

    def _by_dali(self, chunk: Chunk, route: Route, samples: list[_Sample]) -> list[Tensor]:
        data, pictures = [], []
        for sample in samples:
            assert sample.read is not None
            if route == "video":
                data.append(sample.read.data)
                pictures.append(sample.read.pictures)
            else:
                packets = sample.read.split()
                data += [packets[picture] for picture in sample.read.pictures]
        crop, mirror = chunk.samples.crop[_rows(samples)], self._mirrors(chunk, samples)
        return self._pipeline(route)(data, crop, mirror, pictures)

    def _in_software(self, chunk: Chunk, samples: list[_Sample]) -> list[Tensor]:
        """Decode in software. Fails samples that do not decode. An error of the resize is no fault of the data."""
        windows: list[npt.NDArray[np.uint8]] = []
        for sample in samples:
            assert sample.info is not None
            assert sample.read is not None
            clip, frame = int(chunk.samples.clip[sample.row]), chunk.samples.frame[sample.row]
            try:
                pictures = self.store.decode(self._decoder, clip, sample.info, sample.read, frame)
            except BadPackets as error:
                self._fail(chunk, sample, clip, "decode", str(error))
                continue
            for picture, (y, x, height, width) in zip(pictures, chunk.samples.crop[sample.row], strict=True):
                windows.append(picture[y : y + height, x : x + width])
        good = [sample for sample in samples if not sample.failed]
        if not good:
            return []
        return self._pipeline("frames")(windows, chunk.samples.crop[_rows(good)], self._mirrors(chunk, good))

    def _pipeline(self, route: Route) -> DecodeCropResize:
        if route not in self._pipelines:
            config = self.sampler.config
            self._pipelines[route] = DecodeCropResize(
                route, config.size, self.sampler.views, self.max_chunk, device=self.device, threads=self.threads
            )
        return self._pipelines[route]

    @staticmethod
    def _mirrors(chunk: Chunk, samples: list[_Sample]) -> npt.NDArray[np.bool_]:
        infos = [sample.info for sample in samples if sample.info]
        rotations, mirrored = (np.array([getattr(info, name) for info in infos]) for name in ("rotation", "mirror"))
        return mirrors(chunk.samples.flip[_rows(samples)], rotations, mirrored)

    @staticmethod
    def _upright(samples: list[_Sample], views: list[Tensor]) -> list[Tensor]:
        if not any(sample.info and sample.info.rotation for sample in samples):
            return views
        views = [view.clone() for view in views]  # DALI owns the memory of its outputs
        for view in views:
            for square, sample in zip(view, samples, strict=True):
                assert sample.info is not None
                square.copy_(torch.rot90(square.clone(), -sample.info.rotation // 90))
        return views

    def _fail(self, chunk: Chunk, sample: _Sample, clip: int, code: str, reason: str) -> None:
        source = sample.info.source if sample.info and code != "index" else ""
        chunk.failures.append(Failure(sample.number, sample.attempt, clip, source, code, reason))
        sample.attempt, sample.failed = sample.attempt + 1, True


def _shard(sample: _Sample) -> int:
    assert sample.info is not None
    return sample.info.shard


def _rows(samples: list[_Sample]) -> npt.NDArray[np.int64]:
    return np.array([sample.row for sample in samples], np.int64)
