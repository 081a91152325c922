"""What may be spent, what has been, and what is reserved for requests under way.

This module keeps the books and refuses what does not fit. It never waits: who has to wait until
others have settled gets a future. It knows no price, no client and no `with` block.
"""

from __future__ import annotations

import math
import threading
import time
from concurrent.futures import Future
from typing import TYPE_CHECKING, NamedTuple

from dspy_resilient._support.fork import renew_after_fork

if TYPE_CHECKING:
    from collections.abc import Callable

_ROUNDING = 1e-9
"""Share of a limit by which sums of floats may seem to exceed it."""


class Amount(NamedTuple):
    """Some of each unit in which spending is counted."""

    dollars: float = 0.0
    tokens: float = 0.0
    requests: float = 0.0

    def plus(self, other: Amount) -> Amount:
        """Return both together."""
        return Amount(*(one + two for one, two in zip(self, other, strict=True)))

    def minus(self, other: Amount) -> Amount:
        """Return what is left without `other`."""
        return Amount(*(one - two for one, two in zip(self, other, strict=True)))

    def excess(self, limit: Amount) -> str | None:
        """Return the first unit of which this is more than `limit`, or None."""
        for unit, mine, most in zip(self._fields, self, limit, strict=True):
            if mine > most + _ROUNDING * max(1.0, most):
                return unit
        return None


UNLIMITED = Amount(math.inf, math.inf, math.inf)


class Hold:
    """What one request has reserved; reports exactly once what became of it, and may correct that."""

    __slots__ = ("_ledger", "amount", "charged", "is_open")

    def __init__(self, ledger: Ledger, amount: Amount) -> None:
        self._ledger = ledger
        self.amount = amount
        self.charged = Amount()
        self.is_open = True

    def settle(self, real: Amount) -> None:
        """Replace the reservation, or what was settled before, by what was really spent."""
        self._ledger.settle(self, real)

    def release(self) -> None:
        """Give the reservation back: nothing was sent. What has been settled stays."""
        if self.is_open:
            self._ledger.settle(self, Amount())


class Ledger:
    """The books of one budget; safe for threads, event loops and forks.

    Reserving keeps `spent + reserved` within the limit. So what is spent exceeds the limit by no
    more than the requests under way cost beyond their reservations.

    Attributes:
        patience: Seconds after which a caller that waits is to ask again.

    Args:
        limit: The most of each unit; inf for no limit.
        seconds: Length of a period, after which spending starts again from 0; inf for none. The
            periods are those of UTC: a day begins at midnight.
        clock: Seconds of UTC.
    """

    patience = math.inf

    def __init__(
        self,
        limit: Amount,
        *,
        seconds: float = math.inf,
        clock: Callable[[], float] = time.time,  # noqa: TID251  # a day is a day of the calendar
    ) -> None:
        self.limit = limit
        self._seconds = seconds
        self._clock = clock
        self._spent = self._reserved = Amount()
        self._period = self._period_now()
        self.renew()
        renew_after_fork(self)

    def renew(self) -> None:
        """Begin anew in a forked child: nothing is under way there; what was spent stays spent."""
        self._lock = threading.RLock()
        self._reserved = Amount()
        self._open = 0
        self._waiting: list[Future[None]] = []

    @property
    def spent(self) -> Amount:
        """What has been spent in this period."""
        with self._lock:
            self._begin_period()
            return self._spent

    @property
    def reserved(self) -> Amount:
        """What is reserved for requests under way."""
        return self._reserved

    @property
    def retry_after(self) -> float | None:
        """Seconds until the next period, or None if there is none."""
        if math.isinf(self._seconds):
            return None
        return self._seconds - self._clock() % self._seconds

    def reserve(self, amount: Amount, *, at_once: bool = False) -> Hold | Future[None] | None:
        """Reserve `amount` for one request.

        Args:
            amount: What it is estimated to use.
            at_once: Whether the caller cannot wait, not even for a store to be asked.

        Returns:
            The hold; or None if it does not fit, whatever becomes of the requests under way; or,
            if that depends on them, a future that is resolved when it is worth asking again.
        """
        with self._lock:
            self._begin_period()
            if self._spent.plus(amount).excess(self.limit):
                return None
            if self._spent.plus(self._reserved).plus(amount).excess(self.limit):
                return None if at_once else self._wait()
            return self._hold(amount)

    def settle(self, hold: Hold, real: Amount) -> None:
        """Perform `Hold.settle`."""
        with self._lock:
            self._begin_period()
            if hold.is_open:
                hold.is_open = False
                self._open = max(0, self._open - 1)
                rest = self._reserved.minus(hold.amount)
                self._reserved = rest if self._open else Amount()  # no rounding error stays
            self._charge(real.minus(hold.charged))
            hold.charged = real
            waiting = self._stop_waiting()
        for future in waiting:
            future.set_result(None)

    def _hold(self, amount: Amount) -> Hold:
        """Take `amount` out of what is left; requires the lock."""
        self._reserved = self._reserved.plus(amount)
        self._open += 1
        return Hold(self, amount)

    def _charge(self, amount: Amount) -> None:
        """Count what was spent; requires the lock."""
        self._spent = self._spent.plus(amount)

    def _wait(self) -> Future[None]:
        """Return what is resolved at the next change; requires the lock."""
        future: Future[None] = Future()
        future.set_running_or_notify_cancel()
        self._waiting.append(future)
        return future

    def _stop_waiting(self) -> list[Future[None]]:
        """Return the futures to resolve once the lock is released; requires the lock."""
        waiting, self._waiting = self._waiting, []
        return waiting

    def _begin_period(self) -> None:
        """Start from 0 if a new period has begun; requires the lock."""
        period = self._period_now()
        if period != self._period:
            self._period = period
            self._spent = Amount()

    def _period_now(self) -> int:
        return 0 if math.isinf(self._seconds) else int(self._clock() // self._seconds)
