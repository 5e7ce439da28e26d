"""Losses beside InfoNCE, CLIP and NT-Xent, as functions of two embeddings: ours and the reference of each."""

from __future__ import annotations

from collections.abc import Callable

import torch
from contrastive_cases import assert_at_most_twice_torch, embeddings
from torch import Tensor

import vito_kernels
from vito_kernels import reference

ROWS, KEYS, WIDTH = 21, 34, 40
LABELS, KEY_LABELS = torch.arange(ROWS) // 3 - 2, torch.arange(KEYS) % 9
LABELS[-1] = 99  # of no key, beyond all of them


def cases(device: str, reduction: str) -> dict[str, tuple[Callable[..., Tensor], list[int]]]:
    """For each loss a function of (library, x, y[, scale, bias]) and the rows of x and y."""
    labels, key_labels, how = LABELS.to(device), KEY_LABELS.int().to(device), {"reduction": reduction}
    groups = {"q_group": labels, "k_group": torch.arange(KEYS, device=device) // 3 - 2}
    keyed = {"keys": None, "key_labels": key_labels}
    return {
        "siglip": (lambda m, x, y, t, b: m.siglip_loss(x, y, t, b, **how), [ROWS, ROWS]),
        "supcon": (lambda m, x, y: m.supcon_loss(torch.cat([x, y]), torch.cat([labels, labels]), **how), [ROWS, ROWS]),
        "supcon of two sets": (lambda m, x, y: m.supcon_loss(x, labels, **keyed | {"keys": y}, **how), [ROWS, KEYS]),
        "supcon of a queue": (
            lambda m, x, y: m.supcon_loss(x, labels, **keyed | {"keys": y.detach()}, **how) + 0 * y.sum(),
            [ROWS, KEYS],
        ),
        "decoupled": (lambda m, x, y: m.info_nce(x, y, decoupled=True, **groups, **how), [ROWS, KEYS]),
        "negatives": (lambda m, x, y: m.info_nce(x, x.roll(1, 1), negatives=y, **how), [ROWS, KEYS]),
        "decoupled negatives": (
            lambda m, x, y: m.info_nce(x, x.roll(1, 1), negatives=y, decoupled=True, **how),
            [ROWS, KEYS],
        ),
        "negatives of each query": (
            lambda m, x, y: m.info_nce(x, y[:ROWS], negatives=torch.stack([y.roll(i, 0) for i in range(ROWS)]), **how),
            [ROWS, KEYS],
        ),
        "decoupled ntxent": (lambda m, x, y: m.ntxent(x, y, 0.2, decoupled=True, **how), [ROWS, ROWS]),
    }


NAMES = list(cases("cpu", "mean"))


def check(name: str, device: str, dtype: torch.dtype, reduction: str) -> None:
    loss, rows = cases(device, reduction)[name]
    inputs = [embeddings(n, WIDTH, dtype, device, i, name == "siglip") for i, n in enumerate(rows)]
    if name == "siglip":
        inputs += [torch.tensor(9.0, device=device), torch.tensor(-6.0, device=device)]
    ours, plain = (lambda *x, m=m: loss(m, *x) for m in (vito_kernels, reference))
    assert_at_most_twice_torch(ours, plain, inputs, floor=32)


def check_likely_pairs(device: str) -> None:
    """SigLIP's pairs of probability one, and others of none: the gradient is what is left."""
    x = torch.eye(8, 16).to(device)
    inputs = [x, x.clone(), torch.tensor(60.0, device=device), torch.tensor(-30.0, device=device)]
    ours, plain = (lambda *x, m=m: m.siglip_loss(*x) for m in (vito_kernels, reference))
    assert_at_most_twice_torch(ours, plain, inputs, floor=8)


def check_accuracy(device: str) -> None:
    draw = torch.Generator().manual_seed(0)
    x, y = (embeddings(n, WIDTH, torch.float32, device, i) for i, n in enumerate((ROWS, KEYS)))
    x = x + 0.5 * y[:ROWS]
    ids = {"q_group": LABELS.to(device), "k_group": KEY_LABELS.to(device)}
    positive = torch.randint(0, KEYS, (ROWS,), generator=draw).to(device)
    for options in ({}, ids, {"positive": positive}, ids | {"positive": positive}):
        found, expected = (m.topk_accuracy(x, y, (1, 3, 10), **options) for m in (vito_kernels, reference))
        assert torch.equal(found, expected)
        assert 0 < found[2] <= 1
