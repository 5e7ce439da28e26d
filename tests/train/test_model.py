"""The networks: torchvision's names and features, pooling, the pair."""

import copy

import pytest
import torch
from torch import nn

from vito_fast.config import ModelConfig, OptimizerConfig
from vito_fast.errors import UserError
from vito_fast.model import RESNETS, ResNet, VitoModel
from vito_fast.model.backbones import build_backbone
from vito_fast.model.norm import frozen_statistics
from vito_fast.model.pair import AveragePool, mlp, normalize
from vito_fast.train.optim import Lars

SMALL = ModelConfig(backbone="resnet18", projector_hidden=32, projector_out=16)


def images(n=4, size=64, seed=0):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def randomise_statistics(net):
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias, std=0.1)
            nn.init.normal_(m.running_mean, std=0.1)
            nn.init.uniform_(m.running_var, 0.5, 1.5)
    return net.eval()


@pytest.mark.parametrize("name", RESNETS)
@pytest.mark.parametrize("peer", ["torchvision", "timm"])
def test_state_dict_loads_strictly_into_the_peer_with_the_same_features(name, peer):
    torch.manual_seed(0)
    ours = randomise_statistics(RESNETS[name](levels=2))
    if peer == "torchvision":
        import torchvision

        theirs = getattr(torchvision.models, name)()
        theirs.fc = nn.Identity()
    else:
        import timm

        theirs = timm.create_model(name, num_classes=0)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = images(2)
    with torch.no_grad():
        finest, coarsest = ours(x)
        assert torch.equal(coarsest.mean((2, 3)), theirs.eval()(x))
    assert [finest.shape[1], coarsest.shape[1]] == ours.channels
    assert [64 // finest.shape[2], 64 // coarsest.shape[2]] == ours.strides == [16, 32]


def test_zero_init_makes_blocks_start_as_the_identity():
    net = RESNETS["resnet50"](zero_init_residual=True)
    assert all(b.last_norm.weight.abs().sum() == 0 for b in net.layer2.children())
    assert all(b.last_norm.weight.min() == 1 for b in RESNETS["resnet50"](zero_init_residual=False).layer2.children())


@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("pooling", ["attention", "average"])
@pytest.mark.parametrize("heads", ["concatenated", "per_level"])
def test_branch_gives_one_embedding_or_one_a_level(levels, pooling, heads):
    model = VitoModel(ModelConfig(**{**vars(SMALL), "levels": levels, "pooling": pooling, "heads": heads}))
    out = model.online(images())
    assert [z.shape for z in out.embeddings] == [(4, 16)] * (levels if heads == "per_level" else 1)
    assert [w.shape[1] for w in out.weights] == [(64 // s) ** 2 for s in model.online.backbone.strides]
    for w in out.weights:
        torch.testing.assert_close(w.sum(1), torch.ones(4))


def test_average_pool_is_the_mean_with_uniform_weights():
    x = torch.randn(2, 5, 3, 4)
    pooled, weights = AveragePool()(x)
    torch.testing.assert_close(pooled, torch.einsum("bcl,bl->bc", x.flatten(2), weights))


def test_heads_are_the_ancestors():
    head = mlp(8, 32, 16)
    assert [type(m).__name__ for m in head] == ["Linear", "BatchNorm", "ReLU", "Linear"]
    assert head[0].bias is not None
    assert head[3].bias is None
    assert (head[1].momentum, head[1].eps) == (0.1, 1e-5)


def test_the_pair_starts_equal_and_the_target_follows_over_parameters_only():
    torch.manual_seed(0)
    model = VitoModel(SMALL)
    target, online = model.averaged_pairs()
    assert all(torch.equal(t, o) for t, o in zip(target, online, strict=True))
    assert not any(p.requires_grad for p in model.target.parameters())
    assert model.target.predictors is None
    before = [t.clone() for t in target]
    buffers = {n: b.clone() for n, b in model.target.named_buffers()}
    with torch.no_grad():
        for p in model.online.parameters():
            p.add_(1)
    model.online(images())  # moves the online buffers
    model.update_target(0.9)
    for b, t, o in zip(before, target, online, strict=True):
        torch.testing.assert_close(t, 0.9 * b + 0.1 * o)
    assert all(torch.equal(b, buffers[n]) for n, b in model.target.named_buffers())
    model.update_target(1.0)
    model.target(images())  # its own forward moves them
    assert any(not torch.equal(b, buffers[n]) for n, b in model.target.named_buffers())


def test_frozen_statistics_normalises_by_the_batch_and_keeps_buffers():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    before = copy.deepcopy(dict(net.named_buffers()))
    with frozen_statistics(net):
        inside = net(images())
    assert all(torch.equal(b, before[n]) for n, b in net.named_buffers())
    assert torch.equal(inside, net(images()))
    assert net[1].num_batches_tracked == 1


def test_recomputed_activations_change_neither_gradients_nor_statistics():
    results = []
    for recompute in (False, True):
        torch.manual_seed(0)
        net = RESNETS["resnet18"](levels=1, zero_init_residual=False, checkpoint_activations=recompute)
        net(images())[0].square().mean().backward()
        results.append((dict(net.named_buffers()), [p.grad for p in net.parameters()]))
    (buffers, grads), (buffers2, grads2) = results
    assert all(torch.equal(buffers[n], buffers2[n]) for n in buffers)
    assert all(torch.equal(a, b) for a, b in zip(grads, grads2, strict=True))


def test_timm_backbone_has_timms_names_and_stage_features():
    import timm

    backbone = build_backbone(ModelConfig(backbone="timm:convnext_atto", levels=2))
    peer = timm.create_model("convnext_atto", num_classes=0)
    peer.load_state_dict(backbone.body.state_dict(), strict=True)
    finest, coarsest = backbone(images(1))
    assert (finest.shape[1], coarsest.shape[1]) == tuple(backbone.channels)
    assert [64 // finest.shape[2], 64 // coarsest.shape[2]] == backbone.strides


def test_what_no_feature_of_a_timm_network_depends_on_is_left_alone():
    """Neither the optimiser nor DDP knows of it, and building draws the numbers that it always drew."""
    import timm

    torch.manual_seed(0)
    backbone = build_backbone(ModelConfig(backbone="timm:test_efficientnet", levels=1))
    torch.manual_seed(0)
    peer = timm.create_model("test_efficientnet", num_classes=0)
    torch.testing.assert_close(backbone.body.state_dict(), peer.state_dict(), rtol=0, atol=0)
    assert backbone.body.training
    left_alone = {name for name, p in backbone.body.named_parameters() if not p.requires_grad}
    assert left_alone == {"conv_head.weight", "bn2.weight", "bn2.bias"}
    sum(f.square().mean() for f in backbone(images(1))).backward()
    assert {name for name, p in backbone.body.named_parameters() if p.grad is None} == left_alone
    names = [name for name, _ in Lars(backbone.named_parameters(), OptimizerConfig()).adapted]
    assert "body.conv_stem.weight" in names
    assert "body.conv_head.weight" not in names


def test_a_transformer_interpolates_its_positions_and_is_timms_at_its_own_size():
    import timm

    backbone = build_backbone(ModelConfig(backbone="timm:test_vit3", levels=1)).eval()
    assert backbone.options == {"dynamic_img_size": True}
    peer = timm.create_model("test_vit3", num_classes=0).eval()
    peer.load_state_dict(backbone.body.state_dict())
    with torch.no_grad():
        assert torch.equal(
            backbone(images(1, 160))[0], peer.forward_intermediates(images(1, 160), 1, intermediates_only=True)[0]
        )
        (wide,) = backbone(torch.zeros(1, 3, 64, 96))
    assert wide.shape[2:] == (4, 6)
    with pytest.raises(UserError, match=r"'timm:test_vit3' takes no images of 60 x 60 \(.*sampler\.size .*160 x 160"):
        backbone(images(1, 60))


@pytest.mark.parametrize(
    ("name", "head", "last"),
    [
        ("mobilenet_v3_small", "classifier", lambda m, x: m.features(x)),
        ("regnet_y_400mf", "fc", lambda m, x: m.trunk_output(m.stem(x))),
        ("swin_t", "head", lambda m, x: m.features(x).permute(0, 3, 1, 2)),
    ],
)
def test_torchvision_backbones_have_torchvisions_names_and_features(name, head, last):
    import torchvision

    backbone = build_backbone(ModelConfig(backbone=f"torchvision:{name}", levels=4)).eval()
    peer = torchvision.models.get_model(name).eval()
    setattr(peer, head, nn.Identity())
    peer.load_state_dict(backbone.body.state_dict(), strict=True)
    with torch.no_grad():
        maps = backbone(images(1))
        assert torch.equal(maps[-1], last(peer, images(1)))
    assert [x.shape[1] for x in maps] == backbone.channels
    assert [64 // x.shape[2] for x in maps] == backbone.strides == [4, 8, 16, 32]
    unused = {n for n, p in backbone.named_parameters() if not p.requires_grad}
    assert unused == ({"body.norm.weight", "body.norm.bias"} if name == "swin_t" else set())


def test_drop_path_is_of_the_online_network_alone_and_grows_with_depth():
    for name in ("timm:test_convnext", "torchvision:efficientnet_b0"):
        model = VitoModel(ModelConfig(backbone=name, drop_path=0.3, projector_hidden=8, projector_out=4))
        rates = [
            [
                vars(m).get("drop_prob", vars(m).get("p"))
                for m in branch.modules()
                if type(m).__name__ in ("DropPath", "StochasticDepth")
            ]
            for branch in (model.online, model.target)
        ]
        assert rates[0][-1] == pytest.approx(0.3, rel=0.2)
        assert rates[0] == sorted(rates[0])
        assert not any(rates[1])
    with pytest.raises(UserError, match="resnet18 has none"):
        build_backbone(ModelConfig(backbone="resnet18", drop_path=0.1))
    with pytest.raises(UserError, match="no stochastic depth"):
        build_backbone(ModelConfig(backbone="torchvision:mobilenet_v2", drop_path=0.1))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("resnet51", "resnet18, resnet34, resnet50"),
        ("timm:no_such_net", "no_such_net"),
        ("", "timm:NAME"),
        ("torchvision:nope", "nope"),
        ("torchvision:vit_b_16", "timm"),
    ],
)
def test_unknown_backbones_are_refused_by_name(name, says):
    with pytest.raises(UserError, match=says):
        build_backbone(ModelConfig(backbone=name))


def test_levels_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"model\.levels must be 1 to 4, got 5"):
        ModelConfig(levels=5)
    with pytest.raises(ValueError, match="levels must be 1 to 4"):
        ResNet(type("x", (), {}), (1, 1, 1, 1), levels=0)


def test_normalise_gives_unit_rows_in_float32_at_least():
    rows = normalize(torch.randn(3, 8, dtype=torch.bfloat16))
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(3))
    assert normalize(torch.randn(3, 8, dtype=torch.float64)).dtype == torch.float64
