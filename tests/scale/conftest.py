"""A small real store, and one thread: results then do not depend on the machine's cores."""

import av
import numpy as np
import pytest
import torch

from vito_fast.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    SamplerConfig,
    ScheduleConfig,
    TrainConfig,
)
from vito_fast.data.pack.pack import pack


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def write_video(path, seed):
    """A second of a coloured checkerboard that slides, unlike that of any other seed."""
    tiles = np.random.default_rng(seed).integers(0, 255, (8, 14, 3), dtype=np.uint8)
    scene = tiles.repeat(8, 0).repeat(8, 1)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 80, 64, "yuv420p"
        for shift in range(26):
            picture = np.ascontiguousarray(scene[:, shift : shift + 80])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    """Nine clips."""
    folder, packed = tmp_path_factory.mktemp("videos"), tmp_path_factory.mktemp("packed") / "store"
    for seed in range(9):
        write_video(folder / f"{seed}.mp4", seed)
    assert pack(folder, packed, progress=False, processes=1).clips == 9
    return packed


@pytest.fixture(scope="session")
def small_run(store):
    """The configuration of a run in a folder, of 120 steps that saves each of them: nine clips in batches of four, so
    two steps an epoch.
    """

    def configured(folder):
        return Config(
            name="whole",
            data=DataConfig(store=str(store), threads=1),
            sampler=SamplerConfig(size=32, views=2),
            model=ModelConfig(backbone="timm:test_resnet", projector_hidden=16, projector_out=8, attention_hidden=8),
            optimizer=OptimizerConfig(base_lr=16.0),
            schedule=ScheduleConfig(epochs=60, epoch_clips=0, warmup_epochs=1, base_ema=0.9),
            train=TrainConfig(
                batch_size=4, device="cpu", log_every=5, checkpoint_every=1, evaluate_clips=4, runs=str(folder / "runs")
            ),
        )

    return configured


@pytest.fixture
def config(small_run, tmp_path):
    return small_run(tmp_path)
