"""The objective against explicit logits in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from vito_fast.config import LossConfig
from vito_fast.train.keys import GatheredKeys
from vito_fast.train.loss import accuracy, attention_entropy, chance, embedding_rank, embedding_std, objective


def explicit(queries, keys, video, first, config):
    """The formula of the docstring, one logit at a time."""
    total = 0.0
    views, clips, _ = queries[0].shape
    for q, k in zip(queries, keys, strict=True):
        for a in range(views):
            for b in range(views):
                if a == b:
                    continue
                terms = []
                for i in range(clips):
                    own = first + i
                    logits = [q[a, i] @ k[b, own] / config.temperature]
                    for j in range(len(video)):
                        if video[j] == video[own]:
                            continue
                        logits.append(q[a, i] @ k[b, j] / config.temperature)
                        if config.negatives == "both_views":
                            logits.append(q[a, i] @ k[a, j] / config.temperature)
                    logits = torch.stack(logits)
                    terms.append(torch.logsumexp(logits, 0) - logits[0])
                total = total + torch.stack(terms).mean()
    return total


def batch(views, clips, total, first, levels=2, dim=24, videos=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    raw = [torch.randn(views, clips, dim, generator=generator, dtype=torch.float64) for _ in range(levels)]
    keys = [
        normalize(torch.randn(views, total, dim, generator=generator, dtype=torch.float64), dim=-1)
        for _ in range(levels)
    ]
    video = torch.randint(videos, (total,), generator=generator)
    return [r.requires_grad_() for r in raw], GatheredKeys(keys, video, first)


@settings(max_examples=25, deadline=None)
@given(
    views=st.integers(2, 3),
    clips=st.integers(1, 6),
    extra=st.integers(0, 5),
    negatives=st.sampled_from(["cross_view", "both_views"]),
    temperature=st.sampled_from([0.05, 0.1, 1.0]),
    seed=st.integers(0, 1000),
)
def test_objective_and_its_gradient_equal_explicit_logits(views, clips, extra, negatives, temperature, seed):
    config = LossConfig(temperature=temperature, negatives=negatives)
    raw, keys = batch(views, clips, clips + extra, extra // 2, videos=3, seed=seed)
    total, per_level = objective([normalize(r, dim=-1) for r in raw], keys, config)
    expected = explicit([normalize(r, dim=-1) for r in raw], keys.embeddings, keys.video, keys.first, config)
    torch.testing.assert_close(total, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(per_level.sum() * views * (views - 1), total.detach(), rtol=1e-10, atol=1e-12)
    got = torch.autograd.grad(total, raw)
    want = torch.autograd.grad(expected, raw, allow_unused=True)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, torch.zeros_like(g) if w is None else w, rtol=1e-8, atol=1e-10)


def test_detcon_has_two_b_minus_one_logits_and_moclr_b():
    keys = GatheredKeys([torch.zeros(2, 8, 4)], torch.arange(8), 0)
    assert chance(keys, 8, LossConfig()).item() == pytest.approx(math.log(8))
    assert chance(keys, 8, LossConfig(negatives="both_views")).item() == pytest.approx(math.log(15))


def test_identical_embeddings_give_exactly_chance():
    config = LossConfig()
    one = normalize(torch.ones(2, 6, 8, dtype=torch.float64), dim=-1)
    keys = GatheredKeys([one], torch.tensor([0, 0, 1, 2, 3, 4]), 0)
    total, per_level = objective([one], keys, config)
    assert per_level.item() == pytest.approx(chance(keys, 6, config).item(), rel=1e-6)
    assert total.item() == pytest.approx(2 * per_level.item())


def test_clips_of_one_video_alone_have_no_negatives():
    raw, keys = batch(2, 4, 4, 0, videos=1)
    total, _ = objective([normalize(r, dim=-1) for r in raw], keys, LossConfig())
    assert total.item() == 0
    assert all(g.abs().max() == 0 for g in torch.autograd.grad(total, raw))


def test_byol_is_the_squared_distance_of_unit_vectors():
    raw, keys = batch(2, 4, 4, 0, levels=1)
    q = normalize(raw[0], dim=-1)
    total, _ = objective([q], keys, LossConfig(name="byol"))
    k = keys.embeddings[0]
    expected = (q[0] - k[1]).square().sum(-1).mean() + (q[1] - k[0]).square().sum(-1).mean()
    torch.testing.assert_close(total, expected)


def test_accuracy_counts_queries_nearest_to_their_own_key():
    eye = torch.eye(4).expand(2, 4, 4)
    keys = GatheredKeys([eye], torch.arange(4), 0)
    assert accuracy([eye], keys, LossConfig()).item() == 1
    assert accuracy([eye.roll(1, dims=1)], keys, LossConfig()).item() == 0
    same_video = GatheredKeys([eye.roll(1, dims=1)], torch.zeros(4, dtype=torch.int64), 0)
    assert accuracy([eye], same_video, LossConfig()).item() == 1  # no negatives


def test_collapse_alarm_and_attention_entropy():
    spread = normalize(torch.randn(2, 4096, 64, generator=torch.Generator().manual_seed(0)), dim=-1)
    assert embedding_std([spread]).item() == pytest.approx(1, abs=0.02)
    assert embedding_std([spread[:, :1].expand(2, 64, 64)]).item() == 0
    assert embedding_rank([spread]).item() == pytest.approx(64 / (1 + 64 / 4096), rel=0.01)  # of so many random rows
    few = spread.clone()
    few[..., 3:] = 0
    assert embedding_rank([few]).item() == pytest.approx(3, rel=0.01)
    assert embedding_rank([few[:, :2]]).item() == pytest.approx(1)  # two clips
    assert embedding_rank([torch.zeros(2, 64, 64)]).item() == 0
    assert attention_entropy([torch.full((3, 16), 1 / 16)]).item() == pytest.approx(1)
    assert attention_entropy([torch.eye(16)]).item() == 0
