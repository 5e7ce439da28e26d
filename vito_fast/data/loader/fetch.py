"""From sample numbers to views: draw, read, decode, cut, resize; what fails is replaced by another clip.

A batch is made in parts of a few samples by several workers at once. Every sample is a function of its number alone, so
neither the parts nor the workers show in the result.
"""

import time
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vito_fast.data.loader.dali import DecodeError, Geometry, Source
from vito_fast.data.loader.geometry import mirrors, turn
from vito_fast.data.loader.sampler import Sampler, Samples
from vito_fast.data.store.decode import BadPackets, Decoder
from vito_fast.data.store.index import ClipInfo, Read
from vito_fast.data.store.store import Store

Put = Callable[[npt.NDArray[np.int64], list[Tensor], npt.NDArray[np.float32]], None]
"""Takes rows (N,) of the part, V tensors (N, S, S, 3) uint8 that hold until it returns, and params (N, V, 8)."""


@dataclass(frozen=True)
class Failure:
    """A sample that could not be had, and was replaced."""

    sample: int
    attempt: int
    clip: int
    source: str
    code: str
    """As ``Read.code``, or ``decode``."""
    reason: str


@dataclass
class Part:
    """Some samples of a batch and what they cost; seconds are one worker's."""

    samples: Samples
    failures: list[Failure] = field(default_factory=list)
    hopeless: bool = False
    """Given up: more has failed than may in the whole run so far."""
    refused: int = 0
    """Samples that DALI refused and that were decoded in software."""
    bytes_read: int = 0
    packets: int = 0
    frames: int = 0
    read_seconds: float = 0.0
    decode_seconds: float = 0.0
    augment_seconds: float = 0.0

    @contextmanager
    def timed(self, name: str):
        start = time.perf_counter()
        try:
            yield
        finally:
            setattr(self, name, getattr(self, name) + time.perf_counter() - start)


@dataclass
class _Sample:
    """One sample on its way."""

    row: int
    number: int
    attempt: int = 0
    failed: bool = False
    info: ClipInfo | None = None
    read: Read | None = None


