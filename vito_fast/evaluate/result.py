"""Results: one JSON file for each task and encoder, and the paired comparison of two.

A result says which digests it stands for. One with other digests is stale and never used again.
"""

import dataclasses
import json
import math
import os
import platform
import resource
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vito_fast import __version__
from vito_fast.errors import UserError
from vito_fast.files import atomic_write

SCHEMA = "vito-fast evaluation result, 1"


@dataclasses.dataclass(frozen=True)
class Metric:
    """One number. ``standard_error`` is over ``n`` items, None where the metric is no mean of items."""

    value: float | None
    unit: str
    n: int
    standard_error: float | None = None


@dataclasses.dataclass(frozen=True)
class Encoded:
    """An encoder's identity, as results record it."""

    name: str
    """For folders and cards."""
    source: str
    """As it was asked for: a path, ``timm:NAME``, ``random`` or ``pixels``."""
    architecture: str
    sha256: str
    """Over the architecture, the normalization of its input, and the names, shapes and bytes of its weights."""
    init: str
    """Where the weights come from: ``trained``, or the initialization, its seed, and its batch norm's statistics."""
    step: int | None = None
    """Training steps, where they are known."""
    notes: tuple[str, ...] = ()


@dataclasses.dataclass
class Result:
    """All that a result file holds."""

    task: str
    preset: str
    options: dict[str, Any]
    provenance: dict[str, str]
    published: list[dict[str, Any]]
    key: dict[str, str]
    encoder: Encoded
    data: dict[str, Any]
    metrics: dict[str, Metric]
    items: dict[str, dict[str, float | None]]
    groups: dict[str, dict[str, float | None]]
    seeds: dict[str, int]
    media: dict[str, str]
    notes: list[str]
    environment: dict[str, Any]
    cost: dict[str, float]
    complete: bool
    resamples: dict[str, list[float | None]] = dataclasses.field(default_factory=dict)
    """Of a metric that is no mean of items: its values over images drawn anew, the same draws for every encoder."""
    schema: str = SCHEMA

    @property
    def primary(self) -> tuple[str, Metric]:
        """The first metric and its name."""
        return next(iter(self.metrics.items()))

    def save(self, path: Path) -> None:
        """Writes the file, whole or not at all; numbers that are not finite become null."""
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(_finite(dataclasses.asdict(self)), indent=1, allow_nan=False) + "\n"
        with atomic_write(path) as partial:
            partial.write_text(text, encoding="utf-8")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def load(path: Path) -> Result:
    """The result in a file. UserError naming the file if it is missing or of another schema."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the result {path}: {error}") from None
    if not isinstance(values, dict) or values.get("schema") != SCHEMA:
        raise UserError(f"{path} is not a result of this version: run the evaluation again")
    try:
        values["encoder"] = Encoded(**{**values["encoder"], "notes": tuple(values["encoder"]["notes"])})
        values["metrics"] = {name: Metric(**metric) for name, metric in values["metrics"].items()}
        return Result(**values)
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is not a whole result ({error}): run the evaluation again") from None


def finished(path: Path, key: Mapping[str, str]) -> Result | None:
    """The complete result in ``path`` if it stands for exactly the digests of ``key``."""
    if not path.is_file():
        return None
    try:
        result = load(path)
    except UserError:
        return None
    return result if result.complete and result.key == dict(key) else None


def load_all(folder: Path) -> list[Result]:
    """Every complete result under a folder, by path. UserError if there is none."""
    found = [load(path) for path in sorted(folder.rglob("*.json")) if is_result(path)]
    found = [result for result in found if result.complete]
    if not found:
        raise UserError(f"{folder} holds no result: vito-fast evaluate ENCODER --out {folder}")
    return found


def is_result(path: Path) -> bool:
    """Whether a file says that it is a result of this schema."""
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file).get("schema") == SCHEMA
    except (OSError, ValueError, AttributeError):
        return False


def mean_metric(values: Iterable[float | None], unit: str) -> Metric:
    """The mean of items and its standard error, sd / sqrt(n) with the sample's sd; no error below two items.

    Items without a score (None, NaN) are left out, and ``n`` says how many are in."""
    kept = [value for value in values if value is not None and math.isfinite(value)]
    if not kept:
        return Metric(None, unit, 0)
    mean = math.fsum(kept) / len(kept)
    if len(kept) < 2:
        return Metric(mean, unit, len(kept))
    variance = math.fsum((value - mean) ** 2 for value in kept) / (len(kept) - 1)
    return Metric(mean, unit, len(kept), math.sqrt(variance / len(kept)))


def draws(items: int, resamples: int) -> NDArray[np.int64]:
    """How often each item is in each resample of a bootstrap, (resamples, items). The same for the same numbers, so
    that two encoders' values over them are pairs."""
    rng = np.random.Generator(np.random.Philox(key=[0, 3]))
    return rng.multinomial(items, np.full(items, 1 / items), resamples)


