"""Small tensors everywhere: one thread is faster than two, and does not fight other processes for cores."""

import av
import pytest
import torch


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
