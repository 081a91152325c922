"""A thread that does what a caller must not wait for: a slow disk, a distant store, a slow listener.

The only place that starts a thread for more than one call. Each owner has a worker of its own, so
that what is stuck in one holds up no other. Not an event loop's own pool of threads: its places may
all be taken by callers that wait for this very call, and its threads hold up the interpreter's exit.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

from dspy_resilient._support.fork import renew_after_fork
from dspy_resilient._support.turns import Turn, Turns

if TYPE_CHECKING:
    from collections.abc import Callable


class Worker:
    """Does one piece of work after the other, on a daemon thread that ends when idle for a while.

    It needs no lock, so a caller may be stopped by Ctrl-C anywhere: what a queue has taken is done.

    Args:
        name: Of the thread, for people.
        idle: Seconds that the thread waits for more work before it ends.
    """

    def __init__(self, name: str, idle: float = 5.0) -> None:
        self._name = name
        self._idle = idle
        self.renew()
        renew_after_fork(self)

    def renew(self) -> None:
        """Start anew in a forked child, where the thread does not exist."""
        self._tasks: SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = SimpleQueue()
        self._turns = Turns()

    def do(self, work: Callable[[], Any]) -> Future[Any]:
        """Have `work` done and return the future of its result; it cannot be cancelled.

        Raises:
            RuntimeError: No thread can be started: the interpreter is on its way out.
        """
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()
        self._tasks.put((work, future))
        self._start()
        return future

    def _start(self) -> None:
        """Start a thread if none is at work; one that finds another at work leaves."""
        if not self._turns.is_taken and not self._tasks.empty():
            threading.Thread(target=self._work, name=self._name, daemon=True).start()

    def _work(self) -> None:
        turn, tasks = Turn(), self._tasks
        if not self._turns.take(turn):
            return
        with suppress(Empty):
            while True:
                self._do(*tasks.get(timeout=self._idle))
        turn.over = True
        self._start()  # for a caller that still saw this thread at work

    def _do(self, work: Callable[[], Any], future: Future[Any]) -> None:
        try:
            result = work()
        except BaseException as error:  # noqa: BLE001  # for the caller that waits
            future.set_exception(error)
        else:
            future.set_result(result)
