"""Batches: what is in them, that they are the same whatever makes them, and that nothing is left running."""

import pickle
import subprocess
import sys
import textwrap
import threading
import time
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from videos import pictures, rotate, write

import vito_kernels
from vito_fast.config import SamplerConfig
from vito_fast.data.loader.batch import ThreadPool
from vito_fast.data.loader.loader import ClipLoader, _with_index
from vito_fast.data.loader.resize_reference import view
from vito_fast.data.loader.sampler import Sampler
from vito_fast.data.pack.pack import pack
from vito_fast.data.store.store import Decoder, Store, decode_jpeg, frames
from vito_fast.errors import UserError

SMALL = SamplerConfig(size=32, views=2)
FORMATS = ("jpeg", "h264", "copy")


def loader(store, batch_size=4, **options):
    return ClipLoader(store, batch_size, **{"sampler": SMALL, "threads": 2, **options})


def equal(one, other):
    tensors = [
        [*batch["views"], *(batch[name] for name in ("clip", "video", "frame", "time", "sample"))]
        for batch in (one, other)
    ]
    return all(torch.equal(a, b) for a, b in zip(*tensors, strict=True))


@pytest.fixture(scope="module")
def rotated(tmp_path_factory):
    """A copy store of videos to be turned by 0, 90, 180 and 270 degrees, of two sizes."""
    root = tmp_path_factory.mktemp("rotated")
    (root / "videos").mkdir()
    for quarter in range(4):
        plain = write(
            root / f"plain{quarter}.mp4", pictures(30, height=48 + 16 * (quarter % 2), seed=quarter), b_frames=2
        )
        rotate(plain, root / "videos" / f"v{quarter}.mp4", quarter)
    pack(root / "videos", root / "store", format="copy", min_length=0, progress=False, processes=1)
    return root / "store"


def expected_views(path, batch, config, seed, attempt=0):
    """The batch's uint8 views by the plain way: whole frames, the geometry's specification."""
    store = Store(path)
    samples = Sampler(store.index, config, seed).sample(batch["sample"].numpy(), attempt)
    for i, clip in enumerate(samples.clip.tolist()):
        info = store.index.clip(clip)
        for v, number in enumerate(samples.frame[i].tolist()):
            (read,) = store.reader.read([clip], [[number]], single_stream=False)
            if store.format.still:
                picture = decode_jpeg(info, read.data)
            else:
                (picture,) = Decoder().decode(info, read, store.index.packets(clip).order[[number]])
            yield i, v, view(picture, tuple(samples.crop[i, v]), bool(samples.flip[i, v]), config.size, info.rotation)


@pytest.mark.parametrize("views", [2, 4])
@pytest.mark.parametrize("format", [*FORMATS, "rotated"])
def test_views_are_the_samplers(stores, rotated, format, views):
    path = rotated if format == "rotated" else stores / format
    config = SamplerConfig(size=32, views=views)
    with loader(path, sampler=config, augment=False, seed=7) as data:
        batch = next(iter(data))
        assert len(batch["views"]) == views
        for i, v, expected in expected_views(path, batch, config, 7):
            assert np.abs(batch["views"][v][i].numpy().astype(int) - expected).max() <= 1, (i, v)
        samples = Sampler(data.store.index, config, 7).sample(batch["sample"].numpy())
    for name in ("clip", "video", "frame", "time"):
        np.testing.assert_array_equal(batch[name].numpy(), getattr(samples, name))


