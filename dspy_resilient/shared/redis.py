"""The store on Redis or Valkey: each verb is one script, which the server runs as a whole.

Times are the server's own. A script that the server does not know (after a restart, or on a new
node of a cluster) is sent along once more. Each verb touches one key, so Redis Cluster works. This
module is imported only when somebody shares, and it decides nothing: the scripts do.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dspy_resilient.circuit import CircuitState
from dspy_resilient.circuit.machine import steps_to_longest
from dspy_resilient.redact import redact
from dspy_resilient.shared.store import (
    KEPT,
    MOST_TEXT,
    BudgetView,
    CachedText,
    CircuitView,
    RateView,
    StoreAnswerError,
    ThrottleView,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dspy_resilient.policies import CircuitPolicy
    from dspy_resilient.shared.store import (
        BudgetReport,
        CacheOrder,
        CircuitReport,
        RateReport,
        ThrottleReport,
    )

_SOCKET_SECONDS = 1.0
_OF_THE_CIRCUIT = (
    "failure_threshold",
    "window",
    "min_calls",
    "failure_rate",
    "slow_rate",
    "recovery_time",
    "backoff",
    "max_recovery_time",
    "jitter",
    "probes",
    "successes_to_close",
)
_LONGEST_TEXT = 300


class _Script:
    """A script by the name under which a server knows it."""

    def __init__(self, name: str) -> None:
        self.source = Path(__file__).with_name(name).read_text(encoding="utf-8")
        self.sha = hashlib.sha1(self.source.encode(), usedforsecurity=False).hexdigest()


_CIRCUIT = _Script("circuit.lua")
_THROTTLE = _Script("throttle.lua")
_BUDGET = _Script("budget.lua")
_RATE = _Script("rate.lua")
_CACHE = _Script("cache.lua")


class RedisStore:
    """A store on a Redis or Valkey server, or on a cluster of them.

    Safe for threads. Faults are raised as the client library raises them.

    Args:
        client: A redis-py or valkey-py client (not an asyncio one: whoever waits, waits on a
            thread of its own); it stays the caller's, who closes it.
        namespace: Keeps environments apart that use the same server; "" for none.
    """

    def __init__(self, client: Any, namespace: str = "") -> None:
        self.namespace = namespace
        self._client = client
        self._owned = False

    @classmethod
    def at(cls, url: str) -> RedisStore:
        """Return the store at an address, without connecting yet.

        Args:
            url: As redis-py takes it, or with "valkey" in place of "redis". `?namespace=` in it
                keeps environments apart.

        Raises:
            ImportError: If redis-py is not installed.
            ValueError: If the address makes no sense.
        """
        try:
            import redis  # noqa: PLC0415  # nobody else needs it
            from redis.backoff import NoBackoff  # noqa: PLC0415
            from redis.retry import Retry  # noqa: PLC0415
        except ImportError:
            raise ImportError(
                "ResilientLM: shared needs redis-py; install dspy-resilient[redis]"
            ) from None
        scheme, _, rest = url.partition("://")
        address, _, query = rest.partition("?")
        settings = [each for each in query.split("&") if each]
        namespaces = [each[10:] for each in settings if each.startswith("namespace=")]
        query = "&".join(each for each in settings if not each.startswith("namespace="))
        url = f"{scheme.replace('valkey', 'redis')}://{address}{'?' if query else ''}{query}"
        client = redis.Redis.from_url(
            url,
            socket_timeout=_SOCKET_SECONDS,
            socket_connect_timeout=_SOCKET_SECONDS,
            retry=Retry(NoBackoff(), 0),
        )
        store = cls(client, namespaces[-1] if namespaces else "")
        store._owned = True
        return store

    def close(self) -> None:
        """Close the connections, if this store has opened them."""
        if self._owned:
            self._client.close()

    def __repr__(self) -> str:
        """Name the namespace; the address may hold a password."""
        return f"<RedisStore namespace={redact(self.namespace)!r}>"

    def circuit(self, key: str, policy: CircuitPolicy, report: CircuitReport) -> CircuitView:
        """Answer `Store.circuit`."""
        rules = {name: getattr(policy, name) for name in _OF_THE_CIRCUIT}
        rules["steps"] = steps_to_longest(policy)
        verdicts = [_given(verdict._asdict()) for verdict in report.verdicts]
        state = {f.name: getattr(report, f.name) for f in dataclasses.fields(report)}
        request = {"policy": rules, **_given(state), "verdicts": verdicts}
        return _view(self._run(_CIRCUIT, key, request, KEPT + _finite(report.remaining)))

    def throttle(self, key: str, report: ThrottleReport) -> ThrottleView:
        """Answer `Store.throttle`."""
        request = dataclasses.asdict(report)
        answer = self._run(_THROTTLE, key, request, KEPT + report.seconds)
        try:
            return ThrottleView(
                at=float(answer["at"]),
                stamp=_whole(answer["stamp"]),
                seconds=_seconds(answer["seconds"]),
                hint=_seconds(answer["hint"]),
                longer=answer["longer"] is True,
            )
        except (KeyError, TypeError, ValueError):
            raise StoreAnswerError("the store's answer is no throttle gate") from None

    def budget(self, key: str, report: BudgetReport) -> BudgetView:
        """Answer `Store.budget`."""
        answer = self._run(_BUDGET, key, dataclasses.asdict(report), KEPT)
        try:
            return BudgetView(at=float(answer["at"]), spent=_whole(answer["spent"]))
        except (KeyError, TypeError, ValueError):
            raise StoreAnswerError("the store's answer is no retry budget") from None

    def rate(self, key: str, reports: Mapping[str, RateReport]) -> RateView:
        """Answer `Store.rate`."""
        answer = self._run(_RATE, key, reports, KEPT)
        try:
            full_in = {name: _seconds(answer["full_in"][name]) for name in reports}
            return RateView(float(answer["at"]), full_in)
        except (KeyError, TypeError, ValueError):
            raise StoreAnswerError("the store's answer is no rate") from None

    def cache(self, key: str, orders: Sequence[CacheOrder]) -> list[CachedText | None]:
        """Answer `Store.cache`."""
        keys = [key]
        arguments: list[Any] = [MOST_TEXT, _milliseconds(KEPT)]
        for order in orders:
            keys.append(f"{key}:{order.name}")
            arguments += [order.doing, _milliseconds(order.kept), order.text]
        answers = self._call(_CACHE, keys, arguments)
        try:
            return [None if each is None else _cached(*each) for each in answers]
        except (TypeError, ValueError):
            raise StoreAnswerError("the store's answer is no cached answer") from None

    def _run(self, script: _Script, key: str, request: Mapping[str, Any], kept: float) -> Any:
        argument = json.dumps(request, allow_nan=False)
        return json.loads(self._call(script, [key], [argument, _milliseconds(kept)]))

    def _call(self, script: _Script, keys: list[str], arguments: list[Any]) -> Any:
        try:
            return self._client.evalsha(script.sha, len(keys), *keys, *arguments)
        except Exception as error:
            if type(error).__name__ != "NoScriptError":
                raise
            return self._client.eval(script.source, len(keys), *keys, *arguments)


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is there to be said in JSON: no None, and no inf, which means the same there."""
    return {n: v for n, v in values.items() if v is not None and v != math.inf}


