"""The trained encoder as a file with torchvision's or timm's names, which coincide for ResNets."""

import io
import json
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from vito_fast.errors import UserError
from vito_fast.files import atomic_write, check_outside_stores
from vito_fast.model.backbones import RESNETS, build_backbone
from vito_fast.train.checkpoint import Checkpoint, config_of, find, named_as_one
from vito_kernels.photometric.op import IMAGENET_MEAN, IMAGENET_STD

Extension = Literal["safetensors", "pth"]


def encoder_state(checkpoint: Checkpoint, network: Literal["online", "target"] = "online") -> dict[str, Tensor]:
    """The backbone's state dict in a checkpoint: torchvision's names for ResNets, timm's for timm networks."""
    return {name.removeprefix("body."): t for name, t in checkpoint.part(f"model.{network}.backbone.").items()}


def load_encoder(checkpoint: Checkpoint, network: Literal["online", "target"] = "online") -> nn.Module:
    """The backbone of a checkpoint, on the CPU, in evaluation mode: (B,3,H,W) -> its last stages' features."""
    backbone = build_backbone(config_of(checkpoint).model)
    backbone.load_state_dict(checkpoint.part(f"model.{network}.backbone."))
    return backbone.eval()


class Exported(NamedTuple):
    """An exported file and Python that uses it."""

    path: Path
    load: str
    """Makes the network ``m``."""
    images: str
    """Makes ``x`` (B,3,S,S) from uint8 images (B,3,H,W), as ``vito-fast features`` does."""
    features: str
    """Makes the features (B,C) of ``x`` that were trained: the spatial mean of the last level."""
    untrained: list[str]
    """Tensors of the file that these features do not depend on, and that no training has touched."""


def export(
    run: Path,
    out: Path,
    format: Literal["torchvision", "timm"] | None = None,
    ext: Extension | None = None,
    network: Literal["online", "target"] = "online",
) -> Exported:
    """Writes the encoder of a run or checkpoint, without a classifier; the file appears whole or not at all.

    Args:
        run: A run's folder, or one checkpoint file.
        out: The file; without .safetensors or .pth at its end, ``ext`` is added.
        format: The library whose names the file follows; by default the network's own, torchvision's for ResNets.
        ext: safetensors (the default) or pth.
        network: The online network, or its moving average.

    Raises:
        UserError: an unusable run, an extension that contradicts ``ext``, or a network of the other library. Also a
            path that cannot be written, or belongs to a checkpoint or a store.
    """
    path = _with_extension(out, ext)
    check_outside_stores(path)
    checkpoint = find(run)
    if named_as_one(path) or (path.exists() and path.samefile(checkpoint.path)):
        raise UserError(f"{path} is a checkpoint or has a checkpoint's name: export to another file")
    config = config_of(checkpoint)
    own, _, name = config.model.backbone.rpartition(":")
    library = format or own or "torchvision"
    if own and own != library:
        raise UserError(f"{config.model.backbone} is no {library} network: use --format {own}")
    encoder = load_encoder(checkpoint, network)
    untrained = [n.removeprefix("body.") for n, p in encoder.named_parameters() if not p.requires_grad]
    about = {
        "architecture": name,
        "backbone": config.model.backbone,
        "format": library,
        "network": network,
        "step": str(checkpoint.value("step")),
        "mean": json.dumps(IMAGENET_MEAN),
        "std": json.dumps(IMAGENET_STD),
        "size": str(config.sampler.size),
        "interpolation": "bilinear",
        "level": f"last, stride {encoder.strides[-1]}",  # type: ignore[index]
        "pooling": "mean",
        "untrained": json.dumps(untrained),
    }
    _write(path, {k: t.clone().contiguous() for k, t in encoder_state(checkpoint, network).items()}, about)
    load, features = _calls(encoder, name, library, path)
    size = config.sampler.size
    images = (
        "from torchvision.transforms import v2 as T; "
        f"x = T.CenterCrop({size})(T.Resize({round(size * 8 / 7)})(images)).float() / 255; "
        f"x = T.Normalize({list(IMAGENET_MEAN)}, {list(IMAGENET_STD)})(x)"
    )
    return Exported(path, load, images, features, untrained)


def push_to_hub(made: Exported, repository: str) -> str:
    """Uploads an exported file and a card with its lines of Python to the Hugging Face Hub.

    Args:
        made: The export.
        repository: USER/NAME; it is made, private, if it is absent.

    Returns:
        The repository's address.

    Raises:
        UserError: huggingface_hub is missing, or the upload fails, for want of a token for example.
    """
    try:
        import huggingface_hub
    except ImportError:
        raise UserError("--push-to-hub needs huggingface_hub: pip install huggingface_hub") from None
    load = made.load.replace(str(made.path), made.path.name)
    untrained = f"Untrained, and not in these features: {', '.join(made.untrained)}.\n" if made.untrained else ""
    card = (
        "---\ntags: [vito-fast, image-feature-extraction]\n---\nAn image encoder pretrained on video by vito-fast.\n\n"
        f"```python\n{load}\n{made.images}\nfeatures = {made.features}\n```\n{untrained}"
    )
    try:
        api = huggingface_hub.HfApi()
        url = str(api.create_repo(repository, exist_ok=True, private=True))
        for content, name in ((str(made.path), made.path.name), (card.encode(), "README.md")):
            api.upload_file(path_or_fileobj=content, path_in_repo=name, repo_id=repository)
    except Exception as error:  # of the hub's client: whatever it raises, the local file is whole
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{made.path} is exported, and not uploaded to {repository}: {reason}") from None
    return url


def _calls(encoder: nn.Module, name: str, format: str, path: Path) -> tuple[str, str]:
    """Lines of Python that load a file into ``m``, and that take its features."""
    if format == "timm":
        options = "".join(f", {key}={value!r}" for key, value in getattr(encoder, "options", {}).items())
        load = f"m = timm.create_model('{name}', num_classes=0{options}, checkpoint_path='{path}').eval()"
        if name in RESNETS:
            return load, "m(x)"
        return load, "m.forward_intermediates(x, indices=1, intermediates_only=True)[0].mean((2, 3))"
    loaded = f"safetensors.torch.load_file('{path}')" if path.suffix == ".safetensors" else f"torch.load('{path}')"
    head = getattr(encoder, "head", "fc")
    load = f"m = torchvision.models.{name}(); m.{head} = torch.nn.Identity(); m.load_state_dict({loaded}); m.eval()"
    parts: list[str] = getattr(encoder, "parts", ["layer4"])
    if "features" in parts:
        order = ".permute(0, 3, 1, 2)" if encoder.channels_last else ""
        return load, f"m.features(x){order}.mean((2, 3))"
    return load, "m.trunk_output(m.stem(x)).mean((2, 3))" if "trunk_output" in parts else "m(x)"


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
    except OSError as error:
        raise UserError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from None
