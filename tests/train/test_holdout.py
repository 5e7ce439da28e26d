"""Held-out clips: read whole and in order, scored in the encoder's evaluation mode, reported by a run."""

import json
import math
import shutil
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from vito_fast.config import Config, DataConfig, ModelConfig, SamplerConfig, ScheduleConfig, TrainConfig
from vito_fast.data.pack.pack import pack
from vito_fast.errors import UserError
from vito_fast.model.pair import Branch
from vito_fast.train import train
from vito_fast.train.holdout import FRAMES, Holdout, baselines, evaluate, lines, read

CPU = torch.device("cpu")
MODEL = ModelConfig(backbone="resnet18", projector_hidden=8, projector_out=4, attention_hidden=4)


def video(path, color):
    """Eight frames of one color, each a little brighter than the one before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=5, options={"crf": "5"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(8):
            picture = np.full((48, 64, 3), color, np.uint8) + np.uint8(4 * number)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Three clips of each of two classes, which color tells apart."""
    folder = tmp_path_factory.mktemp("holdout")
    for number in range(3):
        video(folder / "videos" / "blue" / f"{number}.mp4", (20, 70 + 2 * number, 160))
        video(folder / "videos" / "red" / f"{number}.mp4", (160, 70 + 2 * number, 20))
    pack(folder / "videos", folder / "store", shot_cuts=False, progress=False)
    return folder / "store"


def test_read(store):
    found = read(store, 32)
    assert found.images.shape == (6 * FRAMES, 3, 32, 32)
    assert found.label.tolist() == [0] * 12 + [1] * 12
    assert found.clip.tolist() == [clip for clip in range(6) for _ in range(FRAMES)]
    assert found.chance == 0.5
    blue = found.images[0].mean((1, 2)) * 255
    assert blue.tolist() == pytest.approx([24, 74, 164], abs=6), "the second frame"
    brightness = found.images[:FRAMES].mean((1, 2, 3))
    assert (brightness.diff() * 255).tolist() == pytest.approx([8, 8, 8], abs=2), "two frames apart"


def test_scores(store):
    found, config = read(store, 32), Config(model=MODEL)
    torch.manual_seed(0)
    branch = Branch(MODEL, predictor=False)
    before = {k: v.clone() for k, v in branch.state_dict().items()}
    scores = baselines(branch, found, config, CPU)
    assert (scores["clips"], scores["classes"], scores["chance"]) == (6, 2, 0.5)
    assert scores["histogram"] == (1.0, 0.0), "color alone tells them apart"
    assert branch.training
    assert all(torch.equal(v, before[k]) for k, v in branch.state_dict().items())
    one = evaluate(branch, found, config, CPU)
    assert set(one) == {"pooled", "averaged", "gray", "linear"}
    assert branch.training
    branch.eval()
    assert evaluate(branch, found, config, CPU) == one
    assert not branch.training


def test_the_linear_probe_is_ridge_regression_from_one_half_of_the_clips_to_the_other():
    sklearn = pytest.importorskip("sklearn.linear_model")
    generator = torch.Generator().manual_seed(0)
    label = torch.tensor([1, 0, 2, 1, 0, 2, 0, 1, 2, 0]).repeat_interleave(2)
    clip = torch.arange(10).repeat_interleave(2)
    found = Holdout(torch.zeros(20, 3, 1, 1), label, clip)
    features = torch.randn(20, 6, generator=generator)
    features[:, 0] += label
    first = torch.isin(clip, torch.tensor([0, 1, 2, 6, 7, 8]))  # of each class the first, third, ... clip
    right = torch.zeros(20)
    for fitted, tested in ((first, ~first), (~first, first)):
        mean, deviation = features[fitted].mean(0), features[fitted].std(0)
        x, new = ((features[rows] - mean) / deviation for rows in (fitted, tested))
        model = sklearn.RidgeClassifier(alpha=0.1 * len(x)).fit(x, label[fitted])
        right[tested] = torch.from_numpy(model.predict(new) == label[tested].numpy()).float()
    share = right.view(10, 2).mean(1)
    assert found.linear(features) == pytest.approx((share.mean().item(), (share.std() / 10**0.5).item()))
    assert 0 < share.mean() < 1, "a case that can fail"
    assert all(math.isnan(value) for value in found.linear(features / 0))
    assert Holdout(found.images, label.clamp(max=1) + 2 * (clip == 0), clip).linear(features) is None


