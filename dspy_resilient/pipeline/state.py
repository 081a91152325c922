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
        may_wait: Whether the caller can wait for an identical call without risk of deadlock.
        max_attempts: Attempts per target.
        max_wait: Seconds to wait for an open circuit.
        budget: Seconds for the whole call (the deadline), or inf.
        settings: The client's own settings when the call was made.
        messages: The caller's own list of messages, by which an adapter's call is known.
        held: Seconds for which it has been held up so far.
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
    max_attempts: int
    max_wait: float
    budget: float
    deadline: float = math.inf
    patience: float | None = None
    held: float = 0.0
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

    def has_patience(self, now: float, wait: float) -> bool:
        """Whether waiting `wait` seconds for a circuit fits `max_wait` and the deadline.

        The patience starts with the first circuit that this call finds open. An unknown wait
        (inf: somebody else's probe is under way) fits as long as any patience is left.
        """
        if self.patience is None:
            self.patience = now + self.max_wait
        end = min(self.patience, self.deadline)
        return now < end if math.isinf(wait) else now + wait <= end


def _apart(value: Any) -> Any:
    """Return `value` with lists and dicts of its own; what is in them stays."""
    if type(value) is dict:
        return {name: _apart(each) for name, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_apart, value))
    return value


@dataclass(slots=True, eq=False, repr=False)
class Turn:
    """One target's share of a call.

    Attributes:
        target: Who is asked.
        used: Attempts that count.
        error: How it ended the last time, if it did.
        final: Whether it is not to be asked again.
        mended: Whether its client was restarted for this call.
        throttled: 429s it has answered with.
    """

    target: Target
    used: int = 0
    error: Exception | None = None
    final: bool = False
    mended: bool = False
    throttled: int = 0


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

    On a loop, `worker` does it.
    """

    worker: Worker
    work: Callable[[], Any]


if TYPE_CHECKING:
    Steps: TypeAlias = Generator[Wait | Prepare | Disk | Attempt, Any, T]