class Fetcher:
    """One worker's tools: DALI pipelines and codec contexts, made when first needed. Use by one thread at a time.

    ``video_codecs`` are those that DALI decodes, from mini-clips; video of any other is decoded in software.
    """

    def __init__(
        self,
        store: Store,
        sampler: Sampler,
        max_part: int,
        *,
        device: torch.device,
        threads: int = 1,
        video_codecs: Iterable[str] = (),
    ):
        self.store, self.sampler, self.max_part, self.device, self.threads = store, sampler, max_part, device, threads
        self.video_codecs = frozenset(video_codecs)
        self._decoder = Decoder()
        self._geometries: dict[Source, Geometry] = {}

    def fetch(self, numbers: npt.NDArray[np.int64], put: Put, budget: float) -> Part:
        """Make samples ``numbers``, (B,) with B <= max_part, and hand their views to ``put``, in one or more calls.

        Gives up once more than ``budget`` samples have failed, or one has with every clip.
        """
        part = Part(_empty(len(numbers), self.sampler.config.views))
        todo = [_Sample(row, int(number)) for row, number in enumerate(numbers)]
        while todo and not part.hopeless:
            for route, samples in self._routed(self._draw(part, todo)).items():
                self._make(part, route, self._read(part, samples, miniclip=route == "video"), put)
            todo = [sample for sample in todo if sample.failed]
            tried = max((sample.attempt for sample in todo), default=0)
            part.hopeless = len(part.failures) > budget or tried >= len(self.store)
        return part

    def _draw(self, part: Part, samples: list[_Sample]) -> list[_Sample]:
        """Fills the samples' rows of ``part.samples``; fails those whose clip is corrupt in the index."""
        numbers, attempts = [s.number for s in samples], [s.attempt for s in samples]
        try:
            drawn = self.sampler.sample(numbers, attempts)
        except ValueError as error:
            if len(samples) > 1:
                return [good for sample in samples for good in self._draw(part, [sample])]
            self._fail(part, samples[0], int(self.sampler.clips(numbers, attempts)[0]), "index", str(error))
            return []
        rows = _rows(samples)
        for name in Samples._fields:
            getattr(part.samples, name)[rows] = getattr(drawn, name)
        for sample, clip in zip(samples, drawn.clip, strict=True):
            sample.failed = False
            try:
                sample.info = self.store.index.clip(int(clip))
            except ValueError as error:
                self._fail(part, sample, int(clip), "index", str(error))
        return [sample for sample in samples if not sample.failed]

    def _routed(self, samples: list[_Sample]) -> dict[Source, list[_Sample]]:
        """Which pipeline takes which samples."""
        if self.store.format == "jpeg":
            return {"jpeg": samples} if samples else {}
        routes: dict[Source, list[_Sample]] = {}
        for sample in samples:
            assert sample.info is not None
            routes.setdefault("video" if sample.info.codec in self.video_codecs else "frames", []).append(sample)
        return routes

    def _read(self, part: Part, samples: list[_Sample], *, miniclip: bool) -> list[_Sample]:
        """Reads the samples' packets; fails those that cannot be read whole."""
        rows = _rows(samples)
        with part.timed("read_seconds"):
            clips, frames = part.samples.clip[rows], part.samples.frame[rows]
            reads = self.store.reader.read(clips, frames, miniclip=miniclip, single_stream=False)
        for sample, clip, read in zip(samples, clips, reads, strict=True):
            if read.code != "ok":
                self._fail(part, sample, int(clip), read.code, read.error)
                continue
            sample.read = read
            part.bytes_read += int(read.sizes.sum())
            part.packets += len(read.packets)
            part.frames += len(set(read.pictures.tolist()))
        return [sample for sample in samples if not sample.failed]

    def _make(self, part: Part, route: Source, samples: list[_Sample], put: Put) -> None:
        """Decodes, cuts and resizes what was read. What DALI refuses is decoded in software, where each fails alone."""
        if not samples:
            return
        with part.timed("decode_seconds"):
            try:
                views = self._in_software(part, samples) if route == "frames" else self._by_dali(part, route, samples)
            except DecodeError:
                part.refused += len(samples)
                if route == "video":
                    samples = self._read(part, samples, miniclip=False)
                views = self._in_software(part, samples)
            samples = [sample for sample in samples if not sample.failed]
            views = self._turned(samples, views)
        if samples:
            rows = _rows(samples)
            with part.timed("augment_seconds"):
                put(rows, views, part.samples.params[rows])

    def _by_dali(self, part: Part, route: Source, samples: list[_Sample]) -> list[Tensor]:
        data, pictures = [], []
        for sample in samples:
            assert sample.read is not None
            if route == "video":
                data.append(sample.read.data)
                pictures.append(sample.read.pictures)
            else:
                packets = sample.read.split()
                data += [packets[picture] for picture in sample.read.pictures]
        crop, mirror = part.samples.crop[_rows(samples)], self._mirrors(part, samples)
        return self._geometry(route)(data, crop, mirror, pictures)

    def _in_software(self, part: Part, samples: list[_Sample]) -> list[Tensor]:
        """Fails samples that do not decode; a refusal of the others' plain pictures would be no fault of the data."""
        windows: list[npt.NDArray[np.uint8]] = []
        for sample in samples:
            assert sample.info is not None
            assert sample.read is not None
            clip, frame = int(part.samples.clip[sample.row]), part.samples.frame[sample.row]
            try:
                pictures = self.store.decode(self._decoder, clip, sample.info, sample.read, frame)
            except BadPackets as error:
                self._fail(part, sample, clip, "decode", str(error))
                continue
            for picture, (y, x, height, width) in zip(pictures, part.samples.crop[sample.row], strict=True):
                windows.append(picture[y : y + height, x : x + width])
        good = [sample for sample in samples if not sample.failed]
        if not good:
            return []
        return self._geometry("frames")(windows, part.samples.crop[_rows(good)], self._mirrors(part, good))

    def _geometry(self, source: Source) -> Geometry:
        if source not in self._geometries:
            config = self.sampler.config
            self._geometries[source] = Geometry(
                source, config.size, config.views, self.max_part, device=self.device, threads=self.threads
            )
        return self._geometries[source]

    @staticmethod
    def _mirrors(part: Part, samples: list[_Sample]) -> npt.NDArray[np.bool_]:
        rotations = [sample.info.rotation for sample in samples if sample.info]
        return mirrors(part.samples.flip[_rows(samples)], np.array(rotations))

    @staticmethod
    def _turned(samples: list[_Sample], views: list[Tensor]) -> list[Tensor]:
        if not any(sample.info and sample.info.rotation for sample in samples):
            return views
        views = [view.clone() for view in views]  # DALI's memory is not ours to write to
        for view in views:
            for square, sample in zip(view, samples, strict=True):
                assert sample.info is not None
                square.copy_(turn(square.clone(), sample.info.rotation))
        return views

    def _fail(self, part: Part, sample: _Sample, clip: int, code: str, reason: str) -> None:
        source = sample.info.source if sample.info and code != "index" else ""
        part.failures.append(Failure(sample.number, sample.attempt, clip, source, code, reason))
        sample.attempt, sample.failed = sample.attempt + 1, True


def _rows(samples: list[_Sample]) -> npt.NDArray[np.int64]:
    return np.array([sample.row for sample in samples], np.int64)


def _empty(count: int, views: int) -> Samples:
    shapes = {"clip": (), "video": (), "frame": (views,), "time": (views,), "crop": (views, 4), "flip": (views,)}
    dtypes = {"clip": np.int64, "video": np.int64, "frame": np.int32, "time": np.float64, "crop": np.int32}
    arrays = {
        name: np.zeros(
            (count, *shapes.get(name, (views, 8))), dtypes.get(name, np.uint8 if name == "flip" else np.float32)
        )
        for name in Samples._fields
    }
    return Samples(**arrays)
