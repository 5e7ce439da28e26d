"""Reading speed of a store on this machine: the whole loader, and decoding alone beside public readers.

All measure the same requests, drawn by the sampler. The readers take turns within each round, so that a busy machine
slows all of them. Figures are medians over the rounds. A reader that returns wrong frames is reported.
"""

import dataclasses
import importlib.metadata
import math
import os
import platform
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

import av
import numpy as np
import numpy.typing as npt
import torch

from vito_fast.config import SamplerConfig
from vito_fast.data.loader.dali import DecodeCropResize, mirrors
from vito_fast.data.loader.loader import ClipLoader
from vito_fast.data.loader.sampler import Sampler
from vito_fast.data.store.index import Read
from vito_fast.data.store.media import for_ffmpeg
from vito_fast.data.store.store import BadPackets, Decoder, Store
from vito_fast.errors import UserError

PACKAGES = ("torch", "nvidia-dali-cuda130", "av", "torchcodec", "decord2", "opencv-python-headless", "numpy")
Frames = list[npt.NDArray[np.uint8]]
PairReader = Callable[[Path, list[int]], Frames]

FAR = 12.0
"""Mean distance in gray levels above which two frames differ. Re-encoding costs up to 4."""


def bench_data(
    store: str | os.PathLike[str],
    *,
    originals: str | os.PathLike[str] | None = None,
    batch_size: int = 32,
    seconds: float = 10.0,
    size: int = 224,
    threads: int = 0,
    device: str | None = None,
    pairs: int = 16,
    rounds: int = 5,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure a store.

    Args:
        store: Folder written by ``pack``.
        originals: Folder that was packed. The public readers then read its files. None: they read the store's clips,
            remuxed to temporary files.
        batch_size: Samples per batch, at most the number of clips.
        seconds: Time to measure the loader, after one batch of warm-up.
        size: Side of a view in pixels.
        threads: Threads of the loader, 0 = one per core.
        device: Device of the loader. None: the GPU if there is one.
        pairs: Requests per round of the decoding comparison.
        rounds: Rounds of the decoding comparison.
        seed: Seed of the requests.

    Returns:
        JSON values. ``loader`` has pairs_per_s, d_per_u (packets decoded per frame used), bytes_per_pair, failures, and
        ms_per_pair and share of reading, decoding and augmenting, summed over the workers. ``decode`` has ms_per_pair,
        pairs_per_s and ``far``, the number of wrong frames, of each reader on one thread to ``size`` pixels.
        ``speedup`` is over the best other reader. ``machine`` describes this machine.

    Raises:
        UserError: The store or an original cannot be read.
        ValueError: A number is out of range.
    """
    for name, value in (("pairs", pairs), ("rounds", rounds), ("seconds", seconds)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name} is {value}, must be above 0 and finite")
    config = SamplerConfig(size=size, views=2)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    result: dict[str, Any] = {"store": os.fspath(store), "size": size, "machine": _machine()}
    batch_size = min(batch_size, len(Store(store, threads=1)))
    with ClipLoader(store, batch_size, seed=seed, sampler=config, threads=threads, device=device) as loader:
        result["format"], result["clips"] = loader.store.format.name, len(loader.store)
        result["loader"] = _loader(loader, seconds) | {"device": device, "batch_size": batch_size}
    result["decode"] = decoding(store, originals=originals, size=size, pairs=pairs, rounds=rounds, seed=seed)
    return result


def _loader(loader: ClipLoader, seconds: float) -> dict[str, Any]:
    def batches() -> Any:
        while True:
            yield from loader

    endless = batches()
    next(endless)
    before, start = dataclasses.replace(loader.stats), time.perf_counter()
    while True:
        next(endless)
        if time.perf_counter() - start >= seconds:
            break
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    span = time.perf_counter() - start
    endless.close()
    gained = {
        name: getattr(loader.stats, name) - getattr(before, name)
        for name in ("samples", "failures", "bytes_read", "packets", "frames")
    }
    spent = {
        name: getattr(loader.stats, f"{name}_seconds") - getattr(before, f"{name}_seconds")
        for name in ("read", "decode", "augment")
    }
    count, total = gained["samples"], sum(spent.values())
    return {
        "pairs": count,
        "seconds": round(span, 3),
        "pairs_per_s": round(count / span, 2),
        "d_per_u": round(gained["packets"] / gained["frames"], 3),
        "bytes_per_pair": round(gained["bytes_read"] / count),
        "ms_per_pair": {name: round(1e3 * value / count, 3) for name, value in spent.items()},
        "share": {name: round(value / total, 4) for name, value in spent.items()},
        "failures": gained["failures"],
    }


def decoding(
    store: str | os.PathLike[str],
    *,
    originals: str | os.PathLike[str] | None = None,
    size: int = 224,
    pairs: int = 16,
    rounds: int = 5,
    seed: int = 0,
) -> dict[str, Any]:
    """Compare decoding to ``size`` x ``size`` pixels on one thread. Arguments and errors as in :func:`bench_data`."""
    opened = Store(store, threads=1)
    samples = Sampler(opened.index, SamplerConfig(size=size, views=2), seed).sample(np.arange(pairs))
    requests = list(zip(samples.clip.tolist(), samples.frame.tolist(), strict=True))
    readers, missing = installed()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            asked = _files(opened, requests, None if originals is None else Path(originals), Path(folder))
            runs: dict[str, Callable[[], Frames]] = {"vito_fast": _ours(opened, requests, size)}
            for name, reader in readers.items():
                runs[name] = _theirs(reader, asked, size)
            return _race(runs, missing, pairs, rounds)
    finally:
        torch.set_num_threads(threads)


def _race(runs: dict[str, Callable[[], Frames]], missing: dict[str, str], pairs: int, rounds: int) -> dict[str, Any]:
    delivered: dict[str, Frames] = {}
    for name, run in list(runs.items()):
        try:
            delivered[name] = run()  # also the warm-up
        except Exception as error:  # an error of a reader is a result too
            missing[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            del runs[name]
            if name == "vito_fast":
                raise
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    middle = {name: median(spans) / pairs for name, spans in times.items()}
    table = {
        name: {
            "ms_per_pair": round(1e3 * span, 3),
            "pairs_per_s": round(1 / span, 2),
            "far": sum(map(_far, delivered[name], delivered["vito_fast"])),
        }
        for name, span in middle.items()
    }
    others = [span for name, span in middle.items() if name != "vito_fast"]
    return {
        "pairs": pairs,
        "rounds": rounds,
        "readers": table,
        "missing": missing,
        "speedup": round(min(others) / middle["vito_fast"], 3) if others else None,
    }


def _far(one: npt.NDArray[np.uint8], other: npt.NDArray[np.uint8]) -> bool:
    return bool(np.abs(one.astype(np.int16) - other).mean() > FAR)


def _ours(store: Store, requests: list[tuple[int, list[int]]], size: int) -> Callable[[], Frames]:
    """The loader's path on one thread, for whole frames in one batch: planned reads, decoding, resize."""
    decoder, route = Decoder(), store.format.route(codec="", hardware_codecs=())
    clips, numbers = (np.array(values) for values in zip(*requests, strict=True))
    infos = [store.index.clip(clip) for clip, _ in requests]
    views = numbers.shape[1]
    pipeline = DecodeCropResize(route, size, views, len(requests), device=torch.device("cpu"))
    crop = np.array([[[0, 0, info.height, info.width]] * views for info in infos], np.int32)
    mirrored = (np.array([getattr(info, name) for info in infos]) for name in ("rotation", "mirror"))
    mirror = mirrors(np.zeros((len(requests), views), np.uint8), *mirrored)

    def pictures(row: int, read: Read) -> Frames:
        if read.code != "ok":
            raise OSError(read.error)
        if not store.format.still:
            try:
                return store.decode(decoder, int(clips[row]), infos[row], read, numbers[row])
            except BadPackets as error:
                raise OSError(f"{store.name}: clip {clips[row]}: {error}") from None
        packets = read.split()
        return [packets[picture] for picture in read.pictures]

    def run() -> Frames:
        reads = store.reader.read(clips, numbers, single_stream=False)
        data = [picture for row, read in enumerate(reads) for picture in pictures(row, read)]
        squares = torch.stack(pipeline(data, crop, mirror), 1).numpy()
        return [np.rot90(one, -info.rotation // 90) for info, pair in zip(infos, squares, strict=True) for one in pair]

    return run


def _theirs(reader: PairReader, asked: list[tuple[Path, list[int]]], size: int) -> Callable[[], Frames]:
    resize = _resize(size)
    return lambda: [resize(frame) for path, numbers in asked for frame in reader(path, numbers)]


def _resize(size: int) -> Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.uint8]]:
    """Bicubic without antialiasing, as ours: OpenCV's, the fastest, or else PyTorch's."""
    try:
        import cv2
    except ImportError:
        return lambda frame: (
            torch.nn.functional.interpolate(
                torch.from_numpy(frame).permute(2, 0, 1)[None], (size, size), mode="bicubic"
            )[0].permute(1, 2, 0).numpy()
        )  # fmt: skip
    cv2.setNumThreads(1)
    return lambda frame: np.asarray(cv2.resize(frame, (size, size), interpolation=cv2.INTER_CUBIC), np.uint8)


def _files(
    store: Store, requests: list[tuple[int, list[int]]], originals: Path | None, folder: Path
) -> list[tuple[Path, list[int]]]:
    """File and frame numbers of each request."""
    if originals is None:
        written = {clip: _written(store, clip, folder) for clip in {clip for clip, _ in requests}}
        return [(path, places[numbers].tolist()) for (path, places), numbers in ((written[c], n) for c, n in requests)]
    times: dict[Path, npt.NDArray[np.float64]] = {}
    asked = []
    for clip, numbers in requests:
        path = originals / store.index.clip(clip).source
        if path not in times:
            times[path] = _times(path)
        wanted = store.index.times(clip)[numbers]
        asked.append((path, [int(np.abs(times[path] - when).argmin()) for when in wanted]))
    return asked


def _times(path: Path) -> npt.NDArray[np.float64]:
    """Timestamps of the file's frames in seconds, sorted."""
    try:
        with av.open(for_ffmpeg(path)) as container:
            stream = container.streams.video[0]
            pts = [packet.pts for packet in container.demux(stream) if packet.pts is not None]
            return np.sort(np.array(pts, np.float64)) * float(stream.time_base or 1)
    except (av.FFmpegError, OSError, IndexError) as error:
        raise UserError(f"the original {path} cannot be read: {error}") from None


def _written(store: Store, clip: int, folder: Path) -> tuple[Path, npt.NDArray[np.int32]]:
    """Remux a clip to a file.

    Returns:
        The file, and the position of each frame of the clip in it. A clip that begins inside a group of pictures has
        other frames before its own.
    """
    info = store.index.clip(clip)
    (read,) = store.reader.read([clip], [range(info.num_frames)], miniclip=True)
    if read.code != "ok":
        raise UserError(f"clip {clip} of {store.name} cannot be written to a file: {read.error}")
    small, path = folder / f"{clip}.mini.mkv", folder / f"{clip}.mkv"
    small.write_bytes(read.data.tobytes())
    with av.open(for_ffmpeg(small)) as source, av.open(for_ffmpeg(path), "w") as target:  # with an index to seek by
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                target.mux(packet)
    small.unlink()
    return path, read.pictures


def _machine() -> dict[str, Any]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "platform": platform.platform(),
        "cores": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": versions,
    }


