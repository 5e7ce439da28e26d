"""Processes of one group, for the tests of what ranks do together."""

import os
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Ranks are forks of a process that has imported these and run nothing: most of a new process's time is imports.
mp.set_forkserver_preload(["torch._dynamo", "vito_kernels", "vito_fast.train.loop"])


def spawn(function, ranks, *args):
    """Runs ``function(rank, *args)`` in each of ``ranks`` processes, joined by gloo; raises what the first of them
    raised.
    """
    with tempfile.TemporaryDirectory() as folder:
        given = (function, ranks, Path(folder) / "store", args)
        mp.start_processes(_rank, given, nprocs=ranks, start_method="forkserver")


def _rank(rank, function, ranks, store, args):
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    function(rank, *args)
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    # DDP keeps gloo's threads beyond the group. One that lets go of a tensor while the interpreter ends aborts it.
    os._exit(0)
