"""Statistics of a store: traits of its files, the table and the page."""

import csv
import re
from fractions import Fraction
from html.parser import HTMLParser

import pytest
from videos import pictures, rotate, write

from vito_fast.cli.main import main
from vito_fast.data.pack.edit import merge
from vito_fast.data.pack.pack import pack

QUIET = {"progress": False, "processes": 1, "short_side": 48}


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """Videos of several color tags, shapes of a pixel and orientations, and files that cannot be packed."""
    folder = tmp_path_factory.mktemp("odd")
    write(folder / "plain.mp4", pictures(30), tags={"colorspace": 1, "color_trc": 1})
    write(folder / "wide.mkv", pictures(60, seed=1), tags={"sample_aspect_ratio": Fraction(4, 3)})
    write(folder / "hdr.mp4", pictures(30, seed=2), tags={"colorspace": 9, "color_trc": 16})
    rotate(folder / "plain.mp4", folder / "turned.mp4", 1)
    (folder / "<b>no.mp4").write_bytes(b"no video")
    (folder / "notes.txt").write_text("a note")
    return folder


@pytest.mark.parametrize("format", ["jpeg", "copy"])
def test_the_report_counts_traits(format, odd, tmp_path):
    report = pack(odd, tmp_path / "s", format=format, **QUIET)
    assert report.traits == {
        "scan: progressive": 4, "pixel: 1:1": 3, "pixel: 4:3": 1, "color: BT.709": 2, "color: untagged": 1,
        "color: BT.2020 PQ": 1, "orientation: 0 degrees": 3, "orientation: 90 degrees": 1,
    }  # fmt: skip
    (tmp_path / "more").mkdir()
    write(tmp_path / "more" / "other.mp4", pictures(30, seed=7))
    pack(tmp_path / "more", tmp_path / "t", format=format, **QUIET)
    assert merge(tmp_path / "both", [tmp_path / "s", tmp_path / "t"]).traits["scan: progressive"] == 5


class Loads(HTMLParser):
    """Collects tags that run or load something."""

    def __init__(self):
        super().__init__()
        self.found, self.tags = [], set()

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        values = dict(attributes)
        if tag in ("script", "link", "iframe", "object") or {"src", "href"} & values.keys():
            self.found.append((tag, values))


def test_the_page_and_the_table(odd, tmp_path, capsys):
    pack(odd, tmp_path / "s", **QUIET)
    words = ["store", "stats", str(tmp_path / "s"), "--page", str(tmp_path / "p.html")]
    assert main([*words, "--table", str(tmp_path / "t.csv")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"page: {tmp_path / 'p.html'}"
    text = (tmp_path / "p.html").read_text()
    loads = Loads()
    loads.feed(text)
    assert not loads.found
    assert {"svg", "table"} <= loads.tags
    assert "b" not in loads.tags, "names of files are escaped"
    shown = re.sub(r"<[^>]+>", " ", text)
    for part in ("6 files found: 4 packed, 1 rejected, 1 skipped", "BT.2020 PQ", "4:3", "90 degrees", "no.mp4",
                 "least 1.2 s, median 1.2 s, most 2.4 s", "no suffix of a video: .txt", "64 x 48"):  # fmt: skip
        assert part in shown, part
    rows = list(csv.DictReader((tmp_path / "t.csv").open()))
    assert [(row["source"], row["frames"], row["rate"]) for row in rows][-1] == ("wide.mkv", "60", "25.0")
    assert main([*words[:4], str(tmp_path / "s" / "p.html")]) == 2
    assert "is a store, choose another folder" in capsys.readouterr().err
