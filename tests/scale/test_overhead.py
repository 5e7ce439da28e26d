"""What the trainer adds to forward, backward and update: at most three hundredths, with the data ready."""

import time

import pytest
import torch

from vito_fast.config import Config, ModelConfig, TrainConfig
from vito_fast.model.pair import normalize
from vito_fast.train.distributed import World
from vito_fast.train.keys import GatheredKeys
from vito_fast.train.loss import objective
from vito_fast.train.trainer import Trainer

CONFIG = Config(model=ModelConfig(backbone="resnet18"), train=TrainConfig(batch_size=12, device="cpu"))
ROUNDS = 20
"""At most. The least of several is what a step costs; the first rounds in which both had a quiet moment decide."""


def bare(trainer, views, video):
    """The step's mathematics and nothing else."""
    images = torch.cat(views)
    for p in trainer.model.online.parameters():
        p.grad = None
    with torch.no_grad():
        keys = [normalize(z).unflatten(0, (2, -1)) for z in trainer.model.target(images).embeddings]
    queries = [normalize(z).unflatten(0, (2, -1)) for z in trainer.model.online(images).embeddings]
    objective(queries, GatheredKeys(keys, video, 0), CONFIG.loss)[0].backward()
    trainer.optimizer.step(0.1)
    trainer.model.update_target(0.99)


@pytest.mark.timed
def test_the_trainer_costs_at_most_three_hundredths_more_than_the_bare_step():
    trainer = Trainer(CONFIG, World(0, 1, 1, torch.device("cpu")), 100)
    views = tuple(torch.randn(12, 3, 96, 96).contiguous(memory_format=torch.channels_last) for _ in range(3))
    video = torch.arange(12)
    steps = {
        "bare": lambda: bare(trainer, views, video),
        "trainer": lambda: trainer.step(views, video, measure=False),
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()  # warm
    for _ in range(ROUNDS):  # in turn, by processor time: what else the machine does concerns both alike
        for name, step in steps.items():
            before = time.process_time()
            step()
            times[name].append(time.process_time() - before)
        if len(times["bare"]) >= 4 and min(times["trainer"]) <= 1.03 * min(times["bare"]):
            return
    raise AssertionError(f"the trainer's step costs more than 1.03 times the bare one: {times}")
