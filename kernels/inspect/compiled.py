"""Compiles shipped launches for every target without a GPU, reads their machine code, and reports problems.

The ops' own launchers run on tensors that have shapes but no memory, against a driver that answers for the target and
launches nothing. So the compiled kernel is the one that a GPU of that kind would run. The exit status is 1 if a kernel
spills, exceeds a limit, compiles to nothing, or misses the tensor cores. On sm_90 a matrix kernel must use HGMMA and no
other kind. Of the cards with 99 KB of shared memory, sm_89 stands for sm_86, whose tiles are the same, and for sm_120,
which another ptxas compiles: ``--arch 120`` asks for it. Only an H200 has run any of this.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from vito_kernels._core.lazy_triton import interpreting
from vito_kernels.inspect import sass
from vito_kernels.inspect.launch_specs import Spec, all_specs

INTERPRETED = "TRITON_INTERPRET=1 interprets kernels instead of compiling them; unset it to inspect"
DEFAULT = (80, 89, 90, 100)  # sm_120 runs what sm_89 does, by another ptxas: on demand, and before its tiles change
MAX_REGISTERS = 255
MATRIX = {
    "similarity_lse_fwd_kernel",
    "summed_lse_fwd_kernel",
    "similarity_lse_bwd_kernel",
    "two_sided_lse_fwd_kernel",
    "large_dim_weights_kernel",
    "large_dim_weighted_sum_kernel",
}
"""Kernels that must use the tensor cores in each launch that declares them, also if they are not its first kernel."""
ASSUMPTIONS = (
    "roofline = max(flops / peak, minimum bytes / bandwidth), at data-sheet rates and boost clock. Every input is read "
    "once and every output written once, without launch or latency. peak is the bfloat16 tensor rate for kernels on "
    "the tensor cores, as float32 matrices in parts at six times the flops, and the float32 vector rate for the "
    "others. It is a bound, not a measurement. Instruction counts are per warp and loop iteration."
)

# ---- a stand-in for a GPU's driver


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


# ---- records


def specs(pattern: str = "", rare: bool = True) -> list[tuple[int, Spec]]:
    """(index, spec) of the shipped launches whose name contains the pattern; rare ones only if asked."""
    return [(i, s) for i, s in enumerate(all_specs()) if pattern in s.name and (rare or not s.rare)]


def inspect(arch: int, spec: Spec) -> list[dict[str, Any]]:
    """One record per kernel that the spec launches.

    The spec's work belongs to the first that computes, and to its variants, the same function compiled for another
    case. Other kernels of the launcher, which split float32 or add up parts, have none.
    """
    with stand_in(arch) as driver:
        try:
            spec.launch()
        except Exception as error:  # a compiler failure is a finding, to be shown with the rest
            return [{**_empty_record(arch, spec), "problems": [f"{type(error).__name__}: {error}"[:500]]}]
        launched = list(driver.launched.values())
    if not launched:
        return [{**_empty_record(arch, spec), "problems": ["launched no kernel"]}]
    main = next(kernel.name for kernel in launched if kernel.name != "split_bf16_kernel")
    variants = [kernel for kernel in launched if kernel.name == main]
    return [
        _record(arch, spec, kernel, main, variants.index(kernel) if kernel in variants else 0) for kernel in launched
    ]


def _empty_record(arch: int, spec: Spec, tensor_cores: bool = True) -> dict[str, Any]:
    target = TARGETS[arch]
    with stand_in(arch):
        flops = spec.flops() if callable(spec.flops) else spec.flops
    peak = target.tensor_flops if tensor_cores else target.vector_flops
    return {
        "name": spec.name, "kernel": "", "arch": f"sm_{arch}", "gpu": target.gpu,
        "registers": 0, "stack_bytes": 0, "spill_bytes": 0, "loop_spill_bytes": 0,
        "instructions": 0, "loop_instructions": 0,
        "shared_bytes": 0, "shared_limit": target.shared_limit, "warps": 0, "stages": 0,
        "mma": [], "loop": {}, "flops": flops, "min_bytes": spec.min_bytes,
        "roofline_ms": 1e3 * max(flops / peak, spec.min_bytes / target.bandwidth), "problems": [],
    }  # fmt: skip


def _record(arch: int, spec: Spec, kernel: Compiled, main_name: str, variant: int) -> dict[str, Any]:
    binary = sass.read(kernel.binary)
    main = kernel.name == main_name
    record = _empty_record(arch, spec, bool(binary.mma))
    record |= {"kernel": kernel.name, "shared_bytes": kernel.shared, "warps": kernel.warps, "stages": kernel.stages}
    record |= {k: v for k, v in asdict(binary).items() if k in record} | {"mma": list(binary.mma)}
    if not main:
        record |= {"name": f"{spec.name}, {kernel.name}", "flops": 0.0, "min_bytes": 0.0, "roofline_ms": 0.0}
    elif variant:
        record["name"] = f"{spec.name}, variant {variant + 1}"
    record["loop_instructions"] = binary.loop["all"]
    with stand_in(arch):
        products = spec.tensor_cores() if callable(spec.tensor_cores) else spec.tensor_cores
    record["problems"] = list(_problems(arch, products and kernel.name in MATRIX, kernel, binary))
    return record


def _problems(arch: int, needs_mma: bool, kernel: Compiled, binary: sass.Binary) -> Iterator[str]:
    limit = TARGETS[arch].shared_limit
    if binary.spill_bytes:
        yield f"spills {binary.spill_bytes} bytes ({binary.loop_spill_bytes} in the main loop)"
    if kernel.shared > limit:
        yield f"needs {kernel.shared} bytes of shared memory, over the limit of {limit}"
    if binary.registers > MAX_REGISTERS or binary.registers * kernel.warps * 32 > 65_536:
        yield f"needs {binary.registers} registers in each of {kernel.warps} warps"
    if kernel.tensor_memory > 512:
        yield f"needs {kernel.tensor_memory} columns of tensor memory, over the limit of 512"
    if not binary.stores:
        yield "compiled to nothing: no store to global memory"
    if needs_mma and not binary.mma:
        yield "has no tensor-core instruction"
    if needs_mma and arch == 90 and any(not kind.startswith("HGMMA") for kind in binary.mma):
        yield f"misses HGMMA: uses {', '.join(binary.mma)}"


def inspect_job(job: tuple[int, int]) -> list[dict[str, Any]]:
    """``inspect`` of (arch, index of a spec), for another process."""
    arch, index = job
    return inspect(arch, all_specs()[index])


# ---- command line


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status."""
    options = _parse(arguments)
    if find_spec("triton") is None:
        print("triton is not installed, and kernels are compiled by it: pip install triton (Linux)", file=sys.stderr)
        return 2
    if interpreting():
        print(INTERPRETED, file=sys.stderr)
        return 2
    jobs = [(arch, i) for i, _ in specs(options.only, options.all) for arch in options.arch]
    if not jobs:
        print(f"no shipped kernel's name contains {options.only!r}", file=sys.stderr)
        return 2
    records: list[dict[str, Any]] = []
    workers = min(options.jobs or os.cpu_count() or 1, len(jobs))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) if workers > 1 else nullcontext() as pool:
        for result in (pool.map if pool else map)(inspect_job, jobs):
            for record in result:
                print(_line(record), flush=True)
            records += result
    failed = [record for record in records if record["problems"]]
    print(f"\n{len(records)} kernels, {len(failed)} with problems. {ASSUMPTIONS}")
    if options.json:
        options.json.write_text(json.dumps(_report(records), indent=1) + "\n")
    return 1 if failed else 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m vito_kernels.inspect", description=__doc__.split("\n\n")[0])
    parser.add_argument("--arch", type=int, nargs="+", choices=sorted(TARGETS), default=DEFAULT)
    parser.add_argument("--only", default="", help="inspect launches whose name contains this text")
    parser.add_argument(
        "--all", action="store_true", help="also the rarer widths and dtypes, which takes an hour or more"
    )
    parser.add_argument("--json", type=Path, help="write the records to this file")
    parser.add_argument("--jobs", type=int, default=None, help="processes that compile; by default one per core")
    options = parser.parse_args(arguments)
    if options.json:
        try:
            options.json.open("a").close()  # now, and not after an hour's work
        except OSError as error:
            parser.error(f"--json: {error}")
    return options


