import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from videos import pictures, write

from vito_fast.data.pack.pack import pack


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Six H.264 videos of 40 frames; one of them 100 frames long, in a folder of its own."""
    root = tmp_path_factory.mktemp("videos")
    for number in range(5):
        write(root / f"v{number}.mp4", pictures(40, seed=number), b_frames=2)
    (root / "sub").mkdir()
    write(root / "sub" / "long.mkv", pictures(100, seed=9), gop=30)
    return root


@pytest.fixture(scope="session")
def stores(folder, tmp_path_factory):
    """The folder packed in each format."""
    root = tmp_path_factory.mktemp("stores")
    for format in ("jpeg", "h264", "copy"):
        pack(folder, root / format, format=format, short_side=32, clip_length=1.6, progress=False, processes=2)
    return root
