"""Faults of the surroundings are no faults of the files: retried, reported, and never quarantined as such."""

import errno
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
from test_pack import QUIET, contents, quarantine
from videos import pictures, write

from vito_fast.cli.main import main
from vito_fast.data.pack.pack import pack
from vito_fast.data.pack.process_pool import ProcessPool
from vito_fast.data.store.description import Report
from vito_fast.data.store.store import Store
from vito_fast.errors import UserError

WORKER = """
import io, os, signal, sys, time
from pathlib import Path
from vito_fast.data.pack import process_pool as worker
from vito_fast.data.store import media
FLAG = Path({flag!r})
pack_one, read, init = worker._pack_one, media.SourceFile.read, media.SourceFile.__init__
def first_time():
    FLAG.write_text(FLAG.read_text() + "x" if FLAG.exists() else "x")
    return len(FLAG.read_text()) <= {times}
{fault}
sys.argv = ["worker", *sys.argv[1:]]
worker.main()
"""
UNREADABLE = """
def faulty(self, size=-1):
    if "v1" in self.place and first_time():
        self.fault = OSError({errno}, "planted")
        raise self.fault
    return read(self, size)
def opened(self, path):
    self.place = str(path)
    init(self, path)
media.SourceFile.read, media.SourceFile.__init__ = faulty, opened
"""
KILLED = """
def faulty(job, *rest):
    if str(job.path).endswith("v1.mp4") and first_time():
        os.kill(os.getpid(), signal.{signal})
    return pack_one(job, *rest)
worker._pack_one = faulty
"""


@pytest.fixture
def plant(tmp_path, monkeypatch):
    """Makes the workers fail: ``plant(fault, times)``."""
    popen = subprocess.Popen

    def start(fault: str, times: int) -> None:
        script = tmp_path / "faulty.py"
        script.write_text(WORKER.format(fault=fault, times=times, flag=str(tmp_path / "flag")))
        monkeypatch.setattr(
            "vito_fast.data.pack.process_pool.subprocess.Popen", lambda c, **o: popen([c[0], str(script), c[3]], **o)
        )
        monkeypatch.setattr(ProcessPool, "RETRY", (0.01, 0.05))

    return start


OPTIONS = {"clip_length": 1.6, **QUIET}


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ENOENT])
def test_a_disk_that_fails_for_a_while(code, plant, stores, folder, tmp_path):
    plant(UNREADABLE.format(errno=code), 3)
    assert pack(folder, tmp_path / "s", **OPTIONS).rejected == {}
    assert contents(tmp_path / "s") == contents(stores / "jpeg")


def test_a_disk_that_goes_on_failing(plant, stores, folder, tmp_path):
    plant(UNREADABLE.format(errno=errno.EIO), 10**6)
    with pytest.raises(UserError, match=r"1 files could not be packed, 'v1.mp4' for one: cannot be read: planted: rep"):
        pack(folder, tmp_path / "s", io_timeout=0.2, **OPTIONS)
    assert not (tmp_path / "s" / "index.bin").exists()
    report = pack(folder, tmp_path / "s", io_timeout=0.2, skip_unreadable=True, **OPTIONS)
    assert report.rejected == {"cannot be read": 1}
    assert quarantine(tmp_path / "s") == {"v1.mp4": "cannot be read: planted"}


