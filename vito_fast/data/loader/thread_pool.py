"""A few daemon threads that run tasks in the order they were given, each with tools of its own.

The executor of the standard library would join its threads at exit only after all that was submitted is done; here
what has not begun is dropped, and no thread is inside native code when the interpreter goes.
"""

import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeVar

import torch

Tools = TypeVar("Tools")
Result = TypeVar("Result")
_Tasks = SimpleQueue[tuple[Future[Any], Callable[[Any], Any]] | None]


class Workers(Generic[Tools]):
    """``make()`` is called in each thread before its first task. Ends by :meth:`close`, when collected, or at exit."""

    def __init__(self, count: int, make: Callable[[], Tools]):
        self._tasks: _Tasks = SimpleQueue()
        ready = threading.Barrier(count + 1)
        threads = [
            threading.Thread(target=_work, args=(self._tasks, make, ready), name=f"vito-data-{i}", daemon=True)
            for i in range(count)
        ]
        in_torch = torch.get_num_threads()
        for thread in threads:
            thread.start()
        ready.wait()
        torch.set_num_threads(in_torch)  # each worker's own call holds for it, and for threads yet to come
        self._finalizer = weakref.finalize(self, _stop, self._tasks, threads)

    def submit(self, task: Callable[[Tools], Result]) -> "Future[Result]":
        future: Future[Result] = Future()
        self._tasks.put((future, task))
        return future

    def close(self) -> None:
        """Drop what has not begun, wait for what has. Idempotent."""
        self._finalizer()


def _work(tasks: _Tasks, make: Callable[[], Any], ready: threading.Barrier) -> None:
    torch.get_num_threads()  # a thread's first question sets it to the process's number, over what was set before
    torch.set_num_threads(1)  # the workers themselves are the parallelism
    ready.wait()
    tools = None
    while (entry := tasks.get()) is not None:
        future, task = entry
        if future.set_running_or_notify_cancel():
            try:
                if tools is None:
                    tools = make()
                future.set_result(task(tools))
            except BaseException as error:
                future.set_exception(error)
        del entry, future, task  # hold no batch while waiting


def _stop(tasks: _Tasks, threads: list[threading.Thread]) -> None:
    try:
        while (entry := tasks.get_nowait()) is not None:
            entry[0].cancel()
    except Empty:
        pass
    for _ in threads:
        tasks.put(None)
    for thread in threads:
        if thread is not threading.current_thread():  # the collector may run anywhere
            thread.join()
