"""The plan's constants, each with its source: the one table behind ``--assumptions``.

A source is one of five kinds. A *datasheet* is the vendor's, by name. *published* is a named measurement of others, and
*measured* one of this project on a named machine. *recalled* is a vendor's figure from memory. *assumption* is a guess.
Units are SI: bytes, bytes/s, flop/s, seconds, watts. ``--calibrate FILE`` replaces any of them by name with
a measured one.
"""

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from vito_fast.errors import UserError


class Constant(NamedTuple):
    """One number and where it comes from."""

    value: float
    unit: str
    source: str


_H100 = "datasheet: NVIDIA H100 Tensor Core GPU (SXM, dense)"
_A100 = "datasheet: NVIDIA A100 Tensor Core GPU (SXM 80 GB, dense)"
_H200 = "datasheet: NVIDIA H200 Tensor Core GPU (SXM, dense)"
_B200 = "datasheet: NVIDIA DGX B200 (an eighth, dense)"
_JPEG_A100 = (
    "published: about 5000 ImageNet images/s by the five-core JPEG engine of an A100 (NVIDIA blog 'Loading Data Fast "
    "with DALI and the New Hardware JPEG Decoder in NVIDIA A100 GPUs'), at 500x375 pixels an image"
)
_JPEG_OTHER = "assumption: an engine as fast as one core of the A100's; number of engines from the datasheet"
_CPU = "no default: measure it and give --calibrate FILE"

_GPU_UNITS = {
    "bf16": "flop/s",
    "tf32": "flop/s",
    "memory": "bytes",
    "bandwidth": "bytes/s",
    "link": "bytes/s",
    "nvjpeg": "pixels/s",
    "nvdec": "pixels/s",
    "host_link": "bytes/s",
    "node_gpus": "GPUs",
    "node_cores": "cores",
    "node_memory": "bytes",
    "node_power": "W",
    "node_network": "bytes/s",
    "node_storage": "bytes",
    "node_read": "bytes/s",
}
"""First one GPU: peak dense arithmetic (bf16 or fp16, tf32), memory and its bandwidth, NVLink in one direction,
decoding by the JPEG and H.264 engines, host to GPU. Then a node of eight: cores, memory, power, network in one
direction, local storage and its read rate."""

_STREAM = 1920 * 1080 * 30  # pixels a second of one 1080p30 stream
_IMAGE = 500 * 375  # pixels of a typical ImageNet image


def _gpu(datasheet: str, node: str, values: Mapping[str, float], sources: Mapping[str, str]) -> dict[str, Constant]:
    table = {}
    for name, unit in _GPU_UNITS.items():
        default = f"datasheet: {node}" if name.startswith("node_") else datasheet
        table[name] = Constant(values[name], unit, sources.get(name, default))
    return table


_SHARED_SOURCES = {
    "host_link": "assumption: three quarters or more of PCIe's nominal rate with pinned memory",
    "node_read": "assumption: eight NVMe drives at 3 GB/s each for reads of some 20 KB",
}

