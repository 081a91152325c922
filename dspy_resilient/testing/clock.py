"""A clock that stands still until it is told to move.

Anything in this package that takes `clock=` takes one of these in place of `time.monotonic`.
It wakes nobody: whoever really sleeps goes on sleeping.
"""

from __future__ import annotations

import threading


class Clock:
    """Monotonic seconds under the test's control; thread safe.

    Example:
        >>> clock = Clock()
        >>> clock.advance(5)
        5.0
        >>> clock()
        5.0
    """

    def __init__(self, start: float = 0.0) -> None:
        self._now = float(start)
        self._lock = threading.Lock()

    def __call__(self) -> float:
        """Return the current reading in seconds."""
        return self._now

    def advance(self, seconds: float) -> float:
        """Move forward and return the new reading. ValueError if `seconds` is negative."""
        if seconds < 0:
            raise ValueError(f"Clock: seconds must be at least 0; got {seconds!r}")
        with self._lock:
            self._now += seconds
            return self._now

    def __repr__(self) -> str:
        return f"Clock({self._now!r})"
