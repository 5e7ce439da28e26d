"""torchvision's FCOS and Mask R-CNN on any encoder, with losses as sums and counts.

The counts make two ranks give what one process gives; torchvision's own losses divide by each process's.
"""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.fcos import FCOSHead
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool, LastLevelP6P7

from vito_fast.evaluate.encoders import Encoder
from vito_fast.evaluate.finetune import Recipe, generator

Losses = dict[str, tuple[Tensor, Tensor]]
WIDTH = 256
"""Channels of the pyramid and of the heads on it."""


@dataclass(frozen=True)
class DetectionOptions(Recipe):
    """The recipe, the detector and its canvas."""

    detector: Literal["fcos", "maskrcnn"] = "fcos"
    height: int = 800
    """Of the canvas in pixels: images are resized to fit, cropped where jitter makes them larger, and padded."""
    width: int = 1024
    jitter: tuple[float, float] = (0.8, 1.25)
    """Range of the factor by which a training image is larger than one that fits, uniform."""
    limit: int = 100
    """Detections of an image that are kept."""
    threshold: float = 0.05
    """Least score of a detection."""
    rois: int = 512
    """Regions of an image that Mask R-CNN's head learns from."""
    seed: int = 0
    subset: bool = False
    """Whether a copy with another number of images than the benchmark's is scored; the result says so."""


class StagesWithFPN(BackboneWithFPN):
    """torchvision's ``BackboneWithFPN`` over an encoder's stages, whatever the names of its layers."""

    def __init__(self, encoder: Encoder, first: int, extra: nn.Module) -> None:
        nn.Module.__init__(self)
        self.body = _Named(encoder.trainable(), first)
        self.fpn = FeaturePyramidNetwork(encoder.channels[first:], WIDTH, extra_blocks=extra)
        self.out_channels = WIDTH


class _Named(nn.Module):
    def __init__(self, backbone: nn.Module, first: int) -> None:
        super().__init__()
        self.backbone, self.first = backbone, first

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        return OrderedDict((str(i), stage) for i, stage in enumerate(self.backbone(images)[self.first :]))


class DetectionModel(nn.Module):
    """A detector of ``classes`` classes, numbered from 1."""

    def __init__(self, encoder: Encoder, options: DetectionOptions, classes: int) -> None:
        super().__init__()
        kind, limit, threshold = options.detector, options.limit, options.threshold
        # torchvision resizes in eval mode whatever it is told; a canvas of exactly these sides keeps its size.
        sides = {"min_size": min(options.height, options.width), "max_size": max(options.height, options.width)}
        shared: dict[str, Any] = {"image_mean": encoder.mean, "image_std": encoder.std, "_skip_resize": True, **sides}
        self.kind = kind
        if kind == "fcos":
            backbone = StagesWithFPN(encoder, 1, LastLevelP6P7(WIDTH, WIDTH))
            anchors = AnchorGenerator(((8,), (16,), (32,), (64,), (128,)), ((1.0,),) * 5)
            head = _CountingHead(WIDTH, anchors.num_anchors_per_location()[0], classes + 1)
            self.network: Any = FCOS(
                backbone, classes + 1, anchor_generator=anchors, head=head, score_thresh=threshold,
                detections_per_img=limit, **shared,
            )  # fmt: skip
        else:
            backbone = StagesWithFPN(encoder, 0, LastLevelMaxPool())
            self.network = MaskRCNN(
                backbone, classes + 1, box_score_thresh=threshold, box_detections_per_img=limit, **shared
            )
            self.network.rpn.fg_bg_sampler = KeyedSampler(256, 0.5, stream=4)
            self.network.roi_heads.fg_bg_sampler = KeyedSampler(options.rois, 0.25, stream=5)

    def loss(self, batch: dict[str, Any]) -> Losses:
        """Terms of a batch of ``images`` (3,H,W) of one size, ``targets`` and ``keys``, each as (sum, count)."""
        if self.kind == "maskrcnn":
            self.network.rpn.fg_bg_sampler.keys = batch["keys"]
            self.network.roi_heads.fg_bg_sampler.keys = batch["keys"]
        means: dict[str, Tensor] = self.network(batch["images"], batch["targets"])
        device = batch["images"][0].device
        if self.kind == "fcos":
            found = self.network.head.foreground
            counts = dict.fromkeys(means, found)
        else:
            rpn, roi = self.network.rpn.fg_bg_sampler, self.network.roi_heads.fg_bg_sampler
            counts = {"loss_objectness": rpn.drawn, "loss_rpn_box_reg": rpn.drawn, "loss_mask": roi.positives}
            counts |= {"loss_classifier": roi.drawn, "loss_box_reg": roi.drawn}
        return {
            name: (mean * max(1, counts[name]), torch.tensor(float(counts[name]), device=device))
            for name, mean in means.items()
        }

    @torch.no_grad()
    def predict(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        """``boxes`` (N,4) as x0, y0, x1, y1, ``labels`` and ``scores`` of each image, in its own pixels."""
        heads: Any = getattr(self.network, "roi_heads", None)
        pool = getattr(heads, "mask_roi_pool", None)
        if pool is not None:
            heads.mask_roi_pool = None  # no masks, which cost most of Mask R-CNN's time and no metric reads
        try:
            found: list[dict[str, Tensor]] = self.network(images)
        finally:
            if pool is not None:
                heads.mask_roi_pool = pool
        return found


class _CountingHead(FCOSHead):
    """FCOS's head, which remembers the count that its losses were divided by."""

    foreground = 0

    def compute_loss(self, targets: Any, head_outputs: Any, anchors: Any, matched_idxs: list[Tensor]) -> Any:
        self.foreground = sum(int((matched >= 0).sum()) for matched in matched_idxs)
        return super().compute_loss(targets, head_outputs, anchors, matched_idxs)


class KeyedSampler:
    """torchvision's balanced sampler of positives and negatives, drawn by each image's key and by no global state."""

    def __init__(self, count: int, positive_share: float, stream: int) -> None:
        self.count, self.most, self.stream = count, int(count * positive_share), stream
        self.keys: list[int] = []
        self.drawn = self.positives = 0

    def __call__(self, matched: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        self.drawn = self.positives = 0
        chosen: tuple[list[Tensor], list[Tensor]] = ([], [])
        for labels, key in zip(matched, self.keys, strict=True):
            rng = generator(0, int(key), self.stream)
            positive, negative = torch.where(labels >= 1)[0], torch.where(labels == 0)[0]
            few = min(len(positive), self.most)
            for at, places, number in ((0, positive, few), (1, negative, min(len(negative), self.count - few))):
                order = torch.from_numpy(rng.permutation(len(places))[:number]).to(labels.device)
                mask = torch.zeros_like(labels, dtype=torch.uint8)
                mask[places[order]] = 1
                chosen[at].append(mask)
                self.drawn += number
            self.positives += few
        return chosen
