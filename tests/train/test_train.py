"""Whole runs on a small real store: determinism, resuming, being killed, and what a run leaves behind."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from vito_fast.config import (
    Config,
    DataConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    SamplerConfig,
    ScheduleConfig,
    TrainConfig,
)
from vito_fast.config_files import save_config
from vito_fast.data.loader.loader import ClipLoader
from vito_fast.data.pack.pack import pack
from vito_fast.data.store.store import Store
from vito_fast.errors import UserError
from vito_fast.model.pair import Branch
from vito_fast.train import probe as monitor
from vito_fast.train import profiling
from vito_fast.train.attention_maps import load_online
from vito_fast.train.checkpoint import checkpoints, find, read, step_of, write
from vito_fast.train.loop import TrainingFailed, train
from vito_fast.train.metrics import TIMINGS, RowFile, read_rows
from vito_fast.train.trainer import Trainer

STEPS = 10
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def store(tmp_path_factory, make_clip):
    folder = tmp_path_factory.mktemp("videos")
    for seed in range(9):
        make_clip(folder / f"{seed}.mp4", seed)
    store = tmp_path_factory.mktemp("packed") / "store"
    assert pack(folder, store, progress=False, processes=1).clips == 9
    return store


@pytest.fixture
def config(store, tmp_path):
    return Config(
        name="r",
        data=DataConfig(store=str(store), threads=1),
        sampler=SamplerConfig(size=32, views=2),
        model=ModelConfig(backbone="timm:test_resnet", projector_hidden=16, projector_out=8, attention_hidden=8),
        optimizer=OptimizerConfig(base_lr=16.0),
        schedule=ScheduleConfig(epochs=STEPS / 2, epoch_clips=0, warmup_epochs=1, base_ema=0.9),
        train=TrainConfig(batch_size=4, log_every=2, checkpoint_every=3, evaluate_every=4, runs=str(tmp_path / "runs")),
    )


def renamed(config, name):
    return dataclasses.replace(config, name=name)


def rows(config, file="metrics.jsonl"):
    run = os.path.join(config.train.runs, config.name, file)
    with open(run) as lines:
        return [{k: v for k, v in json.loads(line).items() if k not in TIMINGS} for line in lines]


def final(config):
    return read(checkpoints(run_of(config) / "checkpoints")[0])


def run_of(config):
    return Path(config.train.runs) / config.name


def assert_same_end(a, b):
    assert rows(a) == rows(b)
    assert rows(a, "evaluations.jsonl") == rows(b, "evaluations.jsonl")
    left, right = final(a), final(b)
    assert left.state["step"] == right.state["step"] == STEPS
    assert left.tensors.keys() == right.tensors.keys()
    for name, tensor in left.tensors.items():
        assert torch.equal(tensor, right.tensors[name]), name


def test_a_run_leaves_what_the_docs_say(config, capsys):
    summary = train(config)
    out = capsys.readouterr().out.splitlines()
    run = run_of(config)
    assert {"config.yaml", "metrics.jsonl", "evaluations.jsonl", "tensorboard", "checkpoints", "summary.json"} <= {
        p.name for p in run.iterdir()
    }
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in logged] == [1, 2, 4, 6, 8, 10]
    for row in logged:
        assert {"step", "loss", "pairs_per_s", "data_wait", *TIMINGS} <= row.keys()
        assert 0 <= row["data_wait"] <= 1
        assert row["pairs_per_s"] > 0
        assert row["collapsed"] == 0
        if not torch.cuda.is_available():
            assert row["mfu"] is None
    assert [row["step"] for row in rows(config, "evaluations.jsonl")] == [0, 4, 8, 10]
    assert out[-1] == f"checkpoint: {summary['checkpoint']}"
    assert find(run, pytest.fail).state["step"] == STEPS
    assert summary["first_loss"] == logged[0]["loss"]
    assert summary["last_loss"] == logged[-1]["loss"]
    for word in ("untrained", "raw pixels", "log(negatives + 1)", "pairs/s", "first", "last"):
        assert any(word in line for line in out[-8:]), word  # warnings of a run so short stand between
    assert len(checkpoints(run / "checkpoints")) == config.train.keep_last


def pictures(config):
    return {p.name: p.read_bytes() for p in sorted((run_of(config) / "attention").glob("*"))}


def test_evaluations_leave_attention_pictures_and_the_numbers_alone(config, monkeypatch):
    without = renamed(config, "without")
    train(config)
    with monkeypatch.context() as patch:
        patch.setattr(monitor, "picture", lambda *_: None)
        train(without)
    assert_same_end(config, without)
    drawn = pictures(config)
    assert list(drawn) == [f"step-{step:08d}.png" for step in (4, 8, 10)]
    assert len(set(drawn.values())) == 3  # the same frames, other attention
    again = renamed(config, "again")
    for stop in (5, None):
        train(again, resume=True, max_steps=stop)
    assert drawn.items() <= pictures(again).items()
    average = dataclasses.replace(config, name="average", model=dataclasses.replace(config.model, pooling="average"))
    train(average, max_steps=1)
    assert pictures(average) == {}


def test_a_picture_shows_evaluation_mode_and_leaves_the_branch_training(config, tmp_path):
    frames = monitor.draw(config, 9)
    assert frames.shown.shape == (6, 32, 64, 3)
    branch = Branch(config.model, predictor=True).train()
    before = {k: v.clone() for k, v in branch.state_dict().items()}
    monitor.picture(branch, frames, tmp_path / "trained.png")
    assert all(m.training for m in branch.modules())
    assert all(torch.equal(v, before[k]) for k, v in branch.state_dict().items())
    monitor.picture(branch.eval(), frames, tmp_path / "evaluated.png")
    assert (tmp_path / "trained.png").read_bytes() == (tmp_path / "evaluated.png").read_bytes()


def test_folders_of_videos_are_classes_at_evaluations(config, make_clip, tmp_path):
    for folder, seeds in (("train/cats", range(4)), ("test/dogs", range(4, 6))):
        (tmp_path / folder).mkdir(parents=True)
        for seed in seeds:
            make_clip(tmp_path / folder / f"{seed}.mp4", seed)
    pack(tmp_path, tmp_path / "store", progress=False, processes=1)
    classes = dataclasses.replace(config, data=dataclasses.replace(config.data, store=str(tmp_path / "store")))
    train(classes, max_steps=1)
    (found,) = (row for row in rows(classes, "evaluations.jsonl") if row["step"] == 1)
    assert found["knn_chance"] == 4 / 6
    assert 0 <= found["knn_top1"] <= 1
    frames = monitor.draw(classes, 6)
    sources = [Store(tmp_path / "store").index.clip(clip).source for clip in range(6)]  # a clip is a video here
    assert ["cats" in sources[video] for video in frames.video] == frames.label.eq(0).tolist()
    assert sorted(frames.video.unique().tolist()) == list(range(6))
    assert monitor.draw(config, 9).label is None  # all in no folder
    loose = dataclasses.replace(config, name="loose")
    train(loose, max_steps=1)
    assert not any(key.startswith("knn") for row in rows(loose, "evaluations.jsonl") for key in row)


def test_evaluations_are_compared_among_as_many_clips(config):
    """A run that goes on with other ``evaluate_clips`` tells no share of nine clips beside one of four."""
    few = dataclasses.replace(config, name="few", train=dataclasses.replace(config.train, evaluate_clips=4))
    train(few, max_steps=1)
    train(config, max_steps=4)
    goes_on = dataclasses.replace(config, train=few.train)
    stopped = train(goes_on, resume=True, max_steps=5)["retrieval"]
    assert [row["clips"] for row in rows(config, "evaluations.jsonl")] == [9, 9, 4]
    begun = {name: value for name, value in rows(few, "evaluations.jsonl")[0].items() if name != "step"}
    assert begun["clips"] == 4
    assert begun.items() <= stopped.items()
    again = train(config, resume=True, max_steps=5)["retrieval"]  # the same step among nine clips again
    assert again["clips"] == 9
    assert [(row["step"], row["clips"]) for row in rows(config, "evaluations.jsonl")[-2:]] == [(5, 4), (5, 9)]
    assert again["trained"] == rows(config, "evaluations.jsonl")[-1]["retrieval"]


def test_evaluations_put_up_with_as_many_bad_clips_as_training(config, monkeypatch):
    asked = []
    monkeypatch.setattr(monitor, "ClipLoader", lambda *_, **options: asked.append(options) or ClipLoader(*_, **options))
    monitor.draw(dataclasses.replace(config, data=dataclasses.replace(config.data, max_bad_share=0.9)), 9)
    assert [options["max_bad_share"] for options in asked] == [0.9]


def test_a_damaged_clip_costs_the_pictures_and_not_the_run(config, monkeypatch, capsys):
    def damaged(*_):
        raise OSError("clip 3: cut short")

    monkeypatch.setattr(monitor, "video_frames", damaged)
    train(config, max_steps=1)
    assert "warning: no attention pictures: clip 3: cut short" in capsys.readouterr().out
    assert pictures(config) == {}


def test_the_same_seed_gives_the_same_run_and_another_another(config):
    again, other = renamed(config, "again"), dataclasses.replace(config, name="other", seed=1)
    for c in (config, again, other):
        train(c)
    assert_same_end(config, again)
    assert [r["loss"] for r in rows(other)] != [r["loss"] for r in rows(config)]


def test_interrupted_runs_equal_uninterrupted_ones(config):
    whole, parts = config, renamed(config, "parts")
    train(whole)
    for stop in (1, 5, 5, 8, None):
        train(parts, resume=True, max_steps=stop)
    assert [r for r in rows(parts, "evaluations.jsonl") if r["step"] in (0, 4, 8, 10)] == rows(
        whole, "evaluations.jsonl"
    )
    steps = [row["step"] for row in rows(whole)]
    assert rows(whole) == [row for row in rows(parts) if row["step"] in steps]  # which has its stops as well
    left, right = final(whole), final(parts)
    assert all(torch.equal(t, right.tensors[n]) for n, t in left.tensors.items())
    train(parts, resume=True)  # finished: says so again, and changes nothing
    assert rows(whole) == [row for row in rows(parts) if row["step"] in steps]


def start(config, *more):
    """The run as a process of its own."""
    path = run_of(config).parent.parent / f"{config.name}.yaml"
    save_config(config, path)
    command = [sys.executable, "-m", "vito_fast", "train", str(path), "--resume", *more]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | ONE_THREAD
    )


def wait_for_step(config, step, process):
    path = run_of(config) / "metrics.jsonl"
    for _ in range(3000):
        if any(r["step"] >= step for r in read_rows(path)) or process.poll() is not None:
            return
        time.sleep(0.02)
    pytest.fail(f"no step {step} within a minute")


def test_a_process_killed_by_kill_9_resumes_to_the_same_end(config):
    whole, killed = config, renamed(config, "killed")
    train(whole)
    process = start(killed)
    wait_for_step(killed, 4, process)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process = start(killed)
    assert process.wait(300) == 0, process.stderr.read()
    assert_same_end(whole, killed)


def test_torchrun_with_two_ranks_makes_the_run_of_one(config):
    whole = dataclasses.replace(config, train=dataclasses.replace(config.train, dtype="float64"))
    ranks = renamed(whole, "ranks")
    train(whole)
    path = run_of(ranks).parent.parent / "ranks.yaml"
    save_config(ranks, path)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "vito_fast", "train", str(path)]
    subprocess.run(command, check=True, timeout=300, env=os.environ | ONE_THREAD)
    assert final(ranks).state["ranks"] == 2
    for one, two in zip(rows(whole), rows(ranks), strict=True):
        assert one["step"] == two["step"]
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)
    left, right = final(whole).tensors, final(ranks).tensors
    for name in left:
        if name.startswith("model.online.") and left[name].is_floating_point():
            torch.testing.assert_close(left[name], right[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signals_save_and_end(config, number):
    long = dataclasses.replace(
        config,
        schedule=dataclasses.replace(config.schedule, epochs=5000),
        train=dataclasses.replace(config.train, checkpoint_every=100000),
    )
    process = start(long)
    wait_for_step(long, 2, process)
    process.send_signal(number)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 128 + number, err
    assert out.splitlines()[-1].startswith("checkpoint: ")
    assert f"stopped by {number.name}" in out
    last = final(long).state["step"]
    assert last >= 2
    assert f"step-{last:08d}" in out
    assert all(r["step"] <= last for r in rows(long))


def test_signals_are_as_they_were_after_an_error_before_the_first_step(config, monkeypatch):
    def fails(*_):
        raise RuntimeError("before the first step")

    monkeypatch.setattr("vito_fast.train.loop.Clock", fails)
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
    with pytest.raises(RuntimeError, match="before the first step"):
        train(config)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)] == before


def test_a_torn_newest_checkpoint_is_named_and_the_one_before_used(config, capsys):
    whole, torn = config, renamed(config, "torn")
    train(whole)
    train(torn, max_steps=7)
    newest = checkpoints(run_of(torn) / "checkpoints")[0]
    newest.write_bytes(newest.read_bytes()[:-100])
    train(torn, resume=True)
    assert f"warning: {newest}" in capsys.readouterr().out
    assert rows(whole) == rows(torn)  # step 7, logged as the last of its process, came after the checkpoint in use


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("damage", ["cut short", "of a newer program"])
def test_a_run_without_a_usable_checkpoint_is_not_written_over(config, damage, resume):
    train(config, max_steps=7)
    for path in checkpoints(run_of(config) / "checkpoints"):
        whole = path.read_bytes()
        path.write_bytes(whole[:-100] if damage == "cut short" else whole.replace(b'"version":"1"', b'"version":"2"'))
    before = files(run_of(config))
    reason = "is torn" if damage == "cut short" else "is a checkpoint of version 2"
    with pytest.raises(UserError, match=rf"step-00000007\.safetensors {reason}.*another --name"):
        train(config, resume=resume)
    assert files(run_of(config)) == before


def test_runs_are_not_overwritten_or_continued_as_others(config, tmp_path):
    train(config, max_steps=3)
    with pytest.raises(UserError, match="already holds a run"):
        train(config)
    other = dataclasses.replace(config, loss=dataclasses.replace(config.loss, temperature=0.2))
    with pytest.raises(UserError, match=r"other values of loss\.temperature"):
        train(other, resume=True)


def test_a_run_goes_on_with_its_own_data_only(config, tmp_path, make_clip):
    """Equal files packed again with equal options are its own; as many clips of others are not."""

    def packed(name, seeds, **options):
        (tmp_path / name).mkdir()
        for i, seed in enumerate(seeds):
            make_clip(tmp_path / name / f"{i}.mp4", seed)
        pack(tmp_path / name, tmp_path / f"{name} store", progress=False, processes=1, **options)
        return dataclasses.replace(config, data=dataclasses.replace(config.data, store=str(tmp_path / f"{name} store")))

    train(config, max_steps=1)
    other = packed("other files", range(20, 29))
    with pytest.raises(UserError, match=rf"on another store than {other.data.store}, packed with other sources: "):
        train(other, resume=True)
    with pytest.raises(UserError, match="packed with other format, short_side: "):
        train(packed("other options", range(9), format="h264", short_side=48), resume=True)
    assert train(packed("again", range(9), shard_mib=1), resume=True, max_steps=2)["step"] == 2
    path = checkpoints(run_of(config) / "checkpoints")[0]
    found = read(path)
    write(path, found.tensors, {k: v for k, v in found.state.items() if k != "store"})  # as they once were
    assert train(other, resume=True, max_steps=3)["step"] == 3


def test_two_runs_of_one_name_are_not_written_at_once(config, monkeypatch):
    long = dataclasses.replace(config, schedule=dataclasses.replace(config.schedule, epochs=5000))
    process = start(long)
    wait_for_step(long, 4, process)
    with monkeypatch.context() as patch:
        patch.setattr("vito_fast.train.distributed.LOCK_TIMEOUT", 0.2)
        with pytest.raises(UserError, match=rf"another process is writing the run {run_of(long)}: .*another --name"):
            train(long, resume=True)
    threading.Timer(0.5, process.kill).start()  # as a launcher that starts the ranks again while the old ones end
    begun = read(checkpoints(run_of(long) / "checkpoints")[0]).state["step"]
    train(long, resume=True, max_steps=begun + 20)
    assert process.wait() == -signal.SIGKILL


def test_user_mistakes_are_user_errors(config, tmp_path):
    cases = {
        "is no store": dataclasses.replace(config, data=DataConfig(store=str(tmp_path))),
        "fewer than one batch": dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=64)),
        "does not divide": dataclasses.replace(config, train=dataclasses.replace(config.train, micro_batches=3)),
        "cannot write": dataclasses.replace(config, train=dataclasses.replace(config.train, runs="/proc/nowhere")),
        "no usable GPU": dataclasses.replace(config, train=dataclasses.replace(config.train, device="cuda")),
    }
    graphs = dataclasses.replace(config.train, compile=True, cuda_graphs=True)
    cases["cuda_graphs is for one GPU, and this run is on the CPU"] = dataclasses.replace(config, train=graphs)
    if torch.cuda.is_available():
        for says in [says for says in cases if "GPU" in says]:
            del cases[says]
    for says, wrong in cases.items():
        with pytest.raises(UserError, match=says) as error:
            train(wrong)
        assert "\n" not in str(error.value)


def test_a_store_of_one_video_has_no_negatives(config, tmp_path, make_clip):
    make_clip(tmp_path / "one.mp4", 0)
    pack(tmp_path / "one.mp4", tmp_path / "store", clip_length=0.2, min_length=0.1, progress=False, processes=1)
    one = dataclasses.replace(config, data=dataclasses.replace(config.data, store=str(tmp_path / "store")))
    with pytest.raises(UserError, match=r"all \d+ clips .*of one video, one\.mp4, .*pack more videos, or .*byol"):
        train(one)
    train(dataclasses.replace(one, loss=LossConfig(name="byol")), max_steps=1)


def test_a_run_that_stays_non_finite_stops_with_evidence(config):
    bad = dataclasses.replace(
        config,
        optimizer=dataclasses.replace(config.optimizer, base_lr=1e30),
        train=dataclasses.replace(config.train, max_bad_steps=3, log_every=1),
    )
    with pytest.raises(TrainingFailed, match=r"steps in a row .*non_finite\.json"):
        train(bad)
    evidence = json.loads((run_of(bad) / "non_finite.json").read_text())
    assert int(evidence["row"]["skipped_in_a_row"]) >= 3
    assert len(evidence["sample"]) == 4


def test_restarts_of_a_run_that_fails_keep_its_good_checkpoints(config, monkeypatch):
    """Every start saves each step, as skipped ones too would, and torchrun starts it again and again."""
    often = dataclasses.replace(config.train, max_bad_steps=3, log_every=1, checkpoint_every=1)
    failing, honest = dataclasses.replace(config, train=often), Trainer._finite

    def poisoned(self, loss, norm):
        return honest(self, loss * (torch.nan if self.step_count > 3 else 1), norm)

    monkeypatch.setattr(Trainer, "_finite", poisoned)
    for _ in range(3):
        with pytest.raises(TrainingFailed, match="the checkpoints are of before"):
            train(failing, resume=True)
        assert [step_of(path) for path in checkpoints(run_of(config) / "checkpoints")] == [4, 3]
    assert final(failing).tensors["skipped"].tolist() == [0, 0]


def test_a_row_file_continues_after_its_step_and_drops_a_torn_line(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    file = RowFile(path, 2)
    file.append({"step": 3, "x": 1})
    file.close()
    assert read_rows(path) == [{"step": 1}, {"step": 2}, {"step": 3, "x": 1}]
    RowFile(path, 0).close()
    assert read_rows(path) == []


def test_the_online_branch_of_a_checkpoint_gives_attention(config):
    train(config, max_steps=1)
    branch = load_online(find(run_of(config), pytest.fail))
    out = branch(torch.zeros(2, 3, 32, 32))
    assert [z.shape for z in out.embeddings] == [(2, 8)]


PARTS = ["data", "target", "online", "loss", "backward", "optimizer", "average"]


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_profile_has_the_parts_of_the_steps_after_warm_up(config, capsys, micro_batches):
    parts = dataclasses.replace(config.train, micro_batches=micro_batches, evaluate_every=0)
    config = dataclasses.replace(config, train=parts, schedule=dataclasses.replace(config.schedule, epochs=10))
    train(config, profile=True, max_steps=profiling.WARM_UP + profiling.STEPS + 2)
    path = run_of(config) / "profile" / f"step-{profiling.WARM_UP + profiling.STEPS:08d}.json"
    assert capsys.readouterr().out.splitlines()[-1] == f"profile: {path}"
    events = json.loads(path.read_text())["traceEvents"]
    ranges = [e for e in events if e.get("cat") == "user_annotation" and e["name"] in PARTS]
    ranges.sort(key=lambda event: event["ts"])
    names = [e["name"] for e in ranges]
    assert list(dict.fromkeys(names)) == PARTS  # in the order of the step
    assert names.count("data") == names.count("average") == profiling.STEPS
    assert names.count("backward") == profiling.STEPS * micro_batches


def test_a_profile_of_too_short_a_run_says_so_and_no_trace_is_taken_unasked(config, capsys):
    train(config, profile=True, max_steps=3)
    assert capsys.readouterr().out.splitlines()[-1] == "profile: none, the run ended within 10 steps"
    train(config, resume=True, max_steps=4)
    assert not (run_of(config) / "profile").exists()
