"""``vito-fast init``: a configuration for some videos and this machine, with the reason for each value.

Sizes follow from the clips and the device. The rates follow from the batch and the number of steps, so that a layer
moves as far in a step as in the paper's run. Time is that of a few steps of this configuration on this machine.
"""

import math
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from vito_fast.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    SamplerConfig,
    ScheduleConfig,
    TrainConfig,
)
from vito_fast.data.pack.listing import list_videos
from vito_fast.data.store.remote import is_remote
from vito_fast.data.store.store import Store
from vito_fast.errors import UserError
from vito_fast.machine import usable_memory
from vito_fast.plan.hardware import COMMON
from vito_fast.train.distributed import World
from vito_fast.train.trainer import Trainer

CLIP_SECONDS = 10.0
"""Length at which packing splits a shot."""
LOOKED_AT = 200
"""Files whose headers are read; the rest are taken to be like them."""
EPOCHS = 400
"""Views of each clip, in examples; fewer where the steps would be more than a first run needs."""


@dataclass(frozen=True)
class Footage:
    """Videos, by the headers of some."""

    source: str
    videos: int
    hours: float
    clips: int
    """Of a store, or about as many as packing makes if no shot ends within ten seconds."""
    short_side: int
    """The smallest short side, in pixels."""
    shapes: int
    """Different widths by heights among the files looked at."""
    store_bytes: float
    packed: bool


