"""What happened, as frozen facts in the past tense, and how listeners hear of it.

    event              when                                                              log
    CallFinished       a call has ended, with an answer or with an error                 -
    CacheHit           an answer came from the cache                                     -
    FlightJoined       a call waits for an identical one that is under way               -
    CallQueued         a call waits for its turn within the limits                       -
    AttemptFailed      one request has ended without an answer                           -
    RetryScheduled     a failed attempt will be repeated after a pause                   -
    FellBack           a call goes on to the next target                                 -
    CallRejected       a target was not asked: circuit, gate or limit refused            -
    WaitStarted        calls are held up for more than a few seconds; once for each wait warning
    Throttled          a 429 has closed the gate                                         warning
    CircuitOpened      a circuit leaves the provider alone                               warning
    CircuitHalfOpened  a circuit lets probes through                                     info
    CircuitClosed      a circuit lets everything through again                           info
    ClientRestarted    what was broken on our side has been replaced                     warning
    StoreLost          the shared store does not answer; each process goes on by itself  warning
    StoreFound         the shared store answers again                                    info

A listener (`ResilientLM(on_event=...)`) hears all of them, in order. The logger `dspy_resilient`
gets one line for each change of state: the event's name and facts, which are in the record's
`event` and `facts` too. No handler is installed. This module owns the event types and their
delivery; it formats nothing for people but log lines, and it never lets a listener's fault reach a
call.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from dspy_resilient._support.deliverer import Deliverer

logger = logging.getLogger("dspy_resilient")


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """Something that happened to a client.

    Attributes:
        client: Name of the client.
        at: When, on the client's monotonic clock, in seconds.
        target: Label of the target concerned, or None where no single one was.
    """

    client: str
    at: float
    target: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class CallFinished(Event):
    """A call ended: with an answer (`error` is None) or with an error's class name."""

    seconds: float
    attempts: int
    cache_hit: bool
    error: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheHit(Event):
    """An answer came from the cache; `stale` if past its ttl."""

    age: float
    stale: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class FlightJoined(Event):
    """A call waits for an identical one that is under way."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CallQueued(Event):
    """A call waits for its turn within the limits.

    Attributes:
        ahead: How many wait before it.
        in_use: How many attempts are under way.
    """

    ahead: int
    in_use: int


@dataclass(frozen=True, kw_only=True, slots=True)
class CallRejected(Event):
    """A target was not asked: its circuit, gate or limit refused."""

    reason: str
    retry_after: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Throttled(Event):
    """The provider answered 429: the gate is closed for `seconds`; `hint` is what was asked for."""

    seconds: float
    hint: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class AttemptFailed(Event):
    """One request ended without an answer."""

    seconds: float
    outcome: str
    error: str


@dataclass(frozen=True, kw_only=True, slots=True)
class RetryScheduled(Event):
    """A failed attempt will be repeated after `seconds`."""

    seconds: float
    attempt: int
    error: str


@dataclass(frozen=True, kw_only=True, slots=True)
class FellBack(Event):
    """A call went on to the next target (`target`) because of `error`."""

    error: str


@dataclass(frozen=True, kw_only=True, slots=True)
class CircuitOpened(Event):
    """A circuit opened for `seconds`."""

    reason: str
    seconds: float
    last_error: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class CircuitHalfOpened(Event):
    """A circuit lets probes through."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CircuitClosed(Event):
    """A circuit is closed again, `seconds` after it opened."""

    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class WaitStarted(Event):
    """Calls wait for a `reason`, "circuit", "throttled" or "limits", for up to `seconds`: until `ends`.

    Attributes:
        seconds: How long from now, or None if nobody can tell: it is for those under way to end it.
        ends: The time of day when it ends, for people, e.g. "14:03:25"; None like `seconds`.
    """

    reason: str
    seconds: float | None
    ends: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class ClientRestarted(Event):
    """A client was restarted to a clean state, because of `error` or because somebody asked."""

    error: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreLost(Event):
    """The store does not answer: this process goes on with what it knows itself."""

    error: str


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreFound(Event):
    """The store answers again, after `seconds`."""

    seconds: float


Listener = Callable[[Event], object]

# What is worth a line in the log: what changes for every call to come, not what one call met.
_STATE_CHANGES = (
    *(CircuitOpened, CircuitHalfOpened, CircuitClosed),
    *(Throttled, WaitStarted, ClientRestarted),
    *(StoreLost, StoreFound),
)
_BASE = {f.name for f in fields(Event)}
_KEEPING = (logging.FileHandler, logging.NullHandler)


class Hub(Deliverer):
    """Delivers what happens to a client to its listener, and each change of state to the log."""

    def wants(self, kind: type[Event]) -> bool:
        """Whether an event of this kind would be heard or logged."""
        return self.listener is not None or kind in _STATE_CHANGES

    def _deliver(self, event: Event) -> None:
        if isinstance(event, _STATE_CHANGES):
            line = _log(event)
            if isinstance(event, WaitStarted):
                _show(line)
        super()._deliver(event)


def name_of(event: Event) -> str:
    """Return the fixed text for this kind of event, e.g. "dspy_resilient.circuit_opened"."""
    name = type(event).__name__
    return "dspy_resilient." + "".join("_" + c.lower() if c.isupper() else c for c in name)[1:]


def _log(event: Event) -> str:
    """Write one line to the log and return it."""
    facts: dict[str, Any] = {f.name: getattr(event, f.name) for f in fields(event)}
    details = " ".join(
        f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value!r}"
        for name, value in facts.items()
        if name not in _BASE and value is not None
    )
    level = (
        logging.INFO
        if isinstance(event, (CircuitHalfOpened, CircuitClosed, StoreFound))
        else logging.WARNING
    )
    line = f"{name_of(event)} client={printable(event.client)} "
    line += f"target={printable(event.target or '-')} {details}"
    logger.log(level, "%s", line, extra={"event": name_of(event), "facts": facts})
    return line


def log_failure(client: str, error: Exception, attempts: int) -> None:
    """Write one line about a call that ended with `error`: no text, which may hold the prompt."""
    status = getattr(error, "status", None)
    facts = {"client": client, "error": type(error).__name__, "status": status}
    line = f"dspy_resilient.call_failed client={printable(client)} error={facts['error']}"
    line += f" status={status}" if isinstance(status, int) else ""
    extra = {"event": "dspy_resilient.call_failed", "facts": {**facts, "attempts": attempts}}
    logger.warning("%s attempts=%d", line, attempts, extra=extra)


def _show(line: str) -> None:
    """Write `line` to the terminal too if the log goes elsewhere: a waiting run must not seem hung."""
    if sys.stderr.isatty() and logger.isEnabledFor(logging.WARNING) and not _is_shown(logger):
        sys.stderr.write(f"{line}\n")


def _is_shown(source: logging.Logger | None) -> bool:
    """Whether what `source` logs is likely to be seen as it comes: not only kept in files."""
    if not logger.hasHandlers():
        return True  # logging itself then writes warnings to the terminal
    while source is not None:
        if not all(isinstance(each, _KEEPING) for each in source.handlers):
            return True
        source = source.parent if source.propagate else None
    return False


def printable(text: str) -> str:
    """Return `text` without what would steer a terminal or break a line."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