def test_colors_follow_on_the_same_views(stores):
    plain, colored = (loader(stores / "jpeg", augment=augment, seed=3) for augment in (False, True))
    with plain, colored:
        bytes_, floats = next(iter(plain)), next(iter(colored))
        samples = Sampler(plain.store.index, SMALL, 3).sample(bytes_["sample"].numpy())
    for v in range(2):
        assert bytes_["views"][v].dtype == torch.uint8
        assert bytes_["views"][v].shape == (4, 32, 32, 3)
        assert floats["views"][v].shape == (4, 3, 32, 32)
        assert floats["views"][v].is_contiguous(memory_format=torch.channels_last)
        expected = vito_kernels.photometric(bytes_["views"][v], torch.from_numpy(samples.params[:, v].copy()))
        torch.testing.assert_close(floats["views"][v], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("format", FORMATS)
def test_threads_and_prefetch_do_not_show(stores, format):
    runs = []
    for threads, prefetch in ((1, 0), (2, 2), (3, 5)):
        with loader(stores / format, 2, threads=threads, prefetch=prefetch, seed=1) as data:
            runs.append([batch for _ in range(2) for batch in data])
    assert len(runs[0]) == 2 * len(data) > 2
    assert all(equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


def test_ranks_share_out_one_batch(stores):
    with loader(stores / "jpeg", 4, seed=5) as whole:
        one = list(whole)
    halves = [list(loader(stores / "jpeg", 2, seed=5, rank=rank, world_size=2)) for rank in (0, 1)]
    assert len(one) == len(halves[0])
    for batch, first, second in zip(one, *halves, strict=True):
        for name in ("clip", "video", "frame", "time", "sample"):
            assert torch.equal(batch[name], torch.cat([first[name], second[name]]))
        for v in range(2):
            assert torch.equal(batch["views"][v], torch.cat([first["views"][v], second["views"][v]]))


def test_an_epoch_visits_clips_once_and_epochs_differ(stores):
    with loader(stores / "jpeg", 1) as data:
        epochs = [torch.cat([batch["clip"] for batch in data]).tolist() for _ in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(len(data.store)))
    assert epochs[0] != epochs[1]


def test_resuming_goes_on_where_it_was(stores):
    with loader(stores / "jpeg", 2) as data:
        batches = [batch for _ in range(2) for batch in data]
        assert data.state_dict()["sample"] == 2 * len(data.store)
    for delivered in (1, len(data) - 1, len(data), len(data) + 1):
        with loader(stores / "jpeg", 2) as other:
            other.seek(delivered)
            rest = list(other)
            assert len(rest) == len(data) - delivered % len(data)
            assert all(equal(a, b) for a, b in zip(batches[delivered:], rest, strict=False))
            assert equal(other.batch(0), batches[0])
            assert other.step == delivered + len(rest)


def test_the_position_counts_what_was_delivered_only(stores):
    with loader(stores / "jpeg", 1, prefetch=4) as data:
        for count, _ in enumerate(data, 1):
            assert data.step == count
            if count == 2:
                break
        assert len(list(data)) == len(data) - 2
        data.set_epoch(1)
        assert data.step == len(data)
        data.set_epoch(0)
        assert data.step == 0


def test_a_stale_iterator_says_so(stores):
    with loader(stores / "jpeg", 1) as data:
        first = iter(data)
        next(first)
        next(iter(data))
        with pytest.raises(RuntimeError, match="stale"):
            next(first)


def test_the_next_epoch_is_begun_before_this_one_ends(stores, monkeypatch):
    with loader(stores / "jpeg", prefetch=2) as begun:
        steps = []
        begin = ClipLoader._begin
        monkeypatch.setattr(ClipLoader, "_begin", lambda self, step: steps.append(step) or begin(self, step))
        list(begun), list(begun)
        assert steps == list(range(2 * len(begun) + 2)), "each once, and two beyond the second epoch"


def test_an_interrupted_wait_loses_no_step(stores, monkeypatch):
    with loader(stores / "jpeg", 2) as plain, loader(stores / "jpeg", 2) as interrupted:
        first, second, *_ = plain
        assert equal(next(iter(interrupted)), first)
        with monkeypatch.context() as patch:
            patch.setattr(ClipLoader, "_deliver", Mock(side_effect=KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                next(iter(interrupted))
        assert equal(next(iter(interrupted)), second)


def test_it_is_used_as_dalis_iterators_are(stores):
    with loader(stores / "jpeg", 2) as plain, loader(stores / "jpeg", 2) as asked:
        epochs = [list(plain), list(plain)]
        for epoch in epochs:
            assert all(equal(next(asked), batch) for batch in epoch)
            with pytest.raises(StopIteration):
                next(asked)
        asked.set_epoch(0)
        assert equal(next(asked), epochs[0][0])
        asked.reset()
        assert (asked.epoch, asked.step) == (1, len(asked))
        asked.reset()
        assert asked.epoch == 1, "it is at an epoch's start already"
        assert equal(next(asked), epochs[1][0])


def test_the_same_frame_when_the_window_is_zero(stores):
    with loader(stores / "h264", sampler=SamplerConfig(size=32, views=2, frame_window=0)) as data:
        batch = next(iter(data))
    assert torch.equal(batch["frame"][:, 0], batch["frame"][:, 1])


def test_bfloat16_views(stores):
    with loader(stores / "jpeg", dtype=torch.bfloat16) as data:
        assert next(iter(data))["views"][0].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"prefetch": -1}, "prefetch is -1"),
        ({"rank": 1}, "rank is 1"),
        ({"threads": -2}, "threads is -2"),
        ({"max_bad_share": 2}, "max_bad_share is 2"),
        ({"dtype": torch.uint8}, "dtype is torch.uint8"),
    ],
)
def test_senseless_arguments(stores, options, message):
    with pytest.raises(ValueError, match=message):
        loader(stores / "jpeg", **options)


