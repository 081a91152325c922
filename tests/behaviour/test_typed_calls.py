"""Typed requests keep the promises: `lm(Request)`, and in DSPy 3.5 all that an adapter asks for."""

from __future__ import annotations

import asyncio

import dspy
import pytest
from dspy.lm15 import Config, Message, Request

from dspy_resilient.testing import Provider, Status, dspy_answers

HAS_GENERATE = hasattr(dspy.LM, "generate")
from_35 = pytest.mark.skipif(not HAS_GENERATE, reason="`generate` comes with DSPy 3.5")


def request(text="q", model="openai/test", **settings):
    return Request(model=model, messages=(Message.user(text),), config=Config(**settings))


@pytest.fixture(params=["sync", "async"])
def generate(request):
    """Call `generate` or `agenerate`."""
    if request.param == "sync":
        return lambda lm, *args, **kwargs: lm.generate(*args, **kwargs)
    return lambda lm, *args, **kwargs: asyncio.run(lm.agenerate(*args, **kwargs))


@pytest.fixture
def second():
    """The provider of the fallbacks."""
    with Provider("Lyon") as running:
        yield running


def sent(provider):
    """What the last request asked for, by the names of the wire."""
    names = ("max_tokens", "temperature", "top_p", "seed", "stop")
    body = dict(provider.requests[-1].body)
    if "max_completion_tokens" in body:  # how a typed request says it
        body["max_tokens"] = body["max_completion_tokens"]
    return {name: body[name] for name in names if body.get(name) is not None}


def wire(provider, model, request, **settings):
    """What plain `dspy.LM` sends of `request`."""
    lm = dspy.LM(
        model, api_base=provider.api_base, api_key="k", engine="litellm", cache=False, **settings
    )
    lm(request)
    found = sent(provider)
    provider.clear()
    return found


# What an adapter cannot parse


@pytest.mark.parametrize("adapter", [dspy.ChatAdapter, dspy.JSONAdapter, dspy.XMLAdapter])
def test_what_an_adapter_cannot_parse_is_asked_again(provider, make, ask, adapter):
    """Plain `dspy.LM` serves it again and again, as it was."""
    question = dspy.Predict("question -> number: int")
    provider.answer = "no number at all"
    lm = make()
    with dspy.context(lm=lm, adapter=adapter()):
        with pytest.raises(dspy.AdapterParseError):
            ask(question, question="q")
        before = provider.count
        with pytest.raises(dspy.AdapterParseError):
            ask(question, question="q")
    assert provider.count == 2 * before
    assert lm.stats().hits == 0


def test_one_bad_completion_of_several_is_enough(provider, make, ask):
    """They are one entry."""
    question = dspy.Predict("question -> number: int", n=2, temperature=1.0)
    provider.answer = "no number at all"
    with dspy.context(lm=make(), adapter=dspy.XMLAdapter()):
        with pytest.raises(dspy.AdapterParseError):
            ask(question, question="q")
        before = provider.count
        with pytest.raises(dspy.AdapterParseError):
            ask(question, question="q")
    assert provider.count == 2 * before


def test_what_can_be_parsed_is_remembered(provider, make, ask):
    """One request, whoever asks again; the hit's outputs are the same."""
    provider.answer = dspy_answers({"q": "7"})
    question = dspy.Predict("question -> number: int")
    with dspy.context(lm=make()):
        assert [ask(question, question="q").number for _ in range(3)] == [7, 7, 7]
    assert provider.count == 1


@from_35
def test_a_loop_of_a_users_own_may_end_early(provider, make, generate):
    """Only what a module has asked for is taken for unreadable when its reader leaves."""
    lm = make()
    for _ in range(2):
        for response in generate(lm, request(), n=2):
            assert response.text == "Paris"
            break
    assert provider.count == 2
    assert lm.stats().hits == 1


