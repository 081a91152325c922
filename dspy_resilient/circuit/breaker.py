"""The circuit breaker: one lock around the state machine, permits, waiting, and control by hand.

This module keeps a circuit safe for threads and event loops. What opens and closes it is decided in
`machine.py`; wrapping functions and blocks, and the arguments of the `circuitbreaker` package, are
in `circuitbreaker_api.py`; what a call's end says about the provider is in `outcomes`.
"""

from __future__ import annotations

import math
import random as random_numbers
import time
from typing import TYPE_CHECKING, Any, NoReturn, Self

from dspy_resilient._support.fork import renew_after_fork
from dspy_resilient._support.redact import describe
from dspy_resilient._support.wait_queue import WaitQueue
from dspy_resilient.circuit.circuitbreaker_api import Wrapping, package_policy
from dspy_resilient.circuit.machine import Machine
from dspy_resilient.circuit.permit import Permit
from dspy_resilient.circuit.state import CircuitState
from dspy_resilient.errors import CircuitOpenError
from dspy_resilient.events import printable
from dspy_resilient.outcomes.outcome import Outcome
from dspy_resilient.policies import CircuitPolicy, number
from dspy_resilient.stats.latency import duration

if TYPE_CHECKING:
    from collections.abc import Callable

    from dspy_resilient.events import Listener

NO_GENERATION, _EARLIER = -1, -2
_CLOSED = CircuitState.CLOSED
_SUCCESS, _FAILURE = Outcome.SUCCESS, Outcome.FAILURE


