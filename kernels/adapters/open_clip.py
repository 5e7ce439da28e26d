"""open_clip's contrastive losses, fused: the same arguments, the same value, no matrix of logits."""

from __future__ import annotations

import warnings
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from vito_kernels import clip_loss, siglip_loss
from vito_kernels._core.checks import Exchange, autocast_inputs, check_flags, check_integers, needs_grad, scale_tensor
from vito_kernels.contrastive.siglip import apply_siglip
from vito_kernels.distributed import global_clip_loss, global_siglip_loss
from vito_kernels.distributed.collectives import gather_with_grad

EXCHANGES: dict[str, Exchange] = {"bidir": "ring", "shift": "ring", "reduce": "gather", "gather": "gather"}


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
        _check_rank(rank, world_size)
        if use_horovod:
            raise ValueError("use_horovod=True is not supported; use torch.distributed")
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
            images, texts = self._scaled(image_features), self._scaled(text_features)
            loss = global_clip_loss(images, texts, logit_scale, sizes=[images.shape[0]] * self.world_size)
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
            images, texts = (gather_with_grad(self._scaled(x), sizes=sizes) for x in (image_features, text_features))
        if self.local_loss:
            both = logit_scale * image_features @ texts.T, logit_scale * text_features @ images.T
        else:
            per_image = logit_scale * images @ texts.T
            both = per_image, per_image.T
        return both if logit_bias is None else (both[0] + logit_bias, both[1] + logit_bias)

    def _scaled(self, x: Tensor) -> Tensor:
        return cast(Tensor, _ScaleGrad.apply(x, 1 / self.world_size)) if self.match_open_clip_scaling else x

    def get_ground_truth(self, device: torch.device, num_logits: int) -> Tensor:
        """The column of each row's positive."""
        first = num_logits * self.rank if self.world_size > 1 and self.local_loss else 0
        return torch.arange(first, first + num_logits, device=device)

    def extra_repr(self) -> str:
        flags = f"local_loss={self.local_loss}, gather_with_grad={self.gather_with_grad}"
        return f"{flags}, rank={self.rank}, world_size={self.world_size}"


