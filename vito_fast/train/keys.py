"""The target's keys, gathered from all ranks while the online network runs."""

from typing import NamedTuple

import torch
from torch import Tensor

from vito_fast.train.distributed import World
from vito_kernels.distributed import gather_keys


class GatheredKeys(NamedTuple):
    """The target's unit keys of all ranks' clips; this rank's are rows ``first`` to ``first + B``."""

    embeddings: list[Tensor]
    """One (V,N,D) for each embedding."""
    video: Tensor
    """(N,) int64: clips with equal numbers come from one video and are never each other's negatives."""
    first: int

    def own(self, clips: int) -> slice:
        """Rows of this rank's clips."""
        return slice(self.first, self.first + clips)


def shares(total: int, ranks: int) -> list[int]:
    """Splits clips among ranks as evenly as possible, the larger shares first.

    Raises:
        ValueError: a rank would have none.
    """
    if total < ranks:
        raise ValueError(f"{total} clips leave some of {ranks} ranks without any")
    return [total // ranks + (rank < total % ranks) for rank in range(ranks)]


class PendingKeys:
    """A gather of keys in progress: the constructor starts it and ``wait`` completes it.

    Args:
        embeddings: One (V,B,D) for each embedding, without gradient.
        video: (B,) int64.
        world: This process's place.
        total: Clips of all ranks, split as ``shares`` does; by default every rank has as many as this one.

    Raises:
        ValueError: this rank has another number of clips than its share.
    """

    def __init__(self, embeddings: list[Tensor], video: Tensor, world: World, total: int | None = None) -> None:
        # Clips lead, so that ranks concatenate along rows; each (embedding, view) is then a row-strided (N,D) view.
        self.local = torch.stack(embeddings).permute(2, 0, 1, 3).contiguous()
        self.video = video
        sizes = shares(total or world.size * len(video), world.size)
        if (share := sizes[world.rank]) != len(video):
            raise ValueError(f"rank {world.rank} has {len(video)} clips, its share of {total} is {share}")
        self.gathered = gather_keys(self.local.flatten(1), video, sizes=sizes) if world.size > 1 else None

    def wait(self) -> GatheredKeys:
        """The keys of all ranks in rank order."""
        if self.gathered is None:
            return GatheredKeys(list(self.local.permute(1, 2, 0, 3)), self.video, 0)
        rows, video = self.gathered.wait()
        assert video is not None
        every = rows.unflatten(1, self.local.shape[1:])
        return GatheredKeys(list(every.permute(1, 2, 0, 3)), video, self.gathered.offset)
