"""What the plan assumes to travel between ranks is what travels: the collectives of one step of two, counted."""

import dataclasses
from collections import Counter

import pytest
import torch
from ranks import spawn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.profiler import ProfilerActivity, profile

from vito_fast.config import Config, ModelConfig, SamplerConfig, TrainConfig
from vito_fast.model import VitoModel
from vito_fast.plan.dryrun import dry_run
from vito_fast.plan.predict import collectives
from vito_fast.train.distributed import init_distributed
from vito_fast.train.trainer import Trainer

CLIPS = 4  # of a rank
PLAIN = Config(
    sampler=SamplerConfig(size=32, views=2),
    model=ModelConfig(backbone="timm:test_resnet", projector_hidden=16, projector_out=8, attention_hidden=8),
    train=TrainConfig(batch_size=2 * CLIPS, device="cpu"),
)
CASES = {
    "plain": PLAIN,
    "cached": dataclasses.replace(PLAIN, train=dataclasses.replace(PLAIN.train, micro_batches=2)),
}


def _rank(rank, folder):
    world = init_distributed("cpu")
    found = {}
    for name, config in CASES.items():
        trainer = Trainer(config, world, 5)
        views, video = tuple(torch.randn(CLIPS, 3, 32, 32) for _ in range(2)), torch.arange(CLIPS) + CLIPS * rank
        for _ in range(2):  # DDP makes its buckets anew after the first
            trainer.step(views, video, measure=False)
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
            trainer.step(views, video, measure=False)
        found[name] = [(e.name, tuple(e.input_shapes[0])) for e in profiler.events() if e.name.startswith("gloo:")]
    if rank == 0:
        torch.save(found, folder / "found.pt")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """(operation, shape of what this rank sends) of each collective of a step, by case."""
    folder = tmp_path_factory.mktemp("collectives")
    spawn(_rank, 2, folder)
    return torch.load(folder / "found.pt")


@pytest.mark.parametrize("name", CASES)
def test_the_plan_counts_the_collectives_of_a_step_and_their_bytes(name, found):
    config = CASES[name]
    dry, parts = dry_run(config, clips=CLIPS, world=2), config.train.micro_batches
    told = collectives(config, dry)
    gathered = [shape for operation, shape in found[name] if operation == "gloo:all_gather"]
    assert len(gathered) == told["keys"]
    assert sorted(gathered, key=len) == [(CLIPS,), (CLIPS, 2 * 8)]
    assert dry.key_bytes == CLIPS * 2 * 8 * 4

    reduced = Counter(shape for operation, shape in found[name] if operation == "gloo:all_reduce")
    norms: Counter[tuple[int, ...]] = Counter()
    model, views = VitoModel(config.model), config.sampler.views
    for branch, passes in ((model.target, parts), (model.online, parts * (2 if parts == 1 else 3))):
        for norm in (m for m in branch.modules() if isinstance(m, _BatchNorm)):
            norms[(views * norm.num_features + 1,)] += passes  # sums of each view, and count
            norms[(views, norm.num_features)] += passes  # and on the CPU the squared deviations by themselves
    assert norms.total() == 2 * told["batch norm"]
    assert not norms - reduced
    rest = (reduced - norms).elements()
    buckets = [shape[0] for shape in rest if shape]
    assert 4 * sum(buckets) == dry.gradient_bytes
    assert len(buckets) == told["gradients"] > 1
    assert reduced[()] == told["finite flag"]
