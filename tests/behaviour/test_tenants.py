"""An answer belongs to whoever asked for it, and to the place it came from."""

from __future__ import annotations

import asyncio
import contextlib

import litellm
import pytest

from dspy_resilient import CachePolicy, ResilientLM
from dspy_resilient.testing import Provider

WHO = ("authorization", "x-api-key", "api-key", "cookie", "x-goog-api-key", "openai-organization")


@pytest.fixture
def places():
    """Two providers, each of which answers with its name."""
    with Provider("first") as first, Provider("second") as second:
        yield first, second


def sent(provider):
    """What the last request said about who sent it."""
    headers = provider.requests[-1].headers
    return {name: headers[name] for name in WHO if name in headers}


@pytest.fixture
def ambient(monkeypatch):
    """Set the environment, or LiteLLM's module, for the length of a block."""

    @contextlib.contextmanager
    def around(settings):
        with monkeypatch.context() as patch:
            for name, value in settings.items():
                if name.startswith("litellm."):
                    patch.setattr(litellm, name.removeprefix("litellm."), value)
                else:
                    patch.setenv(name, value)
            yield

    return around


def fetch_a():
    return "token-a"


def fetch_b():
    return "token-b"


# Who asks, in two ways: the model, then settings and surroundings of A and of B.
TENANTS = {
    "api_key": ("openai/m", {"api_key": "a"}, {"api_key": "b"}),
    "a header": (
        "openai/m",
        {"api_key": "k", "extra_headers": {"X-Api-Key": "a"}},
        {"api_key": "k", "extra_headers": {"X-Api-Key": "b"}},
    ),
    "headers=": (
        "openai/m",
        {"api_key": "k", "headers": {"Authorization": "Bearer a"}},
        {"api_key": "k", "headers": {"Authorization": "Bearer b"}},
    ),
    "a cookie": (
        "openai/m",
        {"api_key": "k", "extra_headers": {"Cookie": "session=a"}},
        {"api_key": "k", "extra_headers": {"Cookie": "session=b"}},
    ),
    "a function": (
        "azure/m",
        {"azure_ad_token_provider": fetch_a, "api_version": "2024-02-01"},
        {"azure_ad_token_provider": fetch_b, "api_version": "2024-02-01"},
    ),
    "environment": ("openai/m", {"OPENAI_API_KEY": "a"}, {"OPENAI_API_KEY": "b"}),
    "module": ("openai/m", {"litellm.api_key": "a"}, {"litellm.api_key": "b"}),
    "module's own": ("openai/m", {"litellm.openai_key": "a"}, {"litellm.openai_key": "b"}),
    "no prefix": ("gpt-4o-mini", {"OPENAI_API_KEY": "a"}, {"OPENAI_API_KEY": "b"}),
    "anthropic": ("anthropic/claude-x", {"ANTHROPIC_API_KEY": "a"}, {"ANTHROPIC_API_KEY": "b"}),
    "groq": ("groq/m", {"GROQ_API_KEY": "a"}, {"GROQ_API_KEY": "b"}),
    "together": ("together_ai/m", {"TOGETHERAI_API_KEY": "a"}, {"TOGETHERAI_API_KEY": "b"}),
    "mistral": ("mistral/m", {"MISTRAL_API_KEY": "a"}, {"MISTRAL_API_KEY": "b"}),
    "borrowed": ("hosted_vllm/m", {"HOSTED_VLLM_API_KEY": "a"}, {"HOSTED_VLLM_API_KEY": "b"}),
    "organization": (
        "openai/m",
        {"api_key": "k", "organization": "org-a"},
        {"api_key": "k", "organization": "org-b"},
    ),
    "ad token": (
        "azure/m",
        {"azure_ad_token": "a", "api_version": "2024-02-01"},
        {"azure_ad_token": "b", "api_version": "2024-02-01"},
    ),
}


def split(settings):
    """Tell a call's own settings from what is around it."""
    around = {n: v for n, v in settings.items() if n.startswith("litellm.") or n.isupper()}
    return {n: v for n, v in settings.items() if n not in around}, around


@pytest.mark.parametrize("keep", ["memory", "disk", "async"])
@pytest.mark.parametrize(("model", "a", "b"), TENANTS.values(), ids=TENANTS)
def test_no_tenant_is_given_anothers_answer(places, ambient, tmp_path, model, a, b, keep):
    """B's request reaches the provider, with B's credentials, though A has asked the same; once each."""
    first, _ = places
    first.answer = "an answer"
    disk = str(tmp_path) if keep == "disk" else None

    def client():
        return ResilientLM(model, api_base=first.api_base, cache=CachePolicy(disk=disk))

    lm, seen = client(), []
    for settings in (a, b, a, b):
        own, around = split(settings)
        with ambient(around):
            lm = client() if keep == "disk" else lm
            call = lm.acall("?", **own) if keep == "async" else None
            assert (lm("?", **own) if call is None else asyncio.run(call)) == ["an answer"]
        seen.append((len(first.requests), sent(first)))
    assert [count for count, _ in seen] == [1, 2, 2, 2]
    assert seen[0][1] != seen[1][1]


PLACES = {
    "api_base": ("openai/m", "api_base"),
    "base_url": ("openai/m", "base_url"),
    "environment": ("openai/m", "OPENAI_API_BASE"),
    "another variable": ("openai/m", "OPENAI_BASE_URL"),
    "module": ("openai/m", "litellm.api_base"),
    "no prefix": ("gpt-4o-mini", "OPENAI_API_BASE"),
    "no prefix, module": ("gpt-4o-mini", "litellm.api_base"),
    "groq": ("groq/m", "GROQ_API_BASE"),
    "ollama": ("ollama_chat/m", "OLLAMA_API_BASE"),
    "deepseek": ("deepseek/m", "DEEPSEEK_API_BASE"),
    "vllm": ("hosted_vllm/m", "HOSTED_VLLM_API_BASE"),
}


@pytest.mark.parametrize(("model", "name"), PLACES.values(), ids=PLACES)
def test_no_place_is_answered_for_by_another(places, ambient, model, name):
    """What one provider has answered is nothing that another one has said; and each has a circuit."""
    lm = ResilientLM(model, cache=CachePolicy(disk=None))
    extra = {"DEEPSEEK_API_KEY": "k", "HOSTED_VLLM_API_KEY": "k"}
    answers = []
    for provider in (*places, *places):
        base = provider.url if model.startswith("ollama") else provider.api_base
        own, around = split({name: base})
        with ambient(around | extra):
            answers += lm("?", **own)
    assert answers == ["first", "second", "first", "second"]
    asked = [[r for r in each.requests if not r.path.endswith("/show")] for each in places]
    assert list(map(len, asked)) == [1, 1]
    with_address = [label for label in lm.circuits if "127.0.0.1" in label]
    assert len(with_address) == 2
