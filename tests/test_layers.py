"""A folder imports only the folders below it (docs/design/architecture.md), inside functions too."""

import ast
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
GROUND = ["config", "config_files", "errors", "files", "machine", "native", "page"]
BELOW = {
    "kernels": [],
    "vito_fast/data": GROUND,
    "vito_fast/model": GROUND,
    "vito_fast/train": [*GROUND, "data", "model"],
    "vito_fast/plan": [*GROUND, "data", "model", "train"],
    "vito_fast/curate": [*GROUND, "data", "model", "train"],
    "vito_fast/evaluate": [*GROUND, "data", "model", "train", "export"],
}


@pytest.mark.parametrize("folder", BELOW)
def test_a_folder_imports_only_the_folders_below_it(folder):
    upward = []
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            for name in names:
                package, _, rest = name.partition(".")
                room = rest.split(".")[0]
                if package == "vito_fast" and room not in [
                    *BELOW[folder],
                    Path(folder).name,
                    "_sampler",
                    "__version__",
                ]:
                    upward.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not upward


def test_no_two_test_modules_share_a_name():
    """pytest puts their folders on the path, so the second of a name is never run."""
    names = Counter(path.name for path in (ROOT / "tests").rglob("*.py") if path.name != "conftest.py")
    assert [name for name, count in names.items() if count > 1] == []
