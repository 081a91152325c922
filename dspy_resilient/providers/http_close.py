"""Closes HTTP clients: async ones properly on their own event loop, by force once that is gone.

It knows as much of httpx, aiohttp and asyncio as that takes, and has no connection closed while
others use it. Which clients are to be closed, and when, is for others to say.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import os
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard

if TYPE_CHECKING:
    import httpx

    HttpClient: TypeAlias = httpx.Client | httpx.AsyncClient

Loop = asyncio.AbstractEventLoop

_PATIENCE = 1.0


def http_client_of(client: Any) -> HttpClient | None:
    """Return the httpx client inside an SDK's client or LiteLLM's handler, or None if none is."""
    import httpx  # noqa: PLC0415  # whoever has such a client has imported it

    for candidate in (getattr(client, "_client", None), getattr(client, "client", None), client):
        if isinstance(candidate, (httpx.AsyncClient, httpx.Client)):
            return candidate
    return None


def is_sync(http: HttpClient) -> TypeGuard[httpx.Client]:
    """Whether `http` can be closed anywhere, without a loop."""
    return not hasattr(http, "aclose")


def spare_idle_connections(http: HttpClient) -> None:
    """Have a client on httpx's own pool keep as many idle connections as it may open.

    By default it keeps 20 and closes the others as surplus as soon as they are idle, without
    noticing that somebody has just taken one: a thread then waits for its answer until its
    timeout, 600 s with OpenAI's SDK (httpcore 1.0; about once in 10,000 calls of 64 threads).
    """
    for transport in _transports(http):
        pool: Any = getattr(transport, "_pool", None)
        if hasattr(pool, "_max_keepalive_connections") and hasattr(pool, "_max_connections"):
            pool._max_keepalive_connections = pool._max_connections  # noqa: SLF001  # it takes no other word


def is_busy(http: HttpClient) -> bool:
    """Whether a request, or a stream that nobody has closed, holds a connection of `http`."""
    for transport in _transports(http):
        if _connector(transport) is not None:
            if _connector(transport)._acquired:  # noqa: SLF001  # aiohttp offers nothing public
                return True
        elif any(not connection.is_idle() for connection in _pooled(transport)):
            return True
    return False


async def close(http: HttpClient) -> None:
    """Close `http` on the running loop, which must be its own; by force if it takes a second."""
    if is_sync(http):
        abandon(http)
        return
    asynchronous: Any = http
    connections = list(_connections(http))
    try:
        async with asyncio.timeout(_PATIENCE):
            await asynchronous.aclose()
    except BaseException as error:
        for connection in connections:
            with contextlib.suppress(Exception):
                connection.abort()
        for connector in filter(None, map(_connector, _transports(http))):
            with contextlib.suppress(Exception):
                connector._close()  # noqa: SLF001  # without a wait: the loop may be ending
        if not isinstance(error, Exception):
            raise


def abandon(http: HttpClient) -> None:
    """Close the sockets of `http`, whose loop does not run any more; on any thread, never raises.

    Neither Python nor aiohttp has anything to warn of then. Connections of httpx's own async pool
    are left to the collector.
    """
    if is_sync(http):
        with contextlib.suppress(Exception):
            http.close()
        return
    connections = list(_connections(http))
    for transport in _transports(http):
        with contextlib.suppress(Exception):
            connector = _connector(transport)
            connector._close()  # noqa: SLF001  # `close()` is for loops that run
            connector._acquired_per_host.clear()  # noqa: SLF001  # it leads back to who waits
    for connection in connections:
        _drop(connection)


def close_with(client: Any, http: HttpClient, loop: weakref.ref[Loop] | None) -> None:
    """Have `http` closed when `client`, which sends through it, has no holder any more.

    Whoever sends a request holds the client, so none is closed under one. In a forked child
    nothing is closed that the parent goes on using.
    """
    weakref.finalize(client, _let_go, http, loop, os.getpid())


def _let_go(http: HttpClient, loop: weakref.ref[Loop] | None, process: int) -> None:
    """Do what `close_with` promises; takes no lock, since the collector may call it anywhere."""
    if os.getpid() == process:
        close_from_anywhere(http, loop)


def close_from_anywhere(http: HttpClient, loop: weakref.ref[Loop] | None) -> None:
    """Close `http` on its loop when that runs next, or here and now if it is closed; never raises.

    An async client of which nobody knows the loop stays as it is.
    """
    if is_sync(http):
        abandon(http)
    elif loop is not None:
        living = loop()
        if living is None or living.is_closed():
            abandon(http)
        else:
            with contextlib.suppress(RuntimeError):  # it has just ended, and been cleaned up after
                living.call_soon_threadsafe(_close_soon, http, living)


_closing: set[asyncio.Task[None]] = set()  # the loop itself holds its tasks weakly


def _close_soon(http: HttpClient, loop: Loop) -> None:
    task = loop.create_task(close(http))
    _closing.add(task)
    task.add_done_callback(_closing.discard)


def forget(loop: Loop) -> None:
    """Keep nothing that was to be closed on `loop`, which is closed itself."""
    for task in list(_closing):
        if task.get_loop() is loop:
            _closing.discard(task)
            end(task)


def end(task: asyncio.Task[None]) -> None:
    """End a task whose loop is closed, in a context in which nobody is; on any thread, never raises.

    The collector would do so in the middle of whatever the thread is doing.
    """
    task._log_destroy_pending = False  # type: ignore[attr-defined]  # noqa: SLF001  # as `gather` does
    with contextlib.suppress(Exception):
        contextvars.Context().run(task.get_coro().close)


def _connections(http: HttpClient) -> Iterator[Any]:
    """Yield the asyncio transports of `http`."""
    for transport in _transports(http):
        connector = _connector(transport)
        if connector is not None:
            idle = (each for pool in connector._conns.values() for each, _ in pool)  # noqa: SLF001
            for protocol in [*connector._acquired, *idle]:  # noqa: SLF001
                if getattr(protocol, "transport", None) is not None:
                    yield protocol.transport


def _transports(http: HttpClient) -> Iterator[Any]:
    yield http._transport  # noqa: SLF001  # there is no other way to the connections
    yield from (mount for mount in http._mounts.values() if mount is not None)  # noqa: SLF001


def _connector(transport: Any) -> Any:
    """Return the aiohttp connector under a transport of LiteLLM's, unless it is a borrowed one."""
    if not getattr(transport, "_owns_session", False):
        return None
    return getattr(transport.client, "connector", None)


def _pooled(transport: Any) -> list[Any]:
    return list(getattr(getattr(transport, "_pool", None), "connections", ()))


def _drop(connection: Any) -> None:
    """Do to an asyncio transport what its loop would do, if it still ran, to close it."""
    with contextlib.suppress(Exception):
        connection.abort()  # of use for what it does before it asks the loop
    with contextlib.suppress(Exception):
        encrypted = getattr(connection, "_ssl_protocol", None)
        plain = connection if encrypted is None else encrypted._transport  # noqa: SLF001
        plain._sock.close()  # noqa: SLF001
        plain._sock = None  # noqa: SLF001  # else the transport's finalizer warns
