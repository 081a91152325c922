"""The circuit's state machine: what opens it, for how long, and what closes it again.

Pure decisions. The time is an argument, and the lock belongs to the owner (`breaker.py`), who
holds it around every call: nothing here waits, calls the provider, or delivers an event.
"""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Any, Protocol

from dspy_resilient.circuit.state import CircuitState
from dspy_resilient.circuit.window import Window
from dspy_resilient.events import CircuitClosed, CircuitHalfOpened, CircuitOpened

if TYPE_CHECKING:
    from collections.abc import Callable

    from dspy_resilient._support.wait_queue import LeaseTable, Notifier
    from dspy_resilient.events import Event
    from dspy_resilient.policies import CircuitPolicy

_AT_ONCE = frozenset({"billing"})
"""Reasons for which one failure is enough: repeating the call cannot help."""

_CLOSED, _HALF_OPEN = CircuitState.CLOSED, CircuitState.HALF_OPEN
_PASSING = (_CLOSED, CircuitState.FORCED_CLOSED)
_REFUSING = (CircuitState.OPEN, CircuitState.FORCED_OPEN)


class Standing(Protocol):
    """How a circuit stands by somebody else's account; see `Machine` and `wait`."""

    @property
    def state(self) -> CircuitState: ...
    @property
    def age(self) -> float: ...
    @property
    def remaining(self) -> float: ...
    @property
    def failures(self) -> int: ...
    @property
    def openings(self) -> int: ...
    @property
    def reason(self) -> str | None: ...
    @property
    def error(self) -> str | None: ...


