"""Who may be probed before the time because nobody else is left to ask.

This module says when, once per interval for all callers together. Who is left to ask, and whom a
call asks, is not for it to say.
"""

from __future__ import annotations

import math
import threading
from typing import TYPE_CHECKING

from dspy_resilient._support.fork import renew_after_fork

if TYPE_CHECKING:
    from collections.abc import Callable

    from dspy_resilient.circuit.breaker import CircuitBreaker


class EarlyProbes:
    """Early probes of one client: at most one per `recovery_time`.

    While one target answers, leaving another alone for minutes costs nothing. When all circuits are
    open it costs every call, so somebody looks as often as after a first opening (what proxies call
    panic mode, but with one request in place of all). Thread safe.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        """Allow the first at once; `clock` reads monotonic seconds."""
        self._clock = clock
        self._last = -math.inf
        self.renew()
        renew_after_fork(self)

    def take(self, circuit: CircuitBreaker) -> bool:
        """Return whether `circuit` may be probed early now, and count that as done."""
        if circuit.early_wait > 0:
            return False
        with self._lock:
            now = self._clock()
            if now < self._last + circuit.policy.recovery_time:
                return False
            self._last = now
            return True

    def renew(self) -> None:
        """Replace the lock in a forked child."""
        self._lock = threading.Lock()
