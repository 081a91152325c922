"""Who is using which of LiteLLM's clients, so that they can be renewed and none closed in use.

LiteLLM looks its clients up in a cache, at each request, on the thread or in the task that sends
it. Here those look-ups are counted for the attempts of ours, per client of ours. LiteLLM goes on
making the clients and keeping them; nothing changes for requests that are no attempts, except that
a client which LiteLLM drops is closed when its last holder lets go of it.
"""

from __future__ import annotations

import asyncio
import weakref
from contextlib import suppress
from contextvars import ContextVar, Token
from typing import TYPE_CHECKING, Any

from dspy_resilient._support.fork import renew_after_fork
from dspy_resilient.providers import cached
from dspy_resilient.providers import http_close as closing

if TYPE_CHECKING:
    from dspy_resilient.providers.http_close import HttpClient

Loop = asyncio.AbstractEventLoop

# Weakly: Ctrl-C may strike before an attempt can end its use.
_using: ContextVar[weakref.ref[Use] | None] = ContextVar("dspy_resilient_using", default=None)


class _Leased:
    """One of LiteLLM's clients, and the attempts that are using it."""

    __slots__ = ("__weakref__", "_client", "_http", "_loop", "is_foreign", "is_retired", "users")

    def __init__(self, client: Any, http: HttpClient) -> None:
        loop = asyncio._get_running_loop()  # noqa: SLF001  # documented
        self.users: set[weakref.ref[Use]] = set()
        self.is_retired = False
        self.is_foreign = False
        self._client = weakref.ref(client)
        self._http = weakref.ref(http)
        self._loop = None if loop is None else weakref.ref(loop)

    @property
    def is_in_use(self) -> bool:
        """Whether an attempt under way sends through it."""
        return any(user() is not None for user in list(self.users))

    def keep_idle_connections(self) -> None:
        """Have what LiteLLM has made close no connection as surplus; see `closing`."""
        client, http = self._client(), self._http()
        if client is not None and http is not None and not cached.is_lent(client, http):
            closing.spare_idle_connections(http)

    def close_when_dropped(self) -> None:
        """Close what LiteLLM drops without closing it: the clients of the OpenAI SDK."""
        client, http = self._client(), self._http()
        if client is not None and http is not None and not hasattr(type(client), "__del__"):
            closing.close_with(client, http, self._loop)

    def retire(self) -> None:
        """Take the client out of LiteLLM's cache, and close it as soon as nobody uses it."""
        self.is_retired = True
        client = self._client()
        for key, value in cached.entries():
            if value is client:
                cached.forget(key)
        if not self.is_in_use:
            self.close()

    def retired_on(self, loop: Loop) -> HttpClient | None:
        """Return what it sends through, if it is retired, of `loop`, and nobody else's."""
        is_it = self.is_retired and self._loop is not None and self._loop() is loop
        return self._http() if is_it and not self.is_foreign else None

    def close(self) -> None:
        """Close the client, unless others than we may be using it: they drop it when they end."""
        client, http = self._client(), self._http()
        if client is None or http is None or self.is_foreign or cached.is_lent(client, http):
            return
        if not closing.is_busy(http):
            closing.close_from_anywhere(http, self._loop)


class _Leases:
    """What is known of each client; it goes together with the client."""

    def __init__(self) -> None:
        self._by_client: weakref.WeakKeyDictionary[Any, _Leased] = weakref.WeakKeyDictionary()

    def find(self, client: Any) -> _Leased | None:
        """Return what is known of `client`, or None if it sends through nothing we can close."""
        try:
            leased = self._by_client.get(client)
            if leased is None and (http := closing.http_client_of(client)) is not None:
                leased = self._by_client.setdefault(client, _Leased(client, http))
        except TypeError:  # LiteLLM caches other things, too
            return None
        return leased

    def renew(self) -> None:
        """Forget all in a forked child: these clients are the parent's."""
        self._by_client.clear()

    def retired(self, loop: Loop) -> list[HttpClient]:
        """Return what was taken out of LiteLLM's cache and would be closed by an attempt on `loop`."""
        clients = [each for ref in self._by_client.keyrefs() if (each := ref()) is not None]
        known = [leased for each in clients if (leased := self._by_client.get(each)) is not None]
        return [http for each in known if (http := each.retired_on(loop)) is not None]