def test_the_same_command_finishes_once_the_disk_is_back(plant, stores, folder, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(ProcessPool, "RETRY", (0.01, 0.05))
        plant(UNREADABLE.format(errno=errno.EIO), 10**6)
        with pytest.raises(UserError, match="repeat the command"):
            pack(folder, tmp_path / "s", io_timeout=0.1, **OPTIONS)
    plant("", 0)
    pack(folder, tmp_path / "s", **OPTIONS)
    assert contents(tmp_path / "s") == contents(stores / "jpeg")


def test_a_source_that_vanishes(folder, tmp_path, monkeypatch):
    """All files fail: the run ends and names the folder. Once it is back, the same command packs all."""
    monkeypatch.setattr(ProcessPool, "RETRY", (0.01, 0.05))
    source = Path(shutil.copytree(folder, tmp_path / "in"))
    run = ProcessPool.run

    for empty, reason in ((False, "No such file"), (True, "it is empty now")):

        def vanish(self, jobs, progress, empty=empty):
            source.rename(tmp_path / "away")
            if empty:
                source.mkdir()  # a mount point
            return run(self, jobs, progress)

        with monkeypatch.context() as patch:
            patch.setattr(ProcessPool, "run", vanish)
            with pytest.raises(UserError, match=rf"the source .*in is gone: {reason}"):
                pack(source, tmp_path / "s", io_timeout=0.1, **OPTIONS)
        shutil.rmtree(source, ignore_errors=True)
        (tmp_path / "away").rename(source)
    assert pack(source, tmp_path / "s", **OPTIONS).packed == 6


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGSEGV"])
def test_a_worker_that_is_killed_once(name, plant, stores, folder, tmp_path):
    plant(KILLED.format(signal=name), 1)
    assert pack(folder, tmp_path / "s", **OPTIONS).rejected == {}
    assert contents(tmp_path / "s") == contents(stores / "jpeg")


def test_a_worker_that_is_killed_twice(plant, folder, tmp_path):
    plant(KILLED.format(signal="SIGKILL"), 2)
    with pytest.raises(UserError, match=r"'v1.mp4' for one: its process was killed twice \(signal 9\)"):
        pack(folder, tmp_path / "s", **OPTIONS)
    assert pack(folder, tmp_path / "s", **OPTIONS).rejected == {}


def test_a_decoder_that_crashes_twice(plant, folder, tmp_path):
    plant(KILLED.format(signal="SIGSEGV"), 2)
    pack(folder, tmp_path / "s", **OPTIONS)
    assert quarantine(tmp_path / "s")["v1.mp4"].startswith("the decoder crashed (exit status -11)")


@pytest.mark.parametrize("parent_too", [False, True])
def test_a_pack_that_is_suspended(parent_too, folder, tmp_path, monkeypatch):
    """A stopped worker does not hang, and no time passes for a stopped group."""
    pids = []
    popen = subprocess.Popen

    def start(*arguments, **options):
        pids.append(popen(*arguments, **options))
        return pids[-1]

    monkeypatch.setattr("vito_fast.data.pack.process_pool.subprocess.Popen", start)
    monkeypatch.setattr(ProcessPool, "SUSPENDED", 1.5)
    wait, stopped = ProcessPool._wait, []

    def stop(self):
        if not stopped and all(worker.started for worker in self._workers):
            stopped.extend(worker.process for worker in self._workers)
            for process in stopped:
                process.send_signal(signal.SIGSTOP)
            threading.Timer(4.0, lambda: [process.send_signal(signal.SIGCONT) for process in stopped]).start()
            if parent_too:
                time.sleep(4.1)
        wait(self)

    monkeypatch.setattr(ProcessPool, "_wait", stop)
    assert pack(folder, tmp_path / "s", decode_timeout=3.0, **OPTIONS).rejected == {}
    assert stopped


def test_a_folder_that_cannot_be_read(folder, tmp_path, monkeypatch):
    source = Path(shutil.copytree(folder, tmp_path / "in"))
    scandir = os.scandir

    def refuse(path="."):
        if str(path).endswith("sub"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    report = pack(source, tmp_path / "s", **OPTIONS)
    assert (report.found, report.packed) == (6, 5)
    assert report.skipped == {"folder cannot be read: Permission denied": 1}
    (line,) = (tmp_path / "s" / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(line)["file"] == "sub/"

    def fail(path="."):
        if str(path).endswith("sub"):
            raise OSError(errno.EIO, "Input/output error", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", fail)
    with pytest.raises(UserError, match="sub: Input/output error: fix that"):
        pack(source, tmp_path / "t", **OPTIONS)


def test_too_many_rejects_are_an_error_of_the_command(folder, tmp_path, capsys):
    source = tmp_path / "in"
    source.mkdir()
    write(source / "a.mp4", pictures(30))
    for number in range(2):
        (source / f"{number}.mp4").write_text(f"text {number}")
    words = ["pack", str(source), str(tmp_path / "s"), "--processes", "1"]
    assert main(words) == 1
    assert "67% of the videos are rejected, more than max_rejected = 0.5" in capsys.readouterr().err
    assert Report(**Store(tmp_path / "s").description["report"]).packed == 1
    assert main([*words, "--max-rejected", "0.7"]) == 0
    assert "3 files found: 1 packed, 2 rejected, 0 skipped" in capsys.readouterr().out
