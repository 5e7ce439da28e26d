"""One thread: the tests' networks are too small to share out, and results then do not depend on the machine's cores."""

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)
