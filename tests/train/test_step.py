"""The step: cached gradients, several ranks, and the guard against non-finite numbers."""

import dataclasses
import warnings

import pytest
import torch
from ranks import spawn

from vito_fast.config import (
    Config,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    SamplerConfig,
    ScheduleConfig,
    TrainConfig,
)
from vito_fast.errors import UserError
from vito_fast.train.checkpoint import read, write
from vito_fast.train.distributed import World, init_distributed
from vito_fast.train.trainer import Trainer

ALONE = World(0, 1, 1, torch.device("cpu"))
CONFIG = Config(
    sampler=SamplerConfig(views=2),
    model=ModelConfig(
        backbone="timm:test_resnet",
        projector_hidden=16,
        projector_out=8,
        attention_hidden=8,
        levels=2,
        heads="per_level",
        predictor=True,
    ),
    optimizer=OptimizerConfig(base_lr=8.0, weight_decay=1e-4),
    schedule=ScheduleConfig(epochs=10, warmup_epochs=0, base_ema=0.9),
    train=TrainConfig(batch_size=8, dtype="float64", channels_last=False),
)


def with_train(config=CONFIG, **changes):
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **changes))


def batch(clips=8, size=32, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    views = tuple(torch.randn(clips, 3, size, size, generator=generator).to(dtype) for _ in range(2))
    return views, torch.arange(clips) // 2 * 7  # two clips of every video


def tensors_of(trainer):
    return {k: v.clone() for k, v in trainer.state()[0].items() if not k.startswith("rng.")}


def assert_same(a, b, **tolerance):
    assert a.keys() == b.keys()
    for name in a:
        if tolerance:
            torch.testing.assert_close(a[name], b[name], msg=lambda m, n=name: f"{n}: {m}", **tolerance)
        else:
            assert torch.equal(a[name], b[name]), name


def test_a_measured_step_has_the_values_of_the_docs_and_changes_nothing_else():
    measured, silent = Trainer(CONFIG, ALONE, 5), Trainer(CONFIG, ALONE, 5)
    row = measured.step(*batch(), measure=True)
    assert silent.step(*batch(), measure=False) == {}
    assert_same(tensors_of(measured), tensors_of(silent))
    assert {"loss", "chance", "gradient_norm", "target_distance", "lr", "tau", "skipped"} <= row.keys()
    for level in (0, 1):
        assert row[f"loss_level{level}"] > 0
        assert 0 <= row[f"attention_entropy_level{level}"] <= 1 + 1e-9
    assert row["loss"] == pytest.approx((row["loss_level0"] + row["loss_level1"]) / 2)
    assert row["skipped"] == 0


@pytest.mark.parametrize("loss", [LossConfig(), LossConfig(negatives="both_views"), LossConfig(name="byol")])
def test_a_few_steps_on_one_batch_lower_the_loss(loss):
    trainer = Trainer(dataclasses.replace(CONFIG, loss=loss), ALONE, 5)
    losses = [trainer.step(*batch(), measure=True)["loss"] for _ in range(12)]
    assert losses[-1] < 0.8 * losses[0]


def eval_norms(trainer):
    """Batch norms by running statistics: then a part's forward does not depend on the other parts."""
    trainer.model.eval()
    return trainer


def test_cached_gradients_equal_the_plain_step():
    plain = eval_norms(Trainer(CONFIG, ALONE, 5))
    parts = eval_norms(Trainer(with_train(micro_batches=4), ALONE, 5))
    for seed in range(3):
        a = plain.step(*batch(seed=seed), measure=True)
        b = parts.step(*batch(seed=seed), measure=True)
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-10)
        assert a["gradient_norm"] == pytest.approx(b["gradient_norm"], rel=1e-9)
    assert_same(tensors_of(plain), tensors_of(parts), rtol=1e-8, atol=1e-11)


