"""The books of a budget that several processes spend from together.

A process asks the store for what each of its requests needs, and tells it what it has spent and
still holds. The store adds up all of them and grants what fits. When the store does not answer,
the process goes on with its own books and what it last heard of the others.
"""

from __future__ import annotations

import math
import uuid
from typing import TYPE_CHECKING, NamedTuple

from dspy_resilient.budgets import Amount, Hold, Ledger
from dspy_resilient.shared.link import Link
from dspy_resilient.shared.store import KEPT, SpendReport, SpendView, Verb

if TYPE_CHECKING:
    from concurrent.futures import Future

    from dspy_resilient.shared.link import Courier

_LEASE = 60.0
"""Seconds without news of a process after which what it holds counts as spent."""

_LIFE = 30 * KEPT
"""Seconds after its last use at which a budget without a period is forgotten."""


class _Letter(NamedTuple):
    """What is said to the store, and of which period."""

    key: str
    report: SpendReport


class SharedLedger(Link[_Letter, SpendView], Ledger):
    """A `Ledger` that all processes with the same key keep together.

    Args:
        courier: The way to the store.
        key: Where the books lie.
        limit: As for `Ledger`; every process goes by its own.
        seconds: As for `Ledger`.
    """

    def __init__(
        self, courier: Courier, key: str, limit: Amount, seconds: float = math.inf
    ) -> None:
        self._courier = courier
        self._base = key
        super().__init__(limit, seconds=seconds)

    def renew(self) -> None:
        """Begin anew in a forked child, which is another spender."""
        super().renew()
        self._begin(self._courier)
        self._begin_books()

    def _begin_books(self) -> None:
        self._member = uuid.uuid4().hex
        self._mine = self._told = self._credit = Amount()
        self._wants: list[Amount] = []
        self._declined = False

    def reserve(self, amount: Amount, *, at_once: bool = False) -> Hold | Future[None] | None:
        """Reserve as `Ledger.reserve` does: out of what the store has granted, else ask it."""
        with self._lock:
            hangs = not self.alone and self._is_asked and self.patience_left() == 0
        if hangs:
            self.go_alone()
        with self._lock:
            self._begin_period()
            if self.alone or at_once:
                asks = self.is_old
                found = super().reserve(amount, at_once=at_once)
            elif self._spent.plus(amount).excess(self.limit):
                return None
            elif amount.excess(self._credit) is None:
                self._credit = self._credit.minus(amount)
                return self._hold(amount)
            else:
                self._wants.append(amount)
                asks = self._next is None and (self._is_new or not self._declined)
                found = self._wait()
        if asks:
            self.ask()
        self._courier.watch(self)
        return found

    @property
    def _is_new(self) -> bool:
        """Whether nothing has been heard of these books yet."""
        return self._heard_at == -math.inf

    @property
    def _is_asked(self) -> bool:
        return self._next is not None or self._under_way is not None

    def settle(self, hold: Hold, real: Amount) -> None:
        """Perform `Hold.settle`, and let the others know soon."""
        super().settle(hold, real)
        self._courier.watch(self)

    def _charge(self, amount: Amount) -> None:
        super()._charge(amount)
        self._mine = self._mine.plus(amount)

    def _begin_period(self) -> None:
        period = self._period
        super()._begin_period()
        if period != self._period:
            self._begin_books()

    def wants_news(self) -> bool:
        """Whether the store is to hear of anything, or anything is under way or waits."""
        is_calm = self._mine == self._told and self._credit == Amount() and not self._wants
        return not is_calm or bool(self._waiting) or self._reserved.requests >= 1

    # To the store and back; all but `_say` and `_wake` have the lock

    def _draft(self, now: float) -> _Letter:  # noqa: ARG002  # the store has a clock of its own
        self._begin_period()
        period = math.isfinite(self._seconds)
        report = SpendReport(
            member=self._member,
            spent=self._mine,
            held=self._reserved,
            wants=tuple(self._wants),
            limit=self.limit,
            lease=_LEASE,
            kept=self._seconds + KEPT if period else _LIFE,
        )
        self._wants = []
        self._credit = Amount()
        return _Letter(f"{self._base}:{self._period}" if period else self._base, report)

    def _say(self, request: _Letter) -> Verb:
        return Verb("spend", request)

    def _hear(self, now: float, request: _Letter, reply: SpendView) -> None:  # noqa: ARG002
        report = request.report
        if report.member != self._member:
            return  # an earlier period's
        others = reply.spent.minus(report.spent)
        self._spent = others.plus(self._mine)
        self._told = report.spent
        self._credit = self._credit.plus(reply.granted)
        self._declined = bool(report.wants) and reply.granted == Amount()

    def _do_without(self, now: float, request: _Letter | None) -> None:  # noqa: ARG002
        self._credit = Amount()
        self._wants = []
        self._declined = False

    def _wake(self) -> None:
        with self._lock:
            waiting = self._stop_waiting()
        for future in waiting:
            future.set_result(None)
