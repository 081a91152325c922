"""What counts as a break, and how many restarts are allowed."""

from __future__ import annotations

import asyncio
import threading

import aiohttp
import dspy
import httpx
import openai
import pytest

from dspy_resilient import LimitPolicy, RestartLimitError
from dspy_resilient.cache.single_flight import Flights
from dspy_resilient.errors import LimitExceededError
from dspy_resilient.limits import Limiter
from dspy_resilient.outcomes import Kind, classify
from dspy_resilient.outcomes.breaks import broke_state
from dspy_resilient.targets.supervisor import Supervisor
from dspy_resilient.testing import Clock, Garbage, Hold, Provider, Reset, Status


@pytest.fixture
def clock():
    return Clock(100.0)


def supervisor(clock, **options):
    return Supervisor(clock=clock, client="fast", **options)


def restart(watcher):
    """Restart because of a break that was seen just now."""
    with watcher.restart(watcher.generation) as is_due:
        return is_due


def caught(function, *args):
    """Return what `function` raises, as whoever catches it has it."""
    try:
        function(*args)
    except Exception as error:
        return error
    return None


def test_a_client_closed_before_the_request_is_a_break():
    """httpx and the OpenAI SDK refuse to send."""
    client = httpx.Client()
    client.close()
    assert classify(caught(client.get, "http://127.0.0.1:1")).kind is Kind.BROKEN
    sdk = openai.OpenAI(api_key="k", base_url="http://127.0.0.1:1", max_retries=0)
    sdk.close()
    assert classify(caught(sdk.models.list), handed_off=True).kind is Kind.BROKEN


def test_a_client_closed_under_a_request_is_a_break():
    """The error is that of a reset connection; the client in its traceback tells."""
    hold = Hold()
    with Provider("Paris", faults=[hold]) as provider, httpx.Client() as client:

        def close():
            provider.wait_for(1)
            client.close()
            hold.release()

        thread = threading.Thread(target=close)
        thread.start()
        error = caught(lambda: client.post(provider.api_base + "/chat/completions", json={}))
        thread.join()
    assert isinstance(error, httpx.ReadError)
    assert classify(error).kind is Kind.BROKEN


def test_a_client_whose_loop_is_gone_is_a_break():
    """Its pooled connection belongs to the loop that was closed."""

    async def get():
        response = await client.get(provider.url + "/v1/models")
        await response.aread()

    with Provider("Paris") as provider:
        client = httpx.AsyncClient()
        first = asyncio.new_event_loop()
        first.run_until_complete(get())
        first.close()
        error = caught(asyncio.run, get())
    assert "Event loop is closed" in str(error)
    assert classify(error).kind is Kind.BROKEN


@pytest.mark.filterwarnings("ignore:unclosed")
def test_two_loops_on_one_client_are_a_break():
    """What waits on one loop cannot be woken from another."""

    async def wait(event):
        await event.wait()

    event = asyncio.Event()
    with asyncio.Runner() as one:
        task = one.get_loop().create_task(wait(event))
        one.run(asyncio.sleep(0))
        error = caught(asyncio.run, wait(event))
        task.cancel()
    assert classify(error).kind is Kind.BROKEN


async def test_a_closed_aiohttp_session_is_a_break():
    """The third library that may be beneath."""
    session = aiohttp.ClientSession()
    await session.close()
    with pytest.raises(RuntimeError) as error:
        await session.get("http://127.0.0.1:1")
    assert classify(error.value).kind is Kind.BROKEN


@pytest.mark.parametrize("fault", [Reset(), Status(500), Garbage()], ids=["reset", "500", "page"])
def test_what_the_provider_does_is_no_break(fault):
    """Not even if the client is closed by the time somebody looks."""
    with Provider("Paris", faults=[fault]) as provider:
        client = openai.OpenAI(api_key="k", base_url=provider.api_base, max_retries=0)
        error = caught(lambda: client.chat.completions.create(model="m", messages=[]).choices[0])
        assert error is not None
        verdict = classify(error, handed_off=True)
        client.close()
    assert verdict.kind is Kind.FAILURE
    if not isinstance(fault, Reset):  # which cannot be told from a client closed under a request
        assert classify(error, handed_off=True).kind is Kind.FAILURE


@pytest.mark.parametrize(
    "error",
    [
        dspy.LMServerError("Event loop is closed", status=500),
        RuntimeError("vLLM engine is dead"),
        ValueError("client has been closed"),
    ],
)
def test_words_of_a_provider_are_no_break(error):
    """Servers written in Python say such things, too; only asyncio's own error counts."""
    assert classify(error, handed_off=True).kind is not Kind.BROKEN


