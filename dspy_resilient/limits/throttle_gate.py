"""The throttle gate: closed while the provider wants a pause, then opened step by step.

A 429 is no outage: the provider is well and says when to come back. This module keeps that time and
lets calls back in slowly, since a stampede at the reopening only earns the next 429. It waits for
nothing, and what a response asks for is read elsewhere.
"""

from __future__ import annotations

import math
import random as random_numbers
import time
from typing import TYPE_CHECKING

from dspy_resilient._support.fork import renew_after_fork
from dspy_resilient._support.wait_queue import WaitQueue
from dspy_resilient.events import Throttled
from dspy_resilient.policies import number

if TYPE_CHECKING:
    from collections.abc import Callable

    from dspy_resilient.events import Listener

_LONGEST_STEP = 30.0
_LEAST_SHARE = 0.1
_LEASE = 60.0
_FULL = 64


class GatePass:
    """Leave to send one call through the gate. The first report counts, later ones do nothing.

    A pass that is dropped without a report gives up its place when its lease is over.
    """

    __slots__ = ("gate", "generation", "reported")

    def __init__(self, gate: ThrottleGate, generation: int) -> None:
        self.gate = gate
        self.generation = generation
        self.reported = False

    @property
    def is_current(self) -> bool:
        """Whether the gate has not closed since: what has waited meanwhile must ask again."""
        return self.generation == self.gate.generation

    def answered(self) -> None:
        """Report that the provider answered: twice as many may go next."""
        self.gate.record_answer(self)

    def throttled(self, hint: float | None) -> float:
        """Report a 429 and close the gate; return the seconds for which it is closed now.

        Args:
            hint: Seconds the provider asked for. None, or a number that makes no sense (not
                finite, not above 0), if it did not say.
        """
        return self.gate.record_throttle(self, hint)

    def release(self) -> None:
        """Report that the call says nothing about the provider's limits."""
        self.gate.record_release(self)


