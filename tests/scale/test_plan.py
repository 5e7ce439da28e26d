"""The plan's arithmetic by hand, its anchor in a published figure, and its alternatives."""

import dataclasses
import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from vito_fast.cli.overrides import configured, run
from vito_fast.cli.plan import Plan
from vito_fast.config_files import load_config, preset_files
from vito_fast.data.store.index import ClipRecord, write_index
from vito_fast.errors import UserError
from vito_fast.model.backbones import resnet50
from vito_fast.plan.hardware import CALIBRATION, COMMON, GPUS, Constant, Machine, machine
from vito_fast.plan.op_counter import OpCounter, fake_cuda, to_fake_cuda
from vito_fast.plan.predict import PlanOptions, collectives, predict
from vito_fast.plan.report import summary

PAPER = "vito_r50_8xh100"
DOCUMENT = Path(__file__).resolve().parents[2] / "docs/planning.md"


def replaced(gpu, **values):
    """The machine with other constants."""
    known = machine(gpu)
    return Machine(gpu, {**known.constants, **{name: Constant(value, "", "a test") for name, value in values.items()}})


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A light configuration as a file, for the command line."""
    path = tmp_path_factory.mktemp("plan") / "small.yaml"
    path.write_text(
        "sampler: {size: 64, views: 2}\n"
        "model: {backbone: resnet18, projector_hidden: 64, projector_out: 32}\n"
        "train: {batch_size: 1024, dtype: bfloat16}\nschedule: {epochs: 10, epoch_clips: 0}\n"
    )
    return str(path)


def planned(capsys, *arguments):
    """The command's JSON."""
    assert run("plan", Plan, [*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_papers_setting_by_hand(capsys):
    plan = planned(capsys, PAPER)
    phases = {phase["name"]: phase for phase in plan["phases"]}
    images = 3 * 4096 / 8
    # ResNet-50 at 224: 4.089 G multiply-adds an image; the attention MLPs: 14*14 and 7*7 locations, C*C weights.
    backbone = images * 2 * 4.0894e9
    attention = images * 2 * (14 * 14 * 1024 * (1024 + 1) + 7 * 7 * 2048 * (2048 + 1))
    head = images * 2 * ((1024 + 2048) * 4096 + 4096 * 256)
    assert phases["target forward"]["flops"] == pytest.approx(backbone + attention + head, rel=1e-3)
    assert phases["online forward"]["flops"] == pytest.approx(backbone + attention + head, rel=1e-3)
    stem = images * 2 * 112 * 112 * 64 * 3 * 49  # no gradient reaches the pixels
    whole = 2 * phases["online forward"]["flops"] - stem
    # (the loss's gradient of the queries comes with its forward: 4 M N D a pair of views)
    assert phases["backward"]["flops"] == pytest.approx(whole, rel=1e-3)
    assert phases["loss"]["flops"] == 6 * 4 * 512 * 4096 * 256

    assert plan["steps"] == 300 * 1_280_000 / 4096 == 93_750
    frames = 3 * 4096
    assert plan["resources"]["decode"] == pytest.approx(frames / plan["decode_frames_per_s"]["jpeg, engine"])
    assert plan["decode_frames_per_s"]["jpeg, engine"] == pytest.approx(8 * 7 * 1000 * 500 * 375 * 0.5 / (455 * 256))
    assert plan["resources"]["gpu"] == pytest.approx(sum(phase["seconds"] for phase in plan["phases"]))
    assert plan["step_seconds"] == max(plan["resources"].values())
    assert plan["hours"] == pytest.approx(93_750 * plan["step_seconds"] / 3600)
    assert plan["kwh"] == pytest.approx(plan["hours"] * 10.2 * 0.85)
    gradients = 4 * (23_508_032 + 5_249_026 + 13_643_776)  # ResNet-50, attention MLPs, projector
    assert plan["gpu_memory"]["gradients"] == gradients
    assert plan["communication"]["gradients"]["takes"] == pytest.approx(
        2 * 7 / 8 * gradients / (450e9 * 0.8) + 8 * 20e-6  # one bucket of 1 MiB and seven of 25
    )
    assert plan["communication"]["gradients"]["exposed"] == 0
    assert plan["store_bytes"] == pytest.approx(1_180_000 * 5021 * 1024)
    assert plan["fits"]


def test_the_model_of_time_gives_the_published_speed_of_resnet50_on_an_a100(monkeypatch):
    """2470 images/s in mixed precision (NVIDIA DeepLearningExamples, batch 256), which its efficiencies come from: with
    torch's batch norm, sum and ReLU, not ours.
    """
    monkeypatch.setattr("vito_fast.model.norm.can_fuse", lambda *_: False)
    m, batch = machine("a100"), 256
    with torch.device("meta"):
        model = resnet50(levels=1)
    with fake_cuda(), OpCounter() as counter:
        to_fake_cuda(model, memory_format=torch.channels_last)
        x = torch.empty(batch, 3, 224, 224, device="cuda", memory_format=torch.channels_last)
        with counter.saving(), torch.autocast("cuda", torch.bfloat16):
            loss = model(x)[-1].mean((2, 3)).sum()
        counter.backward((loss, torch.ones_like(loss)))
    rate, reach = m["bf16"] * m["matmul_efficiency"], m["bandwidth"] * m["bandwidth_efficiency"]
    seconds = sum(n * max(op.flops / rate, op.bytes / reach) for op, n in counter.ops.items())
    assert batch / seconds == pytest.approx(2470, rel=0.05)


@pytest.mark.parametrize(
    ("flags", "bottleneck"),
    [
        (["--decoder", "cpu", "--cores", "8"], "decode (CPU cores)"),
        (["--format", "copy"], "decode (NVDEC)"),
        (["--train.dtype", "float32", "--gpu", "a100", "--sampler.size", "224"], "GPU arithmetic"),
        (["--train.compile"], None),
        (["--train.batch-size", "16384", "--gpus", "1", "--sampler.size", "128"], "GPU memory"),
        (["--gpus", "64"], None),
    ],
)
def test_each_alternative_is_the_plan_with_its_flag(capsys, small, flags, bottleneck):
    before = planned(capsys, small, *flags)
    if bottleneck:
        assert before["bottleneck"] == bottleneck
    assert len(before["alternatives"]) >= 2
    for flag, promised in before["alternatives"].items():
        after = planned(capsys, small, *merged(flags, flag.split()))
        for name in ("step_seconds", "hours", "kwh", "gpu_bytes"):
            assert after[name] == pytest.approx(promised[name], rel=1e-12)
        assert after["bottleneck"] == promised["bottleneck"]
    best = min(before["alternatives"].values(), key=lambda x: x["step_seconds"])
    assert best["step_seconds"] < before["step_seconds"]


def merged(flags, changed):
    """The flags with those of an alternative in their place."""
    kept = []
    for i, word in enumerate(flags):
        name = word if word.startswith("--") else flags[i - 1]
        if name not in changed:
            kept.append(word)
    return kept + changed


def test_more_of_the_bottleneck_moves_the_step_and_more_of_the_rest_does_not(small):
    config = load_config(small)
    options = PlanOptions(gpus=8, decoder="cpu", cores=8)
    base = predict(config, options)
    assert base.bottleneck == "decode (CPU cores)"
    # One core a rank drives its GPU; the rest decode, one at least.
    assert base.resources["decode"] == pytest.approx(2 * 1024 * 1.75e-3 / 1)
    assert predict(config, dataclasses.replace(options, cores=10)).step_seconds == pytest.approx(base.step_seconds / 2)
    faster = dataclasses.replace(base.machine, constants={**base.machine.constants, "bf16": GPUS["b200"]["bf16"]})
    assert predict(config, options, faster).step_seconds == base.step_seconds


def test_strong_scaling_and_the_network(small):
    config = load_config(small)
    one, eight, many = (predict(config, PlanOptions(gpus=n), replaced("h100", launch=1e-15)) for n in (1, 8, 16))
    assert one.communication["gradients"] == (0.0, 0.0)
    compute = lambda p: sum(x.seconds for x in p.phases if x.name in ("target forward", "online forward", "backward"))  # noqa: E731
    assert compute(one) == pytest.approx(8 * compute(eight), rel=0.07)  # weights are cast by every rank
    payload = 4 * eight.dry.parameters
    bus = min(GPUS["h100"]["link"].value, GPUS["h100"]["node_network"].value) * COMMON["link_efficiency"].value
    assert many.communication["gradients"][0] == pytest.approx(
        2 * 15 / 16 * payload / bus + collectives(config, many.dry)["gradients"] * 40e-6
    )


def test_every_op_takes_a_launch_and_fused_ones_fewer(small):
    config, one = load_config(small), PlanOptions(gpus=1)
    compiled = dataclasses.replace(config, train=dataclasses.replace(config.train, compile=True))
    for each, share in ((config, 1.0), (compiled, COMMON["compile_bytes"].value)):
        ops = {op: n for op, n in predict(each, one).dry.ops.items() if op.phase != "parameters"}
        launches = sum(n * (share if op.kind == "pointwise" else 1.0) for op, n in ops.items())
        slow, none = (predict(each, one, replaced("h100", launch=t)).resources["gpu"] for t in (1e-3, 1e-15))
        assert slow - none == pytest.approx(1e-3 * launches, rel=1e-6)


def test_calibration_replaces_constants_and_says_so(tmp_path, small, capsys):
    file = tmp_path / "measured.json"
    file.write_text(json.dumps({"machine": "a GPU box", "constants": {"bandwidth_efficiency": 0.36}}))
    before, after = planned(capsys, small), planned(capsys, small, "--calibrate", str(file))
    assert after["resources"]["gpu"] > before["resources"]["gpu"]
    assert machine("h100", file).constants["bandwidth_efficiency"].source.startswith("measured: a GPU box")
    for text, says in (
        ('{"machine": "x", "constants": {"speed": 1}}', "'speed' is no constant"),
        ('{"machine": "x", "constants": {"bf16": -1}}', "'bf16' is no constant of the plan or not a number above 0"),
        ('{"machine": "x", "constants": {"bf16": NaN}}', "'bf16' is no constant of the plan or not a number above 0"),
        ("[]", "cannot read the calibration .* must be like .*bandwidth_efficiency"),
        ("[" * 100_000, "cannot read the calibration"),
        ('{"bf16": 4e14}', "must be like .*constants"),
        ('{"machine": "x", "constants": [1]}', "must be like .*constants"),
        (f'{{"machine": "x", "constants": {{"bf16": 1{"0" * 400}}}}}', "'bf16' is no constant"),
        ("{", "cannot read the calibration"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=says):
            machine("h100", file)
    file.write_text(CALIBRATION)
    assert machine("h100", file)["bandwidth_efficiency"] == 0.6
    assert f"    {CALIBRATION}" in DOCUMENT.read_text(encoding="utf-8").splitlines()


def test_every_constant_has_a_source_that_says_what_kind_it_is(small, capsys):
    kinds = (
        "datasheet:",
        "published:",
        "measured:",
        "recalled:",
        "assumption:",
        "by construction:",
        "derived:",
        "this project",
    )
    for gpu in ("h100", "h200", "a100", "b200"):
        for name, constant in machine(gpu).constants.items():
            assert constant.source.startswith(kinds), (gpu, name)
            assert constant.value > 0
    assert run("plan", Plan, [small, "--assumptions"]) == 0
    printed = capsys.readouterr().out
    for name in machine("h100").constants:
        assert name in printed


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--gpu", "tpu"], "--gpu must be one of h100"),
        (["--gpu", "cpu"], "needs --calibrate"),
        (["--gpus", "0"], "--gpus must be at least 1"),
        (["--gpus", "5000"], "1024 does not divide among 5000 processes x 1 micro-batches"),
        (["--gpus", "7"], "1024 does not divide among 7 processes"),
        (["--train.micro_batches", "7"], "does not divide among 8 processes x 7 micro-batches: take a multiple of 56"),
        (["--clips", "1023"], "1023 clips are fewer than one batch of 1024"),
        (["--frame-bytes", "inf"], "--frame-bytes must be finite"),
        (["--gppu", "h100"], "did you mean"),
        (["--store", "/nowhere"], "cannot plan for the store /nowhere"),
        (["--calibrate", "/nowhere.json"], "cannot read the calibration"),
    ],
)
def test_mistakes_are_one_line(small, flags, says):
    with pytest.raises(UserError, match=says) as caught:
        run("plan", Plan, [small, *flags])
    assert "\n" not in str(caught.value)


def test_a_store_brings_its_own_numbers(tmp_path, small, capsys):
    frames = 8
    records = [
        ClipRecord(
            video=clip, source=f"{clip}.mp4", codec="mjpeg", width=64, height=48, shard=0, time_base=Fraction(1, 25),
            pts=np.arange(frames), offsets=np.arange(frames) * 100 + clip * frames * 100, sizes=np.full(frames, 100),
            checksums=np.zeros(frames, np.uint32), flags=np.ones(frames, np.uint8), end=frames,
        )
        for clip in range(2048)
    ]  # fmt: skip
    total = 2048 * frames * 100
    write_index(tmp_path / "index.bin", records, format="jpeg", shards=[("shard-00000.bin", total)])
    plan = planned(capsys, small, "--store", str(tmp_path))
    assert plan["options"]["clips"] == 2048
    assert plan["options"]["frame_bytes"] == 100
    assert plan["steps"] == 10 * (2048 // 1024)
    assert plan["resources"]["storage"] == pytest.approx(2 * 1024 * 100 / GPUS["h100"]["node_read"].value)
    (tmp_path / "store.json").write_text('{"version": 1, "options": {}, "sources": "", "report": {}}')
    plan = planned(capsys, small, "--store", str(tmp_path), "--data.where", "sources=1*")
    assert plan["options"]["clips"] == 1 + 10 + 100 + 1000


def test_tables_print_and_call_themselves_a_prediction(small, capsys):
    assert run("plan", Plan, [small]) == 0
    printed = capsys.readouterr().out
    for text in (
        "PREDICTION",
        "bottleneck:",
        "Alternatives",
        "kWh",
        "GPU: all",
        "jpeg, engine",
        "error: the one step that was",
    ):
        assert text in printed


@pytest.mark.parametrize(
    "preset", [p for p in preset_files() if "demo.yaml" not in p.read_text() and p.stem != "demo"], ids=lambda p: p.stem
)
def test_every_preset_of_the_papers_scale_quotes_its_plan(preset):
    lines = preset.read_text().splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("# Predicted, not measured, by: vito-fast plan "))
    plan = configured("plan", Plan, lines[at].split("vito-fast plan ")[1].split())
    assert f"#   {summary(predict(plan.config, plan.options))}" == lines[at + 1]
