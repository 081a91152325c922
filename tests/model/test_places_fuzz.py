"""Two calls share a key exactly if they ask in the same name, at the same place."""

from __future__ import annotations

import os
from unittest import mock

import dspy
import litellm
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dspy_resilient.providers.endpoint import resolve
from dspy_resilient.targets.request_key import key_of
from dspy_resilient.testing import Provider

WHO = ("authorization", "x-api-key", "cookie", "openai-organization")
keys = st.none() | st.sampled_from(["a", "b"])
sites = st.none() | st.integers(0, 1)
VALUES = {
    "api_key": keys,
    "api_base": sites,
    "base_url": sites,
    "organization": keys,
    "X-Api-Key": keys,
    "Cookie": keys,
    "OPENAI_API_KEY": keys,
    "OPENAI_API_BASE": sites,
    "OPENAI_BASE_URL": sites,
    "OPENAI_ORGANIZATION": keys,
    "litellm.api_key": keys,
    "litellm.openai_key": keys,
    "litellm.api_base": sites,
    "litellm.organization": keys,
    "ANTHROPIC_API_KEY": keys,  # which is nothing to OpenAI
}
asked = st.fixed_dictionaries(VALUES)


@st.composite
def pairs(draw):
    """Two calls that differ in a few things, if at all."""
    one = draw(asked)
    changed = draw(st.lists(st.sampled_from(sorted(VALUES)), max_size=2))
    return one, one | {name: draw(VALUES[name]) for name in changed}


NOTHING = dict.fromkeys(("api_key", "api_base", "openai_key", "organization"))
_URLS = ("api_base", "base_url")
MODELS = ("openai/m", "gpt-4o-mini")


def put(model, choices, urls):
    """Return a call's own settings, and set what is around it, until the end of the block."""
    given = {name: value for name, value in choices.items() if value is not None}
    for name in ("api_base", "base_url", "OPENAI_API_BASE", "OPENAI_BASE_URL", "litellm.api_base"):
        if name in given:
            given[name] = urls[given[name]]
    headers = {name: given.pop(name) for name in ("X-Api-Key", "Cookie") if name in given}
    own = {
        name: given.pop(name)
        for name in ("api_key", "api_base", "base_url", "organization")
        if name in given
    }
    if headers:
        own["extra_headers"] = headers
    variables = {name: value for name, value in given.items() if name.isupper()}
    module = {n.removeprefix("litellm."): v for n, v in given.items() if "." in n}
    return own, variables, module


def look(model, choices, servers):
    """Return the key of a call, and what the wire shows: who was asked, and of whom the request told."""
    own, variables, module = put(model, choices, [each.api_base for each in servers])
    clean = {n: v for n, v in os.environ.items() if not n.startswith("OPENAI_")}
    variables = {"OPENAI_API_KEY": "c", "OPENAI_API_BASE": servers[0].api_base} | variables
    with (
        mock.patch.dict(os.environ, clean | variables, clear=True),
        mock.patch.multiple(litellm, **NOTHING | module),
    ):
        key = key_of(resolve(model, "chat", own), "__call__", ("?",), own)
        before = [len(each.requests) for each in servers]
        dspy.LM(model, engine="litellm", cache=False, num_retries=0)("?", **own)
    counts = [len(each.requests) for each in servers]
    asked_one = next(i for i, each in enumerate(servers) if counts[i] > before[i])
    headers = servers[asked_one].requests[-1].headers
    return key, (asked_one, {name: headers[name] for name in WHO if name in headers})


@pytest.mark.parametrize("name", VALUES)
def test_each_of_them_alone_makes_a_difference_exactly_if_it_does_on_the_wire(name):
    """Given in two ways, with nothing else that would come before it."""
    values = (0, 1) if VALUES[name] is sites else ("a", "b")
    with Provider("first") as first, Provider("second") as second:
        (key, wire), (other_key, other_wire) = (
            look("openai/m", {name: value}, (first, second)) for value in values
        )
    assert (key == other_key) == (wire == other_wire)
    assert (wire == other_wire) == (name == "ANTHROPIC_API_KEY")


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(MODELS), pairs())
def test_a_key_is_shared_exactly_if_the_wire_is_the_same(model, pair):
    """Read off the wire: which server was asked, and what the request said of its sender."""
    with Provider("first") as first, Provider("second") as second:
        (key, wire), (other_key, other_wire) = (
            look(model, choices, (first, second)) for choices in pair
        )
    if wire != other_wire:
        assert key != other_key
    elif "/" in model or not any(each[name] is not None for each in pair for name in _URLS):
        assert key == other_key  # else who serves the model depends on too much
