"""A circuit that a client has in common with others.

While the store answers, it decides: this process reports how calls ended, takes over what has come
of it, and sends a probe only with the store's leave. When the store does not answer, this is an
ordinary circuit again, from where it stood. Transitions and rules are the machine's, here and
there.
"""

from __future__ import annotations

import dataclasses
import math
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from dspy_resilient._support.redact import describe
from dspy_resilient.circuit import CircuitBreaker, CircuitState, Permit
from dspy_resilient.circuit.breaker import NO_GENERATION
from dspy_resilient.outcomes import Outcome
from dspy_resilient.shared.link import VIEW_AGE, Link
from dspy_resilient.shared.store import CircuitReport, CircuitVerdict, CircuitView, Verb

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from concurrent.futures import Future

    from dspy_resilient.policies import CircuitPolicy
    from dspy_resilient.shared.link import Courier

_SUCCESS, _FAILURE = Outcome.SUCCESS, Outcome.FAILURE

_LONG_AGO = 5.0
"""Seconds after which a call waits for news, though all was well when the store last said so."""


def _tells_of_failure(verdicts: Sequence[CircuitVerdict]) -> bool:
    return any(each.outcome is _FAILURE for each in verdicts)


class SharedCircuit(Link[CircuitReport, CircuitView], CircuitBreaker):
    """A `CircuitBreaker` whose state is that of all clients with the same key.

    What is done by hand reaches the others within `VIEW_AGE` seconds too. Used outside of a call
    (as a decorator, or on its own) it goes by what this process has last heard.

    Args:
        courier: The way to the store.
        key: Where the state lies.
        policy: When it opens; every client goes by its own.
        longest_hint: As for `CircuitBreaker`.
        **facts: As for `CircuitBreaker`.
    """

    def __init__(
        self,
        courier: Courier,
        key: str,
        policy: CircuitPolicy,
        *,
        longest_hint: float = 60.0,
        **facts: Any,
    ) -> None:
        super().__init__(policy, longest_hint=longest_hint, **facts)
        longest = max(policy.recovery_time, policy.max_recovery_time) * (1 + policy.jitter)
        self._longest_wait = max(longest, longest_hint)
        self._key = key
        self._begin(courier)
        self._forget_calls()
        self._stamp = 0
        self._stamped = self._drafted = self._machine.generation

    def _forget_calls(self) -> None:
        self._askers = 0
        self._wishes = self._granted = False
        self._outbox: list[CircuitVerdict] = []  # their ages count from when the clock read 0

    def renew(self) -> None:
        """Make the circuit usable in a forked child, where its callers do not exist."""
        super().renew()
        self._begin(self._courier)
        self._forget_calls()

    # Asking

    @contextmanager
    def consulting(self) -> Iterator[Future[bool] | None]:
        """Give what to wait for, if anything, before `try_admit` is called inside the block."""
        with self._lock:
            self._askers += 1
        try:
            yield self._question()
        finally:
            with self._lock:
                self._askers -= 1

    def _question(self) -> Future[bool] | None:
        with self._lock:
            machine, now = self._machine, self._clock()
            if self.alone:
                needs, worth = False, self.is_old
            elif machine.passes:
                if self._under_way is not None and _tells_of_failure(self._under_way.verdicts):
                    return self._arrives  # this verdict may be the one that opens it
                age = now - self._heard_at
                trouble = machine.failures > 0 or _tells_of_failure(self._outbox)
                needs = trouble or age >= _LONG_AGO
                worth = needs or age >= VIEW_AGE / 2
            elif self._granted or machine.wait(now) > 0:
                needs, worth = False, self.is_old
            else:
                needs = worth = self._wishes = True
        future = self.ask() if worth else None
        return future if needs else None

    def try_admit(self) -> Permit | None:
        """Return leave to make one call, or None; see `CircuitBreaker.try_admit`."""
        machine = self._machine
        generation = machine.generation
        if machine.state is CircuitState.CLOSED:
            return Permit(self, generation, self._clock())
        with self._lock:
            goes_by_store = self._askers > 0 and not self.alone and not machine.passes
            if goes_by_store and self._granted:
                self._granted = False
                probe = Permit(self, machine.generation, self._clock(), probe=True)
                machine.probe = probe
                return probe
            if goes_by_store and self.policy.mode != "observe":
                self._rejected += 1
                return None
        return super().try_admit()

    def enlist(self) -> Future[float]:
        """Wait as at any circuit; meanwhile the store is asked for news."""
        waiter = super().enlist()
        self._courier.watch(self)
        return waiter

    def wants_news(self) -> bool:
        """Whether a caller waits."""
        return self._notifier.waiting > 0

    def _wake(self) -> None:
        self._notifier.send()

    # Reporting

    def record(
        self,
        permit: Permit,
        outcome: Outcome,
        error: BaseException | str | None = None,
        *,
        retry_after: float | None = None,
        reason: str = "failures",
    ) -> None:
        """Take the report of `permit`; called by its own methods."""
        if self.alone:
            super().record(permit, outcome, error, retry_after=retry_after, reason=reason)
            return
        text = None if error is None else describe(error)
        with self._lock:
            if permit.reported:
                return
            permit.reported = True
            machine, began = self._machine, permit.started_at
            if outcome is _SUCCESS and permit.generation != NO_GENERATION:
                self._count_success(began, slow=self._is_slow(self._clock() - began))
                is_news = not machine.passes and began >= machine.run_began
            elif outcome is _FAILURE and permit.generation == machine.generation:
                hint = machine.floor(retry_after) or None
                self._outbox.append(
                    CircuitVerdict(_FAILURE, -began, 1, 0, reason, text, retry_after=hint)
                )
                is_news = True
            else:
                return
        if is_news:
            self.ask()

    def _count_success(self, began: float, *, slow: bool) -> None:
        outbox, late = self._outbox, -self._clock()
        verdict = CircuitVerdict(_SUCCESS, -began, 1, int(slow), late=late)
        if outbox and outbox[-1].outcome is _SUCCESS:
            last = outbox.pop()
            youngest = min(last.age, verdict.age)
            number, slows = last.number + 1, last.slow + int(slow)
            verdict = CircuitVerdict(_SUCCESS, youngest, number, slows, late=late)
        outbox.append(verdict)

    # Control by hand

    def trip(
        self,
        reason: str = "manual",
        *,
        error: BaseException | str | None = None,
        retry_after: float | None = None,
    ) -> None:
        """Open for all; see `CircuitBreaker.trip`."""
        machine, before = self._machine, self._machine.generation
        super().trip(reason, error=error, retry_after=retry_after)
        with self._lock:
            hint = machine.floor(retry_after)
            if machine.generation == before and hint > 0 and machine.state is CircuitState.OPEN:
                text, began = machine.last_error, self._clock()  # only for longer: no other change
                self._outbox.append(CircuitVerdict(_FAILURE, -began, 1, 0, reason, text, hint))
        self.ask()

    def force_open(self, reason: str = "manual", seconds: float | None = None) -> None:
        """Refuse everybody's calls; see `CircuitBreaker.force_open`."""
        super().force_open(reason, seconds)
        self.ask()

    def force_half_open(self) -> None:
        """Let probes through now, whoever sends them."""
        super().force_half_open()
        self.ask()

    def force_closed(self) -> None:
        """Let everybody's calls through until `auto()` or `reset()`."""
        super().force_closed()
        self.ask()

    def auto(self) -> None:
        """End for everybody what was forced."""
        super().auto()
        self.ask()

    def reset(self) -> None:
        """Close for everybody, and forget every failure and opening."""
        super().reset()
        self.ask()

    # To the store and back; all but `_say` have the lock

    def _draft(self, now: float) -> CircuitReport:
        machine = self._machine
        verdicts, self._outbox = tuple(_aged(self._outbox, now)), []
        wishes, self._wishes = self._wishes, False
        self._drafted, self._drafted_at = machine.generation, now
        return CircuitReport(
            generation=self._stamp if machine.generation == self._stamped else None,
            state=machine.state,
            age=now - machine.since,
            remaining=machine.wait(now),
            run_age=now - machine.run_began,
            failures=machine.failures,
            share=machine.share,
            reason=machine.reason,
            error=machine.last_error,
            verdicts=verdicts,
            probe=wishes,
            draw=self._random(),
        )

    def _say(self, request: CircuitReport) -> Verb:
        return Verb("circuit", (self._key, self.policy, request))

    def _read(self, request: CircuitReport, reply: CircuitView) -> CircuitView:  # noqa: ARG002
        """Return the reply with its times within what the policy allows, whatever the store says."""
        by_hand = reply.state is CircuitState.FORCED_OPEN
        longest = math.inf if by_hand else self._longest_wait
        return dataclasses.replace(
            reply,
            age=max(0.0, reply.age),
            remaining=min(max(0.0, reply.remaining), longest),
            run_age=max(0.0, reply.run_age),
        )

    def _hear(self, now: float, request: CircuitReport, reply: CircuitView) -> None:
        machine = self._machine
        if machine.generation != self._drafted:  # by hand, meanwhile: the newest change counts
            self.ask()
            return
        is_ours = request.generation is None and reply.state == machine.state
        if reply.generation == self._stamp or is_ours:
            machine.follow(now, reply)
        else:
            machine.adopt(now, reply)
            self._outbox = [each for each in self._outbox if each.outcome is _SUCCESS]
            self._granted = False
        self._stamp, self._stamped = reply.generation, machine.generation
        if reply.granted:
            self._granted = True
            machine.announce_probe(now)

    def _do_without(self, now: float, request: CircuitReport | None) -> None:
        machine = self._machine
        unheard = self._outbox
        if request is not None:
            unheard = [*_aged(request.verdicts, -self._drafted_at), *unheard]
        generation = machine.generation
        self._outbox, self._granted = [], False
        for each in unheard:
            began = -each.age
            if each.outcome is _SUCCESS:
                for i in range(each.number):
                    slow = i >= each.number - each.slow
                    machine.succeed(now, began, slow=slow, ended=-each.late)
            elif generation == machine.generation:
                machine.fail(now, began, each.reason or "", each.error, each.retry_after)
        self._notifier.call()


def _aged(verdicts: Sequence[CircuitVerdict], seconds: float) -> Iterator[CircuitVerdict]:
    """Yield `verdicts` as they are so many seconds later."""
    for each in verdicts:
        yield each._replace(age=each.age + seconds, late=each.late + seconds)
