"""Checkpoint files: whole or refused by name, never unpickled."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from vito_fast.errors import UserError
from vito_fast.train import checkpoint
from vito_fast.train.checkpoint import Checkpointer, checkpoints, find, path_of, read, read_newest, step_of, write

TENSORS = {
    "a": torch.arange(12, dtype=torch.float32).reshape(3, 4).t(),
    "b": torch.tensor(3, dtype=torch.int64),
    "half": torch.randn(5, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
}


def test_what_is_written_is_read(tmp_path):
    write(tmp_path / "x.safetensors", TENSORS, {"step": 3, "nested": {"list": [1, None, "é"]}})
    got = read(tmp_path / "x.safetensors")
    assert got.state == {"step": 3, "nested": {"list": [1, None, "é"]}}
    assert all(torch.equal(got.tensors[k], v) and got.tensors[k].dtype == v.dtype for k, v in TENSORS.items())
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_every_torn_or_changed_file_is_refused_by_name(tmp_path):
    path = tmp_path / "x.safetensors"
    write(path, TENSORS, {"step": 3})
    whole = path.read_bytes()
    broken = {f"cut at {n}": whole[:n] for n in (0, 1, 7, 8, 100, len(whole) // 2, len(whole) - 1)}
    for position in range(8, len(whole), max(1, len(whole) // 60)):
        changed = bytearray(whole)
        changed[position] ^= 1
        broken[f"bit at {position}"] = bytes(changed)
    broken["appended"] = whole + b"x"
    for what, data in broken.items():
        path.write_bytes(data)
        with pytest.raises(UserError) as refusal:
            read(path)
        assert "x.safetensors" in str(refusal.value), what


def test_foreign_files_are_refused_by_name(tmp_path):
    from safetensors.torch import save_file

    torch.save(TENSORS, tmp_path / "pickle.pt")
    save_file({"a": torch.zeros(1)}, tmp_path / "plain.safetensors")
    (tmp_path / "text.txt").write_text("hello")
    for name in ("pickle.pt", "plain.safetensors", "text.txt", "missing"):
        with pytest.raises(UserError, match=name):
            read(tmp_path / name)
    save_file({}, tmp_path / "future.safetensors", metadata={"format": "vito-fast checkpoint", "version": "99"})
    with pytest.raises(UserError, match="version 99"):
        read(tmp_path / "future.safetensors")


def test_the_previous_checkpoint_is_used_and_the_torn_one_named(tmp_path):
    for step in (10, 20, 30):
        write(path_of(tmp_path, step), TENSORS, {"step": step})
    path_of(tmp_path, 30).write_bytes(path_of(tmp_path, 30).read_bytes()[:-5])
    told = []
    found = read_newest(tmp_path, told.append)
    assert found is not None
    assert found.state["step"] == 20
    assert len(told) == 1
    assert "step-00000030.safetensors" in told[0]
    assert find(tmp_path, told.append).state["step"] == 20


def test_a_disk_that_does_not_answer_is_not_a_torn_file(tmp_path, monkeypatch):
    for step in (10, 20):
        write(path_of(tmp_path, step), TENSORS, {"step": step})

    def stale(path, *_):
        raise OSError(errno.ESTALE, "Stale file handle", str(path))

    monkeypatch.setattr(checkpoint, "open", stale, raising=False)
    with pytest.raises(OSError, match=r"Stale file handle.*step-00000020"):  # and not quietly the one before
        read_newest(tmp_path, pytest.fail)


def test_checkpoints_of_which_none_is_whole_are_not_no_checkpoints(tmp_path):
    for step in (10, 20):
        path_of(tmp_path, step).write_bytes(b"torn")
    told = []
    with pytest.raises(
        UserError, match=r"none of the 2 checkpoints .*the newest: .*step-00000020\.safetensors is torn"
    ):
        read_newest(tmp_path, told.append)
    assert told == []  # all is in the error, and nothing is tried next


def test_runs_without_checkpoints(tmp_path):
    assert read_newest(tmp_path / "none", lambda _: None) is None
    with pytest.raises(UserError, match="no run or checkpoint"):
        find(tmp_path / "none", lambda _: None)
    with pytest.raises(UserError, match="holds no usable checkpoint"):
        find(tmp_path, lambda _: None)


def test_the_newest_and_every_kth_are_kept(tmp_path):
    saver = Checkpointer(tmp_path, keep_last=2, keep_every=4)
    for step in range(1, 11):
        saver.save(step, {"a": torch.full((2,), float(step))}, {"step": step})
    saver.close()
    assert [int(p.stem[5:]) for p in checkpoints(tmp_path)] == [10, 9, 8, 4]


def test_files_that_were_refused_take_no_place_of_good_ones(tmp_path):
    for step in (6, 9, 12, 15):
        write(path_of(tmp_path, step), TENSORS, {"step": step})
    for step in (12, 15):
        path_of(tmp_path, step).write_bytes(b"torn")
    saver = Checkpointer(tmp_path, keep_last=2, start=9)
    left = []
    for step in (11, 12, 14):
        saver.save(step, TENSORS, {"step": step})
        saver.wait()
        left.append([step_of(path) for path in checkpoints(tmp_path)])
    saver.close()
    assert left == [[15, 12, 11, 9], [15, 12, 11], [15, 14, 12]]


def test_saving_copies_before_it_returns(tmp_path):
    tensor = torch.zeros(1000, 1000)
    saver = Checkpointer(tmp_path, keep_last=1)
    path = saver.save(1, {"a": tensor}, {"step": 1})
    tensor.fill_(7)
    saver.close()
    assert read(path).tensors["a"].abs().max() == 0


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    begun, go_on = threading.Event(), threading.Event()

    def slow(*given):
        begun.set()
        assert go_on.wait(60)
        write(*given)

    monkeypatch.setattr(checkpoint, "write", slow)
    saver = Checkpointer(tmp_path, keep_last=1)
    path = saver.save(1, {"a": torch.zeros(3)}, {"step": 1})  # returns, though the disk does not
    assert begun.wait(60)
    assert not path.exists()
    go_on.set()
    saver.close()
    assert read(path).state == {"step": 1}


def test_a_failed_write_is_raised_and_leaves_nothing(tmp_path):
    saver = Checkpointer(tmp_path / "c", keep_last=1)
    (tmp_path / "c").rmdir()
    saver.save(1, TENSORS, {})
    with pytest.raises(OSError, match="No such file"):
        saver.wait()


def test_after_a_failed_write_the_newer_state_is_tried(tmp_path, full_disk, capsys):
    saver = Checkpointer(tmp_path, keep_last=2)
    with full_disk(100):
        saver.save(1, TENSORS, {"step": 1})
        assert saver._pending is not None
        saver._pending.exception()
    saver.save(2, TENSORS, {"step": 2})
    warning = capsys.readouterr().err
    assert warning.startswith("warning: ")
    assert "step-00000001.safetensors" in warning
    assert warning.endswith("; trying again after step 2\n")
    assert [step_of(path) for path in checkpoints(tmp_path)] == [2]
    with full_disk(100):
        saver.save(3, TENSORS, {"step": 3})
        with pytest.raises(OSError, match="step-00000004"):
            saver.save(4, TENSORS, {"step": 4})
        saver.save(5, TENSORS, {"step": 5})
        with pytest.raises(OSError, match="step-00000005"):
            saver.close()


WRITER = """
import sys, torch
from pathlib import Path
from vito_fast.train import checkpoint
from vito_fast.train.checkpoint import Checkpointer
saver = Checkpointer(Path(sys.argv[1]), keep_last=3)
for step in range(1, 100000):
    saver.save(step, {"a": torch.full((256, 1024), float(step))}, {"step": step})
    saver.wait()
    print(step, flush=True)
"""


def test_kill_9_while_writing_loses_nothing_said_to_be_saved(tmp_path):
    for attempt in range(3):
        folder = tmp_path / str(attempt)
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(folder)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for _ in range(3 + attempt):
            process.stdout.readline()
        time.sleep(0.003 * attempt)
        process.send_signal(signal.SIGKILL)
        said = [int(line) for line in process.stdout.read().split()]
        process.wait()
        refused = []
        found = read_newest(folder, refused.append)
        assert found is not None
        assert found.state["step"] >= max([3 + attempt, *said])
        assert found.tensors["a"][0, 0] == found.state["step"]
        assert refused == []
        Checkpointer(folder, keep_last=3).close()
        assert not list(folder.glob(".*"))


def test_the_header_is_plain_json(tmp_path):
    path = tmp_path / "x.safetensors"
    write(path, TENSORS, {"step": 3})
    size = int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(path.read_bytes()[8 : 8 + size])
    assert header["__metadata__"]["format"] == "vito-fast checkpoint"
