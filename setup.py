"""Build of vito-fast: the C++ sampler (csrc/, CMake + Ninja), and the packages ``vito_fast`` and ``vito_kernels``.

Metadata, dependencies and tool settings live in pyproject.toml; this file holds only what needs code.
"""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


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
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build_dir), "--target", "_sampler"], check=True)


setup(
    ext_modules=[Extension("vito_fast._sampler", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
