"""Whom a call asks, where, and in whose name: what LiteLLM makes of its settings.

LiteLLM takes an address or a key from the call, from its own module (`litellm.api_key`), or from
the environment, each provider in its own way. `resolve` reads the same places. It takes in what may
count and not only what does, so that two tenants never pass for one; LiteLLM need not be
imported for it, and is not. What is resolved is remembered while nothing has changed.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import uuid
from collections.abc import Callable, Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import orjson

from dspy_resilient._support.canonical import encode, stand_in
from dspy_resilient._support.redact import is_secret, redact
from dspy_resilient.providers.environment import (
    ALSO_CALLED,
    SCOPES,
    WHERE,
    Pairs,
    Surroundings,
    look_around,
    module_names,
    words_of,
)
from dspy_resilient.providers.litellm_module import litellm_so_far


class Endpoint(NamedTuple):
    """A place where a model is asked; what fails there says nothing about another.

    Attributes:
        model: The model, as DSPy is told.
        kind: "chat", "text" or "responses".
        url: Its address, or "" for the provider's own.
        scope: What else separates two places: region, project, organization, deployment, version.
    """

    model: str
    kind: str
    url: str = ""
    scope: Pairs = ()

    @property
    def label(self) -> str:
        """Model, address and scope for people, without what may be secret in an address."""
        label = f"{self.model} at {redact(self.url)}" if self.url else self.model
        return (
            f"{label} ({', '.join(str(value) for _, value in self.scope)})" if self.scope else label
        )


class Place(NamedTuple):
    """Whom a call asks, where, and in whose name.

    Attributes:
        provider: LiteLLM's name for the provider, or "" where only LiteLLM could tell.
        endpoint: Where.
        where: What stands for address and scope in cache keys; "" for the provider's own.
        credential: What stands for all that says who asks; "" without any, None if that cannot
            be told.
    """

    provider: str
    endpoint: Endpoint
    where: str
    credential: str | None


Role = Literal["credential", "url", "scope", "holder"]
"""What a setting says about a connection."""

# Settings that hold others, of which a credential may be one.
HOLDERS = frozenset(
    {"headers", "extra_headers", "default_headers", "extra_query", "default_query", "extra_body"}
)
_URLS = ("base_url", "api_base")  # the former wins
_SCOPE_NAMES = frozenset({"api_version", "api_type", "custom_llm_provider", "openai_organization"})
_PREFIXES = ("aws_", "azure_", "databricks_", "oci_", "sagemaker_", "vertex_", "watsonx_", "gcp_")
_CREDENTIAL_NAMES = frozenset({"client_id", "tenant_id", "litellm_credential_name", "zen_api_key"})


# Who listens to `litellm.api_base` before the call's own address.
_MODULE_FIRST = frozenset({"custom", "ollama", "ollama_chat", "petals", "triton"})


def resolve(model: str, kind: str, settings: Mapping[str, Any], tenant: str | None = None) -> Place:
    """Return whom a call with `settings` asks, where, and in whose name; on any thread.

    Args:
        model: The model, as DSPy is told.
        kind: "chat", "text" or "responses".
        settings: Those of client and call, merged as DSPy merges them.
        tenant: What stands for the credentials in their place, if the user has named them.
    """
    module = litellm_so_far()
    known = _known
    if known.variables != _VARIABLES or len(module) != known.size:
        known = _forget(module)
    telling = _telling(tuple(settings))
    given = (telling, *map(settings.get, telling))
    try:
        names, places = known.found[model, kind, tenant, given]
        return places[tuple(map(module.get, names))]
    except (KeyError, TypeError):  # new, or with a value that has parts, as headers have
        return _resolve(model, kind, tenant, settings, given)


def _resolve(
    model: str, kind: str, tenant: str | None, settings: Mapping[str, Any], given: tuple[Any, ...]
) -> Place:
    """Do so without what is remembered, and remember it, if it can be."""
    said = [
        (role, name, _hashable(value))
        for name, value in settings.items()
        if value is not None and (role := _ROLES[name]) not in (None, "holder")
    ]
    for name in HOLDERS & settings.keys():
        said += _held(name, settings[name])
    has_url = bool(settings.get("api_base") or settings.get("base_url"))
    provider = _provider(model, settings.get("custom_llm_provider"), has_url=has_url)
    known, module = _known, litellm_so_far()
    names = module_names(provider, len(module))
    place = _place(model, kind, tenant, provider, _surroundings(known, provider), tuple(said))
    if len(known.found) > 512:  # noqa: PLR2004  # keys that change with each call
        known.found.clear()
    with contextlib.suppress(TypeError):
        _, places = known.found.setdefault((model, kind, tenant, given), (names, {}))
        places[tuple(map(module.get, names))] = place
    return place


class _Known(NamedTuple):
    """What has been resolved while the environment was as it is, and LiteLLM's module as large."""

    variables: Mapping[Any, Any]
    size: int
    found: dict[tuple[Any, ...], tuple[tuple[str, ...], dict[tuple[Any, ...], Place]]]
    around: dict[tuple[Any, ...], Surroundings]


_known = _Known({}, 0, {}, {})


_VARIABLES: Mapping[Any, Any] = getattr(os.environ, "_data", os.environ)  # compares 20 times faster


def _forget(module: Mapping[str, Any]) -> _Known:
    global _known  # noqa: PLW0603  # replaced as a whole, so that it needs no lock
    known = _known = _Known(dict(_VARIABLES), len(module), {}, {})
    return known


class _Roles(dict[str, Role | None]):
    def __missing__(self, name: str) -> Role | None:
        if len(self) > 4096:  # noqa: PLR2004  # names that a caller makes up
            self.clear()
        role = self[name] = _role(name)
        return role