def test_too_few_clips(stores):
    with pytest.raises(UserError, match="fewer than one batch of 100 x 2"):
        loader(stores / "jpeg", 100, world_size=2)


def test_a_state_that_is_none(stores):
    data = loader(stores / "jpeg")
    for state in ({"step": 1}, {**data.state_dict(), "sample": -1}, {**data.state_dict(), "more": 1}):
        with pytest.raises(ValueError, match="must be a state_dict: sample, batch, seed, store"):
            data.load_state_dict(state)
    with pytest.raises(ValueError, match="step is -1"):
        data.seek(-1)


def test_a_state_continues_with_another_batch_or_is_refused(stores):
    """After samples 0 to 3 of an epoch: whatever the batch and the ranks, sample 4 is next."""
    with loader(stores / "jpeg", 2, seed=3) as data:
        before = next(data), next(data)
        state = data.state_dict()
        after = next(data)
    assert state == {"sample": 4, "batch": 2, "seed": 3, "store": data.store.digest}
    assert state["sample"] == before[1]["sample"][-1] + 1
    for batch, world in ((1, 1), (2, 1), (4, 1), (1, 2)):
        if batch * world > len(data.store) - 4:
            continue
        parts = []
        for rank in range(world):
            with loader(stores / "jpeg", batch, seed=3, rank=rank, world_size=world) as other:
                other.load_state_dict(state)
                parts.append(next(other)["clip"])
        assert torch.equal(torch.cat(parts)[:1], after["clip"][:1])
    for options, message in (
        ({"batch_size": 3}, "a global batch of 3 does not begin there: choose one that divides 4"),
        ({"batch_size": 2, "seed": 4}, "state is of seed 3, this loader is of seed 4"),
    ):
        with loader(stores / "jpeg", **{"seed": 3, **options}) as other, pytest.raises(ValueError, match=message):
            other.load_state_dict(state)
    with loader(stores / "h264", 2, seed=3) as other, pytest.raises(ValueError, match="this loader is of store"):
        other.load_state_dict(state)


def test_a_pickled_loader_goes_on(stores):
    with loader(stores / "jpeg", 1, seed=1) as data:
        next(data)
        with pickle.loads(pickle.dumps(data)) as copy:
            assert copy.state_dict() == data.state_dict()
            assert equal(next(copy), next(data))


class Asked(torch.utils.data.Dataset):
    def __init__(self, loader):
        self.loader = loader

    def __len__(self):
        return 2

    def __getitem__(self, step):
        return self.loader.batch(step)["clip"]


@pytest.mark.parametrize(("method", "used"), [("fork", False), ("fork", True), ("spawn", True)])
def test_a_loader_in_other_processes(method, used, stores):
    """Forked after use it raises, and does not hang. Otherwise it works."""
    with loader(stores / "jpeg", 2) as data:
        expected = [data.batch(step)["clip"] for step in range(2)]
        if not used:
            data.close()
            data = loader(stores / "jpeg", 2)
        elif method == "spawn":
            next(data)
        workers = torch.utils.data.DataLoader(
            Asked(data), batch_size=None, num_workers=1, multiprocessing_context=method, timeout=120
        )
        if method == "fork" and used:
            with pytest.raises(RuntimeError, match="used before its process was forked"):
                list(workers)
        else:
            assert all(torch.equal(a, b) for a, b in zip(workers, expected, strict=True))
        data.close()