@from_35
def test_controls_of_a_generated_call(provider, make, plain, generate):
    """n, cache, rollout_id and client settings are DSPy's own, and keep answers apart."""
    lm, theirs = make(temperature=1.0), plain(temperature=1.0)
    for each in (lm, theirs):
        provider.clear()
        assert [r.text for r in generate(each, request(), n=2)] == ["Paris"] * 2
        assert [r.text for r in generate(each, request(), n=2)] == ["Paris"] * 2
        generate(each, request(), n=1), generate(each, request(), n=2, rollout_id=1)
        generate(each, request(), n=2, cache=False)
        generate(each, request(temperature=0.5), api_key="another")
        assert provider.count == 2 + 1 + 2 + 2 + 1
    assert lm.history[1]["usage"] == {}
    kwargs = [[entry["kwargs"] for entry in each.history] for each in (lm, theirs)]
    assert kwargs[0] == kwargs[1]


@from_35
def test_sync_and_async_share_generated_answers(provider, make):
    """One request for both."""
    lm = make()
    assert lm.generate(request()) == asyncio.run(lm.agenerate(request()))
    assert provider.count == 1


# A fallback's own settings


OWN = {"max_tokens": 77, "temperature": 0.25, "seed": 3}


def test_a_fallbacks_own_settings_reach_the_wire(provider, second, make, ask):
    """Those of the primary, which an adapter writes into each request, do not."""
    backup = dspy.LM(
        "openai/second", api_base=second.api_base, api_key="k", engine="litellm", **OWN
    )
    primary = {"max_tokens": 11, "temperature": 0.5, "top_p": 0.9}
    lm = make(fallbacks=[backup], num_retries=0, **primary)
    for asked in (request(), request(**primary)):
        provider.script(Status(500))
        assert ask(lm, asked).message.text == "Lyon"
        assert sent(second) == OWN


def test_what_the_caller_asks_for_holds_at_every_target(provider, second, make, ask):
    """As `max_tokens` in an ordinary call does; what nobody asked for is not sent."""
    backup = dspy.LM(
        "openai/second", api_base=second.api_base, api_key="k", engine="litellm", **OWN
    )
    provider.script(Status(500))
    lm = make(fallbacks=[backup], num_retries=0, max_tokens=11)
    ask(lm, request(max_tokens=500, stop=("x",)))
    assert sent(second) == OWN | {"max_tokens": 500, "stop": ["x"]}
    provider.script(Status(500))
    ask(make(fallbacks=[{"model": "openai/second", "api_base": second.api_base}], num_retries=0),
        request(temperature=0.1))  # fmt: skip
    expected = wire(second, "openai/second", request(model="openai/second", temperature=0.1))
    assert expected == {"temperature": 0.1}


def test_programs_send_a_fallback_what_it_would_send_itself(provider, second, make, ask):
    """In either shape of DSPy: with the program's own config, and without."""
    second.answer = provider.answer = dspy_answers({"q": "7"})
    for config in ({}, {"temperature": 0.9}):
        settings = {"api_base": second.api_base, "api_key": "k", "engine": "litellm", **OWN}
        alone = dspy.LM("openai/second", cache=False, **settings)
        program = dspy.Predict("question -> answer", **config)
        with dspy.context(lm=alone):
            ask(program, question="q")
        expected = sent(second)
        lm = make(
            fallbacks=[dspy.LM("openai/second", **settings)],
            num_retries=0,
            cache=False,
            max_tokens=11,
            temperature=0.5,
            top_p=0.9,
        )
        provider.script(Status(500))
        with dspy.context(lm=lm):
            ask(program, question="q")
        assert sent(second) == expected == OWN | config


def test_a_reasoning_fallback_gets_what_it_takes(provider, second, make, ask):
    """No small `max_tokens`, no temperature."""
    provider.script(Status(500))
    backup = {"model": "openai/o3-mini", "api_base": second.api_base, "api_key": "k"}
    lm = make(fallbacks=[backup], num_retries=0, max_tokens=11, temperature=0.5)
    ask(lm, request(max_tokens=11, temperature=0.5))
    assert sent(second) == {}