def look(source: str | Path) -> Footage:
    """Looks at a folder of videos, one video, or a store. UserError if there is none."""
    if is_remote(source) or (Path(source) / "store.json").is_file():
        store = Store(source)
        looked = range(0, len(store), max(1, len(store) // LOOKED_AT))
        infos = [store.index.clip(i) for i in looked]
        sides = {(info.width, info.height) for info in infos}
        seconds = sum(float(store.index.times(i)[-1]) for i in looked)
        size = sum(size for _, size in store.index.shards)
        hours = seconds / len(infos) * len(store) / 3600 if infos else 0.0
        videos = len({info.source for info in infos}) if len(infos) == len(store) else len(store)
        return Footage(str(source), videos, hours, len(store), min(map(min, sides)), len(sides), size, True)
    import av

    from vito_fast.data.store.media import BadVideo, opened

    listing = list_videos(Path(source))
    paths = [listing.path(name) for name in listing.videos]
    seconds, clips, frames, shapes, read = 0.0, 0, 0.0, set(), 0
    for path in paths[:: max(1, len(paths) // LOOKED_AT)]:
        try:
            with opened(path) as (container, stream):
                length = float(container.duration or 0) / av.time_base
                shapes.add((stream.width, stream.height))
                frames += length * float(stream.average_rate or 25)
        except BadVideo:
            continue
        read, seconds, clips = read + 1, seconds + length, clips + max(1, math.ceil(length / CLIP_SECONDS))
    if not read:
        raise UserError(f"no video of {source} can be read: see `vito-fast pack`, which names the reason of each")
    scale = len(paths) / read
    needed = frames * scale * COMMON["jpeg_bytes"].value
    return Footage(
        str(source),
        len(paths),
        seconds * scale / 3600,
        round(clips * scale),
        min(map(min, shapes)),
        len(shapes),
        needed,
        False,
    )


def propose(footage: Footage, store: str, device: torch.device) -> tuple[Config, list[str]]:
    """A configuration and the reasons, one line each.

    Raises:
        UserError: fewer than eight clips.
    """
    if footage.clips < 8:
        raise UserError(
            f"{footage.source} gives about {footage.clips} clips of {CLIP_SECONDS:.0f} s, and at least 8 are needed: "
            "add videos, or pack with a smaller --clip-length"
        )
    gpu = device.type == "cuda"
    batch = 2 ** int(math.log2(min(footage.clips / 2, 4096 if gpu else 32)))
    batch = max(4, min(batch, 2 ** int(math.log2(max(footage.clips / 8, 16)))))
    steps = round(min(max(EPOCHS * footage.clips / batch, 500), 94_000 if gpu else 1_000))
    size = max(32, min(224 if gpu else 64, footage.short_side // 32 * 32))
    backbone = "resnet50" if gpu else "resnet18"
    large = batch >= 1024
    trust = 0.001 if large else 0.005
    base_lr = round((0.3 * 4096 if large else 256) / batch, 4)
    ema = 0.9 if steps < 2_000 else 0.97 if steps < 20_000 else 0.99
    sampler = SamplerConfig(size=size)
    if not gpu:
        sampler = replace(sampler, blur=(0.0,), solarize=(0.0,))
    config = Config(
        data=DataConfig(store=store),
        sampler=sampler,
        model=ModelConfig(backbone=backbone) if gpu else ModelConfig(backbone, projector_hidden=512, projector_out=128),
        optimizer=OptimizerConfig(base_lr=base_lr, trust_coefficient=trust),
        schedule=ScheduleConfig(epochs=steps * batch / footage.clips, epoch_clips=footage.clips, base_ema=ema),
        train=TrainConfig(batch_size=batch, dtype="bfloat16" if gpu else "float32", compile=gpu and steps > 5_000),
    )
    shown = round(config.schedule.epochs, 3)
    schedule = replace(config.schedule, epochs=shown, warmup_epochs=round(shown / 10, 3))
    often = max(10, steps // 10)
    train = replace(config.train, checkpoint_every=often, evaluate_every=often, log_every=max(1, min(50, steps // 50)))
    config = replace(config, schedule=schedule, train=train)
    reasons = [
        f"batch {batch}: negatives are the other clips of a batch, and about {footage.clips} clips make "
        f"{footage.clips // batch} batches",
        f"{steps} steps: each clip is seen about {steps * batch / footage.clips:.0f} times",
        f"backbone {backbone}, {size} px: for {'a GPU' if gpu else 'a CPU'}; the smallest video has "
        f"{footage.short_side} px",
        f"learning rate {base_lr:g} x {batch}/256, trust coefficient {trust}: a layer changes by at most "
        f"{base_lr * batch / 256 * trust:.2%} a step, as in the paper",
        f"target average {ema}: it follows over about {1 / (1 - ema):.0f} of {steps} steps",
    ]
    if footage.shapes > 1:
        reasons.append(f"{footage.shapes} shapes of frames: crops are relative to each frame, so they may be mixed")
    if footage.clips < 1_000:
        reasons.append(
            f"warning: {footage.clips} clips teach little: start from a trained encoder, model.init, or add videos"
        )
    return config, reasons


def measure(config: Config, device: torch.device) -> tuple[Config, float]:
    """Seconds of a step without its data, and the configuration with as many micro-batches as the memory needs."""
    eager = replace(config.train, compile=False)
    batch = config.train.batch_size
    for micro in [2**i for i in range(int(math.log2(batch)))]:
        train = replace(eager, micro_batches=micro)
        try:
            trainer = Trainer(replace(config, train=train), World(0, 1, 1, device), 100)
            side = config.sampler.size
            views = tuple(torch.randn(batch, 3, side, side, device=device) for _ in range(config.sampler.views))
            video = torch.arange(batch, device=device)
            for step in range(3):
                if step == 1:
                    trainer.step(views, video, measure=True)  # synchronizes
                    began = time.perf_counter()
                else:
                    trainer.step(views, video, measure=step == 2)
            return replace(config, train=replace(config.train, micro_batches=micro)), time.perf_counter() - began
        except torch.OutOfMemoryError:
            del trainer
            torch.cuda.empty_cache()
    raise UserError(f"two clips of {config.sampler.size} px do not fit in the memory of {device}: lower sampler.size")


def duration(seconds: float) -> str:
    """In hours, or in minutes below one hour."""
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{max(1, round(seconds / 60))} min"


def costs(config: Config, footage: Footage, seconds: float) -> list[str]:
    """Time, disk and memory in words, and warnings where they are short."""
    steps = round(config.schedule.epochs * footage.clips / config.train.batch_size)
    rate = config.train.batch_size / seconds
    lines = [
        f"time: about {duration(steps * seconds)} for {steps} steps of {seconds:.2g} s ({rate:.1f} clips/s), as "
        "measured here on noise, without decoding",
        f"disk: {footage.store_bytes / 2**30:.1f} GiB {'of the store' if footage.packed else 'for a jpeg store'}",
    ]
    place = Path(config.data.store).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if not footage.packed and footage.store_bytes > free:
        lines.append(f"warning: {free / 2**30:.1f} GiB are free: pack with --format h264, a fifth of the size")
    if usable_memory() < 4 * 2**30:
        lines.append(f"warning: {usable_memory() / 2**30:.1f} GiB of memory are few: lower data.prefetch to 1")
    return lines


def check(config: Config, footage: Footage) -> None:
    """UserError if the videos cannot fill a batch: before they are packed."""
    most = footage.clips if footage.packed else max(footage.clips, int(footage.hours * 3600))  # shots of a second
    if most < config.train.batch_size:
        raise UserError(
            f"{footage.source} gives about {footage.clips} clips, fewer than one batch of {config.train.batch_size}: "
            f"lower train.batch_size, or take a proposal: vito-fast init {footage.source}"
        )
