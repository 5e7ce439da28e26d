"""Planted faults: what is bad is replaced, counted and named, and nothing wrong is ever delivered."""

import io
import json
import logging
import os
import shutil
import struct
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_loader import SMALL, equal, expected_views, loader
from videos import pictures, write

from vito_fast.data.loader.fetch import Fetcher
from vito_fast.data.loader.resize_reference import view
from vito_fast.data.loader.sampler import Sampler
from vito_fast.data.pack.pack import pack
from vito_fast.data.store.index import ClipRecord, Index, checksum, write_index
from vito_fast.data.store.store import BadPackets, Decoder, Store, frames
from vito_fast.errors import UserError

FORMATS = ("jpeg", "h264", "copy")


@pytest.fixture
def store(stores, tmp_path, request):
    """A copy of a store, to be spoilt."""
    return Path(shutil.copytree(stores / getattr(request, "param", "jpeg"), tmp_path / "store"))


def byte_of(store: Path, clip: int, packet: int = 0) -> tuple[Path, int]:
    """The shard of a clip, and the position in it of the middle of a packet."""
    index = Index(store / "index.bin")
    packets = index.packets(clip)
    shard = store / index.shards[index.clip(clip).shard][0]
    return shard, int(packets.offsets[packet] + packets.sizes[packet] // 2)


def spoil(store: Path, clip: int) -> None:
    """Inverts a byte in the middle of each of the clip's packets."""
    for packet in range(Index(store / "index.bin").clip(clip).num_packets):
        shard, place = byte_of(store, clip, packet)
        with shard.open("r+b") as file:
            file.seek(place)
            value = file.read(1)[0]
            file.seek(place)
            file.write(bytes([value ^ 0xFF]))


def rewrite(store: Path, change) -> None:
    """Writes the store's packets and index anew, ``change(clip, packet, data)`` for the data; checksums are right."""
    index, records, whole = Index(store / "index.bin"), [], bytearray()
    for clip in range(len(index)):
        info, packets = index.clip(clip), index.packets(clip)
        shard = (store / index.shards[info.shard][0]).read_bytes()
        data = [
            change(clip, i, shard[offset : offset + size])
            for i, (offset, size) in enumerate(zip(packets.offsets, packets.sizes, strict=True))
        ]
        sizes = np.array([len(one) for one in data])
        records.append(
            ClipRecord(
                info.video, info.source, info.codec, info.width, info.height, 0, info.time_base, packets.pts,
                len(whole) + np.cumsum(sizes) - sizes, sizes, np.array([checksum(one) for one in data], np.uint32),
                packets.flags, round(info.end / info.time_base), info.extradata, info.rotation,
            )
        )  # fmt: skip
        whole += b"".join(data)
    (store / "shard-new.bin").write_bytes(whole)
    write_index(store / "index.bin", records, format=index.format, shards=[("shard-new.bin", len(whole))])


@pytest.fixture
def unchecked(monkeypatch):
    """A store that is opened before its shards are damaged."""
    monkeypatch.setattr("vito_fast.data.store.store.check_shards", lambda store, index: None)


def check_replaced(store: Path, bad: set[int], code: str | None, epochs: int = 2, **options) -> None:
    """Bad clips never appear, every view is the right one, and all is counted; twice with the same result."""
    runs = []
    for threads in (1, 2):
        with loader(store, 3, threads=threads, max_bad_share=1.0, io_timeout=0.1, augment=False, **options) as data:
            runs.append([batch for _ in range(epochs) for batch in data])
            stats = data.stats
            assert {failure.clip for failure in stats.last_failures} == bad
            assert stats.failures == sum(stats.reasons.values()) >= len(bad)
            if code:
                assert set(stats.reasons) == {code}
            assert stats.samples == sum(len(batch["clip"]) for batch in runs[-1])
            json.dumps(stats.as_dict())
            for failure in stats.last_failures:
                assert failure.reason
    assert all(equal(a, b) for a, b in zip(*runs, strict=True))
    for batch in runs[0]:
        assert not bad & set(batch["clip"].tolist())
        check_views(store, batch)


def check_views(store: Path, batch: dict) -> None:
    """Every view is that of the clip, frame and crop which the sampler gives the sample at one of its attempts."""
    opened = Store(store)
    sampler = Sampler(opened.index, SMALL, 0)
    numbers = batch["sample"].numpy()
    for i, clip in enumerate(batch["clip"].tolist()):
        attempt = next(a for a in range(len(opened)) if sampler.clips(numbers[i : i + 1], a)[0] == clip)
        one = {"sample": batch["sample"][i : i + 1]}
        for _, v, expected in expected_views(store, one, SMALL, 0, attempt):
            assert np.abs(batch["views"][v][i].numpy().astype(int) - expected).max() <= 1


@pytest.mark.parametrize("store", FORMATS, indirect=True)
def test_corrupt_packets(store, caplog):
    spoil(store, 2)
    with caplog.at_level(logging.WARNING, "vito_fast.data"):
        check_replaced(store, {2}, "checksum")
    source = Store(store).index.clip(2).source
    assert any(f"clip 2 ({source}) replaced by another: checksum" in message for message in caplog.messages)


@pytest.mark.parametrize("store", FORMATS, indirect=True)
def test_one_corrupt_packet_spoils_only_those_who_need_it(store):
    shard, place = byte_of(store, 1, 0)
    with shard.open("r+b") as file:
        file.seek(place)
        file.write(b"\x00\xff\x00\xff")
    with loader(store, 3, max_bad_share=1.0, augment=False) as data:
        for _ in range(8):
            for batch in data:
                for clip, asked in zip(batch["clip"].tolist(), batch["frame"].tolist(), strict=True):
                    (read,) = data.store.reader.read([clip], [asked], single_stream=False)
                    assert read.code == "ok"
                check_views(store, batch)
        assert set(data.stats.reasons) <= {"checksum"}


def test_truncated_shard(store, unchecked):
    index, clip = Index(store / "index.bin"), 2
    packets, mine = index.packets(clip), index.clip(clip).shard
    os.truncate(store / index.shards[mine][0], int(packets.offsets[0]) + 5)
    after = {
        other
        for other in range(len(index))
        if index.clip(other).shard == mine and index.packets(other).offsets[0] >= packets.offsets[0]
    }
    check_replaced(store, after, "truncated")


def two_shards(store: Path, clips: set[int]) -> Path:
    """Moves ``clips`` to a shard of their own, which is returned."""
    index, records, wholes = Index(store / "index.bin"), [], (bytearray(), bytearray())
    for clip in range(len(index)):
        info, packets = index.clip(clip), index.packets(clip)
        data = (store / index.shards[info.shard][0]).read_bytes()[packets.offsets[0] :][: packets.sizes.sum()]
        which = int(clip in clips)
        offsets = packets.offsets - packets.offsets[0] + len(wholes[which])
        wholes[which].extend(data)
        records.append(
            ClipRecord(
                info.video, info.source, info.codec, info.width, info.height, which, info.time_base, packets.pts,
                offsets, packets.sizes, packets.checksums, packets.flags, round(info.end / info.time_base),
                info.extradata, info.rotation,
            )
        )  # fmt: skip
    names = ["one.bin", "other.bin"]
    for name, whole in zip(names, wholes, strict=True):
        (store / name).write_bytes(whole)
    shards = list(zip(names, map(len, wholes), strict=True))
    write_index(store / "index.bin", records, format=index.format, shards=shards)
    return store / "other.bin"


def test_vanished_shard(store, unchecked):
    two_shards(store, {0, 3}).unlink()
    check_replaced(store, {0, 3}, "missing")


def test_unreadable_shard(store, unchecked):
    shard = two_shards(store, {1})
    shard.unlink()
    shard.mkdir()  # opens, and cannot be read: not even by root
    check_replaced(store, {1}, None)


def test_a_damaged_shard_is_found_when_the_store_is_opened(store):
    shard = two_shards(store, {0, 3})
    whole = shard.read_bytes()
    for content, reason in ((whole[:-1], f"it has {len(whole) - 1} bytes, not {len(whole)}"), (None, "it is missing")):
        shard.unlink()
        if content is not None:
            shard.write_bytes(content)
        for opening in (Store, loader):
            with pytest.raises(UserError, match=f"other.bin is damaged: {reason}; delete the store"):
                opening(store)


def test_a_shard_that_is_away_for_a_while(store, caplog):
    """The batches wait for it, and are those of an undisturbed run."""
    shard = two_shards(store, {0, 3})
    with loader(store, 2, augment=False) as undisturbed:
        expected = [batch for _ in range(2) for batch in undisturbed]
    with loader(store, 2, augment=False, max_bad_share=0, io_timeout=60) as data:
        shard.rename(store / "away")
        back = threading.Timer(1.0, lambda: (store / "away").rename(shard))
        back.start()
        with caplog.at_level(logging.WARNING, "vito_fast.data"):
            got = [batch for _ in range(2) for batch in data]
        back.join()
        assert data.stats.failures == 0
    assert all(equal(a, b) for a, b in zip(got, expected, strict=True))
    assert any("cannot be reached: trying again for 60 s" in message for message in caplog.messages)


def test_a_waiting_loader_can_be_closed(store, unchecked):
    for path in store.glob("shard-*.bin"):
        path.unlink()
    start = time.monotonic()
    with loader(store, 1, augment=False, io_timeout=3600) as data:
        batch = data._begin(0)
        time.sleep(0.3)
        assert not any(future.done() for future in batch._futures), "it waits"
    assert time.monotonic() - start < 60


def test_an_index_that_is_cut_short_while_it_is_open(store):
    """An error, not a bus error."""
    with loader(store, 2, augment=False, max_bad_share=1.0) as data:
        next(data)
        os.truncate(store / "index.bin", 200)
        with pytest.raises(UserError, match=r"index\.bin is damaged: it was cut short while it was open"):
            list(batch for _ in range(10) for batch in data)
        with pytest.raises(ValueError, match="it was cut short while it was open"):
            data.store.index.clip(0)
    with pytest.raises(UserError, match=r"index\.bin is damaged"):
        Store(store)


def test_a_shard_that_vanishes_while_running(store):
    shard = two_shards(store, {1})
    with loader(store, 1, prefetch=0, max_bad_share=1.0, augment=False) as data:
        list(data)
        assert data.stats.failures == 0
        os.truncate(shard, 3)
        clips = [batch["clip"].item() for batch in data]
        assert 1 not in clips
        assert data.stats.reasons == {"truncated": 1}


def test_corrupt_index_entry(store):
    """A clip's entry in the index is spoilt: the clip alone is lost."""
    clean = (store / "index.bin").read_bytes()
    lost = set()
    for place in range(len(clean) // 4, len(clean), 7):
        (store / "index.bin").write_bytes(clean[:place] + bytes([clean[place] ^ 0x55]) + clean[place + 1 :])
        try:
            index = Index(store / "index.bin")
        except ValueError:
            continue
        broken = set()
        for clip in range(len(index)):
            try:
                index.packets(clip)
                index.clip(clip)
            except ValueError:
                broken.add(clip)
        if len(broken) == 1:
            check_replaced(store, broken, "index", epochs=1)
            lost |= broken
        if len(lost) == 3:
            return
    raise AssertionError("no byte spoilt a single clip's entry")


def xxh64(data: bytes, seed: int) -> int:
    """The index's checksum, whole: to write what no packer writes."""
    p1, p2, p3, p4, p5 = (
        0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5
    )  # fmt: skip
    mask = 2**64 - 1

    def turn(value: int, bits: int) -> int:
        value &= mask
        return (value << bits | value >> 64 - bits) & mask

    def stir(state: int, word: int) -> int:
        return turn(state + word * p2, 31) * p1 & mask

    words = struct.unpack(f"<{len(data) // 8}Q", data[: len(data) // 8 * 8])
    striped = len(words) // 4 * 4 if len(data) >= 32 else 0
    result = seed + p5
    if striped:
        states = [seed + p1 + p2, seed + p2, seed, seed - p1]
        for place in range(striped):
            states[place % 4] = stir(states[place % 4], words[place])
        result = sum(turn(state, bits) for state, bits in zip(states, (1, 7, 12, 18), strict=True))
        for state in states:
            result = (result ^ stir(0, state)) * p1 + p4 & mask
    result = result + len(data) & mask
    for word in words[striped:]:
        result = turn(result ^ stir(0, word), 27) * p1 + p4 & mask
    rest = data[len(words) * 8 :]
    if len(rest) >= 4:
        result = turn(result ^ int.from_bytes(rest[:4], "little") * p1, 23) * p2 + p3 & mask
        rest = rest[4:]
    for byte in rest:
        result = turn(result ^ byte * p5, 11) * p1 & mask
    result = (result ^ result >> 33) * p2 & mask
    result = (result ^ result >> 29) * p3 & mask
    return result ^ result >> 32


def retable(store: Path, clip: int, change) -> None:
    """``change(bytearray)`` of the clip's tables in the index; their checksums are right again afterwards."""
    data = bytearray((store / "index.bin").read_bytes())
    record = struct.unpack_from("<Q", data, 48)[0] + 128 * clip  # Header.records_offset (see csrc/index.hpp)
    begin, size = struct.unpack_from("<QQ", data, record + 8)
    block = bytearray(data[begin : begin + size])
    change(block)
    data[begin : begin + size] = block
    struct.pack_into("<I", data, record + 116, xxh64(bytes(block), clip) & 0xFFFFFFFF)
    struct.pack_into("<Q", data, record + 120, xxh64(bytes(data[record : record + 120]), clip))
    (store / "index.bin").write_bytes(data)


@pytest.mark.parametrize("store", ["h264", "copy"], indirect=True)
def test_packet_tables_that_make_no_sense_though_their_checksum_is_right(store):
    """Packet 39 lies outside the clip's data: a sample that needs it, or not, is replaced."""
    retable(store, 2, lambda block: struct.pack_into("<I", block, 24 * 39 + 16, 2**32 - 1))
    assert Index(store / "index.bin").clip(2).num_packets == 40
    with pytest.raises(ValueError, match="clip 2: a packet lies outside the clip's data"):
        Index(store / "index.bin").packets(2)
    check_replaced(store, {2}, None)


NO_JPEG = {
    "text": lambda data: b"this was a picture once" * 9,
    "cut short": lambda data: data[: len(data) // 2],
    "zeros": lambda data: data[:200] + bytes(len(data) - 200),
    "another size": lambda data: _jpeg(np.zeros((20, 20, 3), np.uint8)),
}


def _jpeg(pixels: np.ndarray) -> bytes:
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "JPEG")
    return data.getvalue()


@pytest.mark.parametrize("kind", NO_JPEG)
def test_jpegs_that_do_not_decode_though_their_checksum_is_right(store, kind, capfd):
    """DALI's pipeline dies of one; its batch is decoded in software, where only the bad sample fails."""
    rewrite(store, lambda clip, packet, data: NO_JPEG[kind](data) if clip == 4 else data)
    check_replaced(store, {4}, "decode")
    capfd.readouterr()


@pytest.mark.parametrize("store", ["h264", "copy"], indirect=True)
def test_packets_that_do_not_decode_though_their_checksum_is_right(store):
    rewrite(store, lambda clip, packet, data: bytes(len(data)) if clip == 2 else data)
    check_replaced(store, {2}, "decode")


def test_a_decoder_with_fewer_frames_or_none(store, monkeypatch):
    original = Decoder._context

    class Silent:
        name = "silent"

        def decode(self, packet):
            return []

        def flush_buffers(self):
            pass

    pack_store = Store(store)  # jpeg: any clip info will do
    info = pack_store.index.clip(0)
    (read,) = pack_store.reader.read([0], [[0, 3]], single_stream=False)
    monkeypatch.setattr(Decoder, "_context", lambda self, clip: Silent())
    with pytest.raises(BadPackets, match="decodes to no frame"):
        Decoder().decode(info, read, [0, 3])
    monkeypatch.setattr(Decoder, "_context", original)
    assert len(Decoder().decode(info, read, [0, 3])) == 2


def test_too_much_is_too_much(store):
    for clip in range(3):
        spoil(store, clip)
    with loader(store, 2, max_bad_share=0.001) as data:
        told = r"more than max_bad_share = 0.001 allows; the last: clip [012] .*checksum"
        with pytest.raises(UserError, match=told) as error:
            list(batch for _ in range(10) for batch in data)
        assert data.stats.failures == 2
        assert "\n" not in str(error.value)


def test_a_share_of_zero_bears_no_failure(store):
    spoil(store, 0)
    with loader(store, 1, max_bad_share=0) as data, pytest.raises(UserError):
        list(data)


@pytest.mark.parametrize("share", [0.05, 1.0])
def test_all_is_bad(store, share):
    for clip in range(len(Index(store / "index.bin"))):
        spoil(store, clip)
    with loader(store, 2, max_bad_share=share) as data, pytest.raises(UserError, match="inspect-store"):
        list(data)


def test_frames_names_the_damage(store):
    spoil(store, 1)
    with pytest.raises(OSError, match=r"clip 1.*checksum"):
        frames(store, 1, [0])


@pytest.fixture(scope="module")
def vp9(tmp_path_factory):
    root = tmp_path_factory.mktemp("vp9")
    (root / "videos").mkdir()
    for number in range(5):
        size = {"height": 48 + 16 * (number % 2), "seed": number}
        write(root / "videos" / f"v{number}.webm", pictures(30, **size), "libvpx-vp9", gop=10)
    pack(root / "videos", root / "store", format="copy", min_length=0, progress=False, processes=1)
    return root / "store"


def through_dali(path: Path, codecs: set[str]) -> tuple[dict[int, list[np.ndarray]], list]:
    """Views of one chunk whose clips of ``codecs`` DALI decodes, as on a GPU, by row; and the chunk's counters."""
    store = Store(path)
    sampler = Sampler(store.index, SMALL, 0)
    fetcher = Fetcher(store, sampler, len(store), device=torch.device("cpu"), hardware_codecs=codecs)
    views: dict[int, list[np.ndarray]] = {}

    def put(rows, squares, params):
        assert params.shape == (len(rows), 2, 8)
        for place, row in enumerate(rows.tolist()):
            assert row not in views
            views[row] = [square[place].numpy().copy() for square in squares]

    return views, fetcher.fetch(np.arange(len(store)), put, np.inf)


def test_mini_clips_through_dali(vp9):
    """What NVDEC gets: several sizes in one batch, two frames a clip cut from one decoded sequence."""
    by_dali, chunk = through_dali(vp9, {"vp9"})
    in_software, other = through_dali(vp9, set())
    assert chunk.refused == 0
    assert not chunk.failures
    assert chunk.packets == other.packets
    assert sorted(by_dali) == sorted(in_software) == list(range(5))
    samples = chunk.samples
    for row, views in by_dali.items():
        clip = frames(vp9, int(samples.clip[row]), range(30))
        for v, got in enumerate(views):
            wanted = int(samples.frame[row, v])
            distance = {
                number: np.abs(
                    view(clip[number], tuple(samples.crop[row, v]), bool(samples.flip[row, v]), 32).astype(int) - got
                ).mean()
                for number in range(max(0, wanted - 2), min(30, wanted + 3))
            }
            assert min(distance, key=distance.__getitem__) == wanted
            assert distance[wanted] < 4  # DALI's conversion from YUV is another
    np.testing.assert_array_equal(chunk.samples.frame, other.samples.frame)


def test_a_mini_clip_that_dali_refuses(vp9, tmp_path, capfd):
    """Its batch goes to software, where it fails alone and is replaced."""
    store = Path(shutil.copytree(vp9, tmp_path / "store"))
    rewrite(store, lambda clip, packet, data: bytes(len(data)) if clip == 3 else data)
    views, chunk = through_dali(store, {"vp9"})
    in_software, other = through_dali(store, set())
    assert chunk.refused > 0
    assert {failure.clip for failure in chunk.failures} == {3}
    assert chunk.failures[0].code == "decode"
    assert 3 not in chunk.samples.clip
    np.testing.assert_array_equal(chunk.samples.clip, other.samples.clip)
    assert sorted(views) == sorted(in_software)
    capfd.readouterr()
