"""Copies of a run's rows for TensorBoard, Weights & Biases and MLflow. Their failures never end a run.

metrics.jsonl and evaluations.jsonl are the record. A logger that fails is left out with one line. One that could not
begin gets all rows so far when the run is resumed.
"""

import json
import math
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from vito_fast.config import Config
from vito_fast.config_files import to_mapping
from vito_fast.errors import UserError
from vito_fast.files import atomic_write


@contextmanager
def going_on(what: str) -> Iterator[None]:
    """Inside, an error costs ``what`` and a line of output, and never the run."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        print(f"warning: no {what}: {reason}; the run goes on", flush=True)


class Logger(Protocol):
    """Takes the numbers of one row."""

    def log(self, scalars: dict[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class Loggers:
    """All loggers of a run.

    Args:
        run: The run's folder.
        step: The step that it continues after.
        config: Names the loggers.
        rows: Rows so far by group, for a logger that begins in the middle.

    Raises:
        UserError: a logger's package is not installed.
    """

    def __init__(self, run: Path, step: int, config: Config, rows: dict[str, list[dict[str, Any]]]) -> None:
        self._loggers: dict[str, Logger] = {}
        path = run / "loggers.json"
        known: dict[str, str] = json.loads(path.read_text(encoding="utf-8")) if step and path.exists() else {}
        ids = dict(known)
        with going_on("TensorBoard"):
            self._loggers["TensorBoard"] = _TensorBoard(run, step)
        for name, field, kind in (("W&B", "wandb", _Wandb), ("MLflow", "mlflow", _MLflow)):
            if not getattr(config.train, field):
                continue
            _require(field, getattr(config.train, field))
            with going_on(name):
                logger = kind(run, config, known.get(field))
                ids[field] = logger.id
                for group, old in ({} if field in known else rows).items():
                    for row in old:
                        logger.log(_scalars(group, row), row["step"])
                self._loggers[name] = logger
        if ids != known:
            with atomic_write(path) as partial:
                partial.write_text(json.dumps(ids) + "\n", encoding="utf-8")

    def log(self, group: str, row: dict[str, Any]) -> None:
        """Hands a row's numbers on, under names that begin with ``group/``."""
        scalars = _scalars(group, row)
        for name, logger in list(self._loggers.items()):
            with going_on(f"more rows for {name}"):
                del self._loggers[name]  # until it has taken the row
                logger.log(scalars, row["step"])
                self._loggers[name] = logger

    def close(self) -> None:
        for name, logger in self._loggers.items():
            with going_on(f"end of {name}"):
                logger.close()


def _scalars(group: str, row: dict[str, Any]) -> dict[str, float]:
    numbers = {key: value for key, value in row.items() if key != "step" and isinstance(value, int | float)}
    return {f"{group}/{key}": value for key, value in numbers.items() if math.isfinite(value)}


def _require(field: str, value: str) -> None:
    try:
        __import__(field)
    except ModuleNotFoundError:
        raise UserError(f"train.{field} is {value!r}, and {field} is missing: pip install {field}") from None


class _TensorBoard:
    def __init__(self, run: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1 if step else None)

    def log(self, scalars: dict[str, float], step: int) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """A run of Weights & Biases with an ID of its own. The rows' steps are a metric: W&B's own may never go back."""

    def __init__(self, run: Path, config: Config, id: str | None) -> None:
        import wandb

        self.id = id or uuid.uuid4().hex[:16]
        self._run: Any = wandb.init(
            project=config.train.wandb,
            name=config.name[:128],
            id=self.id,
            dir=str(run),
            config=to_mapping(config),
            resume="allow",
        )
        self._run.define_metric("*", step_metric="step")

    def log(self, scalars: dict[str, float], step: int) -> None:
        self._run.log(scalars | {"step": step})

    def close(self) -> None:
        self._run.finish()


class _MLflow:
    """A run of MLflow, at the server that its own environment variables name."""

    def __init__(self, run: Path, config: Config, id: str | None) -> None:
        import mlflow

        self._mlflow: Any = mlflow
        mlflow.set_experiment(config.train.mlflow)
        self.id: str = mlflow.start_run(run_id=id, run_name=None if id else config.name).info.run_id
        if id is None:
            mlflow.log_dict(to_mapping(config), "config.json")

    def log(self, scalars: dict[str, float], step: int) -> None:
        self._mlflow.log_metrics(scalars, step=step)

    def close(self) -> None:
        self._mlflow.end_run()
