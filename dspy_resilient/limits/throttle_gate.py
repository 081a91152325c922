"""The throttle gate: closed while the provider wants a pause, then opened by time.

A 429 is no outage: the provider is well and says when to come back. This module keeps that time,
and lets calls back in slowly, since a stampede at the reopening only earns the next 429. It waits
for nothing, and what a response asks for is read elsewhere.
"""

from __future__ import annotations

import itertools
import math
import random as random_numbers
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from dspy_resilient._support.fork import renew_after_fork
from dspy_resilient._support.wait_queue import WaitQueue
from dspy_resilient.events import Throttled

if TYPE_CHECKING:
    from collections.abc import Callable

    from dspy_resilient.events import Listener

_LONGEST_STEP = 30.0
_LEAST_SHARE = 0.1
_FULL = 64
_LONGEST_RAMP = 30.0  # seconds, after which the number let in is beyond any crowd
_SURPRISE = 1e-4
_RECENT = 50
_LONGEST_RUN = 30
_MOST_SENT = 10_000


class GatePermit:
    """Leave to send one call through the gate. The first report counts, later ones do nothing.

    One that is dropped without a report does no harm: the gate opens by time.
    """

    __slots__ = ("gate", "generation", "number", "reported")

    def __init__(self, gate: ThrottleGate, generation: int) -> None:
        self.gate = gate
        self.generation = generation
        self.number = 0
        self.reported = False

    @property
    def is_current(self) -> bool:
        """Whether the gate has not closed since: what has waited meanwhile must ask again."""
        return self.generation == self.gate.generation

    def sent(self) -> None:
        """Report that the request goes out now: its place in the order of sending."""
        self.gate.record_sent(self)

    def answered(self) -> None:
        """Report that the provider answered."""
        self.gate.record_answer(self)

    def throttled(self, hint: float | None) -> float:
        """Report a 429; return the seconds for which the gate is closed now, 0.0 if it is not.

        Args:
            hint: Seconds the provider asked for. None, or a number that makes no sense (not
                finite, not above 0), if it did not say.
        """
        return self.gate.record_throttle(self, hint)

    def release(self) -> None:
        """Report that the call says nothing about the provider's limits, or was not sent."""
        self.gate.record_release(self)


