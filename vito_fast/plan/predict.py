"""Predicts a run's time, memory, storage and energy, and its bottleneck, before a machine is rented.

Nothing here is measured. The dry run counts the step's arithmetic and traffic op by op on the model itself (dryrun.py).
The rates come from one table with a source for each (hardware.py). A step takes as long as its slowest resource:

    GPU      views, target, online, loss, backward, optimizer, average, guards, one after the other. Each op takes the
             longer of flops / (peak x efficiency) and bytes / (bandwidth x efficiency), and a launch. Exposed
             communication is added.
    decode   frames / capacity of the decoder chosen
    storage  bytes read / read rate of the nodes' drives
    link     bytes to the GPU / rate of its PCIe link
"""

import contextlib
import functools
import math
from dataclasses import dataclass, replace
from typing import Literal

from vito_fast.config import Config, SamplerConfig, TrainConfig
from vito_fast.config_files import from_mapping
from vito_fast.data.store.description import FORMATS, JPEG, FormatName
from vito_fast.errors import UserError
from vito_fast.plan.dryrun import DryRun, dry_run
from vito_fast.plan.hardware import Machine, machine

Decoder = Literal["auto", "engine", "cpu"]

PAPER_CLIPS = 1_180_000


@dataclass(frozen=True)
class PlanOptions:
    """The machine and the data that the plan assumes."""

    gpu: str = "h100"
    """h100, h200, a100 or b200, or cpu: processes of one thread, with all constants from --calibrate."""
    gpus: int = 8
    """GPUs (ranks) in all. Nodes are filled one after the other."""
    store: str = ""
    """A packed store: its clips, format and sizes instead of the three options below."""
    format: FormatName = JPEG.name
    """Format of the store."""
    clips: int = PAPER_CLIPS
    """Clips in the store (default: the paper's)."""
    frame_bytes: float = 0.0
    """Mean bytes of a stored frame; 0 = this project's measurement for the format."""
    decoder: Decoder = "auto"
    """The GPU's JPEG and video engines, or the CPU's cores; auto = engines if there are any."""
    cores: int = 0
    """CPU cores of a node; 0 = the cores of the vendor's system in proportion to the GPUs."""
    calibrate: str = ""
    """JSON file of measured constants, which replace those of the table."""

    def __post_init__(self) -> None:
        for name, least in (("gpus", 1), ("clips", 1), ("cores", 0), ("frame_bytes", 0)):
            if not least <= getattr(self, name) < math.inf:
                wanted = f"finite and at least {least}" if name == "frame_bytes" else f"at least {least}"
                raise UserError(f"--{name.replace('_', '-')} must be {wanted}, got {getattr(self, name)}")


@dataclass(frozen=True)
class Phase:
    """One phase of the GPU's step: its work on one GPU and its time."""

    name: str
    flops: float
    bytes: float
    seconds: float
    limit: str
    """Its bottleneck: arithmetic, memory bandwidth or communication."""


@dataclass(frozen=True)
class Prediction:
    """The plan of one configuration on one machine. Seconds and bytes."""

    config: Config
    options: PlanOptions
    machine: Machine
    dry: DryRun
    phases: tuple[Phase, ...]
    communication: dict[str, tuple[float, float]]
    """(Seconds, exposed seconds) of each kind of traffic."""
    resources: dict[str, float]
    """Seconds a step of each resource that runs beside the others: gpu, decode, storage, link."""
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
        """GPU memory if the run does not fit, else the slowest resource; of the GPU, the limit of most of its time."""
        if not self.fits:
            return "GPU memory"
        slowest = max(self.resources, key=lambda name: self.resources[name])
        if slowest != "gpu":
            return {"decode": f"decode ({decoder_name(self)})", "storage": "storage", "link": "host link"}[slowest]
        waits: dict[str, float] = {}
        for phase in self.phases:
            waits[phase.limit] = waits.get(phase.limit, 0.0) + phase.seconds
        return max(waits, key=lambda limit: waits[limit])

    @property
    def mfu(self) -> float:
        """Share of the GPUs' peak bfloat16 arithmetic that the step's matrix products use."""
        return sum(p.flops for p in self.phases) / self.step_seconds / self.machine["bf16"]


def predict(config: Config, options: PlanOptions, constants: Machine | None = None) -> Prediction:
    """Predicts one configuration on one machine. Deterministic.

    Args:
        config: The run.
        options: The machine and the store.
        constants: Rates to use instead of the table's.

    Raises:
        UserError: an unknown machine, a batch that does not divide or exceeds the clips, or a step that would not run.
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
    phases = _gpu_phases(config, options, m, dry)
    communication = _communication(config, options, m, dry, phases)
    busy = sum(p.seconds for p in phases)
    exposed = sum(wait for _, wait in communication.values())
    phases += (Phase("communication", 0.0, 0.0, exposed, "communication"),)
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
    steps = max(1, round(config.schedule.epochs * config.steps_per_epoch(options.clips)))
    watts = m["node_power"] * m["power_share"] * options.gpus / m["node_gpus"]
    return Prediction(
        config=config,
        options=options,
        machine=m,
        dry=dry,
        phases=phases,
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
    """The dry run of a rank's step, cached by the fields that it depends on."""
    train = TrainConfig(
        micro_batches=config.train.micro_batches, dtype=config.train.dtype, channels_last=config.train.channels_last
    )
    used = ("size", "views", "small_crops", "small_size")
    sampler = SamplerConfig(**{name: getattr(config.sampler, name) for name in used})
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
    return "CPU cores" if decoder_of(p.options) == "cpu" else FORMATS[p.options.format].gpu_decoder


