"""The contract: presets say where each option comes from; results resume, go stale, and compare in pairs."""

import dataclasses
import json
import math
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch

from vito_fast.errors import UserError
from vito_fast.evaluate import result as results
from vito_fast.evaluate import run
from vito_fast.evaluate.data import manifest
from vito_fast.evaluate.result import Encoded, Metric, compare, draws, mean_metric
from vito_fast.evaluate.task import (
    PROVENANCE,
    TASKS,
    Check,
    Measured,
    Preset,
    Task,
    find_task,
    own_share,
    preset_folder,
    presets,
    read_presets,
)


@dataclasses.dataclass(frozen=True)
class ToyOptions:
    scale: float = 1.0
    words: tuple[str, ...] = ()


class Toy(Task):
    name, title, options = "toy", "a toy", ToyOptions

    def __init__(self):
        self.calls = 0

    def check(self, data, options):
        files = sorted(data.glob("*.txt"))
        problems = () if files else (f"{data} holds no .txt",)
        return Check(problems, len(files), manifest(data, [], files))

    def measure(self, encoder, data, options, work):
        self.calls += 1
        items = {p.stem: {"score": options.scale * float(p.read_text())} for p in sorted(data.glob("*.txt"))}
        return Measured({"score": mean_metric((i["score"] for i in items.values()), "points")}, items)


def toy_encoder(digest="a" * 64, name="net"):
    return SimpleNamespace(record=Encoded(name, "x.pth", "resnet18", digest, "trained"), device=torch.device("cpu"))


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for name, value in {"a": 1, "b": 2, "c": 4}.items():
        (folder / f"{name}.txt").write_text(str(value))
    return folder


def test_a_full_disk_is_named(data, tmp_path, monkeypatch):
    monkeypatch.setattr(Toy, "measure", mock.Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left") as full:
        Toy().run(toy_encoder(), data, preset(), tmp_path / "out")
    assert full.value.filename.endswith("toy-plain")


def preset(**options):
    return Preset("toy", "plain", ToyOptions(**options), {"scale": "ours", "words": "ours"})


def test_a_result_is_reused_for_the_same_digests_alone(tmp_path, data):
    toy, out = Toy(), tmp_path / "out"
    first = toy.run(toy_encoder(), data, preset(), out)
    assert first.metrics["score"].value == pytest.approx(7 / 3)
    assert first.metrics["score"].standard_error == pytest.approx(math.sqrt(7 / 3 / 3))
    again = toy.run(toy_encoder(), data, preset(), out)
    assert toy.calls == 1
    assert again == first
    toy.run(toy_encoder(), data, preset(scale=2.0), out)  # other options
    toy.run(toy_encoder("b" * 64), data, preset(scale=2.0), out)  # other weights: another folder
    assert toy.calls == 3
    (data / "c.txt").write_text("5")  # the same size, other content: an annotation
    stale = toy.run(toy_encoder(), data, preset(scale=2.0), out)
    assert toy.calls == 4
    assert stale.items["c"] == {"score": 10.0}
    Toy.version = 2
    try:
        toy.run(toy_encoder(), data, preset(scale=2.0), out)
    finally:
        Toy.version = 1
    assert toy.calls == 5


def test_an_incomplete_or_torn_result_is_made_again(tmp_path, data):
    toy, out = Toy(), tmp_path / "out"
    toy.run(toy_encoder(), data, preset(), out)
    path = next(out.rglob("toy-plain.json"))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"complete": False}))
    toy.run(toy_encoder(), data, preset(), out)
    path.write_text(path.read_text()[:100])
    toy.run(toy_encoder(), data, preset(), out)
    assert toy.calls == 3
    assert [r.task for r in results.load_all(out)] == ["toy"]


def test_a_folder_of_another_key_is_emptied(tmp_path, data):
    toy, out = Toy(), tmp_path / "out"
    toy.run(toy_encoder(), data, preset(), out)
    left = next(out.rglob("toy-plain")) / "checkpoint"
    left.write_text("of scale 1")
    toy.run(toy_encoder(), data, preset(), out)
    assert left.exists()
    toy.run(toy_encoder(), data, preset(scale=3.0), out)
    assert not left.exists()


def test_wrong_data_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"^toy: .* holds no \.txt$"):
        Toy().run(toy_encoder(), tmp_path, preset(), tmp_path / "out")


def test_options_from_the_command_line_are_ours(tmp_path):
    changed = preset().with_options({"scale": 2})
    assert (changed.name, changed.options.scale, changed.provenance["scale"]) == ("plain*", 2.0, "ours")
    assert preset().with_options({"scale": 1.0}).name == "plain"
    with pytest.raises(UserError, match=r"unknown option 'scael'; did you mean 'scale'\?"):
        preset().with_options({"scael": 2})
    with pytest.raises(UserError, match="must be a number, got 'x'"):
        preset().with_options({"scale": "x"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("p: {options: {scale: {value: 1, from: ours}}}", "says nothing of words"),
        ("p: {options: {scale: {value: 1, from: hearsay}, words: {value: [], from: ours}}}", "say one of paper"),
        ("p: {options: {size: {value: 1, from: ours}, scale: {value: 1, from: ours}, words: {value: [], from: ours}}}",
         "unknown option 'size'"),
    ],
)  # fmt: skip
def test_a_preset_says_all_of_it(tmp_path, text, message):
    path = tmp_path / "toy.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_presets(path, Toy())


