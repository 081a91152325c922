"""How many retries a target's troubles may cost. It decides nothing about when or what to retry."""

from __future__ import annotations

import threading

from dspy_resilient.fork import renew_after_fork


class RetryBudget:
    """Retry tokens shared by all calls to one target, so that an outage is not multiplied.

    While the target is well, retries are rare and the budget stays full. In an outage every retry
    takes more than any success brings in, so after `tokens / retry_cost` retries (35 by default)
    calls fail at their first attempt until successes have paid for another retry. The figures are
    those of the retry quota in the "standard" mode of the AWS SDKs; a success that needed a retry
    returns nothing here.

    Thread safe; never blocks for longer than an addition takes.
    """

    def __init__(self, tokens: int = 500, retry_cost: int = 14, refund: int = 1) -> None:
        """Start full.

        Args:
            tokens: Most tokens it holds; 0 means no retries at all.
            retry_cost: Tokens that one retry takes.
            refund: Tokens that one clean success returns.
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

    def refund(self) -> None:
        """Record a clean success: one that needed no retry."""
        if self._level >= self._most:  # the common case takes no lock
            return
        with self._lock:
            self._level = min(self._most, self._level + self._refund)

    def renew(self) -> None:
        """Replace the lock (after a fork); the level stays."""
        self._lock = threading.Lock()