def frame_bytes(options: PlanOptions, m: Machine) -> float:
    return options.frame_bytes or m[f"{options.format}_bytes"]


# ------------------------------------------------------------------------------------------------------------- the GPU

PHASES = {
    "target forward": ("target", "keys"),
    "online forward, first pass": ("online, first pass",),
    "online forward": ("online",),
    "loss": ("loss", "loss, backward"),
    "backward": ("backward",),
    "optimizer": ("optimizer",),
    "moving average": ("average",),
    "guards": ("guards",),
}
"""The plan's phases of a step, and the dry run's phases that make up each one."""


def _gpu_phases(config: Config, options: PlanOptions, m: Machine, dry: DryRun) -> tuple[Phase, ...]:
    crowding = max(1.0, min(options.gpus, m["node_gpus"]) / m["node_cores"]) if options.gpu == "cpu" else 1.0
    phases = [_views(config, options, m, dry)] if options.gpu != "cpu" else []
    for name, traced in PHASES.items():
        flops = moved = seconds = arithmetic = 0.0
        for op, count in dry.ops.items():
            if op.phase not in traced:
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
            phases.append(Phase(name, flops, moved, seconds, limit))
    return tuple(phases)


def _views(config: Config, options: PlanOptions, m: Machine, dry: DryRun) -> Phase:
    """Resize and color on the GPU.

    The decoder writes each frame. The resize reads and writes it, 8 bits a value. ``photometric`` reads it and writes
    it at the step's width. A blurred view is read and written twice more.
    """
    s = config.sampler
    width = 2 if config.train.dtype == "bfloat16" else 4
    blurred = sum(s.blur[min(v, len(s.blur) - 1)] for v in range(s.views)) / s.views
    source = 3 * m["frame_width"] * m["frame_height"] * 2
    view = 3 * s.size**2 * (1 + 1 + width + blurred * 4 * width)
    moved = s.views * dry.clips * (source + view)
    return Phase("views", 0.0, moved, moved / (m["bandwidth"] * m["bandwidth_efficiency"]), "GPU memory bandwidth")


def _gpu_memory(config: Config, m: Machine, dry: DryRun) -> dict[str, float]:
    """The peak of the dry run by owner, and the memory outside the allocator."""
    kept = ("parameters", "target", "gradients", "optimizer state", "images")
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
    """Number of collectives in a step of several GPUs, by content (counted on gloo: test_communication.py).

    Gradients go in buckets, one of 1 MiB and then of 25. Keys go in one gather and their videos' numbers in another.
    The statistics of each batch norm go once forward and once backward. One flag reports non-finite numbers.
    """
    predictors = config.model.embeddings if config.model.predictor else 0
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
    config: Config, options: PlanOptions, m: Machine, dry: DryRun, phases: tuple[Phase, ...]
) -> dict[str, tuple[float, float]]:
    """Gradients (ring all-reduce), keys (ring all-gather), batch norm's statistics and the flag.

    The bytes of the last two are too few to count. The first two overlap with compute.
    """
    n, counts = options.gpus, collectives(config, dry)
    if n == 1:
        return dict.fromkeys(counts, (0.0, 0.0))
    nodes = node_count(options, m)
    bus = (m["link"] if nodes == 1 else min(m["link"], m["node_network"])) * m["link_efficiency"]
    latency = m["link_latency"] if nodes == 1 else m["network_latency"]
    computes = {phase.name: phase.seconds for phase in phases}
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
    for name, format in FORMATS.items():
        if options.gpu != "cpu":
            engine = m[format.gpu_decoder.lower()]
            rate = engine * m["engine_efficiency"] / (pixels * m[f"{name}_decoded"])
            capacity[f"{name}, engine"] = rate * options.gpus
        capacity[f"{name}, cpu"] = spare / m[f"{name}_core"]
    return capacity


# -------------------------------------------------------------------------------------------------------- alternatives


def alternatives(p: Prediction) -> list[tuple[str, Prediction]]:
    """Predicts the run again after each of a few single changes.

    Args:
        p: The prediction to change.

    Returns:
        (flag of ``vito-fast plan`` that makes the change, prediction after it), for changes that are possible. Smaller
        memory is tried only where memory does not suffice.
    """
    train, options = p.config.train, p.options
    configs: dict[str, dict[str, dict[str, object]]] = {}
    settings: dict[str, dict[str, object]] = {f"--gpus {2 * options.gpus}": {"gpus": 2 * options.gpus}}
    if options.gpu != "cpu":
        configs |= {"--train.dtype bfloat16": {"train": {"dtype": "bfloat16"}}}
        configs |= {"--train.compile": {"train": {"compile": True}}}
        other = "cpu" if decoder_of(options) == "engine" else "engine"
        settings |= {f"--decoder {other}": {"decoder": other}}
    if not options.store:
        formats = [name for name, format in FORMATS.items() if format.codec and name != options.format]
        settings |= {f"--format {name}": {"format": name, "frame_bytes": 0.0} for name in formats}
    if not p.fits:
        configs |= {"--model.checkpoint-activations": {"model": {"checkpoint_activations": True}}}
        for more in (2, 4, 8):
            count = more * train.micro_batches
            configs |= {f"--train.micro-batches {count}": {"train": {"micro_batches": count}}}
    changed = [(flag, from_mapping(p.config, change, flag), options) for flag, change in configs.items()]
    changed += [(flag, p.config, replace(options, **change)) for flag, change in settings.items()]  # type: ignore[arg-type]
    found = []
    for flag, config, chosen in changed:
        if (config, chosen) == (p.config, options):
            continue
        with contextlib.suppress(UserError):  # a batch that does not divide
            found.append((flag, predict(config, chosen, p.machine)))
    return found
