"""From file to two RGB frames at 224 px, one thread: our stores against the public readers on the same requests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench.harness import Candidate, Result, Work, absent
from bench.videos import Request, exported, originals, requests, sequential, store
from vito_fast.data.bench_data import PairReader, installed
from vito_fast.data.store.store import Decoder, Store

pytestmark = pytest.mark.cpu_only
SIDE = 224


def small(frame: np.ndarray) -> np.ndarray:
    """The one resize that every candidate uses, of the middle that an h264 store keeps too (its sizes are few: 7:4)."""
    import cv2

    margin = max(0, frame.shape[1] - frame.shape[0] * 7 // 4) // 2
    middle = frame[:, margin : frame.shape[1] - margin]
    return cv2.resize(middle, (SIDE, SIDE), interpolation=cv2.INTER_LINEAR)


def delivered(frames: Sequence[np.ndarray]) -> Result:
    return (torch.from_numpy(np.stack([small(frame) for frame in frames])),)


def by_reader(reader: PairReader, files: list[Path], asked: list[Request]) -> Callable[[], Result]:
    return lambda: delivered([frame for one in asked for frame in reader(files[one.video], list(one.frames))])


def by_store(folder: Path, files: list[Path], asked: list[Request]) -> Callable[[], Result]:
    """Our path without the loader's threads: planned read, then a codec context that stays open."""
    opened, decoder = Store(folder, threads=1), Decoder()
    clips = {opened.index.clip(number).source: number for number in range(len(opened))}
    number = [clips[files[one.video].name] for one in asked]

    def call() -> Result:
        reads = opened.reader.read(np.array(number), np.array([one.frames for one in asked]), single_stream=False)
        frames = []
        for clip, one, read in zip(number, asked, reads, strict=True):
            wanted = opened.index.packets(clip).order[list(one.frames)]
            frames += decoder.decode(opened.index.clip(clip), read, wanted)
        return delivered(frames)

    return call


def bare_decode(folder: Path, files: list[Path], asked: list[Request]) -> Callable[[], Result]:
    """The codec's own time on the packets that must be decoded: no file, no color conversion, no resize."""
    import av

    opened = Store(folder, threads=1)
    clips = {opened.index.clip(number).source: number for number in range(len(opened))}
    number = [clips[files[one.video].name] for one in asked]
    reads = opened.reader.read(np.array(number), np.array([one.frames for one in asked]), single_stream=False)
    payloads = [[bytes(packet) for packet in read.split()] for read in reads]
    info = opened.index.clip(number[0])
    contexts = {}
    for clip in set(number):
        contexts[clip] = av.CodecContext.create(info.codec, "r")
        contexts[clip].thread_count = 1
        contexts[clip].extradata = opened.index.clip(clip).extradata or None

    def call() -> Result:
        for clip, read, packets in zip(number, reads, payloads, strict=True):
            for first, end in read.runs:
                for row in range(first, end):
                    contexts[clip].decode(av.Packet(packets[row]))
                contexts[clip].decode(None)
                contexts[clip].flush_buffers()
        return ()

    return call


def wrong_or_far(truths: dict[int, np.ndarray], asked: list[Request]) -> Callable[[Result, Result], float]:
    """Mean distance in gray levels from sequential decoding;

    infinite if a neighboring frame is nearer than the one asked for.
    """

    def agree(got: Result, _: Result) -> float:
        frames, worst, place = got[0].numpy().astype(np.float32), 0.0, 0
        for one in asked:
            for number in one.frames:
                near = range(max(0, number - 2), min(len(truths[one.video]), number + 3))
                distance = {n: np.abs(frames[place] - small(truths[one.video][n])).mean() for n in near}
                if min(distance, key=distance.__getitem__) != number:
                    return float("inf")
                worst, place = max(worst, float(distance[number])), place + 1
        return worst

    return agree


def peers(files: list[Path], asked: list[Request], folder: Path, quick: bool) -> list[Candidate]:
    """The public readers on the originals, and on the clips of the store ``folder`` as files."""
    readers, missing = installed()
    found = [Candidate(name, by_reader(reader, files, asked)) for name, reader in readers.items()]
    if not quick:
        own = exported(folder)
        clips = [own[file.name] for file in files]
        for name, reader in readers.items():
            found.append(Candidate(f"{name}, store's bytes", by_reader(reader, clips, asked), "same_bytes"))
    return found + [absent(name, f"not installed ({why})") for name, why in missing.items()]


def decode_race(
    race: Any, case: str, params: dict[str, Any], files: list[Path], mine: list[Candidate], asked: Any, folder: Path,
    quick: bool,
) -> None:  # fmt: skip
    truths = {video: sequential(files[video]) for video in {one.video for one in asked}}
    race(
        case,
        params,
        [*mine, *peers(files, asked, folder, quick)],
        truth=lambda: (torch.zeros(1),),
        agree=wrong_or_far(truths, asked),
        bound=5.0,  # 256 lines differ from 720 by 4; another frame is refused whatever its distance
        work=Work(items=len(asked), unit="pairs"),
        device="cpu",
        memory=False,
    )


@pytest.mark.parametrize(
    "gop", [12, pytest.param(50, marks=pytest.mark.full), pytest.param(250, marks=pytest.mark.full)]
)
def test_copy_store(race: Any, quick: bool, gop: int) -> None:
    """256p originals, not encoded again."""
    files = originals(256, gop, 2)
    asked = requests(len(files), 4)
    folder = store(files, "copy")
    mine = [
        Candidate("vito_fast copy store", by_store(folder, files, asked), "ours"),
        Candidate("bare decode", bare_decode(folder, files, asked), "limit", "the planned packets through the codec"),
    ]
    decode_race(race, "decode_copy", {"side": 256, "GOP": gop}, files, mine, asked, folder, quick)


@pytest.mark.full
@pytest.mark.parametrize("format", ["jpeg", "h264"])
def test_packed_store(race: Any, quick: bool, format: str) -> None:
    """Stores encoded again at 256p, against readers of the 720p originals with a keyframe every 250 frames."""
    files = originals(720, 250, 2)
    asked = requests(len(files), 2)
    folder = store(files, format)
    mine = [Candidate(f"vito_fast {format} store", by_store(folder, files, asked), "ours")]
    decode_race(race, f"decode_{format}", {"side": 720, "GOP": 250}, files, mine, asked, folder, quick)