def test_a_limiter_in_an_impossible_state_is_broken_state():
    """Whatever it raises that is no error of ours."""
    limiter = Limiter(LimitPolicy(max_concurrent=1, max_queue=0))
    assert limiter.enter().granted
    refused = caught(limiter.enter)
    assert isinstance(refused, LimitExceededError)
    assert not broke_state(refused)
    limiter._queue = None
    assert broke_state(caught(limiter.enter))


def test_an_in_flight_table_in_an_impossible_state_is_broken_state():
    """The same for the other one."""
    flights = Flights()
    flights._flights = None
    assert broke_state(caught(flights.join, "key"))
    assert not broke_state(caught(lambda: 1 / 0))


def test_more_leaving_than_came_is_an_impossible_state():
    """A count below zero would let too many in for ever."""
    limiter = Limiter(LimitPolicy(max_concurrent=1))
    slot = limiter.enter()
    limiter._leases.in_use = 0
    assert broke_state(caught(slot.leave))


def test_a_disbanded_limiter_wakes_its_queue():
    """Whoever waits there has to queue in the one that has taken its place."""
    limiter = Limiter(LimitPolicy(max_concurrent=1))
    limiter.enter()
    waiting = [limiter.enter() for _ in range(3)]
    limiter.disband()
    assert all(slot.future.done() and not slot.granted for slot in waiting)


def test_a_disbanded_table_leaves_leaders_to_answer_and_orphans_to_lead():
    """A restart takes nobody's answer away, and leaves nobody waiting for nothing."""
    flights = Flights()
    lead, follower = flights.join("led"), flights.join("led")
    flights.join("orphaned")
    orphans = [flights.join("orphaned") for _ in range(2)]
    orphans[0].flight.leads.clear()
    flights.disband()
    assert not follower.future.done()
    lead.land("answer")
    assert follower.future.result(0).answer == "answer"
    orphans[0].future.result(0).land("found")
    assert orphans[1].future.result(0).answer == "found"


def test_three_restarts_within_the_window_are_allowed(clock):
    """The fourth is refused with the time until it would be allowed, and so are calls."""
    watcher = supervisor(clock)
    assert watcher.refusal() is None
    for _ in range(3):
        assert restart(watcher)
        clock.advance(1.0)
    assert watcher.refusal() is None
    with pytest.raises(RestartLimitError, match=r"'fast'.*3 times within 5 s") as error:
        restart(watcher)
    assert error.value.retry_after == pytest.approx(2.0)
    assert error.value.client == "fast"
    assert watcher.refusal().retry_after == pytest.approx(2.0)


def test_the_window_slides(clock):
    """Once the oldest restart is five seconds old there may be another."""
    watcher = supervisor(clock)
    for _ in range(3):
        restart(watcher)
    assert caught(restart, watcher) is not None
    clock.advance(4.9)
    assert watcher.refusal() is not None
    clock.advance(0.2)
    assert watcher.refusal() is None
    assert restart(watcher)


def test_slow_breaks_never_exceed_the_limit(clock):
    """One every two seconds may go on for ever."""
    watcher = supervisor(clock)
    for _ in range(50):
        assert restart(watcher)
        clock.advance(2.0)


def test_a_manual_restart_clears_the_record(clock):
    """A person may know more."""
    watcher = supervisor(clock)
    for _ in range(3):
        restart(watcher)
    assert caught(restart, watcher) is not None
    watcher.forgive()
    assert watcher.refusal() is None
    assert restart(watcher)


def test_a_break_that_a_hundred_calls_saw_is_one_restart(clock):
    """Whoever comes later, or meanwhile, finds it mended."""
    watcher = supervisor(clock)
    seen = watcher.generation
    with watcher.restart(seen) as first, watcher.restart(seen) as meanwhile:
        assert (first, meanwhile) == (True, False)
    for _ in range(100):
        with watcher.restart(seen) as later:
            assert not later
    assert watcher.generation == 1


def test_a_restart_that_fails_is_over_nevertheless(clock):
    """The next break gets its turn."""
    watcher = supervisor(clock)
    with pytest.raises(KeyError), watcher.restart(0):
        raise KeyError
    assert restart(watcher)


def test_threads_at_once_restart_once(clock):
    """However many find the break at the same moment."""
    watcher, turns, barrier = supervisor(clock), [], threading.Barrier(16)

    def find_broken():
        barrier.wait(10)
        with watcher.restart(0) as is_due:
            turns.append(is_due)

    threads = [threading.Thread(target=find_broken) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert sorted(turns) == [False] * 15 + [True]


def test_a_forked_child_restarts_for_itself(clock):
    """What another thread of the parent had under way does not exist there."""
    watcher = supervisor(clock)
    with watcher.restart(0):
        watcher._lock.acquire()
        watcher.renew()  # as the child does
        assert restart(watcher)
