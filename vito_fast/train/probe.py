"""A cheap evaluation during pretraining: retrieval of a clip by another augmented frame.

Two frames of each clip are drawn and augmented by one fixed sampler (``evaluation_sampler``), whatever the run's own,
so that runs compare. The first retrieves the second among those of all clips, by cosine of the encoder's averaged last
features. The baselines are the untrained network, raw pixels and color histograms on the same frames. Where the videos'
folders name classes, the frames are also classified by their nearest neighbors in other videos; labels have no other
use. A picture shows the attention in a few fixed frames.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vito_fast.config import ClipFilter, Config, SamplerConfig, TrainConfig
from vito_fast.data.loader.loader import ClipLoader
from vito_fast.data.store.labels import NO_LABEL
from vito_fast.data.store.store import Store
from vito_fast.errors import UserError
from vito_fast.model.backbones import build_backbone
from vito_fast.model.pair import Branch
from vito_fast.train.attention_maps import Pixels, resized, video_frames, write_grid

SEED_OFFSET = 1_000_003
"""Added to the run's seed for the evaluation: other frames, crops and colors than training's."""
NEIGHBORS = 20
"""Voters on a frame's class, as in DINO's tables."""
SHOWN = 6
"""Frames in an attention picture."""
DRAWS = 4
"""Maximum draws of each clip, with other frames each time: one draw of a few clips gives a coarse number."""


@dataclass(frozen=True)
class Frames:
    """K times two augmented frames of each of N clips: queries and gallery, both (K,N,3,S,S) float32 on the CPU."""

    query: Tensor
    gallery: Tensor
    shown: Pixels | None
    """A few whole frames (n,H,W,3) for ``picture``; None for a model without attention pooling."""
    video: Tensor
    """(K*N,) int64: the video of each frame of the gallery."""
    label: Tensor | None
    """(K*N,) int64: its class, from 0; None where there are no classes (``labels``)."""

    @property
    def clips(self) -> int:
        """N, the candidates of a retrieval; shares compare only for the same number."""
        return self.query.shape[1]


class CollapseAlarm:
    """Watches logged rows and prints one warning at the onset of collapse, or of batches of one video.

    Collapsed embeddings are one point or lie on a line. A batch of one video has no negatives.

    Args:
        config: The thresholds.
        ranks: Number of ranks.
    """

    def __init__(self, config: TrainConfig, ranks: int) -> None:
        self.minimum, self.warned, self.alone = {"embedding_std": config.collapse_std}, False, False
        if config.batch_size // ranks >= 8 * config.collapse_rank:  # a few clips span few dimensions anyway
            self.minimum["embedding_rank"] = config.collapse_rank

    def __call__(self, row: Mapping[str, Any]) -> dict[str, int]:
        """``collapsed`` for metrics.jsonl: how many embeddings are below a threshold."""
        low: dict[str, Any] = {}
        for key, value in row.items():
            name, _, level = key.partition("_level")
            if name in self.minimum and value < self.minimum[name]:
                low.setdefault(level, []).append(f"{key} {value:.2g}")
        if low and not self.warned:
            values = ", ".join(text for texts in low.values() for text in texts)
            print(
                f"warning: step {row['step']}: embeddings collapse: {values} "
                "(std: 1 = spread evenly, 0 = a point; rank: dimensions used)",
                flush=True,
            )
        self.warned = bool(low)
        alone = row.get("chance") == 0
        if alone and not self.alone:
            print(
                f"warning: step {row['step']}: log(negatives + 1) is 0: all clips of the batch are of one video, and "
                "nothing is learned: pack more videos or raise train.batch_size",
                flush=True,
            )
        self.alone = alone
        return {"collapsed": len(low)}


def evaluation_sampler(size: int) -> SamplerConfig:
    """The sampler of every run's evaluation: two views as published, at the run's ``size`` in pixels."""
    return SamplerConfig(size=size, views=2)


def draw(config: Config, clips: int) -> Frames:
    """Draws augmented frames of up to ``train.evaluate_clips`` of the store's clips; a function of the seed."""
    wanted = min(clips, config.train.evaluate_clips)
    draws = max(1, min(DRAWS, config.train.evaluate_clips // wanted))
    batches = -(-wanted // 64)
    size = wanted // batches  # the loader drops an incomplete batch, so the batches are made to fit
    seed, threads = config.seed + SEED_OFFSET, config.data.threads
    query, gallery, clip, video = [], [], [], []
    bad = config.data.max_bad_share  # as in training
    with ClipLoader(
        config.data.store,
        size,
        seed=seed,
        sampler=evaluation_sampler(config.sampler.size),
        threads=threads,
        max_bad_share=bad,
        labels=False,
        where=ClipFilter.parse(config.data.where),
        cache=config.data.cache,
        cache_gib=config.data.cache_gib,
    ) as loader:
        for epoch in range(draws):
            loader.set_epoch(epoch)
            drawn = [batch for _, batch in zip(range(batches), loader, strict=False)]
            query.append(torch.cat([batch["views"][0] for batch in drawn]))
            gallery.append(torch.cat([batch["views"][-1] for batch in drawn]))
            clip += [number for batch in drawn for number in batch["clip"].tolist()]
            video += [batch["video"] for batch in drawn]
        try:
            label = labels(loader.store, clip)
        except UserError as error:  # classes are an extra here: a run needs none
            print(f"note: no accuracy by nearest neighbors on the training store: {error}", flush=True)
            label = None
    return Frames(torch.stack(query), torch.stack(gallery), _shown(config, loader.store), torch.cat(video), label)


def labels(store: Store, clips: list[int]) -> Tensor | None:
    """The class of each of ``clips``, (M,) int64 from 0: of ``labels.parquet`` in a curated store, else the folder of
    its video when it was packed.

    None if all are of one class, or one of them of none.

    Raises:
        UserError: ``labels.parquet`` cannot be read, or has another number of clips than the store.
    """
    if (curated := store.labels()) is not None:
        named: list[Any] = curated.label[clips].tolist()
    else:
        named = [Path(store.index.clip(clip).source).parent.name for clip in clips]
    classes = sorted(set(named))
    if len(classes) < 2 or classes[0] in ("", NO_LABEL):
        return None
    return torch.tensor([classes.index(name) for name in named])


def _shown(config: Config, store: Store) -> Pixels | None:
    """The frames of ``picture``; None, with a warning, if a clip among them is damaged."""
    if config.model.pooling != "attention":
        return None
    try:
        return video_frames(store, SHOWN, config.sampler.size)
    except (OSError, ValueError) as error:  # damaged packets, or a damaged record in the index
        print(f"warning: no attention pictures: {error}", flush=True)
        return None


def top1(query: Tensor, gallery: Tensor) -> float:
    """Share of rows of ``query`` (K,N,...) whose nearest row of ``gallery`` (K,N,...), by cosine in the same draw, has
    the same number."""
    query, gallery = (F.normalize(x.flatten(2), dim=2) for x in (query, gallery))
    nearest = (query @ gallery.mT).argmax(2)
    return (nearest == torch.arange(nearest.shape[1], device=nearest.device)).double().mean().item()


def knn_top1(rows: Tensor, label: Tensor, video: Tensor) -> float:
    """Accuracy of nearest-neighbor classification, as in InstDisc (1805.01978) and DINO.

    Args:
        rows: Features (M,C).
        label: (M,) int64.
        video: (M,) int64; neighbors are of other videos.

    Returns:
        Share of rows whose class wins the vote of the ``NEIGHBORS`` nearest by cosine, each of weight
        exp(cosine / 0.07). NaN for features that are not finite.
    """
    if not torch.isfinite(rows).all():
        return math.nan
    rows = F.normalize(rows, dim=1)
    similarity = (rows @ rows.T).masked_fill(video[:, None] == video, -torch.inf)
    nearest, at = similarity.topk(min(NEIGHBORS, len(rows)))
    votes = rows.new_zeros(len(rows), int(label.max()) + 1).scatter_add_(1, label[at], (nearest / 0.07).exp())
    return (votes.argmax(1) == label).double().mean().item()


@torch.no_grad()
def features(backbone: nn.Module, images: Tensor, device: torch.device, channels_last: bool) -> Tensor:
    """Spatial means (K,N,C) float32 of the coarsest stage, for images (K,N,3,S,S), in the backbone's current mode."""
    dtype = next((p.dtype for p in backbone.parameters()), torch.float32)
    rows = []
    for part in images.flatten(0, 1).split(64):
        part = part.to(device, dtype, memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        rows.append(backbone(part)[-1].mean((2, 3)).float())
    return torch.cat(rows).unflatten(0, images.shape[:2])


def histogram(images: Tensor) -> Tensor:
    """Square roots of joint color histograms (K,N,512), 8 bins a channel, of images (K,N,3,S,S)."""
    low, high = (images.amin((0, 1, 3, 4), True), images.amax((0, 1, 3, 4), True))
    bins = ((images - low) / (high - low).clamp(min=1e-12) * 8).long().clamp(max=7)
    at = (bins[:, :, 0] * 64 + bins[:, :, 1] * 8 + bins[:, :, 2]).flatten(2)
    counts = images.new_zeros(*images.shape[:2], 512).scatter_add_(2, at, torch.ones_like(at, dtype=images.dtype))
    return counts.sqrt()


def rank_me(rows: Tensor) -> float:
    """Effective rank of features (N,C): exp of the entropy of their normalized singular values (RankMe, 2210.02885).

    NaN for features that are not finite, of a run that has failed.
    """
    if not torch.isfinite(rows).all():
        return math.nan
    values = torch.linalg.svdvals(rows.double())
    share = values / values.sum() + 1e-7
    return torch.exp(-(share * share.log()).sum()).item()


def evaluate(backbone: nn.Module, frames: Frames, config: Config, device: torch.device) -> dict[str, Any]:
    """Evaluates the network in evaluation mode, and leaves its mode as it was.

    Returns:
        ``retrieval`` (a share, 0 to 1) among ``clips`` clips, and ``rank_me``. With classes also ``knn_top1``, and the
        share of the commonest class as ``knn_chance``.
    """
    was_training = backbone.training
    backbone.eval()
    query = features(backbone, frames.query, device, config.train.channels_last)
    gallery = features(backbone, frames.gallery, device, config.train.channels_last)
    backbone.train(was_training)
    rows = gallery.flatten(0, 1)
    found = {"retrieval": top1(query, gallery), "clips": frames.clips, "rank_me": rank_me(rows)}
    if frames.label is not None:
        found["knn_top1"] = knn_top1(rows, frames.label.to(device), frames.video.to(device))
        found["knn_chance"] = int(frames.label.bincount().max()) / len(frames.label)
    return found


def picture(branch: Branch, frames: Frames, out: Path) -> None:
    """Writes the branch's attention in evaluation mode, if it has any, and leaves its mode as it was.

    Of the whole frames; of frames squeezed to the views' square where the network takes no other shape. UserError if it
    cannot be written.
    """
    if frames.shown is None:
        return
    was_training = branch.training
    branch.eval()
    try:
        write_grid(branch, frames.shown, out)
    except (RuntimeError, AssertionError, UserError):
        write_grid(branch, resized(list(frames.shown), frames.query.shape[-2:]), out)
    finally:
        branch.train(was_training)


def baselines(backbone: nn.Module, frames: Frames, config: Config, device: torch.device) -> dict[str, Any]:
    """Retrieval of the untrained network, its batch norms set to these frames, and of raw pixels.

    The statistics favor the untrained network: its initial ones fit no images.
    """
    untrained = build_backbone(config.model).to(device)  # not a copy: its norms must not synchronize with other ranks
    untrained.load_state_dict(backbone.state_dict())
    for module in untrained.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
            module.momentum = None  # a plain average over the batches
    untrained.train()
    features(untrained, torch.cat([frames.query, frames.gallery]), device, config.train.channels_last)
    return {
        "untrained": evaluate(untrained, frames, config, device)["retrieval"],
        "pixels": top1(frames.query, frames.gallery),
        "histogram": top1(histogram(frames.query), histogram(frames.gallery)),
        "clips": frames.clips,
    }