_leases = _Leases()
renew_after_fork(_leases)


class Connections:
    """The provider clients that the requests of one client of ours go through.

    It holds none of them. Safe for threads, event loops and forks.

    Example:
        >>> connections = Connections()
        >>> use = connections.use()  # a request begins
        >>> connections.renew()  # the next request will open connections of its own
        >>> use.end()  # and only now is what the first one went through closed
    """

    def __init__(self) -> None:
        self._known: weakref.WeakValueDictionary[int, _Leased] = weakref.WeakValueDictionary()

    def use(self) -> Use:
        """Begin an attempt in this context: what LiteLLM looks up from here on, it is using."""
        return Use(self)

    def renew(self) -> None:
        """Forget and close every provider client used so far; the next request gets a new one.

        One that is in use is closed when the last attempt that uses it has ended, and one that
        somebody else may be using is left to them. Where LiteLLM keeps one client for several
        configurations (for all of Anthropic, say) the others get a new one, too, and notice
        nothing. Returns at once, on any thread.
        """
        for each in self._known.valuerefs():  # in one step, whatever other threads do meanwhile
            leased = each()
            if leased is not None:
                leased.retire()

    def __deepcopy__(self, memo: dict[int, Any]) -> Connections:
        """Return this very object, as the copy of a client is the same client."""
        return self

    def _learn(self, leased: _Leased) -> None:
        self._known[id(leased)] = leased


class Use:
    """One attempt, from `Connections.use()` to `end()`."""

    __slots__ = ("__weakref__", "_connections", "_leased", "_ref", "_token", "is_over")

    def __init__(self, connections: Connections) -> None:
        self._connections = connections
        self._leased: list[_Leased] = []
        self.is_over = False
        self._ref = weakref.ref(self)
        self._token: Token[weakref.ref[Use] | None] = _using.set(self._ref)

    def takes(self, leased: _Leased) -> bool:
        """Count this attempt among the users of a client; False if that has just been retired."""
        if self.is_over or leased in self._leased:
            return True
        leased.users.add(self._ref)
        if leased.is_retired:  # asked after it was added: `retire` looks at the users last
            leased.users.discard(self._ref)
            return False
        self._leased.append(leased)
        self._connections._learn(leased)  # noqa: SLF001  # its other half
        return True

    def end(self) -> None:
        """End the attempt, in the context in which it began; idempotent."""
        if self.is_over:
            return
        self.is_over = True
        for leased in self._leased:
            leased.users.discard(self._ref)
            if leased.is_retired and not leased.is_in_use:
                leased.close()
        with suppress(ValueError):  # the collector ends it in another context
            _using.reset(self._token)


def retired(loop: Loop) -> list[HttpClient]:
    """Return the HTTP clients of `loop` that their last attempt was to close."""
    return _leases.retired(loop)


def _in_use() -> Use | None:
    """Return the attempt that this context is in, if it is not over.

    What an attempt has started goes on in its context: a task, a timer, or the thread that Ctrl-C
    struck.
    """
    ref = _using.get()
    use = None if ref is None else ref()
    return None if use is None or use.is_over else use


def count_uses(cache: Any) -> None:
    """Have the look-ups in LiteLLM's cache of clients counted; once for each such cache."""
    if "get_cache" in vars(cache):
        return
    look_up, put = cache.get_cache, cache.set_cache

    def get_cache(key: str, **options: Any) -> Any:
        client = look_up(key, **options)
        leased = None if client is None else _leases.find(client)
        if leased is None:
            return client
        use = _in_use()
        if use is None:
            leased.is_foreign = True
            return client
        return client if use.takes(leased) else None

    def set_cache(key: str, value: Any, **options: Any) -> None:
        put(key, value, **options)
        leased = _leases.find(value)
        if leased is None:
            return
        leased.keep_idle_connections()
        if options.get("litellm_owned_client"):
            leased.close_when_dropped()
        use = _in_use()
        if use is None:
            leased.is_foreign = True
        else:
            use.takes(leased)

    cache.get_cache, cache.set_cache = get_cache, set_cache