class ThrottleGate(WaitQueue):
    """A gate that a 429 closes, for all callers of one credential at one endpoint.

    It closes for what the provider asked for, at most `max_retry_after`. Without a hint it
    doubles from 1 s up to 30 s with each closing that no answer has broken, and draws the wait
    evenly from a tenth of that to the whole: full jitter, but never a wait of nearly nothing. A
    later 429 may make the wait longer, never shorter; one of a call that was let in before the
    gate closed is old news and no further step.

    Then it lets in one call at a time, and each answer doubles that, until it has reached 64 and
    covers everybody who is under way or in line: from there on it is open, and costs no lock.

    Safe to share between threads, tasks and event loops; nothing here blocks. In a forked child it
    keeps its state but knows of no call under way.

    Args:
        max_retry_after: Longest time in seconds that a hint closes it for. At least 0.
        clock: Monotonic seconds.
        random: Numbers from 0 to below 1, for the jitter.
        listener: Called with each `Throttled`.
        client: Name of the client, for events.
        target: Label of the target, for events.
    """

    def __init__(
        self,
        *,
        max_retry_after: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
        random: Callable[[], float] = random_numbers.random,
        listener: Listener | None = None,
        client: str = "",
        target: str | None = None,
    ) -> None:
        number("ThrottleGate", "max_retry_after", max_retry_after)
        self._set_up(clock, listener)
        self._max_retry_after = max_retry_after
        self._random = random
        self._client = client
        self._target = target
        self._open = True
        self._generation = 0
        self._closed_until = -math.inf
        self._hinted_until = -math.inf
        self._throttled_since: float | None = None
        self._closings = 0
        self._allowed = 1
        renew_after_fork(self)

    # Asking and reporting

    def admit(self, lease: float = 0.0) -> GatePass | None:
        """Return leave to send one call, or None while closed or while enough are under way.

        Args:
            lease: Seconds the call may take (the client's timeout): while the gate reopens, a call
                that has not reported after that, or after 60 s if that is longer, gives up its
                place.
        """
        generation = self._generation  # read first: a pass must never look younger than it is
        if self._open:
            return GatePass(self, generation)
        with self._lock:
            now = self._clock()
            if self._wait(now) > 0:
                return None
            ticket = GatePass(self, self._generation)
            if not self._open:
                self._leases.take(ticket, now + max(_LEASE, lease))
            return ticket

    def record_answer(self, ticket: GatePass) -> None:
        """Take the report of `ticket`; called by its own methods."""
        if self._open:
            ticket.reported = True
            return
        with self._lock:
            if ticket.reported:
                return
            ticket.reported = True
            self._throttled_since = None
            if ticket.generation == self._generation:
                self._leases.give_back(ticket)
                self._widen()
        self._notifier.send()

    def record_throttle(self, ticket: GatePass, hint: float | None) -> float:
        """Take the report of `ticket`; called by its own methods."""
        with self._lock:
            now = self._clock()
            if not ticket.reported:
                ticket.reported = True
                self._close(now, hint, news=self._open or ticket.generation == self._generation)
            closed_for = max(0.0, self._closed_until - now)
        self._notifier.send()
        return closed_for

    def record_release(self, ticket: GatePass) -> None:
        """Take the report of `ticket`; called by its own methods."""
        if self._open:
            ticket.reported = True
            return
        with self._lock:
            if not ticket.reported:
                ticket.reported = True
                if self._leases.give_back(ticket):
                    self._notifier.call(1)
        self._notifier.send()

    def reset(self) -> None:
        """Open, let in whoever waits, and forget every 429."""
        with self._lock:
            self._closings = 0
            self._hinted_until = self._closed_until = -math.inf
            self._throttled_since = None
            self._open_up()
        self._notifier.send()

    # Looking

    @property
    def generation(self) -> int:
        """Closings so far."""
        return self._generation

    @property
    def hint(self) -> float | None:
        """Seconds from now that the provider asked for, however many: what to tell the caller.

        None if it did not say, if the time is over, or if it has answered since.
        """
        with self._lock:
            left = self._hinted_until - self._clock()
        return left if left > 0 else None

    @property
    def unbroken(self) -> float:
        """Seconds since the first 429 that no answer has followed; 0.0 if there is none."""
        with self._lock:
            since = self._throttled_since
            return 0.0 if since is None else self._clock() - since

    def __repr__(self) -> str:
        """Show the target and how long the gate is closed for."""
        wait = self.wait_time()
        how = (
            "open" if wait == 0 else "reopening" if math.isinf(wait) else f"closed for {wait:.1f} s"
        )
        return f"<ThrottleGate {self._target!r}: {how}>"

    # Under the lock

    def _wait(self, now: float) -> float:
        if self._open:
            return 0.0
        if now < self._closed_until:
            return self._closed_until - now
        return 0.0 if self._leases.taken(now) < self._allowed else math.inf

    def _close(self, now: float, hint: float | None, *, news: bool) -> None:
        if hint is not None and not (math.isfinite(hint) and hint > 0):
            hint = None
        if news:
            self._closings += 1
        until = now + (self._pause() if hint is None else min(hint, self._max_retry_after))
        self._shut(now, until, hint, news=news)

    def _follow(self, now: float, seconds: float, hint: float | None) -> None:
        """Close as long as another client has, after a 429 of the same credential."""
        news = now >= self._closed_until
        if news:
            self._closings += 1
        self._shut(now, now + min(seconds, self._max_retry_after), hint, news=news)

    def _shut(self, now: float, until: float, hint: float | None, *, news: bool) -> None:
        if news:
            self._generation += 1
            self._leases.clear()
        if self._throttled_since is None:
            self._throttled_since = now
        if hint is not None:
            self._hinted_until = max(self._hinted_until, now + hint)
        self._open = False
        self._allowed = 1
        if news or until > self._closed_until:
            self._closed_until = max(self._closed_until, until)
            self._notifier.call()
            self._notifier.note(
                Throttled(
                    client=self._client,
                    at=now,
                    target=self._target,
                    seconds=self._closed_until - now,
                    hint=hint,
                )
            )

    def _pause(self) -> float:
        longest = min(2.0 ** min(max(self._closings - 1, 0), 5), _LONGEST_STEP)
        return longest * (_LEAST_SHARE + (1 - _LEAST_SHARE) * self._random())

    def _widen(self) -> None:
        self._closings = 0
        self._hinted_until = -math.inf
        now = self._clock()
        if now < self._closed_until:  # an older call's 429 has closed it again meanwhile
            return
        self._allowed *= 2
        in_flight = self._leases.taken(now)
        if self._allowed >= max(_FULL, in_flight + self._notifier.waiting):
            self._open_up()
        else:
            self._notifier.call(self._allowed - in_flight)

    def _open_up(self) -> None:
        """Let everybody through: nobody needs a place any more, nor gives one back."""
        self._open = True
        self._leases.clear()
        self._notifier.call()
