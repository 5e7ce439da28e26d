"""The plan and the dry run as tables for people, or as JSON for programs."""

from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from vito_fast.config import Config
from vito_fast.plan.dryrun import DryRun, dry_run
from vito_fast.plan.hardware import Machine
from vito_fast.plan.predict import Prediction, decoder_name, decoder_of
from vito_fast.train.distributed import environment_number

Alternatives = list[tuple[str, Prediction]]
"""Flags of single changes and the predictions after them."""


def assumptions(m: Machine) -> Table:
    """The constants of a machine, each with its source."""
    table = Table("constant", "value", "unit", "source", title=f"Constants for {m.gpu}", title_justify="left")
    for name, (value, unit, source) in m.constants.items():
        table.add_row(name, f"{value:.4g}", unit, source)
    return table


def show(p: Prediction, others: Alternatives, console: Console) -> None:
    """Prints the prediction, with the numbers to check it by hand, and its alternatives."""
    o, c = p.options, p.config
    console.print(
        f"PREDICTION, not a measurement: {c.name} on {o.gpus} x {o.gpu}, {o.clips:,} clips stored as {o.format}, "
        f"batch {c.train.batch_size} ({p.dry.clips} clips a GPU), {c.train.dtype}"
        f"{', compiled' if c.train.compile else ''}. Sources of all constants: --assumptions"
    )
    console.print(_step_table(p))
    console.print(_side_table(p))
    console.print(_decode_table(p))
    console.print(_memory_table(p))
    console.print(_total_table(p))
    console.print(_alternatives_table(p, others))
    slow = 2 * p.machine["slowdown"] - 1
    console.print(
        f"error: the one step that was measured took {p.machine['slowdown'] - 1:.0%} longer than planned. Expect "
        f"{p.hours:.3g} to {p.hours * slow:.3g} hours, more with stragglers, cold storage or a busy network.",
        soft_wrap=True,
    )
    console.print(f"in one line: {summary(p)}", soft_wrap=True)


def summary(p: Prediction) -> str:
    """The prediction in one line, as the presets' headers quote it."""
    memory = f"{p.gpu_bytes / 1e9:.0f} of {p.machine['memory'] / 1e9:.0f} GB a GPU"
    return f"{_ms(p.step_seconds)} a step, {p.hours:.3g} hours, {p.kwh:.3g} kWh, {memory}; bottleneck: {p.bottleneck}"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i in (0, len(columns) - 1) else "right")
    return table


def _step_table(p: Prediction) -> Table:
    table = _table("One step of one GPU", "phase", "TFLOP", "GB moved", "ms", "bottleneck")
    for phase in p.phases:
        table.add_row(
            phase.name,
            f"{phase.flops / 1e12:.3f}",
            f"{phase.bytes / 1e9:.2f}",
            f"{phase.seconds * 1e3:.2f}",
            phase.limit,
        )
    flops, moved = sum(x.flops for x in p.phases), sum(x.bytes for x in p.phases)
    rates = f"{p.machine['bf16'] * p.machine['matmul_efficiency'] / 1e12:.0f} TFLOP/s, "
    rates += f"{p.machine['bandwidth'] * p.machine['bandwidth_efficiency'] / 1e12:.2f} TB/s"
    table.add_row("all", f"{flops / 1e12:.3f}", f"{moved / 1e9:.2f}", f"{p.resources['gpu'] * 1e3:.2f}", f"at {rates}")
    return table


def _side_table(p: Prediction) -> Table:
    frames = p.config.train.batch_size * p.config.sampler.views
    chosen = p.decode[f"{p.options.format}, {decoder_of(p.options)}"]
    node_read = p.machine["node_read"]
    how = {
        "gpu": "the table above",
        "decode": f"{frames} frames at {chosen:,.0f} a second by {decoder_name(p)}",
        "storage": f"{p.resources['storage'] * node_read / 1e6:.1f} MB a node at {node_read / 1e9:.1f} GB/s",
        "link": f"to the GPU at {p.machine['host_link'] / 1e9:.1f} GB/s",
    }
    table = _table("Resources: the slowest sets the pace", "resource", "ms a step", "how")
    for name, seconds in p.resources.items():
        table.add_row(name, f"{seconds * 1e3:.2f}", how[name])
    for name, (takes, waits) in p.communication.items():
        table.add_row(f"communication: {name}", f"{takes * 1e3:.2f}", f"{waits * 1e3:.2f} ms of it exposed")
    return table


def _decode_table(p: Prediction) -> Table:
    table = _table("Decoding", "format, decoder", "frames/s", "times the GPUs' need")
    for name, rate in p.decode.items():
        table.add_row(name, f"{rate:,.0f}", f"{rate / p.frames_needed:.2f}")
    return table


