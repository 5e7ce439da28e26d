"""Replayed calls give what the calls themselves give, bit by bit, whatever came before.

``REPLAY_SEQUENCES=1000 TRITON_INTERPRET=1 pytest --timeout=0 -k another tests/kernels/test_replay_kernel.py`` searches
longer, and with ``--hypothesis-seed=N`` elsewhere.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from unittest.mock import patch

import pytest
import torch
from conftest import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st

import vito_kernels as vk
from vito_kernels.adapters import lightly
from vito_kernels.contrastive import replay

WIDTH = 24
LABELS = torch.arange(12, device=DEVICE) // 3

LOSSES = {
    "info_nce": lambda q, k, t: vk.info_nce(q, k, temperature=t),
    "itself": lambda q, k, t: vk.info_nce(q, q, temperature=t),
    "none": lambda q, k, t: vk.info_nce(q, k, temperature=t, reduction="none"),
    "groups": lambda q, k, t: vk.info_nce(q, k, temperature=t, q_group=LABELS[: len(q)], k_group=LABELS[: len(k)]),
    "listed": lambda q, k, t: vk.info_nce(q, k, temperature=t, positive=LABELS[: len(q)]),
    "options": lambda q, k, t: vk.info_nce(q, k, temperature=t, hard_negatives=0.5, debias=0.1),
    "lse": lambda q, k, t: vk.similarity_lse(q, k, 1 / t),
    "clip": lambda q, k, t: vk.clip_loss(q, k, torch.full((), 1 / t, device=DEVICE)),
    "ntxent": lambda q, k, t: vk.ntxent(q, k, t),
    "supcon": lambda q, k, t: vk.supcon_loss(q, LABELS[: len(q)], temperature=t),
    "moco": lambda q, k, t: vk.moco_loss(q, k.detach(), k.detach().flip(0), temperature=t),
    "bank": lambda q, k, t: lightly._bank_loss(q, vk.normalize(k), k.detach().flip(0), 1 / t),
    "learned": lambda q, k, t: vk.info_nce(q, k, temperature=torch.full((), t, device=DEVICE).requires_grad_()),
    "decoupled": lambda q, k, t: vk.ntxent(q, k, t, decoupled=True, reduction="sum"),
    "siglip": lambda q, k, t: vk.siglip_loss(q, k, 1 / t, -1.0),
    "biased": lambda q, k, t: vk.siglip_loss(q, k, 1 / t, torch.full((), -t, device=DEVICE), reduction="none"),
    "keys": lambda q, k, t: vk.supcon_loss(
        q, LABELS[: len(q)], keys=k, key_labels=LABELS[: len(k)].flip(0), temperature=t
    ),
    "negatives": lambda q, k, t: vk.info_nce(q, k, negatives=k.flip(0), temperature=t),
    "mined": lambda q, k, t: vk.info_nce(q, k, negatives=torch.stack([k, q], 1), temperature=t),
    "views": lambda q, k, t: vk.multi_view_info_nce(torch.stack([q, k]), torch.stack([k, q]), temperature=t),
}


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """What a replay allocates holds NaN. A recording would take down the filling of other memory."""
    allocate = torch.empty_strided

    def poisoned(*args, **kwargs):
        out = allocate(*args, **kwargs)
        return out.fill_(255 if out.dtype == torch.uint8 else float("nan") if out.is_floating_point() else -1)

    monkeypatch.setattr(torch, "empty_strided", poisoned)


def laid_out(how: str, rows: int, dtype: torch.dtype, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two (rows, WIDTH) tensors: dense, strided, unaligned, or parts of one storage."""
    draw = torch.Generator().manual_seed(seed)
    whole = torch.randn(2 * rows, WIDTH + 8, generator=draw).to(DEVICE, dtype)
    if how == "dense":
        q, k = (x[:, :WIDTH].contiguous() for x in whole.chunk(2))
    elif how == "one storage":
        q, k = whole[:, :WIDTH].contiguous().chunk(2)
    else:
        start = 1 if how == "unaligned" else 0
        q, k = (x.clone()[:, start : start + WIDTH] for x in whole.chunk(2))
    return q.detach(), k.detach()


def results(name: str, call: tuple) -> list[torch.Tensor | None]:
    how, rows, dtype, seed, temperature, grads, autocast, grad_mode = call
    q, k = laid_out(how, rows, dtype, seed)
    q.requires_grad_(grads[0]), k.requires_grad_(grads[1])
    context = torch.autocast(DEVICE, torch.bfloat16) if autocast else nullcontext()
    with torch.set_grad_enabled(grad_mode), context:
        loss = LOSSES[name](q, k, temperature)
    leaves = [x for x in (q, k) if x.requires_grad]
    if not loss.requires_grad or not leaves:
        return [loss.detach()]
    upstream = torch.linspace(0.5, 2.0, max(1, loss.numel()), device=DEVICE).reshape(loss.shape)
    found = torch.autograd.grad(loss, leaves, upstream, allow_unused=True)
    return [loss.detach(), *found]


