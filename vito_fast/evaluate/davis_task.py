"""The task ``davis``: propagates the first mask of each sequence, writes official results and scores them."""

import dataclasses
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vito_fast.evaluate import davis
from vito_fast.evaluate.data import manifest, read_image, read_labels
from vito_fast.evaluate.encoders import Encoder
from vito_fast.evaluate.pictures import save_strip
from vito_fast.evaluate.propagate import Preset, input_size
from vito_fast.evaluate.result import mean_metric
from vito_fast.evaluate.task import Check, Measured, Progress, Task, gathered, own_share
from vito_kernels.photometric.op import IMAGENET_STD

COLORS = (
    (0, 0, 0), (214, 40, 40), (46, 160, 67), (247, 183, 49), (38, 96, 211), (152, 78, 163), (0, 173, 181),
    (240, 110, 30), (120, 180, 230), (230, 120, 190), (130, 100, 60),
)  # fmt: skip
"""The palette of result files and pictures."""


@dataclass(frozen=True)
class DavisOptions(Preset):
    """The protocol, and which features it reads."""

    stage: int = 2
    """Of the backbone, from 0: 2 is the third, ResNet's res4."""
    stride: int = 8
    """Of the features. Layers' strides change, and no kernel is dilated."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of features on a GPU; similarities are float32 sums. On a CPU all is float32."""
    split: str = "val"
    subset: bool = False
    """Whether other sequences than the benchmark's are scored; the result says so."""


class Davis(Task):
    """J&F of the validation split."""

    name, title, options = "davis", "DAVIS-2017, video object segmentation", DavisOptions

    def check(self, data: Path, options: DavisOptions) -> Check:
        """Counts sequences and frames; refuses the annotations of the unsupervised track."""
        problems = davis.problems(data, options.split, exact=not options.subset)
        if problems:
            return Check(tuple(problems))
        names = davis.sequences(data, options.split)
        images = [p for name in names for p in davis.frames(data / "JPEGImages" / "480p" / name, ".jpg")]
        masks = [p for name in names for p in davis.frames(davis.annotations(data) / name, ".png")]
        with Image.open(images[0]) as image:
            size = input_size(image.height, image.width, options)
        memory = (options.memory + 1) * (size[0] // options.stride + 1) * (size[1] // options.stride + 1) * 1024 * 4
        notes = (f"{len(names)} sequences, not the benchmark's 30",) if options.subset else ()
        found = manifest(data, images, masks)
        return Check((), len(names), found, len(images), size, memory=memory, notes=notes)

    def measure(self, encoder: Encoder, data: Path, options: DavisOptions, work: Path) -> Measured:
        """Each rank takes whole sequences, the longest first. A sequence whose folder exists is not done again."""
        names = davis.sequences(data, options.split)
        lengths = {name: len(davis.frames(davis.annotations(data) / name, ".png")) for name in names}
        own = own_share(sorted(names, key=lambda name: (-lengths[name], name)))
        progress = Progress("davis frames", sum(lengths[name] for name in own))
        scores = {}
        for name in own:
            if not (work / "masks" / name).is_dir():
                save_masks(work / "masks", name, segment(encoder, data, name, options))
            scores[name] = davis.score_folder(work / "masks", data, name)
            progress.step(lengths[name])
        found = davis.Scores([score for parts in gathered(scores, names).values() for score in parts])
        items = {
            f"{score.sequence}_{score.object}": {"J&F": score.jf, "J": score.j.mean, "F": score.f.mean}
            for score in found.objects
        }
        metrics = {name: mean_metric((item[name] for item in items.values()), "share") for name in ("J&F", "J", "F")}
        for name, value in found.summary.items():
            if name.endswith(("Recall", "Decay")):
                metrics[name] = dataclasses.replace(metrics["J&F"], value=value, standard_error=None)
        ranked = sorted(found.per_sequence, key=found.per_sequence.__getitem__)
        media = {}
        for label, name in {"worst": ranked[0], "median": ranked[len(ranked) // 2], "best": ranked[-1]}.items():
            file = f"{label}.png"
            if name in own:
                save_strip(work / file, filmstrip(data, work / "masks", name))
            media[f"{name}, J&F {found.per_sequence[name]:.3f} ({label})"] = file
        groups = {name: {"J&F": value} for name, value in found.per_sequence.items()}
        return Measured(metrics, items, groups, media=media)


def segment(encoder: Encoder, data: Path, sequence: str, options: DavisOptions) -> list[NDArray[np.uint8]]:
    """Masks of every frame of a sequence."""
    # DINO's red deviation of .228 is a slip of ImageNet's; an encoder of other statistics keeps its own.
    std = options.std if encoder.std == IMAGENET_STD else encoder.std
    protocol = dataclasses.replace(options, mean=encoder.mean, std=std)
    low = encoder.device.type == "cuda" and options.dtype == "bfloat16"

    def extract(images: Tensor) -> Tensor:
        features = encoder.dense(images.to(encoder.device), options.stride, options.stage)
        return features.to(torch.bfloat16) if low else features

    first = davis.frames(davis.annotations(data) / sequence, ".png")[0]
    return list(davis.propagate(extract, davis.read_video(data, sequence), read_labels(first), protocol))


def save_masks(folder: Path, sequence: str, masks: list[NDArray[np.uint8]]) -> None:
    """Writes ``SEQUENCE/00000.png``, ... as palette images. The folder appears whole or not at all."""
    partial = folder / f".{sequence}.{os.getpid()}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for number, mask in enumerate(masks):
        image = Image.fromarray(mask)
        image.putpalette([value for color in COLORS for value in color])
        image.save(partial / f"{number:05d}.png")
    os.replace(partial, folder / sequence)


def filmstrip(data: Path, masks: Path, sequence: str, count: int = 5) -> list[NDArray[np.uint8]]:
    """Evenly spaced frames of a sequence, objects tinted by the found masks."""
    frames = davis.frames(data / "JPEGImages" / "480p" / sequence, ".jpg")
    pictures = []
    for t in np.linspace(0, len(frames) - 1, count).round().astype(int):
        image = read_image(frames[t]).permute(1, 2, 0).numpy()
        ids = read_labels(davis.frames(masks / sequence, ".png")[t]).numpy()
        tint = np.array(COLORS, np.float64)[ids % len(COLORS)]
        pictures.append(np.where(ids[..., None] > 0, 0.45 * image + 0.55 * tint, image).astype(np.uint8))
    return pictures