def _role(name: str) -> Role | None:
    if name in _URLS:
        return "url"
    if name in HOLDERS:
        return "holder"
    words = words_of(name)
    is_scope = not SCOPES.isdisjoint(words) or words[-1:] == ["endpoint"]
    if name.lower() in _SCOPE_NAMES or (is_scope and not is_secret(name)):
        return "scope"
    if is_secret(name) or name in _CREDENTIAL_NAMES or name.startswith(_PREFIXES):
        return "credential"
    return None


_ROLES = _Roles()
role_of: Callable[[str], Role | None] = _ROLES.__getitem__
"""Return what a setting, or a header, of this name says about the connection, or None."""


@functools.lru_cache(maxsize=1024)
def _telling(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return those of the settings that say anything about the connection."""
    return tuple(name for name in names if _ROLES[name] is not None)


def _hashable(value: Any) -> Hashable:
    """Return what compares as `value` does: a function, or an object, that fetches tokens by itself."""
    if isinstance(value, (str, int, float, bytes)) or callable(value):
        own: Hashable = value
        return own
    try:
        return encode([value])
    except TypeError:
        return value if isinstance(value, Hashable) else None


def _held(holder: str, held: Any) -> Iterator[tuple[Role, str, Any]]:
    """Yield what headers, and the like, say about the connection."""
    for name, value in held.items() if isinstance(held, Mapping) else ():
        role = _ROLES[str(name)]
        if role in ("credential", "scope"):
            yield role, f"{holder}.{str(name).lower()}", _hashable(value)


def _surroundings(known: _Known, provider: str) -> Surroundings:
    """Return what is around `provider`, from `known` while that is as it was."""
    module = litellm_so_far()
    names = module_names(provider, len(module))
    key = (provider, *(repr(value) if (value := module.get(name)) else "" for name in names))
    around = known.around.get(key)
    if around is None:
        around = known.around[key] = look_around(provider, module)
    return around


@functools.lru_cache(maxsize=512)
def _place(
    model: str,
    kind: str,
    tenant: str | None,
    provider: str,
    around: Surroundings,
    given: tuple[tuple[Role, str, Any], ...],
) -> Place:
    """Put together what was given and what is around; the call's own comes first."""
    own: dict[str, dict[str, Any]] = {role: {} for role in get_args(Role)}
    for role, name, value in given:
        own[role][name] = value
    urls, scope, who = own["url"], own["scope"], own["credential"]
    module_url = around.module_url if provider in _MODULE_FIRST else ""
    url = module_url or next((urls[name] for name in _URLS if urls.get(name)), around.url)
    meant = {_meaning(name) for name in scope}
    scope |= {name: value for name, value in around.scope if _meaning(name) not in meant}
    endpoint = Endpoint(model, kind, str(url).rstrip("/"), tuple(sorted(scope.items())))
    if not (provider and who.get("api_key")):  # which LiteLLM prefers to what is around
        who = {**dict(around.credentials), **who}
    where = stand_in(encode([endpoint.url, endpoint.scope])) if endpoint.url or scope else ""
    credential = tenant if tenant is not None else _credential(who)
    return Place(provider, endpoint, where, credential)


def _credential(who: Mapping[str, Any]) -> str | None:
    names = [[name, _lasting(value)] for name, value in sorted(who.items()) if value != ""]
    if any(value is None for _, value in names):
        return None
    return stand_in(encode(names)) if names else ""


def _meaning(name: str) -> str:
    word = next((word for word in reversed(words_of(name)) if word in WHERE), name)
    return "org" if word == "organization" else word


def _lasting(value: Any) -> Any:
    is_plain = value is None or isinstance(value, (str, int, float, bytes))
    return value if is_plain else ["object", _number(value)]


@functools.lru_cache(maxsize=1024)
def _number(fetcher: Hashable) -> str:  # noqa: ARG001  # it is what is remembered
    """Return the name by which this process knows a function, or an object, that fetches tokens.

    What it fetches does not count, for it changes; whose it is, another process cannot know.
    """
    return uuid.uuid4().hex


@functools.lru_cache(maxsize=512)
def _provider(model: str, given: Any, *, has_url: bool) -> str:
    """Return LiteLLM's name for who serves `model`, or "" where that depends on more."""
    prefix, slash, _ = model.partition("/")
    if given or (slash and prefix in _providers()):
        return str(given or prefix)
    return "" if has_url else _of_bare_names().get(model, "")


@functools.lru_cache(maxsize=1)
def _of_bare_names() -> dict[str, str]:
    """Return who serves the models that LiteLLM knows without a prefix, from the table it ships."""
    prices = _shipped("model_prices_and_context_window_backup.json")
    serving = {
        model: facts.get("litellm_provider") for model, facts in prices.items() if "/" not in model
    }
    return {
        model: "vertex_ai" if provider.startswith("vertex_ai-") else provider
        for model, provider in serving.items()
        if isinstance(provider, str)
    }


@functools.lru_cache(maxsize=1)
def _providers() -> frozenset[str]:
    """Return the providers that LiteLLM knows, from the tables it ships."""
    listed = _shipped("provider_endpoints_support_backup.json").get("providers", {})
    speaking_openais = _shipped("llms/openai_like/providers.json")
    return frozenset({*listed, *speaking_openais, *ALSO_CALLED, *_of_bare_names().values()})


def _shipped(name: str) -> dict[str, Any]:
    """Return a table of LiteLLM's package, without importing it; empty if it has none."""
    found = importlib.util.find_spec("litellm")
    try:
        origin = found.origin if found is not None else None
        table = orjson.loads(Path(origin or "").with_name(name).read_bytes())
    except (OSError, ValueError):  # another LiteLLM
        return {}
    return table if isinstance(table, dict) else {}
