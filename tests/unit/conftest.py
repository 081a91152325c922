"""Shared by the unit tests that drive the real LiteLLM."""

from __future__ import annotations

import asyncio
import contextvars
import inspect

import pytest


@pytest.fixture(scope="module")
def on_a_loop():
    """Run coroutines on one event loop; in the end close every HTTP client that LiteLLM opened.

    LiteLLM keeps its clients by loop and does not close them: dropped ones would warn.
    """
    import litellm

    clients = litellm.in_memory_llm_clients_cache.cache_dict
    before = set(clients)
    with asyncio.Runner() as runner:
        yield lambda coroutine: runner.run(coroutine, context=contextvars.copy_context())
        for key in set(clients) - before:
            closing = getattr(clients.pop(key), "close", lambda: None)()
            if inspect.isawaitable(closing):
                runner.run(_wait_for(closing))


async def _wait_for(closing):
    await closing
