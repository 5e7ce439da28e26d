"""The trained encoder as a state dict with torchvision's and timm's names, which coincide for ResNets."""

import io
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from vito_fast.errors import UserError
from vito_fast.files import atomic_write, check_outside_stores
from vito_fast.model.backbones import RESNETS, build_backbone
from vito_fast.train.checkpoint import Checkpoint, config_of, find, named_as_one

Extension = Literal["safetensors", "pth"]


def encoder_state(checkpoint: Checkpoint, network: Literal["online", "target"] = "online") -> dict[str, Tensor]:
    """The backbone's state dict in a checkpoint: torchvision's names for ResNets, timm's for timm networks."""
    return {name.removeprefix("body."): t for name, t in checkpoint.part(f"model.{network}.backbone.").items()}


def load_encoder(checkpoint: Checkpoint, network: Literal["online", "target"] = "online") -> nn.Module:
    """The backbone of a checkpoint, on the CPU, in evaluation mode: (B,3,H,W) -> its last stages' features."""
    backbone = build_backbone(config_of(checkpoint).model)
    backbone.load_state_dict(checkpoint.part(f"model.{network}.backbone."))
    return backbone.eval()


def export(
    run: Path,
    out: Path,
    format: Literal["torchvision", "timm"] = "torchvision",
    ext: Extension | None = None,
    network: Literal["online", "target"] = "online",
) -> tuple[Path, str]:
    """Writes the encoder of a run or checkpoint, without a classifier; the file appears whole or not at all.

    Args:
        run: A run's folder, or one checkpoint file.
        out: The file; without .safetensors or .pth at its end, ``ext`` is added.
        format: The library whose names the file follows.
        ext: safetensors (the default) or pth.
        network: The online network, or its moving average.

    Returns:
        The file's path, and a line of Python that loads it.

    Raises:
        UserError: an unusable run, an extension that contradicts ``ext``, or a timm backbone in torchvision's format.
            Also a path that cannot be written, or belongs to a checkpoint or a store.
    """
    path = _with_extension(out, ext)
    check_outside_stores(path)
    checkpoint = find(run)
    if named_as_one(path) or (path.exists() and path.samefile(checkpoint.path)):
        raise UserError(f"{path} is a checkpoint or has a checkpoint's name: export to another file")
    backbone = config_of(checkpoint).model.backbone
    name = backbone.removeprefix("timm:")
    if format == "torchvision" and backbone not in RESNETS:
        raise UserError(f"{backbone} is no torchvision network: use --format timm")
    state = {k: t.clone().contiguous() for k, t in encoder_state(checkpoint, network).items()}
    _write(path, state, {"architecture": name, "format": format, "step": str(checkpoint.value("step"))})
    loaded = f"safetensors.torch.load_file('{path}')" if path.suffix == ".safetensors" else f"torch.load('{path}')"
    if format == "timm":
        return path, f"timm.create_model('{name}', num_classes=0, checkpoint_path='{path}')"
    return path, f"m = torchvision.models.{name}(); m.fc = torch.nn.Identity(); m.load_state_dict({loaded})"


def _with_extension(out: Path, ext: Extension | None) -> Path:
    given = out.suffix.removeprefix(".")
    if given in ("safetensors", "pth"):
        if ext not in (None, given):
            raise UserError(f"{out} ends in .{given}, and --ext says {ext}: give one of them")
        return out
    if out.is_dir():
        raise UserError(f"{out} is a folder: give the name of a file in it")
    return out.with_name(f"{out.name}.{ext or 'safetensors'}")


def _write(path: Path, state: dict[str, Tensor], about: dict[str, str]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as partial:
            if path.suffix == ".safetensors":
                save_file(state, partial, metadata=about)
            else:
                buffer = io.BytesIO()  # torch reports a full disk as a failed check of its own
                torch.save(state, buffer)
                partial.write_bytes(buffer.getbuffer())
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from None
