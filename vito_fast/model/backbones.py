"""Backbones that return the feature maps of their last stages: ResNets, and any timm network with feature levels.

The ResNets have torchvision's state-dict names and arithmetic. The stride of a bottleneck sits on its 3x3 convolution
and padding is symmetric, as in torchvision and timm; the ancestors' networks pad 'SAME'. There is no classifier:
``torchvision.models.resnet50`` with ``fc = Identity()`` and ``timm.create_model("resnet50", num_classes=0)`` load this
state dict strictly and give the same features bit for bit.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vito_fast.config import ModelConfig
from vito_fast.errors import UserError
from vito_fast.model.norm import BatchNorm, frozen_statistics


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut (ResNet-18 and -34)."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = _conv(inputs, width, 3, stride)
        self.bn1 = BatchNorm(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = _conv(width, width, 3)
        self.bn2 = BatchNorm(width)
        self.downsample = downsample

    @property
    def last_norm(self) -> BatchNorm:
        return self.bn2

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(self.conv1(x), relu=self.relu)
        return self.bn2(self.conv2(out), x if self.downsample is None else self.downsample(x), self.relu)


class Bottleneck(nn.Module):
    """1x1, 3x3 (strided), 1x1 convolutions around a shortcut (ResNet-50)."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = _conv(inputs, width, 1)
        self.bn1 = BatchNorm(width)
        self.conv2 = _conv(width, width, 3, stride)
        self.bn2 = BatchNorm(width)
        self.conv3 = _conv(width, width * 4, 1)
        self.bn3 = BatchNorm(width * 4)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    @property
    def last_norm(self) -> BatchNorm:
        return self.bn3

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(self.conv1(x), relu=self.relu)
        out = self.bn2(self.conv2(out), relu=self.relu)
        return self.bn3(self.conv3(out), x if self.downsample is None else self.downsample(x), self.relu)


class ResNet(nn.Module):
    """ResNet without a classifier: ``forward(x (B,3,H,W))`` returns the last stages' features, coarsest last.

    Stage s = 1..4 has stride ``2**(s+1)``. ``channels`` and ``strides`` describe the outputs. The initialization is
    torchvision's: Kaiming normal by fan-out; norm weights 1.

    Args:
        block: The kind of residual block.
        depths: Blocks of each stage.
        levels: How many last stages are returned, 1 to 4.
        zero_init_residual: Whether the weight of each block's last norm starts at 0.
        checkpoint_activations: Whether the backward pass recomputes each block.

    Raises:
        ValueError: ``levels`` out of range.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: tuple[int, int, int, int],
        *,
        levels: int = 2,
        zero_init_residual: bool = True,
        checkpoint_activations: bool = False,
    ) -> None:
        super().__init__()
        if not 1 <= levels <= 4:
            raise ValueError(f"levels must be 1 to 4, got {levels}")
        self.levels, self.checkpoint_activations = levels, checkpoint_activations
        self.channels = [64 * 2**s * block.expansion for s in range(4)][-levels:]
        self.strides = [4 * 2**s for s in range(4)][-levels:]
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = BatchNorm(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        inputs = 64
        for s, depth in enumerate(depths):
            stage, inputs = _stage(block, inputs, 64 * 2**s, depth, stride=1 if s == 0 else 2)
            self.add_module(f"layer{s + 1}", stage)
        self._initialize(zero_init_residual)

    def _initialize(self, zero_init_residual: bool) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if zero_init_residual:
            for module in self.modules():
                if isinstance(module, BasicBlock | Bottleneck):
                    nn.init.zeros_(module.last_norm.weight)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.maxpool(self.bn1(self.conv1(x), relu=self.relu))
        stages = []
        for s in range(1, 5):
            for block in self.get_submodule(f"layer{s}").children():
                x = _recomputed(block, x) if self.checkpoint_activations and torch.is_grad_enabled() else block(x)
            stages.append(x)
        return stages[-self.levels :]


def _recomputed(block: nn.Module, x: Tensor) -> Tensor:
    """Recomputes ``block(x)`` in the backward pass; the second forward does not move the running statistics."""
    return checkpoint(block, x, use_reentrant=False, context_fn=lambda: (nullcontext(), frozen_statistics(block)))


def _stage(
    block: type[BasicBlock] | type[Bottleneck], inputs: int, width: int, depth: int, stride: int
) -> tuple[nn.Sequential, int]:
    outputs = width * block.expansion
    downsample = None
    if stride != 1 or inputs != outputs:
        downsample = nn.Sequential(_conv(inputs, outputs, 1, stride), BatchNorm(outputs))
    blocks = [block(inputs, width, stride, downsample)]
    blocks += [block(outputs, width, 1, None) for _ in range(depth - 1)]
    return nn.Sequential(*blocks), outputs


def resnet18(**options: int | bool) -> ResNet:
    return ResNet(BasicBlock, (2, 2, 2, 2), **options)  # type: ignore[arg-type]


def resnet34(**options: int | bool) -> ResNet:
    return ResNet(BasicBlock, (3, 4, 6, 3), **options)  # type: ignore[arg-type]


def resnet50(**options: int | bool) -> ResNet:
    return ResNet(Bottleneck, (3, 4, 6, 3), **options)  # type: ignore[arg-type]


RESNETS: dict[str, Callable[..., ResNet]] = {"resnet18": resnet18, "resnet34": resnet34, "resnet50": resnet50}
"""Constructors by name; options as ResNet's."""


