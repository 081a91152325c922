"""A store in this process: for clients that are to share without a server, for tests, on paper time.

It runs the very state machine of a single client, under one short lock; the server-side scripts of
`redis.py` do the same in their language.
"""

from __future__ import annotations

import math
import threading
import time
from typing import TYPE_CHECKING, Any

import cachetools

from dspy_resilient._support.fork import renew_after_fork
from dspy_resilient._support.wait_queue import Notifier
from dspy_resilient.budgets import Amount
from dspy_resilient.circuit import CircuitState
from dspy_resilient.circuit.machine import Machine
from dspy_resilient.outcomes import Outcome
from dspy_resilient.shared.store import (
    FASTEST_FOR,
    KEPT,
    CachedText,
    CircuitView,
    RateView,
    SpendView,
    ThrottleView,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from dspy_resilient.policies import CircuitPolicy
    from dspy_resilient.shared.store import (
        CacheOrder,
        CircuitReport,
        CircuitVerdict,
        RateReport,
        SpendReport,
        ThrottleReport,
        Verb,
    )

_MOST = 65_536


class MemoryStore:
    """A store for clients in one process; safe for threads. In a forked child it starts empty.

    Args:
        namespace: See `Store`.
        clock: Seconds.
    """

    def __init__(self, namespace: str = "", *, clock: Callable[[], float] = time.monotonic) -> None:
        self.namespace = namespace
        self._clock = clock
        self.renew()
        renew_after_fork(self)

    def renew(self) -> None:
        """Start empty: what a forked child does."""
        self._lock = threading.Lock()
        self._kept: Any = cachetools.TTLCache(_MOST, KEPT, timer=self._clock)
        self._answers: Any = cachetools.TTLCache(_MOST, KEPT, timer=self._clock)

    def close(self) -> None:
        """Do nothing: there is no connection."""

    def circuit(self, key: str, policy: CircuitPolicy, report: CircuitReport) -> CircuitView:
        """Answer `Store.circuit`; the policy of whoever came first is in force."""
        with self._lock:
            now = self._clock()
            circuit = self._kept.get(key) or _Circuit(policy, now)
            self._kept[key] = circuit
            return circuit.hear(now, report)

    def throttle(self, key: str, report: ThrottleReport) -> ThrottleView:
        """Answer `Store.throttle`."""
        with self._lock:
            now = self._clock()
            gate = self._kept[key] = self._kept.get(key) or _Gate()
            return gate.hear(now, report)

    def rate(self, key: str, reports: Mapping[str, RateReport]) -> RateView:
        """Answer `Store.rate`."""
        with self._lock:
            now = self._clock()
            rates = self._kept[key] = dict(self._kept.get(key, {}))
            full_in = {}
            for name, report in reports.items():
                full_at, fastest, until = rates.get(name, (now + report.believed, 0.0, now))
                if report.per_minute >= fastest or now >= until:
                    fastest, until = report.per_minute, now + FASTEST_FOR
                full_at = max(full_at, now) + report.amount / (fastest / 60)
                rates[name] = full_at, fastest, until
                full_in[name] = full_at - now
            return RateView(now, full_in)

    def spend(self, key: str, report: SpendReport) -> SpendView:
        """Answer `Store.spend`."""
        with self._lock:
            books = self._kept[key] = self._kept.get(key) or _Books()
            return books.hear(self._clock(), report)

    def cache(self, key: str, orders: Sequence[CacheOrder]) -> list[CachedText | None]:
        """Answer `Store.cache`."""
        with self._lock:
            return [self._cache(key, order, self._clock()) for order in orders]

    def together(self, verbs: Sequence[Verb]) -> list[Any]:
        """Answer `Store.together`."""
        return [getattr(self, verb.name)(*verb.arguments) for verb in verbs]

    def _cache(self, key: str, order: CacheOrder, now: float) -> CachedText | None:
        answers, place = self._answers, (key, order.name)
        if order.doing == "load":
            stored, text = answers.get(place, (-math.inf, b""))
            if now - stored >= order.kept or not text:
                return None
            answers[place] = stored, text  # in use
            return CachedText(now - stored, text)
        if order.doing == "store":
            answers[place] = now, order.text
        elif order.doing == "forget":
            answers.pop(place, None)
        else:
            for each in [each for each in answers if each[0] == key]:
                del answers[each]
        return None


class _Circuit:
    """One circuit: the state machine, and the stamp of its last change."""

    def __init__(self, policy: CircuitPolicy, now: float) -> None:
        self._draw = 0.5
        self._machine = Machine(
            policy, now, lambda: self._draw, Notifier(None), longest_hint=math.inf, client=""
        )
        self._stamp = 0

    def hear(self, now: float, report: CircuitReport) -> CircuitView:
        self._draw = report.draw
        machine = self._machine
        believed = report.generation
        if believed is None:
            believed = math.floor((now - report.age) * 1e6)
        if believed > self._stamp:
            machine.adopt(now, report)
            self._stamp = believed
        generation = machine.generation
        for verdict in report.verdicts:
            self._count(now, verdict, current=believed == self._stamp)
            changes, generation = machine.generation - generation, machine.generation
            if changes:
                self._stamp = max(math.floor(now * 1e6), self._stamp + 1) + changes - 1
        granted = report.probe and machine.lets_probe(now)
        return self._view(now, granted=granted)

    def _count(self, now: float, verdict: CircuitVerdict, *, current: bool) -> None:
        machine, began = self._machine, now - verdict.age
        if verdict.outcome is Outcome.SUCCESS:
            for i in range(verdict.number):
                slow = i >= verdict.number - verdict.slow
                machine.succeed(now, began, slow=slow, ended=now - verdict.late)
        elif verdict.outcome is Outcome.FAILURE and current:
            hint = verdict.retry_after
            machine.fail(now, began, verdict.reason or "", verdict.error, hint)

    def _view(self, now: float, *, granted: bool) -> CircuitView:
        machine = self._machine
        return CircuitView(
            generation=self._stamp,
            granted=granted,
            state=CircuitState(machine.state),
            age=now - machine.since,
            remaining=machine.wait(now),
            run_age=now - machine.run_began,
            failures=machine.failures,
            share=machine.share,
            reason=machine.reason,
            error=machine.last_error,
        )


class _Books:
    """What each member of one budget has spent and holds, and until when that is believed."""

    def __init__(self) -> None:
        self._members: dict[str, tuple[float, Amount, Amount]] = {}

    def hear(self, now: float, report: SpendReport) -> SpendView:
        members = self._members
        members[report.member] = now + report.lease, report.spent, report.held
        spent = reserved = granted = Amount()
        for until, paid, held in members.values():
            spent = spent.plus(paid)
            if until > now:
                reserved = reserved.plus(held)
            else:
                spent = spent.plus(held)
        for want in report.wants:
            if spent.plus(reserved).plus(want).excess(report.limit) is None:
                granted, reserved = granted.plus(want), reserved.plus(want)
        mine = report.held.plus(granted)
        members[report.member] = now + report.lease, report.spent, mine
        return SpendView(at=now, spent=spent, reserved=reserved, granted=granted)


class _Gate:
    """When one throttle gate opens again, and the stamp of its last change."""

    def __init__(self) -> None:
        self._closed = self._hinted = -math.inf
        self._stamp = 0

    def hear(self, now: float, report: ThrottleReport) -> ThrottleView:
        before = self._closed, self._hinted
        if report.reset:
            self._closed = self._hinted = -math.inf
        reported = now + report.seconds
        if report.seconds > 0:
            self._closed = max(self._closed, reported)
        if report.hint > 0:
            self._hinted = max(self._hinted, now + report.hint)
        if (self._closed, self._hinted) != before:
            self._stamp = max(math.floor(now * 1e6), self._stamp + 1)
        return ThrottleView(
            at=now,
            stamp=self._stamp,
            seconds=max(0.0, self._closed - now),
            hint=max(0.0, self._hinted - now),
            longer=self._closed > reported,
        )
