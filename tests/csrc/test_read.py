"""Plans, reads and mini-clips of really coded video, against decoding from the first frame to the last."""

from __future__ import annotations

import io
import itertools
from pathlib import Path

import av
import numpy as np
import pytest
from nvidia.dali import fn, pipeline_def, types
from stores import SHARD, CopiedClip, copy_store, decode_packets, encode

from vito_fast.data.store.index import DISPOSABLE, KEY, NO_PICTURE, OPEN, Reader, packet_flags, plan_packets

X264, X265, NONE = "x264-params", "x265-params", "log-level=none:pools=1:frame-threads=1:"
# File: encoder, options, B frames. Frames: 40 of 96 x 64.
CODED: dict[str, tuple[str, dict[str, str], int]] = {
    "b_frames.mp4": ("libx264", {"g": "12", "sc_threshold": "0"}, 3),
    "pyramid_g250.mkv": ("libx264", {"g": "250", X264: "b-pyramid=normal:ref=4:b-adapt=0"}, 3),
    "open_groups.mkv": ("libx264", {"g": "10", X264: "open-gop=1:b-adapt=0:scenecut=0"}, 3),
    "annexb.ts": ("libx264", {"g": "12", X264: "b-adapt=0"}, 2),
    "intra_refresh.mkv": ("libx264", {"g": "12", X264: "intra-refresh=1"}, 0),
    "hevc_open.mp4": ("libx265", {X265: NONE + "keyint=10:min-keyint=10:bframes=3:open-gop=1:scenecut=0"}, 3),
    "hevc_closed.mkv": ("libx265", {X265: NONE + "keyint=10:min-keyint=10:bframes=3:open-gop=0:scenecut=0"}, 3),
    "hevc_annexb.ts": ("libx265", {X265: NONE + "keyint=10:min-keyint=10:bframes=3:open-gop=1"}, 3),
    "vp8.webm": ("libvpx", {"g": "12", "b": "200k"}, 0),
    "vp9.webm": ("libvpx-vp9", {"g": "12", "b": "200k", "cpu-used": "8", "lag-in-frames": "16"}, 0),
    "av1.mkv": ("libsvtav1", {"g": "12", "preset": "12", "svtav1-params": "lp=1"}, 0),
    "motion.avi": ("mjpeg", {}, 0),
    "mpeg4.avi": ("mpeg4", {"g": "10"}, 2),
    "mpeg2.mpg": ("mpeg2video", {"g": "10"}, 2),
}
PAIRS = np.array(list(itertools.product(range(0, 40, 3), range(1, 40, 6))))


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> dict[str, CopiedClip]:
    root = tmp_path_factory.mktemp("coded")
    return {
        name: copy_store(encode(root / name, codec, 40, options, bframes), root / f"{name}.store")
        for name, (codec, options, bframes) in CODED.items()
    }


def decode_file(data: np.ndarray) -> list[np.ndarray]:
    with av.open(io.BytesIO(data.tobytes())) as container:
        container.streams.video[0].codec_context.thread_count = 1
        return [frame.to_ndarray() for frame in container.decode(video=0)]


@pytest.mark.parametrize("name", CODED)
def test_miniclips_hold_the_frames_asked_for(clips: dict[str, CopiedClip], name: str) -> None:
    clip = clips[name]
    assert len(clip.frames) == clip.index.num_frames == 40
    reader = Reader(clip.index, clip.directory, threads=2)
    packets = 0
    for pair, read in zip(PAIRS, reader.read(np.zeros(len(PAIRS), int), PAIRS, miniclip=True), strict=True):
        assert (read.code, read.error) == ("ok", "")
        pictures = decode_file(read.data)
        for frame, picture in zip(pair, read.pictures, strict=True):
            assert np.array_equal(pictures[picture], clip.frames[frame]), f"frame {frame} of {pair}"
        packets += len(read.packets)
    if name == "motion.avi":
        assert packets == sum(len(set(pair)) for pair in PAIRS.tolist())


