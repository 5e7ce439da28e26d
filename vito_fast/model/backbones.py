"""Backbones that return the feature maps of their last stages: ResNets, and networks of timm and torchvision.

The ResNets have torchvision's state-dict names and arithmetic. The stride of a bottleneck sits on its 3x3 convolution
and padding is symmetric, as in torchvision and timm; the ancestors' networks pad 'SAME'. There is no classifier:
``torchvision.models.resnet50`` with ``fc = Identity()`` and ``timm.create_model("resnet50", num_classes=0)`` load this
state dict strictly and give the same features bit for bit.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
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

    ``body`` is the plain timm model without its classifier, so its state dict has timm's own names. A transformer takes
    images of any size that its patches divide, by interpolated positions, where timm can do so.

    Args:
        name: As in ``timm.create_model(name)``.
        levels: How many last feature levels are returned.
        drop_path: Rate of stochastic depth in the last block; it grows linearly from 0 in the first.

    Raises:
        UserError: timm is missing, or has no such network with so many feature levels or with stochastic depth.
    """

    def __init__(self, name: str, levels: int, drop_path: float = 0.0) -> None:
        super().__init__()
        try:
            import timm
        except ImportError:
            raise UserError(f"backbone 'timm:{name}' needs timm: pip install timm") from None
        self.options: dict[str, Any] = {"dynamic_img_size": True}
        """Options of ``timm.create_model`` beside the name, for whoever builds the network again."""
        given: dict[str, Any] = {"drop_path_rate": drop_path} if drop_path else {}
        try:
            try:
                self.body: Any = timm.create_model(name, num_classes=0, **self.options, **given)
            except TypeError:  # most convolutional networks: they take any size anyway
                self.options = {}
                self.body = timm.create_model(name, num_classes=0, **given)
        except TypeError as error:
            raise UserError(f"backbone 'timm:{name}' has no stochastic depth, model.drop_path: {error}") from None
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
        _freeze_unused(self, self.body.default_cfg["input_size"])

    def forward(self, x: Tensor) -> list[Tensor]:
        try:
            features: list[Tensor] = self.body.forward_intermediates(x, indices=self.levels, intermediates_only=True)
        except AssertionError as error:  # of a size that patches or windows do not divide
            wanted = " x ".join(map(str, self.body.default_cfg["input_size"][1:]))
            raise UserError(
                f"model.backbone {self.name!r} takes no images of {x.shape[2]} x {x.shape[3]} ({error}): set "
                f"sampler.size as it was made for, {wanted}, without sampler.small_crops, or choose another network"
            ) from None
        return features


