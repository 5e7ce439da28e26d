"""Filters of clips: which clips pass, and a loader that is as of a store of these clips alone."""

import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from test_loader import SMALL, equal, loader

from vito_fast.cli.main import main
from vito_fast.config import ClipFilter, DataConfig
from vito_fast.data.loader.loader import ClipLoader
from vito_fast.data.pack.edit import subset
from vito_fast.data.store.selection import select
from vito_fast.data.store.store import Store
from vito_fast.errors import UserError

CLASSES = ("ant", "bee", "cat")


@pytest.fixture
def labeled(stores, tmp_path):
    """A store whose clips are of three classes, and of two groups by their source."""
    path = Path(shutil.copytree(stores / "jpeg", tmp_path / "labeled"))
    store = Store(path)
    label = [clip % 3 for clip in range(len(store))]
    groups = ["long" if store.index.clip(clip).source.startswith("sub") else None for clip in range(len(store))]
    table = {"label": label, "class": [CLASSES[number] for number in label], "group": groups}
    pq.write_table(pa.table(table), path / "labels.parquet")
    return path


@pytest.mark.parametrize(
    ("where", "passes"),
    [
        ({}, lambda clip, info: True),
        ({"labels": ("ant", "2")}, lambda clip, info: clip % 3 != 1),
        ({"groups": ("long",)}, lambda clip, info: info.source == "sub/long.mkv"),
        ({"sources": ("v0*", "v[34].mp4")}, lambda clip, info: info.source in ("v0.mp4", "v3.mp4", "v4.mp4")),
        ({"min_seconds": 1.0}, lambda clip, info: info.end - info.start >= 1),
        ({"min_side": 32, "min_rate": 25.0}, lambda clip, info: True),
        ({"labels": ("bee",), "sources": ("v*",)}, lambda clip, info: clip % 3 == 1 and info.source[0] == "v"),
    ],
)
def test_a_clip_passes_every_field_and_one_entry_of_each(labeled, where, passes):
    store = Store(labeled)
    expected = [clip for clip in range(len(store)) if passes(clip, store.index.clip(clip))]
    assert select(store, ClipFilter(**where)).tolist() == expected


@pytest.mark.parametrize("frames", [None, 3])
def test_a_filtered_loader_gives_the_samples_of_the_subset(labeled, frames, tmp_path):
    where = ClipFilter(labels=("ant", "cat"))
    subset(labeled, tmp_path / "sub", where=where)
    chosen = torch.from_numpy(select(Store(labeled), where))
    options = {"frames": frames}
    with loader(labeled, 2, where=where, **options) as some, loader(tmp_path / "sub", 2, **options) as alone:
        assert some.num_clips == alone.num_clips == len(chosen)
        for _ in range(2):
            for batch, expected in zip(some, alone, strict=True):
                assert torch.equal(batch["clip"], chosen[expected["clip"]])
                assert batch["label"].tolist() == expected["label"].tolist()
                for name in ("frame", "time", "sample"):
                    assert torch.equal(batch[name], expected[name])


def test_a_filtered_loader_resumes_with_its_filter_alone(labeled):
    where = ClipFilter(labels=("ant", "cat"))
    with loader(labeled, 2, where=where) as data:
        next(data)
        state, expected = data.state_dict(), next(data)
    with loader(labeled, 1, where=where, rank=1, world_size=2) as data:
        data.load_state_dict(state)
        assert torch.equal(next(data)["clip"], expected["clip"][1:])
    with loader(labeled, 2, where=replace(where, min_seconds=0.1)) as data:  # all clips pass this
        data.load_state_dict(state)
        assert equal(next(data), expected)
    for other in (ClipFilter(), ClipFilter(labels=("ant", "bee"))):
        with loader(labeled, 2, where=other) as data, pytest.raises(ValueError, match="state is of store"):
            data.load_state_dict(state)


def test_a_sample_that_fails_is_replaced_by_another_that_passes(labeled):
    store, where = Store(labeled), ClipFilter(sources=("v*",))
    broken = store.index.clip(int(select(store, where)[0]))
    shard = labeled / store.index.shards[broken.shard][0]
    data = bytearray(shard.read_bytes())
    packets = store.index.packets(int(select(store, where)[0]))
    for offset in packets.offsets.tolist():
        data[offset + 20] ^= 255
    shard.write_bytes(data)
    with loader(labeled, 5, where=where) as reader:
        batch = next(reader)
        assert reader.stats.failures == 1
        assert set(batch["clip"].tolist()) < set(select(store, where).tolist())


def test_a_filter_holds_for_every_store_of_a_mixture(labeled, stores):
    where = ClipFilter(sources=("v*",))
    with ClipLoader({str(labeled): 1.0, str(stores / "h264"): 1.0}, 2, sampler=SMALL, threads=2, where=where) as data:
        assert data.num_clips == 10
        for batch in data:
            for store, clip in zip(batch["store"].tolist(), batch["clip"].tolist(), strict=True):
                assert data.stores[store].index.clip(clip).source.startswith("v")


def test_filters_that_cannot_be_used(labeled, stores, tmp_path, capsys):
    for where, words in (
        (ClipFilter(labels=("dog",)), "no clip of .* is left"),
        (ClipFilter(min_side=1000), "no clip of .* is left"),
    ):
        with pytest.raises(UserError, match=words):
            loader(labeled, where=where)
    with pytest.raises(UserError, match=r"has no labels\.parquet"):
        loader(stores / "jpeg", where=ClipFilter(groups=("a",)))
    for entry in ("label=cat", "labels=", "min_side=x", "min_side"):
        with pytest.raises(ValueError, match=r"^data\.where: .*(is no FIELD=VALUE|has no number)"):
            DataConfig(where=(entry,))
    given = ClipFilter.parse(("labels=a", "sources=x=y", "min_rate=24", "labels=b"))
    assert given == ClipFilter(labels=("a", "b"), sources=("x=y",), min_rate=24.0)
    assert main(["store", "subset", str(labeled), str(tmp_path / "s"), "--labels", "ant", "--min-side", "32"]) == 0
    assert "labels" in capsys.readouterr().out or pq.read_table(tmp_path / "s" / "labels.parquet")["class"].unique()
    assert set(pq.read_table(tmp_path / "s" / "labels.parquet")["class"].to_pylist()) == {"ant"}
