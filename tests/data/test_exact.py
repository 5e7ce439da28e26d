"""The frame delivered is the frame that decoding the original from its beginning gives."""

import os
from fractions import Fraction

import av
import numpy as np
import pytest
from videos import pictures, remux, rotate, skip_start, without_rate, without_usability_information, write

from vito_fast.data.pack.encode import CLOCK, TICKS, _constant_rate
from vito_fast.data.pack.pack import pack
from vito_fast.data.store.media import Source, presentation_times
from vito_fast.data.store.picture import rgb
from vito_fast.data.store.store import Store, frames
from vito_fast.train.attention_maps import video_frames


def sequential(path):
    """(seconds from the first frame, pictures) by decoding everything in order; PyAV left alone says the same."""
    source = Source(path)
    shown = [(token, rgb(frame)) for token, frame in source.frames()]
    with av.open(str(path)) as container:
        plain = [rgb(frame) for frame in container.decode(video=0)]
    np.testing.assert_array_equal([picture for _, picture in shown], plain)
    ticks = presentation_times([source.pts[token] for token, _ in shown])
    return (ticks - ticks[0]) * float(source.time_base), [picture for _, picture in shown]


def check(path, tmp_path, expected=None, **options):
    """Every frame of every clip of a copy store equals its frame in sequential decoding, whatever is asked with it."""
    times, truth = sequential(path) if expected is None else expected
    pack(path, tmp_path / "store", format="copy", min_length=0, keep_still=True, progress=False, processes=1, **options)
    store = Store(tmp_path / "store")
    place = 0
    rng = np.random.default_rng(0)
    start = store.index.times(0)[0]
    for clip in range(len(store)):
        seconds = store.index.times(clip)
        count = len(seconds)
        np.testing.assert_allclose(seconds - start, times[place : place + count], atol=1e-9)
        for asked in (np.arange(count), rng.integers(0, count, 4), np.array([count - 1, 0])):
            for number, got in zip(asked, frames(store, clip, asked), strict=True):
                np.testing.assert_array_equal(got, truth[place + number], err_msg=f"clip {clip} frame {number}")
        place += count
    assert place == len(truth)
    return store


CODECS = {
    "h264": ("libx264", "mp4", 0, {}),
    "h264-b": ("libx264", "mp4", 3, {"preset": "veryfast"}),
    "h264-pyramid": ("libx264", "mkv", 5, {"preset": "medium", "x264-params": "b-pyramid=normal:b-adapt=0"}),
    "h264-open": ("libx264", "mp4", 2, {"preset": "veryfast", "x264-params": "open-gop=1:keyint=10"}),
    "h264-ts": ("libx264", "ts", 2, {"preset": "veryfast"}),
    "h264-intra-refresh": ("libx264", "mp4", 0, {"x264-params": "intra-refresh=1:keyint=12"}),
    "hevc": ("libx265", "mp4", 3, {}),
    "hevc-open": ("libx265", "mkv", 3, {"x265-params": "log-level=none:pools=1:open-gop=1:keyint=10:min-keyint=10"}),
    "vp8": ("libvpx", "webm", 0, {"auto-alt-ref": "1", "lag-in-frames": "8"}),
    "vp9": ("libvpx-vp9", "webm", 0, {"auto-alt-ref": "1", "lag-in-frames": "8"}),
    "av1": ("libsvtav1", "mkv", 0, {}),
    "mpeg4": ("mpeg4", "mp4", 2, {}),
    "mpeg4-avi": ("mpeg4", "avi", 0, {}),
    "mpeg2": ("mpeg2video", "mpg", 2, {}),
    "mjpeg": ("mjpeg", "mov", 0, {}),
    "png": ("png", "mov", 0, {}),
    "ffv1": ("ffv1", "mkv", 0, {}),
    "wmv2": ("wmv2", "asf", 0, {}),
}


@pytest.mark.parametrize("name", CODECS)
def test_every_codec(name, tmp_path):
    codec, suffix, b_frames, options = CODECS[name]
    side = (64, 96) if codec == "libsvtav1" else (48, 64)
    path = write(tmp_path / f"a.{suffix}", pictures(36, *side), codec, b_frames=b_frames, options=options)
    store = check(path, tmp_path)
    assert store.index.num_frames == 36


