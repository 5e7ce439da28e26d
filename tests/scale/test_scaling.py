"""The plan's scaling model against runs here: one process and a bare all-reduce must foretell two and four.

Time is the processor time of a rank, which other work on the machine moves little; ranks that share cores take turns.
"""

import json
import os
import statistics
import time

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from vito_fast.config import Config, ModelConfig, TrainConfig
from vito_fast.data.sampler import SamplerConfig
from vito_fast.distributed import join, leave
from vito_fast.hardware import GPUS, machine
from vito_fast.model.norm import convert_sync_batchnorm
from vito_fast.plan import PlanOptions, predict
from vito_fast.step import Trainer

CLIPS = 16
CONFIG = Config(
    sampler=SamplerConfig(size=64),
    model=ModelConfig(backbone="resnet18", projector_hidden=64, projector_out=32, attention_hidden=32),
    train=TrainConfig(batch_size=CLIPS, device="cpu"),
)


def _rank(rank, ranks, port, folder):
    if ranks > 1:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    world = join("cpu")
    trainer = Trainer(CONFIG, world, 5)
    if ranks == 1:  # the batch norm that several ranks have, which is not torch's fused one
        convert_sync_batchnorm(trainer.model)
    views = tuple(torch.randn(CLIPS // ranks, 3, 64, 64) for _ in range(2))
    spent = []
    for _ in range(8):
        before = time.process_time()
        trainer.step(views, torch.arange(CLIPS // ranks) + rank * CLIPS, measure=False)
        spent.append(time.process_time() - before)
    latency = 0.0
    if ranks > 1:
        small, before = torch.zeros(513), time.process_time()
        for _ in range(200):
            dist.all_reduce(small)
        latency = (time.process_time() - before) / 200
    (folder / f"{ranks}-{rank}.json").write_text(json.dumps([spent[1:], latency]))
    leave()


def measured(ranks, folder):
    """Processor seconds of a rank: of a step, the least over steps and ranks; of one small all-reduce."""
    mp.spawn(_rank, (ranks, 23000 + os.getpid() % 20000 + ranks, folder), nprocs=ranks)
    steps, latencies = zip(*(json.loads((folder / f"{ranks}-{r}.json").read_text()) for r in range(ranks)), strict=True)
    return min(t for row in steps for t in row), statistics.mean(latencies)


def calibration(folder, scale, latency=1e-9):
    """One thread: so many flop/s and half as many bytes/s, times a factor that the run of one process decides.

    The CPU's batch norm reduces mean and variance one after the other: two small all-reduces where the plan counts one.
    """
    values = dict.fromkeys(GPUS["cpu"], 1.0)
    values |= {"tf32": 4e10 * scale, "bf16": 4e10 * scale, "bandwidth": 2e10 * scale, "link": 1e9, "memory": 1e11}
    values |= {"node_gpus": 64, "node_cores": 64, "matmul_efficiency": 1.0, "bandwidth_efficiency": 1.0}
    values |= {"link_latency": 2 * latency}
    file = folder / "cpu.json"
    file.write_text(json.dumps({"machine": "one core here", "constants": values}))
    return machine("cpu", file)


def foretold(ranks, constants):
    return predict(CONFIG, PlanOptions(gpu="cpu", gpus=ranks, clips=CLIPS), constants).resources["gpu"]


@pytest.mark.timed
def test_two_and_four_processes_take_what_one_foretells(tmp_path):
    runs = {ranks: measured(ranks, tmp_path) for ranks in (1, 2, 4)}
    scale = foretold(1, calibration(tmp_path, 1.0)) / runs[1][0]
    told = {ranks: foretold(ranks, calibration(tmp_path, scale, max(runs[ranks][1], 1e-9))) for ranks in runs}
    assert told[1] == pytest.approx(runs[1][0], rel=1e-6)
    print(f"processor seconds (a step, an all-reduce): measured {runs}, foretold {told}")
    for ranks in (2, 4):
        assert 1 / 1.8 < runs[ranks][0] / told[ranks] < 1.8, (runs, told)  # perfect scaling would be off by 2 and 4


def test_ranks_that_share_cores_take_turns(tmp_path):
    constants = calibration(tmp_path, 1.0)
    shared = {**constants.constants, "node_cores": constants.constants["node_cores"]._replace(value=2.0)}
    crowded = type(constants)("cpu", shared)
    assert foretold(2, crowded) == pytest.approx(foretold(2, constants))
    assert foretold(4, crowded) == pytest.approx(2 * foretold(4, constants), rel=1e-4)
