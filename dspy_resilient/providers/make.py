"""Makes the HTTP clients that LiteLLM takes as `client=`, one for a configuration.

Which kind that is depends on the provider and the kind of call: a client of the OpenAI SDK, Azure's
of it, or LiteLLM's own handler around httpx. All send through what LiteLLM itself would make, so its
settings for TLS and proxies hold. This module keeps no client.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict

from dspy_resilient.providers import http_close as closing
from dspy_resilient.providers.callback_event import provider_name
from dspy_resilient.providers.litellm_module import litellm_so_far, load_litellm
from dspy_resilient.providers.wire import tell_endings

if TYPE_CHECKING:
    import httpx

Kind = Literal["openai", "azure", "handler"]

# Providers whose requests LiteLLM 1.110 sends through a handler that it takes from its caller. All
# others among `litellm.openai_compatible_providers` go through the OpenAI SDK.
_THROUGH_A_HANDLER = frozenset(
    {
        *("anthropic", "azure_ai", "bedrock", "cometapi", "compactifai", "databricks", "datarobot"),
        *("deepseek", "fireworks_ai", "gemini", "groq", "heroku", "hosted_vllm", "huggingface"),
        *("lemonade", "minimax", "mistral", "nadir", "ollama", "ollama_chat", "openrouter"),
        *("ovhcloud", "snowflake", "together_ai", "vertex_ai", "watsonx", "xai"),
    }
)
_THROUGH_OPENAIS_SDK = frozenset({"openai", "custom_openai", "text-completion-openai"})
_SIGN_IN_OTHERWISE = frozenset({"github_copilot", "chatgpt"})  # with tokens that LiteLLM fetches
_OWN_ADDRESS = frozenset({"openai", "custom_openai"})  # the SDK itself knows where they are
_AZURES_OTHER_SDK = frozenset({"v1", "latest", "preview"})  # API versions for which it is OpenAI's

# What a caller has made, and how some sign in at Azure without a key: LiteLLM goes by that.
_USERS_OWN = ("client", "shared_session", "azure_ad_token", "azure_ad_token_provider")

# What is the configuration's, of all that a call has in common with the others of its client.
OF_THE_CLIENT = ("timeout", "headers")
LITELLMS_TIMEOUT = 600.0  # seconds

_SETTINGS = (
    *("ssl_verify", "ssl_certificate", "ssl_security_level", "ssl_ecdh_curve", "force_ipv4"),
    *("disable_aiohttp_transport", "aiohttp_trust_env"),
)
_VARIABLES = (
    *("SSL_VERIFY", "SSL_CERT_FILE", "SSL_CERTIFICATE", "SSL_SECURITY_LEVEL", "SSL_ECDH_CURVE"),
    *("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "LITELLM_HTTP2"),
    *("http_proxy", "https_proxy", "all_proxy", "no_proxy"),
    *("DISABLE_AIOHTTP_TRANSPORT", "AIOHTTP_TRUST_ENV"),
)


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
        ssl_verify: Whether certificates are checked, or the file that they are checked against.
    """

    api_key: str | None
    api_base: str | None
    api_version: str | None
    organization: str | None
    project: str | None
    timeout: float | httpx.Timeout | None
    headers: Mapping[str, str] | None
    ssl_verify: bool | str | None


class Way(NamedTuple):
    """How LiteLLM sends one kind of call to one provider; `kind` is None if it takes no client."""

    provider: str
    kind: Kind | None


@functools.lru_cache(512)
def way_of(model: str, model_type: str, named: str | None) -> Way:
    """Return how LiteLLM sends calls of `model_type` to `model`; `named` is a provider that is given.

    Needs LiteLLM to be loaded.
    """
    litellm = load_litellm()
    try:
        provider: str = litellm.get_llm_provider(model, custom_llm_provider=named)[1]
    except Exception:  # noqa: BLE001  # LiteLLM says so itself when it is called
        return Way("", None)
    if model_type == "text":  # DSPy has all of them go through the SDK
        return Way(provider, "openai")
    name = model.removeprefix(f"{provider}/")
    speaks_responses = model_type == "responses" and _has_responses(provider, name)
    is_bridged = litellm.model_cost.get(name, {}).get("mode") == "responses"
    if speaks_responses or (is_bridged and kind_of(provider) is not None):
        return Way(provider, "handler")
    return Way(provider, kind_of(provider))


