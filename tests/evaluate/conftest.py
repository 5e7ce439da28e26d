"""Small tensors everywhere: one thread is faster than two, and does not fight other processes for cores."""

import sys
from pathlib import Path

import av
import pytest
import torch

sys.path.append(str(Path(__file__).parent))
import tiny


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def write_video():
    """``write_video(path, pictures (T,H,W,3) uint8, rate)`` encodes MPEG-4."""

    def write(path, pictures, rate=25):
        with av.open(str(path), "w") as container:
            stream = container.add_stream("mpeg4", rate=rate)
            stream.width, stream.height, stream.pix_fmt = pictures.shape[2], pictures.shape[1], "yuv420p"
            stream.bit_rate = 2_000_000
            for picture in pictures:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode(None))

    return write


@pytest.fixture(scope="session")
def copies(tmp_path_factory, write_video):
    """Folders of tiny copies by the name of their task."""
    root = tmp_path_factory.mktemp("copies")
    tiny.ucf101(root / "ucf101", write_video)
    for name in ("pascal", "ade20k", "coco"):
        getattr(tiny, name)(root / name)
    return {name: root / name for name in ("ucf101", "pascal", "ade20k", "coco")} | {"lvis": root / "coco"}
