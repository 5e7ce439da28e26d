"""A progress bar whose steps follow each other, with rate and time left."""

from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


class StepProgress:
    """Use it as a context; it draws on a terminal only."""

    def __init__(self) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, transient=True)
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> "StepProgress":
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self._bar.stop()

    def update(self, step: str, done: int, total: int) -> None:
        """``done`` of ``total`` items of ``step``."""
        if step not in self._tasks:
            self._tasks[step] = self._bar.add_task(step, total=total, completed=done, rate="")
        task = next(task for task in self._bar.tasks if task.id == self._tasks[step])
        self._bar.update(task.id, completed=done, rate=f"{task.speed:.1f}/s" if task.speed else "")

    def log(self, line: str) -> None:
        """Show that a step without items has begun."""
        self._tasks.setdefault(line, self._bar.add_task(line, total=None, rate=""))