@pytest.mark.parametrize("name", CODED)
def test_bare_packets_decode_to_the_frames_asked_for(clips: dict[str, CopiedClip], name: str) -> None:
    """As a software decoder takes them: run by run, a decoder that starts anew for each."""
    clip = clips[name]
    info = clip.index.clip(0)
    order = clip.index.packets(0).order
    pairs = PAIRS[::5]
    reader = Reader(clip.index, clip.directory, threads=2)
    for pair, read in zip(pairs, reader.read(np.zeros(len(pairs), int), pairs, single_stream=False), strict=True):
        payloads = [packet.tobytes() for packet in read.split()]
        pictures: dict[int, np.ndarray] = {}
        for first, last in read.runs:
            for row, picture in decode_packets(info.codec, info.extradata, payloads[first:last]).items():
                pictures[int(read.packets[first + row])] = picture
        for frame in pair:
            assert np.array_equal(pictures[int(order[frame])], clip.frames[frame]), f"frame {frame} of {pair}"


def test_dali_counts_the_pictures_of_a_miniclip_as_planned(clips: dict[str, CopiedClip]) -> None:
    """On the codecs that DALI decodes on a CPU."""
    names = ["vp8.webm", "vp9.webm", "motion.avi"]
    for name in names:
        clip = clips[name]
        with av.open(str(clip.directory).removesuffix(".store")) as container:
            expected = [frame.to_ndarray(format="rgb24").astype(int) for frame in container.decode(video=0)]
        pairs = np.sort(PAIRS[::7], axis=1)
        reads = Reader(clip.index, clip.directory).read(np.zeros(len(pairs), int), pairs, miniclip=True)

        @pipeline_def(batch_size=len(pairs), num_threads=1, device_id=None)
        def pipeline() -> object:
            encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
            frames = fn.external_source(name="frames", dtype=types.INT32, ndim=1)
            return fn.decoders.video(encoded, frames=frames, device="cpu")

        pipe = pipeline()
        pipe.build()
        pipe.feed_input("encoded", [read.data for read in reads])
        pipe.feed_input("frames", [read.pictures for read in reads])
        (out,) = pipe.run()
        for row, pair in enumerate(pairs):
            for view, frame in enumerate(pair):
                picture = np.asarray(out.at(row)[view]).astype(int)
                errors = [np.abs(picture - other).mean() for other in expected]
                assert int(np.argmin(errors)) == frame, f"{name}: frame {frame}"
                assert errors[frame] < 5  # the conversions to RGB differ a little


def test_plans_are_shorter_than_reading_from_the_key(clips: dict[str, CopiedClip]) -> None:
    """d/u of GOP 250: at most half the mean distance from the key, as B frames are left out."""
    plan = plan_packets(clips["pyramid_g250.mkv"].index, 0, [39])
    assert len(plan.packets) < 30
    assert plan.runs.tolist() == [[0, len(plan.packets)]]
    both = plan_packets(clips["b_frames.mp4"].index, 0, [1, 38])
    assert len(both.runs) == 2
    assert len(both.packets) <= 14


def test_flags_come_from_the_bits(clips: dict[str, CopiedClip]) -> None:
    def seen(name: str) -> set[int]:
        return set(clips[name].index.packets(0).flags.tolist())

    assert seen("b_frames.mp4") == {0, KEY, DISPOSABLE}
    assert seen("open_groups.mkv") == {0, KEY, KEY | OPEN, DISPOSABLE}
    assert seen("intra_refresh.mkv") <= {0, KEY, DISPOSABLE}
    assert np.sum(clips["intra_refresh.mkv"].index.packets(0).flags & KEY) == 1  # recovering takes many frames: no keys
    assert seen("hevc_open.mp4") == {0, KEY, KEY | OPEN, DISPOSABLE}
    assert seen("hevc_closed.mkv") == {0, KEY, DISPOSABLE}
    for name in ("vp8.webm", "vp9.webm", "av1.mkv"):
        assert seen(name) - {NO_PICTURE} == {0, KEY}
    assert packet_flags("mpeg4", b"", b"\0\0\1") is None


