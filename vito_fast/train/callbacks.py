"""Hooks of a run: ``train(config, callbacks=[...])``."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vito_fast.train.run import Run


class Callback:
    """Override what you need. An exception ends the run, as any error of your own would; checkpoints stay.

    Attributes of ``run`` are ``config``, ``folder``, ``world``, ``loader`` and ``trainer``, whose ``model.online`` is
    the network. Reading a tensor's value makes the host wait for the GPU.
    """

    def step_end(self, run: "Run", step: int, row: dict[str, Any] | None) -> None:
        """After each step, on every rank.

        Args:
            run: The run.
            step: The step, from 1.
            row: The step's row of metrics.jsonl where one is logged.
        """

    def evaluation(self, run: "Run", step: int, scores: dict[str, Any]) -> None:
        """After each evaluation, on the main rank, with its row of evaluations.jsonl."""

    def checkpoint(self, run: "Run", step: int, path: Path) -> None:
        """When a checkpoint begins to be written, on the main rank. ``path`` appears when it is whole."""