class TimmBackbone(nn.Module):
    """A timm network: ``forward(x (B,3,H,W))`` returns its last feature maps (B,C,H',W'), coarsest last.

    ``body`` is the plain timm model without its classifier, so its state dict has timm's own names.

    Args:
        name: As in ``timm.create_model(name)``.
        levels: How many last feature levels are returned.

    Raises:
        UserError: timm is missing, or has no such network with so many feature levels.
    """

    def __init__(self, name: str, levels: int) -> None:
        super().__init__()
        try:
            import timm
        except ImportError:
            raise UserError(f"backbone 'timm:{name}' needs timm: pip install timm") from None
        try:
            self.body: Any = timm.create_model(name, pretrained=False, num_classes=0)
        except RuntimeError as error:
            raise UserError(f"backbone 'timm:{name}': {error}") from None
        info = getattr(self.body, "feature_info", None)
        if info is None or not hasattr(self.body, "forward_intermediates"):
            raise UserError(f"backbone 'timm:{name}' cannot return intermediate features; choose another network")
        if levels > len(info):
            raise UserError(f"backbone 'timm:{name}' has {len(info)} feature levels, model.levels asks for {levels}")
        self.name, self.levels = f"timm:{name}", levels
        described = [info[i] for i in range(len(info))][-levels:]
        self.channels = [level["num_chs"] for level in described]
        self.strides = [level["reduction"] for level in described]
        self._freeze_unused()

    def _freeze_unused(self) -> None:
        """Freezes parameters that no feature depends on, as those of a layer before the classifier.

        LARS would only shrink them, and DDP would wait for their gradients. A trace on ``meta`` finds them without
        computing anything.
        """
        tensors = [*self.named_parameters(), *self.named_buffers()]
        learned = {name: t for name, t in tensors if t.requires_grad}
        meta = {name: torch.empty_like(t, device="meta", requires_grad=t.requires_grad) for name, t in tensors}
        images = torch.empty(1, *self.body.default_cfg["input_size"], device="meta")
        try:
            with torch.enable_grad():
                features = torch.func.functional_call(self.eval(), meta, (images,))
                total = torch.stack([f.float().sum() for f in features]).sum()
        except RuntimeError:  # of a network that reads values
            return
        finally:
            self.train()
        gradients = torch.autograd.grad(total, [meta[name] for name in learned], allow_unused=True)
        for parameter, gradient in zip(learned.values(), gradients, strict=True):
            parameter.requires_grad_(gradient is not None)

    def forward(self, x: Tensor) -> list[Tensor]:
        try:
            features: list[Tensor] = self.body.forward_intermediates(x, indices=self.levels, intermediates_only=True)
        except AssertionError as error:  # of networks made for one size
            wanted = " x ".join(map(str, self.body.default_cfg["input_size"][1:]))
            raise UserError(
                f"model.backbone {self.name!r} takes no images of {x.shape[2]} x {x.shape[3]} ({error}): set "
                f"sampler.size as it was made for, {wanted}, or choose another network"
            ) from None
        return features


def build_backbone(config: ModelConfig) -> nn.Module:
    """Builds the configuration's backbone. UserError for an unknown name or an unusable timm network."""
    if config.backbone.startswith("timm:"):
        return TimmBackbone(config.backbone.removeprefix("timm:"), config.levels)
    if config.backbone not in RESNETS:
        raise UserError(f"model.backbone must be {', '.join(RESNETS)} or timm:NAME, got {config.backbone!r}")
    return RESNETS[config.backbone](
        levels=config.levels,
        zero_init_residual=config.zero_init_residual,
        checkpoint_activations=config.checkpoint_activations,
    )
