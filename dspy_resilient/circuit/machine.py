"""The circuit's state machine: what opens it, when a probe goes, and what closes it again.

Pure decisions. The time is an argument, and the lock belongs to the owner (`breaker.py`), who
holds it around every call: nothing here waits, calls the provider, or delivers an event.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Protocol

from dspy_resilient.circuit.state import CircuitState
from dspy_resilient.circuit.window import Window
from dspy_resilient.events import CircuitClosed, CircuitHalfOpened, CircuitOpened

if TYPE_CHECKING:
    from collections.abc import Callable

    from dspy_resilient._support.wait_queue import Notifier
    from dspy_resilient.events import Event
    from dspy_resilient.policies import CircuitPolicy

FIRST_SHARE = 0.02
"""Share of failures that a circuit without experience takes for usual."""

MEMORY = 1 - 1 / 50
"""What one verdict leaves of the weight of those before it: about the last 50 make the share."""

LONGEST_RUN = 100
"""Failures in a row that no share of failures explains."""

COMMON_SHARE, HIGHEST_SHARE = 0.15, 0.99
"""Share from which failures are so common that a run of `failure_threshold` may be chance."""

SPREAD = 0.5
"""Share of `recovery_time` over which those who waited are let go."""

AT_ONCE = "billing"
"""Reason for which one failure is enough: repeating the call cannot help."""

_CLOSED, _OPEN = CircuitState.CLOSED, CircuitState.OPEN
_PASSING = (_CLOSED, CircuitState.FORCED_CLOSED)


class Standing(Protocol):
    """How a circuit stands by another process's account; see `Machine`."""

    @property
    def state(self) -> CircuitState: ...
    @property
    def age(self) -> float: ...
    @property
    def remaining(self) -> float: ...
    @property
    def run_age(self) -> float: ...
    @property
    def failures(self) -> int: ...
    @property
    def share(self) -> float: ...
    @property
    def reason(self) -> str | None: ...
    @property
    def error(self) -> str | None: ...


