"""Builds the C++ unit tests and fuzz replays with AddressSanitizer and UBSan, and runs them by ctest."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SUITES = (
    "random", "index", "sampler", "bitstream", "planner", "reader", "miniclip", "resize", "fuzz_index", "fuzz_miniclip",
)  # fmt: skip


def run(*command: str) -> str:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    tool = shutil.which(command[0], path=path)
    assert tool, f"{command[0]} is needed, as it is to install the project"
    done = subprocess.run(
        [tool, *command[1:]], capture_output=True, text=True, env={**os.environ, "PATH": path}, check=False
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def test_core_under_sanitizers(tmp_path: Path) -> None:
    options = ["-DVITO_PYTHON=OFF", "-DVITO_TESTS=ON", "-DVITO_SANITIZE=ON", "-DCMAKE_BUILD_TYPE=Debug"]
    run("cmake", "-S", str(ROOT / "csrc"), "-B", str(tmp_path), "-G", "Ninja", *options)
    build = run("cmake", "--build", str(tmp_path), "--parallel", "2")
    assert "warning:" not in build
    report = run("ctest", "--test-dir", str(tmp_path), "--output-on-failure", "--timeout", "300")
    for suite in SUITES:
        assert f": {suite} ." in report, f"suite {suite} did not run"
    assert "100% tests passed" in report