def test_parts_move_running_statistics_once_a_part():
    trainer = Trainer(with_train(micro_batches=2), ALONE, 5)
    trainer.step(*batch(), measure=False)
    counts = {int(b) for n, b in trainer.model.named_buffers() if n.endswith("num_batches_tracked")}
    assert counts == {4}  # two views of each of two parts


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_non_finite_step_is_counted_and_changes_nothing(poison):
    trainer = Trainer(CONFIG, ALONE, 5)
    trainer.step(*batch(), measure=False)
    before = tensors_of(trainer)
    (first, second), video = batch(seed=1)
    first[0, 0, 0, 0] = poison
    row = trainer.step((first, second), video, measure=True)
    assert (row["skipped"], row["skipped_in_a_row"]) == (1, 1)
    after = tensors_of(trainer)
    assert after.pop("skipped").tolist() == [1, 1]
    before.pop("skipped")
    assert_same(before, after)
    row = trainer.step(*batch(seed=2), measure=True)
    assert (row["skipped"], row["skipped_in_a_row"]) == (1, 0)


def test_autocast_keeps_weights_and_loss_in_float32():
    trainer = Trainer(with_train(dtype="bfloat16", channels_last=True), ALONE, 5)
    row = trainer.step(*batch(dtype=torch.float32), measure=True)
    reference = Trainer(with_train(dtype="float32"), ALONE, 5).step(*batch(dtype=torch.float32), measure=True)
    assert row["loss"] == pytest.approx(reference["loss"], rel=0.05)
    assert row["loss"] != reference["loss"]
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}


def test_state_goes_through_a_file_and_continues_bit_for_bit(tmp_path):
    config = with_train(dtype="float32", channels_last=True)
    whole = Trainer(config, ALONE, 5)
    for seed in range(2):
        whole.step(*batch(seed=seed, dtype=torch.float32), measure=False)
    write(tmp_path / "c.safetensors", *whole.state())
    resumed = Trainer(dataclasses.replace(config, seed=99), ALONE, 5)
    resumed.load(read(tmp_path / "c.safetensors"))
    rows = [t.step(*batch(seed=5, dtype=torch.float32), measure=True) for t in (whole, resumed)]
    assert rows[0] == rows[1]
    assert_same(tensors_of(whole), tensors_of(resumed))


def test_a_checkpoint_of_another_model_is_refused_by_name(tmp_path):
    write(tmp_path / "c.safetensors", *Trainer(CONFIG, ALONE, 5).state())
    other = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, projector_out=4))
    with pytest.raises(UserError, match=r"c\.safetensors is of another model"):
        Trainer(other, ALONE, 5).load(read(tmp_path / "c.safetensors"))


def _rank(rank, config, folder):
    warnings.filterwarnings("error", ".*broadcast_buffers")  # which torch is about to take away
    world = init_distributed("cpu")
    trainer = Trainer(config, world, 5)
    half = slice(4 * rank, 4 * rank + 4)
    rows = []
    for seed in range(2):
        views, video = batch(seed=seed)
        rows.append(trainer.step(tuple(v[half] for v in views), video[half], measure=True))
    torch.save((tensors_of(trainer), rows), folder / f"{rank}.pt")


@pytest.mark.parametrize("case", ["plain", "parts"])
def test_two_ranks_with_half_the_batch_equal_one_with_the_whole(case, tmp_path):
    config = CONFIG
    if case == "parts":
        config = dataclasses.replace(with_train(micro_batches=2), loss=LossConfig(negatives="both_views"))
    spawn(_rank, 2, config, tmp_path)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert_same(results[0][0], results[1][0])
    whole = Trainer(config, ALONE, 5)
    for seed in range(2):
        views, video = batch(seed=seed)
        if case == "parts":  # a part's statistics span the ranks: clips 0, 1 and 4, 5 together
            order = torch.tensor([0, 1, 4, 5, 2, 3, 6, 7])
            views, video = tuple(v[order] for v in views), video[order]
        row = whole.step(views, video, measure=True)
        assert results[0][1][seed]["loss"] == pytest.approx(row["loss"], rel=1e-9)
        assert results[0][1][seed]["gradient_norm"] == pytest.approx(row["gradient_norm"], rel=1e-7)
    assert_same(results[0][0], tensors_of(whole), rtol=1e-6, atol=1e-9)


