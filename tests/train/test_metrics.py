"""What a run says of itself: rates, utilisation, waiting, and the alarm for collapse."""

import dataclasses
import math
import sys
from types import SimpleNamespace

import pytest
import torch

from vito_fast import machine
from vito_fast.config import Config, ModelConfig, SamplerConfig, TrainConfig
from vito_fast.config_files import from_mapping
from vito_fast.errors import UserError
from vito_fast.plan.dryrun import clips_at_peak, dry_run, model_flops
from vito_fast.plan.hardware import GPUS, arithmetic_peak
from vito_fast.train import metrics
from vito_fast.train.distributed import World
from vito_fast.train.loss import embedding_rank, embedding_std
from vito_fast.train.metrics import Clock, Progress, Recorder, RowFile, SkipAlarm, warnings_of
from vito_fast.train.probe import CollapseAlarm, evaluation_sampler, histogram, knn_top1, top1

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
CONFIG = Config(
    sampler=SamplerConfig(size=32, views=2),
    model=ModelConfig(backbone="resnet18", projector_hidden=16, projector_out=8, attention_hidden=8),
    train=TrainConfig(batch_size=8, dtype="bfloat16"),
)


@pytest.fixture
def now(monkeypatch):
    """A clock that the test sets: ``now[0]`` seconds."""
    time = [100.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: time[0])
    return time


def test_a_pause_counts_neither_as_training_nor_as_waiting(now):
    clock = Clock(CPU, at_peak=100.0)
    now[0] += 3  # two steps, then an evaluation between two rows, then one more step
    clock.count(20, waited=0.5)
    clock.count(20, waited=0.25)
    with clock.paused():
        now[0] += 50
    now[0] += 1
    clock.count(20, waited=0.25)
    row = clock.timings(0)
    assert row["pairs_per_s"] == 15
    assert row["mfu"] == 0.15
    assert row["data_wait"] == 0.25
    assert row["seconds"] == 54
    clock.count(20, waited=0)  # in no row: its time is not counted either
    assert clock.rate == 15


def test_peaks_are_those_of_the_boards_in_the_table_alone():
    assert arithmetic_peak("NVIDIA H100 80GB HBM3", "bfloat16") == GPUS["h100"]["bf16"].value == 989e12
    assert arithmetic_peak("NVIDIA A100-SXM4-80GB", "float32") == GPUS["a100"]["tf32"].value
    for name in ("NVIDIA H100 PCIe", "NVIDIA H200 NVL", "NVIDIA A100-SXM4-80GB MIG 1g.10gb", "NVIDIA L4", ""):
        assert arithmetic_peak(name, "bfloat16") is None
    assert arithmetic_peak("NVIDIA B200", "float64") is None


def test_mfu_counts_the_method_not_what_saves_memory(monkeypatch):
    thrifty = dataclasses.replace(
        CONFIG,
        model=dataclasses.replace(CONFIG.model, checkpoint_activations=True),
        train=dataclasses.replace(CONFIG.train, micro_batches=2),
    )
    before = torch.get_rng_state()
    flops = model_flops(thrifty, 4, 2)
    assert torch.equal(torch.get_rng_state(), before)
    assert flops == dry_run(CONFIG, clips=4, world=2).total()[0] < dry_run(thrifty, clips=4, world=2).total()[0]
    assert clips_at_peak(thrifty) is None  # no GPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert clips_at_peak(thrifty) == pytest.approx(2 * 989e12 / (flops / 4))  # two GPUs, a step of 4 clips on each
    monkeypatch.setenv("RANK", "1")
    assert clips_at_peak(thrifty) is None  # the first rank alone reports it
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA L4")
    assert clips_at_peak(thrifty) is None


def test_the_collapse_alarm_rings_once_per_onset(capsys):
    alarm = CollapseAlarm(TrainConfig(collapse_std=0.05), 1)
    spreads = [(0.9, 0.8), (0.04, 0.8), (0.01, 0.02), (0.5, 0.5), (math.nan, 0.5), (0.5, 0.0)]
    found = [
        alarm({"step": i, "embedding_std_level0": a, "embedding_std_level1": b, "loss": 0.0})["collapsed"]
        for i, (a, b) in enumerate(spreads)
    ]
    assert found == [0, 1, 2, 0, 0, 1]
    said = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[1] for line in said] == ["step 1", "step 5"]
    assert "embedding_std_level0 0.04" in said[0]


def test_batches_without_negatives_are_told_once_per_onset(capsys):
    alarm = CollapseAlarm(TrainConfig(), 1)
    for step, chance in enumerate((1.5, 0.0, 0.0, 1.5)):
        alarm({"step": step, "loss": 0.0, "chance": chance})
    (said,) = capsys.readouterr().out.splitlines()
    assert said.startswith("warning: step 1: log(negatives + 1) is 0")