def _milliseconds(seconds: float) -> int:
    return math.ceil(min(seconds * 1000, 2**53))


def _cached(age: Any, text: Any) -> CachedText:
    """Return what a server recalled; a client may have been set up to decode it."""
    return CachedText(_seconds(age), text.encode() if isinstance(text, str) else bytes(text))


def _finite(seconds: float) -> float:
    return min(seconds, KEPT) if math.isfinite(seconds) else KEPT


def _view(answer: Any) -> CircuitView:
    """Return the view in a server's answer, of which nothing is taken on trust."""
    try:
        places = {str(name): _seconds(left) for name, left in dict(answer["places"]).items()}
        remaining = answer.get("remaining")
        return CircuitView(
            at=float(answer["at"]),
            generation=_whole(answer["generation"]),
            accepted=answer["accepted"] is True,
            granted=answer["granted"] is True,
            places=places,
            state=CircuitState(answer["state"]),
            age=_seconds(answer["age"]),
            remaining=math.inf if remaining is None else _seconds(remaining),
            failures=_whole(answer["failures"]),
            openings=_whole(answer["openings"]),
            reason=_text(answer.get("reason")),
            error=_text(answer.get("error")),
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        raise StoreAnswerError("the store's answer is no circuit") from None


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
    return None if value is None else redact(str(value)[:_LONGEST_TEXT])
