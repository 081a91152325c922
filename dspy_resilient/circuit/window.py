"""How many of the last calls failed or were slow, for the rules that look at a stretch of time.

Counts over a moving window, kept in a ring of buckets: constant memory and constant cost however
many calls there are. The last few failures are kept to the moment. This module judges nothing. It
has no lock and no clock.
"""

from __future__ import annotations

import math
from collections import deque

_BUCKETS = 12


class Window:
    """Counts of the verdicts of the last `seconds`, to a twelfth of that; needs its owner's lock.

    Args:
        seconds: Length of the window.
        enough: Failures without which no share of them says anything.

    Attributes:
        calls: Verdicts in the window.
        failures: Those that were failures.
        slow: Those that were slow successes.
    """

    __slots__ = (
        *("_bucket", "_buckets", "_latest", "_seconds", "_tick", "_turns_at", "_width"),
        *("calls", "failures", "slow"),
    )

    def __init__(self, seconds: float, enough: int) -> None:
        self._seconds = seconds
        self._width = seconds / _BUCKETS
        self._latest: deque[float] = deque(maxlen=enough)
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._buckets = [[0, 0, 0] for _ in range(_BUCKETS)]
        self._bucket = self._buckets[0]
        self._tick = 0
        self._turns_at = -math.inf
        self._latest.clear()
        self.calls = self.failures = self.slow = 0

    def add(self, now: float, failed: bool, slow: bool) -> None:
        """Count one verdict at the clock's reading `now`, and drop what has become too old."""
        if now >= self._turns_at:
            self._turn(int(now // self._width))
        bucket = self._bucket
        bucket[0] += 1
        self.calls += 1
        if failed:
            bucket[1] += 1
            self.failures += 1
            self._latest.append(now)
        elif slow:
            bucket[2] += 1
            self.slow += 1

    def has_enough_failures(self, now: float) -> bool:
        """Whether the last `enough` failures lie within the window, exactly."""
        latest = self._latest
        return len(latest) == latest.maxlen and now - latest[0] <= self._seconds

    def _turn(self, tick: int) -> None:
        for passed in range(max(self._tick, tick - _BUCKETS) + 1, tick + 1):
            bucket = self._buckets[passed % _BUCKETS]
            self.calls -= bucket[0]
            self.failures -= bucket[1]
            self.slow -= bucket[2]
            bucket[:] = (0, 0, 0)
        self._tick = tick
        self._bucket = self._buckets[tick % _BUCKETS]
        self._turns_at = (tick + 1) * self._width
