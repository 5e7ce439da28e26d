"""The command line: help, exit status, and one line for every mistake."""

import os
import subprocess
import sys

import pytest

from vito_fast.cli import main as cli
from vito_fast.cli.overrides import configured
from vito_fast.cli.train import Train


@pytest.fixture
def run(capsys):
    """Exit status, stdout and stderr of ``vito-fast ARGUMENTS``."""

    def _run(*arguments):
        try:
            status = cli.main([str(a) for a in arguments])
        except SystemExit as stop:
            status = stop.code or 0
        out, err = capsys.readouterr()
        return status, out, err

    return _run


def assert_one_line(status, err, *says):
    assert status == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    for word in says:
        assert word in err


def test_help_names_every_command_and_each_has_its_own(run):
    status, out, err = run("--help")
    assert (status, err) == (0, "")
    for name in cli.COMMANDS:
        assert name in out
        status, text, _ = run(name, "--help")
        assert status == 0
        assert len(text) > 100


def test_help_does_not_import_torch():
    code = "import sys; from vito_fast.cli.main import main; main(['--help']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["exprot"], ["exprot", "export"]),
        (["zzz"], ["zzz", "pack"]),
        ([], ["a command is missing"]),
        (["train"], ["a configuration is missing"]),
        (["train", "--resume"], ["a configuration is missing"]),
        (["train", "nothing.yaml"], ["nothing.yaml", "demo"]),
        (["train", "demo", "--los.temperature", "1"], ["--los.temperature", "loss.temperature"]),
        (["train", "demo", "--loss.temprature=1"], ["loss.temprature", "loss.temperature"]),
        (["train", "demo", "--loss.temperature", "warm"], ["--loss.temperature", "warm"]),
        (["train", "demo", "--loss.temperature", "-1"], ["loss.temperature", "above 0", "-1"]),
        (["train", "demo", "--loss.name", "bryol"], ["bryol", "byol"]),
        (["train", "demo", "--train.batch-size", "1.5"], ["--train.batch-size", "1.5"]),
        (["train", "demo", "--sampler.crop_area", "0.4"], ["--sampler.crop-area"]),
        (["train", "demo", "--sampler.views", "9"], ["views", "9"]),
        (["train", "demo", "--name", "a/b"], ["name", "a folder's name", "a/b"]),
        (["plan", "demo", "--name", "a/b"], ["name", "a folder's name", "a/b"]),
        (["train", "demo", "--seed", "-1"], ["seed", "-1"]),
        (["train", "demo", "--seed", "99999999999999999999999"], ["seed", "99999999999999999999999"]),
        (["train", "demo", "--data.prefetch", "-1"], ["data.prefetch", "-1"]),
        (["train", "demo", "--data.threads", "100000"], ["data.threads", "100000"]),
        (["train", "demo", "--data.max_bad_share", "5"], ["data.max_bad_share", "5"]),
        (["train", "demo", "--optimizer.base_lr", "inf"], ["optimizer.base_lr", "finite", "inf"]),
        (["plan", "demo", "--schedule.epochs", "inf"], ["schedule.epochs", "finite", "inf"]),
        (["train", "demo", "--schedule.warmup_epochs", "inf"], ["schedule.warmup_epochs", "finite", "inf"]),
        (["train", "demo", "--train.batch_size", "1"], ["train.batch_size", "contrastive", "negatives"]),
        (["train", "demo", "--max-steps", "0"], ["--max-steps", "at least 1", "0"]),
        (["train", "demo", "--max-steps", "-3"], ["--max-steps", "at least 1", "-3"]),
        (["train", "demo", "--dry-run", "--train.micro_batches", "7"], ["does not divide", "x 7", "multiple of 7"]),
        (["train", "demo", "stray"], ["stray"]),
        (["train", "demo", "--data.store", "/nowhere"], ["/nowhere"]),
        (["export", "a"], ["PATH"]),
        (["export", "a", "b", "--formt", "timm"], ["--formt", "--format"]),
        (["export", "nowhere", "b"], ["nowhere"]),
        (["attention", "nowhere", "v.mp4", "a.png"], ["nowhere"]),
        (["inspect-store", "/nowhere"], ["/nowhere"]),
        (["bench-data", "/nowhere"], ["/nowhere"]),
        (["pack", "/nowhere", "/tmp/x"], ["/nowhere"]),
    ],
)
def test_mistakes_are_one_line_and_status_2(run, arguments, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, _, err = run(*arguments)
    assert_one_line(status, err, *says)
    assert list(tmp_path.iterdir()) == []


def test_mistakes_of_files_name_the_file(run, tmp_path):
    (tmp_path / "c.yaml").write_text("optimizer: {bas_lr: 1}\n")
    status, _, err = run("train", tmp_path / "c.yaml")
    assert_one_line(status, err, "c.yaml", "optimizer.bas_lr", "optimizer.base_lr")
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "text.mp4").write_text("hello")
    status, _, err = run("pack", tmp_path / "videos", tmp_path / "store", "--processes", "1")
    assert_one_line(status, err, "text.mp4")
    status, _, err = run("pack", tmp_path / "videos", tmp_path / "store", "--quality", "101")
    assert_one_line(status, err, "quality", "101")
    (tmp_path / "empty").mkdir()
    status, _, err = run("pack", tmp_path / "empty", tmp_path / "store2")
    assert_one_line(status, err, "empty")


