"""Exported files load into plain torchvision and timm networks and give the same features, bit for bit."""

import json
import warnings

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torchvision.transforms.v2.functional import pil_to_tensor

from vito_fast.cli.main import main
from vito_fast.config import Config, ModelConfig, SamplerConfig, TrainConfig
from vito_fast.config_files import to_mapping
from vito_fast.errors import UserError
from vito_fast.export import export, load_encoder
from vito_fast.train import attention_maps as attention
from vito_fast.train.attention_maps import attention_maps, load_online, overlay, video_frames
from vito_fast.train.checkpoint import find, write
from vito_fast.train.distributed import World
from vito_fast.train.trainer import Trainer


def make_run(folder, backbone, **model):
    """A run's folder with one checkpoint after one step, so that no norm is as it started."""
    config = Config(
        sampler=SamplerConfig(size=64),
        model=ModelConfig(backbone=backbone, projector_hidden=8, projector_out=4, attention_hidden=4, **model),
        train=TrainConfig(batch_size=4),
    )
    trainer = Trainer(config, World(0, 1, 1, torch.device("cpu")), 5)
    views = tuple(torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(i)) for i in range(3))
    trainer.step(views, torch.arange(4), measure=False)
    tensors, state = trainer.state()
    (folder / "checkpoints").mkdir(parents=True)
    write(folder / "checkpoints" / "step-00000001.safetensors", tensors, state | {"config": to_mapping(config)})
    return trainer.model.eval()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "r50"
    return folder, make_run(folder, "resnet50")


def images():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(9))


@torch.no_grad()
def expected(folder, network, memory_format=torch.contiguous_format):
    encoder = load_encoder(find(folder, pytest.fail), network).to(memory_format=memory_format)
    return encoder(images())[-1].mean((2, 3))


@pytest.mark.parametrize("network", ["online", "target"])
@pytest.mark.parametrize("ext", ["safetensors", "pth"])
def test_torchvision(run, tmp_path, ext, network):
    made = export(run[0], tmp_path / "encoder", "torchvision", ext, network)
    path = made.path
    assert path == tmp_path / f"encoder.{ext}"
    state = load_file(path) if ext == "safetensors" else torch.load(path, weights_only=True)
    net = torchvision.models.resnet50()
    net.fc = nn.Identity()
    net.load_state_dict(state, strict=True)
    with torch.no_grad():
        assert torch.equal(net.eval()(images()), expected(run[0], network))
        net.to(memory_format=torch.channels_last)
        assert torch.equal(net(images()), expected(run[0], network, torch.channels_last))
        trained = getattr(run[1], network).backbone(images())[-1].mean((2, 3))
        assert torch.equal(net(images()), trained)
    assert str(path) in made.load
    assert made.untrained == []
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("ext", ["safetensors", "pth"])
def test_timm(run, tmp_path, ext):
    path = export(run[0], tmp_path / f"encoder.{ext}", "timm").path
    net = timm.create_model("resnet50", num_classes=0, checkpoint_path=str(path)).eval()
    with torch.no_grad():
        assert torch.equal(net(images()), expected(run[0], "online"))


def test_a_network_of_one_library_is_not_exported_for_the_other(tmp_path):
    make_run(tmp_path / "r", "timm:test_resnet")
    with pytest.raises(UserError, match="--format timm"):
        export(tmp_path / "r", tmp_path / "e2", "torchvision")
    assert not (tmp_path / "e2.safetensors").exists()


UNTRAINED = {
    "timm:test_resnet": [],
    "timm:test_vit": ["norm.weight", "norm.bias"],
    "timm:test_efficientnet": ["conv_head.weight", "bn2.weight", "bn2.bias"],
    "torchvision:mobilenet_v3_small": [],
}


