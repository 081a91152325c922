"""`CircuitPolicy(listen="provider")`: what others hear of a provider, its circuit learns."""

from __future__ import annotations

import asyncio
import contextlib
import time

import dspy
import litellm
import pytest
from litellm.llms.custom_httpx.async_client_cleanup import close_litellm_async_clients

from dspy_resilient import CircuitPolicy, ResilientLM
from dspy_resilient.circuit import CircuitBreaker
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


def test_clients_that_share_a_circuit_count_a_failure_once(provider, make):
    """Nor do five keys of one client make five failures of one."""
    shared = CircuitBreaker(CircuitPolicy(failure_threshold=50, listen="provider"))
    clients = [make(circuit=shared, max_wait=0, num_retries=0, cache=False) for _ in range(5)]
    alone = make(circuit=CircuitPolicy(listen="provider"), num_retries=0, cache=False)
    for number in range(5):
        assert clients[0]("?", api_key=f"key {number}") == ["Paris"]
        assert alone("?", api_key=f"key {number}") == ["Paris"]
    provider.always(Status(500))
    with pytest.raises(litellm.InternalServerError):
        raw(provider, "sync")
    assert shared.failure_count == 1
    assert alone.circuit.failure_count == 1
    with pytest.raises(dspy.LMServerError):
        clients[3]("?")
    assert shared.failure_count == 2


def test_what_is_heard_while_the_circuit_is_open_was_not_rejected(provider, listening):
    """A listener's news are no calls of the client's."""
    provider.always(Status(500))
    for _ in range(9):
        with pytest.raises(litellm.InternalServerError):
            raw(provider, "sync")
    assert listening.circuit.state == "open"
    assert listening.stats().rejected == 0
    assert listening.circuit.rejected == 0


class Engine:
    """An engine of the user's own, which does more than it is asked, and answers all the same."""

    def __init__(self, work):
        self.work = work

    def _answer(self, request):
        message = dspy.lm15.Message.assistant("Paris")
        usage = dspy.lm15.Usage(input_tokens=1, output_tokens=1, total_tokens=2)
        return dspy.lm15.Response(
            model=request.model, message=message, finish_reason="stop", usage=usage, id="1"
        )

    def complete(self, request, *args, **kwargs):
        with contextlib.suppress(Exception):
            self.work()
        return self._answer(request)


def router(provider, _):
    deployment = {"model": "openai/test", "api_base": provider.api_base, "api_key": KEY}
    model = {"model_name": "m", "litellm_params": deployment | {"max_retries": 0}}
    return litellm.Router([model], num_retries=0).completion("m", QUESTION)


@pytest.mark.parametrize("work", [embed, raw, router], ids=["embed", "raw", "router"])
def test_what_an_engine_swallows_is_no_failure_of_its_answer(provider, monkeypatch, work):
    """An embedding, a call or a router of its own failed; the client's call was answered."""
    provider.always(Status(500))
    monkeypatch.setenv("OPENAI_API_BASE", provider.api_base)
    engine = Engine(lambda: work(provider, "sync"))
    lm = ResilientLM("openai/test", engine=engine, cache=False, max_wait=0)
    for _ in range(7):
        lm("?")
    assert (lm.circuit.state, lm.circuit.failure_count) == ("closed", 0)
    assert len(provider.requests) >= 7


def test_an_answer_beats_the_failure_before_it(provider, make):
    """LiteLLM's own fallbacks report what failed before they found an answer."""
    provider.always(Status(500))
    with Provider("Lyon") as second:
        other = {"model": "openai/b", "api_base": second.api_base, "api_key": KEY}
        lm = make(cache=False, max_wait=0, fallbacks=[])
        twin = lm.copy()
        twin.kwargs["fallbacks"] = [other]
        for _ in range(7):
            assert asyncio.run(twin.acall("?")) == ["Lyon"]
    assert (lm.circuit.state, lm.circuit.failure_count) == ("closed", 0)