class CircuitBreaker(WaitQueue, Wrapping):
    """A circuit: it refuses calls to a provider that keeps failing, and lets probes find out when.

    Each call asks for a permit and reports through it. Closed, the circuit opens on a run of
    failures that chance does not explain (see `CircuitPolicy`). Open, it lets one probe through per
    growing interval, whatever has become of the one before, and refuses the rest. The first success
    of any attempt that began after the trouble did closes it; those who wait are then let go spread
    over half of `recovery_time`. It cannot stay stuck: no probe waits for another.

    Safe to share between threads, tasks and event loops; no method blocks, and none runs a
    listener while it holds the lock. The circuit changes when a caller asks or reports: it has no
    thread and no timer. In a forked child it keeps its state but knows of no call under way. A copy
    of it is the same circuit; it cannot be pickled.

    Built with a `CircuitPolicy` it is this package's circuit; built in any other way it takes the
    arguments of `circuitbreaker.CircuitBreaker` and behaves like it, see `Wrapping`.

    Example:
        >>> breaker = CircuitBreaker(CircuitPolicy(failure_threshold=1))
        >>> breaker.admit().failure(TimeoutError("no answer"))
        >>> breaker.state, breaker.last_error
        (<CircuitState.OPEN: 'open'>, 'TimeoutError: no answer')
        >>> print(breaker.try_admit())
        None

    Args:
        policy: When it opens, how often it is probed, and what else counts.
        recovery_timeout: Of the package's form.
        expected_exception: Exceptions that count as failures in wrapped code: a class, several,
            or a predicate of (class, exception). None (default): every `Exception`.
        name: Shown in errors and events, and made unique in `CircuitBreakerMonitor`.
        fallback_function: Called by a decorated function in place of a refused call.
        failure_threshold: Of the package's form.
        longest_hint: Most seconds for which a provider's Retry-After holds back the next probe.
        clock: Monotonic seconds.
        random: Numbers from 0 to below 1, for the jitter.
        listener: Called with each `CircuitOpened`, `CircuitHalfOpened` and `CircuitClosed`.
        client: Name of the client, for errors and events.
        target: Label of the target, for events. None (default): `name`.

    Attributes:
        policy: The policy in force.
        client: Name of the client.
    """

    def __init__(
        self,
        policy: CircuitPolicy | int | None = None,
        recovery_timeout: float | None = None,
        expected_exception: Any = None,
        name: str | None = None,
        fallback_function: Callable[..., Any] | None = None,
        *,
        failure_threshold: int | None = None,
        longest_hint: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
        random: Callable[[], float] = random_numbers.random,
        listener: Listener | None = None,
        client: str = "",
        target: str | None = None,
    ) -> None:
        if not isinstance(policy, CircuitPolicy):
            threshold = policy if failure_threshold is None else failure_threshold
            policy = package_policy(type(self), threshold, recovery_timeout)
        elif failure_threshold is not None or recovery_timeout is not None:
            raise TypeError(
                "CircuitBreaker: failure_threshold and recovery_timeout are fields of the policy"
            )
        number("CircuitBreaker", "longest_hint", longest_hint)
        super().__init__(expected_exception=expected_exception, fallback_function=fallback_function)
        self.policy = policy
        self.client = client
        self._random = random
        self._set_up(clock, listener)
        self._machine = Machine(
            policy,
            clock(),
            random,
            self._notifier,
            longest_hint=longest_hint,
            client=client,
            target=name if target is None else target,
        )
        self._rejected = 0
        if name is not None:
            self._enter_monitor(name)
        renew_after_fork(self)

    # Asking and reporting

    def try_admit(self) -> Permit | None:
        """Return leave to make one call, or None if it is refused; cheap either way.

        With `mode="observe"` nothing is refused; the result of a call that would have been
        counts nowhere.
        """
        machine = self._machine
        generation = machine.generation  # without the lock: read first, so that it is never ahead
        if machine.state is _CLOSED:
            return Permit(self, generation, self._clock())
        with self._lock:
            now = self._clock()
            if machine.passes:
                return Permit(self, machine.generation, now)
            if machine.lets_probe(now):
                permit = machine.probe = Permit(self, machine.generation, now, probe=True)
            else:
                self._rejected += 1
                if self.policy.mode != "observe":
                    return None
                permit = Permit(self, NO_GENERATION, now)
        try:
            self._notifier.send()
        except BaseException:  # Ctrl-C, while a listener ran
            permit.neutral()
            raise
        return permit

    def admit(self) -> Permit:
        """Return leave to make one call, or raise `rejection()`."""
        permit = self.try_admit()
        if permit is None:
            raise self.rejection()
        return permit

    def overhear(self, seconds: float) -> Permit:
        """Return a permit to report how another party's call to the provider has gone.

        Args:
            seconds: How long that took.
        """
        with self._lock:
            machine, began = self._machine, self._clock() - seconds
            return Permit(self, machine.generation if began >= machine.since else _EARLIER, began)

    def rejection(self) -> CircuitOpenError:
        """Return a fresh error that says why, and until when, calls are refused now.

        Its `retry_after` is exact: the seconds until the next probe may go. It is None where the
        circuit was forced open without end.
        """
        with self._lock:
            machine, now = self._machine, self._clock()
            state, wait, reason = machine.seen(now), machine.wait(now), machine.reason
            last_error = machine.last_error
        name = f"circuit {self.name!r}" if self.name else "the circuit"
        because = f" ({printable(reason)})" if reason else ""
        if math.isfinite(wait):
            advice = f"try again in {wait:.1f} s"
        else:
            advice = "it stays so until auto() or reset()"
        return CircuitOpenError(
            f"{name} is {state.replace('_', ' ')}{because}: {advice}",
            client=self.client,
            reason=reason,
            last_error=last_error,
            retry_after=wait if math.isfinite(wait) else None,
        )

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
        text = None if error is None else describe(error)  # runs its __str__: not under the lock
        machine = self._machine
        with self._lock:
            if permit.reported:
                return
            permit.reported = True
            generation, began = permit.generation, permit.started_at
            if outcome is _SUCCESS and generation != NO_GENERATION:
                if machine.is_quiet:
                    machine.note_success()
                    return
                now = self._clock()
                machine.succeed(now, began, slow=self._is_slow(now - began))
            elif outcome is _FAILURE and generation == machine.generation:
                machine.fail(self._clock(), began, reason, text, retry_after)
        if self._notifier.pending:
            self._notifier.send()

    def _is_slow(self, seconds: float) -> bool:
        limit = self.policy.slow_call
        return limit is not None and seconds >= limit

    def _wait(self, now: float) -> float:
        return 0.0 if self.policy.mode == "observe" else self._machine.wait(now)

    # Listening

    def add_listener(self, listener: Listener) -> None:
        """Have `listener` called with each change from now on; a method's object is held weakly."""
        with self._lock:
            self._notifier.add(listener)

    def remove_listener(self, listener: Listener) -> None:
        """Have `listener` called no more; one that never was is ignored."""
        with self._lock:
            self._notifier.remove(listener)

    # Control by hand

    def trip(
        self,
        reason: str = "manual",
        *,
        error: BaseException | str | None = None,
        retry_after: float | None = None,
    ) -> None:
        """Open as a failure would: probes go, and may close it; what began before closes nothing.

        An open circuit stays as it is, but for a `retry_after` (seconds, at most `longest_hint`)
        that is longer than what remains. A forced one does not change.
        """
        text = None if error is None else describe(error)
        with self._lock:
            machine, now = self._machine, self._clock()
            state = machine.seen(now)
            if state is CircuitState.OPEN:
                machine.extend(now, retry_after)
            elif state is _CLOSED or state is CircuitState.HALF_OPEN:
                machine.open(now, reason, text, retry_after, began=now)
        self._notifier.send()

    def force_open(self, reason: str = "manual", seconds: float | None = None) -> None:
        """Refuse every call for `seconds`, then let probes through; None (default): without end."""
        number("CircuitBreaker.force_open", "seconds", seconds, above=True, optional=True)
        until = math.inf if seconds is None else seconds
        with self._lock:
            now = self._clock()
            self._machine.refuse(now, CircuitState.FORCED_OPEN, until, reason, None)
        self._notifier.send()

    def force_half_open(self) -> None:
        """Let a probe through now; it decides."""
        with self._lock:
            self._machine.become_half_open(self._clock())
        self._notifier.send()

    def force_closed(self) -> None:
        """Let every call through, whatever comes back, until `auto()` or `reset()`."""
        with self._lock:
            self._machine.close(self._clock(), CircuitState.FORCED_CLOSED)
        self._notifier.send()

    def auto(self) -> None:
        """End what was forced: from open by way of half-open, from closed to closed."""
        with self._lock:
            machine = self._machine
            if machine.state is CircuitState.FORCED_OPEN:
                machine.become_half_open(self._clock())
            elif machine.state is CircuitState.FORCED_CLOSED:
                machine.close(self._clock())
        self._notifier.send()

    def reset(self) -> None:
        """Close, end what was forced, and forget every failure."""
        with self._lock:
            self._machine.forget(self._clock())
        self._notifier.send()

    def renew(self) -> None:
        """Make the circuit usable in a forked child, where its callers do not exist."""
        torn = not self._lock.acquire(blocking=False)  # another thread was in the middle of it
        if torn:
            self._machine.forget(self._clock())
        super().renew()

    # Looking

    @property
    def state(self) -> CircuitState:
        """What a call would find now; equal to the package's strings, e.g. "half_open"."""
        with self._lock:
            return self._machine.seen(self._clock())

    @property
    def since(self) -> float:
        """The clock's reading when the circuit last changed by a call, a report or a hand."""
        return self._machine.since

    @property
    def reason(self) -> str | None:
        """Why it last opened ("failures", "slow", "billing", "manual" ...), or None."""
        return self._machine.reason

    @property
    def last_error(self) -> str | None:
        """Redacted text of the last failure, or None; never the exception."""
        return self._machine.last_error

    @property
    def open_remaining(self) -> float:
        """Seconds until the next probe may go: exact, 0.0 unless open, inf if without end."""
        with self._lock:
            return self._machine.wait(self._clock())

    @property
    def failure_count(self) -> int:
        """Failures in a row: since the last success, or those that opened it."""
        return self._machine.failures

    @property
    def rejected(self) -> int:
        """Calls refused so far; with `mode="observe"`, those that would have been."""
        return self._rejected

    def explain(self) -> str:
        """Return, for a person, what state it is in, since when, why, and until when."""
        with self._lock:
            return _condition(self._machine, self._clock())

    def __copy__(self) -> Self:
        """Return this very circuit: it guards the same provider for whoever uses a copy."""
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return this very circuit, like `__copy__`."""
        return self

    def __reduce__(self) -> NoReturn:
        """Refuse to be pickled."""
        raise TypeError(
            "CircuitBreaker: cannot be pickled, for it knows of the calls of one process; pickle "
            "its `policy`, or share state between processes with ResilientLM(shared=...)"
        )

    def __repr__(self) -> str:
        """Show name and state."""
        return f"<CircuitBreaker {self.name!r}: {self.state}>"

    def _repr_html_(self) -> str:
        from dspy_resilient.stats.display import circuit_html  # noqa: PLC0415  # only when asked

        return circuit_html(self.name, self.state, self.explain())


def _condition(machine: Machine, now: float) -> str:
    """Return what state a circuit is in, since when, why, and until when."""
    state, wait = machine.seen(now), machine.wait(now)
    says = f"{state.replace('_', ' ')} for {duration(now - machine.since)}"
    if state == CircuitState.CLOSED:
        return says + (f", with {machine.failures} failures in a row" if machine.failures else "")
    if machine.reason and state != CircuitState.FORCED_CLOSED:
        says += f" ({machine.reason})"
    if state == CircuitState.HALF_OPEN:
        says += ", until a probe is answered"
    elif 0 < wait < math.inf:
        says += f", for {duration(wait)} more"
    else:
        says += ", until auto() or reset()"
    return says + (f"; last error: {machine.last_error}" if machine.last_error else "")
