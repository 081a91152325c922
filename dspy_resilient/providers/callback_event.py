"""What one of LiteLLM's events tells, in a few plain facts.

An event holds the live state of a call, API key and prompt included; this module takes out what
is needed and keeps nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

TAG = "dspy_resilient"  # in a call's metadata; LiteLLM's own fallbacks change the id, but not this

# Where a provider is unless told otherwise, as far as LiteLLM's events show it.
_HOMES = {
    "openai": "https://api.openai.com",
    "anthropic": "https://api.anthropic.com",
    "gemini": "https://generativelanguage.googleapis.com",
    "groq": "https://api.groq.com",
    "cerebras": "https://api.cerebras.ai",
    "mistral": "https://api.mistral.ai",
    "openrouter": "https://openrouter.ai",
    "together_ai": "https://api.together.ai",
}

_PREFIX = "llm_provider-"  # LiteLLM's mark on headers that came from the provider

_ALIASES = {"text-completion-openai": "openai", "ollama_chat": "ollama", "azure_text": "azure"}


@dataclass(frozen=True, slots=True)
class CallbackEvent:
    """What LiteLLM told about one request.

    Attributes:
        error: What the caller will catch, or its cause where a stream broke; None for a success.
        handed_off: Whether the request was handed to a provider; None if nobody knows.
        provider: LiteLLM's name of the provider, aliases folded, or None.
        endpoint: scheme://host[:port]/path, without query and credentials, or None.
        seconds: How long the request took, by LiteLLM's clock.
        first_token: Seconds until the first chunk of a stream came, or None if none did.
        headers: The provider's, by lower-case name; empty where LiteLLM has not kept them.
    """

    error: BaseException | None
    handed_off: bool | None
    provider: str | None
    endpoint: str | None
    seconds: float = 0.0
    first_token: float | None = None
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)


def read_event(kwargs: dict[str, Any], response: Any, start: Any, end: Any) -> CallbackEvent:
    """Return the evidence in an event of LiteLLM's: its state, its answer, and two datetimes."""
    error = kwargs.get("exception")
    provider = kwargs.get("custom_llm_provider")
    first = kwargs.get("completion_start_time") if kwargs.get("stream") else None
    return CallbackEvent(
        error=error if isinstance(error, BaseException) else None,
        handed_off=kwargs.get("api_call_start_time") is not None,
        provider=provider_name(provider) if isinstance(provider, str) else None,
        endpoint=endpoint_name((kwargs.get("litellm_params") or {}).get("api_base")),
        seconds=_seconds(start, end) or 0.0,
        first_token=None if first is None else _seconds(start, first),
        headers=_headers(kwargs, response, error),
    )


def _seconds(start: Any, end: Any) -> float | None:
    try:
        return float((end - start).total_seconds())
    except (TypeError, AttributeError):
        return None


def _headers(kwargs: dict[str, Any], response: Any, error: Any) -> dict[str, str]:
    """Return what LiteLLM has kept of the response's headers, wherever that is."""
    kept = getattr(error, "litellm_response_headers", None) or kwargs.get("response_headers")
    if not kept:
        kept = (getattr(response, "_hidden_params", None) or {}).get("additional_headers")
    if not isinstance(kept, Mapping):
        return {}
    return {str(name).lower().removeprefix(_PREFIX): str(kept[name]) for name in kept}


def call_ids(kwargs: dict[str, Any]) -> Iterator[str]:
    """Yield what the call of an event may be known by, the most certain first."""
    if isinstance(call_id := kwargs.get("litellm_call_id"), str):
        yield call_id
    params = kwargs.get("litellm_params") or {}
    for name in ("litellm_metadata", "metadata"):
        metadata = params.get(name)
        if isinstance(metadata, dict) and isinstance(call_id := metadata.get(TAG), str):
            yield call_id


def provider_name(name: str) -> str:
    """Return the one name of a provider that LiteLLM knows by several."""
    return _ALIASES.get(name, name)


def home_of(provider: str) -> str | None:
    """Return where `provider` is unless told otherwise, or None if nobody knows."""
    return _HOMES.get(provider_name(provider))


def endpoint_name(url: object) -> str | None:
    """Return scheme, host, port and path of `url`; None if it is none."""
    try:
        parts = urlsplit(str(url or ""))
        host, port = parts.hostname, parts.port
    except ValueError:
        return None
    if not host:
        return None
    host = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{host}{f':{port}' if port else ''}{parts.path}".rstrip("/")
