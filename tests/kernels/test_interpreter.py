"""Without a GPU, each file of Triton tests runs in Triton's interpreter, which must be chosen before Python starts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
FILES = sorted(path.name for path in HERE.glob("test_*_kernel.py"))


def test_there_are_kernel_tests():
    assert len(FILES) >= 2


if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":

    @pytest.mark.parametrize("name", FILES)
    def test_kernels_in_the_interpreter(name):
        command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", str(HERE / name)]
        run = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
        assert " passed" in run.stdout
