"""Which process of how many this is, and the gathering of keys from all of them.

One process needs no launcher. Under ``torchrun`` the same program reads its rank from the environment and joins the group:
NCCL on CUDA, gloo on CPU.
"""

import os
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from vito_fast.errors import UserError
from vito_fast.loss import Keys


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

    UserError if CUDA is asked for and absent, or if there are more local ranks than GPUs.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    cuda = torch.cuda.is_available() if device == "auto" else device == "cuda"
    if cuda and not torch.cuda.is_available():
        raise UserError("train.device is cuda, and this machine has no usable GPU: see `vito-fast doctor`")
    if cuda and local_rank >= torch.cuda.device_count():
        raise UserError(f"local rank {local_rank} has no GPU of its own: there are {torch.cuda.device_count()}")
    chosen = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(chosen)
    if size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo", device_id=chosen if cuda else None)
    return World(rank, size, local_size, chosen)


def leave() -> None:
    """Leaves the process group if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


class PendingKeys:
    """Keys on their way: started by the constructor, complete after ``wait``, so that the online forward runs meanwhile.

    ``embeddings``: one (V,B,D) a scale without gradient, ``video`` (B,) int64; B must be equal on all ranks.
    """

    def __init__(self, embeddings: list[Tensor], video: Tensor, world: World) -> None:
        self.world = world
        # Clips lead, so that ranks concatenate along rows; every (scale, view) is then a row-strided (N,D) view.
        self.local = torch.stack(embeddings).permute(2, 0, 1, 3).contiguous()
        self.video = video
        if world.size > 1:
            self.all = self.local.new_empty((world.size * len(self.local), *self.local.shape[1:]))
            self.all_video = video.new_empty(world.size * len(video))
            self.work = [
                dist.all_gather_into_tensor(self.all, self.local, async_op=True),
                dist.all_gather_into_tensor(self.all_video, video.contiguous(), async_op=True),
            ]

    def wait(self) -> Keys:
        """The keys of all ranks in rank order, and where this rank's begin."""
        if self.world.size == 1:
            return Keys(list(self.local.permute(1, 2, 0, 3)), self.video, 0)
        for work in self.work:
            work.wait()
        return Keys(list(self.all.permute(1, 2, 0, 3)), self.all_video, self.world.rank * len(self.local))


def mean_over_ranks(values: Tensor) -> Tensor:
    """The mean of ``values`` over ranks, in place."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether ``flag`` holds on any rank; waits for all of them."""
    if not (dist.is_available() and dist.is_initialized()):
        return flag
    value = torch.tensor(int(flag), device=device)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return bool(value.item())