class ThrottleGate(WaitQueue):
    """A gate that 429s close, for all callers of one credential at one endpoint.

    Where 429s are rare, one closes it; where they are a share of all answers, it takes as many in
    a row as chance would produce less than once in 10,000 times, 30 at most. In a row means in the
    order of sending, and a request that is under way counts as accepted until it reports: answers
    take longer than refusals. (A provider that refuses one request in five at random does not want
    a pause, and must not get one call at a time.) The share is that among about the last 50 answers
    and 429s.

    It closes for what the provider asked for. Without a hint it doubles from 1 s up to 30 s with
    each closing that no answer has broken, and draws the wait evenly from a tenth of that to the
    whole: full jitter, but never a wait of nearly nothing. A later 429 may make the wait longer,
    never shorter; one of a call that was let in before the gate closed is old news and no further
    step.

    Then it lets in one call, twice as many in the next second, and so on, whatever has been
    answered by then; each answer makes room for two more at once. When it has let in 64 and has
    room for everybody who waits, it is open, and costs no lock.

    Safe to share between threads, tasks and event loops; nothing here blocks. In a forked child it
    keeps its state but knows of nobody who waits.

    Args:
        clock: Monotonic seconds.
        random: Numbers from 0 to below 1, for the jitter.
        listener: Called with each `Throttled`.
        client: Name of the client, for events.
        target: Label of the target, for events.
    """

    def __init__(
        self,
        *,
        clock: Callable[[], float] = time.monotonic,
        random: Callable[[], float] = random_numbers.random,
        listener: Listener | None = None,
        client: str = "",
        target: str | None = None,
    ) -> None:
        self._set_up(clock, listener)
        self._random = random
        self._client = client
        self._target = target
        self._open = True
        self._generation = 0
        self._closed_until = -math.inf
        self._hinted_until = -math.inf
        self._closings = 0
        self._let_in = 0
        self._answers = 0
        self._numbers = itertools.count(1)
        self._forget()
        renew_after_fork(self)

    # Asking and reporting

    def admit(self) -> GatePermit | None:
        """Return leave to send one call, or None while closed or while enough have been let in."""
        generation = self._generation  # read first: a permit must never look younger than it is
        if self._open:
            return GatePermit(self, generation)
        with self._lock:
            now = self._clock()
            if self._wait(now) > 0:
                return None
            permit = GatePermit(self, self._generation)
            if not self._open:
                self._let_in += 1
                self._open_if_wide(now)
        self._notifier.send()
        return permit

    def record_sent(self, permit: GatePermit) -> None:
        """Take the report of `permit`; called by its own methods."""
        permit.number = next(self._numbers)
        self._sent[permit.number] = None
        if len(self._sent) > _MOST_SENT:  # permits that were lost
            with suppress(KeyError, RuntimeError, StopIteration):
                del self._sent[next(iter(self._sent))]

    def record_answer(self, permit: GatePermit) -> None:
        """Take the report of `permit`; called by its own methods."""
        if self._open:
            if not permit.reported:
                permit.reported = True
                # Without the lock: to lose a count among many is no harm.
                self._count_answer(permit)
            return
        with self._lock:
            if permit.reported:
                return
            permit.reported = True
            if permit.generation == self._generation:
                self._count_answer(permit)
                self._closings = 0
                self._hinted_until = -math.inf
                self._make_room(self._clock())
        self._notifier.send()

    def record_throttle(self, permit: GatePermit, hint: float | None) -> float:
        """Take the report of `permit`; called by its own methods."""
        if hint is not None and not (math.isfinite(hint) and hint > 0):
            hint = None
        with self._lock:
            now = self._clock()
            if not permit.reported:
                permit.reported = True
                if self._count_throttle(permit) or now < self._closed_until:
                    is_news = self._open or permit.generation == self._generation
                    self._close(now, hint, news=is_news)
            closed_for = 0.0 if self._open else max(0.0, self._closed_until - now)
        self._notifier.send()
        return closed_for

    def record_release(self, permit: GatePermit) -> None:
        """Take the report of `permit`; called by its own methods."""
        self._sent.pop(permit.number, None)
        if self._open:
            permit.reported = True
            return
        with self._lock:
            if not permit.reported:
                permit.reported = True
                if permit.generation == self._generation and self._let_in:
                    self._let_in -= 1
                    self._notifier.call(1)
        self._notifier.send()

    def reset(self) -> None:
        """Open, let in all who wait, and forget every 429."""
        with self._lock:
            self._closings = 0
            self._forget()
            self._hinted_until = self._closed_until = -math.inf
            self._open_up()
        self._notifier.send()

    # Looking

    @property
    def generation(self) -> int:
        """Closings so far."""
        return self._generation

    @property
    def hint(self) -> float | None:
        """Seconds from now that the provider asked for: what to tell the caller.

        None if it did not say, if the time is over, or if it has answered since.
        """
        with self._lock:
            left = self._hinted_until - self._clock()
        return left if left > 0 else None

    def recheck_time(self) -> float:
        """Return the seconds after which the waiter that has enlisted last may ask again.

        Each has a time of its own, in the order in which they came.
        """
        with self._lock:
            return self._wait(self._clock(), max(0, self._notifier.waiting - 1))

    def __repr__(self) -> str:
        """Show the target and how long the gate is closed for."""
        with self._lock:
            left = self._closed_until - self._clock()
        how = "open" if self._open else f"closed for {left:.1f} s" if left > 0 else "reopening"
        return f"<ThrottleGate {self._target!r}: {how}>"

    # Under the lock

    def _wait(self, now: float, ahead: int = 0) -> float:
        """Return the seconds until the next call may go behind `ahead` others."""
        if self._open:
            return 0.0
        extra = self._let_in + ahead - 2 * self._answers  # beyond the first
        ramp = math.log2(extra + 2) - 1 if extra > 0 else 0.0
        return max(0.0, self._closed_until + ramp - now)

    def _forget(self) -> None:
        """Know of no request, no answer and no 429."""
        self._share = 0.0
        self._verdicts = 0
        self._accepted = 0  # number of the youngest request that was answered
        self._refused: list[int] = []  # numbers of those later ones that met a 429
        self._sent: dict[int, None] = {}

    def _count_answer(self, permit: GatePermit) -> None:
        number = permit.number
        self._sent.pop(number, None)
        if self._refused:
            explained = sum(each < number or not number for each in self._refused)
            for _ in range(min(explained, math.ceil(self._longest_run()))):  # the rest was no news
                self._learn(1.0)
            self._refused = [each for each in self._refused if each > number > 0]
        self._accepted = max(self._accepted, number)
        self._learn(0.0)

    def _learn(self, is_throttled: float) -> None:
        """Let the share follow one more verdict: the mean of the first 50, then of about as many."""
        self._verdicts = min(self._verdicts + 1, _RECENT)
        self._share += (is_throttled - self._share) / self._verdicts

    def _count_throttle(self, permit: GatePermit) -> bool:
        """Count a 429; return whether chance does not explain those since the last acceptance."""
        number = permit.number or next(self._numbers)
        self._sent.pop(number, None)
        if number > self._accepted:
            self._refused.append(number)
        youngest = max(self._sent.copy(), default=0)
        run = sum(each > youngest for each in self._refused)
        return run >= self._longest_run()

    def _longest_run(self) -> float:
        """Return how many 429s in a row, or about so many, chance produces too seldom."""
        if self._share < _SURPRISE:
            return 1.0
        return min(_LONGEST_RUN, math.log(_SURPRISE) / math.log(self._share))

    def _close(self, now: float, hint: float | None, *, news: bool) -> None:
        if news:
            self._closings += 1
        until = now + (self._pause() if hint is None else hint)
        self._shut(now, until, hint, news=news)

    def _follow(self, now: float, seconds: float, hint: float | None) -> None:
        """Close as long as another client has, after a 429 of the same credential."""
        news = now >= self._closed_until
        if news:
            self._closings += 1
        self._shut(now, now + seconds, hint, news=news)

    def _shut(self, now: float, until: float, hint: float | None, *, news: bool) -> None:
        if news:
            self._generation += 1
        if hint is not None:
            self._hinted_until = max(self._hinted_until, now + hint)
        self._open = False
        self._let_in = self._answers = 0
        if news or until > self._closed_until:
            self._closed_until = max(self._closed_until, until)
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

    def _make_room(self, now: float) -> None:
        """Let in two more while it reopens: the provider has answered."""
        if not self._open and now >= self._closed_until:
            self._answers += 1
            self._notifier.call(2)
            self._open_if_wide(now)

    def _open_if_wide(self, now: float) -> None:
        """Open once there is room for all who wait, and for a crowd."""
        seconds = min(now - self._closed_until, _LONGEST_RAMP)
        allowed = 2.0 ** (seconds + 1) - 1 + 2 * self._answers
        if allowed >= max(_FULL, self._let_in + self._notifier.waiting):
            self._open_up()

    def _open_up(self) -> None:
        self._open = True
        self._notifier.call()
