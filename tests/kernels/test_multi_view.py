"""All ordered pairs of views in one op, on the CPU path: exact, checked, compiled, across ranks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from multi_view_cases import CASES, assert_exact, make
from torch.nn.functional import normalize

from vito_kernels import info_nce, multi_view_info_nce


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_exact(case, reduction):
    assert_exact(case, torch.float32, "cpu", reduction, 2e-6)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float64_is_exact_to_its_last_bits(case):
    assert_exact(case, torch.float64, "cpu", "sum", 1e-13)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 4), st.integers(1, 9), st.integers(0, 9), st.integers(0, 4), st.sampled_from([0.05, 0.1, 1.0]))
def test_it_is_the_sum_of_the_pairs(views, rows, more, offset, temperature):
    draw = torch.Generator().manual_seed(rows)
    q = normalize(torch.randn(views, rows, 8, generator=draw, dtype=torch.float64), dim=2)
    k = normalize(torch.randn(views, rows + more + offset, 8, generator=draw, dtype=torch.float64), dim=2)
    positive = torch.arange(rows) + offset
    pairs = [(a, b) for a in range(views) for b in range(views) if a != b]
    terms = [info_nce(q[a], k[b], positive=positive, temperature=temperature) for a, b in pairs]
    found = multi_view_info_nce(q, k, positive_offset=offset, temperature=temperature)
    torch.testing.assert_close(found, torch.stack(terms).sum())


def test_none_orders_the_pairs():
    (q, k, _), _ = make(CASES[1], torch.float64, "cpu")
    losses = multi_view_info_nce(q, k, positive_offset=9, reduction="none")
    assert losses.shape == (6, 17)
    expected = info_nce(q[1], k[2], positive=torch.arange(17) + 9, reduction="none")
    torch.testing.assert_close(losses[3], expected)  # (0, 1), (0, 2), (1, 0), (1, 2)


def test_it_compiles_to_one_graph():
    (q, k, _), _ = make(CASES[0], torch.float32, "cpu")
    q.requires_grad_()
    compiled = torch.compile(multi_view_info_nce, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(*(torch.autograd.grad(f(q, k), q)[0] for f in (compiled, multi_view_info_nce)))


def test_double_backward_is_refused():
    (q, k, _), _ = make(CASES[0], torch.float32, "cpu")
    q.requires_grad_()
    (grad,) = torch.autograd.grad(multi_view_info_nce(q, k), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("q", "k", "options", "message"),
    [
        ((1, 4, 8), (1, 4, 8), {}, "at least 2, got 1 and 1"),
        ((3, 4, 8), (2, 4, 8), {}, "got 3 and 2"),
        ((4, 8), (2, 4, 8), {}, r"queries must have shape \(views, rows, width\), got \(4, 8\)"),
        ((2, 4, 8), (2, 4, 8), {"positive_offset": 1}, "positive_offset=1 puts positives of 4 queries outside 4 keys"),
        ((2, 4, 8), (2, 4, 8), {"temperature": 0.0}, "temperature must be positive"),
        ((2, 4, 8), (2, 4, 8), {"reduction": "total"}, "reduction must be one of"),
        ((2, 4, 8), (2, 4, 8), {"q_group": torch.arange(4)}, "k_group is None"),
    ],
)
def test_mistakes_are_named(q, k, options, message):
    with pytest.raises(ValueError, match=message):
        multi_view_info_nce(torch.zeros(q), torch.zeros(k), **options)
