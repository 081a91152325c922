"""`CircuitPolicy(listen="provider")`: what others hear of a provider, its circuit learns."""

from __future__ import annotations

import asyncio
import time

import dspy
import litellm
import pytest
from litellm.llms.custom_httpx.async_client_cleanup import close_litellm_async_clients

from dspy_resilient import CircuitPolicy, ResilientLM
from dspy_resilient.testing import Provider, Status, rate_limited

KEY = "another-key"
QUESTION = [{"role": "user", "content": "?"}]


@pytest.fixture
def listening(make):
    """A client that has made no call yet, and whose circuit opens at the third failure."""
    return make(max_wait=0, circuit=CircuitPolicy(failure_threshold=3, listen="provider"))


@pytest.fixture
def deaf(make):
    """The same, but for its own calls only."""
    return make(max_wait=0, circuit=CircuitPolicy(failure_threshold=3))


def raw(provider, driver, **more):
    """Call LiteLLM directly."""
    settings = {"api_base": provider.api_base, "api_key": KEY, "num_retries": 0, "max_retries": 0}
    settings |= more
    if driver == "sync":
        return litellm.completion("openai/test", QUESTION, **settings)
    return asyncio.run(tended(litellm.acompletion("openai/test", QUESTION, **settings)))


def embed(provider, driver):
    """Embed through DSPy."""
    embedder = dspy.Embedder(
        "openai/embed", api_base=provider.api_base, api_key=KEY, caching=False, num_retries=0
    )
    return embedder(["x"]) if driver == "sync" else asyncio.run(tended(embedder.acall(["x"])))


async def tended(call):
    """Await `call` on a loop on which LiteLLM leaves no client open."""
    try:
        return await call
    finally:
        await close_litellm_async_clients()


def attempt(provider, driver):
    """Call through another client of ours."""
    with ResilientLM(
        "openai/other", api_base=provider.api_base, api_key=KEY, num_retries=0, cache=False
    ) as other:
        return other("?") if driver == "sync" else asyncio.run(other.acall("?"))


@pytest.mark.parametrize("driver", ["sync", "async"])
@pytest.mark.parametrize("call", [raw, embed, attempt])
def test_a_listening_circuit_opens_for_failures_of_others(provider, listening, deaf, call, driver):
    """And one that does not listen stays closed: isolation is the default."""
    provider.always(Status(500))
    for failures in range(3):
        assert listening.circuit.failure_count == failures
        with pytest.raises(Exception, match="500"):
            call(provider, driver)
    assert listening.circuit.state == "open"
    assert deaf.circuit.state == "closed"
    assert deaf.circuit.failure_count == 0


def test_its_own_failures_count_once(provider, listening, ask):
    """It does not listen to itself."""
    provider.always(Status(500))
    with pytest.raises(dspy.LMServerError):
        ask(listening, "?", num_retries=0)
    assert listening.circuit.failure_count == 1


def test_what_does_not_count_for_its_own_calls_does_not_count_for_others(provider, listening):
    """A 429 or a bad request is no outage."""
    for fault in (rate_limited(), Status(400), Status(401)):
        provider.always(fault)
        for _ in range(3):
            with pytest.raises(litellm.exceptions.openai.OpenAIError):
                raw(provider, "sync")
    assert listening.circuit.state == "closed"
    assert listening.circuit.failure_count == 0


def test_another_endpoint_is_another_matter(listening):
    """The same provider elsewhere says nothing about this one."""
    with Provider(faults=[Status(500)] * 3) as elsewhere:
        for _ in range(3):
            with pytest.raises(litellm.InternalServerError):
                raw(elsewhere, "sync")
    assert listening.circuit.failure_count == 0


def test_a_client_of_the_provider_itself_does_not_hear_of_local_servers(provider, monkeypatch):
    """They speak OpenAI's language, and LiteLLM calls them by its name."""
    monkeypatch.delenv("OPENAI_API_BASE", raising=False)
    lm = ResilientLM("openai/test", api_key=KEY, circuit=CircuitPolicy(listen="provider"))
    provider.always(Status(500))
    with pytest.raises(litellm.InternalServerError):
        raw(provider, "sync")
    assert lm.circuit.failure_count == 0


def test_the_success_of_others_is_heard_too(provider, listening):
    """Late, as LiteLLM reports it: failures in a row are in a row no more."""
    provider.script(Status(500), Status(500))
    for _ in range(2):
        with pytest.raises(litellm.InternalServerError):
            raw(provider, "sync")
    assert listening.circuit.failure_count == 2
    raw(provider, "sync")
    end = time.monotonic() + 10
    while listening.circuit.failure_count:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_copies_hear_once(provider, listening):
    """They are the same client."""
    copies = [listening.copy(temperature=0.5), listening.copy()]
    provider.always(Status(500))
    with pytest.raises(litellm.InternalServerError):
        raw(provider, "sync")
    assert listening.circuit.failure_count == 1
    assert {copied.circuit for copied in copies} == {listening.circuit}
