"""HTTP clients for a program's own requests, over the connections that `ResilientLM` uses."""

from __future__ import annotations

import asyncio
from typing import Any, Unpack

from dspy_resilient.providers.make import Configuration, resolve, sdk_over, speaks_openai
from dspy_resilient.providers.pool import Loop, pooled


def client(provider: str, **configuration: Unpack[Configuration]) -> Any:
    """Return the one client for this configuration; to be used, not closed.

    The same configuration gives the same client for as long as anybody holds it, and it has the
    connections that a `ResilientLM` of this configuration uses. It is closed when nobody holds it
    any more, and at exit. It does not retry. On any thread; imports LiteLLM, which takes seconds the
    first time.

    Args:
        provider: LiteLLM's name of it: "openai", "groq", "hosted_vllm", "anthropic", …
        **configuration: `api_key` and `api_base` (default: what LiteLLM would use), `timeout` (in
            seconds, or an `httpx.Timeout`; default: the client's own, 600 s), `headers` to send
            with each request, `organization` and `project` (OpenAI's), `api_version` (Azure's),
            `ssl_verify`.

    Returns:
        An `openai.OpenAI` for all that speak OpenAI's language, an `openai.AzureOpenAI` for Azure,
        LiteLLM's `HTTPHandler` for others.

    Raises:
        ValueError: If the provider is unknown, or lacks its key or address, or does not know a
            setting, or LiteLLM takes no client for it.
        TypeError: If a setting has an unknown name, or cannot be compared by value.

    Example:
        >>> local = {"api_base": "http://127.0.0.1:8000/v1", "api_key": "key"}
        >>> one = client("openai", **local, timeout=30)
        >>> one is client("openai", **local, timeout=30)
        True
        >>> one is client("openai", **local, timeout=30.0)
        False
    """
    return _client(None, provider, configuration)


def async_client(provider: str, **configuration: Unpack[Configuration]) -> Any:
    """Return the one async client for this configuration and the running event loop.

    As `client`, but of the async classes, and closed when its loop ends.

    Raises:
        RuntimeError: If no event loop is running.
    """
    return _client(asyncio.get_running_loop(), provider, configuration)


def _client(loop: Loop | None, provider: str, configuration: Configuration) -> Any:
    provider, kind, settings = resolve(provider, configuration)
    found = pooled(loop, provider, kind, settings)
    if found.face is None:
        is_sdks = kind == "handler" and speaks_openai(provider)
        found.face = (
            sdk_over(found.client, settings, is_async=loop is not None) if is_sdks else found.client
        )
        found.face.holder = found  # whoever holds what is returned holds the connections
    return found.face
