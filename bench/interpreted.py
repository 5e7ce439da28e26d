"""``python -m bench.interpreted``: are the CUDA-only peers right? Small sizes, no GPU, Triton's interpreter.

Prints one JSON object: for each peer the relative error of its loss and gradients against the reference in float64, or
why it could not run. What the interpreter lacks is stood in for: inf-cl's inline assembly, which rounds to TF32, leaves
its operand as it is; memeff is told that it sees an A100 and that its tensors are where it wants them.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
from types import SimpleNamespace
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # before anybody imports a kernel

import torch

from bench import peers
from bench.harness import relative_error
from vito_kernels import reference

M, D, TEMPERATURE = 96, 64, 0.1


def stand_in_for_cuda() -> None:
    """Makes checks for a CUDA device pass."""
    from triton.runtime import interpreter

    def same(self: Any, asm: str, constraints: str, values: list[Any], *rest: Any) -> SimpleNamespace:
        return SimpleNamespace(get_result=lambda number: values[number])

    interpreter.InterpreterBuilder.create_inline_asm = same
    torch.cuda.get_device_capability = lambda device=None: (8, 0)
    torch.cuda.device = lambda device: contextlib.nullcontext()
    for name in ("clip_loss", "lit_loss"):
        with contextlib.suppress(ImportError):
            importlib.import_module(f"memeff.{name}")._validate_features = lambda *features: None
    with contextlib.suppress(ImportError):
        _without_asserts("inf_cl.flash")


def _without_asserts(module: str) -> None:
    """Runs a module's functions as ``python -O`` would: inf-cl asserts that its tensors are on a GPU."""
    loaded = importlib.import_module(module)
    source = importlib.util.find_spec(module).origin  # type: ignore[union-attr]
    assert source is not None
    with open(source, encoding="utf-8") as file:
        code = compile(file.read(), source, "exec", optimize=1)
    exec(code, loaded.__dict__)
    importlib.import_module(module.split(".")[0]).cal_flash_loss = loaded.cal_flash_loss


def main() -> None:
    stand_in_for_cuda()
    q = torch.randn(M, D, generator=torch.Generator().manual_seed(0))
    k = q + torch.randn(M, D, generator=torch.Generator().manual_seed(1))

    def info_nce(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        normalize = torch.nn.functional.normalize
        return reference.info_nce(normalize(q, dim=1), normalize(k, dim=1), temperature=TEMPERATURE)

    plain = {False: info_nce, True: lambda x, y: peers._reference_clip(x, y, TEMPERATURE)}
    cases: dict[str, tuple[Any, bool]] = {
        "memeff (LiT)": (peers._memeff_lit, False),
        "memeff (CLIP)": (peers._memeff_clip, True),
        "inf-cl (one-sided)": (peers._inf_cl_one_sided, False),
        "inf-cl (two-sided)": (peers._inf_cl, True),
    }
    found: dict[str, Any] = {}
    for name, (make, both) in cases.items():
        inputs = q.clone().requires_grad_(), k.clone().requires_grad_(both)
        try:
            got = peers.with_gradients(make(TEMPERATURE), *inputs)()
        except ImportError as error:
            found[name] = f"not installed ({error})"
            continue
        found[name] = relative_error(got, peers.truth_of(plain[both], *inputs)())
    print(json.dumps(found))


if __name__ == "__main__":
    main()
