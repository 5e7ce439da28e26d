"""Pictures are packed as players show them: upright, square pixels, right colors, all pixels."""

import itertools
import shutil
from fractions import Fraction

import av
import numpy as np
import pytest
from test_exact import sequential
from test_loader import SMALL
from videos import display, pictures, write

from vito_fast.data.loader.loader import ClipLoader
from vito_fast.data.loader.resize_reference import view
from vito_fast.data.loader.sampler import Sampler
from vito_fast.data.pack.pack import pack
from vito_fast.data.store.picture import rgb
from vito_fast.data.store.store import Store, frames
from vito_fast.errors import UserError
from vito_fast.train.attention_maps import resized, video_frames

QUIET = {"progress": False, "processes": 1, "min_length": 0}
MATRICES = {
    (1, 0, 0, 1): lambda x: x,
    (-1, 0, 0, 1): lambda x: x[:, ::-1],
    (1, 0, 0, -1): lambda x: x[::-1],
    (-1, 0, 0, -1): lambda x: x[::-1, ::-1],
    (0, 1, -1, 0): lambda x: np.rot90(x, -1),
    (0, -1, 1, 0): lambda x: np.rot90(x),
    (0, 1, 1, 0): lambda x: x.swapaxes(0, 1),
    (0, -1, -1, 0): lambda x: x[::-1, ::-1].swapaxes(0, 1),
    (0, 0, 0, 0): lambda x: x,
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A video without a display matrix, and its frames."""
    path = write(tmp_path_factory.mktemp("plain") / "a.mp4", pictures(12, 48, 64))
    return path, sequential(path)[1]


@pytest.mark.parametrize("matrix", MATRICES)
def test_every_display_matrix(matrix, plain, tmp_path):
    source, truth = plain
    path = display(source, tmp_path / "b.mp4", matrix)
    shown = [MATRICES[matrix](picture) for picture in truth]
    report = pack(path, tmp_path / "copy", format="copy", **QUIET)
    np.testing.assert_array_equal(frames(tmp_path / "copy", 0, range(12)), shown)
    mirrored = matrix[0] * matrix[3] < matrix[1] * matrix[2]
    assert report.kinds.get("mirrored", 0) == mirrored
    pack(path, tmp_path / "jpeg", quality=100, **QUIET)
    pack(path, tmp_path / "h264", format="h264", crf=5, **QUIET)
    for format in ("jpeg", "h264"):
        packed = frames(tmp_path / format, 0, range(12)).astype(int)
        assert packed.shape == np.shape(shown)
        assert np.abs(packed - shown).mean() < 3.5
    store = Store(tmp_path / "copy")
    with ClipLoader(tmp_path / "copy", 1, sampler=SMALL, augment=False, threads=1) as loader:
        for batch in itertools.islice(loader, 2):
            samples = Sampler(store.index, SMALL, 0).sample(batch["sample"].numpy())
            info = store.index.clip(0)
            for v in range(SMALL.views):
                picture = truth[samples.frame[0, v]]
                crop, flip = tuple(samples.crop[0, v]), bool(samples.flip[0, v])
                expected = view(picture, crop, flip, SMALL.size, info.rotation, info.mirror)
                assert np.abs(batch["views"][v][0].numpy().astype(int) - expected).max() <= 1
    sides = tuple(max(32, round(side * 64 / min(shown[0].shape[:2]) / 32) * 32) for side in shown[0].shape[:2])
    np.testing.assert_array_equal(video_frames(path, 12, 64), resized(shown, sides), "attention")


def test_pixels_become_square(tmp_path):
    path = write(tmp_path / "a.mkv", pictures(12, 48, 64), tags={"sample_aspect_ratio": Fraction(64, 45)})
    report = pack(path, tmp_path / "jpeg", **QUIET)
    clip = Store(tmp_path / "jpeg").index.clip(0)
    assert (clip.height, clip.width) == (48, 92)
    assert report.kinds == {"anamorphic": 1}
    assert pack(path, tmp_path / "copy", format="copy", **QUIET).kinds == {"anamorphic": 1}


@pytest.mark.parametrize(("size", "matrix"), [((720, 1280), 1), ((96, 1280), 1), ((576, 720), 6)])
def test_a_matrix_that_is_not_named(size, matrix, tmp_path):
    """HD is BT.709 and smaller video BT.601, in every format."""
    color = np.full((*size, 3), (200, 60, 40), np.uint8)
    frame = [color] * 3
    tagged = write(tmp_path / "a.mkv", frame, "ffv1", pixels="yuv444p", tags={"colorspace": matrix})
    untagged = write(tmp_path / "b.mkv", frame, "ffv1", pixels="yuv444p", tags={"colorspace": 2})
    for format in ("jpeg", "h264", "copy"):
        shown = []
        for path in (tagged, untagged):
            report = pack(path, tmp_path / f"{path.stem}-{format}", format=format, keep_still=True, **QUIET)
            shown.append(frames(tmp_path / f"{path.stem}-{format}", 0, [0])[0].astype(int))
        assert np.abs(shown[0] - shown[1]).max() <= 1
        assert np.abs(shown[0].mean((0, 1)) - sequential(tagged)[1][0].mean((0, 1))).max() < 4
        assert report.kinds == ({"HD without color tags": 1} if matrix == 1 else {})


def test_odd_sizes_and_palettes(tmp_path):
    for name, codec, pixels in (("a.webm", "libvpx-vp9", "yuv420p"), ("b.avi", "mjpeg", "yuvj420p")):
        path = write(tmp_path / name, pictures(6, 47, 63), codec, pixels=pixels)
        assert pack(path, tmp_path / f"{name}-copy", format="copy", **QUIET).kinds == {"odd size": 1}
        np.testing.assert_array_equal(frames(tmp_path / f"{name}-copy", 0, range(6)), sequential(path)[1])
    path = _palette(tmp_path / "c.avi")
    assert pack(path, tmp_path / "palette", quality=100, **QUIET).kinds == {"palette": 1}
    assert np.abs(frames(tmp_path / "palette", 0, [3])[0].astype(int) - sequential(path)[1][3]).mean() < 25


def _palette(path):
    """Raw bytes that a palette of grays turns into pictures."""
    palette = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 4, 1)
    with av.open(str(path), "w") as output:
        stream = output.add_stream("rawvideo", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "pal8"
        for picture in pictures(6):
            gray = np.ascontiguousarray(picture[..., 0])
            output.mux(stream.encode(av.VideoFrame.from_ndarray((gray, palette), format="pal8")))
        output.mux(stream.encode(None))
    return path


def _hdr(path, transfer, value):
    """A gray video of one 10-bit luma value, in PQ (16) or HLG (18)."""
    plain = [np.full((48, 64, 3), value >> 2, np.uint8)] * 3
    tags = {"color_trc": transfer, "color_primaries": 9, "colorspace": 9}
    return write(path, plain, "ffv1", pixels="yuv420p10le", tags=tags)


@pytest.mark.parametrize(("transfer", "name"), [(16, "PQ"), (18, "HLG")])
def test_high_dynamic_range(transfer, name, tmp_path):
    """White is nearly white, brighter is brighter still, and black is black; or the file is rejected."""
    with av.open(str(_hdr(tmp_path / "a.mkv", transfer, 512))) as container:
        frame = next(container.decode(video=0))
    assert frame.color_trc == transfer
    white = {16: 0.58, 18: 0.75}[transfer]  # signal of 203 nits, BT.2408
    levels = []
    for signal in (0.0, 0.3, white, 0.95):
        for place, plane in enumerate(frame.planes):
            value = round(64 + 876 * signal) if place == 0 else 512
            plane.update(np.full(plane.buffer_size // 2, value, np.uint16).tobytes())
        picture = rgb(frame)
        assert np.ptp(picture) <= 1, "gray stays gray"
        levels.append(int(picture[0, 0, 0]))
    assert levels[0] <= 3 < levels[1] < 130
    assert 235 <= levels[2] < levels[3] <= 255
    assert pack(tmp_path / "a.mkv", tmp_path / "s", keep_still=True, **QUIET).kinds == {"HDR": 1}
    for format in ("jpeg", "copy"):
        with pytest.raises(UserError, match=f"HDR: its transfer function is {name}"):
            pack(tmp_path / "a.mkv", tmp_path / "r", format=format, hdr="reject", keep_still=True, **QUIET)


def test_interlaced_video(tmp_path):
    """Fields of two moments: flagged, and on request joined by their own lines."""
    x = np.arange(128) + 5 * np.arange(24)[:, None, None, None]
    moving = list(np.uint8(np.broadcast_to(128 + 90 * np.sin(x / 6), (24, 96, 3, 128)).swapaxes(2, 3)))
    woven = [first.copy() for first in moving[::2]]
    for picture, second in zip(woven, moving[1::2], strict=True):
        picture[1::2] = second[1::2]
    options = {"x264-params": "tff=1", "crf": "4", "preset": "ultrafast"}
    path = write(tmp_path / "a.mkv", woven, options=options)
    assert pack(path, tmp_path / "as-is", quality=100, **QUIET).kinds == {"interlaced": 1}
    pack(path, tmp_path / "mended", quality=100, deinterlace=True, **QUIET)
    store = Store(tmp_path / "mended")
    assert store.index.clip(0).num_frames == len(woven)
    moments = np.stack([moving[::2], moving[1::2]]).astype(int)
    as_is, mended = (
        np.abs(frames(tmp_path / name, 0, range(12)) - moments).mean((1, 2, 3, 4)).min() for name in ("as-is", "mended")
    )
    assert mended < 3 < 15 < as_is, "each frame is of one moment"
    with pytest.raises(ValueError, match="deinterlace is True, must be False in a copy store"):
        pack(path, tmp_path / "c", format="copy", deinterlace=True)


def test_clips_in_which_nothing_moves(tmp_path):
    """One frame in ten seconds, or one picture all the time: left out, but not if a small thing moves."""
    still = [pictures(1, 144, 192, seed=3)[0]] * 30
    moving = [picture.copy() for picture in still]
    for number, picture in enumerate(moving):
        picture[20:26, number : number + 6] = 255
    for name, shown, rate in (("a", still, 25), ("b", moving, 25), ("c", pictures(4), Fraction(1, 10))):
        write(tmp_path / f"{name}.mp4", shown, rate=rate)
    for format in ("jpeg", "copy"):
        report = pack(tmp_path, tmp_path / format, format=format, progress=False, processes=1)
        assert report.packed == 1
        assert report.still_clips == 5
        assert report.rejected == {"no clip left": 2}
        assert Store(tmp_path / format).index.clip(0).source == "b.mp4"
        shutil.rmtree(tmp_path / format)
        assert pack(tmp_path, tmp_path / format, format=format, keep_still=True, progress=False).packed == 3
        shutil.rmtree(tmp_path / format)
