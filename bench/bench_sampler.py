"""The C++ core: fully parameterized samples on one core, and opening an index of 1.2 million clips."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench.harness import Candidate, Result, Work
from vito_fast.config import SamplerConfig
from vito_fast.data.loader.sampler import Sampler
from vito_fast.data.store.index import KEY, ClipRecord, Index, write_index

pytestmark = pytest.mark.cpu_only

CLIPS, FRAMES = 10_000, 250
DRAWS = 10  # Philox blocks of four 32-bit words that a pair of views takes, about


def constant_clips(count: int, frames: int) -> list[ClipRecord]:
    """Clips of a JPEG store: constant rate, every packet a key; no shard is written."""
    shared: dict[str, Any] = {
        "codec": "mjpeg",
        "width": 320,
        "height": 240,
        "shard": 0,
        "time_base": Fraction(1, 25),
        "pts": np.arange(frames),
        "offsets": np.arange(frames) * 10_000,
        "sizes": np.full(frames, 10_000),
        "checksums": np.arange(frames, dtype=np.uint32),
        "flags": np.full(frames, KEY, np.uint8),
        "end": frames,
    }
    return [ClipRecord(video=i, source=f"{i}.mp4", **shared) for i in range(count)]


def make_index(path: Path, clips: int, frames: int) -> Index:
    write_index(path, constant_clips(clips, frames), format="jpeg", shards=[("shard-00000.bin", frames * 10_000)])
    return Index(path)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return make_index(tmp_path_factory.mktemp("index") / "index.bin", CLIPS, FRAMES)


def as_tensors(samples: Any) -> Result:
    return [torch.from_numpy(array) for array in samples]


@pytest.mark.parametrize("views", [2, pytest.param(4, marks=pytest.mark.full)])
def test_samples(race: Any, index: Index, views: int) -> None:
    """A batch of 4096; the truth is the same samples drawn one by one in another order."""
    batch = 4096
    numbers = np.arange(batch) * 7 + 123
    sampler = Sampler(index, SamplerConfig(views=views), seed=1)
    # Into 16 KiB again and again: where the pages of a large array happen to lie costs up to a sixth, for a whole run.
    generator, uniforms = np.random.Generator(np.random.Philox(1)), np.empty(2048)

    def one_by_one() -> Result:
        drawn = [
            Sampler(index, SamplerConfig(views=views), seed=1).sample(numbers[i : i + 1]) for i in range(batch)[::-1]
        ]
        return [torch.from_numpy(np.concatenate(arrays)) for arrays in zip(*drawn[::-1], strict=True)]

    def numbers_only() -> Result:
        for _ in range(batch * views * DRAWS * 2 // len(uniforms)):
            generator.random(out=uniforms)
        return ()

    candidates = [
        Candidate("vito_fast sampler", lambda: as_tensors(sampler.sample(numbers)), "ours"),
        Candidate("numpy Philox, bare numbers", numbers_only, "limit", "as many uniform doubles, nothing made of them"),
    ]
    params = {"B": batch, "V": views}
    work = Work(items=batch, unit="samples")
    race("sampler", params, candidates, truth=one_by_one, work=work, bound=0.0, device="cpu", memory=False)


@pytest.mark.full
def test_open(race: Any, tmp_path: Path) -> None:
    """Opens an index of 1.2 million clips and asks for the last one, beside a bare read of the file."""
    clips, frames = 1_200_000, 8
    make_index(tmp_path / "index.bin", clips, frames)

    def ours() -> Result:
        index = Index(tmp_path / "index.bin")
        return (torch.tensor([len(index), index.clip(clips - 1).video]),)

    def read() -> Result:
        with open(tmp_path / "index.bin", "rb") as file:
            while file.read(2**22):
                pass
        return ()

    candidates = [
        Candidate("vito_fast index", ours, "ours"),
        Candidate("bare read of the file", read, "context", "the index is mapped, not read"),
    ]
    truth = lambda: (torch.tensor([clips, clips - 1]),)  # noqa: E731
    race("index_open", {"clips": clips}, candidates, truth=truth, bound=0.0, device="cpu", memory=False)
