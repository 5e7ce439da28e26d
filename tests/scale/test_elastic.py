"""A rank or a node dies under torchrun: the launchers start all ranks again, and nobody need look."""

import dataclasses
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from ranks import spawn

from vito_fast.config_files import save_config
from vito_fast.train import stop
from vito_fast.train.checkpoint import Checkpointer, checkpoints, read, step_of
from vito_fast.train.distributed import _store_of_this_attempt, init_distributed
from vito_fast.train.loop import _train
from vito_fast.train.metrics import TIMINGS, read_rows
from vito_fast.train.run import open_run
from vito_fast.train.trainer import Trainer

STEPS = 20


@pytest.fixture
def config(small_run, tmp_path):
    return shorter(small_run(tmp_path))


def shorter(config):
    train = dataclasses.replace(config.train, log_every=1, checkpoint_every=5)
    return dataclasses.replace(config, train=train, schedule=dataclasses.replace(config.schedule, epochs=STEPS / 2))


def folder(config):
    return Path(config.train.runs) / config.name


@pytest.fixture(scope="module")
def whole(small_run, tmp_path_factory):
    """What nothing disturbed: the last checkpoint and the rows."""
    config = shorter(small_run(tmp_path_factory.mktemp("whole")))
    checkpoint, rows, out = end(config, _torchrun(config, ONE_NODE))
    assert "continues after" not in out
    return checkpoint, rows


@pytest.fixture
def torchrun():
    """Starts a launcher of a run of two ranks as docs/scaling.md does; it may start its ranks again."""
    started = []
    yield lambda config, *node: started.append(_torchrun(config, node or ONE_NODE)) or started[-1]
    for launcher in started:  # it takes its ranks with it
        launcher.terminate()
        launcher.communicate()


ONE_NODE = ("--standalone", "--nproc-per-node", "2", "--max-restarts", "1")


def one_of_two_nodes(port):
    """Options of a launcher with one rank of two; the first launcher to come holds the store."""
    meeting = ("--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "run")
    return ("--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "3", *meeting)


def _torchrun(config, node):
    path = folder(config).parent.parent / f"{config.name}.yaml"
    save_config(config, path)
    command = [sys.executable, "-m", "torch.distributed.run", *node, "-m", "vito_fast", "train", str(path), "--resume"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if node is not ONE_NODE:
        environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True)


def await_step(config, step, launcher):
    while not any(row["step"] >= step for row in read_rows(folder(config) / "metrics.jsonl")):
        assert launcher.poll() is None, launcher.communicate()[0][-3000:]
        time.sleep(0.01)


def children(launcher):
    return [int(child) for child in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()]


def rank_process(launcher, rank):
    """Number of the launcher's child that is ``rank``."""
    for child in children(launcher):
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return child
    pytest.fail(f"the launcher has no rank {rank}")


def end(config, launcher):
    """The last checkpoint and the rows of a run that ended well, and what it printed."""
    out = launcher.communicate(timeout=200)[0]
    assert launcher.returncode == 0, out[-3000:]
    rows = [{k: v for k, v in row.items() if k not in TIMINGS} for row in read_rows(folder(config) / "metrics.jsonl")]
    return read(checkpoints(folder(config) / "checkpoints")[0]), rows, out


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_in_a_restart_and_the_same_weights(config, torchrun, victim, whole):
    launcher = torchrun(config)
    await_step(config, STEPS // 2, launcher)
    os.kill(rank_process(launcher, victim), signal.SIGKILL)
    again, rows, out = end(config, launcher)
    assert f"{folder(config)} continues after step" in out
    assert_same_run(again, rows, *whole)


def assert_same_run(again, rows, whole, whole_rows):
    assert again.state["step"] == whole.state["step"] == STEPS
    assert rows == whole_rows
    assert again.tensors.keys() == whole.tensors.keys()
    assert [name for name, tensor in whole.tensors.items() if not torch.equal(tensor, again.tensors[name])] == []


@pytest.mark.parametrize("dies", ["a rank", "a node"])
def test_two_nodes_go_on_after_one_lost_a_rank_or_was_replaced(config, torchrun, dies, whole):
    port = 24000 + os.getpid() % 20000
    node = one_of_two_nodes(port)
    keeper = torchrun(config, *node)
    await_port(port, keeper)
    other = torchrun(config, *node)
    await_step(config, STEPS // 2, keeper)
    ranks = children(other)
    if dies == "a node":
        other.kill()
    for rank in ranks:
        os.kill(rank, signal.SIGKILL)
    if dies == "a node":
        other = torchrun(config, *node)
    again, rows, out = end(config, keeper)
    out += other.communicate(timeout=60)[0]
    assert other.returncode == 0, out[-3000:]
    assert f"{folder(config)} continues after step" in out
    assert_same_run(again, rows, *whole)


def await_port(port, launcher):
    while launcher.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    pytest.fail(launcher.communicate()[0][-3000:])


def _told(rank, config, out):
    """Rank 1 is told to end during its fifth step; rank 0 takes its time to write."""
    step, honest = Trainer.step, Checkpointer._write

    def told(trainer, *args, **options):
        if rank == 1 and trainer.step_count == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer, *args, **options)

    def slow(saver, *args):
        time.sleep(1)
        honest(saver, *args)

    Trainer.step, Checkpointer._write, stop.ASK_EVERY = told, slow, 0.1
    with open_run(config, init_distributed("cpu"), False, None) as run:
        told_by = _train(run, False, None)["signal"]
    saved = [step_of(path) for path in checkpoints(folder(config) / "checkpoints")]
    (out / f"{rank}").write_text(f"{told_by} after {run.trainer.step_count}, saved {saved}")


def test_one_rank_s_signal_ends_all_between_logged_steps_once_all_is_saved(small_run, tmp_path):
    config = small_run(tmp_path)
    rare = dataclasses.replace(config.train, log_every=10**6, checkpoint_every=10**6)
    spawn(_told, 2, dataclasses.replace(config, train=rare), tmp_path)
    first, second = ((tmp_path / rank).read_text() for rank in "01")
    assert first == second
    step = int(re.fullmatch(r"SIGTERM after (\d+), saved \[\1\]", first)[1])
    assert 5 <= step < 100, "of 120"


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
