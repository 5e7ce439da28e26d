"""``make gpu-check``: the kernels' tests and times on this machine's GPU, written to ``bench/results/<gpu>.json``.

Needs a checkout of the repository and a Python with torch, triton, numpy and pytest; no network, no installation. Every
time stands behind a comparison with the reference in the same run; variants take turns, and medians are reported. The
exit status is 1 if there is no GPU, or a test or a comparison fails.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from torch import Tensor

import vito_kernels
from vito_kernels import reference
from vito_kernels.reference.photometric import IMAGENET_STD

TEST_SECONDS = 420  # the tests' share of ten minutes
CASE_SECONDS = 8.0  # for timing one case, all its variants together
ROUNDS = 30

# -------------------------------------------------------------------------------------------------------------- tests


def run_tests(root: Path) -> dict[str, Any]:
    """Runs the Triton tests by a bare pytest in a process of their own."""
    files = sorted(str(path) for path in (root / "tests" / "kernels").glob("test_*_kernel.py"))
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider"]
        command += [f"--junitxml={report}", f"--rootdir={root}", *files]
        try:
            status: int | str = subprocess.run(command, timeout=TEST_SECONDS, env=_plain_environment()).returncode
        except subprocess.TimeoutExpired:
            status = f"stopped after {TEST_SECONDS} s"
        suite = ElementTree.parse(report).getroot().find("testsuite") if report.exists() else None
    keys = ("tests", "failures", "errors", "skipped")
    counts = {key: int(suite.get(key, 0)) for key in keys} if suite is not None else {}
    passed = status == 0 and counts.get("tests", 0) > 0
    return {"passed": passed, "status": status, "seconds": round(time.monotonic() - started, 1), **counts}


def _plain_environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}


# -------------------------------------------------------------------------------------------------------------- times


@dataclass(frozen=True)
class Case:
    """``variants`` compute the same; the first is ours. ``error`` compares them, and may be at most ``tolerance``."""

    name: str
    variants: dict[str, Callable[[], Any]]
    error: Callable[[], float]
    tolerance: float


def run_case(case: Case) -> dict[str, Any]:
    error = case.error()
    record: dict[str, Any] = {"name": case.name, "error": error, "tolerance": case.tolerance}
    if not error <= case.tolerance:
        return {**record, "passed": False}
    times = _interleaved(case.variants)
    ours, *others = times
    medians = {name: statistics.median(values) for name, values in times.items()}
    ratios = {name: round(medians[name] / medians[ours], 3) for name in others}
    return {**record, "passed": True, "median_ms": medians, "times_ours": ratios, "rounds": len(times[ours])}


def _interleaved(variants: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
    """Milliseconds of each variant by GPU events, the variants taking turns, the cache flushed before each."""
    flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    for run in variants.values():
        for _ in range(3):
            run()
    times: dict[str, list[float]] = {name: [] for name in variants}
    deadline = time.monotonic() + CASE_SECONDS
    while len(times[next(iter(times))]) < ROUNDS and time.monotonic() < deadline:
        for name, run in variants.items():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            flush.zero_()
            begin.record()
            run()
            end.record()
            end.synchronize()
            times[name].append(begin.elapsed_time(end))
    return times


def cases() -> Iterator[Case]:
    torch.manual_seed(0)
    for rows in (4096, 16384):
        yield _info_nce_case(rows, 256)
    for batch, channels, side in ((256, 1024, 14), (256, 2048, 7)):
        yield _pool_case(batch, channels, side)
    yield _photometric_case(64)


def _info_nce_case(rows: int, width: int) -> Case:
    q, k = torch.nn.functional.normalize(torch.randn(2, rows, width, device="cuda"), dim=2).bfloat16()
    q.requires_grad_()
    target = torch.arange(rows, device="cuda")

    def fused(q: Tensor, k: Tensor) -> Tensor:
        return vito_kernels.info_nce(q, k, temperature=0.1)

    def plain(q: Tensor, k: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy((q @ k.T).float() / 0.1, target)

    def run(loss: Callable[..., Tensor]) -> Callable[[], Tensor]:
        return lambda: torch.autograd.grad(loss(q, k), q)[0]

    ours, eager = run(fused), run(plain)
    return Case(
        f"info_nce forward and backward M=N={rows} D={width} bfloat16",
        {"vito_kernels": ours, "torch eager": eager, "torch.compile": run(torch.compile(plain))},
        lambda: _relative(ours(), eager()),
        0.05,
    )


def _pool_case(batch: int, channels: int, side: int) -> Case:
    features = torch.randn(batch, channels, side, side, device="cuda", dtype=torch.bfloat16)
    features = features.contiguous(memory_format=torch.channels_last).requires_grad_()
    logits = torch.randn(batch, side * side, device="cuda", requires_grad=True)
    g = torch.randn(batch, channels, device="cuda", dtype=torch.bfloat16)

    def run(pool: Callable[..., tuple[Tensor, Tensor]]) -> Callable[[], tuple[Tensor, ...]]:
        return lambda: torch.autograd.grad(pool(features, logits)[0], (features, logits), g)

    ours, eager = run(vito_kernels.attention_pool), run(reference.attention_pool)
    return Case(
        f"attention_pool forward and backward B={batch} C={channels} {side}x{side} bfloat16 channels_last",
        {"vito_kernels": ours, "torch eager": eager, "torch.compile": run(torch.compile(reference.attention_pool))},
        lambda: max(_relative(a, b) for a, b in zip(ours(), eager(), strict=True)),
        0.02,
    )


def _photometric_case(batch: int) -> Case:
    images = torch.randint(0, 256, (batch, 224, 224, 3), dtype=torch.uint8, device="cuda")
    low = torch.tensor((-0.4, 0.6, 0.8, -0.1, 0.0, 0.0, 0.1, 2.0))
    high = torch.tensor((0.4, 1.4, 1.2, 0.1, 24.0, 0.0, 2.0, 2.0))
    params = low + (high - low) * torch.rand(batch, 8)
    params[:, 4].floor_()
    params = params.cuda()

    def run(function: Callable[..., Tensor]) -> Callable[[], Tensor]:
        return lambda: function(images, params, dtype=torch.bfloat16)

    ours, eager = run(vito_kernels.photometric), run(reference.photometric)
    grey_level = 1 / 255 / min(IMAGENET_STD)
    return Case(
        f"photometric with blur B={batch} 224x224 bfloat16",
        {"vito_kernels": ours, "torch eager": eager},
        lambda: float((ours().float() - eager().float()).abs().max()),
        2 * grey_level,  # both round to bfloat16
    )


def _relative(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


# -------------------------------------------------------------------------------------------------------------- report


def machine() -> dict[str, Any]:
    import platform

    import triton

    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0].strip()
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "capability": list(torch.cuda.get_device_capability(0)),
        "memory_bytes": properties.total_memory,
        "driver": driver,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def main() -> int:
    """Returns the exit status."""
    root = Path.cwd()
    if not torch.cuda.is_available():
        print("gpu-check: there is no GPU here that PyTorch can use, so nothing was checked", file=sys.stderr)
        return 1
    if not (root / "tests" / "kernels").is_dir():
        print(f"gpu-check: run it from the root of the repository, not {root}", file=sys.stderr)
        return 1
    report: dict[str, Any] = {"machine": machine(), "tests": run_tests(root), "cases": []}
    for case in cases():
        record = run_case(case)
        report["cases"].append(record)
        print(json.dumps(record), flush=True)
        torch.cuda.empty_cache()
    name = re.sub(r"[^a-z0-9]+", "-", report["machine"]["gpu"].lower()).strip("-")
    path = root / "bench" / "results" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    passed = report["tests"]["passed"] and all(case["passed"] for case in report["cases"])
    print(f"{'passed' if passed else 'FAILED'}: {path}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
