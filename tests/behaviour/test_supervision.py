"""A client that breaks is restarted, and the call that met the break is tried once more."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import dspy
import httpx
import litellm
import pytest

from dspy_resilient import ClientClosedError, LimitPolicy, RestartLimitError
from dspy_resilient.events import ClientRestarted
from dspy_resilient.providers.pool import pool
from dspy_resilient.testing import (
    Clock,
    Empty,
    Garbage,
    Hold,
    Provider,
    Reset,
    StallStream,
    Status,
    cut_json,
    dspy_answers,
)


def http_clients(kind):
    """Return what the pool hands out at present, of one kind."""
    clients = [each._http for each in list(pool._clients.values())]
    return [each for each in clients if isinstance(each, kind)]


def close_clients():
    """Do what a user does who "cleans up": close every HTTP client there is."""
    for each in http_clients(httpx.Client):
        each.close()


async def aclose_clients():
    """Do the same with those of event loops."""
    for each in http_clients(httpx.AsyncClient):
        await each.aclose()


@pytest.fixture(params=["sync", "async"])
def meddle(request):
    """Do something before a call, or while it is under way, and return its answer.

    `meddle(lm, provider)` closes the clients before it; with a `Hold`, under it.
    """

    def under(lm, provider, hold):
        def close():
            provider.wait_for(provider.count + 1)
            close_clients()
            hold.release()

        provider.script(hold)
        thread = threading.Thread(target=close)
        thread.start()
        try:
            return lm("again")
        finally:
            thread.join()

    async def aunder(lm, provider, hold):
        provider.script(hold)
        call = asyncio.ensure_future(lm.acall("again"))
        await asyncio.to_thread(provider.wait_for, provider.count + 1)
        await aclose_clients()
        hold.release()
        return await call

    def sync(lm, provider, hold=None):
        lm("warm")
        if hold is not None:
            return under(lm, provider, hold)
        close_clients()
        return lm("again")

    async def with_loop(lm, provider, hold=None):
        await lm.acall("warm")
        if hold is not None:
            return await aunder(lm, provider, hold)
        await aclose_clients()
        return await lm.acall("again")

    if request.param == "sync":
        return sync
    return lambda *args: asyncio.run(with_loop(*args))


@pytest.fixture
def crashing(monkeypatch):
    """Have every HTTP client closed the moment it is made, until the value is called."""
    for kind in (httpx.Client, httpx.AsyncClient):

        def make(self, *args, _made=kind.__init__, **kwargs):
            _made(self, *args, **kwargs)
            self._state = httpx._client.ClientState.CLOSED

        monkeypatch.setattr(kind, "__init__", make)
    yield monkeypatch.undo
    monkeypatch.undo()


def outcomes(lm):
    return [each.outcome for each in lm.history[-1]["attempts"]]


@pytest.mark.parametrize("prefix", ["openai", "azure"])
def test_a_closed_http_client_is_replaced(provider, make, meddle, prefix):
    """Before anything is sent through it, so that no call meets it."""
    lm = make(f"{prefix}/test", api_base=provider.base(prefix), cache=False)
    assert meddle(lm, provider) == ["Paris"]
    assert outcomes(lm) == ["answer"]
    assert (provider.count, provider.connections) == (2, 2)
    assert lm.stats().restarts == lm.stats().retries == 0


@pytest.mark.parametrize("prefix", ["openai", "anthropic", "gemini"])
def test_a_client_closed_under_a_running_call_is_replaced(provider, make, meddle, prefix):
    """The second try answers; the circuit hears nothing of it, and listeners one restart.

    Though the error is that of a connection which the provider has cut.
    """
    events = []
    options = {"cache": False, "num_retries": 0, "on_event": events.append}
    lm = make(f"{prefix}/test", api_base=provider.base(prefix), **options)
    assert meddle(lm, provider, Hold()) == ["Paris"]
    assert outcomes(lm) == ["broken", "answer"]
    restarts = [each for each in events if isinstance(each, ClientRestarted)]
    assert len(restarts) == lm.stats().restarts == 1
    assert restarts[0].error in ("LMServerError", "LMTransportError")
    assert restarts[0].target == lm._runtime.routes.find(lm, {}).label
    assert lm.stats().retries == lm.circuit.failure_count == 0


@pytest.mark.parametrize("prefix", ["openai", "anthropic"])
def test_a_client_of_a_dead_event_loop_is_not_used_again(provider, make, monkeypatch, prefix):
    """Not by another loop at the same address either."""
    monkeypatch.setattr(litellm, "disable_aiohttp_transport", True)
    lm = make(f"{prefix}/test", api_base=provider.base(prefix), cache=False, num_retries=0)
    gone = asyncio.new_event_loop()
    gone.run_until_complete(lm.acall("on a loop that ends"))
    (place,) = lm._runtime.http_clients._held
    dead = lm._runtime.http_clients._held[place]
    gone.close()
    assert dead.is_broken

    async def call():
        address = id(asyncio.get_running_loop())
        lm._runtime.http_clients._held[address, *place[1:]] = dead
        for _, key in list(pool._clients):
            pool._clients[address, key] = dead
        return await lm.acall("on another")

    assert asyncio.run(call()) == ["Paris"]
    assert outcomes(lm) == ["answer"]
    assert lm.stats().restarts == 0


def test_a_loop_that_dies_under_a_stream_breaks_the_call(provider, make):
    """A sync call streams on its consumer's loop; without one it is sent by itself."""
    lm = make(cache=False)
    sent = lm._runtime.http_clients
    loop = asyncio.new_event_loop()

    async def find():
        return sent.find(loop, lm.model, "chat", lm.kwargs, lm.kwargs)

    client = loop.run_until_complete(find())
    assert not client.is_broken
    loop.close()
    assert client.is_broken


