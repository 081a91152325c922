"""Ends, together with an event loop, what LiteLLM has begun on it.

LiteLLM makes its async clients per loop and keeps them in a cache, but never learns that a loop
has ended: a hundred `asyncio.run` leave a hundred open connections. Here every loop on which we
send gets an async generator that waits for nothing; the loop's own `shutdown_asyncgens`, which
`asyncio.run` calls last, ends it, and with it that loop's clients. Requests are not our business.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import sys
import threading
import weakref
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any, Unpack

from dspy_resilient.providers import cached
from dspy_resilient.providers import http_close as closing
from dspy_resilient.providers.leases import count_uses, retired
from dspy_resilient.providers.make import Configuration
from dspy_resilient.providers.perloop import Reports, unshare
from dspy_resilient.providers.pool import pool, pooled
from dspy_resilient.providers.texts import keep_clients

if TYPE_CHECKING:
    from dspy_resilient.providers.http_close import HttpClient

Loop = asyncio.AbstractEventLoop

_TURNS = 20
_TURN = 0.005


class _Tended:
    """What belongs to one loop: its reports, and the generator whose end is the loop's.

    Attributes:
        mark: What the keys of its clients end in; None while LiteLLM has none.
    """

    def __init__(self, loop: Loop) -> None:
        self.reports = Reports()
        self.mark: str | None = None
        self.end = self._end(weakref.ref(loop))

    async def _end(self, own: weakref.ref[Loop]) -> AsyncGenerator[None]:
        try:
            yield
        finally:
            # Nothing if it goes together with its loop, or when that has been closed already.
            loop = own()
            if loop is not None and asyncio._get_running_loop() is loop:  # noqa: SLF001  # see docs
                with contextlib.suppress(Exception):
                    await self.reports.finish()
                    await _close_clients(loop, self.mark)


class _Loops:
    """The loops on which we have sent; locked at a loop's first request and after its end only."""

    def __init__(self) -> None:
        self._inherited: list[object] = []
        self._begin()

    def _begin(self) -> None:
        self._changing = threading.Lock()
        self._tended: weakref.WeakKeyDictionary[Loop, _Tended] = weakref.WeakKeyDictionary()

    def reports(self) -> Reports | None:
        loop = asyncio._get_running_loop()  # noqa: SLF001  # documented
        tended = None if loop is None else self._tended.get(loop)
        return None if tended is None else tended.reports

    def tend(self, loop: Loop) -> None:
        tended = self._tended.get(loop)
        if tended is None:
            tended = self._begin_tending(loop)
        if tended.mark is None:
            with contextlib.suppress(Exception):
                tended.mark = cached.mark_of_running_loop()

    def _begin_tending(self, loop: Loop) -> _Tended:
        tended = _Tended(loop)
        with contextlib.suppress(Exception):
            self.sweep()
            with self._changing:
                self._tended[loop] = tended
            if not getattr(loop, "_asyncgens_shutdown_called", False):  # else asyncio would warn
                _start(tended.end)
            # LiteLLM's own exit handler forgets the sockets: ours has to be registered after it.
            atexit.unregister(self.sweep)
            atexit.register(self.sweep)
        return tended

    def sweep(self) -> None:
        """Close by force what loops that were closed in another way have left.

        At exit, too, but nothing of a loop that was left open: a later exit handler may run it.
        """
        with self._changing:
            loops = [loop for loop in self._tended if loop.is_closed()]
            left = [(loop, self._tended.pop(loop)) for loop in loops]
        for loop, tended in left:
            tended.reports.abandon()
            closing.forget(loop)
            for http in [*_take_clients(loop, tended.mark, busy=True), *retired(loop)]:
                with contextlib.suppress(Exception):
                    closing.abandon(http)

    def renew(self) -> None:
        """Begin anew in a forked child, with no client of the parent's.

        The child must neither send on those connections nor close them: the parent goes on using
        them. Nor may the collector get at them.
        """
        clients = cached.cache()
        if clients is not None:
            self._inherited.append(dict(clients.cache_dict))
            clients.flush_cache()
        made = cached.made_so_far()
        self._inherited.append(made.pop("module_level_client", None))  # made again when named
        self._inherited.append(self._tended)
        self._begin()


def _start(generator: AsyncGenerator[None]) -> None:
    """Run `generator` to its `yield`, known to its loop but not holding it.

    A generator keeps the finalizer in use when it starts, and asyncio's belongs to the loop.
    """
    hooks = sys.get_asyncgen_hooks()
    sys.set_asyncgen_hooks(finalizer=None)
    try:
        started = generator.__anext__()
    finally:
        sys.set_asyncgen_hooks(*hooks)
    with contextlib.suppress(StopIteration):  # it awaits nothing on its way
        started.__await__().send(None)


async def _close_clients(loop: Loop, mark: str | None) -> None:
    """Close the clients of the running loop; one in use past our patience is left for `sweep`."""
    for _ in range(_TURNS):
        for http in _take_clients(loop, mark, busy=False):
            await closing.close(http)
        if not _clients(loop, mark):
            break
        await asyncio.sleep(_TURN)


def _take_clients(loop: Loop, mark: str | None, *, busy: bool) -> list[HttpClient]:
    """Take the clients of `loop` out of LiteLLM's cache; those in use as well, if `busy`."""
    taken = []
    for key, http in _clients(loop, mark):
        if busy or not closing.is_busy(http):
            if key is not None:
                cached.forget(key)
            taken.append(http)
    return taken


def _clients(loop: Loop, mark: str | None) -> list[tuple[str | None, HttpClient]]:
    """Return what sends on `loop`, with its key if it is in LiteLLM's cache."""
    found: list[tuple[str | None, HttpClient]] = []
    for client in pool.of_loop(loop):
        http = closing.http_client_of(client)
        if http is not None and not http.is_closed and not cached.is_session(http):
            found.append((None, http))
    for key, client in cached.entries():
        is_its = mark is not None and key.endswith(mark)
        http = closing.http_client_of(client) if is_its else None
        if http is not None and not cached.is_lent(client, http):
            found.append((key, http))
    return found


_loops = _Loops()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_loops.renew)


async def tend() -> None:
    """See to it that the running loop's provider clients are closed when the loop ends.

    To be awaited before a request is sent. The first time on a loop it registers the loop and
    cleans up after loops that were closed without `shutdown_asyncgens`, as does the end of the
    process; afterwards it costs one look-up. No other loop's clients are touched, nor one under a
    running request, nor any that a caller has lent to LiteLLM. Never raises.
    """
    _loops.tend(asyncio.get_running_loop())


def prepare(litellm: Any) -> None:
    """Have LiteLLM keep apart what belongs to different loops, and keep what it would drop."""
    with contextlib.suppress(ImportError, AttributeError):  # another LiteLLM may not need it
        unshare(litellm, _loops.reports)
        count_uses(litellm.in_memory_llm_clients_cache)
        keep_clients(litellm.main)


def async_client(provider: str, **configuration: Unpack[Configuration]) -> Any:
    """Return the one async client for this configuration and the running event loop.

    As `client`, but of the async classes, and closed when its loop ends.

    Raises:
        RuntimeError: If no event loop is running.
    """
    loop = asyncio.get_running_loop()
    _loops.tend(loop)
    return pooled(loop, provider, configuration)
