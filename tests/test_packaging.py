"""The wheel, built from the sdist, works outside the checkout: right files, both packages import, light kernels."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(*command: str, cwd: Path, **env: str) -> str:
    done = subprocess.run(
        command, cwd=cwd, env=os.environ | env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def unpacked(wheel: Path, site: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return site


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked sdist of the tracked files: the build must not depend on the working tree, nor litter it."""
    out = tmp_path_factory.mktemp("dist")
    tree = out / "tree"
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_bytes((ROOT / name).read_bytes())
    run(sys.executable, "-m", "build", "--no-isolation", "--sdist", "--outdir", str(out), str(tree), cwd=out)
    (sdist,) = out.glob("*.tar.gz")
    run(sys.executable, "-m", "twine", "check", "--strict", str(sdist), cwd=out)
    with tarfile.open(sdist) as tar:
        tar.extractall(out / "src", filter="data")
    (source,) = (out / "src").iterdir()
    return source


def wheel_of(source: Path, out: Path, **env: str) -> Path:
    run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", str(out), str(source), cwd=out, **env)
    (wheel,) = out.glob("*.whl")
    run(sys.executable, "-m", "twine", "check", "--strict", str(wheel), cwd=out)
    return wheel


@pytest.fixture(scope="module")
def built(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The whole wheel, and its files as an install lays them out."""
    out = tmp_path_factory.mktemp("wheel")
    wheel = wheel_of(source, out, VITO_BUILD_SAMPLER="1")
    return {"wheel": wheel, "site": unpacked(wheel, out / "site")}


@pytest.fixture(scope="module")
def kernels_only(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The wheel of a machine without a compiler, and beside it torch with its own dependencies alone."""
    out = tmp_path_factory.mktemp("kernels")
    shutil.rmtree(source / "build", ignore_errors=True)
    tools = out / "bin"  # a PATH without a compiler
    tools.mkdir()
    wheel = wheel_of(source, out, PATH=str(tools), CXX="")
    site = unpacked(wheel, out / "site")
    for package in closure("torch"):
        for top in {file.parts[0] for file in metadata.distribution(package).files or ()} - {"..", "__pycache__"}:
            found = Path(str(metadata.distribution(package).locate_file(top)))
            if found.exists() and not (site / top).exists():
                (site / top).symlink_to(found)
    return {"wheel": wheel, "site": site}


def closure(package: str) -> set[str]:
    """The package and all that it requires here."""
    found, queue = set[str](), [package]
    while queue:
        name = queue.pop()
        if name in found:
            continue
        try:
            required = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # for another platform
            continue
        found.add(name)
        queue += [re.split(r"[^A-Za-z0-9._-]", line)[0] for line in required if "extra ==" not in line]
    return found


def test_a_wheel_without_compiler_runs_on_torch_alone(kernels_only: dict[str, Path], tmp_path: Path) -> None:
    assert kernels_only["wheel"].name.endswith("-py3-none-any.whl")
    code = (
        "import torch, vito_kernels as k\n"
        "q = torch.randn(8, 16).requires_grad_()\n"
        "k.info_nce(k.normalize(q), k.normalize(torch.randn(8, 16)), temperature=0.1).backward()\n"
        "print(q.grad.isfinite().all().item(), k.__file__)"
    )
    said = run(sys.executable, "-S", "-W", "ignore", "-c", code, cwd=tmp_path, PYTHONPATH=str(kernels_only["site"]))
    finite, file = said.split()
    assert finite == "True"
    assert Path(file).is_relative_to(kernels_only["site"])


def test_without_the_sampler_one_line_names_the_fix(kernels_only: dict[str, Path], tmp_path: Path) -> None:
    command = [sys.executable, "-S", "-c", "from vito_fast.data import ClipLoader"]  # -S: no editable install
    paths = [str(kernels_only["site"]), sysconfig.get_path("purelib")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    line = done.stderr.splitlines()[-1].removeprefix("vito_fast.errors.UserError: ")
    assert line.startswith("the C++ sampler is not built: apt-get install g++ && pip install ")


def test_a_demanded_sampler_needs_a_compiler(source: Path, tmp_path: Path) -> None:
    env = os.environ | {"PATH": str(tmp_path), "CXX": "", "VITO_BUILD_SAMPLER": "1"}
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"], cwd=source, env=env, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert done.stderr.startswith("VITO_BUILD_SAMPLER=1, but no C++ compiler found")


def test_wheel_holds_what_users_need_and_nothing_else(built: dict[str, Path]) -> None:
    names = zipfile.ZipFile(built["wheel"]).namelist()
    for needed in ("vito_kernels/py.typed", "vito_fast/py.typed", "vito_fast/configs/demo.yaml"):
        assert needed in names
    assert any(name.startswith("vito_fast/_sampler.") and name.endswith(".so") for name in names)
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"vito_fast", "vito_kernels"}


def test_imports_come_from_the_wheel_outside_the_checkout(built: dict[str, Path], tmp_path: Path) -> None:
    code = "import vito_kernels, vito_fast._sampler as s; print(vito_kernels.__file__); print(s.__file__)"
    printed = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(built["site"]))
    assert all(Path(line).is_relative_to(built["site"]) for line in printed.split())


def test_kernels_import_needs_torch_alone(tmp_path: Path) -> None:
    """No DALI, PyAV or vito_fast; and triton only once a CUDA tensor or the interpreter asks for it."""
    code = (
        "import sys, vito_kernels\n"
        "print({'triton', 'nvidia.dali', 'av', 'vito_fast', 'torchvision', 'timm'} & set(sys.modules) or 'light')"
    )
    assert run(sys.executable, "-c", code, cwd=tmp_path).strip() == "light"


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
@pytest.mark.parametrize(("more", "name"), [([], "my_videos"), (["NAME=other"], "other")])
def test_make_pretrain_takes_a_folder_with_a_space(more: list[str], name: str, tmp_path: Path) -> None:
    said = run("make", "-n", "pretrain", "VIDEOS=/tmp/my videos", f"VENV={tmp_path}", *more, cwd=ROOT)
    words = [shlex.split(line)[1:] for line in said.splitlines() if "/bin/vito-fast " in line]
    store, at = f"data/{name}/store", f"runs/demo_{name}"
    assert words[0] == ["init", "/tmp/my videos", "--check", "configs/demo.yaml"]
    assert words[1] == ["pack", "/tmp/my videos", store]
    assert words[2] == ["train", "configs/demo.yaml", "--name", f"demo_{name}", "--data.store", store, "--resume"]
    assert words[3:] == [["attention", at, store, f"{at}/attention.png"], ["export", at, f"{at}/encoder.safetensors"]]
