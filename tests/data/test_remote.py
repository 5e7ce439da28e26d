"""Stores on a real S3 server with faults: every batch is that of the local store, and the cache keeps its bound."""

import errno
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import s3fs
import torch
from object_server import ENVIRONMENT, ObjectServer, upload
from test_loader import equal, loader

from vito_fast.config import Config, DataConfig, TrainConfig
from vito_fast.data.loader.read_ahead import STEPS
from vito_fast.data.pack.edit import merge, subset
from vito_fast.data.pack.pack import pack
from vito_fast.data.store import cache as cache_module
from vito_fast.data.store import remote, remote_store
from vito_fast.data.store.inspect import inspect_store
from vito_fast.data.store.remote_store import RemoteReader
from vito_fast.data.store.store import Store, frames
from vito_fast.errors import UserError
from vito_fast.train.distributed import World
from vito_fast.train.run import make_loader

ADDRESS = "s3://bucket/store"


@pytest.fixture(scope="module")
def running():
    server = ObjectServer()
    yield server
    server.close()
    s3fs.S3FileSystem.clear_instance_cache()


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
    upload(store, "memory://bucket/store")
    upload(store, ADDRESS, s3_additional_kwargs={"ACL": "public-read"})
    local = Store(store)
    server.failures = 0.1
    for address in (f"file://{store}", "memory://bucket/store", f"{server.url}/bucket/store"):
        opened = Store(address)
        assert opened.digest == local.digest
        np.testing.assert_array_equal(frames(opened, 1, [3, 30, 5]), frames(local, 1, [3, 30, 5]))


@pytest.mark.parametrize("blocks", [30, 8])
def test_a_cache_that_is_smaller_than_the_store(server, stores, cache, blocks):
    upload(stores / "jpeg", ADDRESS)
    Store(ADDRESS)
    limit = on_disk(cache) + blocks * 4096
    shards = sum(path.stat().st_size for path in (stores / "jpeg").glob("shard-*.bin"))
    assert limit < shards / 2
    most = []
    server.change = lambda path, body: most.append(on_disk(cache)) or body
    assert same_epochs(ADDRESS, stores / "jpeg", epochs=3, cache_gib=limit / 2**30).failures == 0
    assert max(*most, on_disk(cache)) <= limit
    assert server.fetched() > 1.5 * blocks * 4096


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
        clock += 60
    file.use(np.arange(2))
    clock += 60
    cache.reserve([(file, np.arange(50, 54))])
    assert file.use(np.arange(10)).tolist() == [2, 3, 4, 5]
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
    assert file.use(np.arange(10)).tolist() == list(range(3, 7) if holes else range(10))
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
        "s3://bucket/other": "is no store, it has no index",
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


def test_reading_ahead_follows_the_sampler(server, stores, monkeypatch):
    upload(stores / "jpeg", ADDRESS)
    seen = []
    monkeypatch.setattr(RemoteReader, "prefetch", lambda self, clips, frames, **options: seen.append(clips.tolist()))
    with loader(ADDRESS, 3, prefetch=1) as data:
        for start in (0, 1, 10 * len(data), 10 * len(data) + 1):
            if start > 1 and start != data.step:
                data.seek(start)
            next(data)
            begun = start + 1
            last = data.batch(begun + STEPS)["clip"].tolist()
            deadline = time.monotonic() + 10
            while last not in seen and time.monotonic() < deadline:
                time.sleep(0.01)
            assert seen.pop() == last


def test_pack_uploads_and_goes_on_after_a_fault(server, folder, stores, tmp_path, monkeypatch, caplog):
    upload(stores / "jpeg", "s3://bucket/other")  # makes the bucket
    options = {"format": "copy", "short_side": 32, "clip_length": 1.6, "progress": False, "processes": 2}
    staging = tmp_path / "c-staging"
    with monkeypatch.context() as patch:
        patch.setattr(remote.Remote, "upload", broken_after(1))
        with pytest.raises(UserError, match=r"cannot write .*repeat the command"):
            pack(folder, "s3://bucket/packed", **options)
    with pytest.raises(UserError, match="is no store, it has no index"):
        Store("s3://bucket/packed")
    server.requests.clear()
    report = pack(folder, "s3://bucket/packed", **options)
    assert [path for method, path, _ in server.requests if method == "PUT" and "shard-00000" in path] == []
    assert not list(staging.iterdir())
    assert Store("s3://bucket/packed").digest == Store(stores / "copy").digest
    same_epochs("s3://bucket/packed", stores / "copy", epochs=1)
    assert pack(folder, "s3://bucket/packed", **options) == report
    with pytest.raises(UserError, match="finished store with gop=8, not 9"):
        pack(folder, "s3://bucket/packed", **options, gop=9)
    with pytest.raises(UserError, match="cannot write s3://no-such-bucket"):
        pack(folder, "s3://no-such-bucket/packed", **options)


