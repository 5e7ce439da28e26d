"""The Ray engine on a local cluster: the same rows, and the same bytes, as the local one."""

import os
import sys

import pytest
from test_engine import STEP, items, table

from vito_fast.curate import engine as engines
from vito_fast.curate.engine import Engine, run
from vito_fast.errors import UserError

try:
    import ray
except ModuleNotFoundError:
    ray = None


@pytest.mark.skipif(ray is None, reason="needs the extra [ray]")
def test_ray_makes_the_units_of_the_local_engine(tmp_path, monkeypatch):
    monkeypatch.setattr(engines, "UNIT", 4)
    run(STEP, items(8, n5="segfault"), tmp_path / "local", Engine(processes=1))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))  # workers import the step
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        run(STEP, items(8, n5="segfault"), tmp_path / "ray", Engine("ray"))
    finally:
        ray.shutdown()
    assert table(tmp_path / "ray") == table(tmp_path / "local")
    units = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("local", "ray")]
    assert units[0] == units[1]


@pytest.mark.skipif(ray is not None, reason="needs Ray to be missing")
def test_a_missing_ray_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"vito-fast\[ray\]"):
        run(STEP, items(1), tmp_path, Engine("ray"))
