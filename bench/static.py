"""Figures without a clock: instructions of the C++ core, packets per frame, the traced CUDA step, kernels as the
compiler made them, and their operations.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from fractions import Fraction
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
FRAMES = 250
SOURCES = ("bitstream", "index", "index_writer", "miniclip", "planner", "reader", "sampler")
TIMES = (200, 1200)
GOPS = (1, 8, 12, 50, 250)
KERNELS = ("D=256 bfloat16 diagonal", "two-sided lse D=256 bfloat16", "B=256 L=196", "photometric")
"""Parts of the names of the launches that a timed run compiles. A counted run compiles all but the rare ones."""

KEPT = ("name", "arch", "registers", "spill_bytes", "shared_bytes", "shared_limit", "flops", "min_bytes", "roofline_ms")


def add(results: Path) -> None:
    """Adds ``static`` to a results file: ``counts``, ``kernels`` as compiled, operations ``executed``, and the
    ``missing`` figures with reasons.
    """
    content = json.loads(results.read_text())
    with ThreadPoolExecutor(1) as beside:  # mostly waits for g++ and valgrind
        counting, executing = beside.submit(count), beside.submit(execute)
        kernels, unseen = ([], []) if content["device"] == "cuda" else inspect(content["quick"], content["counted"])
        (counts, missing), (executed, failed) = counting.result(), executing.result()
    missing += unseen + failed
    for line in missing:
        print(f"not counted: {line}")
    content["static"] = {"counts": counts, "kernels": kernels, "executed": executed, "missing": missing}
    results.write_text(json.dumps(content, indent=1) + "\n")


def count() -> tuple[dict[str, float], list[str]]:
    """Counts of the C++ core by name, and the missing ones with reasons."""
    counts: dict[str, float] = {}
    missing: list[str] = []
    try:
        import vito_fast._sampler  # noqa: F401
    except ImportError as error:
        return counts, [f"the data side is not installed ({error})"]
    with tempfile.TemporaryDirectory() as folder:
        for gop in GOPS:
            counts[f"packets per frame, GOP {gop}"] = packets_per_frame(Path(folder), gop)
        counts |= traced_steps()
        tools = [tool for tool in ("valgrind", "g++") if shutil.which(tool) is None]
        if tools:
            missing.append(f"instructions: {' and '.join(tools)} not installed")
        else:
            counts |= instructions(Path(folder))
    return counts, missing


def make_index(path: Path, gop: int, clips: int = 64) -> Any:
    """An index of H.264-like clips without B-frames, a key every ``gop`` frames; no shard is written."""
    from vito_fast.data.store.index import KEY, ClipRecord, Index, write_index

    number = np.arange(FRAMES)
    shared: dict[str, Any] = {
        "codec": "mjpeg" if gop == 1 else "h264",
        "width": 456,
        "height": 256,
        "shard": 0,
        "time_base": Fraction(1, 25),
        "pts": number,
        "offsets": number * 4096,
        "sizes": np.full(FRAMES, 4096),
        "checksums": number.astype(np.uint32),
        "flags": np.where(number % gop == 0, KEY, 0).astype(np.uint8),
        "end": FRAMES,
    }
    clip_records = [ClipRecord(video=i, source=f"{i}.mp4", **shared) for i in range(clips)]
    write_index(path, clip_records, format="jpeg" if gop == 1 else "copy", shards=[("shard-00000.bin", FRAMES * 4096)])
    return Index(path)


def packets_per_frame(folder: Path, gop: int, samples: int = 512) -> float:
    """Packets decoded over distinct frames used (d/u) for the sampler's own requests;

    a file name in ``folder`` is used.
    """
    from vito_fast.config import SamplerConfig
    from vito_fast.data.loader.sampler import Sampler
    from vito_fast.data.store.index import plan_packets

    index = make_index(folder / f"gop{gop}.bin", gop)
    drawn = Sampler(index, SamplerConfig(views=2), seed=1).sample(np.arange(samples))
    decoded = used = 0
    for clip, frames in zip(drawn.clip, drawn.frame, strict=True):
        decoded += len(plan_packets(index, int(clip), frames, single_stream=False).packets)
        used += len(set(frames.tolist()))
    return decoded / used


def traced_steps() -> dict[str, float]:
    """Cost of one GPU's share of a CUDA step, traced on fake tensors, and the plan for it.

    The steps are those of ``bench.step_modes`` and of the paper on eight H100.
    """
    from vito_fast.config import Config, ModelConfig, SamplerConfig, TrainConfig
    from vito_fast.config_files import load_config, preset_files
    from vito_fast.plan.predict import PlanOptions, predict

    measured = ModelConfig(backbone="resnet50", heads="per_level", predictor=True)  # as in nvidia-h200-steps.json
    single = TrainConfig(batch_size=256, dtype="bfloat16", compile=True)
    paper = next(file for file in preset_files() if file.stem == "vito_r50_8xh100")
    steps = {
        "step of ResNet-50, 256 clips on an H200": (
            Config(model=measured, sampler=SamplerConfig(views=2), train=single),
            PlanOptions(gpu="h200", gpus=1),
        ),
        "step of vito_r50_8xh100": (load_config(paper), PlanOptions(gpu="h100", gpus=8)),
    }
    found = {}
    for name, (config, options) in steps.items():
        plan = predict(config, options)
        flops, moved = plan.dry.total()
        found |= {f"{name}: TFLOP": flops / 1e12, f"{name}: GB moved": moved / 1e9}
        found |= {f"{name}: GB at most": plan.dry.peak_bytes / 1e9, f"{name}: GB planned": plan.gpu_bytes / 1e9}
        found |= {f"{name}: ms planned": 1e3 * plan.resources["gpu"]}
        found |= {f"{name}: ms planned for decoding": 1e3 * plan.resources["decode"]}
    return found


def instructions(folder: Path) -> dict[str, float]:
    """Instructions executed for one sample, one plan and one mini-clip, by callgrind, start-up subtracted."""
    program = folder / "count"
    sources = [str(ROOT / "csrc" / f"{name}.cpp") for name in SOURCES] + [str(ROOT / "bench/native/count.cpp")]
    command = ["g++", "-std=c++17", "-O3", "-DNDEBUG", "-ffp-contract=off", f"-I{ROOT / 'csrc'}", *sources]
    subprocess.run([*command, "-o", str(program), "-pthread"], check=True)
    jobs = {
        "sampler: instructions a sample of 2 views": ("gop1.bin", "sample"),
        "planner: instructions a pair, GOP 12": ("gop12.bin", "plan"),
        "mini-clip: instructions for 8 packets": ("gop12.bin", "miniclip"),
    }
    found = {}
    for name, (index, part) in jobs.items():
        make_index(folder / index, int(re.findall(r"\d+", index)[0]))
        few, many = (_executed([str(program), str(folder / index), part, str(times)]) for times in TIMES)
        found[name] = round((many - few) / (TIMES[1] - TIMES[0]), 1)
    return found


def _executed(command: list[str]) -> int:
    watched = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", *command]
    output = subprocess.run(watched, check=True, capture_output=True, text=True).stderr
    match = re.search(r"Collected\s*:\s*(\d+)", output)
    if match is None:
        raise RuntimeError(f"callgrind said nothing of its count: {output[-300:]}")
    return int(match[1])


def execute() -> tuple[dict[str, dict[str, int]], list[str]]:
    """``bench.executed`` in a process of its own, since it stays in the interpreter; and why there is nothing."""
    command = [sys.executable, "-W", "ignore", "-m", "bench.executed"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if run.returncode:
        return {}, [f"executed: exit status {run.returncode}, {run.stderr.strip()[-200:]}"]
    return json.loads(run.stdout), []


def inspect(quick: bool, counted: bool) -> tuple[list[dict[str, Any]], list[str]]:
    """Records of ``vito_kernels.inspect``, and the failures to compile.

    Of all kernels but the rare ones for a counted run, else of the races' shapes, for the quick set on Hopper alone.
    """
    try:
        from vito_kernels.inspect import specs
    except ImportError as error:
        return [], [f"kernels: {error}"]
    found = [spec for part in KERNELS for spec in specs(part)] + (specs(rare=False) if counted else [])
    chosen = dict.fromkeys(number for number, _ in found)
    jobs = [(arch, number) for arch in ((90,) if quick and not counted else (80, 90, 100)) for number in chosen]
    workers = len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return [record for records in pool.map(_compile, jobs) for record in records], []


def _compile(job: tuple[int, int]) -> list[dict[str, Any]]:
    """Compiles one launch for one target, with the figures of the report and the gate."""
    from vito_kernels.inspect import inspect_job

    found = []
    for record in inspect_job(job):
        code = record["loop_instructions"] or record["instructions"]  # all of them where there is no loop
        found.append(
            {name: record[name] for name in KEPT} | {"loop_instructions": code, "mma": " + ".join(record["mma"])}
        )
    return found