GPUS: dict[str, dict[str, Constant]] = {
    "h100": _gpu(
        _H100,
        "NVIDIA DGX H100",
        dict(
            bf16=989e12, tf32=494e12, memory=80e9, bandwidth=3.35e12, link=450e9, host_link=48e9,
            nvjpeg=7 * 1000 * _IMAGE, nvdec=170 * _STREAM, node_gpus=8, node_cores=112, node_memory=2e12,
            node_power=10200, node_network=400e9, node_storage=30.7e12, node_read=24e9,
        ),
        _SHARED_SOURCES | {"nvjpeg": _JPEG_OTHER, "nvdec": "recalled: H100 white paper, 170 streams of 1080p30"},
    ),
    "h200": _gpu(
        _H200,
        "NVIDIA DGX H200",
        dict(
            bf16=989e12, tf32=494e12, memory=141e9, bandwidth=4.8e12, link=450e9, host_link=48e9,
            nvjpeg=7 * 1000 * _IMAGE, nvdec=170 * _STREAM, node_gpus=8, node_cores=112, node_memory=2e12,
            node_power=10200, node_network=400e9, node_storage=30.7e12, node_read=24e9,
        ),
        _SHARED_SOURCES | {"nvjpeg": _JPEG_OTHER, "nvdec": "recalled: as the H100's"},
    ),
    "a100": _gpu(
        _A100,
        "NVIDIA DGX A100 640 GB",
        dict(
            bf16=312e12, tf32=156e12, memory=80e9, bandwidth=2.039e12, link=300e9, host_link=24e9,
            nvjpeg=5 * 1000 * _IMAGE, nvdec=75 * _STREAM, node_gpus=8, node_cores=128, node_memory=2e12,
            node_power=6500, node_network=200e9, node_storage=30.7e12, node_read=24e9,
        ),
        _SHARED_SOURCES | {"nvjpeg": _JPEG_A100, "nvdec": "recalled: A100 white paper, 75 streams of 1080p30"},
    ),
    "b200": _gpu(
        _B200,
        "NVIDIA DGX B200",
        dict(
            bf16=2250e12, tf32=1125e12, memory=180e9, bandwidth=8e12, link=900e9, host_link=48e9,
            nvjpeg=7 * 1000 * _IMAGE, nvdec=170 * _STREAM, node_gpus=8, node_cores=112, node_memory=2e12,
            node_power=14300, node_network=400e9, node_storage=30.7e12, node_read=24e9,
        ),
        _SHARED_SOURCES | {"nvjpeg": _JPEG_OTHER, "nvdec": "assumption: at least the H100's"},
    ),
    "cpu": {name: Constant(float("nan"), unit, _CPU) for name, unit in _GPU_UNITS.items()},
}  # fmt: skip
"""By GPU name. ``cpu`` is a machine whose "GPUs" are processes of a thread each that share ``node_cores``: measured."""

_DEVICES = {"h100": r"NVIDIA H100 80GB HBM3", "h200": r"NVIDIA H200", "a100": r"NVIDIA A100-.*", "b200": r"NVIDIA B200"}
"""CUDA's names of the boards above; PCIe and NVL boards of the H generations are slower, and not in the table."""


def arithmetic_peak(device_name: str, dtype: str) -> float | None:
    """Peak dense arithmetic of a GPU.

    Args:
        device_name: CUDA's name of the board.
        dtype: A run's ``train.dtype``; float32 means TF32, torch's default for convolutions.

    Returns:
        flop/s; None for another board, a MIG slice or float64.
    """
    unit = {"bfloat16": "bf16", "float32": "tf32"}.get(dtype)
    known = [
        gpu for gpu, pattern in _DEVICES.items() if re.fullmatch(pattern, device_name) and "MIG" not in device_name
    ]
    return GPUS[known[0]][unit].value if known and unit else None


_CORES_HERE = "measured: one core of an AMD EPYC (Zen 4) at 2.6 GHz, 256-pixel clips of 250 frames, medians"
_FITTED = (
    "assumption: chosen so that this plan gives, for plain ResNet-50 training in mixed precision on one A100, the "
    "published 2470 images/s (NVIDIA DeepLearningExamples, ResNet50 v1.5 for PyTorch, DGX A100 80 GB)"
)

