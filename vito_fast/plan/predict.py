"""What a run will cost before anything is rented: time, memory, storage and energy, and what holds it up.

Everything here is a prediction. The step's arithmetic and traffic are counted, op by op, on the model itself
(dryrun.py); rates come from one table with a source for each (hardware.py). A step takes as long as the slowest of what
runs side by side:

    GPU      views, target, online, loss, backward, optimiser, average, guards, one after the other; each op takes the
             longer of flops / (peak x efficiency) and bytes / (bandwidth x efficiency), and a launch; plus the
             communication that nothing hides
    decode   frames / capacity of the decoder chosen
    storage  bytes read / read rate of the nodes' drives
    link     bytes to the GPU / rate of its PCIe link
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

from vito_fast.config import Config, SamplerConfig, TrainConfig, from_mapping
from vito_fast.errors import UserError
from vito_fast.plan.dryrun import DryRun, dry_run
from vito_fast.plan.hardware import Machine, machine

Format = Literal["jpeg", "h264", "copy"]
Decoder = Literal["auto", "engine", "cpu"]

PAPER_CLIPS = 1_180_000


@dataclass(frozen=True)
class PlanOptions:
    """The machine and the data that the plan assumes."""

    gpu: str = "h100"
    """h100, h200, a100, b200; or cpu: processes of one thread, all of it from --calibrate."""
    gpus: int = 8
    """GPUs (ranks) in all; nodes are filled one after the other."""
    store: str = ""
    """A packed store: its clips, format and sizes instead of the three options below."""
    format: Format = "jpeg"
    """Format of the store."""
    clips: int = PAPER_CLIPS
    """Clips in the store (default: the paper's)."""
    frame_bytes: float = 0.0
    """Mean bytes of a stored frame; 0 = what this project measured for the format."""
    decoder: Decoder = "auto"
    """The GPU's JPEG and video engines, or the CPU's cores; auto = engines where there are any."""
    cores: int = 0
    """CPU cores of a node; 0 = those of the vendor's system, or the share of them that goes with the GPUs."""
    calibrate: str = ""
    """JSON file of measured constants, which take the place of the table's."""

    def __post_init__(self) -> None:
        for name, least in (("gpus", 1), ("clips", 1), ("cores", 0), ("frame_bytes", 0)):
            if not least <= getattr(self, name) < math.inf:
                wanted = f"finite and at least {least}" if name == "frame_bytes" else f"at least {least}"
                raise UserError(f"--{name.replace('_', '-')} must be {wanted}, got {getattr(self, name)}")


@dataclass(frozen=True)
class Part:
    """One part of the GPU's step: its work on one GPU and the time it takes."""

    name: str
    flops: float
    bytes: float
    seconds: float
    limit: str
    """What it waits for: arithmetic, memory bandwidth or communication."""


@dataclass(frozen=True)
class Prediction:
    """All that the plan says of one configuration on one machine. Seconds and bytes."""

    config: Config
    options: PlanOptions
    machine: Machine
    dry: DryRun
    parts: tuple[Part, ...]
    communication: dict[str, tuple[float, float]]
    """What travels: (seconds it takes, seconds that nothing hides)."""
    resources: dict[str, float]
    """Seconds a step of each thing that runs beside the others: gpu, decode, storage, link."""
    decode: dict[str, float]
    """Capacity in frames/s of each way to decode each format, over all nodes."""
    frames_needed: float
    """Frames/s that the GPUs could take."""
    gpu_memory: dict[str, float]
    host_memory: dict[str, float]
    """Bytes on one node."""
    store_bytes: float
    steps: int
    kwh: float
    notes: tuple[str, ...] = field(default=())

    @property
    def step_seconds(self) -> float:
        return max(self.resources.values())

    @property
    def hours(self) -> float:
        return self.steps * self.step_seconds / 3600

    @property
    def clips_per_second(self) -> float:
        return self.config.train.batch_size / self.step_seconds

    @property
    def fits(self) -> bool:
        return self.gpu_bytes <= self.machine["memory"]

    @property
    def gpu_bytes(self) -> float:
        return sum(self.gpu_memory.values())

    @property
    def bottleneck(self) -> str:
        """Memory that does not suffice; else the slowest resource, and for the GPU what most of its time waits for."""
        if not self.fits:
            return "GPU memory"
        slowest = max(self.resources, key=lambda name: self.resources[name])
        if slowest != "gpu":
            return {"decode": f"decode ({decoder_name(self)})", "storage": "storage", "link": "host link"}[slowest]
        waits: dict[str, float] = {}
        for part in self.parts:
            waits[part.limit] = waits.get(part.limit, 0.0) + part.seconds
        return max(waits, key=lambda limit: waits[limit])

    @property
    def mfu(self) -> float:
        """Share of the GPUs' peak bfloat16 arithmetic that the step's matrix products use."""
        return sum(p.flops for p in self.parts) / self.step_seconds / self.machine["bf16"]


def predict(config: Config, options: PlanOptions, constants: Machine | None = None) -> Prediction:
    """The prediction for one configuration and machine. Deterministic.

    Raises UserError for a machine that is not known, a batch that does not divide or is more than all clips, or a step
    that would not run.
    """
    m = constants or machine(options.gpu, options.calibrate or None)
    if options.clips < config.train.batch_size:
        raise UserError(
            f"{options.clips} clips are fewer than one batch of {config.train.batch_size}: lower train.batch_size or "
            "pack more videos"
        )
    dry = counted_step(config, config.train.clips(options.gpus), options.gpus)
    if dry.problems:
        raise UserError(f"the step would not run: {dry.problems[0]}")
    parts = _gpu_parts(config, options, m, dry)
    communication = _communication(config, options, m, dry, parts)
    busy = sum(p.seconds for p in parts)
    exposed = sum(wait for _, wait in communication.values())
    parts += (Part("communication", 0.0, 0.0, exposed, "communication"),)
    frames = config.train.batch_size * config.sampler.views
    capacity = _decode_capacity(options, m)
    encoded = frame_bytes(options, m)
    nodes = node_count(options, m)
    chosen = f"{options.format}, {decoder_of(options)}"
    read = frames * encoded * m[f"{options.format}_decoded"]
    uploaded = frames * (m["frame_width"] * m["frame_height"] * 3 if decoder_of(options) == "cpu" else encoded)
    resources = {
        "gpu": busy + exposed,
        "decode": frames / capacity[chosen],
        "storage": read / (m["node_read"] * nodes),
        "link": uploaded / (m["host_link"] * options.gpus),
    }
    steps = max(1, round(config.schedule.epochs * (options.clips // config.train.batch_size)))
    watts = m["node_power"] * m["power_share"] * options.gpus / m["node_gpus"]
    return Prediction(
        config=config,
        options=options,
        machine=m,
        dry=dry,
        parts=parts,
        communication=communication,
        resources=resources,
        decode=capacity,
        frames_needed=frames / resources["gpu"],
        gpu_memory=_gpu_memory(config, m, dry),
        host_memory=_host_memory(config, options, m, encoded),
        store_bytes=options.clips * m["clip_frames"] * encoded,
        steps=steps,
        kwh=steps * max(resources.values()) / 3600 * watts / 1000,
    )


def counted_step(config: Config, clips: int, world: int) -> DryRun:
    """The dry run of a rank's step. Predictions that differ in nothing that it depends on share one."""
    train = TrainConfig(
        micro_batches=config.train.micro_batches, dtype=config.train.dtype, channels_last=config.train.channels_last
    )
    sampler = SamplerConfig(size=config.sampler.size, views=config.sampler.views)
    return _counted_step(Config(model=config.model, loss=config.loss, sampler=sampler, train=train), clips, world)


@functools.lru_cache(maxsize=64)
def _counted_step(config: Config, clips: int, world: int) -> DryRun:
    return dry_run(config, clips=clips, world=world)


def node_count(options: PlanOptions, m: Machine) -> int:
    return math.ceil(options.gpus / m["node_gpus"])


def cores_of(options: PlanOptions, m: Machine) -> int:
    """CPU cores of a node that belong to the run: all, or with fewer GPUs than a node has, their share."""
    return options.cores or max(1, round(m["node_cores"] * min(1.0, options.gpus / m["node_gpus"])))


def decoder_of(options: PlanOptions) -> str:
    """``engine`` or ``cpu``."""
    if options.decoder == "auto":
        return "cpu" if options.gpu == "cpu" else "engine"
    return options.decoder


def decoder_name(p: Prediction) -> str:
    return "CPU cores" if decoder_of(p.options) == "cpu" else ("nvJPEG" if p.options.format == "jpeg" else "NVDEC")


def frame_bytes(options: PlanOptions, m: Machine) -> float:
    return options.frame_bytes or m[f"{options.format}_bytes"]


# ------------------------------------------------------------------------------------------------------------- the GPU

PARTS = {
    "target forward": ("target", "keys"),
    "online forward, first pass": ("online, first pass",),
    "online forward": ("online",),
    "loss": ("loss", "loss, backward"),
    "backward": ("backward",),
    "optimiser": ("optimiser",),
    "moving average": ("average",),
    "guards": ("guards",),
}
"""The step's parts, and the dry run's phases that each one holds."""


def _gpu_parts(config: Config, options: PlanOptions, m: Machine, dry: DryRun) -> tuple[Part, ...]:
    crowding = max(1.0, min(options.gpus, m["node_gpus"]) / m["node_cores"]) if options.gpu == "cpu" else 1.0
    parts = [_views(config, options, m, dry)] if options.gpu != "cpu" else []
    for name, phases in PARTS.items():
        flops = moved = seconds = arithmetic = 0.0
        for op, count in dry.ops.items():
            if op.phase not in phases:
                continue
            share = m["compile_bytes"] if config.train.compile and op.kind == "pointwise" else 1.0
            peak = m["bf16"] if op.width == 2 else m["tf32"]
            reach = m["fused_efficiency"] if op.kind == "fused" else m["matmul_efficiency"]
            compute = op.flops / (peak * reach)
            traffic = op.bytes * share / (m["bandwidth"] * m["bandwidth_efficiency"])
            flops, moved = flops + count * op.flops, moved + count * op.bytes * share
            takes = count * (max(compute, traffic) + m["launch"] * share) * crowding
            seconds += takes
            arithmetic += takes if compute > traffic else 0.0
        if seconds:
            limit = "GPU arithmetic" if arithmetic > seconds / 2 else "GPU memory bandwidth"
            parts.append(Part(name, flops, moved, seconds, limit))
    return tuple(parts)


def _views(config: Config, options: PlanOptions, m: Machine, dry: DryRun) -> Part:
    """Resize and colour on the GPU: each frame is written by the decoder, read and written by the resize (8 bits a
    value), read by ``photometric`` and written at the step's width; a blurred view is read and written twice more."""
    s = config.sampler
    width = 2 if config.train.dtype == "bfloat16" else 4
    blurred = sum(s.blur[min(v, len(s.blur) - 1)] for v in range(s.views)) / s.views
    source = 3 * m["frame_width"] * m["frame_height"] * 2
    view = 3 * s.size**2 * (1 + 1 + width + blurred * 4 * width)
    moved = s.views * dry.clips * (source + view)
    return Part("views", 0.0, moved, moved / (m["bandwidth"] * m["bandwidth_efficiency"]), "GPU memory bandwidth")


def _gpu_memory(config: Config, m: Machine, dry: DryRun) -> dict[str, float]:
    """The peak of the dry run by what it holds, and what lies outside the allocator."""
    kept = ("parameters", "target", "gradients", "optimiser state", "images")
    memory = {name: float(dry.peak.get(name, 0)) for name in kept}
    memory["gradients"] = float(dry.gradient_bytes)  # the buckets, whole from the first step on
    memory["activations and temporaries"] = float(sum(size for name, size in dry.peak.items() if name not in kept))
    memory["batches ahead"] = config.data.prefetch * config.sampler.views * dry.clips * 3.0 * config.sampler.size**2
    memory["fragmentation"] = m["fragmentation"] * sum(memory.values())
    memory["context and workspaces"] = m["context_memory"]
    return memory


def _host_memory(config: Config, options: PlanOptions, m: Machine, encoded: float) -> dict[str, float]:
    ranks = min(options.gpus, m["node_gpus"])
    frames = config.train.batch_size / options.gpus * ranks * config.sampler.views * (config.data.prefetch + 1)
    waiting = frames * encoded * m[f"{options.format}_decoded"]
    if decoder_of(options) == "cpu":
        waiting += frames * m["frame_width"] * m["frame_height"] * 3
    return {"processes": ranks * m["process_memory"], "batches ahead": waiting}


# ------------------------------------------------------------------------------------------- communication and decoding


def collectives(config: Config, dry: DryRun) -> dict[str, int]:
    """How many collectives a step of several GPUs takes, by what travels (counted on gloo: test_communication.py).

    Gradients go in buckets, one of 1 MiB and then of 25; keys in one gather and their videos' numbers in another; each
    batch norm's statistics once forward and once backward; and one flag tells whether all ranks' numbers are finite.
    """
    predictors = config.model.scales if config.model.predictor else 0
    in_target = (dry.norms - predictors) // 2
    in_online = in_target + predictors
    parts = config.train.micro_batches
    passes = parts * (2 if parts > 1 else 1)
    return {
        "gradients": 1 + math.ceil(max(0, dry.gradient_bytes - 2**20) / (25 * 2**20)),
        "keys": 2,
        "batch norm": in_target * parts + in_online * (passes + parts),
        "finite flag": 1,
    }


def _communication(
    config: Config, options: PlanOptions, m: Machine, dry: DryRun, parts: tuple[Part, ...]
) -> dict[str, tuple[float, float]]:
    """Gradients (ring all-reduce), keys (ring all-gather), batch norm's statistics and the flag (too small for their
    bytes to count); compute hides the first two."""
    n, counts = options.gpus, collectives(config, dry)
    if n == 1:
        return dict.fromkeys(counts, (0.0, 0.0))
    nodes = node_count(options, m)
    bus = (m["link"] if nodes == 1 else min(m["link"], m["node_network"])) * m["link_efficiency"]
    latency = m["link_latency"] if nodes == 1 else m["network_latency"]
    computes = {part.name: part.seconds for part in parts}
    moved = {"gradients": 2 * (n - 1) / n * dry.gradient_bytes, "keys": (n - 1) * dry.key_bytes}
    hidden = {"gradients": m["overlap"] * computes["backward"], "keys": computes["online forward"]}
    times = {name: moved.get(name, 0.0) / bus + count * latency for name, count in counts.items()}
    return {name: (time, max(0.0, time - hidden.get(name, 0.0))) for name, time in times.items()}


def _decode_capacity(options: PlanOptions, m: Machine) -> dict[str, float]:
    """Frames/s by "format, decoder": engines of all GPUs, or all cores but one a rank."""
    nodes = node_count(options, m)
    pixels = m["frame_width"] * m["frame_height"]
    ranks = min(options.gpus, m["node_gpus"])
    cores = cores_of(options, m) * nodes
    spare = cores if options.gpu == "cpu" else max(1.0, cores - ranks * nodes)
    capacity = {}
    for name in ("jpeg", "h264", "copy"):
        if options.gpu != "cpu":
            engine = m["jpeg"] if name == "jpeg" else m["h264"]
            rate = engine * m["engine_efficiency"] / (pixels * m[f"{name}_decoded"])
            capacity[f"{name}, engine"] = rate * options.gpus
        capacity[f"{name}, cpu"] = spare / m[f"{name}_core"]
    return capacity


# -------------------------------------------------------------------------------------------------------------- advice


@dataclass(frozen=True)
class Change:
    """Something to do about a bottleneck: fields to override, by dotted name, and what it costs."""

    what: str
    cost: str
    """``a setting``, ``packing again`` or ``hardware``, cheapest first."""
    options: tuple[tuple[str, object], ...] = ()
    config: tuple[tuple[str, object], ...] = ()

    def apply(self, config: Config, options: PlanOptions) -> tuple[Config, PlanOptions]:
        nested: dict[str, dict[str, object]] = {}
        for name, value in self.config:
            section, key = name.split(".")
            nested.setdefault(section, {})[key] = value
        return from_mapping(config, nested, "advice"), replace(options, **dict(self.options))  # type: ignore[arg-type]

    @property
    def flags(self) -> list[str]:
        """The same change on the command line of ``vito-fast plan``."""
        flags: list[str] = []
        for name, value in (*self.options, *self.config):
            if value is False:
                section, key = name.split(".")
                name, value = f"{section}.no_{key}", True
            flags += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
        return flags


def changes(p: Prediction) -> Iterator[Change]:
    """What could help at all, cheapest first; whether it does is for ``advise`` to compute."""
    train, options = p.config.train, p.options
    if train.dtype == "float32" and options.gpu != "cpu":
        yield Change("compute in bfloat16", "a setting", config=(("train.dtype", "bfloat16"),))
    if not train.compile and options.gpu != "cpu":
        yield Change("compile the networks", "a setting", config=(("train.compile", True),))
    if options.gpu != "cpu":
        other: Decoder = "cpu" if decoder_of(options) == "engine" else "engine"
        yield Change(f"decode by {'CPU cores' if other == 'cpu' else 'engines'}", "a setting", (("decoder", other),))
    if train.micro_batches > 1:
        half = train.micro_batches // 2
        yield Change(f"only {half} micro-batches", "a setting", config=(("train.micro_batches", half),))
    if p.config.model.checkpoint_activations:
        yield Change("keep all activations", "a setting", config=(("model.checkpoint_activations", False),))
    if not p.fits:
        yield from _smaller(p)
    if not options.store:
        for name in ("jpeg", "h264"):
            if name != options.format:
                yield Change(f"store as {name}", "packing again", (("format", name), ("frame_bytes", 0.0)))
    if decoder_of(options) == "cpu":
        cores = 2 * cores_of(options, p.machine)
        yield Change(f"{cores} cores a node", "hardware", (("cores", cores),))
    if train.batch_size >= 2 * options.gpus:
        yield Change(f"{2 * options.gpus} GPUs", "hardware", (("gpus", 2 * options.gpus),))
    better = {"a100": "h100", "h100": "b200", "h200": "b200"}.get(options.gpu)
    if better and not options.calibrate:
        yield Change(f"{better} instead of {options.gpu}", "hardware", (("gpu", better),))


def _smaller(p: Prediction) -> Iterator[Change]:
    """Recomputed activations, and as many micro-batches as the activations' share of the memory asks for."""
    if not p.config.model.checkpoint_activations:
        yield Change("recompute activations", "a setting", config=(("model.checkpoint_activations", True),))
    parts, now = p.config.train.micro_batches, p.gpu_memory["activations and temporaries"]
    room = p.machine["memory"] - (p.gpu_bytes - now * (1 + p.machine["fragmentation"]))
    if room > 0:
        parts *= 2 ** math.ceil(math.log2(now * (1 + p.machine["fragmentation"]) / room))
        yield Change(f"{parts} micro-batches", "a setting", config=(("train.micro_batches", parts),))


GAIN = 0.03
"""Share of the step's time that a change must save to be worth naming."""


def advise(p: Prediction) -> tuple[Change, Prediction] | None:
    """The cheapest change that moves the bottleneck, and the prediction after it; None if nothing here does.

    Among changes of one cost the one with the shortest step. When memory does not suffice: that makes it fit.
    """
    for cost in ("a setting", "packing again", "hardware"):
        tried = []
        for change in changes(p):
            if change.cost != cost:
                continue
            after = _try(change, p)
            if after and after.fits and (not p.fits or after.step_seconds < (1 - GAIN) * p.step_seconds):
                tried.append((change, after))
        if tried:
            return min(tried, key=lambda pair: pair[1].step_seconds)
    return None


def _try(change: Change, p: Prediction) -> Prediction | None:
    """The prediction after a change, or None where the change cannot be made."""
    try:
        config, options = change.apply(p.config, p.options)
        return predict(config, options, p.machine if options.gpu == p.options.gpu else None)
    except UserError:
        return None
