"""Inputs and the yardstick shared by the contrastive tests: float64 is the truth, torch in the same precision the
bar.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vito_kernels import clip_loss, info_nce, reference, similarity_lse, supcon_loss

SHAPES = [(1, 1, 16), (5, 9, 16), (33, 70, 48), (64, 64, 64), (17, 130, 100), (130, 17, 192)]
LAYOUTS = ["none", "groups", "positive", "many"]


def embeddings(rows: int, width: int, dtype: torch.dtype, device: str, seed: int, unit: bool = True) -> Tensor:
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    return (normalize(x, dim=1) if unit else x).to(device, dtype)


def layout(name: str, queries: int, keys: int, device: str) -> dict[str, Tensor]:
    """Arguments of ``info_nce`` that exclude keys in one of four ways."""
    draw = torch.Generator().manual_seed(queries * 1000 + keys)
    if name == "groups":
        ids = [torch.randint(0, 4, (n,), generator=draw).to(device) for n in (queries, keys)]
        return {"q_group": ids[0], "k_group": ids[1], "positive": torch.arange(queries, device=device) % keys}
    if name == "positive":
        return {"positive": torch.randint(0, keys, (queries,), generator=draw).to(device)}
    if name == "many":
        return {"positive": torch.randint(0, keys, (queries, 3), generator=draw).to(device)}
    if name == "dozen":  # more than kernels unroll
        return {"positive": torch.randint(0, keys, (queries, 12), generator=draw).to(device)}
    return {} if queries <= keys else {"positive": torch.arange(queries, device=device) % keys}


def with_gradients(function, inputs: list[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """The result of ``function`` and its gradients with respect to all inputs, in float64."""
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
    out = function(*leaves)
    grads = torch.autograd.grad(out.sum(), leaves)
    return [out.detach().double(), *(g.double() for g in grads)]


def error(found: Tensor, truth: Tensor) -> float:
    """Norm of the difference over the norm of the truth."""
    assert not found.isnan().any()
    same = torch.where(found == truth, 0, found - truth)  # -inf equals -inf
    return float(same.norm() / truth[truth.isfinite()].norm().clamp(min=1e-30))


def assert_at_most_twice_torch(fused, reference, inputs: list[Tensor], floor: float = 4.0) -> None:
    """Against float64: at most twice the error of plain torch in the same precision, or ``floor`` roundings of the
    output.

    The floor stands for results (a loss of exactly 0, say) that torch happens to round to no error at all.
    """
    truth = with_gradients(reference, inputs, torch.float64)
    plain = with_gradients(reference, inputs)
    for i, (mine, theirs, exact) in enumerate(zip(with_gradients(fused, inputs), plain, truth, strict=True)):
        kind = torch.float32 if i == 0 else inputs[i - 1].dtype
        allowed = 2 * error(torch.nan_to_num(theirs), exact) + floor * torch.finfo(kind).eps
        found = error(mine, exact)
        assert found <= allowed or float((mine - exact).norm()) < 1e-6 * torch.finfo(kind).eps, (i, found, allowed)


def gradient_errors_under_autocast(device, p_positive, rows=64, width=128):
    """Errors of info_nce's and clip_loss's float32 gradients under bfloat16 autocast: (loss, side) -> error,
    against float64 at the rounded embeddings, at the temperature where a positive has that probability.
    """
    generator = torch.Generator().manual_seed(0)
    k = normalize(torch.randn(rows, width, generator=generator), dim=1)
    q = normalize(k + 0.03 * torch.randn(rows, width, generator=generator), dim=1)
    logits = q.double() @ k.double().T
    low, high = 0.0, 100.0
    for _ in range(50):
        scale = (low + high) / 2
        likely = (scale * logits).softmax(1).diagonal().mean() > p_positive
        low, high = (low, scale) if likely else (scale, high)

    pairs = {
        "info_nce": (info_nce, reference.info_nce, {"temperature": 1 / scale}),
        "clip": (clip_loss, reference.clip_loss, {"scale": scale}),
    }
    errors = {}
    for name, (ours, truth, options) in pairs.items():
        leaves = [x.to(device).requires_grad_() for x in (q, k)]
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            found = torch.autograd.grad(ours(*leaves, **options), leaves)
        exact = [x.bfloat16().double().requires_grad_() for x in (q, k)]
        expected = torch.autograd.grad(truth(*exact, **options), exact)
        for side, one, other in zip("qk", found, expected, strict=True):
            errors[name, side] = ((one.cpu().double() - other).norm() / other.norm()).item()
    return errors


def supcon_gradient_error_under_autocast(device, p_positive, rows=64, width=64):
    """As above, of SupCon's, whose positives are part of the sum: here pairs of that probability."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(rows) % (rows // 2)
    z = normalize(torch.randn(rows // 2, width, generator=draw), dim=1)[labels]
    z = normalize(z + 0.04 * torch.randn(rows, width, generator=draw), dim=1)
    logits, low, high = (z @ z.T).fill_diagonal_(-torch.inf), 0.0, 200.0
    for _ in range(50):
        scale = (low + high) / 2
        likely = (scale * logits).softmax(1)[labels[:, None] == labels].view(rows, 2).sum(1).mean() > p_positive
        low, high = (low, scale) if likely else (scale, high)

    leaf, exact = z.to(device).requires_grad_(), z.double().requires_grad_()
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        loss = supcon_loss(leaf, labels.to(device), temperature=1 / scale)
    (found,) = torch.autograd.grad(loss, leaf)
    unit = normalize(exact, dim=1)
    unit = unit + (unit.bfloat16().double() - unit).detach()
    logits = (scale * unit @ unit.T).fill_diagonal_(-torch.inf)
    partner = torch.arange(rows).roll(rows // 2)
    (expected,) = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, partner), exact)
    return ((found.cpu().double() - expected).norm() / expected.norm()).item()


def tight_classes(rows, width, classes, noise):
    """(z, labels) of classes whose members nearly coincide: gradients are what little is left between large sums."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(0, classes, (rows,), generator=draw)
    centers = normalize(torch.randn(classes, width, generator=draw), dim=1)
    return normalize(centers[labels] + noise * torch.randn(rows, width, generator=draw) / width**0.5, dim=1), labels


def assert_unseen_gets_nothing(device):
    """Of a query that sees no key, at whose lse autograd brings 0 times infinity."""
    q, k = (embeddings(n, 16, torch.float32, device, n).requires_grad_() for n in (3, 5))
    scale = torch.tensor(2.0, device=device, requires_grad=True)
    groups = {"q_group": torch.tensor([1, 0, 2], device=device), "k_group": torch.ones_like(k[:, 0]).long()}
    lse = similarity_lse(q, k, scale, **groups)
    assert (lse == -torch.inf).tolist() == [True, False, False]
    found = torch.autograd.grad(torch.where(lse.isinf(), 0, lse.square()).sum(), (q, k, scale))
    expected = torch.autograd.grad(reference.similarity_lse(q[1:], k, scale).square().sum(), (q, k, scale))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