calls = st.tuples(
    st.sampled_from(["dense", "strided", "unaligned", "one storage"]),
    st.sampled_from([6, 9]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(0, 5),
    st.sampled_from([0.1, 0.5]),
    st.sampled_from([(True, False), (True, True), (False, True), (False, False)]),
    st.sampled_from([False, False, True]),
    st.sampled_from([True, True, False]),
)


def compare(name: str, call: tuple) -> None:
    found = results(name, call)
    with patch.object(replay, "ENABLED", False):
        expected = results(name, call)
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == b.dtype
            assert a.shape == b.shape
            assert torch.equal(a.isnan(), b.isnan())
            assert torch.equal(a.nan_to_num(), b.nan_to_num())


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "learned" or DEVICE != "cpu"])  # read on a CPU
def test_the_third_call_is_replayed(name, monkeypatch):
    replays = []
    forward = replay.Pass.__call__
    monkeypatch.setattr(replay.Pass, "__call__", lambda self, given: replays.append(self) or forward(self, given))
    for seed in range(3):
        compare(name, ("dense", 9, torch.bfloat16, seed, 0.1, (True, True), False, True))
    assert len(replays) == 2 * 2  # forward and backward, of all calls but the first


@settings(max_examples=int(os.environ.get("REPLAY_SEQUENCES", "5")), deadline=None)
@given(st.sampled_from(sorted(LOSSES)), st.lists(calls, min_size=1, max_size=3))
def test_no_call_gets_the_plan_of_another(name, sequence):
    for call in sequence * 3:
        compare(name, call)


def test_gradients_of_any_layout_come_back():
    q, k = (x.requires_grad_() for x in laid_out("dense", 9, torch.float32, 0))
    upstream = torch.arange(18.0, device=DEVICE)[::2], torch.ones((), device=DEVICE).expand(9), None
    for grad in upstream * 3:
        loss = vk.info_nce(q, k, reduction="none")
        with patch.object(replay, "ENABLED", False):
            expected = vk.info_nce(q, k, reduction="none")
        seed = torch.rand(9, generator=torch.Generator().manual_seed(0)).to(DEVICE) if grad is None else grad
        for a, b in zip(*(torch.autograd.grad(x, (q, k), seed) for x in (loss, expected)), strict=True):
            assert torch.equal(a, b)


def test_a_second_backward_pass_and_a_second_derivative():
    q, k = (x.requires_grad_() for x in laid_out("dense", 9, torch.float32, 1))
    for _ in range(3):
        loss = vk.clip_loss(q, k, 5.0)
    first, second = (torch.autograd.grad(loss, (q, k), retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))
    for _ in range(3):
        locked = vk.info_nce(q, k.detach())
    for one in (loss, locked):
        (grad,) = torch.autograd.grad(one, q, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            grad.sum().backward()


def test_saved_tensors_may_be_packed_and_modes_see_the_ops():
    q, k = (x.requires_grad_() for x in laid_out("dense", 9, torch.bfloat16, 2))
    for _ in range(3):
        expected = torch.autograd.grad(vk.info_nce(q, k), (q, k))
    for _ in range(2):  # a checkpoint counts the saved tensors of both of its calls
        loss = torch.utils.checkpoint.checkpoint(vk.info_nce, q, k, use_reentrant=False)
        assert all(map(torch.equal, torch.autograd.grad(loss, (q, k)), expected))
    vk.register_flop_formulas()
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        vk.info_nce(q, k)
    assert counter.get_total_flops() > 0


def test_a_saved_tensor_that_was_written_over_is_named():
    q, k = (x.requires_grad_() for x in laid_out("dense", 9, torch.float32, 3))
    for _ in range(3):
        loss = vk.info_nce(q, k)
    with torch.no_grad():
        q.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_what_takes_much_memory_is_not_recorded(monkeypatch):
    monkeypatch.setattr(replay, "MOST_SCRATCH", 64)
    q, k = (x.requires_grad_() for x in laid_out("dense", 6, torch.float32, 4))
    for _ in range(3):
        loss = vk.info_nce(q, k, temperature=0.3)
    assert type(loss.grad_fn).__name__ != "info_nceBackward"
