"""Gives each event loop its own of the two things that LiteLLM shares between all of them.

One is `module_level_aclient`, through which it streams the answers of Anthropic, Gemini and
others. Its connections belong to one loop at a time: a stream that starts on a second loop closes
those of the first, and a stream under way there then waits for ever. The other is the worker that
tells callbacks of successes: its queue belongs to one loop at a time, too. A loop that ends at once
leaves reports in it, and loops in parallel take them from one another and fail, with a traceback
in the log. Neither can be avoided by an argument of a call.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
from collections.abc import Callable, Coroutine
from typing import Any

from dspy_resilient.providers import http_close as closing

_SHARED_CLIENT = "module level aclient"
_PATIENCE = 20.0
_LAST_PATIENCE = 5.0

Report = Coroutine[Any, Any, object]


class Reports:
    """The reports of success that are to be made on one event loop; used on that loop only.

    LiteLLM's limits hold: a report may take 20 seconds, and what is left at the end 5 in all.
    """

    def __init__(self) -> None:
        self._waiting: dict[Report, contextvars.Context] = {}
        self._making: set[asyncio.Task[None]] = set()

    def send(self, report: Report) -> None:
        """Have `report` made soon, in the caller's context."""
        self._waiting[report] = contextvars.copy_context()
        task = asyncio.get_running_loop().create_task(self._make(report))
        if not task.done():
            self._making.add(task)
            task.add_done_callback(self._making.discard)

    async def flush(self) -> None:
        """Wait until all that has been sent has been made."""
        await asyncio.gather(*self._making, return_exceptions=True)

    async def finish(self) -> None:
        """Make those that have not begun; their tasks were cancelled, since the loop ends."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LAST_PATIENCE):
                while self._waiting:
                    report, context = self._waiting.popitem()
                    with contextlib.suppress(Exception):
                        await asyncio.get_running_loop().create_task(report, context=context)
        self._drop()

    def abandon(self) -> None:
        """Give up all of them; the loop is closed. On any thread."""
        self._drop()
        for task in list(self._making):
            closing.end(task)

    def _drop(self) -> None:
        while self._waiting:
            self._waiting.popitem()[0].close()

    async def _make(self, report: Report) -> None:
        del self._waiting[report]
        with contextlib.suppress(Exception):
            async with asyncio.timeout(_PATIENCE):
                await report


class _Worker:
    """Passes for LiteLLM's logging worker; does its work where a loop has `Reports` of its own."""

    def __init__(self, shared: Any, find: Callable[[], Reports | None]) -> None:
        self._shared = shared
        self._find = find

    def __getattr__(self, name: str) -> Any:
        return getattr(self._shared, name)

    def ensure_initialized_and_enqueue(self, async_coroutine: Report) -> None:
        reports = self._find()
        if reports is None:
            self._shared.ensure_initialized_and_enqueue(async_coroutine)
        else:
            reports.send(async_coroutine)

    async def flush(self) -> None:
        reports = self._find()
        if reports is not None:
            await reports.flush()
        await self._shared.flush()


class _Client:
    """Passes for an async client of LiteLLM's; what is asked of it, the running loop's own does."""

    def __init__(self, own: Callable[[], Any]) -> None:
        self._own = own

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own(), name)


def unshare(litellm: Any, find: Callable[[], Reports | None]) -> None:
    """Put our stand-ins where LiteLLM looks for the two; once is enough, whatever `find` then is.

    What somebody else has put there stays. `find` returns the running loop's reports, if it has
    any and somebody will `finish` them.
    """
    from litellm.litellm_core_utils import logging_worker  # noqa: PLC0415  # LiteLLM comes late
    from litellm.llms.custom_httpx import http_handler  # noqa: PLC0415  # likewise

    worker = logging_worker.GLOBAL_LOGGING_WORKER
    if type(worker) is logging_worker.LoggingWorker:
        logging_worker.GLOBAL_LOGGING_WORKER = _Worker(worker, find)
    client = litellm.module_level_aclient
    if getattr(client, "client_alias", None) == _SHARED_CLIENT and not isinstance(client, _Client):
        params = {"timeout": client.timeout}

        def own() -> Any:
            return http_handler.get_async_httpx_client("dspy_resilient", params)

        litellm.module_level_aclient = _Client(own)
