"""From files to augmented, normalized views: our loader against the best public CPU parts."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bench.bench_photometric import torchvision_chain
from bench.harness import Candidate, Result, Work, absent
from bench.peers import not_imported
from bench.videos import exported, originals, store
from vito_fast.config import SamplerConfig
from vito_fast.data.bench_data import installed
from vito_fast.data.loader.loader import ClipLoader
from vito_fast.data.loader.sampler import Sampler, Samples
from vito_fast.data.store.store import frames
from vito_kernels import reference

pytestmark = pytest.mark.cpu_only
THREADS = len(os.sched_getaffinity(0))
SAMPLER = SamplerConfig(views=2)
Color = Callable[[Tensor, Tensor], Tensor]


def ours(folder: Path, batch: int) -> tuple[Callable[[], Result], ClipLoader]:
    """Batch 0, made when asked for: nothing is made ahead, so nothing of ours runs in other candidates' turns."""
    loader = ClipLoader(folder, batch, seed=1, threads=THREADS, sampler=SAMPLER)
    return lambda: loader.batch(0)["views"], loader


def by_parts(name: str, files: dict[int, Path], samples: Samples, scale: float, color: Color) -> Candidate:
    """A public reader, torchvision's crop and resize, and ``color``; samples spread over as many threads."""
    readers, missing = installed()
    if "torchcodec" in missing:
        return absent(name, f"not installed ({missing['torchcodec']})")
    try:
        from torchvision.transforms.v2 import functional as F
    except Exception as error:
        return absent(name, not_imported(error))
    read = readers["torchcodec"]

    def sample(number: int) -> Tensor:
        pictures = read(files[int(samples.clip[number])], samples.frame[number].tolist())
        views = []
        for view, picture in enumerate(pictures):
            y, x, height, width = (int(value / scale) for value in samples.crop[number, view])
            cut = torch.from_numpy(picture).permute(2, 0, 1)[:, y : y + height, x : x + width]
            square = F.resize(cut, [224, 224], F.InterpolationMode.BICUBIC, antialias=False)
            views.append(F.horizontal_flip(square) if samples.flip[number, view] else square)
        rows = torch.from_numpy(samples.params[number])
        return color(torch.stack(views).permute(0, 2, 3, 1), rows)

    pool = ThreadPoolExecutor(THREADS)

    def call() -> Result:
        return tuple(torch.stack(list(pool.map(sample, range(len(samples.clip))))).unbind(1))

    return Candidate(name, call)


def exactly(folder: Path, samples: Samples) -> Result:
    """Sequentially decoded frames, cut and resized one by one in float, the reference's colors in float64."""
    views = []
    for view in range(samples.frame.shape[1]):
        squares = []
        for number, clip in enumerate(samples.clip):
            (picture,) = frames(folder, int(clip), [int(samples.frame[number, view])])
            y, x, height, width = samples.crop[number, view]
            cut = torch.from_numpy(picture[y : y + height, x : x + width]).permute(2, 0, 1)[None].float()
            square = torch.nn.functional.interpolate(cut, (224, 224), mode="bicubic", antialias=False)
            square = square.round().clamp(0, 255).byte()[0].permute(1, 2, 0)
            squares.append(square.flip(1) if samples.flip[number, view] else square)
        params = torch.from_numpy(samples.params[:, view])
        views.append(reference.photometric(torch.stack(squares), params, dtype=torch.float64))
    return views


def mean_distance(got: Result, truth: Result) -> float:
    """Mean distance in gray levels: decoders and resizers differ by a few, another frame or crop by dozens."""
    std = torch.tensor([0.229, 0.224, 0.225], dtype=torch.float64)[:, None, None]
    if [view.shape for view in got] != [view.shape for view in truth]:
        return float("inf")
    pairs = zip(got, truth, strict=True)
    return torch.stack([((mine.double() - true).abs() * std * 255).mean() for mine, true in pairs]).max().item()


def test_jpeg_store(race: Any, quick: bool) -> None:
    """Sixteen pairs of 224 px views; the others read the 256p originals with a key every 12 frames."""
    count = 16
    files = originals(256, 12, count, frames=100)
    folder = store(files, "jpeg")
    mine, loader = ours(folder, count)
    index = loader.store.index
    samples = Sampler(index, SAMPLER, 1).sample(np.arange(count))
    by_source = {file.name: file for file in files}
    by_clip = {clip: by_source[index.clip(clip).source] for clip in range(count)}
    scale = index.clip(0).height / 256
    exact_colors: Color = reference.photometric
    quick_colors: Color = lambda images, params: torchvision_chain(images, params, 23)  # noqa: E731
    context = by_parts("torchcodec + torchvision v2", by_clip, samples, scale, quick_colors)
    context.role, context.note = "context", context.note or "color formulas of its own"
    own = exported(folder)
    clips = {clip: own[file.name] for clip, file in by_clip.items()}
    same = by_parts("torchcodec + torch, store's bytes", clips, samples, 1.0, exact_colors)
    same.role = "same_bytes"
    candidates = [
        Candidate("vito_fast jpeg store", mine, "ours"),
        by_parts("torchcodec + torch", by_clip, samples, scale, exact_colors),
        *([] if quick else [same, context]),
    ]
    race(
        "loader",
        {"B": count, "side": 256, "GOP": 12},
        candidates,
        truth=lambda: exactly(folder, samples),
        agree=mean_distance,
        bound=2.0,  # ours errs by 0.3, who reads the originals by 1.5; without the blur it is 3.3
        work=Work(items=count, unit="pairs"),
        device="cpu",
        memory=False,
    )