@pytest.mark.parametrize("path", sorted(preset_folder().glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_presets_name_every_option_and_where_it_comes_from(path):
    task = find_task(path.stem)
    found = presets(task)
    assert found
    for one in found.values():
        assert set(one.provenance) == {field.name for field in dataclasses.fields(task.options)}
        assert {word.split(":")[0] for word in one.provenance.values()} <= set(PROVENANCE)
        for figure in one.published:
            assert figure.because
            assert figure.source


def test_unknown_names_name_the_nearest():
    with pytest.raises(UserError, match="unknown task 'uc101'; did you mean 'ucf101'"):
        find_task("uc101")
    assert set(TASKS) >= {"ucf101", "pascal", "ade20k", "coco", "lvis"}


def result_of(scores, digest="a" * 64, **key):
    items = {name: {"score": value} for name, value in scores.items()}
    key = {"preset": "p", "encoder": digest, "data": "d"} | key
    return results.Result(
        "toy", "plain", {}, {}, [], key, Encoded("net", "", "", digest, ""), {},
        {"score": mean_metric(list(scores.values()), "")}, items, {}, {}, {}, [], {}, {}, True,
    )  # fmt: skip


def test_comparisons_are_paired():
    """Differences .1, .3, .2: mean .2, sd .1, se .1/sqrt 3, t(.975, 2) = 4.3026527."""
    a = result_of({"x": 0.1, "y": 0.9, "z": 0.5, "only": 0.0})
    b = result_of({"z": 0.7, "y": 1.2, "x": 0.2, "failed": None})
    found = compare(a, b)
    half = 4.302652729911275 * 0.1 / math.sqrt(3)
    assert found.n == 3
    assert (found.difference, found.low, found.high) == pytest.approx((0.2, 0.2 - half, 0.2 + half))
    assert not found.decided
    with pytest.raises(UserError, match="differ in data"):
        compare(a, result_of({"x": 1.0}, data="other"))
    assert compare(a, result_of({"x": 1.0})) is None


def test_the_mean_leaves_out_items_without_a_score():
    assert mean_metric([1.0, None, math.nan, 3.0], "points") == Metric(2.0, "points", 2, 1.0)
    assert mean_metric([None], "points") == Metric(None, "points", 0)


def test_numbers_that_are_not_finite_are_null_in_the_file(tmp_path):
    one = result_of({"x": 1.0, "y": math.nan})
    one.save(tmp_path / "r.json")
    assert results.load(tmp_path / "r.json").items["y"] == {"score": None}


def test_the_manifest_is_of_names_sizes_and_annotations(tmp_path):
    for root in ("one", "two"):
        (tmp_path / root).mkdir()
        (tmp_path / root / "a.jpg").write_bytes(b"xx")
        (tmp_path / root / "a.png").write_bytes(b"yy")
    of = lambda root: manifest(tmp_path / root, [tmp_path / root / "a.jpg"], [tmp_path / root / "a.png"])  # noqa: E731
    assert of("one") == of("two")
    assert (of("one")["files"], of("one")["bytes"]) == (2, 4)
    (tmp_path / "two" / "a.jpg").write_bytes(b"zz")
    assert of("one") == of("two")
    (tmp_path / "two" / "a.png").write_bytes(b"zz")
    assert of("one") != of("two")


def test_one_process_has_every_item():
    assert own_share([1, 2, 3]) == [1, 2, 3]


def test_metrics_that_are_no_means_are_paired_by_resample():
    """Both move together from resample to resample: the interval of their difference is narrow."""
    together = np.random.default_rng(0).normal(0, 0.1, 200)
    noise = np.random.default_rng(1).normal(0, 0.01, 200)
    a, b = (dataclasses.replace(result_of({}), metrics={"miou": Metric(v, "share", 30, 0.1)}) for v in (0.5, 0.55))
    a.resamples, b.resamples = {"miou": (0.5 + together).tolist()}, {"miou": (0.55 + together + noise).tolist()}
    b.resamples["miou"][7] = None  # no object in this draw
    found = compare(a, b)
    assert found.difference == pytest.approx(0.05)
    assert 0.02 < found.low < 0.035 < 0.065 < found.high < 0.08
    assert (found.decided, found.n) == (True, 30)
    assert run.paired_metric(a) == "miou"
    assert np.array_equal(draws(9, 4), draws(9, 4))
    assert draws(9, 4).sum(1).tolist() == [9] * 4
