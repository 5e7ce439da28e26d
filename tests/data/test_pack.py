"""Packing: what comes in, what is left out and why, and that nothing is lost when it is killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest
from videos import pictures, write

from vito_fast.data.pack.clips import ShardWriter
from vito_fast.data.pack.encode import choose_encoder
from vito_fast.data.pack.pack import pack
from vito_fast.data.pack.process_pool import ProcessPool
from vito_fast.data.pack.remux import Remuxer, _ticks
from vito_fast.data.store.description import PackOptions, Report
from vito_fast.data.store.index import Index
from vito_fast.data.store.media import BadVideo, presentation_times
from vito_fast.data.store.picture import fitted
from vito_fast.data.store.store import Store, frames
from vito_fast.errors import UserError

QUIET = {"progress": False, "processes": 2, "short_side": 32}


def quarantine(store: Path) -> dict[str, str]:
    lines = (store / "quarantine.jsonl").read_text().splitlines()
    return {entry["file"]: entry["reason"] for entry in map(json.loads, lines)}


def contents(path: Path) -> list[tuple]:
    """What the clips of a store are, wherever their packets lie."""
    index = Index(path / "index.bin")
    result = []
    for number in range(len(index)):
        clip, packets = index.clip(number), index.packets(number)
        result.append((clip.source, clip.video, clip.codec, packets.checksums.tolist(), packets.pts.tolist(), clip.end))
    return result


def test_report_and_order(stores, folder):
    store = Store(stores / "jpeg")
    report = Report(**store.description["report"])
    assert report.videos == 6
    assert report.frames == 5 * 40 + 80 == store.index.num_frames
    assert report.hours == pytest.approx(280 / 25 / 3600)
    assert report.frame_rates == {"25": 6}
    assert report.short_shots == 1, "the last 0.8 seconds of the long one"
    assert report.rejected == {}
    assert report.packets_per_frame == 1.0
    assert report.bytes == sum(path.stat().st_size for path in store.path.glob("shard-*.bin"))
    clips = [store.index.clip(i) for i in range(len(store))]
    assert [clip.source for clip in clips] == sorted(clip.source for clip in clips)
    assert len({clip.video for clip in clips}) == 6
    assert [clip.num_frames for clip in clips if clip.source == "sub/long.mkv"] == [40, 40]
    assert all(clip.constant_rate for clip in clips)
    assert not (store.path / ".pack").exists()


@pytest.mark.parametrize("format", ["jpeg", "h264", "copy"])
def test_same_clips_whatever_the_processes(format, stores, folder, tmp_path):
    pack(
        folder, tmp_path / "s", format=format, short_side=32, clip_length=1.6, progress=False, processes=1, shard_mib=1
    )
    assert contents(tmp_path / "s") == contents(stores / format)


@pytest.mark.parametrize("format", ["jpeg", "h264", "copy"])
def test_times_are_those_of_the_source(format, stores):
    index = Index(stores / format / "index.bin")
    clips = [number for number in range(len(index)) if index.clip(number).source == "sub/long.mkv"]
    assert [index.clip(number).start for number in clips] == pytest.approx([0, 1.6])
    assert index.times(clips[1]) == pytest.approx(1.6 + np.arange(40) / 25)


def test_packets_per_frame(stores):
    report = Report(**Store(stores / "h264").description["report"])
    assert 1.0 < report.packets_per_frame <= 4.6
    index = Index(stores / "h264" / "index.bin")
    assert (np.flatnonzero(index.packets(0).flags & 1) == np.arange(0, 40, 8)).all()


def test_repeating_a_finished_pack_does_nothing(stores, folder):
    before = {path: path.stat().st_mtime_ns for path in (stores / "jpeg").iterdir()}
    report = pack(folder, stores / "jpeg", format="jpeg", clip_length=1.6, **QUIET)
    assert report == Report(**Store(stores / "jpeg").description["report"])
    assert {path: path.stat().st_mtime_ns for path in (stores / "jpeg").iterdir()} == before


def test_other_options_or_files_into_a_finished_store(stores, folder, tmp_path):
    with pytest.raises(UserError, match="finished store with quality=90, not 80"):
        pack(folder, stores / "jpeg", format="jpeg", clip_length=1.6, quality=80, **QUIET)
    write(tmp_path / "other.mp4", pictures(5))
    with pytest.raises(UserError, match="of other files"):
        pack(tmp_path, stores / "jpeg", format="jpeg", clip_length=1.6, **QUIET)


def test_parts_make_the_same_store(stores, folder, tmp_path):
    options = {"format": "jpeg", "clip_length": 1.6, **QUIET}
    first = pack(folder, tmp_path / "s", shard="2/3", **options)
    assert not first.complete
    assert not (tmp_path / "s" / "index.bin").exists()
    with pytest.raises(UserError, match=r"no finished store: run `vito-fast pack SRC"):
        Store(tmp_path / "s")
    assert not pack(folder, tmp_path / "s", shard="1/3", **options).complete
    assert pack(folder, tmp_path / "s", shard="3/3", **options).complete
    assert contents(tmp_path / "s") == contents(stores / "jpeg")


def test_killed_and_resumed(stores, folder, tmp_path):
    """kill -9 at several moments: the resumed store is that of an undisturbed run, no byte of the shards is astray."""
    program = (
        "import sys; from vito_fast.data.pack.pack import pack;"
        "pack(sys.argv[1], sys.argv[2], format='jpeg', clip_length=1.6, progress=False, processes=1, short_side=32)"
    )
    target = tmp_path / "s"
    kills = 0
    for _ in range(3):
        child = subprocess.Popen(
            [sys.executable, "-c", program, folder, target], env=os.environ, start_new_session=True
        )
        goal = kills + 1
        while child.poll() is None:
            journal = target / ".pack" / "part-1-of-1.jsonl"
            if journal.exists() and journal.read_bytes().count(b"\n") >= goal:
                os.kill(child.pid, signal.SIGKILL)
                child.wait()
                kills += 1
                break
            time.sleep(0.01)
    assert kills >= 1
    journal = target / ".pack" / "part-1-of-1.jsonl"
    done = journal.read_bytes().count(b"\n")
    with open(journal, "ab") as file:
        file.write(b'{"file": "half a li')
    shard = next(iter(target.glob("shard-*.bin")))
    with open(shard, "ab") as file:
        file.write(b"left behind")
    assert not (target / "index.bin").exists()
    report = pack(folder, target, format="jpeg", clip_length=1.6, **QUIET)
    assert done >= 1
    assert contents(target) == contents(stores / "jpeg")
    assert report.bytes == sum(
        int(Index(target / "index.bin").packets(clip).sizes.sum()) for clip in range(len(Index(target / "index.bin")))
    )


def test_other_options_into_a_begun_store(folder, tmp_path):
    pack(folder, tmp_path / "s", shard="1/2", **QUIET)
    with pytest.raises(UserError, match="begun with format=jpeg, not h264"):
        pack(folder, tmp_path / "s", shard="2/2", format="h264", **QUIET)
    with pytest.raises(UserError, match="begun with parts=2, not 3"):
        pack(folder, tmp_path / "s", shard="2/3", **QUIET)


@pytest.fixture
def awkward(tmp_path):
    """Good and bad files side by side."""
    root = tmp_path / "in"
    root.mkdir()
    good = write(root / "good.mp4", pictures(30))
    shutil.copy(good, root / "again.mp4")
    (root / "text.mp4").write_text("this is no video")
    (root / "empty.mp4").touch()
    path = write(root / "damaged.mp4", pictures(60, seed=4), gop=60, options={"preset": "veryfast"})
    damaged = bytearray(path.read_bytes())
    middle = len(damaged) // 2
    damaged[middle : middle + 1500 : 3] = bytes(byte ^ 0x5A for byte in damaged[middle : middle + 1500 : 3])
    path.write_bytes(damaged)
    (root / "no-moov.mp4").write_bytes(good.read_bytes()[:-2000])
    write(root / "short.mp4", pictures(10))
    with av.open(str(good)) as reader, av.open(str(root / "cut.mp4"), "w", options={"movflags": "faststart"}) as writer:
        stream = writer.add_stream_from_template(reader.streams.video[0])
        for packet in reader.demux(video=0):
            if packet.size:
                packet.stream = stream
                writer.mux(packet)
    with av.open(str(root / "cut.mp4")) as reader:
        places = [packet.pos for packet in reader.demux(video=0) if packet.size]
    os.truncate(root / "cut.mp4", places[20])
    os.link(write(tmp_path / "odd.mp4", pictures(30, seed=8)), os.fsencode(root) + b"/line\nbreak-\xff.mp4")
    (root / "notes.txt").write_text("not looked at")
    outside = write(tmp_path / "secret.mp4", pictures(30, seed=7))
    (root / "link.mp4").symlink_to(outside)
    (root / "loop.mp4").symlink_to(root / "loop.mp4")
    (root / "dangling.mp4").symlink_to(root / "nowhere.mp4")
    (root / "folder.mp4").mkdir()
    os.mkfifo(root / "pipe.mp4")
    (root / "in.mp4").symlink_to(root / "good.mp4")
    return root


def test_what_is_left_out_and_why(awkward, tmp_path):
    report = pack(awkward, tmp_path / "s", strict=True, **QUIET)
    assert {clip[0] for clip in contents(tmp_path / "s")} == {"again.mp4", "line\nbreak-\udcff.mp4"}
    reasons = quarantine(tmp_path / "s")
    assert reasons.keys() == {
        "good.mp4", "in.mp4", "text.mp4", "empty.mp4", "cut.mp4", "damaged.mp4", "no-moov.mp4", "link.mp4", "loop.mp4",
        "dangling.mp4", "pipe.mp4", "short.mp4", "notes.txt",
    }  # fmt: skip
    assert reasons["good.mp4"] == reasons["in.mp4"] == "same content as another file: again.mp4"
    assert reasons["link.mp4"] == "link leads outside the folder"
    assert reasons["cut.mp4"].startswith("cut short: ")
    assert reasons["pipe.mp4"] == "no regular file"
    assert "damaged" in reasons["damaged.mp4"] or "cannot be decoded" in reasons["damaged.mp4"]
    for name in ("text.mp4", "empty.mp4", "no-moov.mp4"):
        assert "cannot be decoded" in reasons[name]
    assert report.short_shots == 1
    assert report.rejected["same content as another file"] == 2
    assert reasons["short.mp4"] == "no clip left: 1 shots shorter than the shortest clip"
    assert reasons["notes.txt"] == "no suffix of a video: .txt"
    assert report.skipped == {"no suffix of a video: .txt": 1}
    assert sum(report.rejected.values()) == len(reasons) - 1
    assert report.found == report.packed + len(reasons) == 2 + len(reasons)
    assert report.found == sum(len(files) for _, _, files in os.walk(os.fsencode(awkward)))
    assert all("\n" not in line for line in report.lines())


def test_damage_is_found_when_copying_too(awkward, tmp_path):
    pack(awkward, tmp_path / "s", format="copy", strict=True, **QUIET)
    assert "damaged.mp4" in quarantine(tmp_path / "s")


def test_no_video_at_all(tmp_path):
    with pytest.raises(UserError, match=r"no such file or folder: .*nowhere"):
        pack(tmp_path / "nowhere", tmp_path / "s")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no video in .*empty: looked for \.3gp, "):
        pack(tmp_path / "empty", tmp_path / "s")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.mp4").write_text("text")
    with pytest.raises(UserError, match=r"no usable video in .*bad: a\.mp4: cannot be decoded"):
        pack(tmp_path / "bad", tmp_path / "s", **QUIET)
    assert not (tmp_path / "s" / "index.bin").exists()
    assert list((tmp_path / "s").glob("shard-*")) == []


def test_output_not_writable(folder, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"cannot write the store .*file/s: Not a directory"):
        pack(folder, tmp_path / "file" / "s", **QUIET)
    with pytest.raises(UserError, match="cannot write the store /proc/none"):
        pack(folder, "/proc/none", **QUIET)


def test_a_folder_of_other_things_is_not_touched(folder, tmp_path):
    (tmp_path / "shard-00000.bin").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"holds other files \(shard-00000\.bin"):
        pack(folder, tmp_path, **QUIET)
    assert [path.name for path in tmp_path.iterdir()] == ["shard-00000.bin"]


def test_senseless_options(folder, tmp_path):
    for options, message in (
        ({"quality": 0}, "quality is 0, must be 1 to 100"),
        ({"format": "png"}, "format is 'png', must be jpeg or h264 or copy"),
        ({"min_length": 11.0}, "min_length is 11.0"),
        ({"shard": "3/2"}, "shard is '3/2'"),
        ({"shard": "all"}, "shard is 'all'"),
        ({"processes": -1, "shard": "1/2"}, "processes is -1, must be at least 0"),
        ({"decode_timeout": 0.0}, "decode_timeout is 0.0, must be above 0"),
        ({"decode_timeout": -5.0}, "decode_timeout is -5.0, must be above 0"),
        ({"decode_timeout": float("nan")}, "decode_timeout is nan, must be above 0"),
        ({"decode_timeout": float("inf")}, "decode_timeout is inf, must be above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            pack(folder, tmp_path / "s", **options)
    assert not (tmp_path / "s").exists()


def test_a_part_is_not_done_while_a_file_is_missing(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(ProcessPool, "run", lambda self, jobs, progress: None)
    with pytest.raises(RuntimeError, match="6 files are neither packed nor rejected"):
        pack(folder, tmp_path / "s", **QUIET)
    assert list((tmp_path / "s" / ".pack").glob("*.done")) == []


def test_names_are_no_urls(tmp_path, monkeypatch):
    """Names with a colon, relative to where one stands: each is a file of the folder, not what FFmpeg would open."""
    secret = write(tmp_path / "secret.mp4", pictures(30, seed=7))
    root = tmp_path / "in"
    decoy = root / f"file:{secret}"
    decoy.parent.mkdir(parents=True)
    decoy.write_text("a dummy")
    (root / "http:").mkdir()
    write(root / "http:" / "a.mp4", pictures(30, seed=1))
    shutil.move(write(tmp_path / "b.mp4", pictures(30, seed=2)), root / "2024-01-01T10:00:00.mp4")
    monkeypatch.chdir(root)
    for format in ("jpeg", "copy"):
        pack(".", tmp_path / format, format=format, **QUIET)
        assert {clip[0] for clip in contents(tmp_path / format)} == {"http:/a.mp4", "2024-01-01T10:00:00.mp4"}
        assert list(quarantine(tmp_path / format)) == [f"file:{secret}"]


def test_two_packs_into_one_folder(folder, tmp_path):
    import fcntl

    (tmp_path / "s" / ".pack").mkdir(parents=True)
    with open(tmp_path / "s" / ".pack" / "part-1.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is packing"):
            pack(folder, tmp_path / "s", **QUIET)


FAULTY = """
import os, runpy, sys, time
from vito_fast.data.pack import process_pool as worker
pack_one = worker._pack_one
def faulty(job, *rest):
    if str(job.path).endswith("v1.mp4"):
        os.abort() if {crash} else time.sleep(60)
    return pack_one(job, *rest)
