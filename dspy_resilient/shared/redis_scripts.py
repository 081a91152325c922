"""The scripts that a Redis or Valkey server runs: what each is asked, and how its answer is read.

An answer may come from whomever: it is made into a view of the right types, or it is a
`StoreAnswerError`. Nothing here talks to a server.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from dspy_resilient._support.redact import redact
from dspy_resilient.budgets import Amount
from dspy_resilient.circuit import CircuitState, machine
from dspy_resilient.events import printable
from dspy_resilient.shared.store import (
    KEPT,
    MOST_TEXT,
    CachedText,
    CircuitView,
    RateView,
    SpendView,
    StoreAnswerError,
    ThrottleView,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from dspy_resilient.policies import CircuitPolicy
    from dspy_resilient.shared.store import (
        CacheOrder,
        CircuitReport,
        RateReport,
        SpendReport,
        ThrottleReport,
    )

T = TypeVar("T")

_OF_THE_CIRCUIT = (
    "failure_threshold",
    "surprise",
    "recovery_time",
    "backoff",
    "max_recovery_time",
    "jitter",
    "failure_rate",
    "window",
    "min_calls",
    "slow_call",
    "slow_rate",
)
_CONSTANTS = {
    "first_share": machine.FIRST_SHARE,
    "memory": machine.MEMORY,
    "longest_run": machine.LONGEST_RUN,
    "common_share": machine.COMMON_SHARE,
    "highest_share": machine.HIGHEST_SHARE,
    "at_once": machine.AT_ONCE,
}
_LONGEST_TEXT = 300


class Script:
    """A script by the name under which a server knows it."""

    def __init__(self, name: str) -> None:
        self.source = Path(__file__).with_name(name).read_text(encoding="utf-8")
        self.sha = hashlib.sha1(self.source.encode(), usedforsecurity=False).hexdigest()


CIRCUIT = Script("circuit.lua")
THROTTLE = Script("throttle.lua")
RATE = Script("rate.lua")
SPEND = Script("spend.lua")
CACHE = Script("cache.lua")


class Ask(NamedTuple, Generic[T]):
    """One run of a script.

    Attributes:
        script: Which.
        operands: Number of keys, keys and arguments, as EVALSHA takes them.
        reading: Makes the server's answer a view; raises anything if it makes no sense.
    """

    script: Script
    operands: tuple[Any, ...]
    reading: Callable[[Any], T]

    def read(self, answer: Any) -> T:
        """Return the view in a server's answer, of which nothing is taken on trust.

        Raises:
            StoreAnswerError: There is none.
        """
        try:
            return self.reading(answer)
        except (KeyError, TypeError, ValueError, AttributeError):
            raise StoreAnswerError("the store's answer makes no sense") from None


def circuit(key: str, policy: CircuitPolicy, report: CircuitReport) -> Ask[CircuitView]:
    """Return what answers `Store.circuit`."""
    rules = _given({name: getattr(policy, name) for name in _OF_THE_CIRCUIT}) | _CONSTANTS
    verdicts = [_given(verdict._asdict()) for verdict in report.verdicts]
    state = {f.name: getattr(report, f.name) for f in dataclasses.fields(report)}
    request = {"policy": rules, **_given(state), "verdicts": verdicts}
    return _in_json(CIRCUIT, key, request, _circuit, KEPT + _finite(report.remaining))


def throttle(key: str, report: ThrottleReport) -> Ask[ThrottleView]:
    """Return what answers `Store.throttle`."""
    request = dataclasses.asdict(report)
    return _in_json(THROTTLE, key, request, _throttle, KEPT + report.seconds)


def rate(key: str, reports: Mapping[str, RateReport]) -> Ask[RateView]:
    """Return what answers `Store.rate`."""

    def read(answer: Any) -> RateView:
        full_in = {name: _seconds(answer["full_in"][name]) for name in reports}
        return RateView(float(answer["at"]), full_in)

    return _in_json(RATE, key, reports, read)


def spend(key: str, report: SpendReport) -> Ask[SpendView]:
    """Return what answers `Store.spend`."""
    request = {
        "member": report.member,
        "spent": report.spent,
        "held": report.held,
        "wants": report.wants,
        "limit": [None if most == math.inf else most for most in report.limit],
        "lease": report.lease,
    }
    return _in_json(SPEND, key, request, _spending, report.kept)


def cache(key: str, orders: Sequence[CacheOrder]) -> Ask[list[CachedText | None]]:
    """Return what answers `Store.cache`."""
    keys = [key, *(f"{key}:{order.name}" for order in orders)]
    arguments: list[Any] = [MOST_TEXT, _milliseconds(KEPT)]
    for order in orders:
        arguments += [order.doing, _milliseconds(order.kept), order.text]
    return Ask(CACHE, (len(keys), *keys, *arguments), _texts)


def _in_json(
    script: Script,
    key: str,
    request: Mapping[str, Any],
    read: Callable[[Any], T],
    kept: float = KEPT,
) -> Ask[T]:
    argument = json.dumps(request, allow_nan=False)
    operands = 1, key, argument, _milliseconds(kept)
    return Ask(script, operands, lambda answer: read(json.loads(answer)))


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is there to be said in JSON: no None, and no inf, which means the same there."""
    return {n: v for n, v in values.items() if v is not None and v != math.inf}


def _milliseconds(seconds: float) -> int:
    return math.ceil(min(seconds * 1000, 2**53))


def _finite(seconds: float) -> float:
    return min(seconds, KEPT) if math.isfinite(seconds) else KEPT


def _circuit(answer: Any) -> CircuitView:
    remaining = answer.get("remaining")
    share = _seconds(answer["share"])
    return CircuitView(
        generation=_whole(answer["generation"]),
        granted=answer["granted"] is True,
        state=CircuitState(answer["state"]),
        age=_seconds(answer["age"]),
        remaining=math.inf if remaining is None else _seconds(remaining),
        run_age=_seconds(answer["run_age"]),
        failures=_whole(answer["failures"]),
        share=min(max(share, 0.0), machine.HIGHEST_SHARE),
        reason=_text(answer.get("reason")),
        error=_text(answer.get("error")),
    )


def _throttle(answer: Any) -> ThrottleView:
    return ThrottleView(
        at=float(answer["at"]),
        stamp=_whole(answer["stamp"]),
        seconds=_seconds(answer["seconds"]),
        hint=_seconds(answer["hint"]),
        longer=answer["longer"] is True,
    )


def _spending(answer: Any) -> SpendView:
    return SpendView(
        at=float(answer["at"]),
        **{
            name: Amount(*(_seconds(each) for each in answer[name]))
            for name in ("spent", "reserved", "granted")
        },
    )


def _texts(answers: Any) -> list[CachedText | None]:
    return [None if each is None else _cached(*each) for each in answers]


def _cached(age: Any, text: Any) -> CachedText:
    """Return what was recalled; a client may have been set up to decode what it reads."""
    return CachedText(_seconds(age), text.encode() if isinstance(text, str) else bytes(text))


def _seconds(value: Any) -> float:
    seconds = float(value)
    if not math.isfinite(seconds):
        raise ValueError
    return seconds


def _whole(value: Any) -> int:
    number = int(value)
    if not 0 <= number <= 2**53:
        raise ValueError
    return number


def _text(value: Any) -> str | None:
    return None if value is None else printable(redact(str(value)[:_LONGEST_TEXT]))
