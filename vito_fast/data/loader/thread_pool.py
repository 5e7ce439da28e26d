"""Daemon threads that run tasks in the order they were submitted, each with its own tools.

The executor of the standard library joins its threads at exit only after all submitted tasks are done. This one drops
tasks that have not begun. No thread is inside native code when the interpreter ends.
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


class ThreadPool(Generic[Tools]):
    """``count`` threads. They end by :meth:`close`, with the object, or at exit.

    Args:
        count: Number of threads.
        make_tools: Called in each thread before its first task. The tasks of the thread receive the result.
    """

    def __init__(self, count: int, make_tools: Callable[[], Tools]):
        self._tasks: _Tasks = SimpleQueue()
        ready = threading.Barrier(count + 1)
        threads = [
            threading.Thread(target=_work, args=(self._tasks, make_tools, ready), name=f"vito-data-{i}", daemon=True)
            for i in range(count)
        ]
        torch_threads = torch.get_num_threads()
        for thread in threads:
            thread.start()
        ready.wait()
        torch.set_num_threads(torch_threads)  # a worker's own call also sets the default of new threads
        self._finalizer = weakref.finalize(self, _stop, self._tasks, threads)

    def submit(self, task: Callable[[Tools], Result]) -> "Future[Result]":
        """Queue ``task``, called with the tools of the thread that runs it."""
        future: Future[Result] = Future()
        self._tasks.put((future, task))
        return future

    def close(self) -> None:
        """Drop tasks that have not begun and wait for the others. Idempotent."""
        self._finalizer()


def _work(tasks: _Tasks, make_tools: Callable[[], Any], ready: threading.Barrier) -> None:
    torch.get_num_threads()  # the first query in a thread resets its number, so query before setting
    torch.set_num_threads(1)  # the pool alone runs in parallel
    ready.wait()
    tools = None
    while (entry := tasks.get()) is not None:
        future, task = entry
        if future.set_running_or_notify_cancel():
            try:
                if tools is None:
                    tools = make_tools()
                future.set_result(task(tools))
            except BaseException as error:
                future.set_exception(error)
        del entry, future, task  # hold no batch while idle


def _stop(tasks: _Tasks, threads: list[threading.Thread]) -> None:
    try:
        while (entry := tasks.get_nowait()) is not None:
            entry[0].cancel()
    except Empty:
        pass
    for _ in threads:
        tasks.put(None)
    for thread in threads:
        if thread is not threading.current_thread():  # the garbage collector may run in any thread
            thread.join()