def kind_of(provider: str) -> Kind | None:
    """Return what LiteLLM takes for chats with `provider`, or None if it takes nothing."""
    from litellm.llms.openai_like.json_loader import (  # noqa: PLC0415  # LiteLLM comes late
        JSONProviderRegistry,
    )

    if provider in ("azure", "azure_text"):
        return "azure"
    if provider in _THROUGH_A_HANDLER:
        return "handler"
    if provider in _SIGN_IN_OTHERWISE:
        return None
    compatible = load_litellm().openai_compatible_providers
    is_openais = provider in _THROUGH_OPENAIS_SDK or provider in compatible
    return "openai" if is_openais or JSONProviderRegistry.exists(provider) else None


def _has_responses(provider: str, model: str) -> bool:
    from litellm.types.utils import LlmProviders  # noqa: PLC0415  # likewise
    from litellm.utils import ProviderConfigManager  # noqa: PLC0415  # likewise

    try:
        found = ProviderConfigManager.get_provider_responses_api_config(
            provider=LlmProviders(provider), model=model
        )
    except ValueError:
        return False
    return found is not None


def resolve(provider: str, given: Mapping[str, Any]) -> tuple[str, Kind, dict[str, Any]]:
    """Return provider, kind of client and the whole configuration, without what is not set.

    Raises:
        TypeError: If `given` has an unknown name.
        ValueError: If the provider is unknown, or lacks its key or address, or does not know a
            setting, or LiteLLM takes no client for it.
    """
    litellm = load_litellm()
    for name in given:
        if name not in Configuration.__annotations__:
            known = ", ".join(Configuration.__annotations__)
            raise TypeError(f"client() takes no {name!r}; it takes {known}")
    settings = {name: value for name, value in given.items() if value is not None}
    if provider not in litellm.provider_list and provider not in _THROUGH_OPENAIS_SDK:
        raise ValueError(f"provider must be one that LiteLLM knows; got {provider!r}")
    provider = provider_name(provider)
    kind = kind_of(provider)
    if kind is None:
        raise ValueError(f"LiteLLM takes no client for {provider!r}; it keeps its own")
    settings |= find_credentials(provider, settings)
    _check(provider, "openai" if speaks_openai(provider) else kind, settings)
    return provider, kind, settings


def speaks_openai(provider: str) -> bool:
    """Whether the OpenAI SDK can talk to `provider`."""
    compatible = load_litellm().openai_compatible_providers
    return provider in _THROUGH_OPENAIS_SDK | {"openrouter", "mistral"} or provider in compatible


def sdk_over(handler: Any, settings: Mapping[str, Any], *, is_async: bool) -> Any:
    """Return a client of the OpenAI SDK that sends through the same connections as `handler`."""
    return _make_openais(settings, is_async, http=closing.http_client_of(handler))


def find_credentials(provider: str, given: Mapping[str, Any]) -> dict[str, str]:
    """Return key, address and API version as LiteLLM would find them for a call with `given`."""
    litellm = load_litellm()
    key, base, version = (given.get(name) for name in ("api_key", "api_base", "api_version"))
    variable = os.environ.get
    if provider in _THROUGH_OPENAIS_SDK:
        key = key or litellm.api_key or litellm.openai_key or variable("OPENAI_API_KEY")
        base = base or litellm.api_base
        base = base or variable("OPENAI_BASE_URL") or variable("OPENAI_API_BASE")
    elif provider == "azure":
        key = key or litellm.api_key or litellm.azure_key
        key = key or variable("AZURE_OPENAI_API_KEY") or variable("AZURE_API_KEY")
        base = base or litellm.api_base or variable("AZURE_API_BASE")
        version = version or litellm.api_version or variable("AZURE_API_VERSION")
    else:
        found = litellm.get_llm_provider(f"{provider}/any", api_base=base, api_key=key)
        key = found[2] or key or variable(f"{provider.upper()}_API_KEY")
        base = found[3] or base or variable(f"{provider.upper()}_API_BASE")
    named = {"api_key": key, "api_base": base, "api_version": version}
    return {name: value for name, value in named.items() if value}


