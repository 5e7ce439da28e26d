"""Files of weights under other projects' names, brought to torchvision's or timm's."""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vito_fast.errors import UserError

NESTED = ("state_dict", "model", "model_state", "teacher", "network", "online", "encoder")
"""Names under which training scripts keep the weights in a file, in the order in which they are looked for."""

PREFIXES = (
    "module.", "model.", "backbone.", "encoder_q.", "base_encoder.", "encoder.", "online.", "online_encoder.",
    "momentum_encoder.", "student.", "teacher.", "net.", "body.", "resnet.", "trunk.", "_feature_blocks.", "q.",
)  # fmt: skip
"""Prefixes that wrappers and self-supervised methods add; any number of them in a row is stripped."""

HEADS = ("fc.", "head.", "classifier.", "projector.", "predictor.", "projection", "prediction", "queue", "prototypes")
"""Tensors that belong to no backbone; left out without a word."""

BLOCKS = {
    "resnet18": (False, (2, 2, 2, 2)),
    "resnet34": (False, (3, 4, 6, 3)),
    "resnet50": (True, (3, 4, 6, 3)),
}
"""Networks that a file's tensors tell: whether of bottlenecks, and blocks in each stage."""


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by name, and a safetensors file's header. A ``.pth`` file is read without running anything in it.

    Raises:
        UserError: for a missing file, one that holds more than tensors, or one without any.
    """
    if not path.is_file():
        raise UserError(f"no encoder {path}: give a run, a checkpoint, a .safetensors or .pth file, or timm:NAME")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is torn or no safetensors file: {error}") from None
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises by what it finds in the file
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{path} holds more than tensors, or is torn; save its state_dict alone ({first[:120]})"
        ) from None
    state = _state_in(loaded)
    if not state:
        raise UserError(f"{path} holds no tensors")
    return state, {}


def pretrained(network: str) -> dict[str, Tensor]:
    """A library's pretrained weights of ``timm:NAME`` or ``torchvision:NAME``. UserError if they are not to be had."""
    library, _, name = network.partition(":")
    try:
        if library == "timm":
            import timm

            logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries are not the user's mistakes
            return dict(timm.create_model(name, pretrained=True, num_classes=0).state_dict())
        import torchvision

        return dict(torchvision.models.get_model(name, weights="DEFAULT").state_dict())
    except Exception as error:  # of the client of a hub: whatever it raises, these weights are not to be had
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"cannot get the weights of {network} ({reason}): give a file with {network}@FILE, or another source"
        ) from None


def _state_in(loaded: Any) -> dict[str, Tensor]:
    if not isinstance(loaded, Mapping):
        return {}
    for name in NESTED:
        if isinstance(loaded.get(name), Mapping):
            inner = _state_in(loaded[name])
            if inner:
                return inner
    return {str(name): value for name, value in loaded.items() if isinstance(value, Tensor)}


def architecture_of(state: Mapping[str, Tensor], about: Mapping[str, str], path: Path) -> str:
    """The network of a file: its header's, else the ResNet that its tensors are of.

    Raises:
        UserError: for any other network: its name must be given as ``timm:NAME@FILE``.
    """
    if "backbone" in about:
        return about["backbone"]
    named = about.get("architecture")  # of files before ``backbone``
    if named:
        return named if named.startswith("resnet") else f"timm:{named}"
    names = {strip(name) for name in state}
    blocks = tuple(len({n.split(".")[1] for n in names if n.startswith(f"layer{s}.")}) for s in range(1, 5))
    bottleneck = any(re.fullmatch(r"layer1\.0\.conv3\.weight", name) for name in names)
    if "layer1.0.conv1.weight" in names:
        for network, (of_bottlenecks, least) in BLOCKS.items():
            if of_bottlenecks == bottleneck and all(map(int.__le__, blocks, least)):
                return network  # the smallest that holds these blocks: ``fitted`` names those that the file lacks
    raise UserError(f"{path} is no ResNet-18, -34 or -50: name its network with timm:NAME@{path}")


def strip(name: str) -> str:
    """A tensor's name without wrappers' prefixes."""
    changed = True
    while changed:
        changed = False
        for prefix in PREFIXES:
            if name.startswith(prefix):
                name, changed = name.removeprefix(prefix), True
    return name


def fitted(state: Mapping[str, Tensor], body: nn.Module, path: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors of ``state`` under the names of ``body``, and notes on how they were found.

    A file under unknown names fits too if its tensors are the network's in number, order and shape.

    Raises:
        UserError: naming keys that are missing or have another shape.
    """
    wanted = body.state_dict()
    stripped = _stripped(state, wanted)
    missing = [name for name in wanted if name not in stripped and not name.endswith("num_batches_tracked")]
    if not any(name in stripped for name in wanted):
        in_order = _in_order(state, wanted)
        if in_order:
            return in_order, ("weights matched by order and shape: the file has other names",)
    if missing:
        raise UserError(f"{path} lacks {_some(missing)}, of {len(wanted)} tensors of {type(body).__name__}")
    other = [n for n in wanted if n in stripped and stripped[n].shape != wanted[n].shape]
    if other:
        shapes = f"{tuple(stripped[other[0]].shape)}, not {tuple(wanted[other[0]].shape)}"
        raise UserError(f"{path} is of another network: {other[0]} is {shapes}")
    left = [n for n in stripped if n not in wanted and not n.startswith(HEADS)]
    notes = (f"left out of the file: {_some(left)}",) if left else ()
    return {name: stripped.get(name, wanted[name]) for name in wanted}, notes


def _stripped(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By stripped name. Where two networks of one file meet (MoCo's queries and keys), the learning one stays."""
    found: dict[str, Tensor] = {}
    for name in sorted(state, key=lambda n: any(word in n for word in ("encoder_k", "momentum", "target", "ema"))):
        short = name if name in wanted else strip(name)
        found.setdefault(short, state[name])
    return found


def _in_order(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    values = list(state.values())[: len(wanted)]
    if [v.shape for v in values] != [w.shape for w in wanted.values()]:
        return {}
    return dict(zip(wanted, values, strict=True))


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
