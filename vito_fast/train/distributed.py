"""Which process of how many this is, the gathering of keys from all of them, and that they alone write their run.

One process needs no launcher. Under ``torchrun`` the same program reads its rank from the environment and joins the
group: NCCL on CUDA, gloo on CPU.
"""

import inspect
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vito_fast.errors import UserError
from vito_fast.files import file_lock
from vito_fast.train.loss import Keys
from vito_kernels.distributed import gather_keys

PATIENCE = 10.0
"""Seconds to wait for a run's lock on one machine; ten times as long on several."""


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


def join(device: Literal["auto", "cpu", "cuda"]) -> World:
    """Joins the process group that the environment describes (RANK, WORLD_SIZE, LOCAL_RANK), or stands alone.

    UserError if CUDA is asked for and absent, if there are more local ranks than GPUs, or if what the environment says
    makes no sense or the others are not to be found there.
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
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, device_id=device_id)
        except (ValueError, dist.DistError) as error:
            place = ":".join(os.environ.get(name, f"({name} not set)") for name in ("MASTER_ADDR", "MASTER_PORT"))
            raise UserError(
                f"rank {rank} of {size} cannot join the others at {place}: {str(error).splitlines()[0]}"
            ) from error
    return World(rank, size, local_size, chosen)


def environment_number(name: str, default: int | None, *, least: int = 0, most: int | None = None) -> int:
    """The whole number that the launcher has put there; without a ``default`` it must have."""
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

    torchrun's agent keeps one store over its restarts, with the addresses of the processes that are dead in it: who
    reads before all have written anew waits for them without end. Agents of several nodes count their restarts each for
    itself, so there is no number they share: they need TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, which makes stores anew.
    """
    store: dist.Store = next(dist.rendezvous("env://"))[0]
    alone = os.environ.get("GROUP_WORLD_SIZE", "1") == "1"
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if alone else "0"
    return dist.PrefixStore(f"attempt {attempt}", store)


def leave(*, failed: bool = False) -> None:
    """Leaves the process group if there is one. Not NCCL's if this rank ``failed``: that would wait for the others, who
    wait for it in a collective, and keep what it has to say until their watchdogs end them.
    """
    if dist.is_available() and dist.is_initialized() and not (failed and dist.get_backend() == "nccl"):
        dist.destroy_process_group()


def replicate(module: nn.Module, world: World, *, static_graph: bool) -> nn.Module:
    """``module`` with its gradients averaged over ranks. Its buffers do not travel: batch norms that see every rank's
    batch move theirs alike. (At the start some versions of torch send rank 0's, which all ranks have.)
    """
    parallel = nn.parallel.DistributedDataParallel
    known = inspect.signature(parallel).parameters  # torch 2.14 renamed the option, and warns of its old name
    own: dict[str, Any] = {"forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False}
    ids = [world.device.index] if world.device.type == "cuda" else None
    return parallel(module, ids, gradient_as_bucket_view=True, static_graph=static_graph, **own)


def shares(total: int, ranks: int) -> list[int]:
    """Clips of each rank: as equal as can be, the first ones one more. ValueError if a rank would have none."""
    if total < ranks:
        raise ValueError(f"{total} clips leave some of {ranks} ranks without any")
    return [total // ranks + (rank < total % ranks) for rank in range(ranks)]


class PendingKeys:
    """Keys on their way: started by the constructor, complete after ``wait``; the online forward can run meanwhile.

    ``embeddings``: one (V,B,D) a scale without gradient, ``video`` (B,) int64. ``total`` clips of all ranks are shared
    out as ``shares`` says; by default every rank has as many as this one.
    """

    def __init__(self, embeddings: list[Tensor], video: Tensor, world: World, total: int | None = None) -> None:
        # Clips lead, so that ranks concatenate along rows; every (scale, view) is then a row-strided (N,D) view.
        self.local = torch.stack(embeddings).permute(2, 0, 1, 3).contiguous()
        self.video = video
        sizes = shares(total or world.size * len(video), world.size)
        if (share := sizes[world.rank]) != len(video):
            raise ValueError(f"rank {world.rank} has {len(video)} clips, its share of {total} is {share}")
        self.gathered = gather_keys(self.local.flatten(1), video, sizes=sizes) if world.size > 1 else None

    def wait(self) -> Keys:
        """The keys of all ranks in rank order, and where this rank's begin."""
        if self.gathered is None:
            return Keys(list(self.local.permute(1, 2, 0, 3)), self.video, 0)
        rows, video = self.gathered.wait()
        assert video is not None
        every = rows.unflatten(1, self.local.shape[1:])
        return Keys(list(every.permute(1, 2, 0, 3)), video, self.gathered.offset)


def mean_over_ranks(values: Tensor) -> Tensor:
    """The mean of ``values`` over ranks, in place."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether ``flag`` holds on any rank; waits for all of them."""
    return bool(greatest([flag], device)[0])


def greatest(values: list[float], device: torch.device) -> list[float]:
    """The greatest of each of ``values`` on any rank; waits for all of them."""
    if not (dist.is_available() and dist.is_initialized()):
        return values
    gathered = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(gathered, dist.ReduceOp.MAX)
    return gathered.tolist()


def told_by_ranks(word: str) -> list[str]:
    """What each rank has to say; waits for all of them."""
    if not (dist.is_available() and dist.is_initialized()):
        return [word]
    words = [""] * dist.get_world_size()
    dist.all_gather_object(words, word)
    return words


@contextmanager
def sole_writer(folder: Path, world: World) -> Iterator[None]:
    """Inside, no other processes than these ranks write ``folder``, which is made if need be. UserError if others do,
    on every rank, or if it cannot be made.

    A predecessor that was killed may take a moment to end. One on another machine may be dead with it: a network file
    system then takes back its lock after a minute and a half.
    """
    lock, patience = folder / ".lock", PATIENCE if world.size == world.local_size else 10 * PATIENCE
    with ExitStack() as held:
        mine = True
        if world.main:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                mine = held.enter_context(file_lock(lock, patience))
            except OSError as error:
                raise UserError(f"cannot write the run's folder {folder}: {error.strerror}") from None
        if any_rank(not mine, world.device):  # nor do the other ranks read there before
            raise UserError(
                f"another process is writing the run {folder}: wait for it or stop it, or give this one another --name "
                f"(if it died with its machine, delete {lock})"
            )
        yield
