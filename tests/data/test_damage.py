"""A store that is not as packing left it: named with what is wrong, by packing as by reading."""

import json
import os
import shutil
import struct
from pathlib import Path

import pytest

from vito_fast.cli.main import main
from vito_fast.config import Config, DataConfig
from vito_fast.data.pack.pack import pack
from vito_fast.data.store.store import Store
from vito_fast.errors import UserError
from vito_fast.train import attention_maps as attention
from vito_fast.train import probe as monitor

QUIET = {"progress": False, "processes": 2, "short_side": 32}


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def _empty(path: Path) -> None:
    os.truncate(path, 0)


@pytest.mark.parametrize(
    ("name", "harm"),
    [
        ("index.bin", _cut), ("index.bin", _empty), ("store.json", _cut), ("store.json", Path.unlink),
        ("shard-*.bin", _cut), ("shard-*.bin", _empty), ("shard-*.bin", Path.unlink),
    ],
)  # fmt: skip
def test_a_damaged_store_is_not_called_packed(stores, folder, tmp_path, name, harm):
    store = Path(shutil.copytree(stores / "jpeg", tmp_path / "s"))
    path = next(store.glob(name))
    harm(path)
    with pytest.raises(UserError, match=rf"{path.name} is damaged: .*; delete the store and pack again$"):
        pack(folder, store, format="jpeg", clip_length=1.6, **QUIET)


def test_a_damaged_description(stores, folder, tmp_path):
    store = Path(shutil.copytree(stores / "jpeg", tmp_path / "s"))
    path = store / "store.json"
    good = json.loads(path.read_text())
    report = good["report"]
    for bad in (
        [], "", 1, {"version": 1}, {**good, "version": "1"}, {**good, "sources": 3},
        {**good, "options": []}, {**good, "options": {"more": 1}}, {**good, "options": {"encoder": 5}},
        {**good, "options": {"quality": "x"}}, {**good, "report": None}, {**good, "report": {**report, "more": 1}},
        {**good, "report": {"clips": "x"}}, {**good, "report": {"hours": True}},
        {**good, "report": {"rejected": {"a": "b"}}},
    ):  # fmt: skip
        path.write_text(json.dumps(bad))
        with pytest.raises(UserError, match=r"store\.json is damaged: .*; delete the store and pack again$"):
            Store(store)
    path.write_text("[" * 200_000)
    with pytest.raises(UserError, match=r"store\.json is damaged: "):
        pack(folder, store, format="h264", **QUIET)
    path.write_text(json.dumps(good))
    assert len(Store(store)) == 7


def _spoil(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 0x55
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["index.bin", "shard-00000.bin"])
def test_attention_of_a_damaged_clip(stores, tmp_path, monkeypatch, capsys, name):
    """Its record or its packets are spoilt: one line that says so, and training goes on without the pictures."""
    store = Path(shutil.copytree(stores / "jpeg", tmp_path / "s"))
    (records,) = struct.unpack_from("<Q", (store / "index.bin").read_bytes(), 48)
    packet = int(Store(store).index.packets(0).offsets[20])  # of the frame in the middle
    _spoil(store / name, records if name == "index.bin" else packet)
    config = Config(data=DataConfig(store=str(store)))
    assert monitor._shown(config, Store(store)) is None
    assert capsys.readouterr().out.startswith("warning: no attention pictures: ")
    for part in ("find", "load_online"):
        monkeypatch.setattr(attention, part, lambda _: None)
    monkeypatch.setattr(attention, "config_of", lambda _: config)
    assert main(["attention", "run", str(store), str(tmp_path / "a.png")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert str(store) in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("text", ["{", "[]", "{}", "[" * 200_000, '{"encoder": 3}'])
def test_damaged_options_of_a_begun_store(folder, tmp_path, text):
    (tmp_path / "s" / ".pack").mkdir(parents=True)
    (tmp_path / "s" / ".pack" / "options.json").write_text(text)
    for format in ("jpeg", "h264"):
        with pytest.raises(UserError, match=r"\.pack/options\.json|begun with format=None"):
            pack(folder, tmp_path / "s", format=format, **QUIET)
