"""What the trainer's tests share."""

import resource
from contextlib import contextmanager

import av
import numpy as np
import pytest
import torch

from vito_fast.config import Config, DataConfig, ModelConfig, SamplerConfig, ScheduleConfig, TrainConfig
from vito_fast.data.pack.pack import pack


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


@pytest.fixture(scope="session")
def small_store(tmp_path_factory, make_clip):
    folder = tmp_path_factory.mktemp("videos")
    for seed in range(6):
        make_clip(folder / f"{seed}.mp4", seed)
    store = tmp_path_factory.mktemp("packed") / "store"
    pack(folder, store, progress=False, processes=1)
    return store


@pytest.fixture
def config(small_store, tmp_path):
    return Config(
        name="r",
        data=DataConfig(store=str(small_store), threads=1),
        sampler=SamplerConfig(size=32, views=2),
        model=ModelConfig(backbone="timm:test_vit3", projector_hidden=16, projector_out=8, attention_hidden=8),
        schedule=ScheduleConfig(epochs=4, epoch_clips=3, warmup_epochs=1),
        train=TrainConfig(batch_size=3, log_every=2, checkpoint_every=3, evaluate_every=2, runs=str(tmp_path / "runs")),
    )
