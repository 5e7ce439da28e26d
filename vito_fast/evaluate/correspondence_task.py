"""The task ``correspondence``: PCK on pairs of views with true disparity."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vito_fast.errors import UserError
from vito_fast.evaluate import correspondence
from vito_fast.evaluate.data import manifest
from vito_fast.evaluate.encoders import Encoder
from vito_fast.evaluate.result import mean_metric
from vito_fast.evaluate.task import Check, Measured, Task, gathered, own_share


@dataclass(frozen=True)
class CorrespondenceOptions:
    """Which features, which points, and when one is found."""

    stage: int = 2
    """Of the backbone, from 0."""
    stride: int = 8
    """Of the features: strides change, no kernel is dilated."""
    spacing: int = 8
    """Of the grid of points, in pixels."""
    threshold: float = 8.0
    """Distance in pixels within which a point counts as found."""
    block: int = 64
    """Side in pixels of the blocks over which the standard error is taken: points near each other err together."""


class Correspondence(Task):
    """PCK."""

    name, title, options = "correspondence", "correspondence in pairs with true disparity", CorrespondenceOptions

    def check(self, data: Path, options: CorrespondenceOptions) -> Check:
        """Reads every pair's header and disparity."""
        try:
            pairs = correspondence.find_pairs(data)
            sizes = [correspondence.read_pair(pair)[0].shape[1:] for pair in pairs]
        except UserError as error:
            return Check((str(error),))
        files = [file for pair in pairs for file in (pair.left, pair.right)]
        found = manifest(data, files, [pair.disparity for pair in pairs])
        largest = max(sizes, key=lambda size: size[0] * size[1])
        return Check((), len(pairs), found, 2 * len(pairs), (largest[0], largest[1]))

    def measure(self, encoder: Encoder, data: Path, options: CorrespondenceOptions, work: Path) -> Measured:
        """Matches grid points of the left view in the right one. Items are blocks of the image."""
        pairs = correspondence.find_pairs(data)
        scores: dict[str, dict[str, tuple[int, int]]] = {}
        for pair in own_share(pairs):
            left, right, disparity = correspondence.read_pair(pair)
            points, truth = correspondence.true_points(disparity, options.spacing)
            maps = [
                encoder.dense(encoder.normalize(view[None]), options.stride, options.stage)[0].cpu()
                for view in (left, right)
            ]
            found = correspondence.match(maps[0], maps[1], points, (left.shape[1], left.shape[2]))
            hits = ((found - truth).norm(dim=1) <= options.threshold).numpy()
            blocks = (points.numpy() // options.block).astype(int)
            scores[pair.name] = {
                f"{pair.name}, block {y} {x}": (int(hits[own].sum()), int(own.sum()))
                for y, x in np.unique(blocks, axis=0)
                for own in [(blocks == (y, x)).all(1)]
            }
        everyone = gathered(scores, (pair.name for pair in pairs))
        counts = {name: count for blocks in everyone.values() for name, count in blocks.items()}
        # Every point weighs alike: a block's item is its share of hits, scaled by its share of points.
        typical = float(np.mean([n for _, n in counts.values()]))
        items: dict[str, dict[str, float | None]] = {
            name: {"pck": hits / typical} for name, (hits, _) in counts.items()
        }
        groups: dict[str, dict[str, float | None]] = {
            name: {"pck": sum(h for h, _ in blocks.values()) / sum(n for _, n in blocks.values())}
            for name, blocks in everyone.items()
        }
        return Measured({"pck": mean_metric((item["pck"] for item in items.values()), "share")}, items, groups)