def test_compiled_networks_and_average_are_whole_graphs_and_make_the_same_step(monkeypatch):
    def whole_graph(branch, mode=None):
        return torch.compile(branch, backend="aot_eager", fullgraph=True)

    monkeypatch.setattr("vito_fast.train.trainer._compiled", whole_graph)
    plain = Trainer(with_train(micro_batches=2), ALONE, 5)
    compiled = Trainer(with_train(micro_batches=2, compile=True), ALONE, 5)
    for seed in range(3):
        with torch.compiler.set_stance("fail_on_recompile" if seed else "default"):  # though rates are other numbers
            rows = [t.step(*batch(seed=seed), measure=True) for t in (plain, compiled)]
        assert rows[0]["loss"] == pytest.approx(rows[1]["loss"], rel=1e-9)
    assert (
        len({plain.schedule.learning_rate(k) for k in range(3)}) == len({plain.schedule.tau(k) for k in range(3)}) == 3
    )
    assert_same(tensors_of(plain), tensors_of(compiled), rtol=1e-7, atol=1e-9)


def test_the_average_by_inductor_is_the_same(monkeypatch):
    """Networks eager, so that what differs is the average's; a step that is not finite changes nothing here either."""

    def average_alone(part, mode=None):
        return part if isinstance(part, torch.nn.Module) else torch.compile(part, fullgraph=True)

    monkeypatch.setattr("vito_fast.train.trainer._compiled", average_alone)
    plain, compiled = Trainer(CONFIG, ALONE, 5), Trainer(with_train(compile=True), ALONE, 5)
    for seed in range(2):
        for trainer in (plain, compiled):
            trainer.step(*batch(seed=seed), measure=False)
    assert_same(tensors_of(plain), tensors_of(compiled), rtol=1e-9, atol=1e-12)
    before = tensors_of(compiled)
    views, video = batch(seed=2)
    views[0][0, 0, 0, 0] = torch.nan
    compiled.step(views, video, measure=False)
    after = tensors_of(compiled)
    assert (before.pop("skipped").tolist(), after.pop("skipped").tolist()) == ([0, 0], [1, 1])
    assert_same(before, after)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_what_cuda_graphs_return_is_used_in_its_own_step_alone(monkeypatch, micro_batches):
    """A stand-in with the rule of graph trees: what a replay has returned is overwritten in the next step."""
    modes, returned, steps = {}, [], []

    def compiled(part, mode=None):
        modes[getattr(part, "__name__", type(part).__name__)] = mode

        def call(*args):
            out = part(*args)
            if mode == "reduce-overhead":
                returned.extend([*out.embeddings, *out.weights])
            return out

        return call

    def next_step():
        steps.append(len(returned))
        assert all(p.grad is None for p in graphed.model.parameters())  # what a graph returned, too
        for tensor in returned:
            tensor.detach().fill_(torch.nan)
        returned.clear()

    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", next_step)
    plain = Trainer(with_train(micro_batches=micro_batches, compile=True), ALONE, 5)
    assert set(modes.values()) == {None}
    graphed = Trainer(with_train(micro_batches=micro_batches, compile=True, cuda_graphs=True), ALONE, 5)
    assert modes == {"Branch": "reduce-overhead", "update_target": None}
    for seed in range(3):
        rows = [t.step(*batch(seed=seed), measure=seed % 2 == 0) for t in (plain, graphed)]
        assert rows[0] == rows[1]
    assert len(steps) == 3
    assert min(steps[1:]) > 0
    assert_same(tensors_of(plain), tensors_of(graphed))
