"""The task ``clickme``: gradient saliency of the ImageNet classifier beside people's maps, and two other maps."""

import io
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vito_fast.errors import UserError
from vito_fast.evaluate import saliency, tfrecord
from vito_fast.evaluate.data import counted, manifest
from vito_fast.evaluate.encoders import Encoder, Pixels
from vito_fast.evaluate.folder_tasks import Items
from vito_fast.evaluate.imagenet_tasks import Classifier, HeadOptions, HeadTask, with_counts
from vito_fast.evaluate.result import Metric, mean_metric
from vito_fast.evaluate.task import Check, Measured, Progress, gathered, rank_and_size

SHARDS = 17


class ClickMe(HeadTask):
    """The alignment score: Spearman correlation over the ceiling."""

    name, title, options = "clickme", "ClickMe, alignment of saliency with people", HeadOptions

    def check(self, data: Path, options: HeadOptions) -> Check:
        """Counts the files ``val-*.tfrecords`` and their records."""
        try:
            files = shards(data)
            count = sum(1 for path in files for _ in tfrecord.records(path))
        except UserError as error:
            return Check((str(error),))
        scored = count // saliency.BATCH * saliency.BATCH
        problems = () if scored else (f"{data}: {count} records make no batch of {saliency.BATCH}",)
        found = Check(problems, scored, manifest(data, files), scored, trains=True)
        return found if problems else with_counts(found, counted("files", len(files), SHARDS), subset=options.subset)

    def measure(self, encoder: Encoder, data: Path, options: HeadOptions, work: Path) -> Measured:
        """Batches of 64 in the official order, shared among ranks; the last incomplete one is dropped."""
        classifier = self.classifier(encoder)
        rank, size = rank_and_size()
        total = self.check(data, options).items // saliency.BATCH
        progress, rows = Progress("clickme batches", len(range(rank, total, size))), {}
        for number, (images, heatmaps, labels) in enumerate(batches(data)):
            if number % size == rank:
                found = correlations(classifier, images, heatmaps, labels)
                for i in range(saliency.BATCH):
                    rows[str(number * saliency.BATCH + i)] = {name: float(values[i]) for name, values in found.items()}
                progress.step()
        order = [str(i) for i in range(total * saliency.BATCH)]
        values = gathered(rows, order)
        names = list(values[order[0]])
        items: Items = {
            i: {name: None if np.isnan(row[name]) else row[name] for name in names} for i, row in values.items()
        }
        spearman = {name: mean_metric((item[name] for item in items.values()), "spearman") for name in names}
        metrics = {"alignment": scaled(spearman["gradient"])}
        metrics |= {f"{name} spearman": value for name, value in spearman.items()}
        constant = sum(item["gradient"] is None for item in items.values())
        notes = [f"{constant} of {len(items)} gradient maps are constant and have no correlation"] if constant else []
        notes.append(f"ceiling {saliency.CEILING}; the center prior needs no encoder, and attention is another measure")
        return Measured(metrics, items, notes=tuple(notes))


def scaled(metric: Metric) -> Metric:
    """A mean correlation over the ceiling."""
    value, error = (x if x is None else x / saliency.CEILING for x in (metric.value, metric.standard_error))
    return Metric(value, "of the ceiling", metric.n, error)


def shards(data: Path) -> list[Path]:
    """The files ``val-*.tfrecords`` in the order of their numbers. UserError if there are none."""
    found = [path for path in data.glob("*val*.tfrecords") if re.search(r"\d+", path.stem)]
    if not found:
        raise UserError(f"{data} has no val-0.tfrecords, ...: give the folder of ClickMe's validation files")
    return sorted(found, key=lambda path: int(re.findall(r"\d+", path.stem)[-1]))


def batches(data: Path) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Complete batches: images (64, 3, 224, 224) in [0, 1], human maps (64, 224, 224), labels (64,)."""
    rows: list[tuple[Tensor, Tensor, int]] = []
    for path in shards(data):
        for record in tfrecord.records(path):
            rows.append(read(record, path))
            if len(rows) == saliency.BATCH:
                images, heatmaps, labels = zip(*rows, strict=True)
                small = F.interpolate(torch.stack(images), (224, 224), mode="bilinear", align_corners=False)
                yield small, saliency.human_map(torch.stack(heatmaps)), torch.tensor(labels)
                rows = []


def read(record: bytes, path: Path) -> tuple[Tensor, Tensor, int]:
    """An image (3, 256, 256) in [0, 1], a human map (256, 256) and a label. UserError naming the file."""
    try:
        features = tfrecord.example(record)
        image, heatmap = (Image.open(io.BytesIO(features[key][0])) for key in ("image", "heatmap"))  # type: ignore[arg-type]
        picture = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255
        clicks = torch.from_numpy(np.array(heatmap.convert("L"))).float()
        label = int(features["label"][0])
        if picture.shape != (3, 256, 256) or clicks.shape != (256, 256):
            raise ValueError(f"image {tuple(picture.shape)}, map {tuple(clicks.shape)}")
    except (KeyError, IndexError, TypeError, ValueError, OSError) as error:
        raise UserError(f"{path} holds a record that is not ClickMe's: {error}") from None
    return picture, clicks, label


def correlations(classifier: Classifier, images: Tensor, heatmaps: Tensor, labels: Tensor) -> dict[str, np.ndarray]:
    """Correlations with people (B,) of the gradient, of the center prior, and of the attention of a run that has it."""
    encoder = classifier.encoder
    inputs = encoder.normalize(images)
    if int(labels.max()) >= len(classifier.classes):
        raise UserError(
            f"ClickMe's label {int(labels.max())} is beyond the classifier's {len(classifier.classes)} classes"
        )

    def logits(x: Tensor) -> Tensor:
        return classifier.probe.logits(differentiable(encoder, x, classifier.options.features))

    gradient = saliency.gradient_saliency(logits, inputs, labels.to(encoder.device))
    prior = saliency.center_prior(*heatmaps.shape[1:]).expand_as(heatmaps)
    maps = {"gradient": gradient, "center prior": prior}
    if encoder.pools is not None:
        attention = encoder.attention(inputs)[-1][:, None]
        maps["attention"] = F.interpolate(attention, heatmaps.shape[1:], mode="bilinear", align_corners=False)[:, 0]
    return {name: saliency.alignment(found.cpu(), heatmaps).correlations for name, found in maps.items()}


def differentiable(encoder: Encoder, inputs: Tensor, kind: str) -> Tensor:
    """The features of ``pooled`` or ``attended`` in float32, with gradients."""
    if isinstance(encoder.backbone, Pixels):
        return encoder.pooled(inputs)
    stages = encoder.backbone(inputs)
    if kind == "pooled":
        return stages[-1].mean((2, 3))
    assert encoder.pools is not None
    return torch.cat([pool(f)[0] for pool, f in zip(encoder.pools, stages[-len(encoder.pools) :], strict=True)], 1)
