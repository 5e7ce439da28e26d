"""The wheel, built from the sdist, works outside the checkout: right files, both packages import, light kernels."""

import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(*command: str, cwd: Path, **env: str) -> str:
    done = subprocess.run(
        command, cwd=cwd, env=os.environ | env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """sdist of the tree, the wheel made from that sdist alone, and the wheel unpacked where an install would put it."""
    out = tmp_path_factory.mktemp("dist")
    # A copy of the tracked files: the build must not depend on, or litter, the working tree.
    tree = out / "tree"
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_bytes((ROOT / name).read_bytes())
    run(sys.executable, "-m", "build", "--no-isolation", "--sdist", "--outdir", str(out), str(tree), cwd=out)
    (sdist,) = out.glob("*.tar.gz")
    with tarfile.open(sdist) as tar:
        tar.extractall(out / "src", filter="data")
    (source,) = (out / "src").iterdir()
    run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", str(out), str(source), cwd=out)
    (wheel,) = out.glob("*.whl")
    site = out / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return {"sdist": sdist, "wheel": wheel, "site": site}


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
    assert words[0] == ["pack", "/tmp/my videos", store]
    assert words[1] == ["train", "configs/demo.yaml", "--name", f"demo_{name}", "--data.store", store, "--resume"]
    assert words[2:] == [["attention", at, store, f"{at}/attention.png"], ["export", at, f"{at}/encoder.safetensors"]]
