"""The store on Redis or Valkey: each verb is one script, which the server runs as a whole.

Several verbs travel in one trip. A script that the server does not know (after a restart, or on a
new node of a cluster) is sent along once more. The keys of one verb lie on one node, so Redis
Cluster works; it is asked for one verb after the other. This module is imported only when somebody
shares, and it decides nothing: the scripts do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from dspy_resilient._support.redact import redact
from dspy_resilient.shared import redis_scripts as scripts

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from dspy_resilient.policies import CircuitPolicy
    from dspy_resilient.shared.redis_scripts import Ask
    from dspy_resilient.shared.store import (
        CachedText,
        CacheOrder,
        CircuitReport,
        CircuitView,
        RateReport,
        RateView,
        SpendReport,
        SpendView,
        ThrottleReport,
        ThrottleView,
        Verb,
    )

T = TypeVar("T")

_SOCKET_SECONDS = 1.0
_ASKS: dict[str, Callable[..., Ask[Any]]] = {
    "circuit": scripts.circuit,
    "throttle": scripts.throttle,
    "rate": scripts.rate,
    "spend": scripts.spend,
    "cache": scripts.cache,
}


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
        self._is_cluster = hasattr(client, "get_node_from_key")

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
        return self._run(scripts.circuit(key, policy, report))

    def throttle(self, key: str, report: ThrottleReport) -> ThrottleView:
        """Answer `Store.throttle`."""
        return self._run(scripts.throttle(key, report))

    def rate(self, key: str, reports: Mapping[str, RateReport]) -> RateView:
        """Answer `Store.rate`."""
        return self._run(scripts.rate(key, reports))

    def spend(self, key: str, report: SpendReport) -> SpendView:
        """Answer `Store.spend`."""
        return self._run(scripts.spend(key, report))

    def cache(self, key: str, orders: Sequence[CacheOrder]) -> list[CachedText | None]:
        """Answer `Store.cache`."""
        return self._run(scripts.cache(key, orders))

    def together(self, verbs: Sequence[Verb]) -> list[Any]:
        """Answer `Store.together`."""
        asks = [_ASKS[verb.name](*verb.arguments) for verb in verbs]
        if self._is_cluster or len(asks) == 1:
            return [_tried(self._run, ask) for ask in asks]
        pipeline = self._client.pipeline(transaction=False)
        for ask in asks:
            pipeline.evalsha(ask.script.sha, *ask.operands)
        answers = pipeline.execute(raise_on_error=False)
        return [
            _tried(self._understand, ask, answer) for ask, answer in zip(asks, answers, strict=True)
        ]

    def _run(self, ask: Ask[T]) -> T:
        try:
            answer = self._client.evalsha(ask.script.sha, *ask.operands)
        except Exception as error:  # noqa: BLE001  # which class it is, the client's package knows
            answer = error
        return self._understand(ask, answer)

    def _understand(self, ask: Ask[T], answer: Any) -> T:
        if type(answer).__name__ == "NoScriptError":
            answer = self._client.eval(ask.script.source, *ask.operands)
        if isinstance(answer, Exception):
            raise answer
        return ask.read(answer)


def _tried(function: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except Exception as error:  # noqa: BLE001  # of one verb; it is in its place among the results
        return error
