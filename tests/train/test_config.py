"""Presets, YAML loading and its one-line errors."""

import math
from dataclasses import fields, replace

import pytest

from vito_fast.config import Config, DataConfig, LossConfig, OptimizerConfig, ScheduleConfig, TrainConfig
from vito_fast.config_files import (
    RENAMED,
    dotted_names,
    load_config,
    method_differences,
    preset_files,
    save_config,
    to_mapping,
)
from vito_fast.errors import UserError

PRESETS = {p.stem: p for p in preset_files()}


@pytest.fixture
def write(tmp_path):
    def _write(text, name="c.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return _write


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_load_and_survive_saving(name, tmp_path):
    config = load_config(name)
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


def test_ablations_differ_from_the_demo_in_what_they_name():
    changed = {
        "ablation_same_frame": {"sampler.frame_window"},
        "ablation_average_pooling": {"model.pooling"},
        "ablation_single_level": {"model.levels"},
        "ablation_crop_08": {"sampler.crop_area"},
        "ablation_window_1_28": {"sampler.frame_window"},
        "ablation_window_3_2": {"sampler.frame_window"},
        "ablation_fixed_frames": {"sampler.fixed_frames"},
        "ablation_joint_batch_norm": {"model.batch_norm"},
        "ablation_two_views": {"sampler.views"},
        "ablation_moclr": {"sampler.frame_window", "sampler.crop_area", "model.levels", "model.pooling"},
        "ablation_per_level": {"model.heads", "model.predictor"},
        "ablation_byol": {"loss.name", "model.predictor", "schedule.base_ema"},
    }
    base = load_config("demo")
    for name, changes in changed.items():
        assert set(method_differences(base, load_config(name))) == changes


def test_detcon_b_and_the_paper_level_presets_state_the_method():
    detcon = load_config("detcon_b")
    assert (detcon.optimizer.base_lr, detcon.optimizer.weight_decay, detcon.schedule.base_ema) == (0.2, 1.5e-6, 0.996)
    assert detcon.loss.negatives == "both_views"
    assert (detcon.model.predictor, detcon.sampler.views, detcon.schedule.warmup_epochs) == (True, 2, 3)
    paper = load_config("vito_r50_8xh100")
    assert method_differences(paper, replace(Config(), seed=paper.seed)) == []


def test_defaults_are_the_methods():
    c = Config()
    assert (c.optimizer.base_lr, c.optimizer.weight_decay, c.optimizer.momentum, c.optimizer.trust_coefficient) == (
        0.3,
        1e-6,
        0.9,
        1e-3,
    )
    assert (c.schedule.epochs, c.schedule.base_ema, c.train.batch_size) == (300, 0.99, 4096)
    assert (c.model.heads, c.model.predictor, c.sampler.views) == ("concatenated", False, 3)
    assert c.schedule.epochs * c.steps_per_epoch(1000) == 93_750  # on any store
    assert (c.model.projector_hidden, c.model.projector_out, c.model.levels, c.loss.temperature) == (4096, 256, 2, 0.1)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("optimizer:\n  bas_lr: 1\n", "unknown key 'optimizer.bas_lr'; did you mean 'optimizer.base_lr'?"),
        ("optimiser:\n  base_lr: 1\n", "unknown key 'optimiser'; did you mean 'optimizer'?"),
        ("temperature: 1\n", "unknown key 'temperature'; did you mean 'loss.temperature'?"),
        ("loss:\n  temperature: warm\n", "'loss.temperature' must be a number, got 'warm'"),
        ("loss:\n  temperature: true\n", "'loss.temperature' must be a finite number, got True (bool)"),
        ("loss:\n  temperature: .nan\n", "'loss.temperature' must be a finite number, got nan"),
        ("loss:\n  temperature: 0\n", "loss.temperature must be above 0, got 0.0"),
        ("train:\n  batch_size: 1.5\n", "'train.batch_size' must be a whole number, got 1.5 (float)"),
        ("train:\n  batch_size: -2\n", "train.batch_size must be at least 1, got -2"),
        ("train: {cuda_graphs: true}\n", "train.cuda_graphs must be false without train.compile, got True"),
        (
            "train: {cuda_graphs: true, compile: true, device: cpu}\n",
            "train.cuda_graphs must be false without a GPU, got True",
        ),
        ("train: 3\n", "'train' is a section"),
        ("model:\n  predictor: 1\n", "'model.predictor' must be true or false, got 1 (int)"),
        ("loss:\n  name: bryol\n", "must be one of contrastive, byol, got 'bryol'; did you mean 'byol'?"),
        ("sampler:\n  crop_area: [0.4]\n", "'sampler.crop_area' must be a list of 2 numbers, got [0.4]"),
        ("sampler:\n  crop_area: [0.4, x]\n", "'sampler.crop_area' must be a number, got 'x'"),
        ("sampler:\n  crop_area: 0.4\n", "'sampler.crop_area' must be a list of 2 numbers"),
        ("sampler:\n  views: 9\n", "views"),
        ("name: a/b\n", "name must be a folder's name, got 'a/b'"),
        ('name: "a\\nb"\n', "name must be a folder's name, got 'a\\nb'"),
        ('data: {store: "a\\0b"}\n', "'data.store' must be text without NUL"),
        ("seed: 18446744073709551616\n", "seed must be 0 to 2^63 - 1, got 18446744073709551616"),
        ("data: {prefetch: -1}\n", "data.prefetch must be 0 or more, got -1"),
        ("data: {threads: -1}\n", "data.threads must be 0 to 1024, got -1"),
        ("data: {threads: 100000}\n", "data.threads must be 0 to 1024, got 100000"),
        ("data: {max_bad_share: 5}\n", "data.max_bad_share must be in [0, 1], got 5.0"),
        (f"schedule: {{epochs: 1{'0' * 400}}}\n", "'schedule.epochs' must be a finite number"),
        ("schedule: {epochs: 1e300}\n", "schedule.epochs must be above 0, and at most 1e9, got 1e+300"),
        ("train: {batch_size: 1}\n", "train.batch_size must be at least 2 with the contrastive loss"),
        ("[" * 5000, "nested too deeply"),
        ("seed: 2001-99-99\n", "cannot read the configuration"),
        ('extends: "a\\0b"\n', "cannot read the configuration"),
        ("- 1\n", "a configuration is a mapping"),
        ("a: [\n", "not valid YAML"),
        ("1: 2\n", "unknown key '1'"),
        ("extends: nothing.yaml\n", "nothing.yaml"),
    ],
)
def test_mistakes_name_key_and_file_in_one_line(write, text, says):
    path = write(text)
    with pytest.raises(UserError) as error:
        load_config(path)
    message = str(error.value)
    assert says in message
    assert "\n" not in message
    assert str(path.parent) in message


