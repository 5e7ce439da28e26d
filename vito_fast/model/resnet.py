"""ResNet-18, -34 and -50 that expose their stages, with torchvision's state-dict names and arithmetic.

The stride of a bottleneck sits on its 3x3 convolution and padding is symmetric, as in torchvision and timm; the
ancestors' networks pad 'SAME'. There is no classifier: ``torchvision.models.resnet50`` with ``fc = Identity()`` and
``timm.create_model("resnet50", num_classes=0)`` load this state dict strictly and give the same features bit for bit.
"""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vito_fast.model.norm import BatchNorm2d, frozen_statistics


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions round a shortcut (ResNet-18 and -34)."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = _conv(inputs, width, 3, stride)
        self.bn1 = BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = _conv(width, width, 3)
        self.bn2 = BatchNorm2d(width)
        self.downsample = downsample

    @property
    def last_norm(self) -> BatchNorm2d:
        return self.bn2

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(self.conv1(x), relu=self.relu)
        return self.bn2(self.conv2(out), x if self.downsample is None else self.downsample(x), self.relu)


class Bottleneck(nn.Module):
    """1x1, 3x3 (strided), 1x1 convolutions round a shortcut (ResNet-50)."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = _conv(inputs, width, 1)
        self.bn1 = BatchNorm2d(width)
        self.conv2 = _conv(width, width, 3, stride)
        self.bn2 = BatchNorm2d(width)
        self.conv3 = _conv(width, width * 4, 1)
        self.bn3 = BatchNorm2d(width * 4)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    @property
    def last_norm(self) -> BatchNorm2d:
        return self.bn3

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(self.conv1(x), relu=self.relu)
        out = self.bn2(self.conv2(out), relu=self.relu)
        return self.bn3(self.conv3(out), x if self.downsample is None else self.downsample(x), self.relu)


class ResNet(nn.Module):
    """``forward(x (B,3,H,W)) -> [last ``scales`` stages' features, coarsest last]``, stage s at stride ``2**(s+1)``,
    s = 1..4.

    ``channels`` and ``strides`` describe those outputs. ``checkpoint_activations`` recomputes each block in the
    backward pass. Initialisation as torchvision's: Kaiming normal by fan-out; norm scale 1, or 0 for each block's
    last norm with ``zero_init_residual``.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: tuple[int, int, int, int],
        *,
        scales: int = 2,
        zero_init_residual: bool = True,
        checkpoint_activations: bool = False,
    ) -> None:
        super().__init__()
        if not 1 <= scales <= 4:
            raise ValueError(f"scales must be 1 to 4, got {scales}")
        self.scales, self.checkpoint_activations = scales, checkpoint_activations
        self.channels = [64 * 2**s * block.expansion for s in range(4)][-scales:]
        self.strides = [4 * 2**s for s in range(4)][-scales:]
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        inputs = 64
        for s, depth in enumerate(depths):
            stage, inputs = _stage(block, inputs, 64 * 2**s, depth, stride=1 if s == 0 else 2)
            self.add_module(f"layer{s + 1}", stage)
        self._initialise(zero_init_residual)

    def _initialise(self, zero_init_residual: bool) -> None:
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
        return stages[-self.scales :]


def _recomputed(block: nn.Module, x: Tensor) -> Tensor:
    """``block(x)`` without keeping its activations; the second forward leaves the running statistics alone."""
    return checkpoint(block, x, use_reentrant=False, context_fn=lambda: (nullcontext(), frozen_statistics(block)))


def _stage(
    block: type[BasicBlock] | type[Bottleneck], inputs: int, width: int, depth: int, stride: int
) -> tuple[nn.Sequential, int]:
    outputs = width * block.expansion
    downsample = None
    if stride != 1 or inputs != outputs:
        downsample = nn.Sequential(_conv(inputs, outputs, 1, stride), BatchNorm2d(outputs))
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
