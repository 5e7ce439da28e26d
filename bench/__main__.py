"""``python -m bench``: run the suites, write ``bench/results/<machine>.json`` and ``bench/report.html``.

The results file is replaced when the run is over: one that is stopped leaves its cases beside it, in
``<machine>.partial.json``, and one without cases writes nothing. A selection (``--suite``, ``-k``, ``--only``) goes to
``build/bench/<machine>.json``, as the machine's file holds all cases.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    """Exit status: pytest's; non-zero when a result of ours was wrong, a case failed, or no case ran."""
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="the quick set, under three minutes on two cores")
    parser.add_argument("--counted", action="store_true", help="no clock: what is counted, and whether it is right")
    parser.add_argument("--cold", action="store_true", help="CUDA: empty the L2 cache before every sample")
    parser.add_argument("--rounds", type=int, help="exactly so many rounds a case, instead of a time budget")
    parser.add_argument(
        "--results", type=Path, help="default: bench/results/MACHINE.json (-quick), of a selection in build/bench"
    )
    parser.add_argument("--report", type=Path, default=ROOT / "bench/report.html")
    parser.add_argument("--suite", action="append", metavar="NAME", help="only bench/bench_NAME.py; may be repeated")
    parser.add_argument("-k", dest="keyword", help="only the cases that match, as pytest's -k")
    parser.add_argument("--only", metavar="ID,ID", help="only the cases of these ids")
    parser.add_argument("--no-static", dest="static", action="store_false", help="leave the counted figures out")
    options = parser.parse_args()
    os.chdir(ROOT)
    if options.counted:  # scratch of convolutions depends on the instructions that oneDNN finds: it shall find the same
        os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX2"

    import pytest

    from bench import report, static
    from bench.harness import partial
    from bench.machine import machine

    kind = "-counted" if options.counted else "-quick" if options.quick else ""
    name = machine(options.device)["name"] + kind
    selected = options.suite or options.keyword or options.only
    results = options.results or ROOT / ("build/bench" if selected else "bench/results") / f"{name}.json"
    if selected and not options.results:
        print(f"a selection of the cases: results go to {os.path.relpath(results)}")
    running = partial(results)
    running.unlink(missing_ok=True)
    status = int(pytest.main(_arguments(options, running)))
    if not running.exists():
        print(f"no case ran, or none gave a right result: {os.path.relpath(results)} is not written", file=sys.stderr)
        return status or 1
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        print(f"stopped; results so far: {os.path.relpath(running)}", file=sys.stderr)
        return status
    if options.static:
        static.add(running, options.quick)
    running.replace(results)
    print(f"results: {os.path.relpath(results)}")
    if not options.counted:
        report.write(results, options.report)
        print(f"report:  {os.path.relpath(options.report)}")
    return status


def _arguments(options: argparse.Namespace, results: Path) -> list[str]:
    """What pytest is called with."""
    found = [f"bench/bench_{suite}.py" for suite in options.suite or []] or ["bench"]
    found += [
        "-q",
        "-s",
        "-o",
        "python_files=bench_*.py",
        "-o",
        "addopts=",
        "-p",
        "no:cacheprovider",
        "--continue-on-collection-errors",
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
