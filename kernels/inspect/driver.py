"""A stand-in for a GPU's driver: Triton compiles for a GPU that is not there, and launches nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from vito_kernels._core.lazy_triton import interpreting

INTERPRETED = "TRITON_INTERPRET=1 interprets kernels instead of compiling them; unset it to inspect"


@dataclass(frozen=True)
class Target:
    """A GPU's data sheet: dense rates without sparsity, at boost clock.

    GeForce cards: NVIDIA's whitepapers on the Ada and RTX Blackwell architectures, appendix A.
    """

    gpu: str
    processors: int
    shared_limit: int  # bytes per block
    bandwidth: float  # bytes per second
    tensor_flops: float  # bfloat16 with float32 sums
    vector_flops: float  # float32 outside the tensor cores


TARGETS = {
    80: Target("A100 SXM 80 GB", 108, 166_912, 2.039e12, 312e12, 19.5e12),
    89: Target("GeForce RTX 4090", 128, 101_376, 1.008e12, 165.2e12, 82.6e12),
    90: Target("H100 SXM 80 GB", 132, 232_448, 3.35e12, 989e12, 66.9e12),
    100: Target("B200", 148, 232_448, 8.0e12, 2250e12, 75e12),
    120: Target("GeForce RTX 5090", 170, 101_376, 1.792e12, 209.5e12, 104.8e12),
}


class StandInDriver:
    """Answers Triton's questions to a driver. Each target is a device of its own."""

    def __init__(self, arch: int):
        from triton.backends.nvidia.driver import ty_to_cpp

        self.arch, self.utils = arch, StandInUtils(TARGETS[arch])
        self.map_python_to_cpp_type = ty_to_cpp
        self.launched: dict[str, Compiled] = {}
        self.launcher_cls = lambda source, metadata: StandInLauncher(self, source, metadata)

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_capability(self, device: int) -> tuple[int, int]:
        return divmod(self.arch, 10)

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)


class StandInUtils:
    """Limits are not enforced here, so that a kernel beyond them is reported with its figures."""

    def __init__(self, target: Target):
        self.properties = {
            "max_shared_mem": 1 << 30,
            "multiprocessor_count": target.processors,
            "max_num_regs": 65_536,
            "warpSize": 32,
        }
        self.binary = b""

    def get_device_properties(self, device: int) -> dict[str, int]:
        return self.properties

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[None, None, int, int, int]:
        self.binary = binary
        return None, None, 0, 0, 1024

    def unload_module(self, module: None) -> None:
        pass


@dataclass
class Compiled:
    name: str
    shared: int
    warps: int
    stages: int
    tensor_memory: int
    binary: bytes


class StandInLauncher:
    """Made once per compiled kernel, just before its binary is loaded; called at every launch."""

    def __init__(self, driver: StandInDriver, source: Any, metadata: Any):
        self.driver, self.metadata, self.binary = driver, metadata, b""

    def __call__(self, *arguments: Any) -> None:
        self.binary = self.binary or self.driver.utils.binary
        m = self.metadata
        kernel = Compiled(m.name, m.shared, m.num_warps, m.num_stages, getattr(m, "tmem_size", 0) or 0, self.binary)
        self.driver.launched.setdefault(m.hash, kernel)


@contextmanager
def stand_in(arch: int) -> Iterator[StandInDriver]:
    """Inside, Triton sees a GPU of this architecture."""
    from triton.runtime import driver

    if interpreting():
        raise RuntimeError(INTERPRETED)
    previous, fake = driver._active, StandInDriver(arch)
    driver.set_active(fake)
    try:
        yield fake
    finally:
        driver._active = previous
