"""What one of LiteLLM's events tells, in a few plain facts.

An event holds the live state of a call, API key and prompt included; this module takes out what
is needed and keeps nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypedDict
from urllib.parse import urlsplit

TAG = "dspy_resilient"  # in a call's metadata; LiteLLM's own fallbacks change the id, but not this

_ALIASES = {"text-completion-openai": "openai", "ollama_chat": "ollama", "azure_text": "azure"}


class Facts(TypedDict, total=False):
    """What an event tells beyond its error, in the words of `classify`."""

    handed_off: bool | None
    answered: bool | None


@dataclass(frozen=True, slots=True)
class CallbackEvent:
    """What LiteLLM told about one request.

    Attributes:
        error: What the caller will catch, or its cause where a stream broke; None for a success.
        handed_off: Whether the request was handed to a provider; None if nobody knows.
        answered: Whether anything of an answer came back, be it unreadable.
        provider: LiteLLM's name of the provider, aliases folded, or None.
        endpoint: scheme://host[:port]/path, without query and credentials, or None.
        seconds: How long the request took, by LiteLLM's clock.
    """

    error: BaseException | None
    handed_off: bool | None
    answered: bool | None
    provider: str | None
    endpoint: str | None
    seconds: float = 0.0

    def facts_of(self, error: BaseException) -> Facts:
        """Return what this tells about `error`: nothing, if it is about another one."""
        if not any(each is self.error for each in chain_of(error)):
            return {}
        return {"handed_off": self.handed_off, "answered": self.answered}


def read_event(kwargs: dict[str, Any], _: Any, start: Any, end: Any) -> CallbackEvent:
    """Return the evidence in an event of LiteLLM's: its state, its answer, and two datetimes."""
    error = kwargs.get("exception")
    provider = kwargs.get("custom_llm_provider")
    return CallbackEvent(
        error=error if isinstance(error, BaseException) else None,
        handed_off=kwargs.get("api_call_start_time") is not None,
        answered=_is_answered(kwargs, error),
        provider=provider_name(provider) if isinstance(provider, str) else None,
        endpoint=endpoint_name((kwargs.get("litellm_params") or {}).get("api_base")),
        seconds=_seconds(start, end) or 0.0,
    )


def chain_of(error: BaseException | None) -> list[BaseException]:
    """Return `error` and what caused it, outermost first."""
    chain: list[BaseException] = []
    while error is not None and not any(error is each for each in chain):
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain


def _is_answered(kwargs: dict[str, Any], error: Any) -> bool:
    """Whether LiteLLM has noted something of the provider's: headers, a first chunk, or a body.

    For the body of a request that failed it notes the error instead.
    """
    if kwargs.get("response_headers") or kwargs.get("completion_start_time"):
        return True
    body = kwargs.get("original_response")
    chain = chain_of(error if isinstance(error, BaseException) else None)
    if any(getattr(each, "litellm_response_headers", None) for each in chain):
        return True
    return isinstance(body, str) and not any(body == str(each) for each in chain)


def _seconds(start: Any, end: Any) -> float | None:
    try:
        return float((end - start).total_seconds())
    except (TypeError, AttributeError):
        return None


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