class TorchvisionBackbone(nn.Module):
    """A torchvision network: ``forward(x (B,3,H,W))`` returns its last feature maps (B,C,H',W'), coarsest last.

    ``body`` is the plain torchvision model, its classifier an identity. A level is the last output at its stride.

    Args:
        name: As in ``torchvision.models.get_model(name)``.
        levels: How many last feature levels are returned.
        drop_path: Rate of stochastic depth in the last block; it grows linearly from 0 in the first.

    Raises:
        UserError: torchvision is missing, or has no such network with so many feature levels or with stochastic depth.
    """

    def __init__(self, name: str, levels: int, drop_path: float = 0.0) -> None:
        super().__init__()
        try:
            import torchvision
        except ImportError:
            raise UserError(f"backbone 'torchvision:{name}' needs torchvision: pip install torchvision") from None
        try:
            self.body: Any = torchvision.models.get_model(name, weights=None)
        except ValueError as error:
            raise UserError(f"backbone 'torchvision:{name}': {error}; see torchvision.models.list_models()") from None
        self.head = next((n for n in ("classifier", "fc", "head") if hasattr(self.body, n)), "")
        """The classifier's name."""
        parts = (
            "stem",
            "trunk_output",
            "features",
            "conv1",
            "bn1",
            "relu",
            "maxpool",
            *(f"layer{i}" for i in range(1, 5)),
        )
        self.parts = [part for part in parts if hasattr(self.body, part)]
        if not self.head or not {"features", "trunk_output", "layer4"} & set(self.parts):
            raise UserError(
                f"backbone 'torchvision:{name}' has no feature maps to take: choose it from timm, timm:NAME"
            )
        setattr(self.body, self.head, nn.Identity())
        self.name, self.levels = f"torchvision:{name}", levels
        self.channels_last = isinstance(self.body, torchvision.models.SwinTransformer)
        depths = [m for m in self.body.modules() if isinstance(m, torchvision.ops.StochasticDepth)]
        if drop_path and not depths:
            raise UserError(f"backbone 'torchvision:{name}' has no stochastic depth, model.drop_path")
        most = max([m.p for m in depths], default=0.0) or 1.0
        for module in depths:
            module.p *= drop_path / most
        with torch.no_grad():
            side, body = 224, copy.deepcopy(self).to("meta").eval()
            maps = list(body.outputs(torch.empty(1, 3, side, side, device="meta")))
        strides = [round(side / x.shape[2]) for x in maps]
        last = [i for i, s in enumerate(strides) if i + 1 == len(strides) or strides[i + 1] != s]
        if levels > len(last):
            raise UserError(f"backbone {self.name!r} has {len(last)} feature levels, model.levels asks for {levels}")
        self.taken = last[-levels:]
        self.channels = [maps[i].shape[1] for i in self.taken]
        self.strides = [strides[i] for i in self.taken]
        _freeze_unused(self, (3, side, side))

    def outputs(self, x: Tensor) -> Iterator[Tensor]:
        """The output (B,C,H',W') of each layer."""
        for part in self.parts:
            module = self.body.get_submodule(part)
            for layer in module.children() if part in ("features", "trunk_output") else [module]:
                x = layer(x)
                yield x.permute(0, 3, 1, 2) if self.channels_last else x

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = list(self.outputs(x))
        return [maps[i] for i in self.taken]


def _freeze_unused(backbone: nn.Module, input_size: Sequence[int]) -> None:
    """Freezes parameters that no feature depends on, as those of a layer before the classifier.

    An optimizer would only shrink them, and DDP would wait for their gradients. A trace on ``meta`` finds them without
    computing anything.
    """
    tensors = [*backbone.named_parameters(), *backbone.named_buffers()]
    learned = {name: t for name, t in tensors if t.requires_grad}
    meta = {name: torch.empty_like(t, device="meta", requires_grad=t.requires_grad) for name, t in tensors}
    images = torch.empty(1, *input_size, device="meta")
    try:
        with torch.enable_grad():
            features = torch.func.functional_call(backbone.eval(), meta, (images,))
            total = torch.stack([f.float().sum() for f in features]).sum()
    except RuntimeError:  # of a network that reads values
        return
    finally:
        backbone.train()
    gradients = torch.autograd.grad(total, [meta[name] for name in learned], allow_unused=True)
    for parameter, gradient in zip(learned.values(), gradients, strict=True):
        parameter.requires_grad_(gradient is not None)


def build_backbone(config: ModelConfig) -> nn.Module:
    """Builds the configuration's backbone. UserError for an unknown name or an unusable network."""
    library, _, name = config.backbone.partition(":")
    if name and library in ("timm", "torchvision"):
        kind = TimmBackbone if library == "timm" else TorchvisionBackbone
        return kind(name, config.levels, config.drop_path)
    if config.backbone not in RESNETS:
        raise UserError(
            f"model.backbone must be {', '.join(RESNETS)}, timm:NAME or torchvision:NAME, got {config.backbone!r}"
        )
    if config.drop_path:
        raise UserError(f"model.drop_path {config.drop_path}: {config.backbone} has none, take timm:{config.backbone}")
    return RESNETS[config.backbone](
        levels=config.levels,
        zero_init_residual=config.zero_init_residual,
        checkpoint_activations=config.checkpoint_activations,
    )
