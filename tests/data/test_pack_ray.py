"""Packing on a local Ray cluster: the clips of packing here, also after a task that dies."""

import os
import sys
from dataclasses import replace

import pytest
from test_pack import contents

from vito_fast.cli.main import main
from vito_fast.data.pack.on_ray import pack_on_ray
from vito_fast.data.store.store import Store
from vito_fast.errors import UserError

try:
    import ray
except ModuleNotFoundError:
    ray = None

OPTIONS = {"short_side": 32, "clip_length": 1.6}


@pytest.mark.skipif(ray is None, reason="needs the extra [ray]")
def test_a_store_packed_on_ray_is_that_packed_here(folder, stores, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        report = pack_on_ray(folder, tmp_path / "s", **OPTIONS)
        assert contents(tmp_path / "s") == contents(stores / "jpeg")
        here = Store(stores / "jpeg")
        assert Store(tmp_path / "s").digest == here.digest
        assert replace(report, bytes=0) == replace(here.report, bytes=0)
        words = ["pack", str(folder), str(tmp_path / "s"), "--engine", "ray", "--short-side", "32"]
        assert main([*words, "--clip-length", "1.6"]) == 0, "a finished store is left as it is"
        with pytest.raises(UserError, match="no such file or folder"):
            pack_on_ray(tmp_path / "gone", tmp_path / "t", **OPTIONS)
    finally:
        ray.shutdown()
    assert main([*words, "--shard", "1/2"]) == 2
    assert "leave out --shard and --processes" in capsys.readouterr().err


@pytest.mark.skipif(ray is not None, reason="needs Ray to be missing")
def test_packing_without_ray_is_one_line(folder, tmp_path):
    with pytest.raises(UserError, match=r"vito-fast\[ray\]"):
        pack_on_ray(folder, tmp_path / "s", **OPTIONS)
