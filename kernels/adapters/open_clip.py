"""``open_clip.loss.ClipLoss``, fused: the same arguments, the same value, no matrix of logits."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vito_kernels import clip_loss
from vito_kernels._core.checks import check_flags, check_integers
from vito_kernels.distributed import global_clip_loss


class ClipLoss(nn.Module):
    """Replaces open_clip's ``ClipLoss``: ``from vito_kernels.adapters.open_clip import ClipLoss``.

    Args:
        local_loss: return the loss of this rank's rows and columns instead of the whole batch's.
        gather_with_grad: ignored; gradients across ranks are always those of the whole batch, as with True.
        cache_labels: ignored; there are no labels.
        rank, world_size: of the default process group, whose batches must be equal (others:
            ``vito_kernels.distributed``). With ``world_size=1`` a rank of any number is alone.
        use_horovod: not supported.

    Raises:
        ValueError: for ``use_horovod``, or a rank outside the world.
        TypeError: an argument has another type.

    A ``logit_bias`` shifts every logit alike, so it changes nothing and gets a gradient of zero.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ):
        super().__init__()
        flags = {"local_loss": local_loss, "gather_with_grad": gather_with_grad, "cache_labels": cache_labels}
        check_flags(**flags, use_horovod=use_horovod)
        check_integers(rank=rank, world_size=world_size)
        if use_horovod:
            raise ValueError("use_horovod=True is not supported; use torch.distributed")
        if world_size != 1 and not 0 <= rank < world_size:
            raise ValueError(f"rank must lie in [0, world_size), got {rank} of {world_size}")
        self.local_loss, self.gather_with_grad, self.cache_labels = local_loss, gather_with_grad, cache_labels
        self.rank, self.world_size, self.use_horovod = rank, world_size, use_horovod

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of (B, D) and (B, D) unit vectors of a rank under the exponential of the learned scale."""
        if self.world_size == 1:
            loss = clip_loss(image_features, text_features, logit_scale)
        else:
            sizes = [image_features.shape[0]] * self.world_size
            loss = global_clip_loss(image_features, text_features, logit_scale, sizes=sizes)
            loss = loss if self.local_loss else _valued(loss, _mean_over_ranks(loss.detach()))
        if logit_bias is not None:
            loss = loss + 0 * torch.as_tensor(logit_bias).sum()
        return {"contrastive_loss": loss} if output_dict else loss


def _mean_over_ranks(x: Tensor) -> Tensor:
    x = x.clone()
    dist.all_reduce(x)
    return x / dist.get_world_size()


def _valued(loss: Tensor, value: Tensor) -> Tensor:
    """The gradient of ``loss`` under another value."""
    return loss + (value - loss.detach())
