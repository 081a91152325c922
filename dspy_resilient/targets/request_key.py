"""The cache key of a request: equal for equal requests, and only for those.

A SHA-256 over what is asked, of which model, where, and in whose name. No credential takes part but
as an HMAC. This module stores nothing, and a request it cannot describe has no key.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from typing import Any

import dspy

from dspy_resilient._support.canonical import encode
from dspy_resilient.providers.endpoint import HOLDERS, Place, role_of

# What may differ between two requests that ask the same.
_LEFT_OUT = frozenset(
    {"cache", "timeout", "request_timeout", "stream_timeout", "metadata", "litellm_metadata"}
    | {"litellm_call_id", "litellm_trace_id", "litellm_session_id"}
    | {"num_retries", "max_retries", "retry_strategy", "retry_policy"}
    | {"prompt", "messages", "request"}  # which have a place of their own
)


# The entry points of DSPy 3.5 return another shape than those of 3.4.
_ENTRIES = {"generate": "generate", "agenerate": "generate"}


def key_of(
    place: Place, method: str, args: tuple[Any, ...], settings: dict[str, Any]
) -> str | None:
    """Return the cache key of a call at `place`, or None if it cannot be keyed.

    Args:
        place: Whom it asks, where, and in whose name.
        method: Name of DSPy's public call method.
        args: The positional arguments of the call.
        settings: Those of client and call, merged.
    """
    if place.credential is None:
        return None
    prompt = args[0] if args else settings.get("prompt") or settings.get("request")
    request = prompt if isinstance(prompt, dspy.lm15.Request) else None
    return request_key(
        entry=_ENTRIES.get(method, "call" if request is None else "request"),
        model=place.endpoint.model,
        model_type=place.endpoint.kind,
        where=place.where,
        tenant=place.credential,
        prompt=None if request is not None else prompt,
        messages=settings.get("messages"),
        kwargs=settings,
        request=request,
    )


def request_key(
    *,
    entry: str,
    model: str,
    model_type: str,
    where: str,
    tenant: str,
    prompt: Any,
    messages: Any,
    kwargs: Mapping[str, Any],
    request: Any = None,
) -> str | None:
    """Return the key of a request as 64 hex digits, or None if it cannot be keyed; never raise.

    Args:
        entry: Shape of the call: "call", or "request" for a typed request. Their answers differ.
        model: The model asked.
        model_type: "chat", "text" or "responses".
        where: What stands for the address and its scope, or "" for the provider's own.
        tenant: What stands for the credentials, or a name given in their place.
        prompt: The prompt, or None.
        messages: The messages, or None. Without any, the prompt is the one message, as for DSPy.
        kwargs: Settings of client and call, merged. None counts as absent; what `where` and
            `tenant` stand for, and what does not change the answer (cache flag, timeouts, metadata,
            retries), is left out.
        request: The typed request, or None. Local media in it count by their content.
    """
    try:
        if not messages and request is None:
            prompt, messages = None, [{"role": "user", "content": prompt}]
        said = [] if prompt is None else [prompt]
        settings = _settings(kwargs)
        asked = [entry, model, model_type, where, tenant, said, messages or [], settings]
        if request is not None:
            asked.append(request)
        return hashlib.sha256(encode(asked)).hexdigest()
    except Exception:  # noqa: BLE001  # whatever it is that cannot be described, the call goes on
        return None


@functools.lru_cache(maxsize=1024)
def _counting(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the settings that count as such; the others have a place of their own, or none."""
    return tuple(
        name for name in names if name not in _LEFT_OUT and role_of(name) in (None, "holder")
    )


def _settings(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    counting = _counting(tuple(kwargs))
    settings = {name: value for name in counting if (value := kwargs[name]) is not None}
    if not HOLDERS.isdisjoint(settings):
        for name in HOLDERS & settings.keys():
            held = settings.pop(name)
            if isinstance(held, Mapping):
                held = {
                    key: value
                    for key, value in held.items()
                    if role_of(str(key)) not in ("credential", "scope")
                }
            if held:
                settings[name] = held
    return settings
