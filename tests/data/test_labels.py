"""Labels and ids of clips: in batches, and in stores made of stores."""

import pickle
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_loader import SMALL, loader
from videos import pictures, write

from vito_fast.config import ClipFilter
from vito_fast.data.loader.loader import ClipLoader
from vito_fast.data.pack import edit
from vito_fast.data.pack.clips import Span
from vito_fast.data.pack.pack import pack
from vito_fast.data.store.store import Store
from vito_fast.errors import UserError


def name_of(store, clip):
    info = store.index.clip(clip)
    return f"{info.source}@{info.start:.2f}"


def label(path, seed):
    """Write random labels of a copied store, and the expected one of each clip by its name."""
    store, random = Store(path), np.random.default_rng(seed)
    names = [name_of(store, clip) for clip in range(len(store))]
    labels = random.integers(0, 1000, len(store)).tolist()
    videos = [store.index.clip(clip).video for clip in range(len(store))]
    table = {"clip": list(range(len(store))), "clip_id": names, "label": labels, "video": videos, "title": names}
    pq.write_table(pa.table(table), path / "labels.parquet")
    return dict(zip(names, labels, strict=True))


def check(path, expected):
    """The table and the batches of a store tell each clip's own label and id; clips not in ``expected`` have none."""
    table = pq.read_table(path / "labels.parquet").to_pydict()
    store = Store(path)
    videos = [store.index.clip(clip).video for clip in range(len(store))]
    assert table["clip"] == list(range(len(store)))
    assert [video for video in table["video"] if video is not None] == videos
    with loader(path, 1) as data:
        seen = {}
        for batch in data:
            name = name_of(store, int(batch["clip"]))
            seen[name] = int(batch["label"])
            assert batch["id"] == [name if name in expected else ""]
        assert seen == {name: expected.get(name, -1) for name in seen}
        assert len(seen) > 1
    return {name_of(store, clip) for clip in range(len(store))}


@pytest.fixture
def labeled(stores, tmp_path):
    path = Path(shutil.copytree(stores / "jpeg", tmp_path / "labeled"))
    return path, label(path, seed=0)


def test_batches_carry_labels_and_ids(labeled, stores):
    path, expected = labeled
    assert check(path, expected) == expected.keys()
    with loader(path, 3) as data, loader(stores / "jpeg", 3) as plain, loader(path, 3, labels=False) as without:
        batch, other = data.batch(1), plain.batch(1)
        assert batch["label"].dtype == batch["clip"].dtype
        assert other.keys() == without.batch(1).keys() == batch.keys() - {"label", "id"}
        assert pickle.loads(pickle.dumps(data)).batch(1)["id"] == batch["id"]


def test_a_mixture_has_no_labels_where_a_store_has_none(labeled, stores):
    path, expected = labeled
    with ClipLoader({str(stores / "h264"): 1.0, str(path): 1.0}, 3, sampler=SMALL, threads=2) as data:
        rows = [row for b in data for row in zip(*(b[k] for k in ("store", "clip", "label", "id")), strict=True)]
        for store, clip, number, name in rows:
            own = name_of(data.stores[store], int(clip))
            assert (int(number), name) == ((expected[own], own) if store else (-1, ""))
    assert {int(row[0]) for row in rows} == {0, 1}


def test_labels_travel_along(labeled, folder, stores, tmp_path):
    path, expected = labeled
    chosen = edit.subset(path, tmp_path / "sub", clips=[5, 1, 3])
    assert chosen.clips == 3
    some = check(tmp_path / "sub", expected)
    edit.subset(stores / "jpeg", tmp_path / "other", where=ClipFilter(sources=("v*",)))
    edit.merge(tmp_path / "merged", [tmp_path / "other", tmp_path / "sub"])
    mine = {name: expected[name] for name in some}
    assert check(tmp_path / "merged", mine) > some
    edit.append(folder, tmp_path / "sub", processes=1, progress=False)
    assert check(tmp_path / "sub", mine) > some


def test_a_killed_append_leaves_the_labels(labeled, tmp_path, folder, monkeypatch):
    path, expected = labeled
    edit.subset(path, tmp_path / "sub", where=ClipFilter(sources=("v*",)))
    mine = {name: number for name, number in expected.items() if name.startswith("v")}

    def killed(folder, table):
        write_labels(folder, table)
        raise KeyboardInterrupt

    write_labels = edit.labels.write_labels
    monkeypatch.setattr(edit.labels, "write_labels", killed)
    with pytest.raises(KeyboardInterrupt):
        edit.append(folder, tmp_path / "sub", processes=1, progress=False)
    assert len(pq.read_table(tmp_path / "sub" / "labels.parquet")) > len(Store(tmp_path / "sub"))
    monkeypatch.setattr(edit.labels, "write_labels", write_labels)
    edit.append(folder, tmp_path / "sub", processes=1, progress=False)
    assert check(tmp_path / "sub", mine) > mine.keys()


@pytest.mark.parametrize("format", ["jpeg", "h264"])
def test_the_labels_of_a_clip_list(format, tmp_path):
    (tmp_path / "videos").mkdir()
    for name in "ab":
        write(tmp_path / "videos" / f"{name}.mp4", pictures(40, seed=ord(name)))
    tick = 12800 // 25
    clips = {
        "a.mp4": [Span(3, 12, 3 * tick, label=7, id="first"), Span(12, 20, 12 * tick)],
        "b.mp4": [Span(0, 10, 0, label=4), Span(20, 30, 20 * tick, id="last")],
    }
    options = {"format": format, "progress": False, "processes": 1, "short_side": 48}
    pack(tmp_path / "videos", tmp_path / "s", clips=clips, **options)
    with loader(tmp_path / "s", 4) as data:
        batch = data.batch(0)
        rows = sorted(zip(*(batch[name] for name in ("clip", "label", "id")), strict=True))
    assert [(int(number), name) for _, number, name in rows] == [(7, "first"), (-1, ""), (4, ""), (-1, "last")]
    clips["b.mp4"][0] = Span(0, 10, 0, label=5)
    with pytest.raises(UserError, match="other files"):
        pack(tmp_path / "videos", tmp_path / "s", clips=clips, **options)


def test_labels_that_cannot_be_used(labeled, stores, tmp_path):
    path, _ = labeled
    for table, words in (({"label": ["cat"] * 2}, "has 2 rows, the store has"), ({"clip": None}, "cannot read")):
        rows = len(Store(path))
        columns = {name: values or [0] * rows for name, values in table.items()}
        pq.write_table(pa.table(columns), path / "labels.parquet")
        with pytest.raises(UserError, match=words):
            loader(path)
    pq.write_table(pa.table({"label": ["cat"] * rows}), path / "labels.parquet")
    with pytest.raises(UserError, match=r"cannot read .*labels\.parquet"):
        loader(path)
    label(path, 0)
    other = Path(shutil.copytree(stores / "jpeg", tmp_path / "other"))
    pq.write_table(pa.table({"label": [0] * rows, "title": [1] * rows}), other / "labels.parquet")
    with pytest.raises(UserError, match=r"columns of .* differ"):
        edit.merge(tmp_path / "m", [path, other])
    assert not (tmp_path / "m").exists()
