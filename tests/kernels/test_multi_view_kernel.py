"""All ordered pairs of views in one op, by Triton: on a GPU or in the interpreter."""

from __future__ import annotations

import pytest
import torch
from multi_view_cases import CASES, assert_exact, make

from vito_kernels import multi_view_info_nce
from vito_kernels.contrastive import forward

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy warns of the overflow that the kernels detect


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_exact(device, case):
    assert_exact(case, torch.float32, device, "sum", 2e-6)


@pytest.mark.parametrize("case", [CASES[1], CASES[3]], ids=str)
def test_bfloat16_gradients_are_rounded_once(device, case):
    assert_exact(case, torch.bfloat16, device, "none", 4e-3)


def test_a_view_ends_where_the_next_begins(device):
    """Ragged views: no row or key of a neighboring view counts, nor do its infinities."""
    assert_exact((3, 19, 37, 40, 3, 0.1, False), torch.float32, device, "none", 2e-6)


def test_keys_are_split_among_programs(device, monkeypatch):
    monkeypatch.setattr(forward, "num_sms", lambda _: 64)
    assert_exact((2, 4, 1200, 16, 700, 0.1, False), torch.float32, device, "sum", 2e-6)


def test_all_pairs_take_the_launches_of_one(device, monkeypatch):
    counted, run_lse = [], forward.run_lse
    monkeypatch.setattr(forward, "run_lse", lambda *a, **k: (counted.append(a[0]), run_lse(*a, **k)))
    (q, k, _), _ = make((4, 8, 8, 16, 0, 0.1, False), torch.bfloat16, device)
    multi_view_info_nce(q.requires_grad_(), k).backward()
    assert counted == ["fixed", "online"]