def test_repeated_event_loops_and_threads_with_loops_of_their_own_break_nothing(provider, make):
    """What a notebook does, and what used to end in "Event loop is closed"."""
    lm = make(cache=False, num_retries=0)

    def loops():
        for _ in range(5):
            assert asyncio.run(lm.acall("again")) == ["Paris"]
            loop = asyncio.new_event_loop()
            assert loop.run_until_complete(lm.acall("and again")) == ["Paris"]
            loop.close()

    with ThreadPoolExecutor(4) as threads:
        for each in [threads.submit(loops) for _ in range(4)]:
            each.result(30)
    assert lm.stats().attempts == 40
    assert lm.stats().restarts == 0


async def stream(lm, on_chunk):
    """Stream a prediction; `on_chunk` is awaited after the first chunk."""
    program = dspy.streamify(dspy.Predict("question -> answer"))
    chunks, prediction = 0, None
    with dspy.context(lm=lm):
        async for value in program(question="q"):
            if isinstance(value, dspy.Prediction):
                prediction = value
            else:
                chunks += 1
                if chunks == 1:
                    await on_chunk()
    return chunks, prediction


@pytest.fixture
def streaming():
    with Provider(dspy_answers(lambda question: "one two three four five")) as running:
        yield running


async def test_a_stream_that_has_not_begun_is_tried_once_more(streaming, make):
    """Nobody has seen anything yet."""
    hold = Hold()
    streaming.script(hold)
    lm = make(cache=False, num_retries=0, api_base=streaming.api_base)

    async def close():
        await asyncio.to_thread(streaming.wait_for, 1)
        await aclose_clients()
        hold.release()

    closed = asyncio.ensure_future(close())
    chunks, prediction = await stream(lm, lambda: asyncio.sleep(0))
    await closed
    assert chunks > 3
    assert prediction.answer == "one two three four five"
    assert outcomes(lm) == ["broken", "answer"]


async def test_a_stream_that_breaks_in_the_middle_is_not_repeated(streaming, make, monkeypatch):
    """Its chunks have been seen; the client is restarted for the next call all the same.

    (Over aiohttp nobody learns that the client was closed: see below.)
    """
    monkeypatch.setattr(litellm, "disable_aiohttp_transport", True)
    streaming.script(StallStream(1, 1.0))
    lm = make(cache=False, api_base=streaming.api_base)
    with pytest.raises(dspy.LMError) as error:
        await stream(lm, aclose_clients)
    assert [each.outcome for each in error.value.attempts] == ["broken"]
    assert streaming.count == 1
    assert lm.stats().restarts == 1
    assert (await stream(lm, lambda: asyncio.sleep(0)))[1].answer.startswith("one")