@pytest.fixture
def av1(tmp_path):
    return write(tmp_path / "a.mkv", pictures(4, 64, 96), "libsvtav1")


def test_no_encoder_leaves_the_suite_a_real_time_process(av1):
    assert os.sched_getscheduler(0) not in (os.SCHED_FIFO, os.SCHED_RR)


VOP = b"\x00\x00\x01\xb6"  # begins a picture of MPEG-4


def test_frames_packed_two_to_a_packet(tmp_path):
    """As DivX wrote them into AVI: a B-frame rides with the frame it refers to, and an empty packet stands for it."""

    def join(packets):
        joined, place = [], 0
        while place < len(packets):
            pair = place + 1 < len(packets) and _vop(packets[place + 1]) == "B"
            payload = b"".join(bytes(packet) for packet in packets[place : place + 1 + pair])
            if not place:
                payload = payload.replace(VOP, b"\x00\x00\x01\xb2DivX503b1393p" + VOP, 1)
            for data in [payload, VOP + b"\x5f\x80\x00"][: 1 + pair]:
                packet = av.Packet(len(data))
                packet.update(data)
                packet.time_base, packet.pts = packets[0].time_base, None
                packet.dts, packet.is_keyframe = len(joined), packets[place].is_keyframe and data is payload
                joined.append(packet)
            place += 1 + pair
        return joined

    path = write(tmp_path / "a.avi", pictures(36), "mpeg4", b_frames=1)
    shown = [rgb(frame) for _, frame in Source(path).frames()]
    packed = remux(path, tmp_path / "b.avi", join)
    assert len({bytes(packet) for packet in _packets(packed)}) < 24, "one kind of empty packet"
    store = check(packed, tmp_path)
    assert store.index.num_frames == 36
    np.testing.assert_array_equal(frames(store, 0, range(36)), shown)


def _vop(packet):
    data = bytes(packet)
    return "IPBS"[data[data.rindex(VOP) + 4] >> 6]


def _packets(path):
    with av.open(str(path)) as container:
        return [packet for packet in container.demux(video=0) if packet.size]


def test_clips_begin_inside_a_group_of_pictures(tmp_path):
    path = write(tmp_path / "a.mp4", pictures(60), b_frames=2, gop=24, options={"preset": "veryfast"})
    store = check(path, tmp_path, clip_length=0.8)
    assert len(store) == 3


def test_shot_changes(tmp_path):
    path = write(tmp_path / "a.mp4", pictures(20, seed=1) + pictures(20, seed=2) + pictures(15, seed=3), gop=250)
    store = check(path, tmp_path)
    assert [store.index.clip(i).num_frames for i in range(len(store))] == [20, 20, 15]


@pytest.mark.parametrize("format", ["jpeg", "copy"])
def test_a_gap_in_time_ends_the_clip(format, tmp_path):
    times = [40 * n + (60_000 if n >= 25 else 0) for n in range(40)]
    path = write(tmp_path / "a.mkv", pictures(40), times=times, b_frames=2, options={"preset": "veryfast"})
    pack(path, tmp_path / "s", format=format, min_length=0, progress=False, processes=1)
    store = Store(tmp_path / "s")
    assert [store.index.clip(clip).num_frames for clip in range(len(store))] == [25, 15]
    assert [store.index.clip(c).end - store.index.clip(c).start for c in range(2)] == pytest.approx(
        [1.0, 0.6], abs=0.05
    )


def test_variable_frame_rate(tmp_path):
    times = np.cumsum(np.random.default_rng(1).integers(10, 190, 30)).tolist()
    path = write(tmp_path / "a.mkv", pictures(30), times=times, b_frames=2, options={"preset": "veryfast"})
    store = check(path, tmp_path)
    np.testing.assert_allclose(np.diff(store.index.times(0)), np.diff(times) / 1000, atol=0.0011)
    pack(path, tmp_path / "jpeg", min_length=0, progress=False, processes=1)
    np.testing.assert_allclose(np.diff(Store(tmp_path / "jpeg").index.times(0)), np.diff(times) / 1000, atol=0.0011)