worker._pack_one = faulty
sys.argv = ["worker", *sys.argv[1:]]
worker.main()
"""


@pytest.mark.parametrize("crash", [True, False])
def test_a_decoder_that_crashes_or_hangs(crash, folder, tmp_path, monkeypatch):
    script = tmp_path / "faulty.py"
    script.write_text(FAULTY.format(crash=crash))
    popen = subprocess.Popen

    def start(command, **options):
        return popen([command[0], str(script), command[3]], **options)

    monkeypatch.setattr("vito_fast.data.pack.process_pool.subprocess.Popen", start)
    report = pack(folder, tmp_path / "s", decode_timeout=3.0, **QUIET)
    reason = quarantine(tmp_path / "s")["v1.mp4"]
    assert ("crashed" if crash else "no frame decoded for 3 s") in reason
    assert report.videos == 5
    for clip in range(len(Index(tmp_path / "s" / "index.bin"))):
        frames(tmp_path / "s", clip, [0])  # the survivors are whole


def test_disk_full(folder, tmp_path, monkeypatch):
    """The pack stops with one line, and goes on when there is room."""
    script = tmp_path / "small.py"
    script.write_text(
        "import errno, sys\nfrom vito_fast.data.pack import process_pool as worker\nShardWriter = worker.ShardWriter\n"
        "append = ShardWriter.append\n"
        "def full(self, payload):\n"
        "    if self.size > 60000: raise OSError(errno.ENOSPC, 'No space left on device')\n"
        "    return append(self, payload)\n"
        "ShardWriter.append = full\nworker.main()\n"
    )
    popen = subprocess.Popen
    with monkeypatch.context() as patch:
        patch.setattr(
            "vito_fast.data.pack.process_pool.subprocess.Popen", lambda c, **o: popen([c[0], str(script), c[3]], **o)
        )
        with pytest.raises(UserError, match=r"disk full: .*repeat the command, it continues from here"):
            pack(folder, tmp_path / "s", clip_length=1.6, **QUIET)
    assert not (tmp_path / "s" / "index.bin").exists()
    pack(folder, tmp_path / "s", clip_length=1.6, **QUIET)
    assert len(contents(tmp_path / "s")) == 7


def test_no_worker_outlives_an_error(folder, tmp_path, monkeypatch):
    started = []
    popen = subprocess.Popen

    def start(*arguments, **options):
        started.append(popen(*arguments, **options))
        return started[-1]

    def interrupt(self):
        raise KeyboardInterrupt

    monkeypatch.setattr("vito_fast.data.pack.process_pool.subprocess.Popen", start)
    monkeypatch.setattr(ProcessPool, "_wait", interrupt)
    with pytest.raises(KeyboardInterrupt):
        pack(folder, tmp_path / "s", **QUIET)
    assert started
    assert all(process.poll() is not None for process in started)


def test_shard_taken_back(tmp_path):
    shard = ShardWriter(tmp_path / "shard-00000.bin", 0)
    shard.append(b"kept")
    shard.append(b"x" * 3_000_000)
    shard.rewind(4)
    assert shard.append(b"on") == 4
    shard.close()
    assert (tmp_path / "shard-00000.bin").read_bytes() == b"kepton"


def test_keys_that_do_not_serve_are_not_used(tmp_path, monkeypatch):
    """A key from which decoding goes astray loses its flag; the frames stay exact, read from the key before."""
    path = write(tmp_path / "a.mp4", pictures(36, seed=2), gop=12)
    monkeypatch.setattr("vito_fast.data.pack.remux.packet_flags", _always_key)
    shard = ShardWriter(tmp_path / "shard-00000.bin", 0)
    (clip,) = Remuxer(PackOptions("copy"), shard).run(path).clips
    assert np.flatnonzero(clip.flags & 1).tolist() == [0, 12, 24]


def _always_key(codec, extradata, payload):
    return 1


def test_sizes():
    assert fitted(1080, 1920, 256) == (256, 456)
    assert fitted(1920, 1080, 256) == (456, 256)
    assert fitted(144, 176, 256) == (144, 176)
    assert fitted(481, 853, 256) == (256, 454)
    assert fitted(1, 4000, 256) == (2, 4000)


def test_times():
    assert presentation_times([0, 2, 4]).tolist() == [0, 2, 4]
    assert presentation_times([0, 3, 1, 2]).tolist() == [0, 1, 2, 3]
    assert presentation_times([0, 0, 0, 5]).tolist() == [0, 1, 2, 5]
    assert presentation_times([None, None, 10, None], step=4).tolist() == [0, 4, 10, 14]


def test_hidden_pictures_do_not_move_the_shown_ones():
    assert _ticks([0, 30, 10, 20], [0, 1, 2], 1).tolist() == [0, 10, 30, 31]
    assert _ticks([0, 10, 20, 30], [1, 2, 3], 1).tolist() == [0, 10, 20, 30]
    assert _ticks([50, 40, 20, 30], [1, 2, 3], 1).tolist() == [16, 20, 30, 40]


@pytest.mark.parametrize("format", ["jpeg", "h264"])
def test_no_pixel_is_cut_off(format, tmp_path):
    """Whatever the codec's blocks, the whole frame is stored."""
    write(tmp_path / "a.mp4", pictures(25, 74, 110))
    pack(tmp_path, tmp_path / "s", format=format, progress=False, processes=1)
    truth, got = pictures(25, 74, 110)[0].astype(float), frames(tmp_path / "s", 0, [0])[0].astype(float)
    assert got.shape == truth.shape
    assert all(np.abs(got - truth)[edge].mean() < 12 for edge in (np.s_[0], np.s_[-1], np.s_[:, 0], np.s_[:, -1]))