def brings_own(keywords: Mapping[str, Any]) -> bool:
    """Whether a call with `keywords` brings what it is to be sent through, or a token of Azure's."""
    return any(keywords.get(name) is not None for name in _USERS_OWN)


def is_explicit(way: Way, keywords: Mapping[str, Any]) -> bool:
    """Whether nothing around a call with `keywords` changes the client that it takes.

    A handler holds neither key nor address: LiteLLM passes them with each request.
    """
    if way.kind == "handler":
        return True
    named = keywords.get("api_key") and (keywords.get("api_base") or keywords.get("base_url"))
    return bool(named) and not os.environ.get("OPENAI_ORGANIZATION")


def settings_of_call(
    way: Way,
    model: str,
    model_type: str,
    keywords: Mapping[str, Any],
    own: Mapping[str, Any],
) -> dict[str, Any] | None:
    """Return the configuration of the client for a call, or None if LiteLLM is to use its own.

    Args:
        way: How LiteLLM sends the call.
        model: As DSPy has it.
        model_type: Likewise.
        keywords: All of the call's, the client's own included.
        own: The client's own.
    """
    kind, provider = way.kind, way.provider
    given = {name: keywords.get(name) for name in ("api_key", "api_base", "api_version")}
    if model_type == "text":  # as DSPy looks for them, under names that it does not capitalise
        named = model.partition("/")[0] if "/" in model else "openai"
        given["api_key"] = given["api_key"] or os.environ.get(f"{named}_API_KEY")
        given["api_base"] = given["api_base"] or os.environ.get(f"{named}_API_BASE")
        provider = "openai"
    else:
        given["api_base"] = keywords.get("base_url") or given["api_base"]
    if given["api_key"] is None and litellm_so_far().get("secret_manager_client") is not None:
        return None
    settings: dict[str, Any] = find_credentials(provider, given)
    if kind == "azure":
        settings.setdefault("api_version", load_litellm().AZURE_DEFAULT_API_VERSION)
    else:
        settings.pop("api_version", None)
    if kind == "openai":
        organization = keywords.get("organization") or litellm_so_far().get("organization")
        if organization := organization or os.environ.get("OPENAI_ORGANIZATION"):
            settings["organization"] = organization
    settings |= {name: own[name] for name in OF_THE_CLIENT if own.get(name) is not None}
    if keywords.get("ssl_verify") is not None:
        settings["ssl_verify"] = keywords["ssl_verify"]
    try:
        _check(provider, kind, settings)
    except ValueError:  # LiteLLM says so, in its own words, or has another way
        return None
    return settings


def _check(provider: str, kind: Kind | None, settings: Mapping[str, Any]) -> None:
    if kind == "handler":
        unknown = {"api_version", "organization", "project"} & settings.keys()
        if unknown:
            raise ValueError(f"{min(unknown)} means nothing to {provider!r}")
        return
    if "api_key" not in settings:
        raise ValueError(f"api_key is missing for {provider!r}, and not in the environment either")
    if "api_base" not in settings and provider not in _OWN_ADDRESS:
        raise ValueError(f"api_base is missing for {provider!r}")
    if ("api_version" in settings) != (kind == "azure"):
        raise ValueError("api_version belongs to azure, and azure needs it")
    if settings.get("api_version") in _AZURES_OTHER_SDK:
        raise ValueError(
            "api_version must be a date; for v1, latest and preview LiteLLM keeps its own"
        )


def surroundings() -> tuple[Any, ...]:
    """Return what else a client is made by: LiteLLM's TLS settings and the environment's, proxies.

    The user's sessions count by identity.
    """
    litellm = litellm_so_far()
    named = (litellm.get(name) for name in _SETTINGS)
    return (
        *(each if isinstance(each, (str, int, type(None))) else id(each) for each in named),
        *map(id, sessions()),
        *map(os.environ.get, _VARIABLES),
    )