def lines(result: dict[str, Any]) -> list[str]:
    """The result as text, one line each."""
    loader, decode = result["loader"], result["decode"]
    spent = ", ".join(
        f"{name} {loader['ms_per_pair'][name]:.2f} ms ({loader['share'][name]:.0%})" for name in loader["share"]
    )
    table = [
        f"  {name:12} {row['ms_per_pair']:9.2f} ms per pair"
        + (f", {row['far']} frames far from ours" if row["far"] else "")
        for name, row in decode["readers"].items()
    ]
    absent = [f"  {name:12} not measured: {why}" for name, why in decode["missing"].items()]
    ratio = f"; {decode['speedup']:.2f} times the best of the others" if decode["speedup"] else ""
    return [
        f"store: {result['store']}, {result['format']}, {result['clips']} clips",
        f"workers' time per pair: {spent}",
        f"packets decoded per frame used: {loader['d_per_u']:.2f}; bytes read per pair: {loader['bytes_per_pair']}",
        f"decoding to {result['size']} px on one thread{ratio}:",
        *table,
        *absent,
        f"measured: {loader['pairs_per_s']:.1f} pairs/s with all augmentations on {loader['device']}, "
        f"{loader['failures']} failures, {loader['pairs']} pairs in {loader['seconds']:.1f} s",
    ]