def deviation(resamples: NDArray[np.float64]) -> float:
    """The bootstrap's standard error: the deviation of a metric's values over resamples."""
    return float(np.nanstd(resamples, ddof=1))


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Mean difference (second less first) over what both have, with a 95 % interval."""

    metric: str
    difference: float
    low: float
    high: float
    n: int

    @property
    def decided(self) -> bool:
        """Whether the interval excludes zero."""
        return self.low > 0 or self.high < 0


def compare(first: Result, second: Result, metric: str | None = None) -> Comparison | None:
    """The paired comparison of two results of one task.

    The interval is Student's t over the items' differences. For a metric that is no mean of items, as mIoU and AP, it
    spans the middle 95 % of the differences over the same resamples of images.

    Args:
        first, second: Results of the same task, options and data.
        metric: By default the first metric.
    Returns:
        None if fewer than two items have scores in both.
    Raises:
        UserError: if the two do not stand for the same options and data.
    """
    for part in ("preset", "data"):
        if first.key[part] != second.key[part]:
            raise UserError(
                f"{first.task}: the results of {first.encoder.name} and {second.encoder.name} differ in {part}"
            )
    metric = metric or first.primary[0]
    if metric in first.resamples and metric in second.resamples:
        return _compare_resamples(first, second, metric)
    differences = []
    for name, scores in first.items.items():
        a, b = scores.get(metric), second.items.get(name, {}).get(metric)
        if a is not None and b is not None:
            differences.append(b - a)
    found = mean_metric(differences, "")
    if found.value is None or found.standard_error is None:
        return None
    from scipy.stats import t

    half = float(t.ppf(0.975, found.n - 1)) * found.standard_error
    return Comparison(metric, found.value, found.value - half, found.value + half, found.n)


def _compare_resamples(first: Result, second: Result, metric: str) -> Comparison | None:
    values = [np.array(result.resamples[metric], np.float64) for result in (first, second)]
    before, after = first.metrics[metric], second.metrics[metric]
    if before.value is None or after.value is None or values[0].shape != values[1].shape:
        return None
    low, high = np.nanpercentile(values[1] - values[0], (2.5, 97.5))
    return Comparison(metric, after.value - before.value, float(low), float(high), after.n)


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, machine and device, for the record."""
    packages: dict[str, str | None] = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "vito_fast": __version__,
    }
    for name in ("torchvision", "timm", "av", "pillow", "scipy", "faster_coco_eval"):
        packages[name] = _version(name)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {"packages": packages, "device": device.type, "device_name": name, "threads": torch.get_num_threads()}


def _version(name: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return None


def start_cost(device: torch.device) -> dict[str, float]:
    """The clocks before the work."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    return {"wall": time.monotonic(), "cpu": _cpu_seconds()}


def cost_since(started: Mapping[str, float], device: torch.device) -> dict[str, float]:
    """Wall and CPU seconds of this process since ``start_cost``, and its peak memory in bytes (the GPU's on one)."""
    if device.type == "cuda":
        peak = float(torch.cuda.max_memory_allocated(device))
    else:
        peak = float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    return {
        "wall_seconds": time.monotonic() - started["wall"],
        "cpu_seconds": _cpu_seconds() - started["cpu"],
        "peak_bytes": peak,
    }


def _cpu_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
