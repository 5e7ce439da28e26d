"""``python -m bench.executed``: operations of the Triton kernels, counted by Triton's interpreter, without a GPU.

Machine code shows the cost of one turn of a loop, and not the number of turns. Here every program runs to its end, at
small sizes with ragged tiles. Prints one JSON object: for each kernel of a case its launches, flops of matrix
products, other operations by element (addresses included), bytes read and bytes written. The same on every machine.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # before a kernel is imported

import torch
from torch import Tensor
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, ReduceOps

import vito_kernels
from bench.bench_photometric import parameters, pictures

FIGURES = ("launches", "flops", "operations", "bytes_read", "bytes_written")


class Tally:
    """Counts the operations of the interpreter from now on, by the current case and kernel."""

    def __init__(self) -> None:
        self.case, self.kernel = "", ""
        self.found: dict[str, dict[str, int]] = {}
        self._watch_launches()
        for name in ("unary_op", "binary_op", "ternary_op", "create_fma", "cast_impl", "create_fp_to_fp"):
            self._watch(InterpreterBuilder, name, "operations", lambda result, *_: result.data.size)
        self._watch(ReduceOps, "apply_impl", "operations", lambda _, inputs: inputs[0].handle.data.size)
        self._watch(InterpreterBuilder, "create_dot", "flops", lambda sums, a, *_: 2 * sums.data.size * a.data.shape[1])
        self._watch(InterpreterBuilder, "create_masked_load", "bytes_read", lambda x, _, mask, *__: _moved(x, mask))
        self._watch(InterpreterBuilder, "create_masked_store", "bytes_written", lambda _, at, *xs: _moved(*xs[:2]))

    def _watch_launches(self) -> None:
        launch = GridExecutor.__call__

        def counted(grid: Any, *arguments: Any, **named: Any) -> None:
            self.kernel = f"{self.case}: {grid.fn.__name__}"
            self._add("launches", 1)
            launch(grid, *arguments, **named)

        GridExecutor.__call__ = counted

    def _watch(self, owner: type, name: str, figure: str, amount: Callable[..., int]) -> None:
        """From now on each ``owner.name`` adds to the figure the amount that follows from its result and arguments."""
        method = getattr(owner, name)

        @functools.wraps(method)
        def counted(this: Any, *arguments: Any, **named: Any) -> Any:
            result = method(this, *arguments, **named)
            self._add(figure, amount(result, *arguments))
            return result

        setattr(owner, name, counted)

    def _add(self, figure: str, amount: int) -> None:
        self.found.setdefault(self.kernel, dict.fromkeys(FIGURES, 0))[figure] += int(amount)


def _moved(values: Any, mask: Any) -> int:
    return int(mask.data.sum() * values.data.itemsize)


def cases() -> dict[str, Callable[[], Tensor | bool]]:
    """The calls that run, with their gradients, by name. The interpreter's tiles are 16 x 16, chunks 32 columns."""
    generator = torch.Generator().manual_seed(0)

    def matrix(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return (torch.randn(shape, generator=generator) / shape[1] ** 0.5).to(dtype).requires_grad_()

    q, p, k = matrix(40, 48), matrix(40, 48), matrix(72, 48)
    q32, k32 = matrix(40, 48, dtype=torch.float32), matrix(72, 48, dtype=torch.float32)
    q_wide, k_wide = matrix(24, 528), matrix(40, 528)
    positive, group = torch.arange(40) + 1, torch.arange(72) // 3
    features, logits = matrix(2, 49, 80), matrix(2, 49)
    maps = matrix(4, 24, 5, 5).detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    weight, bias, mean, var = (torch.full((24,), value) for value in (1.0, 0.0, 0.0, 1.0))
    images, drawn = pictures(2, 24), parameters(2, view=1)
    lars = vito_kernels.FusedLars(2, 0.9, 1e-6, 1e-3)
    lists = [[torch.randn(n, generator=generator) for n in (20000, 77, 64)] for _ in range(3)]
    info_nce = functools.partial(vito_kernels.info_nce, positive=positive)
    norm = functools.partial(vito_kernels.batch_norm, momentum=0.1, eps=1e-5, relu=True)
    weight.requires_grad_()
    return {
        "info_nce": lambda: info_nce(q, k),
        "info_nce, groups": lambda: info_nce(q, k, q_group=group[positive], k_group=group),
        "info_nce, float32": lambda: info_nce(q32, k32),
        "info_nce, wide": lambda: vito_kernels.info_nce(q_wide, k_wide, positive=positive[:24]),
        "clip_loss": lambda: vito_kernels.clip_loss(q, p, 10.0),
        "clip_loss, wide": lambda: vito_kernels.clip_loss(q_wide, k_wide[:24], 10.0),
        "ntxent": lambda: vito_kernels.ntxent(q, p, 0.1),
        "supcon_loss": lambda: vito_kernels.supcon_loss(k, group),
        "supcon_loss, keys": lambda: vito_kernels.supcon_loss(q, group[:40], keys=k, key_labels=group),
        "siglip_loss": lambda: vito_kernels.siglip_loss(q, p, 10.0, -10.0),
        "topk_accuracy": lambda: vito_kernels.topk_accuracy(q, k, positive=positive),
        "info_nce, mined": lambda: vito_kernels.info_nce(q, p, negatives=k.detach().expand(40, 72, 48)),
        "moco_loss": lambda: vito_kernels.moco_loss(q, p.detach(), k.detach()),
        "attention_pool": lambda: vito_kernels.attention_pool(features, logits)[0].sum(),
        "batch_norm": lambda: norm(maps, weight, bias, mean, var).sum(),
        "batch_norm, residual": lambda: norm(maps, weight, bias, mean, var, residual=maps.detach()).sum(),
        "photometric": lambda: vito_kernels.photometric(images, drawn),
        "lars": lambda: lars.step(*lists, 0.1, None),
    }


def main() -> None:
    tally = Tally()
    for tally.case, call in cases().items():
        result = call()
        if isinstance(result, Tensor) and result.requires_grad:
            result.backward()
    print(json.dumps(tally.found))


if __name__ == "__main__":
    main()
