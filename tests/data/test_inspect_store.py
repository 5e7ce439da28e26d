"""inspect-store finds every planted fault and says what a store holds."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vito_fast.cli import store as cli_store
from vito_fast.data.store.index import Index
from vito_fast.data.store.inspect import inspect_store
from vito_fast.errors import UserError


@pytest.mark.parametrize("format", ["jpeg", "h264", "copy"])
def test_a_good_store(format, stores, tmp_path):
    found = inspect_store(stores / format, sheet=tmp_path / "sheet.png", progress=False)
    assert found.damaged == []
    assert (found.format, found.clips, found.videos, found.frames) == (format, 7, 6, 280)
    assert found.codecs == {"mjpeg" if format == "jpeg" else "h264": 7}
    assert found.sizes == {"64x48" if format == "copy" else "42x32": 7}
    assert found.seconds == pytest.approx((1.6, 1.6, 1.6))
    assert "checksums: 7 clips good, 0 damaged" in found.lines()
    with Image.open(tmp_path / "sheet.png") as sheet:
        pixels = np.asarray(sheet)
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 500, "the frames are on it"


@pytest.mark.parametrize("format", ["jpeg", "h264", "copy"])
def test_planted_faults(format, stores, tmp_path):
    store = shutil.copytree(stores / format, tmp_path / "s")
    index = Index(store / "index.bin")
    clip, packets = index.clip(3), index.packets(3)
    shard = store / index.shards[clip.shard][0]
    data = bytearray(shard.read_bytes())
    data[int(packets.offsets[20]) + 7] ^= 1
    shard.write_bytes(data)
    (bad,) = inspect_store(store, progress=False).damaged
    assert (bad.clip, bad.source) == (3, clip.source)
    assert bad.reason.startswith("checksum: ")
    with pytest.raises(UserError, match=r"1 of 7 clips of .* are damaged; delete the store and pack again"):
        cli_store.inspect_store(store, pictures=2)
    assert (store / "contact-sheet.png").exists()
    shard.write_bytes(data[: int(packets.offsets[20]) + 7])
    found = inspect_store(store, sheet=tmp_path / "sheet.png", progress=False)
    assert 3 in {bad.clip for bad in found.damaged}
    assert any(bad.reason.startswith("truncated: ") for bad in found.damaged)
    assert any(line.startswith("damaged: clip 3 (") for line in found.lines())
    shard.unlink()
    found = inspect_store(store, progress=False)
    assert {bad.reason.split(":")[0] for bad in found.damaged} == {"missing"}
    assert inspect_store(store, verify=False, progress=False).damaged == []


def test_no_store(tmp_path, stores):
    with pytest.raises(UserError, match="is no store: run `vito-fast pack"):
        inspect_store(tmp_path, progress=False)
    other = shutil.copytree(stores / "jpeg", tmp_path / "other")
    text = (other / "store.json").read_text()
    (other / "store.json").write_text(text.replace('"version": 1', '"version": 2'))
    with pytest.raises(UserError, match="is a store of version 2, this program reads version 1"):
        inspect_store(other, progress=False)
    (other / "store.json").write_text(text[:50])
    with pytest.raises(UserError, match=r"store\.json is damaged"):
        inspect_store(other, progress=False)
    (other / "store.json").write_text(text)
    (other / "index.bin").write_bytes(b"no index")
    with pytest.raises(UserError, match=r"index\.bin is damaged: it is not the index of a vito-fast store; delete"):
        inspect_store(other, progress=False)
    (other / "index.bin").unlink()
    os.mkfifo(other / "index.bin")
    with pytest.raises(UserError, match=r"index\.bin is damaged: it is no regular file"):
        inspect_store(other, progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pictures": 0}, "pictures is 0, must be at least 1"),
        ({"pictures": -3}, "pictures is -3, must be at least 1"),
        ({"threads": -1}, "threads is -1, must be at least 0"),
        ({"sheet": Path("x.foo")}, r"must be a \.png, got x\.foo"),
        ({"sheet": Path("x")}, r"must be a \.png, got x"),
        ({"sheet": Path("/nope/x.png")}, r"cannot write /nope/x\.png: there is no folder /nope"),
    ],
)
def test_mistakes_are_told_before_the_work(stores, options, message, monkeypatch):
    monkeypatch.setattr("vito_fast.data.store.inspect._verify", lambda *_: pytest.fail("verified first"))
    with pytest.raises(UserError, match=message):
        cli_store.inspect_store(stores / "jpeg", **options)


def test_an_error_of_reading_is_not_one_of_the_sheet(stores, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(5, "Input/output error", "shard-00000.bin")

    monkeypatch.setattr("vito_fast.data.store.inspect._verify", fail)
    with pytest.raises(OSError, match=r"Input/output error: 'shard-00000\.bin'"):
        cli_store.inspect_store(stores / "jpeg", sheet=tmp_path / "sheet.png")
