"""Processes that fork off this one, which has all modules loaded: most of a new process's time is imports."""

import multiprocessing
import os

import torch
import torch.distributed as dist


def forked(function, *args):
    """Runs ``function(*args)`` in a process of its own; returns its exit code."""
    return _finished([_started(function, *args)])[0]


def on_ranks(ranks, store, function, *args):
    """Runs ``function(rank, *args)`` in ``ranks`` processes joined by gloo through the file ``store``. All must exit
    with 0."""
    codes = _finished([_started(_rank, rank, ranks, str(store), function, args) for rank in range(ranks)])
    assert codes == [0] * ranks


def _started(function, *args):
    process = multiprocessing.get_context("fork").Process(target=function, args=args)
    process.start()
    return process


def _finished(processes):
    for process in processes:
        process.join(300)
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


def _rank(rank, ranks, store, function, args):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank), "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    function(rank, *args)
    dist.destroy_process_group()
    os._exit(0)  # DDP keeps gloo's threads beyond the group
