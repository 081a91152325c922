"""A thread that reads and writes files for event loops, so that a slow disk stops no task.

Each client has its own, so that one client's stuck disk holds up nobody else. Not a loop's own pool
of threads: its places may all be taken by callers who wait for this very call, and its threads hold
up the interpreter's exit while a disk hangs. Sync calls touch the disk themselves, so a program
without event loops never starts such a thread.
"""

from __future__ import annotations

import threading
from collections import deque
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from dspy_resilient._support.fork import renew_after_fork

if TYPE_CHECKING:
    from collections.abc import Callable


class Worker:
    """Does one piece of work after the other, on a daemon thread that ends when idle for a while.

    Args:
        idle: Seconds that the thread waits for more work before it ends.
    """

    def __init__(self, idle: float = 5.0) -> None:
        self._idle = idle
        self.renew()
        renew_after_fork(self)

    def renew(self) -> None:
        """Start anew in a forked child, where the thread does not exist."""
        self._changed = threading.Condition()
        self._waiting: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._is_working = False

    def do(self, work: Callable[[], Any]) -> Future[Any]:
        """Have `work` done and return the future of its result; it cannot be cancelled."""
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()
        with self._changed:
            self._waiting.append((work, future))
            if self._is_working:
                self._changed.notify()
                return future
            self._is_working = True
        threading.Thread(target=self._work, name="disk", daemon=True).start()
        return future

    def _work(self) -> None:
        while (task := self._next()) is not None:
            work, future = task
            try:
                result = work()
            except BaseException as error:  # noqa: BLE001  # for whoever waits
                future.set_exception(error)
            else:
                future.set_result(result)
            del task, work, future

    def _next(self) -> tuple[Callable[[], Any], Future[Any]] | None:
        with self._changed:
            if self._changed.wait_for(lambda: self._waiting, self._idle):
                return self._waiting.popleft()
            self._is_working = False
            return None
