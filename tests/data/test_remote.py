"""Stores on a real S3 server with faults: every batch is that of the local store, and the cache keeps its bound."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from object_server import ENVIRONMENT, ObjectServer, upload
from test_loader import equal, loader

from vito_fast.data.store import cache as cache_module
from vito_fast.data.store import remote_store
from vito_fast.data.store.store import Store, frames
from vito_fast.errors import UserError

ADDRESS = "s3://bucket/store"


@pytest.fixture(scope="module")
def running():
    server = ObjectServer()
    yield server
    server.close()


@pytest.fixture
def server(running, monkeypatch, tmp_path):
    """The server without faults, its environment, and small blocks so that small stores have many."""
    for name, value in {**ENVIRONMENT, "AWS_ENDPOINT_URL": running.url, "VITO_FAST_CACHE": str(tmp_path / "c")}.items():
        monkeypatch.setenv(name, value)
    for module in (cache_module, remote_store):
        monkeypatch.setattr(module, "BLOCK", 4096)
    yield running
    running.latency = running.failures = 0.0
    running.denied, running.change = False, lambda path, body: body
    running.requests.clear()


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "c"


def on_disk(folder: Path) -> int:
    """Bytes that a folder takes on the disk."""
    return sum(512 * path.lstat().st_blocks for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def same_epochs(address, local, epochs=2, **options):
    """Compares the batches of two stores. Returns the loader's counters."""
    with loader(address, 3, **options) as ours, loader(local, 3) as theirs:
        for _ in range(epochs):
            for one, other in zip(ours, theirs, strict=True):
                assert equal(one, other)
        return ours.stats


@pytest.mark.parametrize("format", ["jpeg", "h264", "copy"])
def test_batches_equal_the_local_ones_and_are_fetched_once(server, stores, format, cache):
    upload(stores / format, ADDRESS)
    server.latency, server.failures = 0.01, 0.05
    assert same_epochs(ADDRESS, stores / format, epochs=4).failures == 0
    server.failures = 0
    size = sum(path.stat().st_size for path in (stores / format).glob("shard-*.bin"))
    assert server.fetched() > 0
    with loader(ADDRESS, 3) as data:
        for clip in range(len(data.store)):
            frames(data.store, clip, range(data.store.index.clip(clip).num_frames))
        assert server.fetched() <= 2 * size  # gaps between blocks are fetched needlessly
        server.requests.clear()
        assert data.store.name == ADDRESS
        assert data.state_dict() == loader(stores / format, 3).state_dict()
    same_epochs(ADDRESS, stores / format)
    assert server.fetched() == 0
    assert on_disk(cache) < size + 20 * 4096 * 2


def test_other_file_systems(server, stores, tmp_path):
    store = Path(shutil.copytree(stores / "h264", tmp_path / "store"))
    upload(stores / "h264", "memory://bucket/store")
    local = Store(stores / "h264")
    for address in (f"file://{store}", "memory://bucket/store"):
        opened = Store(address)
        assert opened.digest == local.digest
        np.testing.assert_array_equal(frames(opened, 1, [3, 30, 5]), frames(local, 1, [3, 30, 5]))


def test_a_cache_that_is_smaller_than_the_store(server, stores, cache):
    upload(stores / "jpeg", ADDRESS)
    Store(ADDRESS)
    limit = on_disk(cache) + 30 * 4096
    shards = sum(path.stat().st_size for path in (stores / "jpeg").glob("shard-*.bin"))
    assert limit < shards / 2
    most = []
    server.change = lambda path, body: most.append(on_disk(cache)) or body
    assert same_epochs(ADDRESS, stores / "jpeg", epochs=4, cache_gib=limit / 2**30).failures == 0
    assert max(*most, on_disk(cache)) <= limit
    assert server.fetched() > 1.5 * 30 * 4096


def test_least_recently_used_blocks_go_first(tmp_path, monkeypatch):
    clock = 1_700_000_000
    monkeypatch.setattr(cache_module.time, "time", lambda: clock)
    block = cache_module.BLOCK
    cache = cache_module.Cache(tmp_path / "c", 12 * block)
    file = cache.file("key", 100 * block)
    (tmp_path / "c" / "stores" / "live").mkdir()
    (tmp_path / "c" / "stores" / "live" / "shard").symlink_to(file.path)
    for first in (0, 5):
        blocks = np.arange(first, first + 5)
        cache.reserve([(file, blocks)])
        cache.write(file, first, bytes(5 * block))
        clock += 1
    file.touch(np.arange(2))
    clock += 1
    cache.reserve([(file, np.arange(50, 54))])
    assert file.absent(np.arange(10)).tolist() == [2, 3, 4, 5]
    with pytest.raises(OSError, match="too small"):
        cache.reserve([(file, np.arange(60, 90))])


