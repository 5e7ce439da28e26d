"""The index: what is written is read, corruption and other versions are noticed, a million clips open at once."""

from __future__ import annotations

import dataclasses
import os
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import SHARD, constant_clip, synthetic_index

from vito_fast import _sampler
from vito_fast.data.store.index import (
    DISPOSABLE,
    KEY,
    NO_PICTURE,
    OPEN,
    ClipRecord,
    Index,
    checksum,
    plan_packets,
    write_index,
)

SHARDS = [(SHARD, 10**6)]


def answers(index: Index, clip: int) -> list[object]:
    return [index.clip(clip), index.times(clip).tolist(), *(column.tolist() for column in index.packets(clip))]


def varied_clips() -> list[ClipRecord]:
    """Constant and variable rate, reordered and hidden frames."""
    clips = [constant_clip(video, 5 + video) for video in range(4)]
    flags = np.array([KEY, 0, DISPOSABLE, NO_PICTURE, KEY | OPEN], np.uint8)
    changes = dict(codec="h264", flags=flags, pts=np.array([0, 9, 4, 5, 11]), end=20, extradata=b"\1extra", rotation=90)
    return [*clips, constant_clip(4, 5, **changes, time_base=Fraction(1001, 30000))]


@st.composite
def records(draw: st.DrawFn) -> ClipRecord:
    packets = draw(st.integers(1, 12))
    sizes = np.array(draw(st.lists(st.integers(1, 50), min_size=packets, max_size=packets)))
    pts = np.array(draw(st.lists(st.integers(0, 100), min_size=packets, max_size=packets)))
    flags = np.array(draw(st.lists(st.sampled_from([0, KEY, DISPOSABLE]), min_size=packets, max_size=packets)))
    flags[0] = KEY
    return ClipRecord(
        video=draw(st.integers(-(2**63), 2**63 - 1)), source=draw(st.text("a/. é日", max_size=20)), codec="vp9",
        width=draw(st.integers(1, 65535)), height=draw(st.integers(1, 65535)), shard=0,
        time_base=draw(st.fractions(Fraction(1, 10**6), 10, max_denominator=10**6)), pts=pts,
        offsets=np.cumsum(sizes) - sizes, sizes=sizes, checksums=np.arange(packets, dtype=np.uint32),
        flags=flags.astype(np.uint8), end=int(pts.max()) + draw(st.integers(1, 100)),
        extradata=draw(st.binary(max_size=20)), rotation=draw(st.sampled_from([0, 90, 180, 270])),
    )  # fmt: skip


@given(st.lists(records(), max_size=5))
@settings(max_examples=40, derandomize=True, deadline=None)
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, clips: list[ClipRecord]) -> None:
    path = tmp_path_factory.getbasetemp() / "round-trip.bin"
    assert write_index(path, clips, format="copy", shards=SHARDS) == len(clips)
    index = Index(path)
    assert (index.format, index.num_clips, index.shards) == ("copy", len(clips), tuple(SHARDS))
    assert index.num_frames == index.num_packets == sum(len(clip.pts) for clip in clips)
    for number, clip in enumerate(clips):
        info, packets, order = index.clip(number), index.packets(number), np.argsort(clip.pts, kind="stable")
        for name in ("video", "source", "codec", "width", "height", "shard", "time_base", "extradata", "rotation"):
            assert getattr(info, name) == getattr(clip, name)
        for name in ("pts", "offsets", "sizes", "checksums", "flags"):
            assert np.array_equal(getattr(packets, name), getattr(clip, name))
        assert np.array_equal(packets.order, order)
        assert np.allclose(index.times(number), clip.pts[order] * float(clip.time_base))
        assert (info.num_frames, info.num_packets) == (len(clip.pts), len(clip.pts))
        assert info.start == pytest.approx(clip.pts.min() * float(clip.time_base))
        assert info.end == pytest.approx(clip.end * float(clip.time_base))


def test_constant_rate_clips_take_eight_bytes_a_packet(tmp_path: Path) -> None:
    sizes = []
    for frames in (100, 1100):
        synthetic_index(tmp_path / "index.bin", clips=10, frames=frames)
        sizes.append((tmp_path / "index.bin").stat().st_size)
    assert sizes[1] - sizes[0] <= 8 * 10 * 1000
    assert Index(tmp_path / "index.bin").clip(0).constant_rate


