"""``python -m bench.step_modes``: the training step of ResNet-50 at 224 px on this machine's GPU, eager, compiled and
as CUDA graphs. Writes ``bench/results/<gpu>-steps.json``.

Compiling takes minutes. Views are random, so no data is loaded. The time covers everything between a batch on the GPU
and the next.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from bench import machine as machines
from bench.bench_step import trainer, views_of
from bench.harness import timestamp

ROOT = Path(__file__).resolve().parent.parent
MODES: dict[str, dict[str, bool]] = {"eager": {}, "compiled": {"compile": True}}
MODES["graphs"] = {"compile": True, "cuda_graphs": True}
WARM_UP, STEPS = 4, 12


def measure(mode: str, batch: int) -> dict[str, Any]:
    """``{"mode", "batch", "ms", "host_ms", "pairs_s", "warm_s", "peak_gib", "note"}``: medians of a step and of the
    host's part in it, clips a second, seconds of warm-up with compilation, and the most memory.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    torch.cuda.reset_peak_memory_stats()
    made = trainer("resnet50", batch, device, "bfloat16", **MODES[mode])
    views, video = views_of(batch, 224, device)
    views, video = tuple(view.bfloat16() for view in views), video.to(device)

    def step() -> tuple[float, float]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        launched = time.perf_counter()
        made.step(views, video, measure=False)
        launched = time.perf_counter() - launched
        end.record()
        end.synchronize()
        return start.elapsed_time(end), 1e3 * launched

    begun = time.perf_counter()
    for _ in range(WARM_UP):
        step()
    warm = time.perf_counter() - begun
    times = [step() for _ in range(STEPS)]
    ms, host = (statistics.median(column) for column in zip(*times, strict=True))
    peak = torch.cuda.max_memory_allocated() / 2**30
    row = {"mode": mode, "batch": batch, "ms": ms, "host_ms": host, "pairs_s": 1e3 * batch / ms, "warm_s": warm}
    return row | {"peak_gib": peak, "note": "fused batch norm" if mode == "eager" else "by Inductor"}


def main() -> int:
    """Returns the exit status: 1 without a GPU, or where a mode fails."""
    parser = argparse.ArgumentParser(prog="python -m bench.step_modes", description=__doc__)
    parser.add_argument("--mode", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--batch", type=int, default=256, help="clips of two views")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("step_modes: there is no GPU here that PyTorch can use", file=sys.stderr)
        return 1
    rows, failed = [], 0
    for mode in options.mode:
        torch._dynamo.reset()
        gc.collect()  # a compiled trainer lives until then, and counts in the next one's peak
        torch.cuda.empty_cache()
        try:
            rows.append(measure(mode, options.batch))
        except Exception as error:  # one mode's failure is its own
            rows.append({"mode": mode, "batch": options.batch, "failed": f"{type(error).__name__}: {error}"[:300]})
            failed = 1
        print(json.dumps(rows[-1]), flush=True)
    on = machines.machine("cuda")
    path = ROOT / "bench/results" / f"{on['name']}-steps.json"
    record = {
        "schema": 1,
        "cases": [],
        "date": timestamp(),
        "commit": machines.commit(),
        "machine": on,
        "versions": machines.versions(),
    }
    path.write_text(json.dumps(record | {"steps": rows}, indent=1) + "\n")
    print(f"results: {path.relative_to(ROOT)}")
    return failed


if __name__ == "__main__":
    sys.exit(main())
