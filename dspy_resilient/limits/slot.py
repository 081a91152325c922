"""One attempt's place before a target, as its caller sees it. All decisions are the limiter's."""

from __future__ import annotations

import enum
import math
from concurrent.futures import Future
from typing import TYPE_CHECKING, NamedTuple, Self

if TYPE_CHECKING:
    from types import TracebackType

    from dspy_resilient.limits.bulkhead import Bulkhead
    from dspy_resilient.limits.limiter import Limiter


def pending() -> Future[None]:
    """Return a future that only `set_result` can end: a cancelled waiter cannot cancel it."""
    future: Future[None] = Future()
    future.set_running_or_notify_cancel()
    return future


RESOLVED = pending()
RESOLVED.set_result(None)


class State(enum.Enum):
    """Where a slot is on its way: an offered one has its place, but its caller has not looked."""

    QUEUED = enum.auto()
    OFFERED = enum.auto()
    GRANTED = enum.auto()
    RELEASED = enum.auto()


class Slot:
    """One attempt's place: in the queue at first, then among the attempts under way.

    A `with` block releases it at the end. One caller waits on it; any thread may release it.

    Example:
        >>> from dspy_resilient.limits import Limiter
        >>> from dspy_resilient.policies import LimitPolicy
        >>> limiter = Limiter(LimitPolicy(max_concurrent=1))
        >>> first, second = limiter.enter(), limiter.enter()
        >>> first.granted, second.granted
        (True, False)
        >>> first.release()
        >>> second.future.done(), second.poll()
        (True, True)

    Attributes:
        future: Resolved as soon as `poll` is worth calling: the place is there, or the wait has
            become shorter. Cancelling it has no effect. A `poll` that returned False may have
            replaced it by a new one.
        tokens: The estimate that is reserved.
        places: Note of the limiter: the bulkhead this slot belongs to.
        state: Note of the limiter.
        due: Note of the limiter: the clock's reading until which the caller means to wait.
        begun: Note of the limiter: the bulkhead's round in which the place was given.
    """

    __slots__ = ("_limiter", "begun", "due", "future", "places", "state", "tokens")

    def __init__(self, limiter: Limiter, places: Bulkhead, tokens: float) -> None:
        """Belong to `limiter`, which alone makes slots."""
        self._limiter = limiter
        self.future = RESOLVED
        self.tokens = tokens
        self.places = places
        self.state = State.QUEUED
        self.due = math.inf
        self.begun = 0

    @property
    def granted(self) -> bool:
        """Whether the attempt may be sent: known after `enter`, and after each `poll`."""
        return self.state is State.GRANTED

    def wait_time(self) -> float:
        """Return how many seconds to wait on `future`, at most, before the next `poll`.

        Exact where the rate decides, 0.0 if `poll` would succeed now, and `math.inf` while only
        somebody else's leaving can help.
        """
        return self._limiter.wait_time(self)

    def poll(self) -> bool:
        """Look again whether it is this slot's turn, and return `granted`."""
        return self.state is State.GRANTED or self._limiter.poll(self)

    def release(
        self,
        *,
        tokens: float | None = None,
        sent: bool = True,
        throttled: bool = False,
        slow: bool = False,
        ok: bool = True,
    ) -> None:
        """Give up the place, or the turn in the queue; only the first call counts.

        Never blocks, not even in a finalizer that interrupts this thread inside the limiter. A
        slot whose caller never saw it granted leaves no trace, whatever is passed.

        Args:
            tokens: Tokens really used, more or less than reserved. None, or a number that cannot
                be, leaves the estimate standing.
            sent: False if no request went out: the request and all its tokens are given back.
            throttled: Whether the provider answered 429.
            slow: Whether it answered, but slowly.
            ok: Whether it answered well. Any other failure teaches an adaptive limit nothing.
        """
        self._limiter.release(Departure(self, tokens, sent, throttled, slow, ok))

    def __enter__(self) -> Self:
        """Return the slot as it is, granted or not."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Leave; the answer was good if nothing was raised."""
        self.release(ok=kind is None)


class Departure(NamedTuple):
    """What `Slot.release` was told."""

    slot: Slot
    tokens: float | None
    sent: bool
    throttled: bool
    slow: bool
    ok: bool