def broken_after(count):
    """``Remote.upload`` that fails from the ``count``-th file on."""
    upload, calls = remote.Remote.upload, iter(range(10**6))

    def broken(self, path, name):
        if next(calls) >= count:
            raise remote.RemoteError("the network is gone")
        upload(self, path, name)

    return broken


def test_a_server_that_is_gone_is_waited_for(running, server, stores):
    upload(stores / "jpeg", ADDRESS)
    with loader(ADDRESS, 3, io_timeout=60) as ours, loader(stores / "jpeg", 3) as theirs:
        next(ours), next(theirs)
        server.failures = 1.0
        back = threading.Timer(1.5, lambda: setattr(server, "failures", 0.0))
        back.start()
        for one, other in zip(ours, theirs, strict=True):
            assert equal(one, other)
        assert ours.stats.failures == 0
    with loader(ADDRESS, 3, io_timeout=0.2, cache=stores / "unused", max_bad_share=0) as ours:
        server.failures = 1.0
        with pytest.raises(UserError, match=f"io: clip .* {ADDRESS}/shard-.*Service Unavailable"):
            next(ours)


def test_a_full_disk_evicts_and_then_fails(server, stores, monkeypatch):
    upload(stores / "jpeg", ADDRESS)
    write, full = os.pwrite, []

    def pwrite(*arguments):
        if full.pop():
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(*arguments)

    opened = Store(ADDRESS)
    monkeypatch.setattr(cache_module.os, "pwrite", pwrite)
    full[:] = [False] * 10 + [True]
    frames(opened, 0, [0])
    full[:] = [False] * 10 + [True]
    np.testing.assert_array_equal(frames(opened, 0, [30, 9]), frames(stores / "jpeg", 0, [30, 9]))
    full[:] = [True] * 1000
    with pytest.raises(OSError, match="No space left on device"):
        frames(opened, 5, [0])


READER = """
import sys
import numpy as np
from vito_fast.data.store import cache, remote_store
from vito_fast.data.store.store import Store
cache.BLOCK = remote_store.BLOCK = 4096
address, local, seed, gib = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
ours, theirs = Store(address, cache_gib=gib), Store(local)
random = np.random.default_rng(seed)
print("open", flush=True)
for _ in range(int(sys.argv[5])):
    clips = random.integers(len(ours), size=4)
    frames = np.array([random.integers(ours.index.clip(int(clip)).num_frames, size=2) for clip in clips])
    for one, other in zip(ours.reader.read(clips, frames), theirs.reader.read(clips, frames)):
        assert one.code == other.code == "ok", one.error
        assert (one.data == other.data).all()
print("equal", flush=True)
"""


def test_processes_share_a_small_cache_and_may_be_killed(server, stores, cache):
    upload(stores / "jpeg", ADDRESS)
    Store(ADDRESS)
    limit = on_disk(cache) + 50 * 4096

    def start(seed, reads):
        words = [ADDRESS, str(stores / "jpeg"), str(seed), str(limit / 2**30), str(reads)]
        return subprocess.Popen([sys.executable, "-c", READER, *words], stdout=subprocess.PIPE, text=True)

    survivor, victims = start(0, 25), [start(seed, 10**6) for seed in (1, 2)]
    for number, victim in enumerate(victims):
        assert victim.stdout.readline() == "open\n"
        time.sleep(0.3 * number)
        victim.kill()
        victim.wait()
        assert on_disk(cache) <= limit
    assert survivor.communicate(timeout=120)[0] == "open\nequal\n"
    assert on_disk(cache) <= limit
    same_epochs(ADDRESS, stores / "jpeg", epochs=1, cache_gib=limit / 2**30)
    assert on_disk(cache) <= limit


def test_stores_are_made_of_remote_ones(server, stores, tmp_path):
    upload(stores / "jpeg", ADDRESS)
    for name, source in (("ours", ADDRESS), ("theirs", stores / "jpeg")):
        subset(source, tmp_path / name / "part", clips=[1, 4])
        merge(tmp_path / name / "all", [tmp_path / name / "part", source])
    for name in ("part", "all"):
        ours, theirs = (tmp_path / which / name for which in ("ours", "theirs"))
        for path in theirs.glob("*.bin"):
            assert (ours / path.name).read_bytes() == path.read_bytes()
    inspected = inspect_store(ADDRESS, progress=False)
    assert (inspected.clips, inspected.damaged) == (len(Store(ADDRESS)), [])
    with pytest.raises(UserError, match="store subset writes local folders"):
        subset(ADDRESS, "s3://bucket/part")


def test_a_run_takes_its_cache_from_the_configuration(server, stores, tmp_path):
    upload(stores / "jpeg", ADDRESS)
    data = DataConfig(store=ADDRESS, cache=str(tmp_path / "own"), cache_gib=2)
    made = make_loader(Config(data=data, train=TrainConfig(batch_size=3)), World(0, 1, 1, torch.device("cpu")))
    assert made.store.path.is_relative_to(tmp_path / "own")
    assert made.store.remote.limit == 2 << 30
    assert not (tmp_path / "c").exists()
