"""A cheap evaluation during pretraining: does an augmented frame find another augmented frame of its own clip?

For each clip two frames are drawn and augmented as in training, from a seed of their own. The first looks for the
second among those of all clips, by cosine of the encoder's averaged last features. The untrained network (the run's
own start) and the raw pixels answer the same question on the same frames. Where the videos lie in folders that name
classes, their frames are also classified by their nearest neighbours in other videos; the labels are used for nothing
else. Beside the numbers, a picture: where the pools look in a few frames that stay the same.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vito_fast.config import Config, TrainConfig
from vito_fast.data.loader.loader import ClipLoader
from vito_fast.data.store.store import Store
from vito_fast.model.pair import Branch, build_backbone
from vito_fast.train.attention_maps import Pixels, video_frames, write_grid

SEED_OFFSET = 1_000_003
"""The evaluation's frames come from the run's seed plus this: other frames, crops and colours than training's."""
NEIGHBOURS = 20
"""That vote on a frame's class; DINO's choice for its tables."""
SHOWN = 6
"""Frames in an attention picture."""
DRAWS = 4
"""How often each of a few clips is asked for at most, with other frames each time: once alone gives a coarse number."""


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
        """N, among which a frame is looked for: shares of the same number compare."""
        return self.query.shape[1]


class CollapseAlarm:
    """Watches logged rows for embeddings that have all become one point or lie on a line, and for batches of one video,
    which teach the contrastive loss nothing: one line when that begins.
    """

    def __init__(self, config: TrainConfig, ranks: int) -> None:
        self.least, self.ringing, self.alone = {"embedding_std": config.collapse_std}, False, False
        if config.batch_size // ranks >= 8 * config.collapse_rank:  # a few clips span few dimensions anyway
            self.least["embedding_rank"] = config.collapse_rank

    def __call__(self, row: Mapping[str, Any]) -> dict[str, int]:
        """``collapsed_scales`` for metrics.jsonl: how many scales are below a threshold."""
        low: dict[str, Any] = {}
        for key, value in row.items():
            name, _, scale = key.partition("_scale")
            if name in self.least and value < self.least[name]:
                low.setdefault(scale, []).append(f"{key} {value:.2g}")
        if low and not self.ringing:
            values = ", ".join(text for texts in low.values() for text in texts)
            print(
                f"warning: step {row['step']}: embeddings collapse: {values} "
                "(std: 1 = spread evenly, 0 = a point; rank: dimensions used)",
                flush=True,
            )
        self.ringing = bool(low)
        alone = row.get("chance") == 0
        if alone and not self.alone:
            print(
                f"warning: step {row['step']}: log(negatives + 1) is 0: all clips of the batch are of one video, and "
                "nothing is learned: pack more videos or raise train.batch_size",
                flush=True,
            )
        self.alone = alone
        return {"collapsed_scales": len(low)}