class DistillClipLoss(ClipLoss):
    """Replaces open_clip's ``DistillClipLoss``, with the arguments of ``ClipLoss``.

    The student's distance from its teacher needs both matrices of logits, which this loss makes.
    """

    def dist_loss(self, teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
        """Cross-entropy of the student's softmax over each row (M, N) from its teacher's; a scalar."""
        return cross_entropy(student_logits, teacher_logits.softmax(1))

    def forward(  # type: ignore[override]
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        dist_image_features: Tensor,
        dist_text_features: Tensor,
        dist_logit_scale: float | Tensor,
        output_dict: bool = False,
    ) -> tuple[Tensor, Tensor] | dict[str, Tensor]:
        """(contrastive, distillation) losses of (B, D) unit vectors of the student and of the teacher."""
        student = self.get_logits(image_features, text_features, logit_scale)
        teacher = self.get_logits(dist_image_features, dist_text_features, dist_logit_scale)
        labels = self.get_ground_truth(image_features.device, student[0].shape[0])
        contrastive = (cross_entropy(student[0], labels) + cross_entropy(student[1], labels)) / 2
        distilled = (self.dist_loss(teacher[0], student[0]) + self.dist_loss(teacher[1], student[1])) / 2
        return {"contrastive_loss": contrastive, "distill_loss": distilled} if output_dict else (contrastive, distilled)


class CoCaLoss(ClipLoss):
    """Replaces the ``CoCaLoss`` of open_clip 3: a fused contrastive loss and torch's cross-entropy of the captions.

    Args:
        caption_loss_weight, clip_loss_weight: weights of the two losses; a ``clip_loss_weight`` of 0 skips its own.
        pad_id: label of a token that counts in no caption.
        local_loss, gather_with_grad, cache_labels, rank, world_size, use_horovod, match_open_clip_scaling: as for
            ``ClipLoss``.
    """

    def __init__(
        self,
        caption_loss_weight: float,
        clip_loss_weight: float,
        pad_id: int = 0,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        *,
        match_open_clip_scaling: bool | None = None,
    ):
        flags = local_loss, gather_with_grad, cache_labels, rank, world_size, use_horovod
        super().__init__(*flags, match_open_clip_scaling=match_open_clip_scaling)
        self.caption_loss_weight, self.clip_loss_weight = caption_loss_weight, clip_loss_weight
        self.caption_loss = nn.CrossEntropyLoss(ignore_index=pad_id)

    def forward(  # type: ignore[override]
        self,
        image_features: Tensor,
        text_features: Tensor,
        logits: Tensor,
        labels: Tensor,
        logit_scale: float | Tensor,
        output_dict: bool = False,
    ) -> tuple[Tensor, Tensor] | dict[str, Tensor]:
        """(contrastive, caption) losses of (B, D) unit vectors, and of logits (B, L, V) with labels (B, L)."""
        if self.clip_loss_weight:
            contrastive = cast(Tensor, super().forward(image_features, text_features, logit_scale))
            contrastive = self.clip_loss_weight * contrastive
        else:
            contrastive = logits.new_zeros(())
        caption = self.caption_loss_weight * self.caption_loss(logits.transpose(1, 2), labels)
        return {"contrastive_loss": contrastive, "caption_loss": caption} if output_dict else (contrastive, caption)

    def extra_repr(self) -> str:
        weights = f"caption_loss_weight={self.caption_loss_weight}, clip_loss_weight={self.clip_loss_weight}"
        return f"{weights}, {super().extra_repr()}"


class SigLipLoss(nn.Module):
    """Replaces open_clip's ``SigLipLoss``.

    Args:
        cache_labels, chunk_size: ignored; there are neither labels nor a matrix of logits.
        rank, world_size: as for ``ClipLoss``.
        dist_impl: "bidir" (by default) or "shift" pass the texts from rank to rank, "gather" and "reduce" gather them.

    Raises:
        ValueError, TypeError: for another ``dist_impl``, or a rank outside the world.

    ``_loss``, ``get_logits`` and ``get_ground_truth`` are for subclasses; the last two make the matrix.
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        chunk_size: int = 0,
    ):
        super().__init__()
        check_flags(cache_labels=cache_labels)
        check_integers(chunk_size=chunk_size)
        _check_rank(rank, world_size)
        if dist_impl not in (None, *EXCHANGES):
            raise ValueError(f"dist_impl must be one of {', '.join(EXCHANGES)}, got {dist_impl!r}")
        self.cache_labels, self.rank, self.world_size = cache_labels, rank, world_size
        self.dist_impl, self.chunk_size = dist_impl or "bidir", chunk_size

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of (B, D) and (B, D) unit vectors of a rank, of its images against the texts of all ranks."""
        inputs = image_features, text_features, logit_scale, 0.0 if logit_bias is None else logit_bias
        if self.world_size == 1:
            loss = siglip_loss(*inputs)
        else:
            sizes = [image_features.shape[0]] * self.world_size
            loss = global_siglip_loss(*inputs, sizes=sizes, exchange=EXCHANGES[self.dist_impl])
        return {"contrastive_loss": loss} if output_dict else loss

    def _loss(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        negative_only: bool = False,
    ) -> Tensor:
        """The loss of images (M, D) against a block of texts (N, D), of which row i belongs to image i, or none."""
        bias = 0.0 if logit_bias is None else logit_bias
        (x, y), matmul_dtype = autocast_inputs(image_features, text_features)
        factor, shift = scale_tensor(logit_scale, x), scale_tensor(bias, x)
        loss = apply_siglip(x, y, factor, shift, None, needs_grad(x, factor), "mean", matmul_dtype)[0]
        if negative_only:
            return loss
        pairs = min(len(x), len(y))
        logits = (x[:pairs].to(loss.dtype) * y[:pairs]).sum(1) * factor + shift
        return loss - logits.sum() / len(x)  # softplus(-s) = softplus(s) - s

    def get_logits(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
    ) -> Tensor:
        """Logits of images against texts, (M, N)."""
        logits = logit_scale * image_features @ text_features.T
        return logits if logit_bias is None else logits + logit_bias

    def get_ground_truth(
        self, device: torch.device, dtype: torch.dtype, num_logits: int, negative_only: bool = False
    ) -> Tensor:
        """1 for a pair and -1 elsewhere, or -1 alone, (num_logits, num_logits)."""
        signs = torch.full((num_logits, num_logits), -1, dtype=dtype, device=device)
        return signs if negative_only else signs.fill_diagonal_(1)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, world_size={self.world_size}, dist_impl={self.dist_impl!r}"


def _check_rank(rank: int, world_size: int) -> None:
    check_integers(rank=rank, world_size=world_size)
    if world_size != 1 and not 0 <= rank < world_size:
        raise ValueError(f"rank must lie in [0, world_size), got {rank} of {world_size}")


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