@pytest.mark.parametrize("backbone", UNTRAINED)
def test_printed_lines_file_and_command_agree_to_the_bit(backbone, tmp_path, capsys):
    """The printed Python, ``vito-fast features`` of the file and of the run, and the training graph."""
    import safetensors.torch

    trained = make_run(tmp_path / "r", backbone).online.backbone.to(memory_format=torch.contiguous_format)
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for name in "ab":
        Image.fromarray(rng.integers(0, 255, (90, 120, 3), dtype=np.uint8)).save(tmp_path / "images" / f"{name}.png")
    assert main(["export", str(tmp_path / "r"), str(tmp_path / "x")]) == 0
    said = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert said["exported"] == f"{tmp_path}/x.safetensors"
    assert said.get("untrained", "").split("; ")[0] == ", ".join(UNTRAINED[backbone])
    found = []
    for encoder in ("x.safetensors", "r"):
        out = tmp_path / f"{encoder}.features.safetensors"
        assert main(["features", str(tmp_path / encoder), str(tmp_path / "images"), str(out)]) == 0
        with safetensors.safe_open(out, "pt") as file:
            found.append(file.get_tensor("features"))
            header = file.metadata()
        assert json.loads(header["names"]) == ["a.png", "b.png"]
        assert (header["size"], header["pooling"]) == ("64", "mean")
    with safetensors.safe_open(tmp_path / "x.safetensors", "pt") as file:
        exported = file.metadata()
    same = ("mean", "std", "size", "interpolation", "level", "pooling", "backbone")
    assert {name: exported[name] for name in same} == {name: header[name] for name in same}

    images = torch.stack([pil_to_tensor(Image.open(tmp_path / "images" / f"{name}.png")) for name in "ab"])
    space = {"torch": torch, "torchvision": torchvision, "timm": timm, "safetensors": safetensors, "images": images}
    with torch.no_grad():
        for line in (said["load it with"], said["images"], f"result = {said['features']}"):
            exec(line, space)
        assert torch.equal(space["result"], found[0])
        assert torch.equal(space["result"], found[1])
        assert torch.equal(space["result"], trained(space["x"])[-1].mean((2, 3)))


def test_the_printed_lines_load_the_file(run, tmp_path, capsys):
    import safetensors.torch

    namespace = {"torch": torch, "torchvision": torchvision, "timm": timm, "safetensors": safetensors}
    for arguments in (["--ext", "pth"], ["--format", "timm"]):
        assert main(["export", str(run[0]), str(tmp_path / "x"), *arguments]) == 0
        hint, *_, last = capsys.readouterr().out.splitlines()
        assert last.startswith(f"exported: {tmp_path}/x.")
        exec(hint.removeprefix("load it with: "), namespace)