def _line(record: dict[str, Any]) -> str:
    loop = dict(record["loop"])
    total = loop.pop("all", 0)
    mix = ", ".join(f"{count} {kind}" for kind, count in loop.items())
    head = (
        f"{record['arch']:6} {record['name']} [{record['kernel']}]\n"
        f"       {record['registers']} registers, {record['spill_bytes']} B spilled, {record['stack_bytes']} B stack, "
        f"{record['shared_bytes']:,} of {record['shared_limit']:,} B shared, {record['warps']} warps, "
        f"{record['stages']} stages; {' + '.join(record['mma']) or 'no tensor cores'}\n"
        f"       main loop {total} of {record['instructions']} instructions: {mix}"
    )
    if record["flops"]:
        head += (
            f"\n       {record['flops']:.3g} flops, {record['min_bytes']:.3g} B at least: "
            f"roofline {record['roofline_ms']:.3g} ms on {record['gpu']}"
        )
    return head + "".join(f"\n       PROBLEM: {problem}" for problem in record["problems"])


def _report(records: list[dict[str, Any]]) -> dict[str, Any]:
    import torch
    import triton

    gpus = {f"sm_{arch}": asdict(target) for arch, target in TARGETS.items()}
    return {
        "torch": torch.__version__,
        "triton": triton.__version__,
        "assumptions": ASSUMPTIONS,
        "gpus": gpus,
        "kernels": records,
    }