def test_processes_that_cannot_start(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("vito_fast.data.pack.process_pool.sys.executable", shutil.which("false"))
    with pytest.raises(UserError, match="a packing process cannot start"):
        pack(folder, tmp_path / "s", **QUIET)


def test_an_encoder_that_is_not_there(folder, tmp_path):
    with pytest.raises(UserError, match="encoder h264_nvenc cannot be used on this machine"):
        pack(folder, tmp_path / "s", format="h264", encoder="h264_nvenc", **QUIET)


@pytest.mark.parametrize(("format", "width"), [("h264", 17000), ("jpeg", 66000)])
def test_a_size_that_the_encoder_does_not_take(format, width, tmp_path):
    """It is that video's fault, not the machine's: the others are packed."""
    write(tmp_path / "in.mkv", pictures(30))
    write(tmp_path / "a.mkv", [np.zeros((32, width, 3), np.uint8)] * 2, "ffv1")
    report = pack(tmp_path, tmp_path / "s", format=format, encoder="libx264", **QUIET)
    assert report.videos == 1
    reason = "encoder libx264 does not open: 17000" if format == "h264" else "no JPEG can be made: 66000"
    assert quarantine(tmp_path / "s")["a.mkv"].startswith(f"{reason} x 32 pixels: ")


def test_bad_video_names_the_reason(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"\0" * 100)
    shard = ShardWriter(tmp_path / "shard-00000.bin", 0)
    with pytest.raises(BadVideo, match="cannot be decoded"):
        Remuxer(PackOptions("copy"), shard).run(tmp_path / "a.mp4")


@pytest.mark.parametrize("works", [True, False])
def test_the_encoder_is_the_one_that_works(works, monkeypatch):
    """Stand-ins for NVENC, which not every machine has: one encoder bears its options and one refuses them."""
    create = av.CodecContext.create
    other = "mpeg4" if works else "libx264"

    def stand_in(name, mode):
        return create(other if name == "h264_nvenc" else name, mode)

    with monkeypatch.context() as patch:
        patch.setattr("av.CodecContext.create", stand_in)
        encoder, line = choose_encoder()
    assert encoder == ("h264_nvenc" if works else "libx264")
    assert line.startswith(f"encoding by {encoder}")


def test_a_begun_store_keeps_its_encoder(folder, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(
        sys.modules["vito_fast.data.pack.pack"], "choose_encoder", lambda: ("libx264", "encoding by libx264: no other")
    )
    with caplog.at_level("INFO", "vito_fast.data"):
        pack(folder / "v0.mp4", tmp_path / "s", format="h264", **QUIET)
    assert "encoding by libx264: no other" in caplog.text
    monkeypatch.setattr(sys.modules["vito_fast.data.pack.pack"], "choose_encoder", lambda: pytest.fail("asked again"))
    pack(folder / "v0.mp4", tmp_path / "s", format="h264", **QUIET)
    assert Store(tmp_path / "s").description["options"]["encoder"] == "libx264"
