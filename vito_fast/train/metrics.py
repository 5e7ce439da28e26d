"""Writes a run's numbers to metrics.jsonl, its loggers and the terminal.

metrics.jsonl has one object per logged step. On the CPU every value is the same for the same seed, bit for bit,
except those of ``TIMINGS``, which are about this machine and this moment.
"""

import json
import math
import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vito_fast.config import Config
from vito_fast.files import atomic_write, name_errors
from vito_fast.machine import usable_cores
from vito_fast.train.distributed import World
from vito_fast.train.loggers import Loggers

TIMINGS = ("pairs_per_s", "mfu", "data_wait", "seconds", "peak_memory", "decode_failures")
"""pairs_per_s: clips a second over all ranks since the last row. mfu: model flops utilization, the method's own
arithmetic as a share of the GPUs' peak; null unless the peak is known. data_wait: share of the time in which the
main process waited for data, 0 to 1 (a GPU may still have been busy with earlier steps). seconds: since the process
began training. peak_memory: bytes, of the GPU, or resident in main memory without one. decode_failures: samples
replaced because they could not be decoded, since the process began."""


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The whole rows of a metrics file; a torn last line (a killed writer) is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _without_nan(value: Any) -> Any:
    """``value`` with None for each number that is not finite: JSON has none."""
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class RowFile:
    """A JSON-lines file of rows with a ``step`` that continues exactly after ``step`` steps: later rows are dropped.

    A row that the disk does not take is kept, and written with the next one.
    """

    def __init__(self, path: Path, step: int) -> None:
        self.rows = [row for row in read_rows(path) if row["step"] <= step] if step else []
        self.path, self._behind = path, False
        self._rewrite()

    def _rewrite(self) -> None:
        with atomic_write(self.path) as partial:
            partial.write_text("".join(json.dumps(row) + "\n" for row in self.rows), encoding="utf-8")
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (kept for the run)

    def append(self, row: dict[str, Any]) -> None:
        """Adds a row (non-finite numbers as null) and hands it to the system: a killed process loses none."""
        row = _without_nan(row)
        self.rows.append(row)
        try:
            if self._behind:
                self._rewrite()
            else:
                self._file.write(json.dumps(row, allow_nan=False) + "\n")
                self._file.flush()
            self._behind = False
        except OSError as error:
            if not self._behind:
                print(f"warning: {self.path} is behind: {error.strerror or error}; its rows are kept", flush=True)
                with suppress(OSError):
                    self._file.close()
            self._behind = True

    def sync(self) -> None:
        """Brings the rows to the disk: before a checkpoint that counts on them. OSError if it takes none."""
        if self._behind:
            self._rewrite()
            self._behind = False
        with name_errors(self.path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._behind:
            self._rewrite()
        self._file.close()


class Recorder:
    """Writes rows to metrics.jsonl, evaluations to evaluations.jsonl, and both to the run's loggers; from the main
    process alone. UserError if a logger's package is not installed.
    """

    def __init__(self, run: Path, step: int, config: Config) -> None:
        self.metrics = RowFile(run / "metrics.jsonl", step)
        self.evaluations = RowFile(run / "evaluations.jsonl", step)
        self._loggers = Loggers(run, step, config, {"train": self.metrics.rows, "evaluation": self.evaluations.rows})

    def log(self, row: dict[str, Any]) -> None:
        """One logged step."""
        self.metrics.append(row)
        self._loggers.log("train", row)

    def evaluation(self, row: dict[str, Any]) -> None:
        """One evaluation."""
        self.evaluations.append(row)
        self._loggers.log("evaluation", row)

    def sync(self) -> None:
        self.metrics.sync()
        self.evaluations.sync()

    def close(self) -> None:
        self.metrics.close()
        self.evaluations.close()
        self._loggers.close()


class Clock:
    """Rate and waiting time between rows.

    Args:
        device: Whose memory is reported.
        at_peak: Clips a second at an MFU of 1, if known.
    """

    def __init__(self, device: torch.device, at_peak: float | None = None) -> None:
        self.device, self.at_peak = device, at_peak
        self.began = self.last = time.perf_counter()
        self.waited = 0.0
        self.pairs = self.all_pairs = 0
        self.training = 0.0

    def count(self, pairs: int, waited: float) -> None:
        """Adds one step of ``pairs`` clips over all ranks, ``waited`` seconds of it for data."""
        self.pairs += pairs
        self.waited += waited

    def timings(self, decode_failures: int) -> dict[str, Any]:
        """The values of TIMINGS since the last call."""
        now = time.perf_counter()
        span, self.last = now - self.last, now
        self.training += span
        self.all_pairs += self.pairs
        result = {
            "pairs_per_s": round(self.pairs / span, 3),
            "mfu": round(self.pairs / span / self.at_peak, 5) if self.at_peak else None,
            "data_wait": round(self.waited / span, 5),
            "seconds": round(now - self.began, 3),
            "peak_memory": peak_memory(self.device),
            "decode_failures": decode_failures,
        }
        self.pairs, self.waited = 0, 0.0
        return result

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside (an evaluation), time counts neither as training nor as waiting."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # steps still under way belong to the time before
        began = time.perf_counter()
        yield
        self.last += time.perf_counter() - began

    @property
    def rate(self) -> float:
        """Clips a second over all logged steps of this process."""
        return self.all_pairs / self.training if self.training else 0.0


def peak_memory(device: torch.device) -> int:
    """Highest memory of this process so far in bytes: allocated on the GPU, or resident without one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class SkipAlarm:
    """Prints the first of each series of skipped steps, as soon as the host can know without waiting for the device."""

    def __init__(self, world: World) -> None:
        self.show, self.cuda = world.main, world.device.type == "cuda"
        self._counts = torch.zeros(2, dtype=torch.int64, pin_memory=self.cuda)
        self._event: Any = None
        self._step = 0
        self._before = 0

    def __call__(self, step: int, skipped: Tensor) -> None:
        """After each step, with the trainer's counts: in all, and in a row."""
        if not self.show or (self._event is not None and not self._event.query()):
            return
        if self.cuda:
            if self._event is not None:
                self._tell()
            self._counts.copy_(skipped, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
            self._step = step
        else:
            self._step, self._counts = step, skipped
            self._tell()

    def _tell(self) -> None:
        in_a_row = int(self._counts[1])
        if in_a_row and not self._before:
            print(f"warning: step {self._step}: skipped, its loss or gradient is not finite", flush=True)
        self._before = in_a_row


def warnings_of(config: Config, world: World) -> list[str]:
    """Lines about a machine that will be slow for a reason that a setting removes."""
    if world.device.type != "cpu":
        return []
    cores, threads = usable_cores(), torch.get_num_threads()
    if threads * world.local_size > cores:
        share = max(1, cores // world.local_size)
        who = f"{world.local_size} ranks of {threads}" if world.local_size > 1 else f"{threads}"
        return [f"warning: {who} OpenMP threads on {cores} cores wait for each other: set OMP_NUM_THREADS={share}"]
    load = os.getloadavg()[0]
    if threads > 1 and load > cores:
        return [
            f"warning: a load of {load:.0f} on {cores} cores: beside other processes {threads} OpenMP threads wait for "
            "each other: set OMP_NUM_THREADS=1"
        ]
    return []


LINE_EVERY = 60.0
"""Seconds between lines of progress without a terminal, at most."""


class Progress:
    """A bar with rate and time left on a terminal; a line each minute at least elsewhere. Silent unless ``show``."""

    def __init__(self, total: int, start: int, show: bool) -> None:
        self.total, self.show = total, show
        self.live = show and sys.stderr.isatty()
        self.start, self.next_line = start, start
        self.printed = time.perf_counter()
        self.first: float | None = None
        if self.live:
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            counts = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            note = TextColumn("{task.fields[note]}")
            self.bar = Bar("[bold]{task.description}", *counts, "left", TimeRemainingColumn(), note, transient=True)
            self.bar.start()
            self.task = self.bar.add_task("pretraining", total=total, completed=start, note="")

    def update(self, step: int, row: dict[str, Any] | None) -> None:
        """After each step; ``row`` where one was logged."""
        note = f"loss {row['loss']:.3f}  {row['pairs_per_s']:.3g} pairs/s  wait {row['data_wait']:.0%}" if row else None
        if self.live:
            self.bar.update(self.task, completed=step)
            if note:
                self.bar.update(self.task, note=note)
        elif self.show:
            now = time.perf_counter()
            if self.first is None:  # the first step compiles and fills caches: the time left is of the others
                self.first = now
            left = (now - self.first) / max(1, step - self.start - 1) * (self.total - step)
            if (note and step >= self.next_line) or now - self.printed >= LINE_EVERY:
                eta = f"  {timedelta(seconds=round(left))} left" if step > self.start + 1 and step < self.total else ""
                print(f"step {step}/{self.total}{'  ' + note if note else ''}{eta}", flush=True)
                self.next_line, self.printed = step + max(1, self.total // 10), now

    def close(self) -> None:
        if self.live:
            self.bar.stop()
