"""Closes async HTTP clients: properly on their own event loop, by force once that loop is gone.

It knows as much of httpx, aiohttp and asyncio as that takes. Which clients are to be closed, and
when, is for others to say.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import httpx

_PATIENCE = 1.0


def http_client_of(client: Any) -> httpx.AsyncClient | None:
    """Return the httpx client inside an SDK's client or LiteLLM's handler, or None if none is."""
    import httpx  # noqa: PLC0415  # whoever has such a client has imported it

    for candidate in (getattr(client, "_client", None), getattr(client, "client", None), client):
        if isinstance(candidate, httpx.AsyncClient):
            return candidate
    return None


def is_busy(http: httpx.AsyncClient) -> bool:
    """Whether a request, or a stream that nobody has closed, holds a connection of `http`."""
    for transport in _transports(http):
        if _connector(transport) is not None:
            if _connector(transport)._acquired:  # noqa: SLF001  # aiohttp offers nothing public
                return True
        elif any(not connection.is_idle() for connection in _pooled(transport)):
            return True
    return False


async def close(http: httpx.AsyncClient) -> None:
    """Close `http` on the running loop, which must be its own; by force if it takes a second."""
    connections = list(_connections(http))
    try:
        async with asyncio.timeout(_PATIENCE):
            await http.aclose()
    except Exception:  # noqa: BLE001  # nobody is left who could do anything about it
        for connection in connections:
            with contextlib.suppress(Exception):
                connection.abort()


def abandon(http: httpx.AsyncClient) -> None:
    """Close the sockets of `http`, whose loop does not run any more; on any thread, never raises.

    Neither Python nor aiohttp has anything to warn of then. Connections of httpx's own pool are
    left to the collector.
    """
    connections = list(_connections(http))
    for transport in _transports(http):
        with contextlib.suppress(Exception):
            _connector(transport)._close()  # noqa: SLF001  # `close()` is for loops that run
    for connection in connections:
        _drop(connection)


def _connections(http: httpx.AsyncClient) -> Iterator[Any]:
    """Yield the asyncio transports of `http`."""
    for transport in _transports(http):
        connector = _connector(transport)
        if connector is not None:
            idle = (each for pool in connector._conns.values() for each, _ in pool)  # noqa: SLF001
            for protocol in [*connector._acquired, *idle]:  # noqa: SLF001
                if getattr(protocol, "transport", None) is not None:
                    yield protocol.transport


def _transports(http: httpx.AsyncClient) -> Iterator[Any]:
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