def test_batches_take_turns_in_few_blocks_of_memory(stores):
    """A block is used again once its batch is gone, and never before."""
    with loader(stores / "jpeg", 1, prefetch=1) as data:
        places = set()
        for _ in range(4):
            for batch in data:
                places.add(batch["views"][0].untyped_storage().data_ptr())
                del batch
        assert len(places) <= 4
        kept = [batch for _ in range(2) for batch in data]
        views = [batch["views"][1] for batch in kept]
        copies = [view.clone() for view in views]
        assert len({view.untyped_storage().data_ptr() for view in views}) == len(views)
        del kept
        list(data)
        assert all(torch.equal(view, copy) for view, copy in zip(views, copies, strict=True))


def running():
    return {thread.name for thread in threading.enumerate() if thread.name.startswith("vito-data")}


def test_no_thread_outlives_its_loader(stores):
    assert not running()
    data = loader(stores / "jpeg", 1)
    iterator = iter(data)
    next(iterator)
    assert running()
    data.close()
    assert not running()
    assert len(list(data)) == len(data) - 1  # closed is not the end
    abandoned = iter(data)
    next(abandoned)
    del data, abandoned, iterator
    assert not running()
    used_by_next = loader(stores / "jpeg", 1)
    next(used_by_next)
    assert running()
    del used_by_next
    assert not running(), "at once, without the garbage collector"


def test_torch_keeps_its_threads(stores):
    before = torch.get_num_threads()
    with loader(stores / "jpeg", 1) as data:
        next(iter(data))
        assert torch.get_num_threads() == before
        others = []
        thread = threading.Thread(target=lambda: others.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert others == [before]


def test_a_worker_keeps_to_one_thread():
    workers = ThreadPool(2, lambda: None)
    try:
        assert [workers.submit(lambda _: torch.get_num_threads()).result() for _ in range(8)] == [1] * 8
    finally:
        workers.close()


ENDINGS = {
    "abandoned": "",
    "exception": "raise KeyError('planted')",
    # A shell's background jobs ignore SIGINT, and so would their children.
    "interrupt": "import signal; signal.signal(2, signal.default_int_handler); signal.raise_signal(2)",
    "exit": "raise SystemExit(3)",
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_process_ends_however_it_ends(stores, ending):
    """Prefetching much, so that plenty is under way."""
    script = f"""
        from vito_fast.data.loader.loader import ClipLoader, _with_index
        loader = ClipLoader({str(stores / "jpeg")!r}, 1, prefetch=50, threads=2)
        batches = iter(loader)
        next(batches)
        {ENDINGS[ending]}
    """
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=120)
    assert done.returncode == {"abandoned": 0, "exception": 1, "interrupt": -2, "exit": 3}[ending], done.stderr
    assert ("Traceback" in done.stderr) == (ending in ("exception", "interrupt")), done.stderr
    assert time.monotonic() - start < 100


@pytest.mark.parametrize("format", FORMATS)
def test_frames_in_any_order(stores, format):
    store = Store(stores / format)
    every = frames(store, 0, range(store.index.clip(0).num_frames))
    asked = [5, 0, 5, 17, 3]
    np.testing.assert_array_equal(frames(stores / format, 0, asked), every[asked])
    assert frames(store, 0, []).shape == (0, *every.shape[1:])
    with pytest.raises(IndexError):
        frames(store, 0, [10**6])
    with pytest.raises(IndexError):
        frames(store, 10**6, [0])


def test_dali_is_asked_for_by_name(stores, monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with loader(stores / "jpeg") as data, pytest.raises(UserError, match=r"pip install 'vito-fast\[train\]'"):
        next(iter(data))


def test_a_gpu_has_its_number_before_other_threads_ask(monkeypatch):
    """Which GPU is the current one each thread knows for itself, and workers know of the first."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    found = [str(_with_index(torch.device(name))) for name in ("cuda", "cuda:1", "cpu")]
    assert found == ["cuda:3", "cuda:1", "cpu"]
