"""``python -m bench``: run the suites, write ``bench/results/<machine>.json`` and ``bench/report.html``."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    """Exit status: pytest's; non-zero when a result of ours was wrong or a case failed."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="the quick set, under three minutes on two cores")
    parser.add_argument("--cold", action="store_true", help="CUDA: empty the L2 cache before every sample")
    parser.add_argument("--rounds", type=int, help="exactly so many rounds a case, instead of a time budget")
    parser.add_argument(
        "--results", type=Path, help="default: bench/results/MACHINE.json, with -quick for the quick set"
    )
    parser.add_argument("--report", type=Path, default=ROOT / "bench/report.html")
    parser.add_argument("-k", dest="keyword", help="only the cases that match, as pytest's -k")
    parser.add_argument("--only", metavar="ID,ID", help="only the cases of these ids")
    parser.add_argument("--no-static", dest="static", action="store_false", help="leave the counted figures out")
    options = parser.parse_args()
    os.chdir(ROOT)

    import pytest

    from bench import report, static
    from bench.machine import machine

    name = machine(options.device)["name"] + ("-quick" if options.quick else "")
    results = options.results or ROOT / f"bench/results/{name}.json"
    arguments = ["bench", "-q", "-s", "-o", "python_files=bench_*.py", "-o", "addopts=", "-p", "no:cacheprovider"]
    arguments += ["--benchmark-columns=median,iqr,rounds", "--benchmark-disable-gc", "--benchmark-quiet"]
    arguments += ["--device", options.device, "--results", str(results)]
    arguments += (
        ["--quick"] * options.quick + ["--cold"] * options.cold + (["-k", options.keyword] if options.keyword else [])
    )
    arguments += ["--only", options.only] if options.only else []
    arguments += ["--rounds", str(options.rounds)] if options.rounds else []
    status = int(pytest.main(arguments))
    if not results.exists():
        return status or 1
    if options.static:
        static.add(results)
    report.write(results, options.report)
    print(f"results: {os.path.relpath(results)}\nreport:  {os.path.relpath(options.report)}")
    return status


if __name__ == "__main__":
    sys.exit(main())
