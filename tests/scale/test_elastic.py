"""A rank dies under torchrun: the launcher starts all of them again, and nobody need look."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from vito_fast.checkpoint import checkpoints, read
from vito_fast.config import save_config
from vito_fast.distributed import _store_of_this_attempt
from vito_fast.metrics import TIMINGS, read_rows

STEPS = 40


@pytest.fixture
def config(config):
    train = dataclasses.replace(config.train, log_every=1, checkpoint_every=5)
    return dataclasses.replace(config, train=train, schedule=dataclasses.replace(config.schedule, epochs=STEPS / 2))


def folder(config):
    return Path(config.train.runs) / config.name


@pytest.fixture
def torchrun():
    """Starts a run on two ranks as docs/scaling.md does; it may be started again once."""
    started = []
    yield lambda config: started.append(_torchrun(config)) or started[-1]
    for launcher in started:  # it takes its ranks with it
        launcher.terminate()
        launcher.communicate()


def _torchrun(config):
    path = folder(config).parent.parent / f"{config.name}.yaml"
    save_config(config, path)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", "1", "-m", "vito_fast", "train", str(path), "--resume"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True)


def rank_process(launcher, rank):
    """Number of the launcher's child that is ``rank``."""
    for child in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split():
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    pytest.fail(f"the launcher has no rank {rank}")


def end(config, launcher):
    """The last checkpoint and the rows of a run that ended well, and what it printed."""
    out = launcher.communicate(timeout=200)[0]
    assert launcher.returncode == 0, out[-3000:]
    rows = [{k: v for k, v in row.items() if k not in TIMINGS} for row in read_rows(folder(config) / "metrics.jsonl")]
    return read(checkpoints(folder(config) / "checkpoints")[0]), rows, out


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_in_a_restart_and_the_same_weights(config, torchrun, victim):
    killed = dataclasses.replace(config, name="killed")
    whole, whole_rows, out = end(config, torchrun(config))
    assert "goes on after" not in out
    launcher = torchrun(killed)
    while not any(row["step"] >= STEPS // 2 for row in read_rows(folder(killed) / "metrics.jsonl")):
        assert launcher.poll() is None, launcher.communicate()[0][-3000:]
        time.sleep(0.01)
    os.kill(rank_process(launcher, victim), signal.SIGKILL)
    again, rows, out = end(killed, launcher)
    assert f"{folder(killed)} goes on after step" in out
    assert again.state["step"] == whole.state["step"] == STEPS
    assert rows == whole_rows
    assert again.tensors.keys() == whole.tensors.keys()
    assert [name for name, tensor in whole.tensors.items() if not torch.equal(tensor, again.tensors[name])] == []


def test_what_dead_processes_left_in_the_launchers_store_is_not_seen(monkeypatch):
    """The launcher keeps its store over restarts; whether stale addresses are read from it is else a race."""
    kept = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    launcher = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(kept.port), "RANK": "1", "WORLD_SIZE": "2"}
    launcher |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "GROUP_WORLD_SIZE": "1"}
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    for attempt in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
        store = _store_of_this_attempt()
        assert not store.check(["address"])
        store.set("address", attempt)
        assert _store_of_this_attempt().get("address") == attempt.encode()  # the other ranks of the attempt do see it