def test_the_collapse_alarm_sees_a_line_that_the_spread_does_not_show(capsys):
    train = TrainConfig(batch_size=64, collapse_rank=2.0)
    line = torch.zeros(2, 64, 32)
    line[..., 0] = torch.arange(-31.5, 32.5).sign()  # the two ends of a diameter: as spread as one dimension allows
    whole = torch.nn.functional.normalize(torch.randn(2, 64, 32, generator=torch.Generator().manual_seed(0)), dim=-1)
    spread, rank = embedding_std([line, whole]).tolist(), embedding_rank([line, whole]).tolist()
    assert spread[0] == pytest.approx(32**0.5 / 32)
    row = {"step": 3} | {f"embedding_std_level{i}": value for i, value in enumerate(spread)}
    row |= {f"embedding_rank_level{i}": value for i, value in enumerate(rank)}
    assert CollapseAlarm(train, 1)(row) == {"collapsed": 1}
    assert "step 3: embeddings collapse: embedding_rank_level0 1 (" in capsys.readouterr().out
    assert CollapseAlarm(train, 8)(row) == {"collapsed": 0}  # of eight clips a rank one expects no more


def test_neighbours_of_other_videos_vote_with_their_weight():
    pairs = torch.tensor([[1, 0.0], [1, 0], [1, 0.1], [1, 0.1]])  # a frame's own video would always be right
    assert knn_top1(pairs, torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 1, 1])) == 0
    angles = torch.tensor([0, 5, 40, 44, 48]).deg2rad()  # the first two have one near friend and three far others
    near = torch.stack([angles.cos(), angles.sin()], 1) * torch.arange(1, 6)[:, None]  # by direction, not length
    assert knn_top1(near, torch.tensor([0, 0, 1, 1, 1]), torch.arange(5)) == 1
    # One at cosine 0.9 from five of its class (383 000 each), and 0.8 from forty others (92 000), of whom 15 are heard.
    rows = torch.tensor([[1, 0, 0]] + 5 * [[0.9, 0.19**0.5, 0]] + 40 * [[0.8, 0, 0.6]])
    assert knn_top1(rows, torch.tensor(6 * [0] + 40 * [1]), torch.arange(46)) == 1
    assert math.isnan(knn_top1(rows / 0, torch.zeros(46, dtype=torch.int64), torch.arange(46)))


def test_without_a_terminal_there_is_a_line_a_minute_with_the_time_left(now, capsys):
    progress = Progress(1000, 0, show=True)
    row = {"loss": 1.5, "pairs_per_s": 10.0, "data_wait": 0.25}
    for step in range(1, 9):
        now[0] += 100 if step == 1 else 31
        progress.update(step, row if step in (1, 2) else None)
    assert capsys.readouterr().out.splitlines() == [
        "step 1/1000  loss 1.500  10 pairs/s  wait 25%",
        "step 3/1000  8:35:07 left",
        "step 5/1000  8:34:05 left",
        "step 7/1000  8:33:03 left",
    ]


def test_a_skipped_step_is_told_at_once_and_once_a_series(capsys):
    alarm = SkipAlarm(World(0, 1, 1, CPU))
    for step, counts in enumerate([(0, 0), (1, 1), (2, 2), (2, 0), (3, 1)], 1):
        alarm(step, torch.tensor(counts))
    assert [line.split(": ")[1] for line in capsys.readouterr().out.splitlines()] == ["step 2", "step 5"]


def test_threads_that_fight_are_told_with_the_setting_to_use(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(metrics.os, "getloadavg", lambda: (1.0, 1.0, 1.0))
    one, eight = World(0, 1, 1, CPU), World(0, 8, 8, CPU)
    assert warnings_of(CONFIG, one) == warnings_of(CONFIG, eight) == []
    (tmp_path / "cpu.max").write_text("400000 100000\n")  # a container's four cores of 64
    assert warnings_of(CONFIG, one)[0].endswith(
        "8 OpenMP threads on 4 cores wait for each other: set OMP_NUM_THREADS=4"
    )
    assert "8 ranks of 8 OpenMP threads on 4 cores" in warnings_of(CONFIG, eight)[0]
    (tmp_path / "cpu.max").write_text("max 100000\n")
    monkeypatch.setattr(metrics.os, "getloadavg", lambda: (90.0, 1.0, 1.0))
    assert "a load of 90 on 64 cores" in warnings_of(CONFIG, one)[0]
    assert warnings_of(CONFIG, World(0, 1, 1, GPU)) == []


def test_every_run_is_evaluated_by_the_same_sampler():
    sampler = evaluation_sampler(64)
    assert (sampler.size, sampler.views, sampler.frame_window, sampler.crop_area) == (64, 2, 2.56, (0.4, 1.0))


def test_a_color_histogram_ignores_places():
    images = torch.rand(1, 6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    shuffled = images.flatten(3)[..., torch.randperm(64)].view_as(images)
    assert torch.equal(histogram(images), histogram(shuffled))
    assert top1(histogram(images), histogram(shuffled)) == 1
    torch.testing.assert_close(histogram(images).square().sum(2), torch.full((1, 6), 64.0))


def test_a_threshold_of_collapse_that_cannot_be_is_refused():
    with pytest.raises(UserError, match=r"train\.collapse_std must be in \[0, 1\), got 1\.5"):
        from_mapping(Config(), {"train": {"collapse_std": 1.5}}, "x.yaml")


def fake_wandb(monkeypatch, calls):
    def init(**given):
        calls.append(given)
        return SimpleNamespace(
            log=lambda row: calls.append(row),
            finish=lambda: calls.append("finish"),
            define_metric=lambda *_, step_metric: calls.append(step_metric),
        )

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))


