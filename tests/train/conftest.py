"""What the trainer's tests share."""

import resource
from contextlib import contextmanager

import av
import numpy as np
import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """The tests' networks are too small to share out, and results then do not depend on the machine's cores."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def make_clip():
    """``make_clip(path, seed)`` writes a second of moving coloured blocks, unlike those of any other seed."""

    def _make(path, seed):
        rng = np.random.default_rng(seed)
        scene = np.kron(rng.integers(0, 255, (8, 16, 3), dtype=np.uint8), np.ones((8, 8, 1), np.uint8))
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=25, options={"preset": "ultrafast"})
            stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
            for i in range(30):
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(scene[:, i : i + 96]), format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        return path

    return _make


@pytest.fixture
def full_disk():
    """Inside ``with full_disk(size):`` no file grows beyond ``size`` bytes, as on a disk that has no more."""

    @contextmanager
    def _full(size):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return _full