def test_features_of_videos_in_parquet(run, tmp_path, make_clip, capsys):
    import pyarrow.parquet as pq

    (tmp_path / "v" / "deep").mkdir(parents=True)
    make_clip(tmp_path / "v" / "deep" / "a.mp4", 1)
    make_clip(tmp_path / "v" / "b.mp4", 2)
    (tmp_path / "v" / "broken.mp4").write_text("hello")
    words = ["features", str(run[0]), str(tmp_path / "v"), str(tmp_path / "f.parquet"), "--size", "32"]
    assert main([*words, "--frames", "2", "--pooling", "attention"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith(f"warning: left out: cannot read {tmp_path}/v/broken.mp4")
    assert out[-1] == f"features: {tmp_path}/f.parquet, 2 rows of 3072"
    table = pq.read_table(tmp_path / "f.parquet")
    assert table["name"].to_pylist() == ["b.mp4", "deep/a.mp4"]
    assert (table.schema.metadata[b"pooling"], table.schema.metadata[b"size"]) == (b"attention", b"32")
    assert main([*words, "--frames", "2", "--per-frame"]) == 0
    table = pq.read_table(tmp_path / "f.parquet")
    assert table["name"].to_pylist() == ["b.mp4#0", "b.mp4#1", "deep/a.mp4#0", "deep/a.mp4#1"]
    rows = np.array(table["features"].to_pylist(), np.float32)
    assert rows.shape == (4, 2048)
    assert not np.array_equal(rows[0], rows[2])


@pytest.mark.parametrize(
    ("out", "inputs", "says"),
    [
        ("f.npy", ".", "must end in"),
        ("f.safetensors", "none", "no image or video"),
        ("f.safetensors", "store", "is a store"),
        ("no/f.parquet", ".", "no folder"),
    ],
)
def test_features_that_cannot_be_made_are_one_line(tmp_path, out, inputs, says, capsys):
    (tmp_path / "none").mkdir()
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "store.json").write_text("{}")
    assert main(["features", "pixels", str(tmp_path / inputs), str(tmp_path / out)]) == 2
    assert says in capsys.readouterr().err


def test_places_that_cannot_be_written_and_contradictions(run, tmp_path):
    (tmp_path / "file").write_text("")
    cases = [
        (tmp_path / "file" / "x", None, "cannot write"),
        (tmp_path, None, "is a folder"),
        (tmp_path / "x.pth", "safetensors", "give one of them"),
    ]
    for out, ext, says in cases:
        with pytest.raises(UserError, match=says):
            export(run[0], out, "torchvision", ext)


def test_checkpoints_of_other_versions_are_one_line(tmp_path):
    make_run(tmp_path / "r", "resnet18")
    found = find(tmp_path / "r", pytest.fail)
    newer = found.state["config"] | {"lookahead": 1}
    for state, says in (
        ({"step": 1}, "has no config: it may come from another version"),
        ({"config": found.state["config"]}, "has no step: it may come from another version"),
        ({"step": 1, "config": newer}, r"unknown key 'lookahead'.* \(the checkpoint may come from a newer version"),
    ):
        write(found.path, found.tensors, state)
        with pytest.raises(UserError, match=rf"step-00000001\.safetensors.*{says}"):
            export(tmp_path / "r", tmp_path / "e")


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
def test_a_full_disk_is_one_line(run, tmp_path, full_disk, name):
    with (
        full_disk(5000),
        pytest.raises(UserError, match=rf"^cannot write {tmp_path / name}: .*File too large") as error,
    ):
        export(run[0], tmp_path / name)
    assert "enforce" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_is_not_exported_over(tmp_path):
    make_run(tmp_path / "r", "resnet18")
    checkpoint, mine = tmp_path / "r" / "checkpoints" / "step-00000001.safetensors", tmp_path / "mine.safetensors"
    mine.write_bytes(checkpoint.read_bytes())
    cases = [(tmp_path / "r", checkpoint), (tmp_path / "r", checkpoint.with_suffix("")), (mine, mine)]
    cases.append((tmp_path / "r", checkpoint.with_name("step-00000002.safetensors")))
    for source, out in cases:
        with pytest.raises(UserError, match=r"checkpoint's name: export to another file"):
            export(source, out)
    assert mine.read_bytes() == checkpoint.read_bytes()
    assert [p.name for p in checkpoint.parent.iterdir()] == [checkpoint.name]


def test_attention_picture_of_a_video(run, tmp_path, make_clip, capsys):
    video, out = make_clip(tmp_path / "v.mp4", 1), tmp_path / "a.png"
    assert main(["attention", str(run[0]), str(video), str(out), "--frames", "3", "--size", "64"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"drawn: {out}"
    with Image.open(out) as picture:
        assert picture.size == (3 * (96 + 4) + 4, 3 * (64 + 4 + 16) + 4)
        assert len(picture.getcolors(1 << 20)) > 100
    frames = video_frames(video, 3, 64)
    maps = attention_maps(load_online_of(run[0]), frames)
    assert [m.shape for m in maps] == [(3, 4, 6), (3, 2, 3)]
    for m in maps:
        torch.testing.assert_close(m.sum((1, 2)), torch.ones(3))


@pytest.mark.parametrize("size", ["16", "16384"])
def test_sizes_that_cannot_be_drawn(run, tmp_path, make_clip, capsys, size):
    video = make_clip(tmp_path / "v.mp4", 1)
    assert main(["attention", str(run[0]), str(video), str(tmp_path / "a.png"), "--size", size]) == 2
    assert f"--size 32 to 2048, got 6 and {size}" in capsys.readouterr().err


def test_a_long_narrow_video_may_be_too_large_at_a_size(tmp_path):
    with pytest.raises(UserError, match="--size 4096 makes frames of 524288x4096, too large"):
        attention._resized([np.zeros((16, 2048, 3), np.uint8)], 4096)


def load_online_of(folder):
    return load_online(find(folder, pytest.fail))


def test_overlay_is_red_where_the_weight_is():
    maps = torch.zeros(1, 2, 2)
    maps[0, 0, 0] = 1
    picture = overlay(np.full((1, 64, 64, 3), 128, np.uint8), maps)[0].astype(int)
    assert picture[0, 0, 0] > picture[0, 0, 2] + 30
    assert picture[63, 63, 2] > picture[63, 63, 0] + 30


def test_a_map_that_is_not_finite_leaves_its_frame_grey():
    maps = torch.ones(3, 2, 2).cumsum(2)
    maps[1, 0, 1], maps[2] = torch.nan, torch.inf
    frames = np.full((3, 64, 64, 3), (90, 120, 150), np.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = overlay(frames, maps)
    assert (drawn[1:] == 120).all()
    np.testing.assert_array_equal(drawn[:1], overlay(frames[:1], maps[:1]))


@pytest.mark.parametrize("bad", ["missing", "text", "empty"])
def test_attention_refuses_what_is_no_video(run, tmp_path, bad, capsys):
    path = tmp_path / "v.mp4"
    if bad != "missing":
        path.write_bytes(b"hello" * 100 if bad == "text" else b"")
    assert main(["attention", str(run[0]), str(path), str(tmp_path / "a.png")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert "v.mp4" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "a.png").exists()


def test_average_pooling_has_no_attention_to_draw(tmp_path, make_clip, capsys):
    make_run(tmp_path / "r", "timm:test_resnet", pooling="average")
    video = make_clip(tmp_path / "v.mp4", 1)
    assert main(["attention", str(tmp_path / "r"), str(video), str(tmp_path / "a.png")]) == 2
    assert "no attention to draw" in capsys.readouterr().err
