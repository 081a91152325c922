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
gets one line in logfmt for each change of state: the event's name and facts. The record has them as
attributes too (`extra`): `event`, such as "dspy_resilient.circuit_opened", and `facts`, a dict of all
the event's fields. No handler is installed. This module owns the event types and their
delivery; it formats nothing for people but log lines, and it never lets a listener's fault reach a
call.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

from dspy_resilient._support.deliverer import Deliverer
from dspy_resilient.errors import CallRejectedError

logger = logging.getLogger("dspy_resilient")


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """Something that happened to a client.

    Attributes:
        client: Name of the client.
        at: When, on the client's monotonic clock, in seconds.
        target: Label of the target concerned, or None where no single one was.
        wall: When, in Unix time, for people and for other machines. Two events are equal without it.
    """

    client: str
    at: float
    target: str | None = None
    wall: float = field(default_factory=time.time, compare=False, repr=False)  # noqa: TID251  # for people

    def to_dict(self) -> dict[str, Any]:
        """Return the event's name and facts, ready for JSON and for a row of a table.

        Example:
            >>> CircuitClosed(client="fast", at=1.0, seconds=2.5, wall=0.0).to_dict()
            {'event': 'circuit_closed', 'client': 'fast', 'at': 1.0, 'target': None, 'wall': 0.0, 'seconds': 2.5}
        """
        facts = {each.name: getattr(self, each.name) for each in fields(self)}
        return {"event": name_of(self).rpartition(".")[2], **facts}


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
            _log(event)
        super()._deliver(event)


def name_of(event: Event) -> str:
    """Return the fixed text for this kind of event, e.g. "dspy_resilient.circuit_opened"."""
    name = type(event).__name__
    return "dspy_resilient." + "".join("_" + c.lower() if c.isupper() else c for c in name)[1:]


def _log(event: Event) -> None:
    """Write one line to the log, in logfmt."""
    facts: dict[str, Any] = {f.name: getattr(event, f.name) for f in fields(event)}
    shown = {"client": event.client, "target": event.target or "-"}
    shown |= {n: v for n, v in facts.items() if n not in _BASE and v is not None}
    line = " ".join(
        [name_of(event), *(f"{name}={_logfmt(value)}" for name, value in shown.items())]
    )
    level = (
        logging.INFO
        if isinstance(event, (CircuitHalfOpened, CircuitClosed, StoreFound))
        else logging.WARNING
    )
    if not (isinstance(event, WaitStarted) and _tell(line)):
        logger.log(level, "%s", line, extra={"event": name_of(event), "facts": facts})


def log_failure(client: str, error: Exception, attempts: int) -> None:
    """Write one line about a call that ended with `error`: no text, which may hold the prompt.

    A warning, but for a call that we refused: the line about the circuit has said why, once, and an
    outage would repeat it for every call.
    """
    status = getattr(error, "status", None)
    facts = {"client": client, "error": type(error).__name__, "status": status}
    line = f"dspy_resilient.call_failed client={_logfmt(client)} error={facts['error']}"
    line += f" status={status}" if isinstance(status, int) else ""
    extra = {"event": "dspy_resilient.call_failed", "facts": {**facts, "attempts": attempts}}
    level = logging.INFO if isinstance(error, CallRejectedError) else logging.WARNING
    logger.log(level, "%s attempts=%d", line, attempts, extra=extra)


def _logfmt(value: object) -> str:
    """Return a value as logfmt has it: in quotes if it is empty, or holds space, quotes or `=`."""
    text = f"{value:.4g}" if isinstance(value, float) else printable(str(value))
    if text and not any(c in text for c in ' "=\\'):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _tell(line: str) -> bool:
    """Write `line` to the terminal if the log goes elsewhere: a waiting run must not seem hung.

    A progress bar of tqdm's is not broken by it. Returns whether the log need not be told: it has
    no handlers, and would write the line to the terminal too.
    """
    if not sys.stderr.isatty() or not logger.isEnabledFor(logging.WARNING):
        return False
    has_handlers = logger.hasHandlers()
    if has_handlers and _is_shown(logger):
        return False
    tqdm = getattr(sys.modules.get("tqdm"), "tqdm", None)
    if tqdm is None:
        sys.stderr.write(f"{line}\n")
    else:
        tqdm.write(line, file=sys.stderr)
    return not has_handlers


def _is_shown(source: logging.Logger | None) -> bool:
    """Whether what `source` logs is likely to be seen as it comes: not only kept in files."""
    while source is not None:
        if not all(isinstance(each, _KEEPING) for each in source.handlers):
            return True
        source = source.parent if source.propagate else None
    return False


def printable(text: str) -> str:
    """Return `text` without what would steer a terminal or break a line."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