class Machine:
    """State of one circuit; needs its owner's lock throughout.

    Every change of state starts a new generation and calls all waiters. A failure of an earlier
    generation is not for this machine; a success is, whenever its attempt began.

    Attributes:
        state: CLOSED, OPEN or forced; HALF_OPEN is how an open one looks while a probe is due or
            under way: see `seen`.
        since: The clock's reading at the last change.
        open_until: The clock's reading from which the next probe may go; inf for never.
        generation: Number of changes so far.
        failures: Length of the present run: failures in a row while closed.
        run_began: The clock's reading when the run's first attempt to fail had begun.
        failing_since: The clock's reading when that failure was counted.
        share: Share of failures among about the last 50 verdicts, without the present run.
        probe: The permit of the latest probe since it opened, or None.
        reason: Why it last opened.
        last_error: Redacted text of the last failure.
    """

    def __init__(
        self,
        policy: CircuitPolicy,
        now: float,
        random: Callable[[], float],
        notifier: Notifier,
        *,
        longest_hint: float,
        **facts: Any,
    ) -> None:
        self.policy = policy
        self.state = _CLOSED
        self.since = self.open_until = self.run_began = self.failing_since = now
        self.generation = 0
        self.failures = 0
        self.share = FIRST_SHARE
        self.probe: Any = None
        self.reason: str | None = None
        self.last_error: str | None = None
        self._interval = policy.recovery_time
        self._random = random
        self._notifier = notifier
        self._longest_hint = longest_hint
        self._facts = facts
        watches = policy.failure_rate is not None or policy.slow_call is not None
        self._window = Window(policy.window, policy.failure_threshold) if watches else None
        self._left_closed = now

    # Looking

    @property
    def passes(self) -> bool:
        """Whether it lets every call through."""
        return self.state in _PASSING

    def seen(self, now: float) -> CircuitState:
        """Return the state as a caller would find it."""
        if self.passes or now < self.open_until:
            is_under_way = self.probe is not None and not self.probe.reported
            return CircuitState.HALF_OPEN if is_under_way else self.state
        return CircuitState.HALF_OPEN

    def wait(self, now: float) -> float:
        """Return the seconds until a call would be let in; inf if only a hand can help."""
        return 0.0 if self.passes else max(0.0, self.open_until - now)

    # Verdicts

    @property
    def is_quiet(self) -> bool:
        """Whether a success changes no more than what is known of the provider."""
        return self.state is _CLOSED and not self.failures and self._window is None

    def note_success(self) -> None:
        """Count a success while all is quiet: what `succeed` comes to then, in less time."""
        self.share *= MEMORY

    def succeed(
        self, now: float, began: float, *, slow: bool = False, ended: float = math.inf
    ) -> None:
        """Count a success of an attempt that began when the clock read `began`.

        While open it is news, and closes the circuit, if the attempt began after the run did: then
        the provider answers again. A slow one proves nothing. One that is told late is no news of
        what came after it had `ended`: it neither ends a run that began to be counted since, nor
        closes a circuit that has opened since.
        """
        if self.state is _OPEN:
            if began >= self.run_began and ended >= self.since and not slow:
                self.close(now)
            return
        if ended >= self.failing_since:
            self._end_run()
        self.share *= MEMORY
        window = self._window
        if window is not None:
            window.add(now, False, slow)
            if slow and self.state is _CLOSED and self._is_slow(window):
                self.open(now, "slow", began=now)

    def fail(
        self, now: float, began: float, reason: str, error: str | None, retry_after: float | None
    ) -> None:
        """Count a failure of an attempt that began when the clock read `began`.

        While open it changes nothing, but that the provider may ask to be left alone for longer.
        """
        self.last_error = error
        if not self.passes:
            self.extend(now, retry_after)
            return
        if not self.failures:
            self.run_began, self.failing_since = began, now
        self.failures += 1
        too_many = self._window is not None and self._fails_too_often(self._window, now)
        if self.state is _CLOSED and (too_many or reason == AT_ONCE or self._is_surprising()):
            self.open(now, reason, error, retry_after, began=self.run_began)

    def _end_run(self) -> None:
        """Count the failures of a run as experience, now that it is over."""
        if self.failures:
            share = 1 - (1 - self.share) * MEMORY**self.failures
            self.share = min(share, HIGHEST_SHARE)
            self.failures = 0

    def _is_surprising(self) -> bool:
        """Whether chance does not explain so many failures in a row, at the usual share."""
        policy = self.policy
        if self.failures < policy.failure_threshold or policy.surprise == 0:
            return False
        if self.share < COMMON_SHARE:
            return True
        enough = math.log(policy.surprise) / math.log(self.share)
        return self.failures >= min(LONGEST_RUN, enough)

    def _fails_too_often(self, window: Window, now: float) -> bool:
        window.add(now, True, False)
        policy = self.policy
        if policy.failure_rate is None or not window.has_enough_failures(now):
            return False
        return window.calls >= policy.min_calls and (
            window.failures >= policy.failure_rate * window.calls
        )

    def _is_slow(self, window: Window) -> bool:
        policy = self.policy
        return window.calls >= policy.min_calls and window.slow >= policy.slow_rate * window.calls

    # Changes

    def open(
        self,
        now: float,
        reason: str,
        error: str | None = None,
        retry_after: float | None = None,
        *,
        began: float,
    ) -> None:
        """Leave the provider alone until the first probe; `began` is when the trouble did."""
        seconds = max(self._jittered(self.policy.recovery_time), self.floor(retry_after))
        self.refuse(now, _OPEN, seconds, reason, error)
        self.run_began = began

    def lets_probe(self, now: float) -> bool:
        """Whether a call may go as a probe now; if so, the next may after the next interval.

        That one goes whatever has become of the one before: a probe that hangs holds up nobody.
        """
        if self.passes or now < self.open_until:
            return False
        self.state = _OPEN  # what was forced for a time is over
        longest = max(self.policy.recovery_time, self.policy.max_recovery_time)
        self._interval = min(self._interval * self.policy.backoff, longest)
        self.open_until = now + self._jittered(self._interval)
        self.announce_probe(now)
        return True

    def announce_probe(self, now: float) -> None:
        """Tell that a probe goes."""
        self._note(CircuitHalfOpened, now)

    def extend(self, now: float, retry_after: float | None) -> None:
        """Let no probe go for `retry_after` seconds from now, if that is later than planned."""
        if self.state is _OPEN:
            self.open_until = max(self.open_until, now + self.floor(retry_after))

    def refuse(
        self, now: float, state: CircuitState, seconds: float, reason: str, error: str | None
    ) -> None:
        """Become `state`, one that refuses, for `seconds`."""
        self._leave_closed(now)
        self._enter(state, now)
        self.open_until = now + seconds
        self.run_began = now
        self.reason = reason
        self.last_error = error
        self._note(CircuitOpened, now, reason=reason, seconds=seconds, last_error=error)

    def become_half_open(self, now: float) -> None:
        """Have a probe be due now."""
        self._leave_closed(now)
        self._enter(_OPEN, now)
        self.open_until = self.run_began = now
        self.announce_probe(now)

    def close(self, now: float, state: CircuitState = _CLOSED) -> None:
        """Become `state`, one that lets calls through, with no run and an empty window."""
        was_closed = self.passes
        self._end_run()
        self._enter(state, now)
        if self._window is not None:
            self._window.clear()
        if not was_closed:
            self._note(CircuitClosed, now, seconds=now - self._left_closed)

    def forget(self, now: float) -> None:
        """Become as new, but for the generation."""
        self.close(now)
        self.share = FIRST_SHARE
        self.reason = self.last_error = None

    def adopt(self, now: float, view: Standing) -> None:
        """Become what others have decided for this circuit."""
        if view.state in _PASSING:
            self.close(now, view.state)
        else:
            self.refuse(now, view.state, view.remaining, view.reason or "", view.error)
        self.since, self.failing_since = now - view.age, now
        self.follow(now, view)

    def follow(self, now: float, view: Standing) -> None:
        """Note what others have counted, and when the next probe goes."""
        self.failures = view.failures
        self.share = view.share
        self.run_began = now - view.run_age
        self.reason = view.reason
        self.last_error = view.error
        if not self.passes:
            self.state = view.state  # what was forced for a time may be over
            self.open_until = now + view.remaining

    def _leave_closed(self, now: float) -> None:
        if self.passes:
            self._left_closed = now

    def _enter(self, state: CircuitState, now: float) -> None:
        self.state = state  # before the generation: see `CircuitBreaker.try_admit`
        self.since = now
        self.generation += 1
        self.probe = None
        self._interval = self.policy.recovery_time
        self._notifier.call(seconds=self._spread if self.passes else None)

    def _spread(self) -> float:
        """Return after how many seconds one of those who waited goes: not all at once."""
        return self._random() * self.policy.recovery_time * SPREAD

    def floor(self, retry_after: float | None) -> float:
        """Return the least seconds that a provider's hint asks for; nonsense asks for none."""
        if not isinstance(retry_after, int | float) or not retry_after > 0:
            return 0.0
        return min(retry_after, self._longest_hint)

    def _jittered(self, seconds: float) -> float:
        return seconds * (1 + self.policy.jitter * (2 * self._random() - 1))

    def _note(self, kind: type[Event], now: float, **facts: Any) -> None:
        self._notifier.note(kind(at=now, **self._facts, **facts))
