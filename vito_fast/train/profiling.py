"""A trace of a few steps by torch's profiler, with the phases of a step as named ranges."""

import contextlib
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

WARM_UP = 10
"""Steps of the process before the recorded ones, in which it compiles, tunes and fills its caches."""
STEPS = 5
"""Steps recorded: a trace of a few megabytes that a browser still opens."""


def range(name: str) -> contextlib.AbstractContextManager[object]:
    """Names a range in the profiler's trace, and in NVTX under ``torch.autograd.profiler.emit_nvtx``.

    It does nothing while neither is on.
    """
    if torch.autograd._profiler_enabled():
        return record_function(name)
    return contextlib.nullcontext()


class Profile:
    """Writes ``folder/step-XXXXXXXX.json`` (Chrome's trace format, for Perfetto) once; ``step`` after each step."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.folder, self.last, self.path = folder, 0, None
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
        self._profiler = profile(
            activities=activities,
            schedule=schedule(skip_first=WARM_UP - 1, wait=0, warmup=1, active=STEPS, repeat=1),
            on_trace_ready=self._write,
        )
        self._profiler.start()

    path: Path | None
    """The file, once it is written."""

    def step(self, step: int) -> None:
        """Notes that ``step`` has ended."""
        self.last = step
        self._profiler.step()

    def _write(self, profiler: profile) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / f"step-{self.last:08d}.json"
        profiler.export_chrome_trace(str(self.path))

    def close(self) -> None:
        """Ends the recording, also in the middle."""
        self._profiler.stop()

    def line(self) -> str:
        """One line about the trace, for the end of the run."""
        return f"profile: {self.path}" if self.path else f"profile: none, the run ended within {WARM_UP} steps"
