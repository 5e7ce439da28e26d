"""A file is the old one or the whole new one."""

import errno
import os
import stat

import pytest
import torch
from safetensors.torch import save_file

from vito_fast.files import atomic_write, file_lock
from vito_fast.train.checkpoint import write
from vito_fast.train.metrics import RowFile


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")

    def interrupted():
        with atomic_write(path) as partial:
            partial.write_text("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a", "old")]
    with atomic_write(path) as partial:
        partial.write_text("new")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a", "new")]


def mode_of(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_modes_are_those_of_any_new_file_or_the_old_ones(tmp_path):
    def written(name):
        with atomic_write(tmp_path / name) as partial:
            save_file({}, partial)  # which puts a file of mode 0600 there
        return mode_of(tmp_path / name)

    before = os.umask(0o027)
    try:
        assert written("a") == 0o640
        (tmp_path / "a").chmod(0o604)
        assert written("a") == 0o604
        write(tmp_path / "step-00000001.safetensors", {"a": torch.zeros(1)}, {})
        assert mode_of(tmp_path / "step-00000001.safetensors") == 0o640
    finally:
        os.umask(before)


def test_a_full_disk_is_named(tmp_path, full_disk, capsys):
    """A row that the disk does not take is kept: it is there once the disk has room."""
    with full_disk(10):
        with pytest.raises(OSError, match="File too large") as full, atomic_write(tmp_path / "a") as partial:
            partial.write_text("more than ten bytes")
        rows = RowFile(tmp_path / "rows", 0)
        rows.append({"step": 1})
        assert capsys.readouterr().out.startswith(f"warning: {tmp_path / 'rows'} is behind: File too large")
        with pytest.raises(OSError, match="File too large") as row:
            rows.sync()
    rows.close()
    assert (full.value.filename, row.value.filename) == (str(tmp_path / "a"), str(tmp_path / "rows"))
    assert [p.name for p in tmp_path.iterdir()] == ["rows"]
    assert (tmp_path / "rows").read_text() == '{"step": 1}\n'


def test_a_full_disk_under_tensors_is_named(tmp_path, full_disk):
    with (
        full_disk(100),
        pytest.raises(OSError, match="File too large") as full,
        atomic_write(tmp_path / "a") as partial,
    ):
        save_file({"x": torch.zeros(100)}, partial)
    assert full.value.filename == str(tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_the_file_is_on_the_disk_before_its_name_and_then_its_name(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (done.append(os.readlink(f"/proc/self/fd/{file}")), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda *names: (done.append("renamed"), replace(*names)))
    with atomic_write(tmp_path / "a") as partial:
        partial.write_text("new")
    assert done == [str(partial), "renamed", str(tmp_path)]


def test_two_that_write_one_file_do_not_meet(tmp_path, monkeypatch):
    with atomic_write(tmp_path / "a") as mine:
        mine.write_text("mine")
        monkeypatch.setattr(os, "getpid", lambda: -1)
        with atomic_write(tmp_path / "a") as theirs:
            theirs.write_text("theirs")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a", "mine")]


def test_a_lock_is_had_once_and_waited_for(tmp_path):
    with file_lock(tmp_path / "lock") as mine, file_lock(tmp_path / "lock", timeout=0.15) as theirs:
        assert (mine, theirs) == (True, False)
    with file_lock(tmp_path / "lock") as again:
        assert again


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_where_the_file_system_has_no_locks_everyone_goes_on(tmp_path, monkeypatch, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refuse)
    with file_lock(tmp_path / "lock") as mine:
        assert mine
