"""Nothing is lost when a node dies: killed runs end as whole ones do, on as many ranks as are left."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from vito_fast.config_files import save_config
from vito_fast.train.checkpoint import checkpoints, read

KILLS = 20
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def test_kill_9_at_twenty_random_moments_ends_in_the_same_weights(config, tmp_path):
    save_config(config, tmp_path / "config.yaml")
    script = Path(__file__).with_name("survive.py")
    command = [sys.executable, str(script), str(tmp_path / "config.yaml"), str(KILLS), "1"]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=550)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert len(told["moments"]) == KILLS
    assert sum(moment["writing"] for moment in told["moments"]) >= KILLS // 4
    assert told["tensors"] > 50
    assert told["different"] == []


def launch(config, ranks, port, *more):
    """The run on some ranks, as a launcher would start them; their exit statuses."""
    path = Path(config.train.runs).parent / f"{config.name}.yaml"
    save_config(config, path)
    command = [sys.executable, "-m", "vito_fast", "train", str(path), "--resume", *more]
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    place = [{"RANK": str(r), "LOCAL_RANK": str(r)} if ranks > 1 else {} for r in range(ranks)]
    environments = [ENVIRONMENT | (address if ranks > 1 else {}) | p for p in place]
    pipe = subprocess.PIPE
    processes = [subprocess.Popen(command, env=e, stdout=pipe, stderr=pipe, text=True) for e in environments]
    ended = [(p.communicate(timeout=200), p.returncode) for p in processes]
    assert all(status == 0 for _, status in ended), [streams[1][-1500:] for streams, _ in ended]
    return read(checkpoints(Path(config.train.runs) / config.name / "checkpoints")[0])


def test_a_run_goes_on_with_another_number_of_ranks(config):
    """Two ranks, then one, then two, in float64, equal one rank all the way: the same samples in the same steps."""
    train = dataclasses.replace(config.train, dtype="float64", checkpoint_every=100, channels_last=False)
    config = dataclasses.replace(config, train=train, schedule=dataclasses.replace(config.schedule, epochs=5))
    whole = launch(config, 1, 0)
    parts, port = dataclasses.replace(config, name="parts"), 22000 + os.getpid() % 20000
    launch(parts, 2, port, "--max-steps", "3")
    launch(parts, 1, 0, "--max-steps", "6")
    end = launch(parts, 2, port + 1)
    assert end.state["step"] == whole.state["step"] == 10
    assert end.state["ranks"] == 2
    assert whole.tensors.keys() == end.tensors.keys()
    for name, tensor in whole.tensors.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(
                end.tensors[name], tensor, rtol=1e-6, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
            )