def test_key_flags_agree_with_the_container(clips: dict[str, CopiedClip]) -> None:
    for name in ("b_frames.mp4", "hevc_closed.mkv", "vp8.webm", "vp9.webm", "av1.mkv", "motion.avi"):
        source = str(clips[name].directory).removesuffix(".store")
        with av.open(source) as container:
            keys = [packet.is_keyframe for packet in container.demux(video=0) if packet.size]
        assert (clips[name].index.packets(0).flags & KEY).astype(bool).tolist() == keys


def test_one_bad_sample_leaves_the_others_alone(clips: dict[str, CopiedClip], tmp_path: Path) -> None:
    clip = clips["motion.avi"]
    packets = clip.index.packets(0)
    data = bytearray((clip.directory / SHARD).read_bytes())
    data[int(packets.offsets[5]) + 30] ^= 4
    (tmp_path / SHARD).write_bytes(data[: int(packets.offsets[30]) + 10])
    reads = Reader(clip.index, tmp_path, threads=3).read([0] * 4, [[1, 2], [5, 6], [7, 30], [8, 8]])
    assert [read.code for read in reads] == ["ok", "checksum", "truncated", "ok"]
    assert reads[1].error.startswith("clip 0: ")
    assert SHARD in reads[1].error
    assert reads[1].data.size == 0
    assert reads[3].data.tobytes() == data[int(packets.offsets[8]) :][: int(packets.sizes[8])]
    (missing,) = Reader(clip.index, tmp_path / "none").read([0], [[0, 1]])
    assert (missing.code, missing.data.size) == ("missing", 0)


def test_callers_mistakes_raise(clips: dict[str, CopiedClip]) -> None:
    clip = clips["motion.avi"]
    reader = Reader(clip.index, clip.directory)
    with pytest.raises(IndexError, match="clip 1 of an index of 1"):
        reader.read([1], [[0]])
    for frame in (-1, 40):
        with pytest.raises(IndexError, match=f"frame {frame}"):
            reader.read([0], [[frame]])
    with pytest.raises(ValueError, match=r"frames has shape \(2, 1\), must be \(1, views\)"):
        reader.read([0], [[0], [1]])
    with pytest.raises(ValueError, match="threads is 0"):
        Reader(clip.index, clip.directory, threads=0)


@pytest.mark.parametrize("name", ["motion.avi", "b_frames.mp4", "vp9.webm", "hevc_open.mp4"])
def test_fuzzed_clips_are_never_passed_off_as_right(clips: dict[str, CopiedClip], tmp_path: Path, name: str) -> None:
    """1,000 fuzzed shards over the four: what is read is what was packed, or an error."""
    clip = clips[name]
    data, rng = (clip.directory / SHARD).read_bytes(), np.random.default_rng(0)
    pairs = PAIRS[::9]
    good = Reader(clip.index, clip.directory).read(np.zeros(len(pairs), int), pairs, miniclip=True)
    codes: list[str] = []
    for number in range(250):
        bad = bytearray(data)
        for _ in range(rng.integers(1, 30)):
            bad[rng.integers(len(bad))] = rng.integers(256)
        if number % 5 == 0:
            del bad[rng.integers(len(bad)) :]
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / SHARD).write_bytes(bad)
        reads = Reader(clip.index, tmp_path / str(number), threads=1).read(
            np.zeros(len(pairs), int), pairs, miniclip=True
        )
        for read, expected in zip(reads, good, strict=True):
            codes.append(read.code)
            assert read.code in ("ok", "checksum", "truncated")
            assert np.array_equal(read.data, expected.data) if read.code == "ok" else read.data.size == 0
    assert set(codes) == {"ok", "checksum", "truncated"}
