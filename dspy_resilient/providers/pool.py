"""One HTTP client per provider and configuration, for requests that DSPy does not make.

Calls of a `ResilientLM` go through LiteLLM's own clients, which LiteLLM reuses well. This pool is
for the rest: to list models, to upload a file, or to hand to LiteLLM as `client=`. It holds its
clients weakly and counts nobody's requests: whoever sends one holds the client, and when the last
holder has gone the connections are closed.
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Unpack

from dspy_resilient._support.fork import renew_after_fork
from dspy_resilient.providers import cached
from dspy_resilient.providers import http_close as closing
from dspy_resilient.providers.make import Configuration, make, resolve

if TYPE_CHECKING:
    Shelf = weakref.WeakValueDictionary[str, Any]

Loop = asyncio.AbstractEventLoop


class Pool:
    """Clients by event loop (None for sync ones) and configuration; safe for threads and forks."""

    def __init__(self) -> None:
        self.renew()

    def renew(self) -> None:
        """Begin empty in a forked child; the parent's connections are the parent's."""
        self._changing = threading.Lock()
        self._sync: Shelf = weakref.WeakValueDictionary()
        self._by_loop: weakref.WeakKeyDictionary[Loop, Shelf] = weakref.WeakKeyDictionary()

    def get(self, loop: Loop | None, key: str, make: Callable[[], Any]) -> Any:
        """Return the client under `key`, made by `make` if there is none, or a closed one."""
        with self._changing:
            shelf = self._shelf(loop)
        client = shelf.get(key)
        if client is not None and _is_open(client):
            return client
        made = make()  # without the lock: it loads certificates
        with self._changing:
            client = shelf.get(key)
            if client is None or not _is_open(client):
                client = shelf[key] = made
        http = closing.http_client_of(made)
        if http is not None and not cached.is_session(http):  # also if another thread was faster
            closing.close_with(made, http, None if loop is None else weakref.ref(loop))
        return client

    def of_loop(self, loop: Loop) -> list[Any]:
        """Return the living clients of `loop`."""
        shelf = self._by_loop.get(loop)
        return [] if shelf is None else [each for ref in shelf.valuerefs() if (each := ref())]

    def _shelf(self, loop: Loop | None) -> Shelf:
        if loop is None:
            return self._sync
        return self._by_loop.setdefault(loop, weakref.WeakValueDictionary())


def _is_open(client: Any) -> bool:
    http = closing.http_client_of(client)
    return http is not None and not http.is_closed


pool = Pool()
renew_after_fork(pool)


def client(provider: str, **configuration: Unpack[Configuration]) -> Any:
    """Return the one client for this configuration; to be used, not closed.

    The same configuration gives the same client for as long as anybody holds it. It is closed when
    nobody does any more, and at exit. It does not retry. On any thread; imports LiteLLM, which
    takes seconds the first time.

    Args:
        provider: LiteLLM's name of it: "openai", "groq", "hosted_vllm", "anthropic", …
        **configuration: `api_key` and `api_base` (default: what LiteLLM would use), `timeout` (in
            seconds, or an `httpx.Timeout`; default: the client's own, 600 s), `headers` to send
            with each request, `organization` and `project` (OpenAI's), `api_version` (Azure's).

    Returns:
        An `openai.OpenAI` for all that speak OpenAI's language, an `openai.AzureOpenAI` for Azure,
        LiteLLM's `HTTPHandler` for others.

    Raises:
        ValueError: If the provider is unknown, or lacks its key or address, or does not know a
            setting.
        TypeError: If a setting has an unknown name, or cannot be compared by value.

    Example:
        >>> local = {"api_base": "http://127.0.0.1:8000/v1", "api_key": "key"}
        >>> one = client("openai", **local, timeout=30)
        >>> one is client("openai", **local, timeout=30)
        True
        >>> one is client("openai", **local, timeout=30.0)
        False
    """
    return pooled(None, provider, configuration)


def pooled(loop: Loop | None, provider: str, configuration: Configuration) -> Any:
    """Return the client for `configuration` on `loop`, or the sync one without."""
    name, settings = resolve(provider, configuration)
    key = configuration_key(name, settings)
    return pool.get(loop, key, lambda: make(name, settings, is_async=loop is not None))


def configuration_key(provider: str, settings: Mapping[str, Any]) -> str:
    """Return a SHA-256 that is equal for equal configurations, and only for those.

    30 and 30.0 differ, the order of headers and the case of their names do not matter, and timeout
    objects are equal when their parts are. It tells nothing of the credentials in it.
    """
    parts = [(name, _spelled(name, settings[name])) for name in sorted(settings)]
    return hashlib.sha256(repr((provider, parts)).encode()).hexdigest()


def _spelled(name: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        items = ((str(key).lower(), _spelled(name, each)) for key, each in value.items())
        return "mapping", sorted(items)
    if hasattr(value, "as_dict"):  # an httpx.Timeout
        return "timeout", _spelled(name, value.as_dict())
    if value is None or type(value) in (str, bool, int, float):
        return type(value).__name__, value
    raise TypeError(f"{name} cannot be compared by value; got {type(value).__name__}")
