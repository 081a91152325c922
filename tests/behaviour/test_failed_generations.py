"""A generation that failed is no answer, though LiteLLM calls its end a "stop"."""

from __future__ import annotations

import asyncio

import dspy
import pytest

from dspy_resilient import ResilientLM, RetryPolicy
from dspy_resilient.testing import Reply

AT_ONCE = RetryPolicy(base=0.0)
SERVERS = ["error", "network_error", "insufficient_system_resource", "abort", "timeout"]
SERVERS += ["engine_overloaded"]
MODELS = ["repetition_truncation"]
GEMINIS = ["MALFORMED_FUNCTION_CALL", "MALFORMED_RESPONSE", "UNEXPECTED_TOOL_CALL"]
GEMINIS += ["TOO_MANY_TOOL_CALLS"]


def typed(lm, prompt):
    message = dspy.lm15.Message.user(prompt)
    return lm(dspy.lm15.Request(model=lm.model, messages=(message,)))


CALLS = {
    "sync": lambda lm, prompt: lm(prompt),
    "async": lambda lm, prompt: asyncio.run(lm.acall(prompt)),
    "typed": typed,
}


def ending(provider, *finishes):
    """Have the provider end its answers so, one after the other, and then as it should."""
    left = list(finishes)

    def answer(body):
        finish = left.pop(0) if left else "stop"
        return Reply("Par" if finish != "stop" else "Paris", finish=finish)

    provider.answer = answer


def text_of(answered):
    return answered.text if hasattr(answered, "text") else answered[0]


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("engine", ["litellm", "lm15"])
@pytest.mark.parametrize("finish", SERVERS)
def test_what_the_server_broke_off_is_asked_for_again(provider, make, finish, engine, call):
    """With every engine and entry point; the circuit hears of it, and the cache keeps the answer."""
    ending(provider, finish, finish)
    lm = make(engine=engine, retry=AT_ONCE)
    assert text_of(call(lm, "?")) == "Paris"
    assert len(provider.requests) == 3
    assert dict(lm.stats().failed) == {"failure": 2}
    assert text_of(call(lm, "?")) == "Paris"
    assert len(provider.requests) == 3


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("engine", ["litellm", "lm15"])
@pytest.mark.parametrize("finish", MODELS)
def test_what_the_model_made_a_mess_of_is_not_kept(provider, make, finish, engine, call):
    """The caller has it, as from plain DSPy; the next one gets another try."""
    ending(provider, finish)
    lm = make(engine=engine)
    assert text_of(call(lm, "?")) == "Par"
    assert text_of(call(lm, "?")) == "Paris"
    assert text_of(call(lm, "?")) == "Paris"
    assert len(provider.requests) == 2
    assert lm.stats().failures == 0


@pytest.mark.parametrize("finish", GEMINIS)
def test_geminis_own_words_are_understood(provider, ask, finish):
    """LiteLLM makes a "stop" of each."""
    ending(provider, finish)
    lm = ResilientLM("gemini/g", api_base=provider.base("gemini"), api_key="k")
    assert ask(lm, "?") == ["Par"]
    assert ask(lm, "?") == ["Paris"]
    assert ask(lm, "?") == ["Paris"]
    assert len([each for each in provider.requests if each.method == "POST"]) == 2


@pytest.mark.parametrize("engine", ["litellm", "lm15"])
@pytest.mark.parametrize("finish", ["failed", "length", "cancelled"])
def test_a_response_says_so_by_its_status(provider, make, ask, finish, engine):
    """What failed is asked for again at once; what is incomplete is not kept."""
    ending(provider, finish)
    lm = make(model_type="responses", engine=engine, retry=AT_ONCE)
    texts = [
        each[0]["text"] if isinstance(each[0], dict) else each[0]
        for each in (ask(lm, "?"), ask(lm, "?"))
    ]
    assert texts[-1] == "Paris"
    assert len(provider.requests) == 2
    assert lm.stats().failures == (1 if finish == "failed" else 0)