def sessions() -> tuple[Any, Any]:
    """Return what the user has told LiteLLM to send everything through, sync and async, or None."""
    litellm = litellm_so_far()
    return litellm.get("client_session"), litellm.get("aclient_session")


def is_session(http: Any) -> bool:
    """Whether `http` is one of the user's own."""
    return http is not None and any(http is each for each in sessions())


def make(kind: Kind, settings: Mapping[str, Any], *, is_async: bool) -> Any:
    """Return a new client for what `resolve` has returned."""
    made = _KINDS[kind](settings, is_async)
    http = closing.http_client_of(made)
    if http is not None and not is_session(http):
        closing.spare_idle_connections(http)
        tell_endings(http)
    return made


def _make_handler(settings: Mapping[str, Any], is_async: bool) -> Any:
    from litellm.llms.custom_httpx import http_handler  # noqa: PLC0415  # likewise

    kind = _shared(http_handler.AsyncHTTPHandler if is_async else http_handler.HTTPHandler)
    made = kind(timeout=settings.get("timeout"), ssl_verify=settings.get("ssl_verify"))
    http = made.client
    http.headers.update(settings.get("headers", {}))
    made.client = http  # from here on it is ours to close, and LiteLLM puts no other in its place
    return made


def _make_openais(settings: Mapping[str, Any], is_async: bool, http: Any = None) -> Any:
    import openai  # noqa: PLC0415  # likewise

    kind = _shared(openai.AsyncOpenAI if is_async else openai.OpenAI)
    return kind(base_url=settings.get("api_base"), **_common(settings, is_async, http))


def _make_azures(settings: Mapping[str, Any], is_async: bool) -> Any:
    import openai  # noqa: PLC0415  # likewise

    kind = _shared(openai.AsyncAzureOpenAI if is_async else openai.AzureOpenAI)
    version = settings["api_version"]
    common = _common(settings, is_async, None)
    return kind(azure_endpoint=settings["api_base"], api_version=version, **common)


def _common(settings: Mapping[str, Any], is_async: bool, http: Any) -> dict[str, Any]:
    from litellm.llms.openai.common_utils import BaseOpenAILLM  # noqa: PLC0415  # likewise

    find = BaseOpenAILLM._get_async_http_client if is_async else BaseOpenAILLM._get_sync_http_client  # noqa: SLF001  # the way LiteLLM has it
    common = {
        "http_client": find() if http is None else http,
        "max_retries": 0,
        "api_key": settings["api_key"],
    }
    timeout = settings.get("timeout", LITELLMS_TIMEOUT)
    common["timeout"] = in_seconds(timeout)
    for name in ("organization", "project"):
        if name in settings:
            common[name] = settings[name]
    if headers := settings.get("headers"):
        common["default_headers"] = dict(headers)
    return common


def in_seconds(timeout: Any) -> Any:
    """Return a number of seconds as LiteLLM writes it into a header: 9 as 9.0."""
    return float(timeout) if isinstance(timeout, int) else timeout


_KINDS = {"openai": _make_openais, "azure": _make_azures, "handler": _make_handler}


@functools.cache
def _shared(base: Any) -> Any:
    """Return a kind of client that stays one when DSPy copies a call's keywords."""

    class Shared(base):
        __doc__ = base.__doc__

        def __copy__(self) -> Any:
            return self

        def __deepcopy__(self, memo: dict[int, Any]) -> Any:
            return self

        if hasattr(base, "post") and hasattr(base, "create_client"):  # LiteLLM's handlers

            def post(self, *args: Any, timeout: Any = None, **kwargs: Any) -> Any:
                """Send under the client's timeout where LiteLLM names none."""
                timeout = self.timeout if timeout is None else timeout
                return super().post(*args, timeout=timeout, **kwargs)

    Shared.__name__ = Shared.__qualname__ = f"Pooled{base.__name__}"
    return Shared
