"""Properties of the parts of packing, and mutated files: refused, or read exactly."""

import random
from fractions import Fraction

import numpy as np
import pytest
from av.video.frame import VideoFrame
from hypothesis import given, settings
from hypothesis import strategies as st
from test_exact import sequential
from videos import pictures, write

from vito_fast.data.pack.clips import Journal, PackedClip, PackedFile, Rejected
from vito_fast.data.pack.pack import pack
from vito_fast.data.pack.shots import Cut, ShotDetector, mark_cuts
from vito_fast.data.store.media import BadVideo, Source, presentation_times
from vito_fast.data.store.picture import fitted, rgb
from vito_fast.data.store.store import Store, frames


@given(st.lists(st.one_of(st.none(), st.integers(-1000, 1000)), min_size=1, max_size=60), st.integers(1, 50))
def test_times_always_increase(pts, step):
    ticks = presentation_times(pts, step)
    assert len(ticks) == len(pts)
    assert (np.diff(ticks) > 0).all()
    if None not in pts and len(set(pts)) == len(pts):
        assert ticks.tolist() == sorted(pts)


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(16, 512))
def test_fitted_keeps_the_shape(height, width, short):
    h, w = fitted(height, width, short)
    assert h % 2 == w % 2 == 0
    assert min(h, w) <= max(2, short + 1)
    scale = min(1, short / min(height, width))
    assert abs(h - height * scale) <= 2
    assert abs(w - width * scale) <= 2


@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1))
def test_shots_are_told_from_motion(seed):
    moving = pictures(24, seed=seed)
    detector = ShotDetector()
    both = map(VideoFrame.from_ndarray, [*moving, *(255 - picture for picture in moving)])
    found = [cut for frame in both for cut in detector.push(frame)]
    assert [(cut.frame, cut.kind) for cut in [*found, *detector.finish()]] == [(24, "cut")]


def test_cuts_that_are_reported_late_mark_their_own_frames(monkeypatch):
    """A detector may look ahead: frame n comes out once no later frame can change its mark."""

    class Late:
        DELAY = 2
        moved = 0

        def __init__(self):
            self.seen = 0

        def push(self, picture):
            self.seen += 1
            return [Cut(2, "cut", 1.0)] if self.seen == 5 else []

        def finish(self):
            return [Cut(self.seen - 1, "cut", 1.0)]

    monkeypatch.setattr("vito_fast.data.pack.shots.ShotDetector", Late)
    marked = list(mark_cuts(zip("abcdefg", "abcdefg", strict=True)))
    assert [(frame, cut is not None) for frame, cut, _ in marked] == [(frame, frame in "cg") for frame in "abcdefg"]


def test_the_journal_gives_back_what_it_was_given(tmp_path):
    (tmp_path / ".pack").mkdir()
    rng = np.random.default_rng(0)
    clip = PackedClip(
        codec="h264", width=640, height=361, rotation=90, shard=0, time_base=Fraction(1, 12800), end=9000,
        extradata=b"\0\xff",
        pts=np.array([0, 512, 2**40]), offsets=np.array([0, 5, 9]), sizes=np.array([5, 4, 3]),
        checksums=rng.integers(0, 2**32, 3).astype(np.uint32), flags=np.array([1, 0, 8], np.uint8),
    )  # fmt: skip
    names = {
        "plain.mp4": PackedFile([clip], 25.0, 2),
        "line\nbreak.mp4": Rejected("why"),
        "bytes\udcff.mp4": PackedFile(),
    }
    journal = Journal(tmp_path, 1, 1)
    (tmp_path / "shard-00000.bin").write_bytes(bytes(20))
    for name, entry in names.items():
        journal.add(name, entry)
    journal.mark_done()
    again = Journal(tmp_path, 1, 1)
    assert again.entries.keys() == names.keys()
    assert again.entries["line\nbreak.mp4"] == Rejected("why")
    (same,) = again.entries["plain.mp4"].clips
    for key, value in vars(clip).items():
        assert np.array_equal(getattr(same, key), value), key
    assert (tmp_path / "shard-00000.bin").stat().st_size == 12, "what no record knows of is cut off"
    (tmp_path / "shard-00000.bin").write_bytes(bytes(11))
    assert "plain.mp4" not in Journal(tmp_path, 1, 1).entries, "its packets are gone: it is packed again"