def draw(config: Config, clips: int) -> Frames:
    """Augmented frames of up to ``train.evaluate_clips`` of the store's ``clips`` clips, the same for the same seed."""
    wanted = min(clips, config.train.evaluate_clips)
    draws = max(1, min(DRAWS, config.train.evaluate_clips // wanted))
    batches = -(-wanted // 64)
    size = wanted // batches  # the loader drops an incomplete batch, so the batches are made to fit
    seed, threads = config.seed + SEED_OFFSET, config.data.threads
    query, gallery, clip, video = [], [], [], []
    bad = config.data.max_bad_share  # as training: a store good enough for that is so here
    with ClipLoader(
        config.data.store, size, seed=seed, sampler=config.sampler, threads=threads, max_bad_share=bad
    ) as loader:
        for epoch in range(draws):
            loader.set_epoch(epoch)
            drawn = [batch for _, batch in zip(range(batches), loader, strict=False)]
            query.append(torch.cat([batch["views"][0] for batch in drawn]))
            gallery.append(torch.cat([batch["views"][-1] for batch in drawn]))
            clip += [number for batch in drawn for number in batch["clip"].tolist()]
            video += [batch["video"] for batch in drawn]
        label = labels(loader.store, clip)
    return Frames(torch.stack(query), torch.stack(gallery), _shown(config), torch.cat(video), label)


def labels(store: Store, clips: list[int]) -> Tensor | None:
    """The class of each of ``clips``, (M,) int64 from 0: the folder that its video lay in when it was packed.

    None if they all lay in one folder, or one of them in none.
    """
    folders = [Path(store.index.clip(clip).source).parent.name for clip in clips]
    classes = sorted(set(folders))
    return torch.tensor([classes.index(f) for f in folders]) if len(classes) > 1 and "" not in classes else None


def _shown(config: Config) -> Pixels | None:
    """The frames of ``picture``; a damaged clip among them costs the pictures, with a warning, and not the run."""
    if config.model.pooling != "attention":
        return None
    try:
        return video_frames(Path(config.data.store), SHOWN, config.sampler.size)
    except (OSError, ValueError) as error:  # of its packets, of its record in the index
        print(f"warning: no attention pictures: {error}", flush=True)
        return None


def top1(query: Tensor, gallery: Tensor) -> float:
    """Share of rows of ``query`` (K,N,...) whose nearest row of ``gallery`` (K,N,...) of the same draw, by cosine, is
    the one of the same number."""
    query, gallery = (F.normalize(x.flatten(2), dim=2) for x in (query, gallery))
    nearest = (query @ gallery.mT).argmax(2)
    return (nearest == torch.arange(nearest.shape[1], device=nearest.device)).double().mean().item()


def knn_top1(rows: Tensor, label: Tensor, video: Tensor) -> float:
    """Share of features (M,C) whose class, of ``label`` (M,) int64, wins the vote of the ``NEIGHBOURS`` nearest among
    those of other videos, ``video`` (M,): by cosine, each with weight exp(cosine/0.07), as in InstDisc (1805.01978) and
    DINO. NaN for features that are not finite.
    """
    if not torch.isfinite(rows).all():
        return math.nan
    rows = F.normalize(rows, dim=1)
    similarity = (rows @ rows.T).masked_fill(video[:, None] == video, -torch.inf)
    nearest, at = similarity.topk(min(NEIGHBOURS, len(rows)))
    votes = rows.new_zeros(len(rows), int(label.max()) + 1).scatter_add_(1, label[at], (nearest / 0.07).exp())
    return (votes.argmax(1) == label).double().mean().item()


@torch.no_grad()
def features(backbone: nn.Module, images: Tensor, device: torch.device, channels_last: bool) -> Tensor:
    """(K,N,C) float32:

    the spatial mean of the coarsest stage, in whichever mode the backbone is, of images (K,N,3,S,S).
    """
    dtype = next((p.dtype for p in backbone.parameters()), torch.float32)
    rows = []
    for part in images.flatten(0, 1).split(64):
        part = part.to(device, dtype, memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        rows.append(backbone(part)[-1].mean((2, 3)).float())
    return torch.cat(rows).unflatten(0, images.shape[:2])


def rank_me(rows: Tensor) -> float:
    """Effective rank of features (N,C): exp of the entropy of their normalised singular values (RankMe, 2210.02885).

    NaN for features that are not finite, of a run that has failed.
    """
    if not torch.isfinite(rows).all():
        return math.nan
    values = torch.linalg.svdvals(rows.double())
    share = values / values.sum() + 1e-7
    return torch.exp(-(share * share.log()).sum()).item()


def evaluate(backbone: nn.Module, frames: Frames, config: Config, device: torch.device) -> dict[str, Any]:
    """Retrieval (share, 0 to 1) among how many ``clips``, and RankMe, of the network in evaluation mode; the network is
    left as it was.

    Where there are classes also ``knn_top1``, and the share of the commonest class as ``knn_chance``.
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
    """Writes the PNG ``out`` of the branch's attention in evaluation mode, if there is any; the branch is left as it
    was. UserError if it cannot be written."""
    if frames.shown is not None:
        was_training = branch.training
        branch.eval()
        write_grid(branch, frames.shown, out)
        branch.train(was_training)


def baselines(backbone: nn.Module, frames: Frames, config: Config, device: torch.device) -> dict[str, Any]:
    """What the trained network must beat: the untrained one, its batch norms set to these frames, and raw pixels.

    The statistics favour the untrained network: without them its features would be scaled for no images at all.
    """
    untrained = build_backbone(config.model).to(device)  # not a copy: its norms must not wait for other ranks
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
        "clips": frames.clips,
    }
