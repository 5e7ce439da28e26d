"""Where the attention of an encoder lies, against the object masks of a folder in DAVIS's layout."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vito_fast.errors import UserError
from vito_fast.evaluate import davis
from vito_fast.evaluate.data import manifest, read_labels
from vito_fast.evaluate.encoders import Encoder
from vito_fast.evaluate.pictures import save_strip
from vito_fast.evaluate.result import mean_metric
from vito_fast.evaluate.saliency import center_prior
from vito_fast.evaluate.task import Check, Measured, Task, gathered, own_share, rank_and_size
from vito_fast.train.attention_maps import overlay


@dataclass(frozen=True)
class AttentionOptions:
    """Which frames, and at which size."""

    split: str = "val"
    size: int = 224
    """Short side of a frame in pixels; sides are multiples of 32."""
    frames: int = 4
    """Frames of a sequence, evenly spaced."""
    subset: bool = False
    """Whether other sequences than the benchmark's are scored."""


class Attention(Task):
    """The area under the ROC curve of attention against object masks, beside a center prior's."""

    name, title, options = "attention", "attention against object masks", AttentionOptions

    def check(self, data: Path, options: AttentionOptions) -> Check:
        """As label propagation's."""
        problems = davis.problems(data, options.split, exact=not options.subset)
        if problems:
            return Check(tuple(problems))
        names = davis.sequences(data, options.split)
        images = [p for n in names for p in davis.frames(data / "JPEGImages" / "480p" / n, ".jpg")]
        labels = [p for n in names for p in davis.frames(davis.annotations(data) / n, ".png")]
        found = manifest(data, images, labels)
        count = options.frames * len(names)
        return Check((), len(names), found, count, (options.size, options.size), notes=("no published protocol",))

    def measure(self, encoder: Encoder, data: Path, options: AttentionOptions, work: Path) -> Measured:
        """Scores every level's maps, upsampled bilinearly, and the center prior on the same frames."""
        if encoder.pools is None:
            raise UserError(f"{encoder.record.name} has no attention pools: attention maps are a run's alone")
        names = davis.sequences(data, options.split)
        own, media, found = own_share(names), {}, {}
        for number, name in enumerate(own):
            frames, labels = list(davis.read_video(data, name)), davis.frames(davis.annotations(data) / name, ".png")
            scores: dict[str, list[float]] = {}
            for at in np.linspace(0, len(frames) - 1, options.frames).round().astype(int):
                mask = read_labels(labels[at]).numpy()
                if mask[mask != 255].any() and not mask.all():
                    maps = self._maps(encoder, frames[at], options.size)
                    maps["center_prior"] = center_prior(*frames[at].shape[:2])
                    for key, value in maps.items():
                        scores.setdefault(key, []).append(auc(value.numpy(), mask))
            found[name] = {key: float(np.mean(values)) for key, values in scores.items()}
            if number < 3 and rank_and_size()[0] == 0:
                maps = self._maps(encoder, frames[0], options.size)
                maps["center_prior"] = center_prior(*frames[0].shape[:2])
                picture = frames[0].numpy()
                shown = [picture, *(overlay(picture[None], m[None])[0] for m in maps.values())]
                media[f"{name}: frame, {', '.join(maps)}"] = save_strip(work / f"{name}.png", shown)
        items: dict[str, Any] = gathered(found, names)
        keys = [*(f"auc_stride_{s}" for s in encoder.strides[-len(encoder.pools) :]), "center_prior"]
        metrics = {key: mean_metric((scores.get(key) for scores in items.values()), "AUC") for key in reversed(keys)}
        metrics = {keys[-2]: metrics.pop(keys[-2]), **metrics}
        return Measured(metrics, items, media=media, notes=("AUC .5 is chance; a center prior needs no network",))

    def _maps(self, encoder: Encoder, frame: Tensor, size: int) -> dict[str, Tensor]:
        image = frame.permute(2, 0, 1)[None].float() / 255
        height, width = (max(32, round(n * size / min(frame.shape[:2]) / 32) * 32) for n in frame.shape[:2])
        image = torch.nn.functional.interpolate(image, (height, width), mode="bilinear", antialias=True)
        maps = encoder.attention(encoder.normalize(image))
        strides = encoder.strides[-len(maps) :]
        original = (frame.shape[0], frame.shape[1])
        up = [torch.nn.functional.interpolate(m[None], original, mode="bilinear")[0, 0].cpu() for m in maps]
        return {f"auc_stride_{s}": m for s, m in zip(strides, up, strict=True)}


def auc(values: np.ndarray, mask: np.ndarray) -> float:
    """Area under the ROC curve of ``values`` (H,W) for ``mask`` (H,W) > 0, by ranks; ties count half. 255 is void."""
    from scipy.stats import rankdata

    kept = mask.ravel() != 255
    inside = mask.ravel()[kept] > 0
    ranks = rankdata(values.ravel()[kept])
    n, m = int(inside.sum()), int((~inside).sum())
    return float((ranks[inside].sum() - n * (n + 1) / 2) / (n * m))
