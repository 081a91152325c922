"""Identical calls under way share one provider call (single-flight).

Whoever joins first leads and sends; the others wait for what the leader lands. This module keeps
who leads, who waits and how old the attempts are. It sends nothing, waits for nothing, and knows
no event loop: a waiter has a `concurrent.futures.Future`, on which a thread can block and a task
can wait. The idea is that of Go's x/sync/singleflight, plus cancellation, promotion and ages.
"""

from __future__ import annotations

import copy
import threading
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from dspy_resilient._support.fork import renew_after_fork
from dspy_resilient.outcomes.broken_state import needs_intact_state

if TYPE_CHECKING:
    from collections.abc import Callable

    from dspy_resilient.cache.answer import Answer

E = TypeVar("E", bound=BaseException)

_LEAST_WAIT = 0.01


@dataclass(frozen=True, slots=True)
class Landed:
    """A leader's answer, for everybody who waited."""

    answer: Answer


@dataclass(frozen=True, slots=True)
class Failed:
    """The provider's error: a copy for each who waited, with the leader's own as its cause."""

    error: BaseException


@dataclass(slots=True, eq=False)
class _Flight:
    """One key's leads under way and waiters in the order they came; never without a lead."""

    key: str
    leads: list[Lead] = field(default_factory=list)
    waiters: dict[Waiter, None] = field(default_factory=dict)
    answer: Answer | None = None
    held: float = 0.0
    held_until: float | None = None


class Lead:
    """The duty to send. It ends with `land`, `fail` or `abandon`; only the first one counts.

    Attributes:
        flight: Note of the flights.
        sent_at: When the current attempt was sent, or None between attempts.
        held: Seconds for which the leader before this one was held up.
        held_until: The clock's reading when it could be held up no longer, or None.
    """

    __slots__ = ("_flights", "flight", "held", "held_until", "sent_at")

    def __init__(self, flights: Flights, flight: _Flight) -> None:
        """Belong to `flights`, which alone makes leads."""
        self._flights = flights
        self.flight = flight
        self.sent_at: float | None = None
        self.held, self.held_until = flight.held, flight.held_until

    def sent(self) -> None:
        """Count the flight's age from now: an attempt goes out."""
        self.sent_at = self._flights.clock()

    def returned(self) -> Answer | None:
        """Let the flight age no more, as the attempt has ended without an answer.

        Returns:
            What another lead of the same flight has landed meanwhile: serve that.
        """
        self.sent_at = None
        return self.flight.answer

    def land(self, answer: Answer) -> None:
        """Hand `answer` to all who wait, and end the flight."""
        self._flights.land(self, answer)

    def fail(self, error: BaseException) -> None:
        """Hand a provider's error to all who wait, unless another lead is still under way."""
        self._flights.fail(self, error)

    def abandon(self, held: float = 0.0, held_until: float | None = None) -> None:
        """End without news (cancelled, out of time, refused by us): another caller has to send.

        The one who has waited longest takes over, unless another lead's attempt is young enough
        to wait for. Never blocks: it may be called by a finalizer.

        Args:
            held: Seconds for which this call was held up: who waited behind it was so, too.
            held_until: The clock's reading when it could be held up no longer, or None.
        """
        self.flight.held, self.flight.held_until = held, held_until
        self._flights.leave(self)


class Waiter:
    """A place among those who wait.

    Attributes:
        future: Resolves to `Landed`, to `Failed`, or to the `Lead` that has come to this waiter.
            It cannot be cancelled.
        flight: Note of the flights.
        lead: Note of the flights: the lead that has come to this waiter.
    """

    __slots__ = ("_flights", "flight", "future", "lead")

    def __init__(self, flights: Flights, flight: _Flight) -> None:
        """Belong to `flights`, which alone makes waiters."""
        self._flights = flights
        self.flight = flight
        self.future: Future[Landed | Failed | Lead] = Future()
        self.future.set_running_or_notify_cancel()
        self.lead: Lead | None = None

    def straggles_in(self, patience: float) -> float:
        """Return the seconds until the attempt that is waited for has taken `patience` seconds."""
        return self._flights.straggles_in(self.flight, patience)

    def overtake(self, patience: float) -> Lead | None:
        """Return a lead of the same flight if all its attempts have taken longer than `patience`.

        None if another caller has just sent one, or there is news in `future`.
        """
        return self._flights.overtake(self, patience)

    def leave(self) -> None:
        """Give up the place without having taken what `future` may hold by now.

        A lead that has just come here goes on to the next. Not for a waiter that has taken its
        lead: that one ends it. Never blocks: it may be called by a finalizer.
        """
        self._flights.leave(self)