def test_file_names_that_are_not_unicode(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.mp4")
    write_index(tmp_path / "index.bin", [constant_clip(source=name)], format="jpeg", shards=SHARDS)
    assert Index(tmp_path / "index.bin").clip(0).source == name
    odd = tmp_path / name
    write_index(odd, [constant_clip()], format="jpeg", shards=SHARDS)
    assert Index(odd).native.path == str(odd)
    odd.write_bytes(b"")
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        Index(odd)
    odd.unlink()
    with pytest.raises(FileNotFoundError) as missing:
        Index(odd)
    assert missing.value.filename == str(odd)


def test_open_takes_no_time_whatever_the_size(tmp_path: Path) -> None:
    """1.2 million clips (of few frames, to spare the disk: opening reads no clip) in under a second."""
    path, writer = tmp_path / "index.bin", _sampler.IndexWriter(str(tmp_path / "index.bin"), "jpeg", SHARDS)
    fields = {**vars(constant_clip(0, 2)), "source": b"x", "time_base": (1, 25)}
    del fields["mirror"]
    for _ in range(1_200_000):
        writer.add(**fields)
    writer.finish()
    start = time.perf_counter()
    index = Index(path)
    seconds = time.perf_counter() - start
    assert index.num_clips == 1_200_000
    assert index.clip(1_199_999).num_frames == 2
    assert seconds < 1
    path.unlink()


def test_numbers_out_of_range(tmp_path: Path) -> None:
    index = synthetic_index(tmp_path / "index.bin", clips=3, frames=5)
    for clip in (-1, 3, 2**40):
        for method in (index.clip, index.times, index.packets):
            with pytest.raises(IndexError, match=f"clip {clip} of an index of 3"):
                method(clip)
    for frame in (-1, 5):
        with pytest.raises(IndexError, match=f"frame {frame}"):
            plan_packets(index, 0, [frame])


def test_files_that_are_no_index(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as missing:
        Index(tmp_path / "none")
    assert missing.value.filename == str(tmp_path / "none")
    with pytest.raises(IsADirectoryError):
        Index(tmp_path)
    for content in (b"", b"hello", b"x" * 10_000):
        (tmp_path / "text").write_bytes(content)
        with pytest.raises(ValueError, match="text is damaged: it is not the index of a vito-fast store; delete"):
            Index(tmp_path / "text")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe is damaged: it is no regular file; delete the store and pack again"):
        Index(tmp_path / "pipe")


def test_another_version_gives_one_line_with_both(tmp_path: Path) -> None:
    path = tmp_path / "index.bin"
    synthetic_index(path)
    data = bytearray(path.read_bytes())
    data[8] = 9
    path.write_bytes(data)
    with pytest.raises(ValueError, match="version 9, but this vito-fast reads version 1") as error:
        Index(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 0}, "width is 0"),
        ({"height": 70_000}, "height is 70000"),
        ({"end": 19}, "end is 19"),
        ({"shard": 1}, "shard is 1"),
        ({"rotation": 1}, "rotation is 1"),
        ({"codec": "x" * 16}, "codec's length is 16"),
        ({"sizes": np.zeros(20, int)}, "a size is 0"),
        ({"offsets": np.full(20, 10**6)}, "an offset is 1000000"),
        ({"flags": np.zeros(20, np.uint8)}, "the number of keys is 0"),
        ({"flags": np.arange(20)}, "a flag|the first key"),
        ({"pts": np.arange(19)}, r"has shape \(20,\), must be \(19,\)"),
        ({"pts": np.arange(20) / 2}, "pts has dtype float64"),
        ({"checksums": np.full(20, 2**32)}, "checksums has values from 4294967296"),
    ],
)
def test_records_that_make_no_sense(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = tmp_path / "index.bin"
    synthetic_index(path)
    before = path.read_bytes()
    bad = dataclasses.replace(constant_clip(), **change)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        write_index(path, [constant_clip(), bad], format="jpeg", shards=SHARDS)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_index(tmp_path / "none" / "index.bin", [], format="jpeg", shards=[])

    def clips() -> object:
        yield constant_clip()
        raise RuntimeError("the packer died")

    path = tmp_path / "index.bin"
    synthetic_index(path)
    before = path.read_bytes()
    with pytest.raises(RuntimeError, match="the packer died"):
        write_index(path, clips(), format="jpeg", shards=SHARDS)  # type: ignore[arg-type]
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_an_error() -> None:
    writer = _sampler.IndexWriter("/dev/full", "jpeg", SHARDS)
    with pytest.raises(OSError, match="No space left") as error:
        writer.finish()
    assert error.value.filename == "/dev/full"


def test_checksums() -> None:
    """XXH64's published answers, low half; any contiguous buffer will do."""
    assert checksum(b"") == 0x51D8E999
    assert checksum(b"abc") == 0xAD770999
    data = np.random.default_rng(0).integers(0, 256, 1000, dtype=np.uint8)
    assert checksum(data) == checksum(data.tobytes()) == checksum(memoryview(bytearray(data)))
    with pytest.raises(ValueError, match="contiguous"):
        checksum(data[::2])


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    out = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        at = int(rng.integers(len(out)))
        match rng.integers(6):
            case 0:
                out[at] ^= 1 << rng.integers(8)
            case 1:
                out[at] = rng.integers(256)
            case 2:
                out = out[: max(at, 1)]
            case 3:
                out[at:at] = out[: rng.integers(64)]
            case 4:
                del out[at : at + int(rng.integers(64))]
            case _:
                value = (0, 1, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1)[rng.integers(6)].to_bytes(8, "little")
                out[at : at + 8] = value[: len(out) - at]
        if not out:
            out = bytearray(b"\0")
    return bytes(out)


def test_ten_thousand_fuzzed_files(tmp_path: Path) -> None:
    """Whatever happens to the file, an answer is the right one or a ``ValueError``; the process survives."""
    good, bad = tmp_path / "good.bin", tmp_path / "bad.bin"
    clips = varied_clips()
    write_index(good, clips, format="copy", shards=SHARDS)
    data, expected = good.read_bytes(), [answers(Index(good), clip) for clip in range(len(clips))]
    rng = np.random.default_rng(0)
    refused = opened = noticed = 0
    for _ in range(10_000):
        content = mutated(data, rng)
        bad.unlink(missing_ok=True)
        bad.write_bytes(content)
        try:
            index = Index(bad)
        except ValueError:
            refused += 1
            continue
        opened += 1
        assert index.num_clips == len(clips)
        for clip, answer in enumerate(expected):
            try:
                assert answers(index, clip) == answer
            except ValueError:
                noticed += 1
    assert refused > 3000  # damage to header and size
    assert opened > 2000
    assert noticed > 2000
