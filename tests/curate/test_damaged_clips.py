"""Curation sees the clips of damaged files that packing takes, and its list of frames packs them."""

import av
import numpy as np
import pytest
from av.video.frame import VideoFrame

from vito_fast.curate import analyse
from vito_fast.curate.options import AnalyseOptions
from vito_fast.data.pack.clips import Span
from vito_fast.data.pack.pack import pack
from vito_fast.data.store.store import Store

QUIET = {"progress": False, "processes": 1}


def video(path, seed, height, width):
    rng = np.random.default_rng(seed)
    scene = np.kron(rng.integers(0, 255, (16, 32, 3), np.uint8), np.ones((8, 8, 1), np.uint8))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"preset": "ultrafast"})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.codec_context.gop_size = 10
        for n in range(60):
            picture = np.ascontiguousarray(scene[:height, n : n + width])
            container.mux(stream.encode(VideoFrame.from_ndarray(picture)))
        container.mux(stream.encode(None))
    return path.read_bytes()


@pytest.fixture(params=["lost bytes", "two sizes"])
def damaged(request, tmp_path):
    (tmp_path / "videos").mkdir()
    data = video(tmp_path / "a.ts", 0, 64, 96)
    if request.param == "two sizes":
        data += video(tmp_path / "b.ts", 1, 96, 64)
    else:
        middle = len(data) // 2 // 188 * 188
        data = data[:middle] + data[middle + 188 * 6 :]
    (tmp_path / "videos" / "v.ts").write_bytes(data)
    return tmp_path


def test_the_clips_are_those_of_packing(damaged):
    row = analyse.run({"root": str(damaged / "videos"), "path": "v.ts", "id": "v"}, AnalyseOptions())
    clips = row["clips"]
    assert len(clips) >= 2
    own = [Span(clip["first_frame"], clip["end_frame"], clip["start"]) for clip in clips]
    report = pack(damaged / "videos", damaged / "s", clips={"v.ts": own}, **QUIET)
    assert (report.packed, report.rejected) == (len(clips), {})
    pack(damaged / "videos", damaged / "plain", min_length=0, keep_still=True, **QUIET)
    for name in ("s", "plain"):
        index = Store(damaged / name).index
        assert [index.clip(n).num_frames for n in range(len(index))] == [
            clip["end_frame"] - clip["first_frame"] for clip in clips
        ]