@pytest.mark.parametrize("format", ["jpeg", "h264", "copy"])
def test_a_file_that_names_no_rate(format, tmp_path):
    times = np.cumsum(np.random.default_rng(0).integers(25, 45, 60)).tolist()
    path = without_rate(write(tmp_path / "a.webm", pictures(60), "libvpx", times=times), tmp_path / "b.webm")
    assert Source(path).rate == 25
    with av.open(str(path)) as container:
        assert container.streams.video[0].guessed_rate == 1000, "what is not to be believed"
    report = pack(path, tmp_path / "s", format=format, progress=False, processes=1)
    assert (report.frames, report.short_shots) == (60, 0)
    assert report.frame_rates == {f"{59000 / (times[-1] - times[0]):.3f}".rstrip("0"): 1}


@pytest.mark.parametrize("format", ["jpeg", "h264", "copy"])
def test_a_rate_that_falls_is_measured_in_time(format, tmp_path):
    """A screen recording of 60 and then 2 frames a second that claims 25: neither half is shorter than it lasts."""
    times = [round(1000 * n / 60) for n in range(90)] + [1500 + 500 * n for n in range(3)]
    path = write(tmp_path / "a.mkv", pictures(93), times=times)
    report = pack(path, tmp_path / "s", format=format, clip_length=1.5, progress=False, processes=1)
    assert report.short_shots == 0
    index = Store(tmp_path / "s").index
    spans = [(index.clip(clip).start, index.clip(clip).end) for clip in range(len(index))]
    assert spans == [pytest.approx(span, abs=0.002) for span in [(0, 1.5), (1.5, 3.0)]]


@pytest.mark.parametrize(("rate", "suffix"), [(24000, "mp4"), (60000, "mp4"), (24000, "mkv"), (60000, "mkv")])
def test_times_do_not_drift(rate, suffix, tmp_path):
    """23.976 and 59.94 fps: the last clips' times are still the source's, within Matroska's clock."""
    path = write(tmp_path / f"a.{suffix}", pictures(720, 16, 16), rate=Fraction(rate, 1001))
    pack(path, tmp_path / "s", clip_length=2.0, min_length=0, shot_cuts=False, progress=False, processes=1)
    index = Store(tmp_path / "s").index
    seconds = np.concatenate([index.times(clip) for clip in range(len(index))])
    allowed = 1e-5 if suffix == "mp4" else 0.0016
    np.testing.assert_allclose(seconds, np.arange(720) * 1001 / rate, rtol=0, atol=allowed)
    assert all(index.clip(clip).constant_rate for clip in range(len(index)))


@pytest.mark.parametrize("rate", [Fraction(24000, 1001), Fraction(60000, 1001), Fraction(53, 7)])
def test_a_constant_rate_is_true_to_the_times(rate):
    """Two hours of one shot, whatever the rate: times are even only while the rounding of a step does not add up."""
    ticks = np.array([round(n / rate / TICKS) for n in range(int(7200 * rate))])
    even = _constant_rate(ticks)
    assert np.abs(even - ticks).max() * TICKS <= CLOCK
    assert (len(set(np.diff(even))) == 1) == (rate.denominator == 1001)


def test_reordering_that_the_stream_does_not_tell(tmp_path):
    """A decoder that sees no more than the packets must not lose frames while it finds out."""
    options = {"preset": "medium", "x264-params": "b-pyramid=normal:b-adapt=0"}
    path = write(tmp_path / "a.mp4", pictures(40), b_frames=5, options=options)
    store = check(without_usability_information(path, tmp_path / "b.mp4"), tmp_path)
    assert np.count_nonzero(store.index.packets(0).flags & 1) == 4
    assert store.index.num_frames == 40