class Machine:
    """State of one circuit; needs its owner's lock throughout.

    Every change of state starts a new generation, calls all waiters and takes back all places; a
    result of an earlier generation is not for this machine.

    Attributes:
        state: The state as last decided. An OPEN one whose time is over becomes HALF_OPEN with
            the next call that asks; see `seen`.
        since: The clock's reading at the last change.
        open_until: The clock's reading at which OPEN or FORCED_OPEN ends; inf for without end.
        generation: Number of changes so far.
        failures: Failures since the last success.
        openings: Consecutive openings, as of the last change; `held` forgives some while closed.
        reason: Why it last opened.
        last_error: Redacted text of the last failure.
    """

    def __init__(
        self,
        policy: CircuitPolicy,
        now: float,
        random: Callable[[], float],
        signals: Notifier,
        places: LeaseTable,
        **facts: Any,
    ) -> None:
        self.policy = policy
        self.state = _CLOSED
        self.since = self.open_until = now
        self.generation = 0
        self.failures = 0
        self.openings = 0
        self.reason: str | None = None
        self.last_error: str | None = None
        self._random = random
        self._notifier = signals
        self._leases = places
        self._facts = facts
        self._window = Window(policy.window)
        self._successes = 0
        self._left_closed = now
        self._steps = steps_to_longest(policy)

    def seen(self, now: float) -> CircuitState:
        """Return the state as a caller would find it."""
        if self.refuses and now >= self.open_until:
            return _HALF_OPEN
        return self.state

    def wait(self, now: float) -> float:
        """Return the seconds until a call would be let in; inf if nobody can tell."""
        if self.passes:
            return 0.0
        if self.refuses:
            return max(0.0, self.open_until - now)
        return 0.0 if self.has_place(now) else math.inf

    @property
    def passes(self) -> bool:
        """Whether it lets every call through."""
        return self.state in _PASSING

    @property
    def refuses(self) -> bool:
        """Whether it refuses every call until a time, which may be over."""
        return self.state in _REFUSING

    def has_place(self, now: float) -> bool:
        """Whether a probe more may go."""
        return self._leases.taken(now) < self.policy.probes

    def lets_probe(self, now: float, *, early: bool = False) -> bool:
        """Whether a call that found it not closed may go as a probe; becomes half-open if due."""
        if self.state is not _HALF_OPEN:
            if now < self.open_until and not (early and self.early_wait(now) == 0):
                return False
            self.become_half_open(now)
        return self.has_place(now)

    def early_wait(self, now: float) -> float:
        """Return the seconds until an early probe may go; inf if none may."""
        if self.state is not CircuitState.OPEN:
            return math.inf
        return max(0.0, self.since + self.policy.recovery_time - now)

    def succeed(self, now: float, seconds: float) -> None:
        """Count a success that took `seconds`."""
        limit = self.policy.slow_call
        slow = limit is not None and seconds >= limit
        if self.state is _HALF_OPEN:
            if slow:
                self.open(now, "slow")
                return
            self._successes += 1
            if self._successes >= self.policy.successes_to_close:
                self.close(now)
            return
        self.failures = 0
        window = self._window
        window.add(now, False, slow)
        if slow and self._reached(window.slow, self.policy.slow_rate):
            self._trip(now, "slow", None, None)

    def fail(self, now: float, reason: str, error: str | None, retry_after: float | None) -> None:
        """Count a failure."""
        self.failures += 1
        self.last_error = error
        if self.state is _HALF_OPEN:
            self.open(now, reason, error, retry_after)
            return
        window = self._window
        window.add(now, True, False)
        if (
            self.failures >= self.policy.failure_threshold
            or self._reached(window.failures, self.policy.failure_rate)
            or reason in _AT_ONCE
        ):
            self._trip(now, reason, error, retry_after)

    def free(self, holder: object) -> None:
        """Take back a probe's place, and call a waiter for it."""
        if self._leases.give_back(holder):
            self._notifier.call(1)

    def open(
        self,
        now: float,
        reason: str,
        error: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        """Open for as long as this opening in a row deserves, `retry_after` being the least.

        After a probe was answered it is for no longer than last time: a provider that answers now
        and then is not the same as one that is gone.
        """
        if self._successes:
            self.openings = max(0, self.openings - 1)
        seconds = max(self._open_time(self.held(now)), self._floor(retry_after))
        self.refuse(now, CircuitState.OPEN, seconds, reason, error)
        self.openings += 1

    def extend(self, now: float, retry_after: float | None) -> None:
        """Stay open until `retry_after` seconds from now if that is later than planned."""
        self.open_until = max(self.open_until, now + self._floor(retry_after))

    def refuse(
        self, now: float, state: CircuitState, seconds: float, reason: str, error: str | None
    ) -> None:
        """Become `state`, one that refuses, for `seconds`."""
        if self.passes:
            self._left_closed = now
        self._enter(state, now)
        self.open_until = now + seconds
        self.reason = reason
        self.last_error = error
        self._note(CircuitOpened, now, reason=reason, seconds=seconds, last_error=error)

    def become_half_open(self, now: float) -> None:
        """Let probes through from now on."""
        if self.passes:
            self._left_closed = now
        self._enter(_HALF_OPEN, now)
        self._note(CircuitHalfOpened, now)

    def close(self, now: float, state: CircuitState = _CLOSED) -> None:
        """Become `state`, one that lets calls through, with nothing counted yet."""
        was_closed = self.passes
        self._enter(state, now)
        self.openings = min(self.openings, self._steps + 1)
        self.failures = 0
        self._window.clear()
        if not was_closed:
            self._note(CircuitClosed, now, seconds=now - self._left_closed)

    def adopt(self, now: float, view: Standing) -> None:
        """Become what others have decided for this circuit."""
        if view.state in _REFUSING:
            self.refuse(now, view.state, view.remaining, view.reason or "", view.error)
        elif view.state is _HALF_OPEN:
            self.become_half_open(now)
        else:
            self.close(now, view.state)
        self.since = now - view.age
        self.openings = view.openings
        self.follow(view)

    def follow(self, view: Standing) -> None:
        """Note what others have counted since they decided on the state."""
        self.failures = view.failures
        self.reason = view.reason
        self.last_error = view.error

    def forget(self, now: float) -> None:
        """Become as new, but for the generation."""
        self.close(now)
        self.openings = 0
        self.reason = self.last_error = None

    def _trip(self, now: float, reason: str, error: str | None, retry_after: float | None) -> None:
        if self.state is _CLOSED:
            self.open(now, reason, error, retry_after)

    def _reached(self, count: int, rate: float) -> bool:
        calls = self._window.calls
        return calls >= self.policy.min_calls and count / calls >= rate

    def held(self, now: float) -> int:
        """Openings still held against the provider: one is forgiven per `recovery_time` closed."""
        if not self.passes or not self.openings:
            return self.openings
        return max(0, self.openings - int((now - self.since) // self.policy.recovery_time))

    def _floor(self, retry_after: float | None) -> float:
        """Return the least open time that a provider's hint asks for; nonsense asks for none."""
        if not isinstance(retry_after, int | float) or not retry_after > 0:
            return 0.0
        return min(retry_after, self.policy.max_recovery_time)

    def _open_time(self, steps: int) -> float:
        policy = self.policy
        seconds = policy.max_recovery_time
        if steps < self._steps:
            seconds = min(seconds, policy.recovery_time * policy.backoff**steps)
        return seconds * (1 + policy.jitter * (2 * self._random() - 1))

    def _enter(self, state: CircuitState, now: float) -> None:
        self.openings = self.held(now)
        self.state = state  # before the generation: see `CircuitBreaker.try_admit`
        self.since = now
        self.generation += 1
        self._successes = 0
        self._leases.clear()
        self._notifier.call()

    def _note(self, kind: type[Event], now: float, **facts: Any) -> None:
        self._notifier.note(kind(at=now, **self._facts, **facts))


def steps_to_longest(policy: CircuitPolicy) -> int:
    """Return after how many openings in a row the open time has grown to its longest."""
    if policy.backoff == 1:
        return sys.maxsize
    growth = math.log(policy.max_recovery_time) - math.log(policy.recovery_time)
    return math.ceil(growth / math.log(policy.backoff))