def test_overrides_reach_the_configuration():
    words = ["demo", "--resume", "--max-steps", "7", "--loss.temperature=0.2", "--train.batch_size", "8"]
    words += ["--sampler.crop_area", "0.5", "0.9", "--model.predictor", "--name", "x"]
    options = configured("train", Train, words)
    config = options.config
    assert isinstance(options, Train)
    assert (options.resume, options.max_steps) == (True, 7)
    assert (config.loss.temperature, config.train.batch_size, config.sampler.crop_area) == (0.2, 8, (0.5, 0.9))
    assert (config.model.predictor, config.name, config.model.backbone) == (True, "x", "timm:test_resnet")


def test_old_names_of_options_work_and_say_so(caplog):
    words = [
        "demo",
        "--loss.kind=byol",
        "--optimizer.eta",
        "0.5",
        "--model.scales",
        "1",
        "--sampler.area",
        "0.5",
        "0.9",
    ]
    config = configured("train", Train, words).config
    assert (config.loss.name, config.optimizer.trust_coefficient, config.model.levels) == ("byol", 0.5, 1)
    assert config.sampler.crop_area == (0.5, 0.9)
    assert [r.getMessage().split(";")[0] for r in caplog.records] == [
        "command line: loss.kind is now loss.name",
        "command line: optimizer.eta is now optimizer.trust_coefficient",
        "command line: model.scales is now model.levels",
        "command line: sampler.area is now sampler.crop_area",
    ]


def test_pack_inspect_and_bench_say_what_they_made(run, make_clip, tmp_path):
    (tmp_path / "v").mkdir()
    for seed in range(2):
        make_clip(tmp_path / "v" / f"{seed}.mp4", seed)
    status, out, _ = run("pack", tmp_path / "v", tmp_path / "s", "--processes", "1")
    assert status == 0
    assert out.splitlines()[-1] == f"packed: {tmp_path / 's'}"
    status, out, _ = run("inspect-store", tmp_path / "s")
    assert status == 0
    assert "2 clips of 2 videos" in out
    assert str(tmp_path / "s") in out.splitlines()[-1]
    status, out, _ = run("bench-data", tmp_path / "s", "--batch", "2", "--seconds", "0.2", "--size", "32")
    assert status == 0
    assert "pairs/s" in out.splitlines()[-1]
    before = (tmp_path / "s" / "store.json").read_bytes()
    for words in (["bench-data", tmp_path / "s", "--output"], ["export", "nowhere"]):
        status, _, err = run(*words, tmp_path / "s" / "store.json")
        assert_one_line(status, err, "store.json", f"{tmp_path / 's'} is a store")
    assert (tmp_path / "s" / "store.json").read_bytes() == before
    (tmp_path / "s" / "store.json").write_text('{"version": 99}')
    status, _, err = run("inspect-store", tmp_path / "s")
    assert_one_line(status, err, "99")


def test_folders_that_are_not_utf_8(make_clip, tmp_path):
    """They are read and written, and printed as they are; runs, whose TensorBoard cannot be there, are refused."""
    odd = tmp_path / os.fsdecode(b"caf\xe9")
    odd.mkdir()
    make_clip(odd / "0.mp4", 0)

    def run(*words):
        done = subprocess.run([sys.executable, "-m", "vito_fast", *words], capture_output=True, check=False)
        return done.returncode, os.fsdecode(done.stdout), os.fsdecode(done.stderr)

    status, out, err = run("pack", odd / "0.mp4", odd / "store", "--processes", "1")
    assert (status, out.splitlines()[-1]) == (0, f"packed: {odd / 'store'}"), err
    status, out, err = run("inspect-store", odd / "store")
    assert (status, out.splitlines()[-1]) == (0, f"contact sheet: {odd / 'store' / 'contact-sheet.png'}"), err
    status, _, err = run("train", "demo", "--train.runs", odd / "runs")
    assert_one_line(status, err, "train.runs must be UTF-8")
    assert "udce9" in "".join(err.split())  # the message may be folded within the path
    assert not (odd / "runs").exists()


def test_doctor_ends_with_a_verdict(run):
    status, out, _ = run("doctor")
    assert status == 0
    assert out.splitlines()[-1].startswith("training works here")
    for name in ("GPU", "driver", "NVDEC", "nvJPEG", "triton", "DALI", "PyAV", "CPU", "memory"):
        assert any(line.startswith(name) for line in out.splitlines()), name


def test_a_full_disk_or_a_lost_file_is_one_line(run, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device", "/some/file")

    monkeypatch.setattr("vito_fast.doctor.report", fail)
    status, _, err = run("doctor")
    assert_one_line(status, err, "/some/file", "No space left")


def test_bugs_are_not_disguised_as_mistakes(run, monkeypatch):
    monkeypatch.setattr("vito_fast.doctor.report", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run("doctor")


def test_an_installation_without_the_extra_says_which_one(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "tyro", None)
    monkeypatch.delitem(sys.modules, "vito_fast.cli.overrides")
    monkeypatch.delattr("vito_fast.cli.overrides")
    assert_one_line(*run("doctor")[::2], "tyro", "vito-fast[train]")