@pytest.mark.parametrize("strict", [True, False])
def test_mutated_files_are_refused_or_read_exactly(strict, tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    (tmp_path / "whole").mkdir()
    kinds = [("a.mp4", "libx264", 2), ("b.mkv", "libx265", 2), ("c.webm", "libvpx-vp9", 0), ("d.ts", "libx264", 0)]
    whole = [write(tmp_path / "whole" / name, pictures(12), codec, gop=6, b_frames=b) for name, codec, b in kinds]
    rng = random.Random(3)
    for number in range(60):
        original = rng.choice(whole)
        data = bytearray(original.read_bytes())
        if rng.random() < 0.3:
            del data[rng.randrange(len(data)) :]
        else:
            for _ in range(rng.choice([1, 2, 5, 50])):
                data[rng.randrange(len(data))] = rng.randrange(256)
        (source / f"{number}{original.suffix}").write_bytes(data)
    options = {"strict": strict, "keep_still": True, "min_length": 0, "progress": False, "decode_timeout": 20}
    report = pack(source, tmp_path / "s", format="copy", **options)
    assert report.rejected
    assert bool(report.salvaged) != strict
    store = Store(tmp_path / "s")
    clips: dict[str, list[int]] = {}
    for clip in range(len(store)):
        clips.setdefault(store.index.clip(clip).source, []).append(clip)
    assert len(clips) >= 10
    for name, numbers in clips.items():
        truth = [rgb(frame) for _, frame in Source(source / name, salvage=not strict).frames()]
        got = [
            picture for clip in numbers for picture in frames(store, clip, np.arange(store.index.clip(clip).num_frames))
        ]
        assert len(got) == len(truth) if strict else len(got) <= len(truth), name
        rest = iter(truth)
        for place, ours in enumerate(got):
            assert any(np.array_equal(ours, theirs) for theirs in rest), f"{name} frame {place}"


def test_mutated_files_make_whole_jpeg_stores(tmp_path):
    (tmp_path / "in").mkdir()
    data = write(tmp_path / "a.mp4", pictures(12), gop=6).read_bytes()
    rng = random.Random(5)
    for number in range(40):
        mutated = bytearray(data)
        mutated[rng.randrange(len(data))] ^= rng.randrange(1, 256)
        (tmp_path / "in" / f"{number}.mp4").write_bytes(mutated)
    report = pack(tmp_path / "in", tmp_path / "s", min_length=0, strict=True, progress=False)
    assert report.videos + sum(report.rejected.values()) == 40
    assert min(report.videos, sum(report.rejected.values())) > 3
    store = Store(tmp_path / "s")
    for clip in range(len(store)):
        assert len(frames(store, clip, np.arange(store.index.clip(clip).num_frames))) <= 12


@pytest.mark.parametrize("text", ["ffconcat version 1.0\nfile a.ts\n", "#EXTM3U\n#EXTINF:1,\na.ts\n#EXT-X-ENDLIST\n"])
def test_a_playlist_is_no_video(text, tmp_path, monkeypatch):
    write(tmp_path / "a.ts", pictures(10))
    (tmp_path / "b.mp4").write_text(text)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadVideo, match=r"cannot be decoded|playlist"):
        sequential(tmp_path / "b.mp4")


def test_reasons_are_one_line(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"x" * 50)
    with pytest.raises(BadVideo, match=r"^[^\n]+$"):
        sequential(tmp_path / "a.mp4")
