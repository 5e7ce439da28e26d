"""``python -m bench``: run the suites, write ``bench/results/<machine>.json`` and ``bench/report.html``.

The results file is replaced when the run is over: one that is stopped leaves its cases beside it, in
``<machine>.partial.json``, and one without cases writes nothing. A selection (``--suite``, ``-k``, ``--only``) goes to
``build/bench/<machine>.json`` and ``build/bench/report.html``, as the machine's file and page hold all cases.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OVER = (0, 1)  # pytest's exit statuses of a session that ran to its end, with and without failures
STOPPED = 130  # exit status of a shell's command after Ctrl-C
# glibc moves these thresholds as a process runs, which changes the time of calls that allocate a few MiB.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**40)}


def main() -> int:
    """Returns the exit status: that of pytest, 2 for a file that cannot be written, or 130 after Ctrl-C.

    It is not zero if a result of ours was wrong, a case failed, or no case ran.
    """
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="the quick set, under three minutes on two cores")
    parser.add_argument("--counted", action="store_true", help="no clock: counted figures and correctness only")
    parser.add_argument("--cold", action="store_true", help="CUDA: empty the L2 cache before every sample")
    parser.add_argument(
        "--rounds", type=positive, metavar="N", help="exactly N rounds a case, instead of a time budget"
    )
    parser.add_argument(
        "--results", type=Path, help="default: bench/results/MACHINE.json (-quick), of a selection in build/bench"
    )
    parser.add_argument("--report", type=Path, help="default: bench/report.html, of a selection in build/bench")
    parser.add_argument("--suite", action="append", metavar="NAME", help="only bench/bench_NAME.py; may be repeated")
    parser.add_argument("-k", dest="keyword", help="only the cases that match, as pytest's -k")
    parser.add_argument("--only", metavar="ID,ID", help="only the cases of these ids")
    parser.add_argument("--no-static", dest="static", action="store_false", help="leave the counted figures out")
    options = parser.parse_args()
    os.chdir(ROOT)
    if options.counted:  # scratch of convolutions depends on the instruction set that oneDNN finds
        os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX2"

    from bench import report, static
    from bench.harness import partial
    from bench.machine import machine

    kind = "-counted" if options.counted else "-quick" if options.quick else ""
    name = machine(options.device)["name"] + kind
    selected = options.suite or options.keyword or options.only
    results = options.results or ROOT / ("build/bench" if selected else "bench/results") / f"{name}.json"
    page = options.report or ROOT / ("build/bench" if selected else "bench") / "report.html"
    for path in (results,) if options.counted else (results, page):
        if reason := unwritable(path):
            print(f"cannot write {path}: {reason}", file=sys.stderr)
            return 2
    if selected and not options.results:
        print(f"a selection of the cases: results go to {os.path.relpath(results)}")
    running = partial(results)
    running.unlink(missing_ok=True)
    try:
        command = [sys.executable, "-m", "pytest", *_suites(options), *_arguments(options, running)]
        status = _wait(subprocess.Popen(command, env=os.environ | ALLOCATOR))
        if options.static and status in OVER and running.exists():
            static.add(running)
    except KeyboardInterrupt:
        status = STOPPED
    if not running.exists():
        print(f"no case ran, or none gave a right result: {os.path.relpath(results)} is not written", file=sys.stderr)
        return status or 1
    if status not in OVER:
        print(f"stopped; results so far: {os.path.relpath(running)}", file=sys.stderr)
        return status
    running.replace(results)
    print(f"results: {os.path.relpath(results)}")
    if not options.counted:
        report.write(results, page)
        print(f"report:  {os.path.relpath(page)}")
    return status


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def unwritable(path: Path) -> str | None:
    """Why this file cannot be written, found before the races and not after them; makes its folder."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():
            return "it is no file"
        new = not path.exists()
        path.open("a").close()
        if new:
            path.unlink()
    except OSError as error:
        return error.strerror or str(error)
    return None


def _wait(process: subprocess.Popen[bytes]) -> int:
    """The exit status of a process that Ctrl-C reaches as it does this one, and that saves its cases before it ends."""
    stopped = False
    while True:
        try:
            status = process.wait()
            return STOPPED if stopped else status
        except KeyboardInterrupt:
            stopped = True


def _suites(options: argparse.Namespace) -> list[str]:
    return [f"bench/bench_{suite}.py" for suite in options.suite or []] or ["bench"]


def _arguments(options: argparse.Namespace, results: Path) -> list[str]:
    """The arguments of pytest other than the tests."""
    found = [
        "-q",
        "-s",
        "-o",
        "python_files=bench_*.py",
        "-o",
        "addopts=",
        "-p",
        "no:cacheprovider",
        "--continue-on-collection-errors",
        "-W",
        "ignore:Benchmark fixture was not used",  # by cases that --only leaves out
    ]
    if importlib.util.find_spec("pytest_benchmark"):
        found += ["--benchmark-columns=median,iqr,rounds", "--benchmark-disable-gc", "--benchmark-quiet"]
    found += ["--device", options.device, "--results", str(results)]
    found += [f"--{name}" for name in ("quick", "counted", "cold") if getattr(options, name)]
    for name, value in (("-k", options.keyword), ("--only", options.only), ("--rounds", options.rounds)):
        found += [name, str(value)] if value else []
    return found


if __name__ == "__main__":
    sys.exit(main())