async def test_a_deadline_ends_a_stream_whose_client_was_closed(streaming, make):
    """Over aiohttp nobody learns of it, and no timeout of LiteLLM's applies."""
    streaming.script(StallStream(1, 1.0))
    lm = make(cache=False, deadline=1.0, timeout=0.5, api_base=streaming.api_base)
    with pytest.raises(dspy.LMError):
        await stream(lm, aclose_clients)
    assert streaming.count == 1
    assert lm.health().in_flight == 0
    assert (await stream(lm, lambda: asyncio.sleep(0)))[1].answer.startswith("one")


def test_fifty_calls_that_meet_one_break_cost_one_restart(provider, make):
    """All of them are answered.

    On a loop: who closes a client under threads that read from it may have them read from the
    next connection, whose socket gets the number of the closed one.
    """
    lm = make(cache=False, num_retries=0)
    holds = [Hold() for _ in range(50)]
    provider.script(*holds)

    async def program():
        calls = [asyncio.ensure_future(lm.acall(f"{number}")) for number in range(50)]
        await asyncio.to_thread(provider.wait_for, 50)
        await aclose_clients()
        for each in holds:
            each.release()
        return await asyncio.gather(*calls)

    assert asyncio.run(program()) == [["Paris"]] * 50
    assert lm.stats().restarts == 1


def test_a_crash_loop_ends_in_the_restart_limit(crashing, make, ask):
    """A call is tried twice; the fourth break within 5 s is refused, and so is all that follows."""
    lm = make(cache=False)
    with pytest.raises(dspy.LMError) as first:
        ask(lm, "?")
    assert [each.outcome for each in first.value.attempts] == ["broken", "broken"]
    with pytest.raises(RestartLimitError, match="restart") as second:
        ask(lm, "?")
    assert lm.stats().restarts == 3
    assert second.value.attempts[-1].outcome == "broken"
    attempts = lm.stats().attempts
    with pytest.raises(RestartLimitError) as third:
        ask(lm, "?")
    assert lm.stats().attempts == attempts
    assert 0 < third.value.retry_after <= 5
    assert "left alone" in lm.explain()
    assert lm.circuit.state == "closed"


def test_restart_lifts_the_restart_limit(crashing, make, ask):
    """A person has mended something."""
    lm = make(cache=False)
    for _ in range(2):
        with pytest.raises(dspy.LMError):
            ask(lm, "?")
    crashing()
    with pytest.raises(RestartLimitError):
        ask(lm, "?")
    lm.restart()
    assert ask(lm, "?") == ["Paris"]


def test_the_restart_limit_passes_with_its_window(crashing, make, ask):
    """Five seconds after the first of three restarts the next call is sent again."""
    lm, clock = make(cache=False), Clock(100.0)
    lm._runtime.routes.supervisor._clock = clock
    for _ in range(2):
        with pytest.raises(dspy.LMError):
            ask(lm, "?")
    crashing()
    clock.advance(4.9)
    with pytest.raises(RestartLimitError):
        ask(lm, "?")
    clock.advance(0.2)
    assert ask(lm, "?") == ["Paris"]
    assert lm.stats().restarts == 3


def test_a_fallback_answers_for_a_client_that_cannot_be_mended(crashing, make, ask):
    """Its own HTTP client is whole."""

    class Backup(dspy.BaseLM):
        def __call__(self, *args, **kwargs):
            return ["backup"]

        async def acall(self, *args, **kwargs):
            return ["backup"]

    lm = make(cache=False, fallbacks=[Backup("backup/test")])
    assert [ask(lm, "?") for _ in range(5)] == [["backup"]] * 5
    assert lm.stats().restarts == 3


def test_hits_are_served_while_nothing_can_be_sent(crashing, make, ask):
    """The cache needs no connection."""
    lm = make()
    crashing()
    assert ask(lm, "known") == ["Paris"]
    for _ in range(3):
        lm._runtime.mend(lm._runtime.routes, lm._runtime.routes.supervisor.generation, OSError())
    with pytest.raises(RestartLimitError):
        lm._runtime.mend(lm._runtime.routes, lm._runtime.routes.supervisor.generation, OSError())
    assert ask(lm, "known") == ["Paris"]
    with pytest.raises(RestartLimitError):
        ask(lm, "unknown")


