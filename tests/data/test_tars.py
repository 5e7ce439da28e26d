"""Videos in tar archives: read in place, with labels from the files beside them, and no name that leads outside."""

import hashlib
import io
import json
import tarfile

import pyarrow.parquet as pq
import pytest
from test_pack import contents
from videos import pictures, write

from vito_fast.data.pack.edit import append
from vito_fast.data.pack.listing import list_videos
from vito_fast.data.pack.pack import pack
from vito_fast.data.store.media import Member, SourceFile
from vito_fast.errors import UserError

QUIET = {"progress": False, "processes": 1, "short_side": 48}


def add(archive, name, data):
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    archive.addfile(entry, io.BytesIO(data))


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    for name in "abcd":
        write(folder / f"{name}.mp4", pictures(40, seed=ord(name)))
    return folder


@pytest.fixture
def shards(videos, tmp_path):
    """Two archives as WebDataset writes them."""
    (tmp_path / "shards").mkdir()
    for number, names in enumerate(("ab", "cd")):
        with tarfile.open(tmp_path / "shards" / f"{number}.tar", "w") as archive:
            for name in names:
                add(
                    archive,
                    f"{name}.cls" if name != "d" else "d.txt",
                    {"a": b"dog", "d": b"a text"}.get(name, b"cat\n"),
                )
                add(archive, f"{name}.mp4", (videos / f"{name}.mp4").read_bytes())
                add(archive, f"{name}.json", json.dumps({"id": f"id-{name}", "group": "g", "label": "ant"}).encode())
    return tmp_path / "shards"


@pytest.mark.parametrize("format", ["jpeg", "copy"])
def test_members_are_packed_as_files_are(format, videos, shards, tmp_path):
    report = pack(shards, tmp_path / "s", format=format, **QUIET)
    assert (report.found, report.packed, report.listed) == (4, 4, False)
    pack(videos, tmp_path / "plain", format=format, **QUIET)
    expected = [(f"{n // 2}.tar/{clip[0]}", *clip[2:]) for n, clip in enumerate(contents(tmp_path / "plain"))]
    assert [(clip[0], *clip[2:]) for clip in contents(tmp_path / "s")] == expected
    table = pq.read_table(tmp_path / "s" / "labels.parquet").select(["label", "class", "clip_id", "group", "text"])
    assert [tuple(row.values()) for row in table.to_pylist()] == [
        (2, "dog", "id-a", "g", ""), (1, "cat", "id-b", "g", ""), (1, "cat", "id-c", "g", ""),
        (0, "ant", "id-d", "g", "a text"),
    ]  # fmt: skip


def test_append_takes_new_archives_alone(videos, shards, tmp_path):
    later = (shards / "1.tar").read_bytes()
    (shards / "1.tar").unlink()
    pack(shards, tmp_path / "s", **QUIET)
    (shards / "1.tar").write_bytes(later)
    append(shards, tmp_path / "s", processes=1, progress=False)
    table = pq.read_table(tmp_path / "s" / "labels.parquet").to_pylist()
    assert [(row["path"], row["class"]) for row in table] == [
        ("0.tar/a.mp4", "dog"), ("0.tar/b.mp4", "cat"), ("1.tar/c.mp4", "cat"), ("1.tar/d.mp4", "ant"),
    ]  # fmt: skip
    assert {row["label"] for row in table if row["class"] == "cat"} == {0}, "the store keeps its numbers"


def test_hostile_and_odd_members(videos, tmp_path):
    data = (videos / "a.mp4").read_bytes()
    (tmp_path / "src").mkdir()
    with tarfile.open(tmp_path / "src" / "x.tar", "w") as archive:
        for name in ("good.mp4", "../../out.mp4", "/etc/out.mp4", "good.mp4", "pictures.jpg", "lonely.cls", "bad.mp4"):
            add(archive, name, b"no video" if name == "bad.mp4" else data)
        for name, kind in (
            ("link.mp4", tarfile.SYMTYPE),
            ("hard.mp4", tarfile.LNKTYPE),
            ("fifo.mp4", tarfile.FIFOTYPE),
        ):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, "/etc/passwd"
            archive.addfile(entry)
        add(archive, "good.json", b"[" * 100_000)
    (tmp_path / "src" / "y.tar").write_bytes(b"no archive")
    whole = (tmp_path / "src" / "x.tar").read_bytes()
    before = sorted(path for path in tmp_path.rglob("*"))
    report = pack(tmp_path / "src", tmp_path / "s", **QUIET)
    assert (report.packed, report.found) == (1, 11)
    entries = [json.loads(line) for line in (tmp_path / "s" / "quarantine.jsonl").read_text().splitlines()]
    assert {entry["file"]: entry["reason"].split(":")[0] for entry in entries} == {
        "x.tar/../../out.mp4": "its name leads outside the archive",
        "x.tar//etc/out.mp4": "its name leads outside the archive",
        "x.tar/good.mp4 (again)": "a second member of its name",
        "x.tar/bad.mp4": "cannot be decoded",
        "x.tar/pictures.jpg": "no suffix of a video",
        "x.tar/lonely.cls": "no video of its name",
        **{f"x.tar/{name}.mp4": "no regular member of its archive" for name in ("link", "hard", "fifo")},
        "y.tar": "no whole tar archive",
    }
    assert pq.read_table(tmp_path / "s" / "labels.parquet")["clip_id"].to_pylist() == ["good"]
    assert [path for path in sorted(tmp_path.rglob("*")) if not path.is_relative_to(tmp_path / "s")] == before
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "x.tar").write_bytes(whole[: len(data) // 2])
    with pytest.raises(UserError, match="no usable video"):
        pack(tmp_path / "cut", tmp_path / "t", **QUIET)


def test_a_member_reads_as_a_file_of_its_own(tmp_path):
    (tmp_path / "x").write_bytes(bytes(range(100)))
    with SourceFile(Member(tmp_path / "x", 10, 20, ".mp4")) as file:
        assert (file.read(4), file.tell()) == (bytes(range(10, 14)), 4)
        assert (file.seek(-3, 2), file.read()) == (17, bytes(range(27, 30)))
        assert (file.read(5), file.seek(2), file.read(-1)) == (b"", 2, bytes(range(12, 30)))
        assert (file.seek(25), file.read(3)) == (25, b"")


def test_the_seal_of_files_is_that_of_earlier_stores(tmp_path):
    """A finished store is known again by it."""
    for name, data in (("a.mp4", b"x"), ("b.mp4", b"yz")):
        (tmp_path / name).write_bytes(data)
    assert list_videos(tmp_path).fingerprint == hashlib.sha256(b"a.mp4\t1\nb.mp4\t2").hexdigest()
