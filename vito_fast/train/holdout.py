"""Evaluation on held-out clips: which object is it, by its nearest neighbors among the other clips?

The store's videos lie in folders that name their class, or a curated store has ``labels.parquet``. A few whole frames
of each clip are embedded without augmentation, in the same way for every run, and classified by ``knn_accuracy`` and by
a linear probe. Beside the trained encoder stand the untrained one, raw pixels and a color histogram. Labels have no
other use.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vito_fast.config import Config
from vito_fast.data.store.store import Store, frames
from vito_fast.errors import UserError
from vito_fast.model.pair import Branch
from vito_fast.train.neighbors import Accuracy, color_histogram, knn_accuracy, thumbnails
from vito_fast.train.probe import labels
from vito_kernels.photometric.op import IMAGENET_MEAN, IMAGENET_STD

FRAMES = 4
"""Frames of a clip, evenly spaced and away from its ends."""
CHUNK = 64
"""Images of a forward pass."""
L2 = 0.1
"""Regularization of the linear probe, on standardized features; one for all runs, so that they compare."""
LUMA = (0.299, 0.587, 0.114)

Scores = dict[str, tuple[float, float]]
"""Accuracy and standard error, shares from 0 to 1, by name."""


@dataclass(frozen=True)
class Holdout:
    """M = FRAMES x clips frames."""

    images: Tensor
    """(M,3,S,S) float32 in [0, 1], RGB, on the CPU."""
    label: Tensor
    """(M,) int64 from 0."""
    clip: Tensor
    """(M,) int64 from 0."""

    @property
    def chance(self) -> float:
        """Accuracy of a vote for the most frequent class."""
        return int(self.label.bincount().max()) / len(self.label)

    def accuracy(self, features: Tensor) -> tuple[float, float]:
        """``knn_accuracy`` of features (M,D): the share and its standard error."""
        found: Accuracy = knn_accuracy(features, self.label.to(features.device), self.clip.to(features.device))
        return found.value, found.error

    def linear(self, features: Tensor) -> tuple[float, float] | None:
        """A linear probe of features (M,D): ridge regression of the classes, one solve and nothing to tune.

        It is fitted to every other clip of each class and tested on the rest, then the other way round.

        Returns:
            The share and its standard error over clips, NaN for features that are not finite; None where a class has
            a single clip.
        """
        of_clip = torch.zeros(int(self.clip.max()) + 1, dtype=torch.int64).scatter_(0, self.clip, self.label)
        sizes = of_clip.bincount()
        if int(sizes.min()) < 2:
            return None
        if not torch.isfinite(features).all():
            return math.nan, math.nan
        place = torch.cat([torch.arange(size) for size in sizes.tolist()])  # of a clip in its class
        side = torch.empty_like(of_clip)
        side[of_clip.argsort(stable=True)] = place % 2
        rows, side = features.cpu().double(), side[self.clip]
        right = torch.zeros(len(rows), dtype=torch.float64)
        for part in (0, 1):
            fitted, tested = rows[side != part], rows[side == part]
            mean, deviation = fitted.mean(0), fitted.std(0).clamp(min=1e-6)
            x, y = (fitted - mean) / deviation, F.one_hot(self.label[side != part]).double()
            ridge = L2 * len(x) * torch.eye(x.shape[1], dtype=torch.float64)
            weight = torch.linalg.solve(x.T @ x + ridge, x.T @ (y - y.mean(0)))
            logits = (tested - mean) / deviation @ weight + y.mean(0)
            right[side == part] = (logits.argmax(1) == self.label[side == part]).double()
        share = torch.zeros(len(of_clip), dtype=torch.float64).scatter_add_(0, self.clip, right) / self.clip.bincount()
        return share.mean().item(), (share.std() / math.sqrt(len(share))).item()


def read(path: str | Path, size: int, *, cache: str = "", cache_gib: float = 0.0) -> Holdout:
    """Reads the frames of a store of labeled clips.

    Args:
        path: The store.
        size: Height and width of the frames in pixels. The whole frame is resized, whatever its shape.
        cache, cache_gib: Of a remote store, as of ``Store``.

    Raises:
        UserError: an unusable store, or one whose videos do not lie in folders of at least two classes.
    """
    store = Store(path, cache=cache, cache_gib=cache_gib)
    clips = list(range(len(store)))
    classes = labels(store, clips)
    if classes is None:
        raise UserError(f"data.holdout: the videos of {path} lie in one folder: put those of each class into one")
    images = []
    for clip in clips:
        count = len(store.index.times(clip))
        wanted = [int((i + 0.5) * count / FRAMES) for i in range(FRAMES)]
        try:
            pictures = torch.from_numpy(frames(store, clip, wanted))
        except (OSError, ValueError) as error:
            raise UserError(f"data.holdout: clip {clip} of {path} cannot be read: {error}") from None
        pictures = pictures.permute(0, 3, 1, 2).float() / 255
        images.append(F.interpolate(pictures, (size, size), mode="bilinear", antialias=True, align_corners=False))
    clip_of = torch.arange(len(clips)).repeat_interleave(FRAMES)
    return Holdout(torch.cat(images).clamp(0, 1), classes[clip_of], clip_of)


@torch.no_grad()
def embed(branch: Branch, images: Tensor, config: Config, device: torch.device) -> tuple[Tensor, Tensor]:
    """Features of images (M,3,S,S) in [0, 1], in the branch's current mode.

    Returns:
        The pooled vectors of all levels, concatenated (M,C), as the projector takes them; and the spatial means of the
        coarsest level (M,C').
    """
    mean, std = (torch.tensor(x, device=device).view(3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
    dtype = next(branch.parameters()).dtype
    layout = torch.channels_last if config.train.channels_last else torch.contiguous_format
    pooled, averaged = [], []
    for part in images.split(CHUNK):
        levels = branch.backbone(((part.to(device) - mean) / std).to(dtype, memory_format=layout))
        vectors = [pool(features)[0] for features, pool in zip(levels, branch.pools, strict=True)]
        pooled.append(torch.cat(vectors, 1).float())
        averaged.append(levels[-1].mean((2, 3)).float())
    return torch.cat(pooled), torch.cat(averaged)


def evaluate(branch: Branch, holdout: Holdout, config: Config, device: torch.device) -> Scores:
    """Scores a branch in evaluation mode, and leaves its mode as it was.

    Returns:
        ``pooled``: by the vectors that its pools make; ``averaged``: by spatial means of the coarsest level;
        ``gray``: as ``pooled``, of frames without color; ``linear``: the linear probe of the pooled vectors, where
        each class has two clips.
    """
    was_training = branch.training
    branch.eval()
    pooled, averaged = embed(branch, holdout.images, config, device)
    luma = (holdout.images * torch.tensor(LUMA).view(3, 1, 1)).sum(1, keepdim=True).expand(-1, 3, -1, -1)
    gray, _ = embed(branch, luma, config, device)
    branch.train(was_training)
    scores = {n: holdout.accuracy(rows) for n, rows in (("pooled", pooled), ("averaged", averaged), ("gray", gray))}
    linear = holdout.linear(pooled)
    return scores if linear is None else scores | {"linear": linear}


def baselines(branch: Branch, holdout: Holdout, config: Config, device: torch.device) -> dict[str, Any]:
    """Scores of raw pixels, a color histogram and the untrained branch, its batch norms set to these frames.

    The statistics favor the untrained network: its initial ones fit no images.
    """
    untrained = Branch(config.model, predictor=False).to(device)  # not a copy: its norms must not synchronize
    untrained.load_state_dict({k: v for k, v in branch.state_dict().items() if not k.startswith("predictors.")})
    for module in untrained.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
            module.momentum = None  # a plain average over the batches
    untrained.train()
    embed(untrained, holdout.images, config, device)
    scores = evaluate(untrained, holdout, config, device)
    return {
        "clips": int(holdout.clip.max()) + 1,
        "classes": int(holdout.label.max()) + 1,
        "chance": holdout.chance,
        "untrained": scores,
        "pixels": holdout.accuracy(thumbnails(holdout.images)),
        "histogram": holdout.accuracy(color_histogram(holdout.images)),
    }


def lines(baselines: dict[str, Any], trained: Scores | None) -> list[str]:
    """The outcome in words, with a warning if a baseline without a network beats the encoder."""

    def text(score: tuple[float, float]) -> str:
        return f"{score[0]:.1%} ± {score[1]:.1%}"

    clips, classes, chance = (baselines[name] for name in ("clips", "classes", "chance"))
    untrained = baselines["untrained"]
    names = {"raw pixels": baselines["pixels"], "color histogram": baselines["histogram"]}
    result = [f"held-out: the class of {clips} clips of {classes}, by 5 neighbors in other clips (chance {chance:.1%})"]
    if trained:
        result.append(f"  trained {text(trained['pooled'])}; average pooling {text(trained['averaged'])}")
    shown = {"untrained": untrained["pooled"]} | names
    result.append("  " + ", ".join(f"{name} {text(score)}" for name, score in shown.items()))
    if trained:
        for name, words in (("gray", "without color"), ("linear", "linear probe")):
            if name in trained and name in untrained:
                result.append(f"  {words}: trained {text(trained[name])}, untrained {text(untrained[name])}")
        if better := [name for name, score in names.items() if score[0] >= trained["pooled"][0]]:
            result.append(f"warning: the encoder is no better than {' and '.join(better)}")
    return result
