"""How often a client may be restarted because it broke.

A break lies on our side of the wire: an HTTP client that somebody has closed, an event loop that
is gone, our own queue or in-flight table in a state they cannot be in. What a provider answers, or
fails to answer, is never one; `outcomes/breaks.py` tells. This module counts restarts; what a
restart consists of is for the client to say.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from contextlib import contextmanager
from typing import TYPE_CHECKING

from dspy_resilient._support.fork import renew_after_fork
from dspy_resilient.errors import RestartLimitError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Supervisor:
    """Allows so many restarts within a sliding window, and counts a break that many calls saw once.

    The intensity limit is that of Erlang's supervisors. Thread safe; it never waits.

    Attributes:
        generation: Number of restarts so far. What broke in an older one is mended already.
    """

    def __init__(
        self,
        *,
        clock: Callable[[], float] = time.monotonic,
        client: str = "",
        max_restarts: int = 3,
        window: float = 5.0,
    ) -> None:
        """Begin with no restart behind.

        Args:
            clock: Monotonic seconds.
            client: Name of the client, for errors.
            max_restarts: Restarts allowed within `window`.
            window: Seconds.
        """
        self.generation = 0
        self._clock = clock
        self._client = client
        self._max_restarts = max_restarts
        self._window = window
        self._restarts: deque[float] = deque(maxlen=max_restarts)
        self._exhausted = False
        self.renew()
        renew_after_fork(self)

    def renew(self) -> None:
        """Make the lock anew in a forked child, where nobody is restarting anything."""
        self._lock = threading.Lock()
        self._under_way = False

    def wait_time(self) -> float:
        """Return the seconds for which calls are refused: 0.0 unless the limit was exceeded."""
        if not self._exhausted:  # the common case takes no lock
            return 0.0
        with self._lock:
            wait = self._until_allowed()
            self._exhausted = wait > 0
        return wait

    def refusal(self) -> RestartLimitError | None:
        """Return a fresh error if calls are refused at present, else None."""
        wait = self.wait_time()
        return self._error(wait) if wait > 0 else None

    @contextmanager
    def restart(self, seen: int) -> Iterator[bool]:
        """Enter a block that restarts the client; the value is whether it is this caller's turn.

        It is not if somebody has restarted since generation `seen`, or is about to.

        Raises:
            RestartLimitError: The client has been restarted too often already.
        """
        with self._lock:
            mine = seen == self.generation and not self._under_way
            wait = self._until_allowed() if mine else 0.0
            if wait > 0:
                self._exhausted = True
            elif mine:
                self._restarts.append(self._clock())
                self._under_way = True
        if wait > 0:
            raise self._error(wait)
        try:
            yield mine
        finally:
            if mine:
                self._done()

    def forgive(self) -> None:
        """Count a restart that a person asked for: it clears the record."""
        with self._lock:
            self._restarts.clear()
            self._exhausted = False
            self.generation += 1

    def _done(self) -> None:
        with self._lock:
            self._under_way = False
            self.generation += 1

    def _until_allowed(self) -> float:
        """Return the seconds until a restart is allowed; requires the lock."""
        if len(self._restarts) < self._max_restarts:
            return 0.0
        return max(0.0, self._restarts[0] + self._window - self._clock())

    def _error(self, wait: float) -> RestartLimitError:
        return RestartLimitError(
            f"client {self._client!r} broke more than {self._max_restarts} times within "
            f"{self._window:g} s and is left alone for {wait:.1f} s; the cause was a closed HTTP "
            "client, a dead event loop or broken state of our own. restart() clears it",
            client=self._client,
            retry_after=wait,
        )
