"""The plan's scaling model against runs here: one process and bare all-reduces must foretell two and four.

Time is the processor time of a rank, which other work on the machine moves little; ranks that share cores take turns.
"""

import dataclasses
import json
import os
import statistics
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from vito_fast.config import Config, ModelConfig, SamplerConfig, TrainConfig
from vito_fast.model.norm import set_batch_norms
from vito_fast.plan.hardware import GPUS, machine
from vito_fast.plan.predict import PlanOptions, predict
from vito_fast.train.distributed import init_distributed, shutdown
from vito_fast.train.trainer import Trainer

CLIPS = 16
LARGE = 25 * 2**18  # float32 numbers in a bucket of gradients
CONFIG = Config(
    sampler=SamplerConfig(size=64, views=2),
    model=ModelConfig(backbone="resnet18", projector_hidden=64, projector_out=32, attention_hidden=32),
    train=TrainConfig(batch_size=CLIPS, device="cpu"),
)


def with_clips(clips):
    return dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, batch_size=clips))


def _rank(process, ranks, clips, port, folder):
    rank = process if ranks > 1 else 0
    if ranks > 1:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    world, share = init_distributed("cpu"), clips // ranks
    trainer = Trainer(with_clips(clips), world, 5)
    if ranks == 1:  # the batch norm that several ranks have, which is not torch's fused one
        set_batch_norms(trainer.model, sync=True)
    views = tuple(torch.randn(share, 3, 64, 64) for _ in range(2))
    spent = []
    for _ in range(8):
        before = time.process_time()
        trainer.step(views, torch.arange(share) + rank * share, measure=False)
        spent.append(time.process_time() - before)
    reduced = [_all_reduce_seconds(513, 200), _all_reduce_seconds(LARGE, 10)] if ranks > 1 else [0.0, 0.0]
    (folder / f"{process}.json").write_text(json.dumps([min(spent[1:]), *reduced]))
    shutdown()


def _all_reduce_seconds(numbers, repeats):
    values, before = torch.zeros(numbers), time.process_time()
    for _ in range(repeats):
        dist.all_reduce(values)
    return (time.process_time() - before) / repeats


def measured(ranks, clips, folder):
    """Processor seconds of a rank: of a step, the least over steps and ranks; of a small and of a large all-reduce.

    One rank is measured twice at once: with the machine to itself, a core has better caches and a faster clock.
    """
    processes = max(2, ranks)
    mp.spawn(_rank, (ranks, clips, 23000 + os.getpid() % 20000 + ranks, folder), nprocs=processes)
    rows = [json.loads((folder / f"{process}.json").read_text()) for process in range(processes)]
    steps, small, large = zip(*rows, strict=True)
    return min(steps), statistics.mean(small), statistics.mean(large)


def calibration(folder, rate=1.0, launch=1e-15, latency=1e-12, link=1e15):
    """One thread: so many times 40 Gflop/s, and half as many bytes/s; the time of an op that does nothing.

    The CPU's batch norm reduces mean and variance one after the other: two small all-reduces where the plan counts one.
    What is sent beside the backward pass takes no less processor time for it: no overlap.
    """
    values = dict.fromkeys(GPUS["cpu"], 1.0)
    values |= {"tf32": 4e10 * rate, "bf16": 4e10 * rate, "bandwidth": 2e10 * rate, "memory": 1e11}
    values |= {"node_gpus": 64, "node_cores": 64, "matmul_efficiency": 1.0, "bandwidth_efficiency": 1.0}
    values |= {"launch": launch, "link": link, "link_efficiency": 1.0, "link_latency": 2 * latency, "overlap": 1e-9}
    file = folder / "cpu.json"
    file.write_text(json.dumps({"machine": "one core here", "constants": values}))
    return machine("cpu", file)


def foretold(ranks, clips, constants):
    return predict(with_clips(clips), PlanOptions(gpu="cpu", gpus=ranks, clips=CLIPS), constants).resources["gpu"]


def fitted(times, folder):
    """(rate, launch) with which one process takes the times measured for two numbers of clips: linear in 1/rate and
    launch.
    """
    work = [foretold(1, clips, calibration(folder)) for clips in times]
    ops = [foretold(1, clips, calibration(folder, rate=1e9, launch=1.0)) for clips in times]
    inverse_rate, launch = np.linalg.solve(np.stack([work, ops], 1), list(times.values()))
    return 1 / inverse_rate, launch


@pytest.mark.timed
def test_two_and_four_processes_take_what_one_foretells(tmp_path):
    alone = {clips: measured(1, clips, tmp_path)[0] for clips in (CLIPS, CLIPS // 4)}
    rate, launch = fitted(alone, tmp_path)
    print(f"processor seconds of a step alone, by clips: {alone}; {rate:.2f} x the rates, {launch * 1e6:.0f} us an op")
    for ranks in (2, 4):
        takes, latency, large = measured(ranks, CLIPS, tmp_path)
        link = 2 * (ranks - 1) / ranks * 4 * LARGE / large
        told = foretold(ranks, CLIPS, calibration(tmp_path, rate, launch, latency, link))
        print(f"{ranks} processes: measured {takes:.3f}, foretold {told:.3f}; {latency:.6f} s, {link / 1e9:.2f} GB/s")
        assert 1 / 1.4 < takes / told < 1.4  # perfect scaling would be off by 2 and 4


def test_ranks_that_share_cores_take_turns(tmp_path):
    constants = calibration(tmp_path)
    shared = {**constants.constants, "node_cores": constants.constants["node_cores"]._replace(value=2.0)}
    crowded = type(constants)("cpu", shared)
    assert foretold(2, CLIPS, crowded) == pytest.approx(foretold(2, CLIPS, constants))
    assert foretold(4, CLIPS, crowded) == pytest.approx(2 * foretold(4, CLIPS, constants), rel=1e-4)
