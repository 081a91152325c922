"""What LiteLLM finds in the environment, and in its own module, where a call says nothing.

Each provider has variables of its own. What may count is taken in, and not only what does.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

from dspy_resilient.providers.litellm_module import litellm_so_far

Pairs = tuple[tuple[str, Any], ...]

SCOPES = frozenset(
    {"project", "projects", "organization", "org", "region", "location", "deployment", "workspace"}
    | {"space", "zone"}
)
# The same for the environment, by the words of a variable's name.
_WHO = frozenset(
    {"account", "apikey", "arn", "auth", "client", "credentials", "headers", "jwt", "key", "oauth"}
    | {"password", "pat", "profile", "role", "secret", "tenant", "token", "username", "zenapikey"}
)
WHERE = SCOPES | {"base", "endpoint", "host", "type", "url", "version"}
_ADDRESS = ("base", "url", "endpoint", "host")

# Where the variables of a provider begin otherwise than its name does.
ALSO_CALLED = {
    "aleph_alpha": ("ALEPHALPHA",),
    "apertis": ("STIMA",),
    "azure_text": ("AZURE",),
    "bedrock": ("AWS",),
    "bedrock_converse": ("AWS", "BEDROCK"),
    "black_forest_labs": ("BFL",),
    "cohere": ("CO",),
    "cohere_chat": ("CO",),
    "custom_openai": ("OPENAI",),
    "gemini": ("GOOGLE", "PALM"),
    "huggingface": ("HF",),
    "meta_llama": ("LLAMA", "META"),
    "nvidia_riva": ("NVIDIA",),
    "ollama_chat": ("OLLAMA",),
    "openai_like": ("OPENAI",),
    "openrouter": ("OR",),
    "sagemaker": ("AWS",),
    "sagemaker_chat": ("AWS",),
    "sagemaker_nova": ("AWS",),
    "scaleway": ("SCW",),
    "text-completion-openai": ("OPENAI",),
    "vertex_ai": ("VERTEX", "GOOGLE", "GCE"),
    "vertex_ai_beta": ("VERTEX", "GOOGLE", "GCE"),
    "volcengine": ("ARK",),
    "watsonx": ("WX", "WML", "PROJECTID", "REGION", "SPACEID"),
    "watsonx_text": ("WATSONX", "WX", "WML", "PROJECTID", "REGION", "SPACEID"),
}
_LENDER = "openai"  # whose key LiteLLM takes for others who speak its language
_PROXY = "USE_LITELLM_PROXY"  # sends everything to one address

# In the order of precedence, where there is more than one and it is worth telling them apart.
_OPENAI = (
    ("api_key", ("litellm.api_key", "litellm.openai_key", "OPENAI_API_KEY")),
    ("api_base", ("litellm.api_base", "OPENAI_BASE_URL", "OPENAI_API_BASE")),
    ("organization", ("litellm.organization", "OPENAI_ORGANIZATION", "OPENAI_ORG_ID")),
    ("project", ("OPENAI_PROJECT", "OPENAI_PROJECT_ID")),
    ("headers", ("litellm.headers",)),
)

_BREAKS = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|[^A-Za-z0-9]+")


def words_of(name: str) -> list[str]:
    """Return the words of a name, in small letters."""
    return [word.lower() for word in _BREAKS.split(name) if word]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Surroundings:
    """What LiteLLM finds where a call says nothing."""

    url: str
    module_url: str
    scope: Pairs
    credentials: Pairs


def look_around(provider: str, module: Mapping[str, Any]) -> Surroundings:
    """Return what the environment and LiteLLM's `module` say to `provider`, or to any if it is ""."""
    proxy = ("litellmproxy",) if os.environ.get(_PROXY) or module.get(_PROXY.lower()) else ()
    found = _variables((*_stems(provider), *proxy))
    for name in module_names(provider, len(module)):
        if value := module.get(name):
            found[f"litellm.{name}"] = value if isinstance(value, str) else repr(value)
    if not any(map(_is_who, found)):
        found |= {name: value for name, value in _variables([_LENDER]).items() if _is_who(name)}
    if provider == "openai" and not proxy:
        found = _first_of_each(found)
    who = {name: value for name, value in found.items() if _is_who(name)}
    urls = [name for name in found if not _is_who(name) and words_of(name)[-1] in _ADDRESS]
    urls.sort(key=lambda name: (name != "litellm.api_base", name))
    scope = {n.lower(): value for n, value in found.items() if n not in who and n not in urls[:1]}
    keys = [name for name in who if words_of(name)[-2:] == ["api", "key"]]
    if len(keys) == 1:  # then it is what a call would name so
        who["api_key"] = who.pop(keys[0])
    return Surroundings(
        found[urls[0]] if urls else "",
        found.get("litellm.api_base", ""),
        tuple(sorted(scope.items())),
        tuple(sorted((name.lower(), value) for name, value in who.items())),
    )


def _first_of_each(found: Mapping[str, str]) -> dict[str, str]:
    order = (
        (meaning, [found[name] for name in names if name in found]) for meaning, names in _OPENAI
    )
    return {meaning: values[0] for meaning, values in order if values}


def _is_who(name: str) -> bool:
    return not _WHO.isdisjoint(words_of(name))


def _variables(stems: Iterable[str]) -> dict[str, str]:
    """Return the environment's variables that begin with one of `stems`, if they tell anything."""
    return {
        name: value
        for name, value in os.environ.items()
        if value
        and not (_WHO | WHERE).isdisjoint(words := words_of(name))
        and any(not stem or stem in itertools.accumulate(words) for stem in stems)
    }


@functools.lru_cache(maxsize=512)
def _stems(provider: str) -> tuple[str, ...]:
    """Return how the variables of a provider may begin, without the underscores."""
    core = provider.lower().removeprefix("text-completion-")
    core = core.removesuffix("_chat").removesuffix("_text")
    letters = "".join(words_of(core))
    short = letters.removesuffix("ai") if core.endswith(("_ai", "-ai")) or len(letters) > 6 else ""  # noqa: PLR2004  # not openai, xai
    stems = (letters, f"{letters}ai", short or letters, *ALSO_CALLED.get(provider, ()))
    return tuple(dict.fromkeys(stem.lower() for stem in stems)) if provider else ("",)


@functools.lru_cache(maxsize=512)
def module_names(provider: str, size: int) -> tuple[str, ...]:  # noqa: ARG001  # it grows
    """Return the names of LiteLLM's module settings that concern `provider`."""
    general = ("headers", "api_key", "api_base", "api_version", "organization", "use_litellm_proxy")
    stems = (*_stems(provider), _LENDER)
    names = (
        name
        for name, value in list(litellm_so_far().items())
        if (value is None or isinstance(value, str)) and name.islower() and name not in general
        if not (_WHO | WHERE).isdisjoint(words := words_of(name))
        if any(stem in itertools.accumulate(words) for stem in stems) or not provider
    )
    return (*general, *names)