class Flights:
    """All flights of a client; safe for threads, event loops and forks.

    Args:
        clock: Monotonic seconds.
        max_age: Seconds after which an attempt is no longer waited for by newcomers: one of them
            sends its own, and the first answer serves both. With 0 nobody ever waits.
    """

    def __init__(
        self, *, clock: Callable[[], float] = time.monotonic, max_age: float = 60.0
    ) -> None:
        self.clock = clock
        self._max_age = max_age
        self._flights: dict[str, _Flight] = {}
        # A finalizer may run inside a locked block of its own thread, so what may come from one
        # (somebody leaving) is put here for whoever holds the lock.
        self._leaving: deque[Lead | Waiter] = deque()
        self._lock = threading.Lock()
        renew_after_fork(self)

    def __len__(self) -> int:
        """Return how many keys are under way."""
        return len(self._flights)

    @needs_intact_state
    def join(self, key: str) -> Lead | Waiter:
        """Return the lead for `key`, or a place behind whoever leads."""
        now = self.clock()
        place: Lead | Waiter | None = None
        try:
            with self._lock:
                flight = self._flights.get(key) or _Flight(key)
                if self._is_worth_waiting_for(flight, now):
                    place = waiter = Waiter(self, flight)
                    flight.waiters[waiter] = None
                else:
                    place = lead = Lead(self, flight)
                    self._flights[key] = flight
                    flight.leads.append(lead)
            self._see_off()
        except BaseException:  # Ctrl-C
            if place is not None:
                self.leave(place)
            raise
        return place

    @needs_intact_state
    def land(self, lead: Lead, answer: Answer) -> None:
        """Do what `Lead.land` says."""
        flight = lead.flight
        with self._lock:
            waiters: list[Waiter] = []
            if lead in flight.leads:
                flight.answer = answer
                waiters = self._end(flight)
        for waiter in waiters:
            waiter.future.set_result(Landed(answer))
        self._see_off()

    @needs_intact_state
    def fail(self, lead: Lead, error: BaseException) -> None:
        """Do what `Lead.fail` says."""
        flight = lead.flight
        with self._lock:
            waiters: list[Waiter] = []
            if lead in flight.leads:
                flight.leads.remove(lead)
                if not flight.leads:
                    waiters = self._end(flight)
        for waiter in waiters:
            waiter.future.set_result(Failed(_copy_of(error)))
        self._see_off()

    @needs_intact_state
    def leave(self, who: Lead | Waiter) -> None:
        """Do what `Lead.abandon` and `Waiter.leave` say."""
        self._leaving.append(who)
        self._see_off()

    def straggles_in(self, flight: _Flight, patience: float) -> float:
        """Do what `Waiter.straggles_in` says."""
        now = self.clock()
        with self._lock:
            sent = [now if lead.sent_at is None else lead.sent_at for lead in flight.leads]
        self._see_off()
        return max(max(sent, default=now) + patience - now, _LEAST_WAIT)

    def overtake(self, waiter: Waiter, patience: float) -> Lead | None:
        """Do what `Waiter.overtake` says."""
        flight, lead = waiter.flight, None
        with self._lock:
            is_late = not self._is_worth_waiting_for(flight, self.clock(), patience)
            if waiter in flight.waiters and is_late:
                del flight.waiters[waiter]
                lead = waiter.lead = Lead(self, flight)
                flight.leads.append(lead)
        self._see_off()
        return lead

    def disband(self) -> None:
        """Give each flight that has lost its lead a new one: another table has taken this one's place.

        The leads under way go on and answer those who wait behind them.
        """
        with self._lock:
            lost = [each for each in self._flights.values() if not each.leads]
            promoted: list[tuple[Waiter, Lead]] = []
            for flight in lost:
                self._promote(flight, promoted)
        for waiter, lead in promoted:
            waiter.future.set_result(lead)

    def renew(self) -> None:
        """Forget, in a forked child, what only its parent has under way."""
        for flight in self._flights.values():
            flight.waiters.clear()
        self._flights = {}
        self._leaving.clear()
        self._lock = threading.Lock()

    def _see_off(self) -> None:
        """Let all go who are leaving, unless the lock is held: its holder will do so."""
        while self._leaving and self._lock.acquire(blocking=False):
            promoted: list[tuple[Waiter, Lead]] = []
            try:
                while self._leaving:
                    self._let_go(self._leaving.popleft(), promoted)
            finally:
                self._lock.release()
            for waiter, lead in promoted:
                waiter.future.set_result(lead)

    def _let_go(self, who: Lead | Waiter, promoted: list[tuple[Waiter, Lead]]) -> None:
        """Take `who` out of its flight, and pass a lead on; the lock is held."""
        flight = who.flight
        if isinstance(who, Waiter):
            if who in flight.waiters:
                del flight.waiters[who]
            if who.lead is None:
                return
            who = who.lead
        if who not in flight.leads:
            return
        flight.leads.remove(who)
        if self._is_worth_waiting_for(flight, self.clock()):
            return
        if not self._promote(flight, promoted) and not flight.leads:
            self._end(flight)

    def _promote(self, flight: _Flight, promoted: list[tuple[Waiter, Lead]]) -> bool:
        """Pass a lead to the one who has waited longest, if anybody waits; the lock is held."""
        heir = next(iter(flight.waiters), None)
        if heir is None:
            return False
        del flight.waiters[heir]
        heir.lead = Lead(self, flight)
        flight.leads.append(heir.lead)
        promoted.append((heir, heir.lead))
        return True

    def _is_worth_waiting_for(
        self, flight: _Flight, now: float, max_age: float | None = None
    ) -> bool:
        """Whether some attempt is young enough; one that is not under way has no age."""
        most = self._max_age if max_age is None else max_age
        return any(
            (0.0 if lead.sent_at is None else now - lead.sent_at) < most for lead in flight.leads
        )

    def _end(self, flight: _Flight) -> list[Waiter]:
        """Close `flight` and return who waited; the lock is held."""
        if self._flights.get(flight.key) is flight:
            del self._flights[flight.key]
        waiters = list(flight.waiters)
        flight.waiters.clear()
        flight.leads.clear()
        return waiters


def _copy_of(error: E) -> E:
    """Return a copy of `error` with the original as its cause, or the original if it has none."""
    try:
        twin = copy.copy(error)
    except Exception:  # noqa: BLE001  # an exception class may refuse in any way
        return error
    if twin is error or type(twin) is not type(error):
        return error
    if notes := getattr(error, "__notes__", None):
        twin.__notes__ = list(notes)
    twin.__cause__ = error
    return twin
