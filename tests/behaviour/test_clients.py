"""Named clients: started once, looked up by name, closed together."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import dspy
import pytest

from dspy_resilient import (
    CachePolicy,
    ClientClosedError,
    Clients,
    DeadlineExceededError,
    HealthState,
    ResilientLM,
)
from dspy_resilient.testing import Hang, Hold, Status, dspy_answers

SECRET = "sk-very-secret-key"


@pytest.fixture
def settings(provider):
    """What reaches the local provider, uncached."""
    return {"api_base": provider.api_base, "api_key": SECRET, "cache": False}


@pytest.fixture
def clients():
    with Clients(grace=0.2) as made:
        yield made


@pytest.fixture(params=["sync", "async"])
def request_of(request):
    """Make one request: `request_of(clients, name, prompt, **options)`."""
    if request.param == "sync":
        return lambda clients, *args, **options: clients.request(*args, **options)
    return lambda clients, *args, **options: asyncio.run(clients.arequest(*args, **options))


def test_a_request_is_a_call_of_the_client(clients, settings, request_of):
    """Same answer, same history, same numbers."""
    lm = clients.start("fast", "openai/test", **settings)
    assert isinstance(lm, ResilientLM)
    assert lm.name == "fast"
    assert request_of(clients, "fast", "hello", temperature=0.5) == ["Paris"]
    assert lm.stats().calls == 1
    assert lm.history[-1]["kwargs"]["temperature"] == 0.5


def test_the_numbers_of_all_clients(clients, settings, request_of):
    """By name, and together."""
    for name in ("fast", "slow"):
        clients.start(name, "openai/test", **settings)
    request_of(clients, "fast", "hello")
    numbers = clients.stats()
    assert {name: each.calls for name, each in numbers.items()} == {"fast": 1, "slow": 0}
    assert sum(numbers.values()).calls == 1


@pytest.mark.filterwarnings("ignore:messages= dictionaries:DeprecationWarning")
def test_a_request_takes_messages(clients, settings, provider, request_of):
    """As a call of `dspy.LM` does."""
    clients.start("fast", "openai/test", **settings)
    asked = [{"role": "user", "content": "hello"}]
    assert request_of(clients, "fast", messages=asked) == ["Paris"]
    assert provider.requests[-1].body["messages"] == asked


def test_a_request_is_over_when_its_time_is(clients, settings, provider, request_of):
    """Whatever the provider does; 30 seconds by default."""
    provider.always(Hang())
    clients.start("fast", "openai/test", **settings)
    with pytest.raises(DeadlineExceededError):
        request_of(clients, "fast", "hello", timeout=0.2)
    assert clients["fast"].deadline is None


def test_the_clients_own_deadline_holds_all_the_same(clients, settings, provider, request_of):
    """A timeout never extends it."""
    provider.always(Hang())
    clients.start("fast", "openai/test", deadline=0.2, **settings)
    for timeout in (None, 30.0):
        with pytest.raises(DeadlineExceededError, match=r"0\.2 s"):
            request_of(clients, "fast", "hello", timeout=timeout)


def test_clients_are_a_mapping(clients, settings):
    """By name, in the order in which they were started."""
    for name in ("b", "a"):
        clients.start(name, "openai/test", **settings)
    assert list(clients) == ["b", "a"]
    assert len(clients) == 2
    assert "a" in clients
    assert "c" not in clients
    assert clients.get("c") is None
    assert dict(clients.items()) == {"b": clients["b"], "a": clients["a"]}
    with pytest.raises(KeyError, match="'c'; there are: 'b', 'a'"):
        clients["c"]


def test_the_same_name_and_configuration_is_the_same_client(clients, settings):
    """Starting is idempotent."""
    policy = CachePolicy(ttl=60)
    first = clients.start("fast", "openai/test", **settings | {"cache": policy})
    again = clients.start("fast", "openai/test", **settings | {"cache": CachePolicy(ttl=60)})
    assert first is again


def test_threads_that_start_at_once_get_the_same_client(clients, settings):
    """And only one is left."""
    barrier = threading.Barrier(16)

    def start():
        barrier.wait(10)
        return clients.start("fast", "openai/test", **settings)

    with ThreadPoolExecutor(16) as pool:
        started = {id(each.result(10)) for each in [pool.submit(start) for _ in range(16)]}
    assert started == {id(clients["fast"])}
    assert clients.request("fast", "hello") == ["Paris"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"api_key": "sk-another"}, "api_key"),
        ({"temperature": 0.5}, "temperature"),
        ({"timeout": 30}, "timeout"),
        ({"model": "openai/other"}, "model"),
        ({"limits": 3, "fallbacks": ["openai/x"]}, "fallbacks and limits"),
    ],
)
def test_another_configuration_under_a_taken_name_is_an_error(clients, settings, change, named):
    """It names the settings, and the values of none."""
    clients.start("fast", "openai/test", **settings)
    with pytest.raises(ValueError, match=f"with another {named}; ") as error:
        clients.start("fast", **{"model": "openai/test", **settings, **change})
    assert "sk-" not in str(error.value)
    assert clients.request("fast", "hello") == ["Paris"]


def test_replacing_closes_the_one_before(clients, settings, provider):
    """Its calls under way finish, and it takes no more."""
    hold = Hold()
    provider.script(hold)
    before = clients.start("fast", "openai/test", **settings)
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(before, "hello")
        provider.wait_for(1)
        after = clients.start("fast", "openai/test", temperature=0.5, replace=True, **settings)
        assert clients["fast"] is after is not before
        with pytest.raises(ClientClosedError):
            before("again")
        hold.release()
        assert call.result(20) == ["Paris"]
    assert clients.start("fast", "openai/test", temperature=0.5, replace=True, **settings) is after


def test_a_client_that_was_closed_makes_room(clients, settings):
    """Starting it again gives one that works."""
    before = clients.start("fast", "openai/test", **settings)
    before.close()
    after = clients.start("fast", "openai/test", **settings)
    assert after is not before
    assert clients.request("fast", "hello") == ["Paris"]


def test_a_failed_start_leaves_nothing(clients):
    """The name stays free."""
    with pytest.raises(TypeError, match="limits"):
        clients.start("fast", "openai/test", limits="many")
    assert not clients


def test_a_stopped_client_is_gone(clients, settings):
    """Its name is free, and it takes no more calls."""
    lm = clients.start("fast", "openai/test", **settings)
    clients.stop("fast")
    assert "fast" not in clients
    with pytest.raises(ClientClosedError):
        lm("hello")
    with pytest.raises(KeyError, match="there are: none"):
        clients.stop("fast")
    assert clients.start("fast", "openai/test", **settings) is not lm


def test_restart_reaches_the_client(clients, settings):
    """By name."""
    clients.start("fast", "openai/test", **settings)
    clients.restart("fast")
    assert clients.health()["fast"].restarts == 1
    with pytest.raises(KeyError):
        clients.restart("slow")


def close(clients):
    clients.close()


def aclose(clients):
    asyncio.run(clients.aclose())


@pytest.mark.parametrize("shut", [close, aclose])
def test_calls_may_finish_while_their_clients_are_closed(settings, provider, shut):
    """Within the grace."""
    hold = Hold()
    provider.always(hold)
    clients = Clients(grace=20)
    lm = clients.start("fast", "openai/test", **settings)
    with ThreadPoolExecutor(3) as pool:
        calls = [pool.submit(lm, "sync"), pool.submit(asyncio.run, lm.acall("async"))]
        provider.wait_for(2)
        closing = pool.submit(shut, clients)
        while lm.health().state != HealthState.CLOSED:
            time.sleep(0.001)
        with pytest.raises(ClientClosedError):
            lm("too late")
        hold.release()
        assert [each.result(20) for each in calls] == [["Paris"], ["Paris"]]
        closing.result(20)
    assert lm.health().in_flight == 0


@pytest.mark.parametrize("shut", [close, aclose])
def test_calls_that_take_too_long_are_ended(settings, provider, shut):
    """A hung request, a wait for a place, a pause before a retry, a follower: all at once."""
    provider.always(Hang())
    clients = Clients(grace=0.1)
    one = clients.start("one", "openai/one", limits=1, **settings | {"cache": True})
    two = clients.start("two", "openai/two", circuit=False, max_wait=600, **settings)
    two._runtime.random = lambda: 1.0
    with ThreadPoolExecutor(8) as pool:
        calls = [
            pool.submit(one, "leads"),
            *(pool.submit(one, "leads") for _ in range(2)),
            pool.submit(asyncio.run, one.acall("waits for a place")),
            pool.submit(two, "hangs"),
            pool.submit(asyncio.run, two.acall("hangs")),
        ]
        provider.wait_for(3)
        provider.always(Status(500))
        calls += [pool.submit(two, "pauses"), pool.submit(asyncio.run, two.acall("pauses"))]
        provider.wait_for(5)
        while one.health().in_flight < 4 or two.stats().retries < 2:
            time.sleep(0.001)
        shut(clients)
        for each in calls:
            with pytest.raises(ClientClosedError):
                each.result(20)
    assert one.health().in_flight == two.health().in_flight == 0
    assert len(one._runtime.flights) == 0
    assert one._runtime.routes.find(one, {}).limiter.queued == 0


async def test_on_a_loop_the_other_tasks_finish(settings, provider):
    """`async with` waits without blocking them."""
    hold = Hold()
    provider.script(hold)
    async with Clients(grace=20) as clients:
        lm = clients.start("fast", "openai/test", **settings)
        call = asyncio.ensure_future(lm.acall("hello"))
        await asyncio.to_thread(provider.wait_for, 1)
        asyncio.get_running_loop().call_later(0.05, hold.release)
    assert await call == ["Paris"]


async def test_closing_on_a_loop_does_not_block_it(settings, provider):
    """The sync way cannot let its tasks finish, so it ends them; a cancelled task it is not."""
    provider.script(Hang())
    clients = Clients(grace=600)
    lm = clients.start("fast", "openai/test", **settings)
    call = asyncio.ensure_future(lm.acall("hello"))
    await asyncio.to_thread(provider.wait_for, 1)
    clients.close()
    with pytest.raises(ClientClosedError):
        await call
    assert not call.cancelled()


async def test_a_stream_is_ended_like_any_other_call(settings, provider):
    """The consumer gets the error."""
    provider.answer = dspy_answers(lambda question: "one two three")
    provider.always(Hang())
    clients = Clients(grace=0)
    lm = clients.start("fast", "openai/test", **settings)
    program = dspy.streamify(dspy.Predict("question -> answer"))

    async def consume():
        with dspy.context(lm=lm):
            return [chunk async for chunk in program(question="q")]

    call = asyncio.ensure_future(consume())
    await asyncio.to_thread(provider.wait_for, 1)
    await clients.aclose()
    with pytest.raises(ClientClosedError):
        await call


@pytest.mark.parametrize("shut", [close, aclose])
def test_closing_is_idempotent_and_final(settings, shut):
    """Nothing can be started afterwards, and nothing is there."""
    clients = Clients()
    clients.start("fast", "openai/test", **settings)
    for _ in range(2):
        shut(clients)
    assert len(clients) == 0
    with pytest.raises(ClientClosedError):
        clients.start("fast", "openai/test", **settings)


def test_closing_leaves_connections_of_others_alone(settings, make):
    """It closes what it has opened."""
    other = make(cache=False)
    other("hello")
    with Clients() as clients:
        clients.start("fast", "openai/test", **settings)
        clients.request("fast", "hello")
    assert other("hello") == ["Paris"]
    assert other.stats().restarts == 0


def test_stopping_one_lets_the_others_be(clients, settings):
    """Each is a client of its own."""
    for name in ("a", "b"):
        clients.start(name, "openai/test", **settings)
        clients.request(name, "hello")
    clients.stop("a")
    assert clients.request("b", "hello") == ["Paris"]


def test_health_is_one_frozen_value_for_each_client(clients, settings, provider):
    """What an operator wants to see at a glance, without a secret."""
    hold = Hold()
    provider.script(hold)
    lm = clients.start("busy", "openai/test", limits=1, **settings)
    clients.start("open", "openai/test", **settings).circuit.force_open("maintenance", seconds=60)
    broken = clients.start("broken", "openai/test", **settings)
    for _ in range(3):
        broken._runtime.mend(broken._runtime.routes, broken.health().restarts, OSError())
    with pytest.raises(dspy.LMError):
        broken._runtime.mend(broken._runtime.routes, 3, OSError())
    with ThreadPoolExecutor(3) as pool:
        calls = [pool.submit(lm, f"{number}") for number in range(3)]
        while lm.health().queued < 2:
            time.sleep(0.001)
        health = clients.health()
        hold.release()
        assert [each.result(20) for each in calls] == [["Paris"]] * 3
    assert list(health) == ["busy", "open", "broken"]
    busy = health["busy"]
    assert (busy.client, busy.model, busy.state) == ("busy", "openai/test", HealthState.READY)
    assert (busy.in_flight, busy.queued, busy.restarts, busy.retry_after) == (3, 2, 0, None)
    assert health["open"].state is HealthState.OPEN
    assert 50 < health["open"].retry_after <= 60
    assert (health["broken"].state, health["broken"].restarts) == (HealthState.BROKEN, 3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        busy.state = "fine"
    assert SECRET not in f"{health!r} {clients!r}"


BAD = {
    "name": (lambda c: c.start(1, "openai/x"), TypeError, "name must be a str; got 1"),
    "empty": (lambda c: c.start("", "openai/x"), ValueError, "name must not be empty"),
    "grace": (lambda c: Clients(grace=-1), ValueError, "grace must be a number at least 0; got -1"),
    "grace type": (lambda c: Clients(grace="5"), TypeError, "grace must be a number at least 0"),
    "stop": (lambda c: c.stop("fast", grace=-1), ValueError, "grace must be a number at least 0"),
    "timeout": (
        lambda c: c.request("fast", "x", timeout=0),
        ValueError,
        "timeout must be a number greater than 0, or None; got 0",
    ),
    "timeout type": (lambda c: c.request("fast", "x", timeout="9"), TypeError, "timeout must be"),
    "unknown": (lambda c: c.request("slow", "x"), KeyError, "no client is called 'slow'"),
    "ours": (lambda c: c.request("fast", "x", limits=3), TypeError, "limits"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_by_name(clients, settings, case):
    """Argument, value and what is allowed (section 2)."""
    clients.start("fast", "openai/test", **settings)
    call, error, says = BAD[case]
    with pytest.raises(error, match=says):
        call(clients)
    assert "fast" in clients


def test_closed_clients_are_collected(settings):
    """Nothing global holds them."""
    clients = Clients()
    clients.start("fast", "openai/test", **settings)
    clients.request("fast", "hello")
    clients.close()
    gone = weakref.ref(clients)
    del clients
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("grace", [0, 0.05])
def test_an_lm_of_its_own_is_closed_with_a_grace_too(provider, make, grace):
    """`ResilientLM.close(grace=...)` is what `Clients` uses."""
    provider.always(Hang())
    lm = make(cache=False, deadline=600)
    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(lm, "sync"), pool.submit(asyncio.run, lm.acall("async"))]
        provider.wait_for(2)
        lm.close(grace=grace)
        for each in calls:
            with pytest.raises(ClientClosedError, match="before the call had finished"):
                each.result(20)


@pytest.mark.parametrize(("grace", "error"), [(-1, ValueError), ("5", TypeError)])
def test_a_bad_grace_closes_nothing(make, ask, grace, error):
    """It is refused by name, sync and async (section 2)."""
    lm = make(cache=False)
    with pytest.raises(error, match="grace must be a number at least 0, or None; got"):
        lm.close(grace=grace)
    with pytest.raises(error, match="grace"):
        asyncio.run(lm.aclose(grace=grace))
    assert ask(lm, "?") == ["Paris"]


def test_without_a_grace_calls_go_on(provider, make):
    """Closing takes nothing away from them."""
    hold = Hold()
    provider.script(hold)
    lm = make(cache=False)
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(lm, "sync")
        provider.wait_for(1)
        lm.close()
        hold.release()
        assert call.result(20) == ["Paris"]
