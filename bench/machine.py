"""The machine and the versions that a results file belongs to, without anything that identifies its owner."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "torch", "torchvision", "triton", "numpy", "nvidia-dali-cuda130", "av", "timm", "open-clip-torch", "lightly",
    "pytorch-metric-learning", "info-nce-pytorch", "memeff", "inf-cl", "torchcodec", "decord2",
    "opencv-python-headless", "pytest-benchmark",
)  # fmt: skip


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        fields = dict(re.findall(r"^(model name|cpu family|model)\s*: (.*)$", info.read_text(), re.M))
        if "model name" in fields:
            family, model = fields.get("cpu family", "?"), fields.get("model", "?")
            return f"{fields['model name'].strip()} (family {family}, model {model})"
    return platform.processor() or platform.machine()


def _memory_gib() -> float:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)


def _gpu() -> dict[str, Any] | None:
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = "unknown"
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "driver": driver,
        "cuda": torch.version.cuda,
    }


def machine(device: str = "cpu") -> dict[str, Any]:
    """``{"name", "cpu", "cores", "memory_gib", "os", "gpu"}``;

    ``name`` names the results file: the GPU, or CPU and cores. A virtual machine's CPU has one name for generations
    whose ratios differ by a factor of two, so its family and model belong to it.
    """
    cpu, cores, gpu = _cpu_name(), len(os.sched_getaffinity(0)), _gpu()
    label = gpu["name"] if device == "cuda" and gpu else f"cpu {cpu} {cores} cores"
    name = re.sub(r"[^a-z0-9]+", "-", label.lower().replace("(r)", "").replace("(tm)", "")).strip("-")
    os_name = f"{platform.system()} {platform.machine()}"
    return {"name": name, "cpu": cpu, "cores": cores, "memory_gib": _memory_gib(), "os": os_name, "gpu": gpu}


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that take part and are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The checkout's commit, with ``+`` when files other than results differ from it; empty outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], cwd=root, capture_output=True, text=True, check=True
        )
        code = [".", ":!bench/results"]
        dirty = subprocess.run(
            ["git", "status", "--porcelain", "-uno", *code], cwd=root, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def baseline() -> Path:
    """The committed quick results of this machine, or of another, with which it is compared more loosely."""
    results = Path(__file__).resolve().parent / "results"
    own = results / f"{machine()['name']}-quick.json"
    return own if own.exists() else max(results.glob("cpu-*-quick.json"))


if __name__ == "__main__":
    print(baseline())
