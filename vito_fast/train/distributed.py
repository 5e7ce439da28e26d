"""This process's rank, reductions over ranks, and the lock of a run's folder.

One process needs no launcher. Under ``torchrun`` the same program reads its rank from the environment and joins the
group: NCCL on CUDA, gloo on CPU.
"""

import inspect
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vito_fast.errors import UserError
from vito_fast.files import file_lock

LOCK_TIMEOUT = 10.0
"""Seconds to wait for a run's lock on one machine; ten times as many on several."""


@dataclass(frozen=True)
class World:
    """This process's place: ``rank`` of ``size``, ``local_size`` of them on this machine, and its device."""

    rank: int
    size: int
    local_size: int
    device: torch.device

    @property
    def main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0


def init_distributed(device: Literal["auto", "cpu", "cuda"], timeout: float = 30.0) -> World:
    """Joins the process group of the environment (RANK, WORLD_SIZE, LOCAL_RANK), if there is one.

    Args:
        device: ``train.device``; auto takes a GPU if there is one.
        timeout: Minutes that a collective waits for the other ranks.

    Raises:
        UserError: CUDA is absent, local ranks outnumber GPUs, a variable has no valid number, or the other ranks do
            not answer at the address.
    """
    size = environment_number("WORLD_SIZE", 1, least=1)
    rank = environment_number("RANK", 0 if size == 1 else None, most=size - 1)
    local_size = environment_number("LOCAL_WORLD_SIZE", size, least=1, most=size)
    local_rank = environment_number("LOCAL_RANK", 0, most=local_size - 1)
    cuda = torch.cuda.is_available() if device == "auto" else device == "cuda"
    if cuda and not torch.cuda.is_available():
        raise UserError("train.device is cuda, and this machine has no usable GPU: see `vito-fast doctor`")
    if cuda and local_rank >= torch.cuda.device_count():
        raise UserError(f"local rank {local_rank} has no GPU of its own: there are {torch.cuda.device_count()}")
    chosen = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(chosen)
    if size > 1 and not dist.is_initialized():
        backend, device_id = "nccl" if cuda else "gloo", chosen if cuda else None
        try:
            store = _store_of_this_attempt()
            limit = timedelta(minutes=timeout)
            dist.init_process_group(backend, None, limit, size, rank, store, device_id=device_id)
        except (ValueError, dist.DistError) as error:
            place = ":".join(os.environ.get(name, f"({name} not set)") for name in ("MASTER_ADDR", "MASTER_PORT"))
            raise UserError(
                f"rank {rank} of {size} cannot join the others at {place}: {str(error).splitlines()[0]}"
            ) from error
    return World(rank, size, local_size, chosen)


def environment_number(name: str, default: int | None, *, least: int = 0, most: int | None = None) -> int:
    """A whole number from the environment. UserError if it is out of range, or absent without a ``default``."""
    text = os.environ.get(name, default)
    try:
        number = int(text)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = least - 1
    if number < least or (most is not None and number > most):
        bounds = f"{least} or more" if most is None else f"{least} to {most}"
        found = "not set" if text is None else repr(text)
        raise UserError(f"{name} must be a whole number, {bounds}, and is {found}: start the ranks with torchrun")
    return number


def _store_of_this_attempt() -> dist.Store:
    """The launcher's key-value store, under a prefix that no earlier attempt has used.

    torchrun's agent keeps one store over its restarts, with the addresses of dead processes in it. A rank that reads
    them before the others have written new ones waits forever. Agents of several nodes count their restarts separately
    and share no number. They need TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, which makes a new store each time.
    """
    store: dist.Store = next(dist.rendezvous("env://"))[0]
    alone = os.environ.get("GROUP_WORLD_SIZE", "1") == "1"
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if alone else "0"
    return dist.PrefixStore(f"attempt {attempt}", store)


def shutdown(*, failed: bool = False) -> None:
    """Leaves the process group, if there is one.

    A rank that ``failed`` does not leave NCCL's. It would wait for ranks that wait for it in a collective, and show its
    error only after their watchdogs end them.
    """
    if dist.is_available() and dist.is_initialized() and not (failed and dist.get_backend() == "nccl"):
        dist.destroy_process_group()


def replicate(module: nn.Module, world: World, *, static_graph: bool) -> nn.Module:
    """Wraps ``module`` to average its gradients over ranks.

    Buffers are not sent: batch norms that see every rank's batch move theirs alike.
    """
    parallel = nn.parallel.DistributedDataParallel
    known = inspect.signature(parallel).parameters  # torch 2.14 renamed the option, and warns of its old name
    own: dict[str, Any] = {"forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False}
    ids = [world.device.index] if world.device.type == "cuda" else None
    return parallel(module, ids, gradient_as_bucket_view=True, static_graph=static_graph, **own)


def mean_over_ranks(values: Tensor) -> Tensor:
    """The mean of ``values`` over ranks, in place."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether ``flag`` holds on any rank; waits for all ranks."""
    return bool(all_max([flag], device)[0])


def all_max(values: list[float], device: torch.device) -> list[float]:
    """The maximum over ranks of each of ``values``; waits for all ranks."""
    if not (dist.is_available() and dist.is_initialized()):
        return values
    gathered = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(gathered, dist.ReduceOp.MAX)
    return gathered.tolist()


def all_gather_str(word: str) -> list[str]:
    """Each rank's ``word``, in rank order; waits for all ranks."""
    if not (dist.is_available() and dist.is_initialized()):
        return [word]
    words = [""] * dist.get_world_size()
    dist.all_gather_object(words, word)
    return words


@contextmanager
def sole_writer(folder: Path, world: World) -> Iterator[None]:
    """Inside, these ranks alone write ``folder``, which is made if it is absent.

    A killed predecessor may take a moment to end. If its machine died with it, a network file system releases its lock
    after a minute and a half.

    Raises:
        UserError: on every rank, if another process holds the folder or it cannot be made.
    """
    lock, timeout = folder / ".lock", LOCK_TIMEOUT if world.size == world.local_size else 10 * LOCK_TIMEOUT
    with ExitStack() as held:
        mine = True
        if world.main:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                mine = held.enter_context(file_lock(lock, timeout))
            except OSError as error:
                raise UserError(f"cannot write the run's folder {folder}: {error.strerror}") from None
        if any_rank(not mine, world.device):  # nor do the other ranks read there before
            raise UserError(
                f"another process is writing the run {folder}: wait for it or stop it, or give this one another --name "
                f"(if it died with its machine, delete {lock})"
            )
        yield
