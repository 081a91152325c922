"""How many retries a target's troubles may cost. It decides nothing about when or what to retry."""

from __future__ import annotations

import threading

from dspy_resilient._support.fork import renew_after_fork


class RetryBudget:
    """Retry tokens shared by all calls to one target, so that an outage is not multiplied.

    While most retries help, what they cost comes back and the budget stays full, even at a target
    that fails one request in five at random. In an outage nothing comes back, so after
    `tokens / retry_cost` retries (35 by default) calls fail at their first attempt until successes
    have paid for another retry. Figures and rules are those of the retry quota in the "standard"
    mode of the AWS SDKs.

    Thread safe; never blocks for longer than an addition takes.
    """

    def __init__(self, tokens: int = 500, retry_cost: int = 14, refund: int = 1) -> None:
        """Start full.

        Args:
            tokens: Most tokens it holds; 0 means no retries at all.
            retry_cost: Tokens that one retry takes.
            refund: Tokens that one clean success (of a first attempt) returns.
        """
        self._most = tokens
        self._cost = retry_cost
        self._refund = refund
        self._level = tokens
        self.renew()
        renew_after_fork(self)

    @property
    def level(self) -> int:
        """Tokens left."""
        return self._level

    def take(self) -> bool:
        """Pay for one retry and return True, or return False and take nothing."""
        with self._lock:
            if self._level < self._cost:
                return False
            self._level -= self._cost
            return True

    def refund(self, *, retried: bool = False) -> None:
        """Record a success; the one of a retry returns what that retry took."""
        if self._level >= self._most:  # the common case takes no lock
            return
        returned = self._cost if retried else self._refund
        with self._lock:
            self._level = min(self._most, self._level + returned)

    def renew(self) -> None:
        """Replace the lock (after a fork); the level stays."""
        self._lock = threading.RLock()
