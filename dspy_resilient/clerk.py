"""One thread that reads and writes files for event loops, so that a slow disk stops no task.

Not a loop's own pool of threads: its places may all be taken by callers who wait for this very
call, and its threads hold up the interpreter's exit while a disk hangs. Sync calls touch the disk
themselves, so a program without event loops never starts this thread.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from dspy_resilient.fork import renew_after_fork

if TYPE_CHECKING:
    from collections.abc import Callable


class Clerk:
    """Does one piece of work after the other on a daemon thread that starts with the first."""

    def __init__(self) -> None:
        self.renew()
        renew_after_fork(self)

    def renew(self) -> None:
        """Start anew in a forked child, where the thread does not exist."""
        self._starting = threading.Lock()
        self._queue: SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def do(self, work: Callable[[], Any]) -> Future[Any]:
        """Have `work` done and return the future of its result; it cannot be cancelled."""
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()
        self._queue.put((work, future))
        if self._thread is None:
            self._start()
        return future

    def _start(self) -> None:
        with self._starting:
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="disk", daemon=True)
                self._thread.start()

    def _work(self) -> None:
        queue = self._queue
        while True:
            work, future = queue.get()
            try:
                result = work()
            except BaseException as error:  # noqa: BLE001  # for whoever waits
                future.set_exception(error)
            else:
                future.set_result(result)
            del work, future
