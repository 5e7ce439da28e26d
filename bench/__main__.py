"""``python -m bench``: run the suites, write ``bench/results/<machine>.json`` and ``bench/report.html``.

The results file is replaced when the run is over: one that is stopped leaves its cases beside it, in
``<machine>.partial.json``, and one without cases writes nothing. A selection (``--suite``, ``-k``, ``--only``) goes to
``build/bench/<machine>.json`` and ``build/bench/report.html``, as the machine's file and page hold all cases.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OVER = (0, 1)  # pytest's exit statuses of a session that ran to its end, with and without failures
STOPPED = 130  # by Ctrl-C, as shells say it
RACES = 820, 125  # seconds, of the full and the quick set: what is left of them is for cases in doubt, once more ...
MOST_PASSES = 5  # ... and once more


def main() -> int:
    """Exit status: pytest's; non-zero when a result of ours was wrong, a case failed, or no case ran; 2 for what cannot
    be written, 130 after Ctrl-C.
    """
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="the quick set, under three minutes on two cores")
    parser.add_argument("--counted", action="store_true", help="no clock: what is counted, and whether it is right")
    parser.add_argument("--cold", action="store_true", help="CUDA: empty the L2 cache before every sample")
    parser.add_argument(
        "--rounds", type=positive, metavar="N", help="exactly so many rounds a case and pass, instead of a time budget"
    )
    parser.add_argument(
        "--passes", type=positive, metavar="N", help="runs over the cases, merged (bench/passes.py): 2 on a CPU"
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
    if options.counted:  # scratch of convolutions depends on the instructions that oneDNN finds: it shall find the same
        os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX2"

    from bench import report, static
    from bench.harness import partial
    from bench.machine import Others, machine
    from bench.passes import caveats

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
    running, others = partial(results), Others()
    try:
        status = _run(options, running)
        if not options.counted and running.exists():
            running.write_text(
                json.dumps(json.loads(running.read_text()) | {"others": round(others.cores(), 2)}) + "\n"
            )
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
    for line in caveats(json.loads(results.read_text())):
        print(line)
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


def _run(options: argparse.Namespace, results: Path) -> int:
    """All passes, into one file; the exit status of the first that did not end well. One that is stopped leaves those
    before it.
    """
    from bench.passes import doubtful, merge

    passes = options.passes or (1 if options.counted or options.device == "cuda" else 2)
    start, found, statuses = time.monotonic(), list[dict[str, Any]](), list[int]()
    results.unlink(missing_ok=True)

    def run(target: Path, *more: str, tests: Sequence[str] = ()) -> bool:
        command = [sys.executable, "-m", "pytest", *(tests or _suites(options)), *_arguments(options, target), *more]
        statuses.append(_wait(subprocess.Popen(command)))
        if statuses[-1] not in OVER or not target.exists():
            return False
        found.append(json.loads(target.read_text()))
        if target != results:
            results.write_text(json.dumps(merge(found), indent=1) + "\n")
        return True

    with tempfile.TemporaryDirectory() as folder:
        for number in range(passes):
            print(f"pass {number + 1} of {passes}", flush=True)
            if not (run(Path(folder) / f"{number}.json", "--later-pass") if number else run(results)):
                break
        while 1 < passes <= len(found) < MOST_PASSES:
            if not (cases := doubtful(found, RACES[options.quick] - (time.monotonic() - start))):
                break
            print(f"once more, as passes differ or were disturbed: {' '.join(cases)}", flush=True)
            tests = [record["test"] for record in found[0]["cases"] if record["id"] in cases]
            only = ["--later-pass", "--only", ",".join(cases)]
            if not run(Path(folder) / f"{len(found)}.json", *only, tests=tests):
                break
    return next((status for status in statuses if status), 0)


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
    """What pytest is called with besides the tests."""
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