def test_times_written_in_decoding_order(tmp_path):
    """Frames are reordered, but pts = dts: the decoder's order is that of presentation, and gets the same times."""

    def flatten(packets):
        times = sorted(packet.pts for packet in packets)
        for packet, time in zip(packets, times, strict=True):
            packet.pts = packet.dts = time
        return packets

    path = write(tmp_path / "a.mp4", pictures(30), b_frames=3, options={"preset": "veryfast"})
    truth = sequential(path)
    shuffled = remux(path, tmp_path / "b.mp4", flatten)
    check(shuffled, tmp_path, expected=truth)


def test_key_flags_missing(tmp_path):
    def strip(packets):
        for packet in packets:
            packet.is_keyframe = False
        return packets

    path = remux(write(tmp_path / "a.mp4", pictures(40)), tmp_path / "b.mp4", strip)
    store = check(path, tmp_path)
    assert np.count_nonzero(store.index.packets(0).flags & 1) > 1, "keys are found in the bits"


def test_edit_list(tmp_path):
    path = write(tmp_path / "a.mp4", pictures(40), b_frames=2, options={"preset": "veryfast"})
    _, whole = sequential(path)
    cut = skip_start(path, tmp_path / "b.mp4", 512 * 5)
    _, truth = sequential(cut)
    assert len(truth) == 35
    np.testing.assert_array_equal(truth[0], whole[5])
    check(cut, tmp_path)


@pytest.mark.parametrize("size", [(47, 64), (48, 63), (35, 47)])
def test_odd_sizes(size, tmp_path):
    check(write(tmp_path / "a.mkv", pictures(20, *size), "ffv1"), tmp_path)
    path = write(tmp_path / "b.mp4", pictures(20, *size), "libx264", options={"preset": "ultrafast"})
    pack(path, tmp_path / "jpeg", min_length=0, progress=False, processes=1)
    clip = Store(tmp_path / "jpeg").index.clip(0)
    assert (clip.height, clip.width) == (round(size[0] / 2) * 2, round(size[1] / 2) * 2)


@pytest.mark.parametrize("quarter", [1, 2, 3])
def test_rotation_metadata(quarter, tmp_path):
    path = write(tmp_path / "a.mp4", pictures(20))
    plain = sequential(path)
    turned = rotate(path, tmp_path / "b.mp4", quarter)
    _, truth = sequential(turned)
    np.testing.assert_array_equal(truth[7], np.rot90(plain[1][7], -quarter))
    check(turned, tmp_path)
    pack(turned, tmp_path / "jpeg", min_length=0, progress=False, processes=1)
    packed = frames(tmp_path / "jpeg", 0, [7])[0]
    assert packed.shape == truth[7].shape
    assert np.abs(packed.astype(int) - truth[7]).mean() < 6


@pytest.mark.parametrize("quarter", [1, 2, 3])
def test_attention_sees_a_video_as_training_does(quarter, tmp_path):
    path = rotate(write(tmp_path / "a.mp4", pictures(3, 64, 96)), tmp_path / "b.mp4", quarter)
    _, truth = sequential(path)
    np.testing.assert_array_equal(video_frames(path, 3, 64), truth)


@pytest.mark.parametrize("codec", ["libx264", "libvpx-vp9"])
def test_one_frame(codec, tmp_path):
    check(write(tmp_path / "a.mkv", pictures(1), codec), tmp_path)


def test_reencoded_frames_are_those_of_the_original(stores, folder):
    """jpeg and h264 stores lose a little, but frame n is frame n."""
    _, truth = sequential(folder / "v3.mp4")
    for format in ("jpeg", "h264"):
        store = Store(stores / format)
        (clip,) = (i for i in range(len(store)) if store.index.clip(i).source == "v3.mp4")
        got = frames(store, clip, np.arange(40)).astype(float)
        small = np.stack([_half(picture, got.shape[1:3]) for picture in truth])
        distance = np.abs(got[:, None] - small[None]).mean((2, 3, 4))
        assert (distance.argmin(1) == np.arange(40)).all()


def _half(picture, size):
    from PIL import Image

    return np.asarray(Image.fromarray(picture).resize(size[::-1], Image.Resampling.BICUBIC), float)
