"""Ends a run after the current step when the process gets a signal, on all ranks after the same step."""

import signal
import time

from vito_fast.train.distributed import World, all_max

ASK_EVERY = 3.0
"""Seconds between the moments at which ranks compare their signals."""


class StopSignal:
    """Inside, notes SIGTERM, SIGUSR1 and the first SIGINT, so that the loop saves and ends.

    Comparing signals makes the host wait for the device. Ranks therefore compare after steps that wait anyway, and
    every ``ASK_EVERY`` seconds, since launchers kill half a minute after SIGTERM. The seconds become a number of steps
    on which all ranks agree.

    Args:
        world: This process's place.
        step: The step that the loop continues after.
    """

    name: str | None = None
    """The signal that all ranks end for."""

    def __init__(self, world: World, step: int) -> None:
        self.world, self._received = world, 0
        self._asked, self._next, self._time = step, step + 1, time.monotonic()

    def __enter__(self) -> "StopSignal":
        wanted = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
        self._before = {number: signal.signal(number, self._note) for number in wanted}
        return self

    def _note(self, number: int, frame: object) -> None:
        self._received = number
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C ends at once

    def agreed(self, step: int, at_once: bool) -> bool:
        """Whether to end after ``step``; alike on all ranks.

        Args:
            step: The step that has just ended.
            at_once: Compare now, as ``step`` may require anyway; alike on all ranks.
        """
        if at_once or step >= self._next or self.world.size == 1:
            now = time.monotonic()
            a_step = (now - self._time) / max(1, step - self._asked)
            received, a_step = all_max([self._received, a_step], self.world.device)
            self.name = signal.Signals(int(received)).name if received else None
            self._asked, self._next, self._time = step, step + max(1, int(ASK_EVERY / max(a_step, 1e-6))), now
        return self.name is not None

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