WANDB = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, wandb="videos"))


def test_rows_go_to_wandb_where_a_project_is_named(tmp_path, monkeypatch):
    calls = []
    fake_wandb(monkeypatch, calls)
    recorder = Recorder(tmp_path, 0, WANDB)
    recorder.log({"step": 1, "loss": 2.5, "mfu": None, "gradient_norm": math.nan})
    recorder.evaluation({"step": 1, "retrieval": 0.5})
    recorder.close()
    begun, *rest = calls
    assert (begun["project"], begun["name"], begun["resume"]) == ("videos", "run", "allow")
    assert begun["config"]["train"]["wandb"] == "videos"
    assert rest == ["step", {"train/loss": 2.5, "step": 1}, {"evaluation/retrieval": 0.5, "step": 1}, "finish"]


def test_a_wandb_id_is_one_runs_and_kept_when_it_resumes(tmp_path, monkeypatch):
    """Runs of the same name in two folders, or one begun anew, never write into each other."""
    calls = []
    fake_wandb(monkeypatch, calls)
    odd = dataclasses.replace(WANDB, name="a:b #1?" + "x" * 200)
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        Recorder(tmp_path / folder, 0, odd).close()
    Recorder(tmp_path / "a", 5, odd).close()
    Recorder(tmp_path / "a", 0, odd).close()
    first, second, resumed, anew = [call["id"] for call in calls if isinstance(call, dict)]
    assert first == resumed
    assert len({first, second, anew}) == 3
    assert all(id.isalnum() for id in (first, second, anew))
    assert all(len(call["name"]) <= 128 for call in calls if isinstance(call, dict))


def test_a_logger_that_fails_costs_a_line_and_no_row(tmp_path, monkeypatch, capsys):
    """W&B without a key; TensorBoard on a full disk; both come back when the run is resumed."""
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **_: 1 / 0))
    recorder = Recorder(tmp_path, 0, WANDB)
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_scalar", lambda *_: 1 / 0)
    for step in (1, 2):
        recorder.log({"step": step, "loss": 2.5})
    recorder.close()
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "warning: no W&B: division by zero; the run goes on",
        "warning: no more rows for TensorBoard: division by zero; the run goes on",
    ]
    assert [row["step"] for row in metrics.read_rows(tmp_path / "metrics.jsonl")] == [1, 2]
    calls = []
    fake_wandb(monkeypatch, calls)
    Recorder(tmp_path, 2, WANDB).close()
    assert calls[2:] == [{"train/loss": 2.5, "step": 1}, {"train/loss": 2.5, "step": 2}, "finish"]


def test_rows_that_a_full_disk_refuses_are_written_later(tmp_path, full_disk, capsys):
    file = RowFile(tmp_path / "m.jsonl", 0)
    file.append({"step": 1, "loss": 2.5})
    with full_disk(10):
        file.append({"step": 2, "loss": 1 / 3})
        file.append({"step": 3, "loss": 1.5})
        with pytest.raises(OSError, match=r"too large"):
            file.sync()
    file.append({"step": 4, "loss": 1.25})
    file.sync()
    assert [row["step"] for row in metrics.read_rows(file.path)] == [1, 2, 3, 4]
    assert capsys.readouterr().out.count("m.jsonl is behind: File too large") == 1
    file.close()


def test_rows_go_to_mlflow_where_an_experiment_is_named(tmp_path, monkeypatch):
    calls = []

    def start_run(run_id, run_name):
        calls.append((run_id, run_name))
        return SimpleNamespace(info=SimpleNamespace(run_id=run_id or "m1"))

    fake = SimpleNamespace(
        set_experiment=calls.append,
        start_run=start_run,
        log_dict=lambda mapping, name: calls.append(name),
        log_metrics=lambda row, step: calls.append((step, row)),
        end_run=lambda: calls.append("end"),
    )
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    named = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, mlflow="videos"))
    for start in (0, 1):
        recorder = Recorder(tmp_path, start, named)
        recorder.log({"step": start + 1, "loss": 2.5})
        recorder.close()
    assert calls[:5] == ["videos", (None, "run"), "config.json", (1, {"train/loss": 2.5}), "end"]
    assert calls[5:] == ["videos", ("m1", None), (2, {"train/loss": 2.5}), "end"]


@pytest.mark.parametrize("package", ["wandb", "mlflow"])
def test_a_logger_is_imported_only_when_asked_for_and_its_lack_is_one_line(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)  # importing it fails
    Recorder(tmp_path, 0, CONFIG).close()
    named = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, **{package: "videos"}))
    with pytest.raises(
        UserError, match=rf"train\.{package} is 'videos', and {package} is missing: pip install {package}"
    ):
        Recorder(tmp_path, 0, named)