@pytest.mark.parametrize(
    "fault",
    [Garbage(), cut_json(), Empty(), Status(500), Status(401), Reset()],
    ids=["page", "cut", "empty", "500", "401", "reset"],
)
@pytest.mark.parametrize("prefix", ["openai", "anthropic"])
def test_nothing_a_provider_does_restarts_a_client(provider, make, ask, prefix, fault):
    """An unreadable response is its failure, not our break."""
    provider.always(fault)
    lm = make(f"{prefix}/test", api_base=provider.base(prefix), cache=False, num_retries=0)
    with pytest.raises(dspy.LMError):
        ask(lm, "?")
    assert lm.stats().restarts == 0


def test_an_open_circuit_stays_open_over_a_restart(provider, make, ask):
    """The provider is as down as before."""
    lm = make(cache=False, max_wait=0)
    lm.circuit.force_open("maintenance")
    lm.restart()
    with pytest.raises(dspy.LMError, match="maintenance"):
        ask(lm, "?")
    assert provider.count == 0


def test_leaders_answer_their_followers_over_a_restart(provider, make):
    """Nobody who waits is forgotten, and nothing is sent twice for them."""
    hold = Hold()
    provider.script(hold)
    lm = make()
    with ThreadPoolExecutor(5) as pool:
        calls = [pool.submit(lm, "same") for _ in range(5)]
        provider.wait_for(1)
        while len(next(iter(lm._runtime.flights._flights.values())).waiters) < 4:
            time.sleep(0.001)
        lm.restart()
        hold.release()
        assert [each.result(20) for each in calls] == [["Paris"]] * 5
    assert provider.count == 1
    assert lm.stats().coalesced == 4


def test_a_restart_frees_whoever_waits_for_a_place_that_was_lost(make, ask):
    """Clean limits have all their places."""
    lm = make(cache=False, limits=LimitPolicy(max_concurrent=1))
    route = lm._runtime.routes.find(lm, {})
    route.limiter.enter()  # and never leave
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(ask, lm, "?")
        while not route.limiter.queued:
            time.sleep(0.001)
        lm.restart()
        assert call.result(20) == ["Paris"]
    assert (route.limiter.in_use, route.limiter.queued) == (0, 0)


def break_limits(lm):
    lm._runtime.routes.find(lm, {}).limiter._leases = None


def break_count(lm):
    lm._runtime.routes.find(lm, {}).limiter._leases.in_use = -1


def break_flights(lm):
    lm._runtime.flights._flights = None


@pytest.mark.parametrize("damage", [break_limits, break_count, break_flights])
def test_broken_state_of_our_own_is_replaced(provider, make, ask, damage):
    """The limits, or the in-flight table, in a state they cannot be in."""
    lm = make(limits=4)
    assert ask(lm, "one") == ["Paris"]
    damage(lm)
    assert ask(lm, "two") == ["Paris"]
    assert lm.stats().restarts == 1
    assert ask(lm, "three") == ["Paris"]
    assert lm.stats().restarts == 1
    assert len(lm._runtime.flights) == 0
    assert lm._runtime.routes.find(lm, {}).limiter.in_use == 0


def test_followers_of_a_broken_table_are_answered(provider, make):
    """Whoever led comes back with the answer that is in the cache by then."""
    hold = Hold()
    provider.script(hold)
    lm = make()
    with ThreadPoolExecutor(5) as pool:
        calls = [pool.submit(lm, "same") for _ in range(5)]
        provider.wait_for(1)
        while len(next(iter(lm._runtime.flights._flights.values())).waiters) < 4:
            time.sleep(0.001)
        lm._runtime.flights._flights = None
        hold.release()
        assert [each.result(20) for each in calls] == [["Paris"]] * 5
    assert provider.count == 1
    assert lm.stats().restarts == 1


def test_a_restart_by_hand_makes_new_connections(provider, make, ask):
    """What is under way keeps the old ones."""
    lm = make(cache=False)
    lm("?")
    lm.restart()
    lm("?")
    assert provider.connections == 2


def test_a_closed_client_is_not_restarted(make):
    """It stays closed."""
    lm = make()
    lm.close()
    with pytest.raises(ClientClosedError):
        lm.restart()
