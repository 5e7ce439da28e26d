"""Files that would fill memory or never end, and names that leave the root: each is refused with its reason."""

import struct

import pytest

from vito_fast.curate import analyse, probe
from vito_fast.curate.options import AnalyseOptions
from vito_fast.data.store.description import Limits
from vito_fast.data.store.media import BadVideo

LIMITS = Limits(seconds=60, frames=500)


def gif(width: int, height: int, frames: int) -> bytes:
    """Frames of one white pixel in a canvas of any size."""
    head = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    frame = b"\x21\xf9\x04\0\x04\0\0\0" + b"\x2c" + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x4c\x01\0"
    return head + frame * frames + b"\x3b"


def reason(root, name: str) -> str:
    """Why curation refuses the file, in either step."""
    data = {"root": str(root), "path": name, "id": "x"}
    try:
        probe.run(data, LIMITS)
        analyse.run(data, AnalyseOptions(limits=LIMITS))
    except BadVideo as error:
        return str(error)
    return "accepted"


@pytest.mark.parametrize(
    ("side", "said"), [(8300, "over a limit: 8300 x 8300 pixels"), (16384, "packet 0 cannot be decoded")]
)
def test_a_huge_picture_is_refused_before_it_is_decoded(tmp_path, side, said):
    """FFmpeg itself refuses the larger one."""
    (tmp_path / "huge.gif").write_bytes(gif(side, side, 2))
    assert reason(tmp_path, "huge.gif").startswith(said)


def test_a_gif_of_many_frames_ends_at_the_limit(tmp_path):
    (tmp_path / "long.gif").write_bytes(gif(16, 16, 50_000))
    assert reason(tmp_path, "long.gif") == "over a limit: more than 500 frames"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("../secret.mp4", "outside the root folder"),
        ("a/../../secret.mp4", "outside the root folder"),
        ("/etc/hostname", "outside the root folder"),
        ("nul\0.mp4", "its name holds a NUL"),
        ("concat:a.mp4|b.mp4", "cannot be read"),
        ("http://localhost/a.mp4", "cannot be read"),
        ("a", "no regular file"),
        ("/dev/zero", "outside the root folder"),
    ],
)
def test_a_name_that_is_no_file_of_the_root_is_refused(tmp_path, name, said):
    root = tmp_path / "root"
    (root / "a").mkdir(parents=True)
    (tmp_path / "secret.mp4").write_bytes(b"x")
    assert reason(root, name).startswith(said)


@pytest.mark.parametrize("text", ["ffconcat version 1.0\nfile /etc/passwd\n", "#EXTM3U\n/etc/passwd\n"])
def test_a_playlist_is_refused(tmp_path, text):
    (tmp_path / "list.mkv").write_text(text)
    assert reason(tmp_path, "list.mkv").startswith(("a playlist", "cannot be decoded"))
