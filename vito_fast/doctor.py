"""``vito-fast doctor``: this machine, and the code paths that a run here will use. It only reads."""

import ctypes
import importlib
import os
import platform
import shutil
from pathlib import Path
from types import ModuleType

from vito_fast.errors import UserError
from vito_fast.machine import usable_cores, usable_memory


def doctor() -> int:
    """Describe this machine and the code paths a run here will use."""
    print(report())
    return 0


def report() -> str:
    """Lines of ``name  finding``, then the code paths of training and packing here; the last line is the verdict."""
    torch = _module("torch")
    gpus = _gpus(torch)
    dali, av, triton = _module("nvidia.dali"), _module("av"), _module("triton")
    nvdec, nvjpeg = _library("libnvcuvid.so.1"), _library("libnvjpeg.so.13", "libnvjpeg.so.12", "libnvjpeg.so")
    facts = [
        ("machine", f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"),
        ("CPU", f"{usable_cores()} cores usable of {os.cpu_count()}"),
        ("memory", _memory()),
        ("disk here", f"{shutil.disk_usage('.').free / 2**30:.1f} GiB free"),
        ("GPU", "; ".join(gpus) or "none usable"),
        ("driver", _driver()),
        ("NVDEC", _said(nvdec, "its library is here", "no library: no hardware video decoding")),
        ("nvJPEG", _said(nvjpeg, "its library is here", "no library found outside of DALI")),
        ("torch", _version(torch) + (f", built for CUDA {torch.version.cuda}" if torch and torch.version.cuda else "")),
        ("triton", _version(triton)),
        ("DALI", _version(dali)),
        ("PyAV", _version(av) + _codecs(av)),
        *((name, _version(_module(name))) for name in ("torchvision", "timm", "tensorboard")),
        ("sampler", _sampler()),
    ]
    width = max(len(name) for name, _ in facts)
    lines = [f"{name:<{width}}  {finding}" for name, finding in facts]
    return "\n".join([*lines, "", *_choices(bool(gpus), bool(triton), bool(dali), bool(av), nvdec)])


def _choices(gpu: bool, triton: bool, dali: bool, av: bool, nvdec: bool) -> list[str]:
    kernels = "Triton kernels" if gpu and triton else "the CPU path of the fused ops (no GPU)"
    if gpu and not triton:
        kernels = "torch's own ops (a GPU, but no triton: pip install triton)"
    nothing = "nothing: pip install 'vito-fast[train]'"
    jpeg = "DALI on the GPU" if gpu and dali else "DALI on the CPU" if dali else nothing
    video = "NVDEC" if gpu and nvdec and dali else "software (PyAV)" if av else nothing
    missing = [name for name, there in (("DALI", dali), ("PyAV", av)) if not there]
    verdict = f"training works here on {'the GPU' if gpu else 'the CPU, slowly'}"
    if missing:
        verdict = f"training does not work here: {' and '.join(missing)} missing"
    return [
        f"fused ops will use   {kernels}",
        f"JPEG stores decode   by {jpeg}",
        f"video stores decode  by {video}",
        verdict,
    ]


def _module(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except Exception:  # a broken installation is a finding as well
        return None


def _sampler() -> str:
    try:
        importlib.import_module("vito_fast.native")
    except UserError as error:
        return str(error)
    return "built"


def _version(module: ModuleType | None) -> str:
    return getattr(module, "__version__", "here") if module else "not installed"


def _library(*names: str) -> bool:
    for name in names:
        try:
            ctypes.CDLL(name)
        except OSError:
            continue
        return True
    return False


def _said(there: bool, yes: str, no: str) -> str:
    return yes if there else no


def _gpus(torch: ModuleType | None) -> list[str]:
    if torch is None or not torch.cuda.is_available():
        return []
    found = []
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        found.append(f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB")
    return found


def _driver() -> str:
    version = Path("/proc/driver/nvidia/version")
    return version.read_text().splitlines()[0] if version.exists() else "no NVIDIA driver loaded"


def _memory() -> str:
    return f"{usable_memory() / 2**30:.1f} GiB"


def _codecs(av: ModuleType | None) -> str:
    if av is None:
        return ""
    wanted = ("h264", "hevc", "vp8", "vp9", "av1", "libdav1d", "mpeg4", "mjpeg")
    return ", decodes " + ", ".join(name for name in wanted if name in av.codecs_available)