@pytest.mark.parametrize("holes", [True, False])
def test_freed_blocks_leave_the_disk_after_a_power_cut_too(tmp_path, monkeypatch, holes):
    block, folder = cache_module.BLOCK, tmp_path / "c"
    cache = cache_module.Cache(folder, 100 * block)
    if not holes:
        monkeypatch.setattr(cache_module._libc, "fallocate", lambda *arguments: -1, raising=False)
    file = cache.file("key", 10 * block)
    cache.reserve([(file, np.arange(10))])
    cache.write(file, 0, os.urandom(10 * block))
    cache.drop(file, np.arange(3, 7))
    assert file.absent(np.arange(10)).tolist() == list(range(3, 7) if holes else range(10))
    file.write(3, os.urandom(4 * block))
    file.table[3:7] = 0  # as if the map had not reached the disk
    assert on_disk(folder) >= (10 if holes else 4) * block
    cache_module.Cache(folder, 100 * block)
    assert on_disk(folder) < (7 if holes else 1) * block


def flip(path: str, body: bytes) -> bytes:
    """Another response to each request for a shard."""
    return bytes(byte ^ 0xFF for byte in body[:100]) + body[100:] if "shard-" in path else body


@pytest.mark.parametrize("change", [flip, lambda path, body: body[: len(body) // 2] if "shard-" in path else body])
def test_damaged_responses_are_fetched_again(server, stores, change):
    upload(stores / "jpeg", ADDRESS)
    count = iter(range(10**6))
    server.change = lambda path, body: change(path, body) if next(count) % 5 == 0 else body
    assert same_epochs(ADDRESS, stores / "jpeg").failures == 0


def test_damage_on_the_server_is_that_of_the_local_store(server, stores, tmp_path):
    store = Path(shutil.copytree(stores / "jpeg", tmp_path / "store"))
    shard = store / "shard-00000.bin"
    damaged = bytearray(shard.read_bytes())
    damaged[2000:2010] = bytes(10)
    shard.write_bytes(damaged)
    upload(store, ADDRESS)
    local, opened = Store(store), Store(ADDRESS)
    everything = np.arange(local.index.clip(0).num_frames)[None]
    for _ in range(2):
        (expected,), (read,) = (each.reader.read([0], everything) for each in (local, opened))
        assert read.code == expected.code == "checksum"
        assert read.error == expected.error.replace(str(store), ADDRESS)


def test_a_changed_store_is_another_one(server, stores, folder):
    upload(stores / "jpeg", ADDRESS)
    old = Store(ADDRESS)
    frames(old, 0, [0])
    upload(stores / "h264", ADDRESS)
    new = Store(ADDRESS)
    assert new.digest == Store(stores / "h264").digest != old.digest
    for clip in range(len(new)):
        np.testing.assert_array_equal(frames(new, clip, [1, 20]), frames(stores / "h264", clip, [1, 20]))


def test_mistakes_are_one_line(server, stores, tmp_path, monkeypatch):
    upload(stores / "jpeg", ADDRESS)
    cases = {
        "s3://bucket/other": "is no store, it has no store.json",
        "s3://no-such-bucket/store": "is no store",
        "nonsense://bucket": "is no address",
    }
    for address, message in cases.items():
        with pytest.raises(UserError, match=message):
            Store(address)
    server.denied = True
    with pytest.raises(UserError, match="check the credentials") as caught:
        Store(ADDRESS)
    assert "\n" not in str(caught.value)
    assert ENVIRONMENT["AWS_SECRET_ACCESS_KEY"] not in str(caught.value)
    server.denied = False
    with pytest.raises(UserError, match="too small"):
        Store(ADDRESS, cache_gib=1e-6)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot use the cache"):
        Store(ADDRESS, cache=tmp_path / "file")
    for wrong in ("0", "many"):
        monkeypatch.setenv("VITO_FAST_CACHE_GIB", wrong)
        with pytest.raises(UserError, match=f"size is {wrong} GiB"):
            Store(ADDRESS)
