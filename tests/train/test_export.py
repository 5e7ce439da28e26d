"""Exported files load into plain torchvision and timm networks and give the same features, bit for bit."""

import warnings

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from vito_fast.cli.main import main
from vito_fast.config import Config, ModelConfig, TrainConfig
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
    path, hint = export(run[0], tmp_path / "encoder", "torchvision", ext, network)
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
    assert str(path) in hint
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("ext", ["safetensors", "pth"])
def test_timm(run, tmp_path, ext):
    path, _ = export(run[0], tmp_path / f"encoder.{ext}", "timm")
    net = timm.create_model("resnet50", num_classes=0, checkpoint_path=str(path)).eval()
    with torch.no_grad():
        assert torch.equal(net(images()), expected(run[0], "online"))


def test_timm_backbones_export_under_their_own_names(tmp_path):
    make_run(tmp_path / "r", "timm:test_resnet")
    path, _ = export(tmp_path / "r", tmp_path / "e", "timm")
    timm.create_model("test_resnet", num_classes=0).load_state_dict(load_file(path), strict=True)
    with pytest.raises(UserError, match="--format timm"):
        export(tmp_path / "r", tmp_path / "e2", "torchvision")
    assert not (tmp_path / "e2.safetensors").exists()


def test_the_printed_lines_load_the_file(run, tmp_path, capsys):
    namespace = {"torch": torch, "torchvision": torchvision, "timm": timm}
    import safetensors.torch

    namespace["safetensors"] = safetensors
    for arguments in (["--ext", "pth"], [], ["--format", "timm"]):
        assert main(["export", str(run[0]), str(tmp_path / "x"), *arguments]) == 0
        *_, hint, last = capsys.readouterr().out.splitlines()
        assert last.startswith(f"exported: {tmp_path}/x.")
        exec(hint.removeprefix("load it with: "), namespace)


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
