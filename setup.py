"""Builds the packages ``vito_fast`` and ``vito_kernels``, and the C++ sampler (csrc/) when a compiler is there.

Metadata, dependencies and tool settings live in pyproject.toml. ``VITO_BUILD_SAMPLER=1`` makes a missing compiler an
error, ``VITO_BUILD_SAMPLER=0`` skips the sampler. Without it the wheel is pure Python and holds the kernels alone.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
NO_COMPILER = "no C++ compiler found: vito_kernels works, training and packing do not (apt-get install g++)"


class CMakeBuild(build_ext):
    """Builds ``vito_fast._sampler`` by CMake: one build description for the extension and its own C++ tests."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build_dir = Path(self.build_temp).resolve() / "csrc"
        build_dir.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake", "-S", str(ROOT / "csrc"), "-B", str(build_dir), "-G", "Ninja",
            f"-DCMAKE_BUILD_TYPE={os.environ.get('VITO_BUILD_TYPE', 'Release')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DVITO_EXTENSION_DIR={target.parent}",
        ]  # fmt: skip
        try:
            subprocess.run(configure, check=True)
            subprocess.run(["cmake", "--build", str(build_dir), "--target", "_sampler"], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            sys.exit(f"vito-fast: the sampler does not build ({error}); VITO_BUILD_SAMPLER=0 skips it")


def builds_sampler() -> bool:
    """Whether to build the sampler: as the user says, else when there is a compiler."""
    wanted = os.environ.get("VITO_BUILD_SAMPLER", "")
    if wanted not in ("", "0", "1"):
        sys.exit(f"VITO_BUILD_SAMPLER is {wanted!r}, expected 0 or 1")
    compiler = any(shutil.which(name.split()[0]) for name in (os.environ.get("CXX") or "c++", "g++", "clang++"))
    if wanted == "1" and not compiler:
        sys.exit(f"VITO_BUILD_SAMPLER=1, but {NO_COMPILER}")
    if wanted == "" and not compiler:
        print(f"vito-fast: {NO_COMPILER}", file=sys.stderr)
    return compiler and wanted != "0"


setup(
    ext_modules=[Extension("vito_fast._sampler", sources=[])] if builds_sampler() else [],
    cmdclass={"build_ext": CMakeBuild},
)
