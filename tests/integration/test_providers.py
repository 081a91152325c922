"""Every provider that can be spoken for locally: one request per attempt, and the right verdict."""

from __future__ import annotations

import asyncio

import dspy
import pytest

from dspy_resilient import CircuitPolicy, ResilientLM, RetryPolicy
from dspy_resilient.testing import (
    CutStream,
    Reset,
    Status,
    cut_json,
    dspy_answers,
    overloaded,
    rate_limited,
)

# LiteLLM's own, of its models at first use.
pytestmark = pytest.mark.filterwarnings("ignore:.*`ReadOnly` qualifier:UserWarning")

PROVIDERS = (
    "openai",
    "azure",
    "anthropic",
    "groq",
    "cerebras",
    "mistral",
    "gemini",
    "together_ai",
    "hosted_vllm",
    "openrouter",
    "ollama_chat",
    "ollama",
)
KEY = "dummy-key-for-tests"
# LiteLLM 1.106 sends again, once and silently, when the connection of an async call through a handler
# of its own is reset: for all but these, and for all of Responses. LiteLLM 1.109 does not.
SENT_ONCE = ("openai", "azure", "cerebras")


@pytest.fixture(params=PROVIDERS)
def prefix(request):
    return request.param


@pytest.fixture(params=["chat", "responses"])
def model_type(request):
    return request.param


@pytest.fixture
def lm(prefix, model_type, provider):
    """A client whose circuit opens at the first failure, and which tries once."""
    with client(prefix, provider, model_type) as made:
        yield made


def client(prefix, provider, model_type="chat", **options):
    more = {"api_version": "2024-10-21"} if prefix == "azure" else {}
    return ResilientLM(
        f"{prefix}/test",
        model_type=model_type,
        api_base=provider.base(prefix),
        api_key=KEY,
        cache=False,
        retry=RetryPolicy(max_attempts=1),
        max_wait=0,
        circuit=CircuitPolicy(failure_threshold=1),
        **more,
        **options,
    )


def sent(provider):
    """Return the requests for an answer; LiteLLM asks Ollama what a model can do, besides."""
    return [each for each in provider.requests if not each.path.endswith("/api/show")]


OURS = ("litellm_call_id", "litellm_metadata", "dspy_resilient", "max_retries", "num_retries")


def test_an_answer_takes_one_request_with_nothing_of_ours_in_it(provider, lm, ask):
    """No tag in path, headers or body."""
    (answer,) = ask(lm, "?")
    assert (answer["text"] if isinstance(answer, dict) else answer) == "Paris"
    (request,) = sent(provider)
    on_the_wire = f"{request.path} {dict(request.headers)} {request.body}"
    assert [each for each in OURS if each in on_the_wire] == []
    assert lm.circuit.state == "closed"


def test_a_tool_call_comes_back(provider, prefix, model_type, lm, ask):
    """In each dialect."""
    provider.answer = {"tool_calls": [{"name": "find", "arguments": {"city": "Paris"}}]}
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}}
    tool = {"name": "find", "parameters": parameters}
    if model_type == "chat":
        tool = {"function": tool}
    (answer,) = ask(lm, "?", tools=[{"type": "function", **tool}])
    (call,) = answer["tool_calls"]
    assert "Paris" in str(call)
    assert len(sent(provider)) == 1


FAULTS = {
    "500": (Status(500), "open"),
    "529": (overloaded(), "open"),
    "cut": (cut_json(), "open"),
    "429": (rate_limited(retry_after=7), "closed"),
    "400": (Status(400), "closed"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_failure_takes_one_request_and_trips_its_circuit(provider, prefix, lm, ask, fault):
    """Its own only, and only what is the provider's fault does."""
    fault, state = FAULTS[fault]
    provider.always(fault)
    with client(prefix, provider) as other, pytest.raises(dspy.LMError):
        ask(lm, "?")
    assert lm.circuit.state == state
    assert other.circuit.state == "closed"
    assert len(sent(provider)) == 1


def test_a_wait_that_was_asked_for_is_known(provider, lm, ask):
    """From whatever header LiteLLM has kept."""
    provider.always(rate_limited(retry_after=7))
    with pytest.raises(dspy.LMRateLimitError) as caught:
        ask(lm, "?")
    assert caught.value.retry_after == pytest.approx(7, abs=3)


def test_a_reset_connection_is_one_failure(request, provider, prefix, model_type, lm, ask):
    """Though LiteLLM may send again before it says so."""
    provider.always(Reset())
    with pytest.raises(dspy.LMError):
        ask(lm, "?")
    assert lm.circuit.state == "open"
    is_sync = request.node.callspec.params["ask"] == "sync"
    is_sent_once = is_sync or (model_type == "chat" and prefix in SENT_ONCE)
    assert len(sent(provider)) <= (1 if is_sent_once else 2)


def test_a_refused_connection_trips_the_circuit(provider, lm, ask):
    """Nobody listens there."""
    provider.down("refuse")
    with pytest.raises(dspy.LMError):
        ask(lm, "?")
    assert lm.circuit.state == "open"


async def stream(lm):
    """Stream an answer through DSPy and return its text."""
    listener = dspy.streaming.StreamListener("answer")
    program = dspy.streamify(dspy.Predict("question -> answer"), stream_listeners=[listener])
    with dspy.context(lm=lm):
        chunks = [chunk async for chunk in program(question="Capital of France?")]
    return chunks[-1].answer


@pytest.fixture
def streaming(prefix, provider):
    """A client for streams, of a provider that answers as DSPy wants it; DSPy streams no Responses."""
    provider.answer = dspy_answers({"Capital of France?": "Paris"})
    with client(prefix, provider) as made:
        yield made


def test_a_stream_takes_one_request_with_nothing_of_ours_in_it(provider, streaming):
    """No tag either."""
    assert asyncio.run(stream(streaming)) == "Paris"
    (request,) = sent(provider)
    on_the_wire = f"{request.path} {dict(request.headers)} {request.body}"
    assert [each for each in OURS if each in on_the_wire] == []
    assert streaming.circuit.state == "closed"


@pytest.mark.parametrize("fault", [Status(500), CutStream(1)], ids=["500", "cut"])
def test_a_stream_that_fails_takes_one_request_and_trips_the_circuit(provider, streaming, fault):
    """Before its first chunk and after."""
    provider.always(fault)
    with pytest.raises(dspy.LMError):
        asyncio.run(stream(streaming))
    assert streaming.circuit.state == "open"
    assert len(sent(provider)) == 1


def test_calls_share_a_connection(provider, lm):
    """Sync ones, and those on one loop."""

    async def calls():
        for _ in range(3):
            await lm.acall("?")

    for _ in range(3):
        lm("?")
    asyncio.run(calls())
    assert len({each.connection for each in sent(provider)}) == 2
