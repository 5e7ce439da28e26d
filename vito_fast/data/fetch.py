"""From sample numbers to a finished batch: sample, read, decode, augment; bad samples are replaced."""

import logging
import time
from concurrent.futures import ThreadPoolExecutor
from threading import local
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import vito_kernels
from vito_fast.data.decode import BadPackets, Decoder
from vito_fast.data.index import Read
from vito_fast.data.pipeline import DecodeError, Geometry
from vito_fast.data.sampler import Sampler, SamplerConfig, Samples
from vito_fast.data.store import Store

if TYPE_CHECKING:
    from vito_fast.data.loader import LoaderStats

log = logging.getLogger("vito_fast.data")
LEAST = 1000
"""Samples over which the share of bad ones is taken at least."""


class Fetcher:
    """Makes batches by sample number. Used by one thread at a time."""

    def __init__(
        self,
        store: Store,
        batch_size: int,
        config: SamplerConfig,
        seed: int,
        stats: "LoaderStats",
        *,
        augment: bool,
        device: torch.device,
        dtype: torch.dtype,
        threads: int,
        max_bad_share: float,
    ):
        self.store, self.batch_size, self.config, self.stats = store, batch_size, config, stats
        self.sampler = Sampler(store.index, config, seed)
        self.augment, self.device, self.dtype, self.max_bad_share = augment, device, dtype, max_bad_share
        source = "jpeg" if store.format == "jpeg" else "frames"
        limit = batch_size * config.views
        self._geometry = Geometry(source, config.size, limit, device=str(device), threads=threads)
        self._decode_pool = None if store.format == "jpeg" else ThreadPoolExecutor(threads, "decode")
        self._decoders = local()

    def fetch(self, numbers: np.ndarray) -> dict[str, Any]:
        """The batch of ``numbers`` (B,), see ClipLoader. Raises RuntimeError past the share of bad samples."""
        samples = self.sampler.sample(numbers)
        attempts = np.zeros(len(numbers), np.uint32)
        pictures: list[Any] = [None] * len(numbers)
        todo = np.arange(len(numbers))
        while len(todo):
            failed = self._read(samples, todo, pictures)
            todo = self._replace(numbers, samples, attempts, failed)
        squares = self._geometry_of(numbers, samples, attempts, pictures)
        self.stats.samples += len(numbers)
        views = self._finish(squares, samples)
        return {
            "views": views,
            "clip": torch.from_numpy(samples.clip), "video": torch.from_numpy(samples.video),
            "frame": torch.from_numpy(samples.frame), "time": torch.from_numpy(samples.time),
            "sample": torch.from_numpy(numbers),
        }  # fmt: skip

    def _read(self, samples: Samples, todo: np.ndarray, pictures: list[Any]) -> list[tuple[int, str, str]]:
        """Fills ``pictures[i]`` (V JPEGs or frames) for i in todo; returns (i, kind, reason) of those that fail."""
        start = time.perf_counter()
        reads = self.store.reader.read(samples.clip[todo], samples.frame[todo], single_stream=False)
        read_end = time.perf_counter()
        self.stats.read_seconds += read_end - start
        failed = []
        good = []
        for i, read in zip(todo, reads, strict=True):
            if read.code == "ok":
                good.append((int(i), read))
            else:
                failed.append((int(i), read.code, read.error))
            self.stats.bytes_read += len(read.data)
            self.stats.packets += len(read.packets)
            self.stats.frames += len(set(read.pictures.tolist()))
        if self._decode_pool is None:
            for i, read in good:
                packets = read.split()
                pictures[i] = [packets[k] for k in read.pictures]
        else:
            work = [self._decode_pool.submit(self._decode, samples, i, read) for i, read in good]
            for (i, _), future in zip(good, work, strict=True):
                try:
                    pictures[i] = future.result()
                except BadPackets as error:
                    failed.append((i, "decode", f"clip {samples.clip[i]}: {error}"))
            self.stats.decode_seconds += time.perf_counter() - read_end
        return failed

    def _decode(self, samples: Samples, i: int, read: Read) -> list[np.ndarray]:
        """The crop windows of one sample's frames, cut out here so that only they travel on."""
        if not hasattr(self._decoders, "decoder"):
            self._decoders.decoder = Decoder()
        clip = int(samples.clip[i])
        wanted = self.store.index.packets(clip).order[samples.frame[i]]
        frames = self._decoders.decoder.decode(self.store.index.clip(clip), read, wanted)
        return [frame[y : y + h, x : x + w] for frame, (y, x, h, w) in zip(frames, samples.crop[i], strict=True)]

    def _replace(
        self, numbers: np.ndarray, samples: Samples, attempts: np.ndarray, failed: list[tuple[int, str, str]]
    ) -> np.ndarray:
        """Draws another clip for every failed place; returns the places."""
        for i, kind, reason in failed:
            self.stats.failures += 1
            self.stats.reasons[kind] = self.stats.reasons.get(kind, 0) + 1
            log.warning("sample %d replaced: clip %d, %s: %s", numbers[i], samples.clip[i], kind, reason)
            allowed = self.max_bad_share * max(self.stats.samples + len(numbers), LEAST)
            attempts[i] += 1
            if self.stats.failures > allowed or attempts[i] >= self.store.index.num_clips:
                raise RuntimeError(
                    f"{self.stats.failures} of {self.stats.samples + len(numbers)} samples could not be read, more "
                    f"than max_bad_share={self.max_bad_share}; the last: clip {samples.clip[i]}, {kind}: {reason}. "
                    f"`vito-fast inspect-store {self.store.path}` says which clips are damaged"
                )
        places = np.array([i for i, _, _ in failed], np.int64)
        if len(places):
            fresh = self.sampler.sample(numbers[places], attempts[places])
            for name in Samples._fields:
                getattr(samples, name)[places] = getattr(fresh, name)
        return places

    def _geometry_of(
        self, numbers: np.ndarray, samples: Samples, attempts: np.ndarray, pictures: list[Any]
    ) -> torch.Tensor:
        """Squares (V * B, S, S, 3) uint8, view by view. What DALI refuses is found one by one and replaced."""
        start = time.perf_counter()
        try:
            squares = self._squares(samples, pictures, slice(None))
        except DecodeError:
            todo = np.array(self._refused(numbers, samples, attempts, pictures))
            while len(todo):
                failed = self._read(samples, todo, pictures)
                bad = {i for i, _, _ in failed}
                retry = [int(i) for i in todo if i not in bad]
                todo = np.union1d(
                    self._replace(numbers, samples, attempts, failed),
                    self._refused(numbers, samples, attempts, pictures, retry),
                ).astype(np.int64)
            squares = self._squares(samples, pictures, slice(None))
        self.stats.decode_seconds += time.perf_counter() - start
        return squares

    def _refused(self, numbers, samples, attempts, pictures, places=None) -> np.ndarray:
        """Runs the samples one by one; replaces those that DALI refuses and returns their places."""
        failed = []
        for i in range(len(numbers)) if places is None else places:
            self._geometry.rebuild()
            try:
                self._squares(samples, pictures, slice(i, i + 1))
            except DecodeError as error:
                failed.append((i, "decode", str(error)))
        self._geometry.rebuild()
        return self._replace(numbers, samples, attempts, failed)

    def _squares(self, samples: Samples, pictures: list[Any], which: slice) -> torch.Tensor:
        crop = np.swapaxes(samples.crop[which], 0, 1).reshape(-1, 4)
        flip = samples.flip[which].T.reshape(-1)
        flat = [sample[view] for view in range(self.config.views) for sample in pictures[which]]
        if self.store.format != "jpeg":  # already cut out
            crop = np.concatenate([np.zeros_like(crop[:, :2]), crop[:, 2:]], 1)
        return self._geometry.run(flat, crop, flip)

    def _finish(self, squares: torch.Tensor, samples: Samples) -> tuple[torch.Tensor, ...]:
        start = time.perf_counter()
        batch = len(samples.clip)
        squares = self._upright(squares, samples)
        if self.augment:
            params = torch.from_numpy(np.ascontiguousarray(np.swapaxes(samples.params, 0, 1)).reshape(-1, 8))
            squares = vito_kernels.photometric(squares, params.to(squares.device), dtype=self.dtype)
        self.stats.augment_seconds += time.perf_counter() - start
        return tuple(squares.split(batch))

    def _upright(self, squares: torch.Tensor, samples: Samples) -> torch.Tensor:
        """Turns the views of rotated videos (``copy`` stores); they are flipped already, which reverses the turn."""
        if self.store.format != "copy":
            return squares
        rotation = np.array([self.store.index.clip(int(clip)).rotation for clip in samples.clip])
        for i in np.flatnonzero(rotation):
            for view in range(samples.flip.shape[1]):
                quarters = -int(rotation[i]) // 90 * (-1 if samples.flip[i, view] else 1)
                place = view * len(rotation) + i
                squares[place] = torch.rot90(squares[place], quarters, (0, 1))
        return squares
