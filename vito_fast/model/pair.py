"""One branch (backbone, pooling, heads) and the pair of an online branch and its slowly moving target.

Legend: B images of a forward (all views of all clips), C channels of a stage, L = H*W its locations, D embedding width.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vito_fast.config import ModelConfig
from vito_fast.model.backbones import build_backbone
from vito_fast.model.norm import BatchNorm
from vito_kernels import AttentionPool


class BranchOutput(NamedTuple):
    """Outputs of a branch for B images."""

    embeddings: list[Tensor]
    """(B,D), not normalized; one with concatenated heads, else one a level, finest first. Predictions if the branch has
    a predictor, else projections."""
    weights: list[Tensor]
    """(B,L) pooling weights of each level, finest first; each row sums to 1."""


class AveragePool(nn.Module):
    """Mean over locations, with AttentionPool's interface: (B,C,H,W) -> (B,C), uniform weights (B,L)."""

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        locations = features.shape[2] * features.shape[3]
        return features.mean((2, 3)), features.new_full((features.shape[0], locations), 1 / locations)


def mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Linear(bias) - BN - ReLU - Linear(no bias), the ancestors' projector and predictor."""
    return nn.Sequential(
        nn.Linear(inputs, hidden), BatchNorm(hidden), nn.ReLU(inplace=True), nn.Linear(hidden, outputs, bias=False)
    )


class Branch(nn.Module):
    """Backbone, pooling of each level, then the heads: a projector and, if asked for, a predictor.

    Concatenated heads project the pooled vectors of all levels together; heads per level project each one.
    """

    def __init__(self, config: ModelConfig, predictor: bool) -> None:
        super().__init__()
        self.backbone = build_backbone(config)
        channels: list[int] = self.backbone.channels  # type: ignore[assignment]
        if config.pooling == "attention":
            self.pools = nn.ModuleList(AttentionPool(c, config.attention_hidden or c) for c in channels)
        else:
            self.pools = nn.ModuleList(AveragePool() for _ in channels)
        hidden, out = config.projector_hidden, config.projector_out
        inputs = channels if config.heads == "per_level" else [sum(channels)]
        self.projectors = nn.ModuleList(mlp(c, hidden, out) for c in inputs)
        self.predictors = nn.ModuleList(mlp(out, hidden, out) for _ in inputs) if predictor else None

    def forward(self, images: Tensor, small: Tensor | None = None) -> BranchOutput:
        """(B,3,H,W) -> embeddings, and pooling weights of each level.

        The embeddings of ``small`` images (B',3,h,w), another pass through the same networks, follow those of
        ``images``. The weights are of ``images`` alone.
        """
        out = self._embed(images)
        if small is None:
            return out
        more = self._embed(small).embeddings
        return BranchOutput([torch.cat(pair) for pair in zip(out.embeddings, more, strict=True)], out.weights)

    def _embed(self, images: Tensor) -> BranchOutput:
        pooled, weights = zip(*(p(f) for p, f in zip(self.pools, self.backbone(images), strict=True)), strict=True)
        inputs = pooled if len(self.projectors) == len(pooled) else (torch.cat(pooled, 1),)
        embeddings = [project(x) for project, x in zip(self.projectors, inputs, strict=True)]
        if self.predictors is not None:
            embeddings = [predict(z) for predict, z in zip(self.predictors, embeddings, strict=True)]
        return BranchOutput(embeddings, list(weights))


class VitoModel(nn.Module):
    """The online branch, which learns, and the target branch, a moving average of it that makes the keys.

    Both start equal. The target is in training mode, as in the ancestors' code. Its batch norms normalize by the batch,
    and its running statistics move by its own forwards. The average is taken over parameters only.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.online = Branch(config, predictor=config.predictor)
        self.target = Branch(replace(config, drop_path=0.0), predictor=False)
        self.target.load_state_dict(
            {k: v for k, v in self.online.state_dict().items() if not k.startswith("predictors.")}
        )
        self.target.requires_grad_(False)

    def averaged_pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        """(target parameters, the online parameters that they follow), in the same order."""
        online = dict(self.online.named_parameters())
        names = [name for name, _ in self.target.named_parameters()]
        return [p.detach() for p in self.target.parameters()], [online[name].detach() for name in names]

    @torch.no_grad()
    def update_target(self, tau: float, finite: Tensor | None = None) -> None:
        """target <- tau * target + (1 - tau) * online, over parameters; nothing where ``finite`` (bool ()) is false."""
        target, online = self.averaged_pairs()
        if finite is None:
            torch._foreach_lerp_(target, online, 1 - tau)
            return
        move: Any = (1 - tau) * finite.double()
        keep, move = ((1 - move).to(target[0].dtype), move.to(target[0].dtype))  # one launch for all tensors
        torch._foreach_mul_(target, keep)
        torch._foreach_add_(target, torch._foreach_mul(online, move))

    @torch.no_grad()
    def target_distance(self) -> Tensor:
        """|target - online| / |online| over all parameters that both have, ()."""
        target, online = self.averaged_pairs()
        apart, size = torch._foreach_norm(torch._foreach_sub(target, online)), torch._foreach_norm(online)
        return torch.linalg.vector_norm(torch.stack(apart)) / torch.linalg.vector_norm(torch.stack(size))


def normalize(x: Tensor) -> Tensor:
    """Rows of unit length, in float32 at least."""
    return F.normalize(x.float() if x.dtype in (torch.bfloat16, torch.float16) else x, dim=-1)
