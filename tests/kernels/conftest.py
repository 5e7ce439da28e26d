"""Where kernel tests run: files named ``test_*_kernel.py`` need Triton, the others take the ops' CPU path.

Triton tests run on the GPU if there is one, or in Triton's interpreter if ``TRITON_INTERPRET=1`` is set before Python
starts; in a plain run without a GPU, ``test_interpreter.py`` runs them in processes of that kind, so they are never
left out.
"""

from __future__ import annotations

import os

import pytest
import torch

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRET else "cpu"
if not INTERPRET and DEVICE == "cpu":
    collect_ignore_glob = ["test_*_kernel.py"]


def round_to_bf16(x):
    """float32 array to the uint16 bits of bfloat16, to nearest, ties to even; NaN stays NaN."""
    import numpy as np

    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)


def widen_bf16(x):
    """uint16 bits of bfloat16 to a float32 array."""
    import numpy as np

    return (np.ascontiguousarray(x).astype(np.uint32) << 16).view(np.float32)


def give_interpreter_real_bf16() -> None:
    """Triton's interpreter keeps bfloat16 as bits: truncates where hardware rounds, and ``tl.dot`` multiplies bits."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    plain_cast, plain_dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def cast(self, src, dst_type):
        source, target = src.dtype.scalar, dst_type.scalar
        if source == tl.bfloat16 and target != tl.bfloat16:
            wide = TensorHandle(widen_bf16(src.data), tl.float32)
            return wide if target == tl.float32 else plain_cast(self, wide, dst_type)
        if target == tl.bfloat16 and source != tl.bfloat16:
            return TensorHandle(round_to_bf16(src.data.astype("float32")), tl.bfloat16)
        return plain_cast(self, src, dst_type)

    def dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        a, b = (TensorHandle(widen_bf16(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return plain_dot(self, a, b, d, input_precision, max_num_imprecise_acc)

    InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = cast, dot


if INTERPRET:
    give_interpreter_real_bf16()


@pytest.fixture
def device() -> str:
    return DEVICE


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Fresh floating-point memory holds NaN, so that an element nobody writes shows."""

    def poisoned(create):
        def wrapper(*args, **kwargs):
            out = create(*args, **kwargs)
            if out.is_floating_point() and type(out) is torch.Tensor and not out.is_meta:
                out.detach().fill_(float("nan"))
            return out

        return wrapper

    for owner, names in ((torch, ("empty", "empty_like", "empty_strided")), (torch.Tensor, ("new_empty",))):
        for name in names:
            monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
