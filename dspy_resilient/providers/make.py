"""Makes provider clients: of the OpenAI SDK where a provider speaks OpenAI's language.

For other providers it makes LiteLLM's own handler, which LiteLLM takes as `client=`. All of them
send through what LiteLLM itself would make, so its settings for TLS and proxies hold. This module
keeps nothing.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypedDict

from dspy_resilient.providers import cached
from dspy_resilient.providers import http_close as closing
from dspy_resilient.providers.callback_event import provider_name

if TYPE_CHECKING:
    import httpx

# Besides those that LiteLLM lists.
_SPEAK_OPENAI = frozenset({"openai", "custom_openai", "openrouter", "mistral"})
_OWN_ADDRESS = frozenset({"openai", "custom_openai"})  # the SDK itself knows where they are


class Configuration(TypedDict, total=False):
    """What tells one client of a provider from another.

    Attributes:
        api_key: Default: the one that LiteLLM would use.
        api_base: Likewise.
        api_version: Azure's.
        organization: OpenAI's.
        project: OpenAI's.
        timeout: Seconds, or an `httpx.Timeout`. Default: the client's own, 600 s.
        headers: Sent with each request.
    """

    api_key: str | None
    api_base: str | None
    api_version: str | None
    organization: str | None
    project: str | None
    timeout: float | httpx.Timeout | None
    headers: Mapping[str, str] | None


def resolve(provider: str, given: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the provider's one name and the whole configuration, without what is not set.

    Raises:
        TypeError: If `given` has an unknown name.
        ValueError: If the provider is unknown, or lacks its key or address, or does not know a
            setting.
    """
    import litellm  # noqa: PLC0415  # late on purpose

    for name in given:
        if name not in Configuration.__annotations__:
            known = ", ".join(Configuration.__annotations__)
            raise TypeError(f"client() takes no {name!r}; it takes {known}")
    settings = {name: value for name, value in given.items() if value is not None}
    if provider not in litellm.provider_list and provider not in _SPEAK_OPENAI:
        raise ValueError(f"provider must be one that LiteLLM knows; got {provider!r}")
    found = litellm.get_llm_provider(
        f"{provider}/any", api_base=settings.get("api_base"), api_key=settings.get("api_key")
    )
    provider = provider_name(provider)
    prefix = provider.upper()
    key = found[2] or settings.get("api_key") or os.environ.get(f"{prefix}_API_KEY")
    base = found[3] or settings.get("api_base") or os.environ.get(f"{prefix}_API_BASE")
    if provider == "openai":
        key = key or litellm.api_key or litellm.openai_key
        base = base or litellm.api_base or os.environ.get("OPENAI_BASE_URL")
    settings |= {name: value for name, value in (("api_key", key), ("api_base", base)) if value}
    _check(provider, settings)
    return provider, settings


def _check(provider: str, settings: Mapping[str, Any]) -> None:
    if not _is_openais(provider):
        unknown = {"api_version", "organization", "project"} & settings.keys()
        if unknown:
            raise ValueError(f"{min(unknown)} means nothing to {provider!r}")
        return
    if "api_key" not in settings:
        raise ValueError(f"api_key is missing for {provider!r}, and not in the environment either")
    if "api_base" not in settings and provider not in _OWN_ADDRESS:
        raise ValueError(f"api_base is missing for {provider!r}")
    if ("api_version" in settings) != (provider == "azure"):
        raise ValueError("api_version belongs to azure, and azure needs it")


def _is_openais(provider: str) -> bool:
    import litellm  # noqa: PLC0415  # likewise

    listed = provider in litellm.openai_compatible_providers
    return listed or provider in _SPEAK_OPENAI or provider == "azure"


def make(provider: str, settings: Mapping[str, Any], *, is_async: bool) -> Any:
    """Return a new client for what `resolve` has returned."""
    from litellm.llms.custom_httpx import http_handler  # noqa: PLC0415  # likewise

    if _is_openais(provider):
        made = _make_openais(provider, settings, is_async=is_async)
    else:
        handler = http_handler.AsyncHTTPHandler if is_async else http_handler.HTTPHandler
        made = handler(timeout=settings.get("timeout"))
        made.client.headers.update(settings.get("headers", {}))
    http = closing.http_client_of(made)
    if http is not None and not cached.is_session(http):
        closing.spare_idle_connections(http)
    return made


def _make_openais(provider: str, settings: Mapping[str, Any], *, is_async: bool) -> Any:
    import openai  # noqa: PLC0415  # likewise
    from litellm.llms.openai.common_utils import BaseOpenAILLM  # noqa: PLC0415  # likewise

    rest = dict(settings)
    if headers := rest.pop("headers", None):
        rest["default_headers"] = dict(headers)
    base = rest.pop("api_base", None)
    rest["azure_endpoint" if provider == "azure" else "base_url"] = base
    prefix = "Async" if is_async else ""
    kind = getattr(openai, f"{prefix}{'Azure' if provider == 'azure' else ''}OpenAI")
    find = BaseOpenAILLM._get_async_http_client if is_async else BaseOpenAILLM._get_sync_http_client  # noqa: SLF001  # the way LiteLLM has it
    return kind(http_client=find(), max_retries=0, **rest)
