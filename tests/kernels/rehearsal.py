"""``make rehearse ARCH=90``: the kernel tests on a GPU that is not there.

Whatever they launch is compiled for it by the launcher that a GPU uses, and must fit it. Nothing runs, so that results
mean nothing: Python's ``-O`` leaves assertions out.
"""

import importlib
import os
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import pytest
import torch

from vito_kernels import inspect

LAUNCHING = (
    "attention_pool",
    "batch_norm.op",
    "contrastive.normalize",
    "contrastive.gpu",
    "contrastive.sigmoid_loss",
    "contrastive.softplus_loss",
    "lars",
    "photometric.op",
)


@contextmanager
def no_gpu(arch):
    """Triton believes in a GPU of this architecture, and ops take every tensor for one of its own. Yields the stand-in
    driver.
    """
    with inspect.stand_in(arch) as fake:
        fake.utils.properties["max_shared_mem"] = inspect.TARGETS[arch].shared_limit
        with ExitStack() as stack:
            for name in LAUNCHING:
                module = importlib.import_module(f"vito_kernels.{name}")
                stack.enter_context(patch.object(module, "use_triton", lambda x: x.dtype != torch.float64))
            yield fake


if arch := int(os.environ.get("ARCH", "0")):  # as a plugin

    @pytest.fixture(autouse=True)
    def rehearsed():
        with no_gpu(arch), patch.object(torch.testing, "assert_close"):
            yield

    @pytest.hookimpl(tryfirst=True)
    def pytest_ignore_collect():
        return False  # though conftest.py leaves them to a GPU or to the interpreter
