"""The command and the card: one page, all text escaped, nothing fetched; what was not run is said."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from vito_fast.cli.main import main
from vito_fast.evaluate.result import load_all


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of two classes, one with a name that is markup."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for name, color in {"<b>red": (200, 40, 40), "blue": (40, 40, 200)}.items():
        for part in ("train", "val"):
            (root / part / name).mkdir(parents=True)
            for number in range(3):
                pixels = np.array(color) + rng.normal(0, 20, (32, 32, 3))
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / part / name / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def out(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    words = ["evaluate", "random:resnet18:zero_init_residual", "--tasks", "knn,attention", "--data.knn", str(folder)]
    for part, suffix in (("JPEGImages", "jpg"), ("Annotations", "png")):
        (out / "davis" / part / "480p" / "a").mkdir(parents=True)
        Image.new("L", (32, 32)).save(out / "davis" / part / "480p" / "a" / f"00000.{suffix}")
    words += [f"--data.attention={out / 'davis'}", "--preset", "knn=dino", "--knn.size", "32"]
    words += ["--attention.subset", "true"]
    assert main([*words, "--out", str(out), "--baselines", "random,pixels", "--device", "cpu"]) == 0
    return out


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href") and v]


def test_the_page_holds_everything_itself(out):
    text = (out / "card.html").read_text()
    page = Page(text)
    assert page.links
    assert all(link.startswith("data:image/jpeg;base64,") for link in page.links)
    assert not re.search(r"https?://|@import|url\(", text)
    assert "script" not in page.tags
    assert "prefers-color-scheme: dark" in text
    assert "width=device-width" in text


def test_all_text_is_escaped(out):
    text = (out / "card.html").read_text()
    assert "<b>red" not in text
    assert "&lt;b&gt;red" in text


def test_it_says_what_was_not_run_and_why(out):
    text = (out / "card.html").read_text()
    assert "attention, random-zero_init_residual: random-zero_init_residual has no attention pools" in text
    assert "ucf101: no data was given; docs/evaluate/ucf101.md says where to get it" in text
    assert "--tasks ucf101 --data.ucf101 PATH" in text


def test_results_carry_their_provenance(out):
    found = {r.encoder.name: r for r in load_all(out)}
    assert set(found) == {"random-zero_init_residual", "random", "pixels"}
    assert found["pixels"].preset == "dino*"
    assert found["pixels"].provenance["temperature"] == "official: DINO"
    assert found["random"].encoder.init.startswith("random: torchvision initialization, seed 0")
    text = (out / "card.html").read_text()
    for result in found.values():
        assert result.encoder.sha256[:16] in text


def test_cards_of_several_folders(out, tmp_path, capsys):
    assert main(["card", str(out), str(out), str(tmp_path / "both.html")]) == 0
    assert capsys.readouterr().out == f"card: {tmp_path / 'both.html'}\n"
    assert main(["card", str(tmp_path / "none"), str(tmp_path / "x.html")]) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["random:resnet18", "--tasks", "knn", "--out", "o"], "knn needs its data: --data.knn PATH"),
        (["random:resnet18", "--tasks", "knm", "--out", "o"], "unknown task 'knm'; did you mean 'knn'?"),
        (["pixels", "--tasks", "knn", "--data.knn", "/none", "--out", "o"], "knn: there is no folder /none"),
        (["pixels", "--tasks", "knn", "--data.pmk", "/", "--out", "o"], "--data.pmk or --pmk.* is of a task"),
        (["pixels", "--tasks", "knn", "--knm.k", "3", "--out", "o"], "unknown option '--knm.k'; did you mean 'knn'?"),
        (["pixels", "--tasks", "knn", "--data.knn", "/", "--knn.kk", "3", "--out", "o"], "unknown option 'kk'"),
        (["pixels", "--tasks", "knn", "--data.knn", "/", "--preset", "vfs", "--out", "o"], "--preset vfs: none of knn"),
        (["none.pth", "--tasks", "knn", "--data.knn", "/", "--out", "o"], "no encoder none.pth"),
    ],
)
def test_mistakes_are_one_line(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_check_computes_nothing(folder, tmp_path, capsys):
    words = ["evaluate", "pixels", "--tasks", "knn", f"--data.knn={folder}", "--out", str(tmp_path / "o"), "--check"]
    assert main(words) == 0
    assert "knn (dino) in" in (said := capsys.readouterr().out)
    assert "6 items" in said
    assert not (tmp_path / "o").exists()