COMMON: dict[str, Constant] = {
    "matmul_efficiency": Constant(0.5, "share of peak", _FITTED),
    "bandwidth_efficiency": Constant(0.72, "share of peak", _FITTED),
    "fused_efficiency": Constant(0.5, "share of peak", "assumption: the contrastive kernel, never timed"),
    "compile_bytes": Constant(0.35, "share", "assumption: pointwise traffic that is left when torch.compile fuses it"),
    "launch": Constant(2e-6, "s an op", "assumption: from one kernel's end to the next one's work, in a full queue"),
    "link_efficiency": Constant(0.8, "share of peak", "assumption: bus bandwidth of large NCCL all-reduces"),
    "link_latency": Constant(20e-6, "s", "assumption: one small NCCL collective inside a node"),
    "network_latency": Constant(40e-6, "s", "assumption: one small NCCL collective across nodes"),
    "overlap": Constant(0.9, "share", "assumption: of the backward pass, during which gradients can travel"),
    "engine_efficiency": Constant(0.5, "share", "assumption: small pictures leave engines idle"),
    "frame_height": Constant(256, "pixels", "this project's stores: short side 256"),
    "frame_width": Constant(455, "pixels", "assumption: 16:9 sources"),
    "clip_frames": Constant(250, "frames", "assumption: ten seconds at 25 a second"),
    "jpeg_bytes": Constant(5021 * 1024 / 250, "bytes a frame", _CORES_HERE),
    "h264_bytes": Constant(1053 * 1024 / 250, "bytes a frame", _CORES_HERE + "; GOP 8, no B frames"),
    "copy_bytes": Constant(380 * 1024 / 250, "bytes a frame", _CORES_HERE + "; GOP 250"),
    "jpeg_decoded": Constant(1, "frames decoded a frame used", "by construction: each frame stands alone"),
    "h264_decoded": Constant(4.5, "frames decoded a frame used", "by construction: mean position in a GOP of 8"),
    "copy_decoded": Constant(62 / 6.7 * 4.5, "frames decoded a frame used", "derived: GOP 8 x ratio of measured times"),
    "jpeg_core": Constant(1.75e-3, "core s a frame", _CORES_HERE + "; decode and crop"),
    "h264_core": Constant(3.35e-3, "core s a frame", _CORES_HERE + "; planned packets, GOP 8"),
    "copy_core": Constant(31e-3, "core s a frame", _CORES_HERE + "; planned packets, GOP 250"),
    "process_memory": Constant(8e9, "bytes a rank", "assumption: torch, DALI and their pools on the host"),
    "context_memory": Constant(2.5e9, "bytes a GPU", "assumption: CUDA, cuDNN, NCCL, decoder surfaces"),
    "fragmentation": Constant(0.05, "share", "assumption: reserve of the caching allocator above allocated bytes"),
    "slowdown": Constant(
        1.155,
        "measured / planned",
        "measured: 105.6 ms for 91.5, the compiled step of ResNet-50 with 256 clips on one H200",
    ),
    "power_share": Constant(0.85, "share", "assumption: of the node's maximum power while training"),
}  # fmt: skip
"""Constants of every GPU."""


@dataclass(frozen=True)
class Machine:
    """One kind of GPU and all constants that go with it; ``machine["name"]`` is the value."""

    gpu: str
    constants: Mapping[str, Constant]

    def __getitem__(self, name: str) -> float:
        return self.constants[name].value


def machine(gpu: str, calibration: str | Path | None = None) -> Machine:
    """The constants of a GPU; measured ones replace the table's.

    Args:
        gpu: A name in ``GPUS``.
        calibration: JSON file like ``CALIBRATION``, with any of the table's constants.

    Raises:
        UserError: an unknown GPU or constant, a file that cannot be read, or ``cpu`` without measured values.
    """
    if gpu not in GPUS:
        raise UserError(f"--gpu must be one of {', '.join(GPUS)}, got {gpu!r}")
    constants = {**GPUS[gpu], **COMMON}
    if calibration is not None:
        constants |= _measured(Path(calibration), constants)
    unknown = [name for name, constant in constants.items() if constant.value != constant.value]
    if unknown:
        raise UserError(f"--gpu {gpu} needs --calibrate FILE with measured values of {', '.join(unknown)}")
    return Machine(gpu, constants)


CALIBRATION = '{"machine": "what was measured", "constants": {"bandwidth_efficiency": 0.6}}'
"""An example of a calibration file."""


def _measured(path: Path, known: Mapping[str, Constant]) -> dict[str, Constant]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read the calibration {path}: {error}") from None
    given, where = (content.get(k) if isinstance(content, dict) else None for k in ("constants", "machine"))
    if not isinstance(given, dict) or not isinstance(where, str):
        raise UserError(f"cannot read the calibration {path}: it must be like {CALIBRATION}")
    wrong = [name for name, value in given.items() if name not in known or not _usable(value)]
    if wrong:
        raise UserError(f"{path}: {wrong[0]!r} is no constant of the plan or not a number above 0; see --assumptions")
    return {name: Constant(float(v), known[name].unit, f"measured: {where} ({path})") for name, v in given.items()}


def _usable(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= sys.float_info.max
