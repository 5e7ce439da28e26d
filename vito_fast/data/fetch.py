"""From sample numbers to views: draw, read, decode, cut, augment; what fails is replaced by another clip.

A batch is made in parts of a few samples by several workers at once. Every sample is a function of its number alone,
so neither the parts nor the workers show in the result.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

import vito_kernels
from vito_fast.data.decode import BadPackets, Decoder
from vito_fast.data.geometry import cut, placement
from vito_fast.data.index import ClipInfo, Read
from vito_fast.data.pipeline import DecodeError, Geometry
from vito_fast.data.sampler import Sampler, Samples
from vito_fast.data.store import Store

NVDEC_CODECS = frozenset(["h264", "hevc", "vp9"])
"""What every GPU since Turing decodes in hardware, 8 bits a sample; AV1 is left to software, as A100 and H100 lack it."""


@dataclass(frozen=True)
class Failure:
    """A sample that could not be had."""

    sample: int
    attempt: int
    clip: int
    source: str
    code: str
    """As ``Read.code``, or ``decode``."""
    reason: str


@dataclass
class Part:
    """Some samples of a batch, made; their views are where ``Fetcher`` was told to put them."""

    samples: Samples
    failures: list[Failure] = field(default_factory=list)
    hopeless: bool = False
    """Given up on: more has failed than a whole run may."""
    software: int = 0
    """Samples that DALI refused and software decoded."""
    bytes_read: int = 0
    packets: int = 0
    frames: int = 0
    read_seconds: float = 0.0
    decode_seconds: float = 0.0
    augment_seconds: float = 0.0


@dataclass
class _Drawn:
    """A sample that was read: what to decode, and where its views belong."""

    row: int
    info: ClipInfo
    read: Read


Put = Callable[[npt.NDArray[np.int64], list[Tensor], npt.NDArray[np.float32]], None]


class Fetcher:
    """One worker's tools: DALI pipelines, codec contexts. Use by one thread at a time."""

    def __init__(
        self, store: Store, sampler: Sampler, max_batch: int, *, device: torch.device, threads: int, hardware: bool
    ):
        self.store, self.sampler, self.decoder = store, sampler, Decoder()
        self._hardware = hardware and store.format != "jpeg"
        config = sampler.config

        def geometry(source: Any) -> Geometry:
            return Geometry(source, config.size, config.views, max_batch, device=device, threads=threads)

        self._jpeg = geometry("jpeg") if store.format == "jpeg" else None
        self._video = geometry("video") if self._hardware else None
        self._cut: Geometry | None = None
        self._make_cut = lambda: geometry("frames")

    def fetch(self, numbers: npt.NDArray[np.int64], put: Put, budget: float) -> Part:
        """Samples ``numbers``, (B,); ``put(rows, views, params)`` is given their views in one or more calls:

        rows (N,), V tensors (N, S, S, 3) uint8 that hold until it returns, and params (N, V, 8). Gives up (and says so)
        once more than ``budget`` samples have failed, or one has failed with every clip.
        """
        part = Part(_empty(len(numbers), self.sampler.config.views))
        attempts = np.zeros(len(numbers), np.uint32)
        todo = np.arange(len(numbers))
        while len(todo):
            before = len(part.failures)
            drawn = self._read(part, numbers, attempts, todo)
            self._decode(part, numbers, attempts, drawn, put)
            todo = np.unique([self._row(numbers, failure) for failure in part.failures[before:]]).astype(np.int64)
            attempts[todo] += 1
            if len(part.failures) > budget or (attempts >= len(self.store)).any():
                part.hopeless = True
                break
        return part

    @staticmethod
    def _row(numbers: npt.NDArray[np.int64], failure: Failure) -> int:
        return int(np.flatnonzero(numbers == failure.sample)[0])

    def _fail(self, part: Part, number: int, attempt: int, clip: int, code: str, reason: str) -> None:
        try:
            source = self.store.index.clip(clip).source
        except ValueError:  # its entry is what is corrupt
            source = ""
        part.failures.append(Failure(int(number), int(attempt), int(clip), source, code, reason))

    def _draw(
        self, part: Part, numbers: npt.NDArray[np.int64], attempts: npt.NDArray[np.uint32], rows: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        """Fills ``part.samples`` at ``rows``; returns the rows whose clip's index entry is sound."""
        try:
            fresh = self.sampler.sample(numbers[rows], attempts[rows])
        except ValueError as error:
            if len(rows) > 1:
                return np.concatenate([self._draw(part, numbers, attempts, row) for row in np.split(rows, len(rows))])
            (row,) = rows
            (clip,) = self.sampler.clips(numbers[rows], attempts[rows])
            self._fail(part, numbers[row], attempts[row], clip, "index", str(error))
            return rows[:0]
        for whole, new in zip(part.samples, fresh, strict=True):
            whole[rows] = new
        return rows

    def _read(
        self, part: Part, numbers: npt.NDArray[np.int64], attempts: npt.NDArray[np.uint32], todo: npt.NDArray[np.int64]
    ) -> list[_Drawn]:
        start = time.perf_counter()
        samples, good = part.samples, []
        rows = self._draw(part, numbers, attempts, todo)
        infos = [self.store.index.clip(int(clip)) for clip in samples.clip[rows]]
        hardware = np.array([self._hardware and info.codec in NVDEC_CODECS for info in infos], bool)
        for group in (rows[~hardware], rows[hardware]):
            if not len(group):
                continue
            reads = self.store.reader.read(
                samples.clip[group], samples.frame[group], miniclip=group is not None and bool(hardware[rows == group[0]][0]),
                single_stream=False,
            )  # fmt: skip
            for row, read in zip(group, reads, strict=True):
                if read.code == "ok":
                    good.append(_Drawn(int(row), infos[int(np.flatnonzero(rows == row)[0])], read))
                    part.bytes_read += int(read.sizes.sum())
                    part.packets += len(read.packets)
                    part.frames += len(np.unique(read.pictures))
                else:
                    self._fail(part, numbers[row], attempts[row], samples.clip[row], read.code, read.error)
        part.read_seconds += time.perf_counter() - start
        return good
