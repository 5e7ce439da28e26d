"""Kills a run with SIGKILL again and again, resumes it each time, and compares its end with that of a run left alone.

``python survive.py CONFIG.yaml KILLS SEED`` prints JSON. Each run is a fork of this process, which has imported
everything and started nothing, so that most of a child's life is training. Half of the kills come at a random moment,
half while a checkpoint is being written.
"""

import json
import os
import random
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from vito_fast.config import Config
from vito_fast.config_files import load_config
from vito_fast.train.checkpoint import checkpoints, read
from vito_fast.train.loop import train


def fork(config: Config) -> int:
    """Starts the run in a child and returns its process number; the child's output is dropped."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        torch.set_num_threads(1)
        train(config, resume=True)
        status = 0
    finally:
        os._exit(status)


def ended(child: int) -> int | None:
    """The child's exit status, or None while it runs."""
    done, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def folder(config: Config) -> Path:
    return Path(config.train.runs) / config.name / "checkpoints"


def steps(config: Config) -> list[int]:
    return [int(path.stem.removeprefix("step-")) for path in checkpoints(folder(config))]


def kill_once(config: Config, generator: random.Random, in_a_write: bool) -> dict[str, object] | None:
    """Starts or resumes the run and kills it; what was there then, or None if it reached its end first."""
    begun = max(steps(config), default=0)
    child = fork(config)
    while not [s for s in steps(config) if s > begun] and begun == max(steps(config), default=0):
        if (status := ended(child)) is not None:
            assert status == 0, f"the run failed with {status}"
            return None
        time.sleep(0.002)  # it trains: from here on every moment is as good as any
    until = time.monotonic() + generator.uniform(0, 0.25)
    while time.monotonic() < until or (in_a_write and not list(folder(config).glob(".*.partial"))):
        if (status := ended(child)) is not None:
            assert status == 0, f"the run failed with {status}"
            return None
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return {"step": max(steps(config)), "writing": bool(list(folder(config).glob(".*.partial")))}


def finish(config: Config) -> dict[str, torch.Tensor]:
    child = fork(config)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    return read(checkpoints(folder(config))[0]).tensors


def main(path: str, kills: int, seed: int) -> None:
    config, generator = load_config(path), random.Random(seed)
    killed = replace(config, name="killed")
    moments = []
    for i in range(kills):
        if (moment := kill_once(killed, generator, in_a_write=i % 2 == 1)) is None:
            break
        moments.append(moment)
    left, right = finish(replace(config, name="whole")), finish(killed)
    different = sorted(left.keys() ^ right.keys())
    different += [name for name in left.keys() & right.keys() if not torch.equal(left[name], right[name])]
    print(json.dumps({"moments": moments, "different": different, "tensors": len(left)}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