def torchcodec() -> PairReader:
    decoder = import_module("torchcodec.decoders").VideoDecoder

    def read(path: Path, frames: list[int]) -> Frames:
        opened = decoder(for_ffmpeg(path), num_ffmpeg_threads=1, dimension_order="NHWC", seek_mode="approximate")
        return list(opened.get_frames_at(frames).data.numpy())

    return read


def decord2() -> PairReader:
    module = import_module("decord")

    def read(path: Path, frames: list[int]) -> Frames:
        opened = module.VideoReader(for_ffmpeg(path), ctx=module.cpu(0), num_threads=1)
        return list(opened.get_batch(frames).asnumpy())

    return read


def opencv() -> PairReader:
    cv2 = import_module("cv2")

    def read(path: Path, frames: list[int]) -> Frames:
        opened = cv2.VideoCapture(for_ffmpeg(path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
        found = []
        for number in frames:
            opened.set(cv2.CAP_PROP_POS_FRAMES, number)
            good, picture = opened.read()
            if not good:
                raise OSError(f"{path}: OpenCV reads no frame {number}")
            found.append(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB))
        opened.release()
        return found

    return read


def pyav() -> PairReader:
    """Seek to the key before each frame, unless the decoder is already past it."""
    av = import_module("av")

    def read(path: Path, frames: list[int]) -> Frames:
        with av.open(for_ffmpeg(path)) as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1
            start, step = stream.start_time or 0, 1 / (stream.average_rate * stream.time_base)
            found: dict[int, Any] = {}
            for number in sorted(set(frames)):
                wanted = start + number * step
                if not found or _key_between(stream, start + max(found) * step, wanted):
                    container.seek(round(wanted), stream=stream)
                for frame in container.decode(stream):
                    if frame.pts >= wanted - step / 2:
                        found[number] = frame.to_ndarray(format="rgb24")
                        break
            return [found[number] for number in frames]

    return read


def _key_between(stream: Any, first: float, last: float) -> bool:
    """Whether the container's index has a key after ``first`` and up to ``last``."""
    entries = stream.index_entries
    return any(entry.is_keyframe and first < entry.timestamp <= last for entry in entries)


READERS: dict[str, Callable[[], PairReader]] = {
    "torchcodec": torchcodec,
    "decord2": decord2,
    "PyAV": pyav,
    "OpenCV": opencv,
}


def installed() -> tuple[dict[str, PairReader], dict[str, str]]:
    """The installed readers by name, and the reasons why the others are missing."""
    found, missing = {}, {}
    for name, make in READERS.items():
        try:
            found[name] = make()
        except (ImportError, RuntimeError, OSError) as error:
            missing[name] = str(error).splitlines()[0]
    return found, missing