def test_classes_of_a_curated_store(store, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow = pytest.importorskip("pyarrow")
    curated = Path(shutil.copytree(store, tmp_path / "store"))
    parquet.write_table(pyarrow.table({"label": [7, 3, 7, 3, 5, 5]}), curated / "labels.parquet")
    assert read(curated, 32).label[::FRAMES].tolist() == [2, 0, 2, 0, 1, 1]
    parquet.write_table(pyarrow.table({"label": [7, 3]}), curated / "labels.parquet")
    with pytest.raises(UserError, match=r"labels\.parquet has 2 rows, the store has 6 clips"):
        read(curated, 32)
    (curated / "labels.parquet").write_bytes(b"no table")
    with pytest.raises(UserError, match=r"cannot read .*labels\.parquet"):
        read(curated, 32)


def test_words():
    scores = {"clips": 240, "classes": 40, "chance": 0.025, "pixels": (0.05, 0.007), "histogram": (0.058, 0.007)}
    scores["untrained"] = {"pooled": (0.06, 0.008), "averaged": (0.06, 0.008), "gray": (0.03, 0.01)}
    trained = {"pooled": (0.35, 0.02), "averaged": (0.12, 0.01), "gray": (0.04, 0.01)}
    told = lines(scores, trained)
    assert told[1] == "  trained 35.0% ± 2.0%; average pooling 12.0% ± 1.0%"
    assert told[2] == "  untrained 6.0% ± 0.8%, raw pixels 5.0% ± 0.7%, color histogram 5.8% ± 0.7%"
    assert told[3] == "  without color: trained 4.0% ± 1.0%, untrained 3.0% ± 1.0%"
    assert "warning" not in "\n".join(told)
    probed = lines(
        scores | {"untrained": scores["untrained"] | {"linear": (0.1, 0.02)}}, trained | {"linear": (0.5, 0.02)}
    )
    assert probed[4] == "  linear probe: trained 50.0% ± 2.0%, untrained 10.0% ± 2.0%"
    told = lines(scores, trained | {"pooled": (0.055, 0.01)})
    assert told[-1] == "warning: the encoder is no better than color histogram"
    assert len(lines(scores, None)) == 2


def test_without_classes(store, tmp_path):
    video(tmp_path / "videos" / "a.mp4", (20, 20, 160))
    video(tmp_path / "videos" / "b.mp4", (20, 20, 160))
    pack(tmp_path / "videos", tmp_path / "store", shot_cuts=False, progress=False)
    with pytest.raises(UserError, match=r"data\.holdout: .* lie in one folder"):
        read(tmp_path / "store", 32)


def test_a_run_reports_them(store, tmp_path, capsys):
    config = Config(
        name="r",
        data=DataConfig(store=str(store), holdout=str(store), threads=1),
        sampler=SamplerConfig(size=32, views=2),
        model=MODEL,
        schedule=ScheduleConfig(epochs=2, epoch_clips=0, warmup_epochs=1),
        train=TrainConfig(batch_size=6, device="cpu", runs=str(tmp_path), evaluate_clips=6),
    )
    summary = train(config, max_steps=1)
    assert summary["holdout"]["clips"] == 6
    assert "held-out: the class of 6 clips of 2," in capsys.readouterr().out
    again = train(config, resume=True)
    assert again["holdout"]["untrained"]["pooled"] == list(summary["holdout"]["untrained"]["pooled"]), "kept"
    assert json.loads((tmp_path / "r" / "summary.json").read_text())["holdout"]["trained"].keys() == {
        "pooled",
        "averaged",
        "gray",
        "linear",
    }
