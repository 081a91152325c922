"""One HTTP client per provider and configuration, through which every call of a `ResilientLM` goes.

The pool holds its clients weakly and counts no requests: whoever sends one holds the client, and
when the last holder has gone the connections are closed. A `ResilientLM` holds those it has used,
each call the one that it sends through. Event loops have clients of their own.
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from dspy_resilient._support.fork import renew_after_fork
from dspy_resilient.providers import http_close as closing
from dspy_resilient.providers import loop_end
from dspy_resilient.providers.litellm_module import litellm_so_far
from dspy_resilient.providers.make import (
    LITELLMS_TIMEOUT,
    OF_THE_CLIENT,
    Kind,
    Way,
    brings_own,
    in_seconds,
    is_explicit,
    is_session,
    make,
    sessions,
    settings_of_call,
    surroundings,
    way_of,
)

if TYPE_CHECKING:
    import httpx

Loop = asyncio.AbstractEventLoop

# What a call may say of the connection, besides what is the client's own.
_CONNECTION = ("api_key", "api_base", "base_url", "api_version", "organization", "ssl_verify")
_TURNS = 20
_TURN = 0.005


class PooledClient:
    """A client of the pool; its connections are closed when nobody holds this any more.

    Attributes:
        client: What LiteLLM takes: a client of an SDK, or a handler of LiteLLM's.
        face: The same for callers who do not go through LiteLLM, or None so far.
        used_at: When it was last asked for, in monotonic seconds.
    """

    __slots__ = ("__weakref__", "_http", "_is_ours", "_loop", "client", "face", "used_at")

    def __init__(self, client: Any, loop: Loop | None) -> None:
        self.client = client
        self.face: Any = None
        self.used_at = time.monotonic()
        http: Any = closing.http_client_of(client)
        self._http = http
        self._is_ours = not is_session(self._http)
        self._loop = None if loop is None else weakref.ref(loop)
        if self._is_ours:
            closing.close_with(self, http, self._loop)

    @property
    def is_broken(self) -> bool:
        """Whether nothing can be sent through it any more, since it or its event loop is closed."""
        if self._http.is_closed:
            return self._is_ours
        if self._loop is None:
            return False
        loop = self._loop()
        return loop is None or loop.is_closed()

    def is_of(self, loop: Loop | None) -> bool:
        """Whether it sends on `loop`."""
        return loop is None if self._loop is None else self._loop() is loop

    def under(self, timeout: float | httpx.Timeout) -> Any:
        """Return a client that sends through the same connections, under another timeout."""
        if hasattr(self.client, "with_options"):
            return self.client.with_options(timeout=in_seconds(timeout))
        view = object.__new__(type(self.client))
        view.__dict__.update(self.client.__dict__, timeout=timeout)
        return view

    async def close(self) -> None:
        """Close it on the running loop, which must be its own, unless a request is under way."""
        if self._is_ours and not closing.is_busy(self._http):
            await closing.close(self._http)

    def abandon(self) -> None:
        """Close it by force: its loop is closed."""
        if self._is_ours:
            closing.abandon(self._http)


class Pool:
    """Clients by event loop (None for sync ones) and configuration; safe for threads and forks."""

    def __init__(self) -> None:
        self._inherited: list[object] = []
        self.renew()
        renew_after_fork(self)

    def renew(self) -> None:
        """Begin empty in a forked child; the parent's connections are the parent's.

        The child must neither send on them nor close them. Nor may the collector get at them.
        """
        holders = getattr(self, "_holders", None) or weakref.WeakSet()
        self._inherited += [each.forget() for each in holders]
        self._changing = threading.Lock()
        self._clients: weakref.WeakValueDictionary[tuple[int, str], PooledClient]
        self._clients = weakref.WeakValueDictionary()
        self._making: weakref.WeakValueDictionary[tuple[int, str], Any]
        self._making = weakref.WeakValueDictionary()
        self._holders: weakref.WeakSet[HttpClients] = holders

    def get(self, loop: Loop | None, key: str, make: Callable[[], Any]) -> PooledClient:
        """Return the client under `key`, made by `make` if there is none, or a broken one.

        Of racing threads one makes it, and the others wait. What `make` raises is kept nowhere.
        """
        place = (0 if loop is None else id(loop), key)
        found = self._clients.get(place)
        if found is not None and found.is_of(loop) and not found.is_broken:
            return found
        with self._changing:
            making = self._making.setdefault(place, threading.Lock())
        with making:
            found = self._clients.get(place)
            if found is None or not found.is_of(loop) or found.is_broken:
                found = PooledClient(make(), loop)
                with self._changing:
                    self._clients[place] = found
        return found

    def add(self, holder: HttpClients) -> None:
        """Note who holds clients, so that those of a loop that ends can be taken away."""
        with self._changing:
            self._holders.add(holder)

    def retire(self, clients: Iterable[PooledClient]) -> None:
        """Hand out these no more; who has them goes on using them."""
        with self._changing:
            for place, client in list(self._clients.items()):
                if any(client is each for each in clients):
                    del self._clients[place]

    def prune(self, unused_for: float) -> None:
        """Have each holder let go of what it has not used for so long."""
        before = time.monotonic() - unused_for
        for each in self._all_holders():
            each.let_go(lambda client: client.used_at <= before)

    async def finish(self, loop: Loop) -> None:
        """Close the clients of the running `loop`; one in use past our patience is left."""
        for _ in range(_TURNS):
            clients = self._of(loop)
            for each in clients:
                await each.close()
            if all(each.is_broken for each in clients):
                break
            await asyncio.sleep(_TURN)

    def abandon(self, ref: weakref.ref[Loop]) -> None:
        """Close by force what is left of a loop that is closed, and let nobody hold it."""
        loop = ref()
        if loop is not None:
            for each in self._of(loop):
                each.abandon()
            for holder in self._all_holders():
                holder.let_go(lambda client: client.is_of(loop))
            closing.forget(loop)

    def _of(self, loop: Loop) -> list[PooledClient]:
        """Return the clients of `loop`, retired ones that are held still among them."""
        with self._changing:
            clients = set(self._clients.values())
        clients.update(*(each.held() for each in self._all_holders()))
        return [each for each in clients if each.is_of(loop)]

    def _all_holders(self) -> list[HttpClients]:
        with self._changing:
            return list(self._holders)


pool = Pool()


class HttpClients:
    """The clients that one client of ours sends through: it holds them, and the pool does not.

    Safe for threads, event loops and forks. Of many configurations (a key of its own for each call,
    say) the least recently used go.
    """

    _MOST = 64

    def __init__(self) -> None:
        self._held: dict[tuple[Any, ...], PooledClient] = {}
        self._changing = threading.Lock()
        self._is_closed = False
        pool.add(self)

    def find(
        self,
        loop: Loop | None,
        model: str,
        model_type: str,
        keywords: Mapping[str, Any],
        own: Mapping[str, Any],
    ) -> PooledClient | None:
        """Return what a call is to be sent through, or None if LiteLLM is to use a client of its own.

        That is so where LiteLLM takes none, or where the caller brings one.

        Args:
            loop: The event loop that sends it, or None.
            model: As DSPy has it.
            model_type: Likewise.
            keywords: All of the call's, the client's own included.
            own: The client's own: its timeout and headers are the configuration's, those of a
                call are the request's.
        """
        way = way_of(model, model_type, keywords.get("custom_llm_provider"))
        if way.kind is None or brings_own(keywords):
            return None
        try:
            place = _place(loop, way, model, model_type, keywords, own)
            found = self._held.get(place)
            if found is None or not found.is_of(loop) or found.is_broken:
                settings = settings_of_call(way, model, model_type, keywords, own)
                if settings is None:
                    return None
                try:
                    found = pooled(loop, way.provider, way.kind, settings)
                except Exception:  # noqa: BLE001  # LiteLLM meets the same fault, and DSPy names it
                    return None
                self._hold(place, found)
        except TypeError:  # what cannot be compared by value is nobody else's
            return None
        found.used_at = time.monotonic()
        return found

    def _hold(self, place: tuple[Any, ...], client: PooledClient) -> None:
        before = self._held.get(place)  # let go of without the lock
        with self._changing:
            if self._is_closed:  # under a call, which holds it until it has ended
                return
            self._held[place] = client
            if len(self._held) > self._MOST:
                oldest = min(self._held, key=lambda each: self._held[each].used_at)
                before = self._held.pop(oldest)
        del before

    def let_go(self, is_meant: Callable[[PooledClient], bool]) -> list[PooledClient]:
        """Stop holding some clients, and return them.

        Who drops the last of them closes it: those under a request are closed when it has ended.
        """
        with self._changing:
            gone = [place for place, client in self._held.items() if is_meant(client)]
            return [self._held.pop(place) for place in gone]

    def held(self) -> list[PooledClient]:
        """Return what it holds."""
        with self._changing:
            return list(self._held.values())

    def close(self) -> None:
        """Hold no client, and none that is found from now on."""
        with self._changing:
            self._is_closed = True
        self.let_go(lambda _: True)

    def renew(self) -> None:
        """Have all that is sent from now on go through new clients."""
        pool.retire(self.let_go(lambda _: True))

    def forget(self) -> object:
        """Begin anew, in a forked child, and return what the parent holds."""
        held, self._held = self._held, {}
        self._changing = threading.Lock()
        return held


def _place(
    loop: Loop | None,
    way: Way,
    model: str,
    model_type: str,
    keywords: Mapping[str, Any],
    own: Mapping[str, Any],
) -> tuple[Any, ...]:
    """Return what a call's client depends on, as far as that can change from call to call.

    The rest (proxies, TLS) counts as it is when the client is made.
    """
    around: dict[str, Any] | None = None
    if not is_explicit(way, keywords):
        around = settings_of_call(way, model, model_type, keywords, own)
    return (
        0 if loop is None else id(loop),
        way,
        *map(keywords.get, _CONNECTION),
        *(_spelled(name, own.get(name)) for name in OF_THE_CLIENT),
        *map(id, sessions()),
        None if around is None else (*around.values(),),
    )


def pooled(
    loop: Loop | None, provider: str, kind: Kind, settings: Mapping[str, Any]
) -> PooledClient:
    """Return the client for a configuration on `loop`, or the sync one without."""
    if loop is not None and asyncio._get_running_loop() is loop:  # noqa: SLF001  # documented
        tend(loop)
    key = configuration_key(provider, settings)
    return pool.get(loop, key, lambda: make(kind, settings, is_async=loop is not None))


def tend(loop: Loop) -> None:
    """See to it that the clients of the running `loop` are closed when it ends."""
    loop_end.tend(loop, pool.finish, pool.abandon)


def within(timeout: Any, limit: float) -> float | httpx.Timeout:
    """Return a request's `timeout`, but a second more than `limit` seconds at most.

    A second, so that the one who enforces the limit comes first: this is for the thread that would
    go on after that. None stands for LiteLLM's own timeout.
    """
    import httpx  # noqa: PLC0415  # LiteLLM has it, and comes late

    limit = max(0.0, limit) + 1.0
    if isinstance(timeout, httpx.Timeout):
        parts = timeout.as_dict()
        return httpx.Timeout(
            **{name: limit if each is None else min(each, limit) for name, each in parts.items()}
        )
    if timeout is None:
        timeout = litellm_so_far().get("request_timeout")
    is_number = isinstance(timeout, (int, float)) and not isinstance(timeout, bool)
    return min(timeout, limit, LITELLMS_TIMEOUT) if is_number else min(limit, LITELLMS_TIMEOUT)


async def running_loop() -> Loop:
    """Return the loop that this runs on, at whose end its clients are closed."""
    loop = asyncio.get_running_loop()
    tend(loop)
    return loop


def configuration_key(provider: str, settings: Mapping[str, Any]) -> str:
    """Return a SHA-256 that is equal for equal configurations, and only for those.

    30 and 30.0 differ, the order of headers and the case of their names do not matter, and timeout
    objects are equal when their parts are. Proxies and TLS settings count as they are now. It tells
    nothing of the credentials in it.

    Raises:
        TypeError: If a setting cannot be compared by value.
    """
    parts = [(name, _spelled(name, settings[name])) for name in sorted(settings)]
    return hashlib.sha256(repr((provider, surroundings(), parts)).encode()).hexdigest()


def _spelled(name: str, value: Any) -> tuple[Any, ...]:
    if value is None or type(value) in (str, bool, int, float):
        return type(value).__name__, value
    if hasattr(value, "as_dict"):  # an httpx.Timeout
        value = value.as_dict()
    if isinstance(value, Mapping):
        items = ((str(key).lower(), _spelled(name, each)) for key, each in value.items())
        return "mapping", *sorted(items)
    raise TypeError(f"{name} cannot be compared by value; got {type(value).__name__}")


def prune(unused_for: float = 300.0) -> None:
    """Let the clients of the process close connections that they have not used for a while.

    None is closed under a request, and what a caller holds stays open. The next call opens a
    connection again.

    Args:
        unused_for: Seconds, 0 for all that is not in use.

    Raises:
        ValueError: If `unused_for` is negative.
    """
    if not unused_for >= 0:
        raise ValueError(f"unused_for must be seconds, 0 or more; got {unused_for!r}")
    pool.prune(unused_for)
