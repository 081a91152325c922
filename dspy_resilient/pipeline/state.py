"""What a user asked for, and how far it has got.

The state of one call, which belongs to the thread or task that makes it. What is done about it is
decided in `call.py`.
"""

from __future__ import annotations

import math
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar

from dspy.clients.lm import LM

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Mapping

    from dspy_resilient._support.worker import Worker
    from dspy_resilient.cache import Answer
    from dspy_resilient.outcomes import Kind
    from dspy_resilient.pipeline.attempt import Attempt
    from dspy_resilient.targets.target import Target


_NOT_RECORDED = {"prompt", "messages", "request"}
if hasattr(
    LM, "generate"
):  # from DSPy 3.5 on, arguments of their own, which its history leaves out
    _NOT_RECORDED |= {"cache", "n", "num_generations", "rollout_id"}


class AttemptSummary(NamedTuple):
    """One request of a call: where it went, how it ended, and how long it took."""

    target: str
    outcome: str
    seconds: float


class Served(NamedTuple):
    """An answer and where it came from; a hit was paid for by somebody else."""

    answer: Answer
    hit: bool
    stale: bool = False


@dataclass(slots=True, eq=False, repr=False)
class Call:
    """What a user asked for, and how far it has got.

    Attributes:
        method: Name of DSPy's public call method.
        args: Its positional arguments.
        kwargs: Its keywords, less our own.
        own: Our own among its keywords (`cache`, `num_retries`), where given.
        key: Cache key under the primary, or None if the call is not to be cached.
        targets: The primary and its fallbacks, in order.
        special: Who else may be asked about a prompt that is too long, or refused.
        streams: Whether chunks go to a consumer while the call runs.
        may_wait: Whether the caller can wait for other calls without risk of deadlock.
        loop: The running event loop that waiting would block, or None.
        max_attempts: Attempts per target.
        max_wait: Seconds for which it may be held up, all in all, by open circuits and 429s.
        budget: Seconds for the whole call (the deadline), or inf.
        settings: The client's own settings when the call was made.
        messages: The caller's own list of messages, by which an adapter's call is known.
        held: Seconds for which it has been held up so far.
        held_until: The clock's reading when that had used up `max_wait`, or None.
    """

    method: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    own: dict[str, Any]
    key: str | None
    targets: tuple[Target, ...]
    special: Mapping[Kind, tuple[Target, ...]]
    streams: bool
    may_wait: bool
    loop: Any
    max_attempts: int
    max_wait: float
    budget: float
    deadline: float = math.inf
    held: float = 0.0
    held_until: float | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    messages: Any = None
    filtered: Answer | None = None
    sent: Attempt | None = None
    attempts: list[AttemptSummary] = field(default_factory=list)

    def detach(self) -> None:
        """Keep what is asked as it is now, whatever the caller does to lists and dicts meanwhile."""
        self.kwargs = {name: _apart(value) for name, value in self.kwargs.items()}
        self.settings = {name: _apart(value) for name, value in self.settings.items()}

    def recorded(self) -> dict[str, Any]:
        """Return the keywords as DSPy's history shows them."""
        return {
            name: value
            for name, value in (self.own | self.kwargs).items()
            if not name.startswith("api_") and name not in _NOT_RECORDED
        }

    def every_target(self) -> Iterator[Target]:
        """Yield whoever may be asked in the end."""
        yield from self.targets
        for targets in self.special.values():
            yield from targets

    def left(self, now: float) -> float:
        """Return the seconds until the deadline."""
        return self.deadline - now


def _apart(value: Any) -> Any:
    """Return `value` with lists and dicts of its own; what is in them stays."""
    if type(value) is dict:
        return {name: _apart(each) for name, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_apart, value))
    return value


class Turn:
    """One target's share of a call: how the call looks there, and how far it has got.

    Attributes:
        target: The target that is asked.
        call: The call.
        kwargs: Its keywords, as this target sees them.
        args: Its positional arguments, likewise.
        route: The way it takes there.
        used: Attempts that count.
        failures: Attempts that failed, those included that do not count.
        throttled: 429s it has met, and pauses after them that went beyond `max_wait`.
        failed_at: The clock's reading at its first failure, or None.
        resume_at: The clock's reading before which this call does not ask again.
        is_held: Whether that pause counts as being held up.
        is_crowded: Whether it had no room when another target had.
        error: How it ended the last time, if it did.
        final: Whether it is not to be asked again.
        mended: Whether its client was restarted for this call.
        announced: Whether the hand-over to it has been told.
    """

    __slots__ = (
        "_key",
        "announced",
        "args",
        "call",
        "error",
        "failed_at",
        "failures",
        "final",
        "is_crowded",
        "is_held",
        "kwargs",
        "mended",
        "resume_at",
        "route",
        "target",
        "throttled",
        "used",
    )

    def __init__(self, target: Target, call: Call) -> None:
        self.target = target
        self.call = call
        self.kwargs = target.kwargs(call)
        self.args = target.args(call)
        self.route = target.routes.find(target.lm, self.kwargs)
        self._key: str | None = None
        self.used = self.failures = self.throttled = 0
        self.failed_at: float | None = None
        self.resume_at = -math.inf
        self.error: Exception | None = None
        self.final = self.mended = self.announced = self.is_held = False
        self.is_crowded = False

    @property
    def key(self) -> str | None:
        """The cache key of the call at this target, or None if it is not cached."""
        if self._key is None and self.call.key is not None:
            is_primary = self.target is self.call.targets[0]
            self._key = self.call.key if is_primary else self.target.key(self.call)
        return self._key

    @property
    def timeout(self) -> float | None:
        """The timeout of one attempt in seconds, or None if it has none."""
        return self.target.timeout(self.call)

    def wait_time(self, now: float) -> float:
        """Return the seconds until it may be asked: its circuits, its gate, its own pause."""
        route = self.route
        return max(self.resume_at - now, route.wait_time(), route.gate.wait_time())

    def is_ready(self, now: float) -> bool:
        """Whether it has given this call no trouble, and would take it at once."""
        return (
            not self.final
            and self.failed_at is None
            and self.wait_time(now) <= 0
            and self.route.has_room()
            and self.target.refusal() is None
        )


T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Wait:
    """Step: wait for `future`, at most `seconds`; its result is handed back, or None after that."""

    future: Future[Any] | None
    seconds: float = math.inf


@dataclass(frozen=True, slots=True)
class Prepare:
    """Step: do what the first attempt of a process needs (import LiteLLM), off every clock."""


@dataclass(frozen=True, slots=True)
class Disk:
    """Step: do `work`, which reads or writes a file; its result is handed back.

    On a loop, or where it may take some seconds only, `worker` does it; None is handed back after
    those.
    """

    worker: Worker
    work: Callable[[], Any]
    seconds: float = math.inf


if TYPE_CHECKING:
    Steps: TypeAlias = Generator[Wait | Prepare | Disk | Attempt, Any, T]
