"""The method against an independent one: torchvision's ResNet, and head and loss in forty lines of plain PyTorch."""

import dataclasses
import warnings

import pytest
import torch
from ranks import spawn
from torch import nn
from torch.nn import functional as F

from vito_fast.config import Config, ModelConfig, SamplerConfig, TrainConfig
from vito_fast.train.distributed import World, init_distributed
from vito_fast.train.trainer import Trainer

CONFIG = Config(
    model=ModelConfig(backbone="resnet18", projector_hidden=32, projector_out=16, zero_init_residual=False),
    train=TrainConfig(batch_size=6, dtype="float64", channels_last=False),
)


class Pool(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.hidden, self.logit = nn.Linear(channels, channels), nn.Linear(channels, 1)

    def forward(self, x):  # (B,C,H,W) -> (B,C)
        x = x.flatten(2).transpose(1, 2)
        weights = self.logit(self.hidden(x).relu()).softmax(1)
        return (x * weights).sum(1)


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = pytest.importorskip("torchvision").models.resnet18()
        self.pools = nn.ModuleList([Pool(256), Pool(512)])
        self.head = nn.Sequential(nn.Linear(768, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 16, bias=False))

    def forward(self, x):  # one view: (B,3,H,W) -> unit (B,D)
        b = self.body
        x = b.layer2(b.layer1(b.maxpool(b.relu(b.bn1(b.conv1(x))))))
        fine = b.layer3(x)
        levels = [fine, b.layer4(fine)]
        z = self.head(torch.cat([pool(level) for pool, level in zip(self.pools, levels, strict=True)], 1))
        return F.normalize(z, dim=1)


def published_loss(online, target, views, temperature):
    queries = [online(view) for view in views]  # each view is a forward pass of its own
    with torch.no_grad():
        keys = [target(view) for view in views]
    loss = 0
    for i, q in enumerate(queries):
        for j, k in enumerate(keys):
            if i != j:
                loss = loss + F.cross_entropy(q @ k.T / temperature, torch.arange(len(q)))
    return loss


def independent(branch):
    """The independent network with a branch's weights: (network, our name of each of its parameters)."""
    network, ours = Network().double().train(), dict(branch.named_parameters())
    network.body.fc = nn.Identity()
    renamed = {"body.": "backbone.", "head.": "projectors.0.", ".logit.": ".score."}
    names = {}
    for name, p in network.named_parameters():
        new = name
        for theirs, mine in renamed.items():
            new = new.replace(theirs, mine)
        names[name] = new
        with torch.no_grad():
            p.copy_(ours[new].view_as(p))
    assert set(names.values()) == set(ours)
    return network, names


def images_of(views):
    return [torch.randn(6, 3, 64, 64, generator=torch.Generator().manual_seed(v)) for v in range(views)]


def config_of(views, **train):
    changed = dataclasses.replace(CONFIG.train, **train)
    return dataclasses.replace(CONFIG, sampler=SamplerConfig(size=64, views=views), train=changed)


def one_step(config, world, clips):
    """A step's loss, gradients and buffers, without an update of the weights."""
    trainer = Trainer(config, world, 5)
    trainer.optimizer.step = lambda *_: None
    views = tuple(image[clips] for image in images_of(config.sampler.views))
    row = trainer.step(views, torch.arange(6)[clips], measure=True)
    branch = trainer.model.online
    return row["loss"], {n: p.grad for n, p in branch.named_parameters()}, dict(branch.named_buffers())


def assert_published(views, loss, gradients, buffers):
    """The step's numbers are those of the independent network and loss from the same weights."""
    model = Trainer(config_of(views), World(0, 1, 1, torch.device("cpu")), 5).model
    (online, names), (target, _) = independent(model.online), independent(model.target)
    expected = published_loss(online, target, [image.double() for image in images_of(views)], 0.1)
    expected.backward()
    assert loss * views * (views - 1) == pytest.approx(expected.item(), rel=1e-10)
    for name, p in online.named_parameters():
        theirs, ours = p.grad, gradients[names[name]].view_as(p)
        assert (ours - theirs).norm() <= 1e-9 * theirs.norm() + 1e-14, name
    for name, b in online.named_buffers():  # the running statistics move by one view after the other
        mine = name.replace("body.", "backbone.").replace("head.", "projectors.0.")
        torch.testing.assert_close(buffers[mine], b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("views", "compiled"), [(2, False), (3, False), (3, True)])
def test_loss_and_gradients_are_those_of_forty_independent_lines(views, compiled, monkeypatch):
    def online_network(part, mode=None):  # to the graphs that Inductor would get: its own part takes minutes
        learns = isinstance(part, nn.Module) and next(part.parameters()).requires_grad
        return torch.compile(part, backend="aot_eager", fullgraph=True) if learns else part

    monkeypatch.setattr("vito_fast.train.trainer._compiled", online_network)
    torch._dynamo.reset()
    alone = World(0, 1, 1, torch.device("cpu"))
    assert_published(views, *one_step(config_of(views, compile=compiled), alone, slice(0, 6)))


def _rank(rank, folder):
    warnings.simplefilter("ignore")  # the untouched update leaves DDP's hints
    for views in (2, 3):
        own = slice(3 * rank, 3 * rank + 3)
        torch.save(one_step(config_of(views), init_distributed("cpu"), own), folder / f"{views}-{rank}.pt")


def test_loss_and_gradients_on_two_ranks_are_those_of_one(tmp_path):
    spawn(_rank, 2, tmp_path)
    for views in (2, 3):
        first, second = (torch.load(tmp_path / f"{views}-{rank}.pt") for rank in range(2))
        assert first[0] == second[0]
        assert all(torch.equal(p, second[1][name]) for name, p in first[1].items())
        assert_published(views, *first)


def test_joint_statistics_are_of_all_views_together():
    images = tuple(torch.randn(6, 3, 64, 64, generator=torch.Generator().manual_seed(v)) + v for v in range(2))
    losses = {}
    for kind in ("per_view", "joint"):
        model = dataclasses.replace(CONFIG.model, batch_norm=kind)
        config = dataclasses.replace(CONFIG, model=model, sampler=SamplerConfig(size=64, views=2))
        trainer = Trainer(config, World(0, 1, 1, torch.device("cpu")), 5)
        losses[kind] = trainer.step(images, torch.arange(6), measure=True)["loss"]
        mean = trainer.model.online.backbone.bn1.running_mean
        stem = trainer.model.online.backbone.conv1
        assert mean.shape == (stem.out_channels,)
    assert abs(losses["per_view"] - losses["joint"]) > 1e-3
    with pytest.raises(ValueError, match="a step takes 2 views, got 1"):
        trainer.step(images[:1], torch.arange(6), measure=False)