def _memory_table(p: Prediction) -> Table:
    table = _table("Memory and storage", "place", "GB", "of")
    for name, size in p.gpu_memory.items():
        table.add_row(f"GPU: {name}", f"{size / 1e9:.2f}", "")
    table.add_row(
        "GPU: all",
        f"{p.gpu_bytes / 1e9:.2f}",
        f"{p.machine['memory'] / 1e9:.0f}" + ("" if p.fits else ": DOES NOT FIT"),
    )
    host = sum(p.host_memory.values())
    table.add_row("host of a node, beside the page cache", f"{host / 1e9:.1f}", f"{p.machine['node_memory'] / 1e9:.0f}")
    table.add_row("store", f"{p.store_bytes / 1e9:,.0f}", f"{p.machine['node_storage'] / 1e9:,.0f} on a node")
    return table


def _total_table(p: Prediction) -> Table:
    c, o = p.config, p.options
    table = _table("The whole schedule", "quantity", "value", "how")
    epoch = f"{c.schedule.epoch_clips or o.clips:,}"
    table.add_row(
        "steps", f"{p.steps:,}", f"{c.schedule.epochs:g} epochs of {epoch} clips, {c.train.batch_size} a step"
    )
    table.add_row("step", _ms(p.step_seconds), f"{p.clips_per_second:,.0f} clips/s")
    table.add_row("hours", f"{p.hours:.2f}", f"{p.hours * o.gpus:.1f} GPU hours")
    watts = p.machine["node_power"] * p.machine["power_share"] / p.machine["node_gpus"]
    table.add_row("kWh", f"{p.kwh:.1f}", f"{watts:.0f} W a GPU with its share of the node")
    table.add_row("MFU", f"{p.mfu:.1%}", f"of {p.machine['bf16'] / 1e12:.0f} TFLOP/s a GPU")
    return table


def _alternatives_table(p: Prediction, others: Alternatives) -> Table:
    table = _table("Alternatives, one change each", "flag", "ms a step", "hours", "kWh", "GB a GPU", "bottleneck")
    for flag, x in [("as configured", p), *others]:
        times = f"{x.step_seconds * 1e3:.1f}", f"{x.hours:.2f}", f"{x.kwh:.1f}"
        table.add_row(flag, *times, f"{x.gpu_bytes / 1e9:.0f}", x.bottleneck)
    return table


def as_json(p: Prediction, others: Alternatives) -> dict[str, Any]:
    """The prediction in SI units, and the totals of its alternatives."""
    return {
        "kind": "prediction",
        "options": asdict(p.options),
        "phases": [asdict(phase) for phase in p.phases],
        "communication": {name: {"takes": t, "exposed": e} for name, (t, e) in p.communication.items()},
        "resources": p.resources,
        "decode_frames_per_s": p.decode,
        "gpu_memory": p.gpu_memory,
        "gpu_bytes": p.gpu_bytes,
        "fits": p.fits,
        "host_memory": p.host_memory,
        "store_bytes": p.store_bytes,
        "steps": p.steps,
        "step_seconds": p.step_seconds,
        "hours": p.hours,
        "kwh": p.kwh,
        "mfu": p.mfu,
        "bottleneck": p.bottleneck,
        "alternatives": {
            flag: {name: getattr(x, name) for name in ("step_seconds", "hours", "kwh", "gpu_bytes", "bottleneck")}
            for flag, x in others
        },
    }


def report_dry_run(config: Config) -> int:
    """Prints the dry run of one of the launcher's ranks; returns the exit status of ``vito-fast train --dry-run``."""
    dry = dry_run(config, world=environment_number("WORLD_SIZE", 1, least=1))
    show_dry_run(dry, console())
    return 1 if dry.problems else 0


def console() -> Console:
    """A console as wide as the terminal, or 118 columns without one."""
    return Console(width=None if Console().is_terminal else 118, highlight=False)


def show_dry_run(dry: DryRun, console: Console) -> None:
    """Prints the counts of a dry run, and its problems."""
    table = _table(
        f"One CUDA step, run dry: {dry.clips} clips on one of {dry.world} GPUs", "phase", "TFLOP", "GB moved", "ops"
    )
    for phase in dict.fromkeys(op.phase for op in dry.ops):
        flops, moved = dry.total(phase)
        calls = sum(n for op, n in dry.ops.items() if op.phase == phase)
        table.add_row(phase, f"{flops / 1e12:.3f}", f"{moved / 1e9:.2f}", str(calls))
    console.print(table)
    memory = _table(f"Memory at its peak, in the {dry.peak_phase} phase", "owner", "GB alive", "GB saved for backward")
    for owner, size in dry.peak.items():
        memory.add_row(owner, f"{size / 1e9:.3f}", f"{dry.saved.get(owner, 0) / 1e9:.3f}")
    memory.add_row("all", f"{dry.peak_bytes / 1e9:.3f}", f"{sum(dry.saved.values()) / 1e9:.3f}")
    console.print(memory)
    for problem in dry.problems:
        console.print(f"PROBLEM: {problem}", markup=False)
    if not dry.problems:
        console.print("no device mismatch, no wait for the host, no graph break")


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"
