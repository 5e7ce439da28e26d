"""Multi-crop: the crops, their terms, and a step with them on ranks and micro-batches."""

import dataclasses
from pathlib import Path

import pytest
import torch
from ranks import spawn
from test_loss import batch as embeddings
from test_step import ALONE, CONFIG, assert_same, batch, eval_norms, tensors_of
from torch.nn.functional import normalize

from vito_fast.config import LossConfig, SamplerConfig
from vito_fast.train.distributed import init_distributed
from vito_fast.train.loop import train
from vito_fast.train.loss import objective
from vito_fast.train.metrics import read_rows
from vito_fast.train.small_crops import small_crops
from vito_fast.train.trainer import Trainer

SAMPLER = SamplerConfig(views=2, small_crops=3, small_size=16, small_area=(0.1, 0.4))
WITH = dataclasses.replace(CONFIG, sampler=SAMPLER)


def ramps(clips, size=64):
    """Images whose channels are x and y from 0 to 1, and the number of the clip."""
    line = (torch.arange(size) + 0.5) / size
    x, y = torch.meshgrid(line, line, indexing="xy")
    return torch.stack([torch.stack([x, y, torch.full_like(x, clip)]) for clip in range(clips)])


def test_a_crop_is_a_part_of_its_view_of_the_area_and_aspect_asked_for():
    views = ramps(40), ramps(40) + 1000
    crops = small_crops(views, SAMPLER, seed=1, step=2, first=0, total=40)
    assert len(crops) == 6
    areas, mirrored = [], 0
    for place, crop in enumerate(crops):
        assert crop.shape == (40, 3, 16, 16)
        seen = (crop - 1000 * (place // 3)).double()
        assert torch.allclose(seen[:, 2], torch.arange(40.0, dtype=torch.float64)[:, None, None], atol=1e-3)
        assert seen[:, :2].min() > 0
        assert seen[:, :2].max() < 1
        spans = [(seen[:, 0, 8, -1] - seen[:, 0, 8, 0]) * 16 / 15, (seen[:, 1, -1, 8] - seen[:, 1, 0, 8]) * 16 / 15]
        mirrored += int((spans[0] < 0).sum())
        areas.append(spans[0].abs() * spans[1])
        aspect = spans[0].abs() / spans[1]
        assert (aspect > 0.74).all()
        assert (aspect < 1.35).all()
    areas = torch.cat(areas)
    assert 0.09 < areas.min() < 0.15
    assert 0.35 < areas.max() < 0.41
    assert 0.35 < mirrored / 240 < 0.65


def test_crops_are_of_seed_step_and_clip():
    views = tuple(torch.rand(2, 8, 3, 32, 32))
    whole = small_crops(views, SAMPLER, 0, 5, 0, 8)
    part = small_crops(tuple(v[5:7] for v in views), SAMPLER, 0, 5, 5, 8)
    assert all(torch.equal(a[5:7], b) for a, b in zip(whole, part, strict=True))
    for seed, step in ((1, 5), (0, 6)):
        assert not torch.equal(small_crops(views, SAMPLER, seed, step, 0, 8)[0], whole[0])
    assert not torch.equal(whole[0], whole[1])


@pytest.mark.parametrize("config", [LossConfig(), LossConfig(negatives="both_views"), LossConfig(name="byol")], ids=str)
def test_a_small_crop_seeks_the_keys_of_the_other_views(config):
    views, count = 3, 2
    raw, keys = embeddings(views + views * count, 4, 7, 2, levels=1)
    queries = [normalize(r, dim=-1) for r in raw]
    keys = keys._replace(embeddings=[keys.embeddings[0][:views]])
    found, mean = objective(queries, keys, config)
    rows = queries[0].detach()
    expected = sum(terms_of(rows[view], view, keys, config) for view in range(views))
    expected += sum(terms_of(rows[views + crop], crop // count, keys, config) for crop in range(views * count))
    assert found.item() == pytest.approx(float(expected), rel=1e-9)
    pairs = views * (views - 1) * (1 + count)
    assert mean.item() * pairs == pytest.approx(found.item(), rel=1e-9)


def terms_of(query, view, keys, config):
    """The sum of the terms of a view's queries, one logit at a time."""
    rows = keys.embeddings[0]
    own = keys.own(len(query))
    total = 0.0
    for other in range(len(rows)):
        if other == view:
            continue
        for i, q in enumerate(query):
            place = own.start + i
            if config.name == "byol":
                total = total + (2 - 2 * q @ rows[other, place]) / len(query)
                continue
            far = keys.video != keys.video[place]
            sides = (other, view) if config.negatives == "both_views" else (other,)
            logits = torch.cat([(q @ rows[other, place])[None], *(rows[side][far] @ q for side in sides)])
            logits = logits / config.temperature
            total = total + (torch.logsumexp(logits, 0) - logits[0]) / len(query)
    return total


def test_micro_batches_make_the_step_of_the_whole_batch():
    plain = eval_norms(Trainer(WITH, ALONE, 5))
    parts = eval_norms(
        Trainer(dataclasses.replace(WITH, train=dataclasses.replace(WITH.train, micro_batches=4)), ALONE, 5)
    )
    without = eval_norms(Trainer(CONFIG, ALONE, 5))
    for seed in range(2):
        rows = [t.step(*batch(seed=seed), measure=True) for t in (plain, parts, without)]
        assert rows[0]["loss"] == pytest.approx(rows[1]["loss"], rel=1e-10)
        assert rows[0]["loss"] != rows[2]["loss"]
    assert_same(tensors_of(plain), tensors_of(parts), rtol=1e-8, atol=1e-11)


def _rank(rank, folder):
    trainer = Trainer(WITH, init_distributed("cpu"), 5)
    views, video = batch()
    half = slice(4 * rank, 4 * rank + 4)
    trainer.step(tuple(v[half] for v in views), video[half], measure=False)
    torch.save(tensors_of(trainer), folder / f"{rank}.pt")


def test_two_ranks_make_the_step_of_one(tmp_path):
    spawn(_rank, 2, tmp_path)
    whole = Trainer(WITH, ALONE, 5)
    whole.step(*batch(), measure=False)
    for rank in range(2):
        assert_same(torch.load(tmp_path / f"{rank}.pt"), tensors_of(whole), rtol=1e-6, atol=1e-9)


def test_a_run_with_small_crops_resumes_bit_for_bit(config):
    config = dataclasses.replace(
        config,
        sampler=dataclasses.replace(config.sampler, small_crops=1, small_size=16),
        train=dataclasses.replace(config.train, evaluate_every=0, log_every=1),
    )
    train(dataclasses.replace(config, name="whole"))
    for stop in (2, None):
        train(config, resume=True, max_steps=stop)
    whole, parts = (read_rows_of(config, name) for name in ("whole", "r"))
    assert whole == parts


def read_rows_of(config, name):
    rows = read_rows(Path(config.train.runs) / name / "metrics.jsonl")
    return [(row["step"], row["loss"], row["gradient_norm"]) for row in rows]
