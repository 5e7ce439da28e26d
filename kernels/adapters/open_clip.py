"""``open_clip.loss.ClipLoss``, fused: the same arguments, the same value, no matrix of logits."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vito_kernels import clip_loss
from vito_kernels._core.checks import check_flags, check_integers
from vito_kernels.distributed import global_clip_loss
from vito_kernels.distributed.collectives import gather_with_grad


class ClipLoss(nn.Module):
    """Replaces open_clip's ``ClipLoss``: ``from vito_kernels.adapters.open_clip import ClipLoss``.

    Args:
        local_loss: return the loss of this rank's rows and columns instead of the whole batch's.
        gather_with_grad: gradients across ranks are those of the whole batch, as with True. With False and without
            ``local_loss``, open_clip's are smaller by the number of ranks, which a warning says once.
        cache_labels: ignored; there are no labels.
        rank, world_size: of the default process group, whose batches must be equal (others:
            ``vito_kernels.distributed``). With ``world_size=1`` a rank of any number is alone.
        use_horovod: not supported.
        match_open_clip_scaling: divide the embeddings' gradients by the number of ranks where open_clip does, so that
            its learning rates keep their meaning.

    ``get_logits`` and ``get_ground_truth`` are for subclasses, such as a distillation loss; they make the matrix.

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
        *,
        match_open_clip_scaling: bool | None = None,
    ):
        super().__init__()
        flags = {"local_loss": local_loss, "gather_with_grad": gather_with_grad, "cache_labels": cache_labels}
        if match_open_clip_scaling is not None:
            flags["match_open_clip_scaling"] = match_open_clip_scaling
        check_flags(**flags, use_horovod=use_horovod)
        check_integers(rank=rank, world_size=world_size)
        if use_horovod:
            raise ValueError("use_horovod=True is not supported; use torch.distributed")
        if world_size != 1 and not 0 <= rank < world_size:
            raise ValueError(f"rank must lie in [0, world_size), got {rank} of {world_size}")
        self.local_loss, self.gather_with_grad, self.cache_labels = local_loss, gather_with_grad, cache_labels
        self.rank, self.world_size, self.use_horovod = rank, world_size, use_horovod
        scaled = world_size > 1 and not (local_loss or gather_with_grad)
        if scaled and match_open_clip_scaling is None:
            warnings.warn(
                f"open_clip's default flags divide the embeddings' gradients by world_size={world_size}, this loss "
                "does not; pass match_open_clip_scaling=True for the same, or False to leave out this warning",
                stacklevel=2,
            )
        self.match_open_clip_scaling = bool(scaled and match_open_clip_scaling)

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
            if self.match_open_clip_scaling:
                image_features, text_features = (
                    _ScaleGrad.apply(x, 1 / self.world_size) for x in (image_features, text_features)
                )
            sizes = [image_features.shape[0]] * self.world_size
            loss = global_clip_loss(image_features, text_features, logit_scale, sizes=sizes)
            loss = loss if self.local_loss else _valued(loss, _mean_over_ranks(loss.detach()))
        if logit_bias is not None:
            loss = loss + 0 * torch.as_tensor(logit_bias).sum()
        return {"contrastive_loss": loss} if output_dict else loss

    def get_logits(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Logits of images against texts and of texts against images, with gradient across ranks; the whole matrix."""
        images, texts = image_features, text_features
        if self.world_size > 1:
            sizes = [image_features.shape[0]] * self.world_size
            images, texts = (gather_with_grad(x, sizes=sizes) for x in (image_features, text_features))
        if self.local_loss:
            both = logit_scale * image_features @ texts.T, logit_scale * text_features @ images.T
        else:
            per_image = logit_scale * images @ texts.T
            both = per_image, per_image.T
        return both if logit_bias is None else (both[0] + logit_bias, both[1] + logit_bias)

    def get_ground_truth(self, device: torch.device, num_logits: int) -> Tensor:
        """The column of each row's positive."""
        first = num_logits * self.rank if self.world_size > 1 and self.local_loss else 0
        return torch.arange(first, first + num_logits, device=device)

    def extra_repr(self) -> str:
        return f"local_loss={self.local_loss}, rank={self.rank}, world_size={self.world_size}"


class _ScaleGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


def _mean_over_ranks(x: Tensor) -> Tensor:
    x = x.clone()
    dist.all_reduce(x)
    return x / dist.get_world_size()


def _valued(loss: Tensor, value: Tensor) -> Tensor:
    """The gradient of ``loss`` under another value."""
    return loss + (value - loss.detach())
