"""A small real store, and one thread: results then do not depend on the machine's cores."""

import av
import numpy as np
import pytest
import torch

from vito_fast.data.pack import pack


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
