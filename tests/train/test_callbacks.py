"""Hooks of a run, the examples with loops of one's own, and the upload of an encoder."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from vito_fast.cli.main import main
from vito_fast.train import Callback, train

EXAMPLES = Path(__file__).parents[2] / "examples"


class Notes(Callback):
    def __init__(self):
        self.seen = []

    def step_end(self, run, step, row):
        assert run.trainer.step_count == step
        self.seen.append((step, row and row["step"]))

    def evaluation(self, run, step, scores):
        self.seen.append(f"evaluation {scores['step']}, {scores['clips']} clips")

    def checkpoint(self, run, step, path):
        self.seen.append(path.name)


def test_callbacks_are_called_in_order(config):
    notes = Notes()
    train(config, callbacks=[notes, Callback()])
    assert notes.seen == [
        (1, 1), (2, 2), "evaluation 2, 6 clips", (3, None), "step-00000003.safetensors",
        (4, 4), "step-00000004.safetensors", "evaluation 4, 6 clips",
    ]  # fmt: skip


def test_an_error_of_a_callback_is_its_users(config):
    class Fails(Callback):
        def step_end(self, run, step, row):
            if step == 4:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train(config, callbacks=[Fails()])
    assert train(config, resume=True)["step"] == 4


@pytest.mark.parametrize("name", ["plain_loop", "lightning_loop"])
def test_examples_run(small_store, name):
    if name == "lightning_loop":
        pytest.importorskip("lightning")
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), str(small_store), "2", "3"]
    one = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=one, check=False)
    assert done.returncode == 0, done.stderr
    assert "loss" in done.stdout


def test_an_encoder_is_uploaded_with_its_lines(config, tmp_path, monkeypatch, capsys):
    sent = {}

    class Api:
        def create_repo(self, name, exist_ok, private):
            return f"https://hub/{name}"

        def upload_file(self, path_or_fileobj, path_in_repo, repo_id):
            sent[path_in_repo] = path_or_fileobj

    train(dataclasses.replace(config, model=dataclasses.replace(config.model, pooling="average")), max_steps=1)
    words = ["export", str(tmp_path / "runs" / "r"), str(tmp_path / "e"), "--push-to-hub", "me/e"]
    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(HfApi=Api))
    assert main(words) == 0
    assert "uploaded: https://hub/me/e" in capsys.readouterr().out
    assert sent["e.safetensors"] == str(tmp_path / "e.safetensors")
    assert "checkpoint_path='e.safetensors'" in sent["README.md"].decode()
    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(HfApi=lambda: 1 / 0))
    assert main(words) == 2
    assert "is exported, and not uploaded to me/e: division by zero" in capsys.readouterr().err
