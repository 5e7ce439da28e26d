"""``make gpu-check``: the kernels' tests and benches on this machine's GPU, in ``bench/results/<gpu>.json``.

Needs a checkout and a Python with torch, triton, numpy and pytest; no network, no installation, under ten minutes.
The exit status is 1 if there is no GPU, if a test fails, or if a bench finds a result of ours wrong.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from bench.harness import partial
from bench.machine import machine

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 570  # for the tests; the benches get the rest
SUITES = ("infonce", "losses", "pooling", "batch_norm", "photometric")
TRAINING = ("optimizer", "step")  # where the package is built: configurations come with its sampler


def run_tests() -> dict[str, Any]:
    """Runs the Triton tests by bare pytests in several processes, since Triton's compiler takes most of the time.

    With pytest-xdist there are as many processes as cores, else one a file.
    """
    files = sorted(str(path) for path in (ROOT / "tests" / "kernels").glob("test_*_kernel.py"))
    spread = ["-n", str(min(16, os.cpu_count() or 1))]
    shards = [[*spread, *files]] if importlib.util.find_spec("xdist") else [[file] for file in files]
    command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider", "-p", "no:benchmark"]
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        reports = [Path(directory) / f"{i}.xml" for i in range(len(shards))]
        pairs = zip(reports, shards, strict=True)
        running = [start([*command, f"--junitxml={report}", f"--rootdir={ROOT}", *shard]) for report, shard in pairs]
        statuses = [wait(process, started + SECONDS - time.monotonic()) for process in running]
        suites = [ElementTree.parse(report).getroot().find("testsuite") for report in reports if report.exists()]
    keys = ("tests", "failures", "errors", "skipped")
    counts = {key: sum(int(suite.get(key, 0)) for suite in suites if suite is not None) for key in keys}
    status = next((status for status in statuses if status != 0), 0)
    return {"status": status, "seconds": round(time.monotonic() - started, 1), **counts}


def run_benches(results: Path, seconds: float) -> int | str:
    suites = SUITES + (TRAINING if list((ROOT / "vito_fast").glob("_sampler*.so")) else ())
    command = [sys.executable, "-m", "bench", "--device", "cuda", "--no-static", "--results", str(results)]
    command += ["--report", str(ROOT / "build" / "gpu-check.html")]
    command += ["-k", "not 1048576 and not 262144"]  # peers take minutes there
    return wait(start([*command, *(part for suite in suites for part in ("--suite", suite))]), seconds)


def start(command: list[str], output: Any = None) -> subprocess.Popen[bytes]:
    """Starts a command in the checkout, in a process group of its own."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.Popen(command, env=environment, cwd=ROOT, process_group=0, stdout=output, stderr=output)


def wait(process: subprocess.Popen[bytes], seconds: float) -> int | str:
    """Exit status, or the reason why there is none. All processes that it started end with it."""
    try:
        return process.wait(max(0.0, seconds))
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        return "stopped: its time was over"


def main() -> int:
    """Returns the exit status."""
    if not torch.cuda.is_available():
        print("gpu-check: there is no GPU here that PyTorch can use, so nothing was checked", file=sys.stderr)
        return 1
    results = ROOT / "bench" / "results" / f"{machine('cuda')['name']}.json"
    for old in (results, partial(results)):  # must not pass for this run's
        old.unlink(missing_ok=True)
    (ROOT / "build").mkdir(exist_ok=True)
    tests = run_tests()
    benches = run_benches(results, SECONDS - tests["seconds"])
    written = results if results.exists() else partial(results)  # a bench that was stopped has got so far
    record = json.loads(written.read_text()) if written.exists() else {"machine": machine("cuda")}
    record |= {"tests": tests, "bench_status": benches, "checked": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    results.parent.mkdir(parents=True, exist_ok=True)
    results.write_text(json.dumps(record, indent=1) + "\n")
    partial(results).unlink(missing_ok=True)
    passed = tests["status"] == 0 and benches == 0 and tests.get("tests", 0) > 0
    print(f"gpu-check {'passed' if passed else 'FAILED'}: tests {tests}, benches {benches}; {os.path.relpath(results)}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
