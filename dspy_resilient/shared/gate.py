"""A throttle gate that a client has in common with others of the same credential.

What is shared is until when it is closed: a 429 that one process sees closes the gate of all. Each
lets its own calls back in step by step. When the store does not answer, this is an ordinary gate.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

from dspy_resilient.limits import GatePermit, ThrottleGate
from dspy_resilient.shared.link import Link
from dspy_resilient.shared.store import ThrottleReport, ThrottleView, Verb

if TYPE_CHECKING:
    from dspy_resilient.shared.link import Courier


class SharedGate(Link[ThrottleReport, ThrottleView], ThrottleGate):
    """A `ThrottleGate` that closes with those of all clients with the same key.

    Args:
        courier: The way to the store.
        key: Where the state lies.
        **facts: As for `ThrottleGate`.
    """

    def __init__(self, courier: Courier, key: str, **facts: Any) -> None:
        super().__init__(**facts)
        self._key = key
        self._begin(courier)
        self._stamp = 0
        self._untold = self._untold_reset = False

    def renew(self) -> None:
        """Make the gate usable in a forked child, where its callers do not exist."""
        super().renew()
        self._begin(self._courier)

    def wants_news(self) -> bool:
        """Whether the store has not heard everything."""
        return self._untold or self._untold_reset

    def _wake(self) -> None:
        self._notifier.send()

    def record_throttle(self, permit: GatePermit, hint: float | None) -> float:
        """Close for everybody; see `GatePermit.throttled`."""
        seconds = super().record_throttle(permit, hint)
        if self._untold:
            self._tell()
        return seconds

    def reset(self) -> None:
        """Open, and have the store forget; others that have closed meanwhile stay as they are."""
        with self._lock:
            self._untold, self._untold_reset = False, True
        super().reset()
        self._tell()

    def _tell(self) -> None:
        """Let the store know, as soon as it answers: no call asks while the gate is closed."""
        if not self.alone:
            self.ask()
        with suppress(RuntimeError):  # no thread can be started: see `ask`
            self._courier.watch(self)

    # To the store and back; all but `_say` have the lock

    def _close(self, now: float, hint: float | None, *, news: bool) -> None:
        before = self._closed_until, self._hinted_until
        super()._close(now, hint, news=news)
        self._untold = self._untold or before != (self._closed_until, self._hinted_until)

    def _draft(self, now: float) -> ThrottleReport:
        untold, reset = self._untold, self._untold_reset
        self._untold = self._untold_reset = False
        if not untold:
            return ThrottleReport(reset=reset)
        return ThrottleReport(
            seconds=max(0.0, self._closed_until - now),
            hint=max(0.0, self._hinted_until - now),
            reset=reset,
        )

    def _say(self, request: ThrottleReport) -> Verb:
        return Verb("throttle", (self._key, request))

    def _hear(
        self,
        now: float,
        request: ThrottleReport,  # noqa: ARG002  # the answer says what it adds
        reply: ThrottleView,
    ) -> None:
        if reply.stamp == self._stamp:  # followed already, if it was to be
            return
        self._stamp = reply.stamp
        if reply.longer and not self._untold_reset:
            self._follow(now, reply.seconds, reply.hint or None)

    def _do_without(
        self,
        now: float,  # noqa: ARG002  # the gate of this process is closed already
        request: ThrottleReport | None,
    ) -> None:
        if request is not None:
            self._untold_reset = self._untold_reset or request.reset
            self._untold = self._untold or request.seconds > 0
