"""Cases of ``multi_view_info_nce`` that its CPU and its kernel tests share."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vito_kernels import multi_view_info_nce, reference

CASES = [  # V, B, N, D, offset, temperature, groups
    (2, 20, 20, 32, 0, 0.1, False),
    (3, 17, 40, 48, 9, 0.1, False),
    (4, 33, 33, 16, 0, 0.01, True),
    (3, 5, 100, 70, 50, 0.1, True),
    (3, 1, 1, 16, 0, 0.1, False),
]


def make(case, dtype: torch.dtype, device: str) -> tuple[list[Tensor], dict]:
    """(queries, keys and temperature), and the options; the keys of a video's clips are duplicates."""
    views, rows, columns, width, offset, temperature, grouped = case
    draw = torch.Generator().manual_seed(views * rows)
    q = normalize(torch.randn(views, rows, width, generator=draw), dim=2)
    k = normalize(torch.randn(views, columns, width, generator=draw), dim=2)
    options = {"positive_offset": offset}
    if grouped:
        video = torch.arange(columns, device=device) // 2
        k[:, 1::2] = k[:, : columns - columns % 2 : 2]
        options |= {"q_group": video[offset : offset + rows].clone(), "k_group": video}
    return [
        q.to(device, dtype),
        k.to(device, dtype),
        torch.tensor(temperature, device=device, dtype=torch.promote_types(dtype, torch.float32)),
    ], options


def assert_exact(case, dtype: torch.dtype, device: str, reduction: str, bound: float) -> None:
    """Loss and gradients of queries, keys and temperature against the reference in float64."""
    inputs, options = make(case, dtype, device)
    found = []
    for function, kind in ((multi_view_info_nce, None), (reference.multi_view_info_nce, torch.float64)):
        leaves = [x.detach().to(kind or x.dtype).clone().requires_grad_() for x in inputs]
        loss = function(*leaves[:2], temperature=leaves[2], reduction=reduction, **options)
        weight = torch.linspace(0.5, 1.5, loss.numel(), device=device, dtype=loss.dtype).view(loss.shape)
        grads = torch.autograd.grad((loss * weight).sum(), leaves)
        found.append([loss.detach().double(), *(g.double() for g in grads)])
    for mine, exact in zip(*found, strict=True):
        assert not mine.isnan().any()
        assert (mine - exact).norm() <= bound * exact.norm() + 1e-12, (
            float((mine - exact).norm()),
            float(exact.norm()),
        )