def test_one_clip_is_a_batch_without_negatives(write):
    assert load_config(write("loss: {name: byol}\ntrain: {batch_size: 1}\n")).train.batch_size == 1


def test_one_view_has_no_other_to_be_compared_with(write):
    for kind in ("contrastive", "byol"):
        with pytest.raises(UserError, match=r"sampler\.views must be 2 to 4: the loss compares views of a clip, got 1"):
            load_config(write(f"loss: {{kind: {kind}}}\nsampler: {{views: 1}}\n"))


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_numbers_are_finite_wherever_they_come_from(value):
    for section in (DataConfig, LossConfig, OptimizerConfig, ScheduleConfig, TrainConfig):
        for field in fields(section):
            if field.type in (float, "float"):
                with pytest.raises(ValueError, match=f"{field.name} must be a finite number, got {value}"):
                    section(**{field.name: value})


def test_a_batch_is_shared_out_evenly_or_refused():
    assert TrainConfig(batch_size=32, micro_batches=2).clips(4) == 8
    with pytest.raises(UserError, match=r"32 does not divide among 4 processes x 3 .*: take a multiple of 12"):
        TrainConfig(batch_size=32, micro_batches=3).clips(4)


def test_a_circle_of_extends_is_refused(write):
    write("extends: b.yaml\n", "a.yaml")
    write("extends: a.yaml\n", "b.yaml")
    with pytest.raises(UserError, match="circle"):
        load_config(write("extends: a.yaml\n"))
    path = write("", "itself.yaml")
    path.write_text(f"extends: ../{path.parent.name}/itself.yaml\n")
    with pytest.raises(UserError, match=r"itself\.yaml: 'extends' goes in a circle") as error:
        load_config(path)
    assert len(str(error.value)) < 1000


def test_extends_changes_only_what_it_names(write):
    write("seed: 7\nloss: {temperature: 0.2}\n", "base.yaml")
    config = load_config(write("extends: base.yaml\nloss: {negatives: both_views}\n"))
    assert (config.seed, config.loss) == (7, LossConfig(temperature=0.2, negatives="both_views"))


def test_old_names_still_work_and_say_so(write, caplog):
    for old, new in RENAMED.items():
        section, _, field = new.rpartition(".")
        assert old.rpartition(".")[0] == section
        value = to_mapping(Config())[section][field]
        text = "schedule: {epoch_clips: 1280000}\n"
        text += f"{section}: {{{old.rpartition('.')[2]}: {value}}}\n"
        assert load_config(write(text)) == Config(name="c")
        assert f"{old} is now {new}" in caplog.messages[-1]
    with pytest.raises(UserError, match=r"'sampler.crop_area' is given twice, as 'sampler.area' too"):
        load_config(write("sampler: {crop_area: [0.1, 1], area: [0.2, 1]}\n"))


def test_files_of_version_0_1_keep_their_meaning(write, caplog):
    old = load_config(write("model: {backbone: resnet18, scales: 2}\nsampler: {window: 1.5}\nschedule: {epochs: 3}\n"))
    assert (old.model.heads, old.model.predictor, old.sampler.views) == ("per_level", True, 2)
    assert (old.sampler.blur, old.sampler.solarize, old.sampler.frame_window) == ((1.0, 0.1), (0.0, 0.2), 1.5)
    assert old.schedule.epochs * old.steps_per_epoch(8192) == 3 * 2
    assert "of version 0.1, whose defaults it keeps: model.heads per_level" in caplog.text
    explicit = load_config(write("model: {scales: 2, predictor: false}\n"))
    assert (explicit.model.heads, explicit.model.predictor) == ("per_level", False)
    assert load_config(write("model: {levels: 2}\n")) == Config(name="c")


def test_numbers_as_people_write_them(write):
    config = load_config(write("optimizer: {weight_decay: 1e-6, base_lr: 1}\n"))
    assert config.optimizer.weight_decay == 1e-6
    assert config.optimizer.base_lr == 1.0
    assert isinstance(config.optimizer.base_lr, float)
    assert load_config(write("sampler: {blur: [1, 0.5, 0.1]}\n")).sampler.blur == (1.0, 0.5, 0.1)


def test_missing_files_and_empty_ones(write, tmp_path):
    with pytest.raises(UserError, match=r"no configuration .*presets.*demo"):
        load_config("no_such_preset")
    with pytest.raises(UserError, match="cannot read"):
        load_config(tmp_path)
    assert load_config(write("")) == Config(name="c")


def test_dotted_names_cover_sections_and_fields():
    names = dotted_names(Config())
    assert {"seed", "loss", "loss.temperature", "sampler.frame_window", "train.batch_size"} <= set(names)
    assert len(names) == len(set(names))
