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


OLLAMAS = ["ollama/m", "ollama_chat/m"]


@pytest.mark.parametrize("model", OLLAMAS)
def test_what_ollama_has_not_done_is_asked_for_again(provider, make, ask, model):
    """LiteLLM does not look: `done` is false, and it makes a "stop" of it."""
    ending(provider, "not done", "not done")
    lm = make(model, api_base=provider.url, retry=AT_ONCE)
    assert ask(lm, "?") == ["Paris"]
    assert dict(lm.stats().failed) == {"failure": 2}
    assert ask(lm, "?") == ["Paris"]
    assert lm.stats().stored == 1


class Asks(dspy.Module):
    """Passes the question on, so that the answer is that of the client."""

    def forward(self, question):
        return dspy.Prediction(answer=dspy.settings.lm(question))

    async def aforward(self, question):
        return dspy.Prediction(answer=await dspy.settings.lm.acall(question))


def streamed(lm, *, is_async):
    """Stream an answer; return the text that the consumer saw, and what the client answered."""

    async def consume():
        seen, answer = "", None
        with dspy.context(lm=lm):
            output = dspy.streamify(Asks(), is_async_program=is_async)(question="?")
            async for value in output:
                if isinstance(value, dspy.Prediction):
                    answer = value.answer
                else:
                    seen += "".join(each.delta.content or "" for each in value.choices)
        return seen, answer

    return asyncio.run(consume())


def base_of(provider, model):
    dialect = model.partition("/")[0]
    return provider.url if model in OLLAMAS else provider.base(dialect)


STREAMS = [(model, finish) for model in ("openai/m", "groq/m", "deepseek/m") for finish in SERVERS]
STREAMS += [(model, "not done") for model in OLLAMAS]


@pytest.mark.parametrize("is_async", [True, False], ids=["async", "sync"])
@pytest.mark.parametrize(("model", "finish"), STREAMS)
def test_a_stream_that_the_server_broke_off_is_a_failure(provider, make, model, finish, is_async):
    """With text it is an error, and nothing is kept; without, it is asked for again."""
    ending(provider, finish)
    lm = make(model, api_base=base_of(provider, model), retry=AT_ONCE)
    with pytest.raises(dspy.LMError):
        streamed(lm, is_async=is_async)
    assert dict(lm.stats().failed) == {"failure": 1}
    assert lm.stats().stored == 0
    provider.answer = lambda body, left=["", "Paris"]: Reply(
        left[0], finish=finish if not left.pop(0) else "stop"
    )
    assert streamed(lm, is_async=is_async) == ("Paris", ["Paris"])
    assert dict(lm.stats().failed) == {"failure": 2}
    assert lm.stats().stored == 1


MESSES = [(model, finish) for model in ("openai/m", "groq/m", "deepseek/m") for finish in MODELS]
MESSES += [("gemini/g", finish) for finish in GEMINIS]


@pytest.mark.parametrize(("model", "finish"), MESSES)
def test_a_stream_that_the_model_made_a_mess_of_is_not_kept(provider, make, model, finish):
    """The consumer has had it; the next caller gets another try."""
    ending(provider, finish)
    lm = make(model, api_base=base_of(provider, model))
    assert streamed(lm, is_async=True) == ("Par", ["Par"])
    assert streamed(lm, is_async=True) == ("Paris", ["Paris"])
    assert streamed(lm, is_async=True) == ("", ["Paris"])
    assert lm.stats().failures == 0


ENDS = [("litellm", each) for each in ("failed", "length", "cancelled")]
ENDS += [("lm15", "failed")]  # which knows no other last event, and takes the stream for cut


@pytest.mark.parametrize(("engine", "finish"), ENDS)
def test_a_streamed_response_says_so_by_its_last_event(provider, make, finish, engine):
    """What failed is no answer; what is incomplete is not kept."""
    ending(provider, finish)
    lm = make(model_type="responses", engine=engine, num_retries=0)
    if finish == "failed":
        with pytest.raises(dspy.LMError):
            streamed(lm, is_async=True)
    else:
        streamed(lm, is_async=True)
    assert lm.stats().stored == 0
    assert lm.stats().failures == (1 if finish == "failed" else 0)


def test_words_of_a_program_are_not_taken_for_the_providers(provider, make):
    """A tool may have an argument of such a name."""
    call = {"name": "f", "arguments": {"done": False, "finish_reason": "error"}}
    provider.answer = lambda body: {"text": '{"finish_reason": "error"}', "tool_calls": [call]}
    for model in ("openai/m", "ollama_chat/m", "gemini/g"):
        lm = make(model, api_base=base_of(provider, model), num_retries=0)
        streamed(lm, is_async=True)
        assert lm.stats().stored == 1, model
