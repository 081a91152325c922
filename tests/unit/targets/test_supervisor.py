"""What counts as a break, and how many restarts are allowed."""

from __future__ import annotations

import threading

import dspy
import httpx
import openai
import pytest

from dspy_resilient import LimitPolicy, RestartLimitError
from dspy_resilient.cache.single_flight import Flights
from dspy_resilient.errors import BrokenStateError, LimitExceededError
from dspy_resilient.limits import Limiter
from dspy_resilient.outcomes import Kind, classify
from dspy_resilient.targets.supervisor import Supervisor
from dspy_resilient.testing import Clock, Garbage, Provider, Reset, Status


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


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Cannot send a request, as the client has been closed."),
        httpx.ReadError("Connection reset by peer"),
        dspy.LMServerError("connection error", status=500),
    ],
)
def test_what_fails_on_a_closed_client_of_ours_is_a_break(error):
    """Whatever it says: the client tells, not the words. Else it is the provider's failure."""
    assert classify(error, handed_off=True, broken=True).kind is Kind.BROKEN
    assert classify(error, handed_off=True).kind is not Kind.BROKEN


@pytest.mark.parametrize("fault", [Reset(), Status(500), Garbage()], ids=["reset", "500", "page"])
def test_what_the_provider_does_is_no_break(fault):
    """An answer is one, though the client is closed by the time that it is judged."""
    with Provider("Paris", faults=[fault]) as provider:
        client = openai.OpenAI(api_key="k", base_url=provider.api_base, max_retries=0)
        error = caught(lambda: client.chat.completions.create(model="m", messages=[]).choices[0])
        assert error is not None
        verdict = classify(error, handed_off=True)
        client.close()
    assert verdict.kind is Kind.FAILURE
    if isinstance(fault, Status):
        assert classify(error, handed_off=True, broken=True).kind is Kind.FAILURE


@pytest.mark.parametrize(
    "error",
    [
        dspy.LMServerError("Event loop is closed", status=500),
        RuntimeError("vLLM engine is dead"),
        ValueError("client has been closed"),
    ],
)
def test_words_of_a_provider_are_no_break(error):
    """Servers written in Python say such things, too."""
    assert classify(error, handed_off=True).kind is not Kind.BROKEN


def test_a_limiter_in_an_impossible_state_is_broken_state():
    """Whatever it raises that is no error of ours."""
    limiter = Limiter(LimitPolicy(max_concurrent=1, max_queue=0))
    assert limiter.enter().granted
    refused = caught(limiter.enter)
    assert isinstance(refused, LimitExceededError)
    limiter._queue = None
    assert isinstance(caught(limiter.enter), BrokenStateError)


def test_an_in_flight_table_in_an_impossible_state_is_broken_state():
    """The same for the other one."""
    flights = Flights()
    flights._flights = None
    assert isinstance(caught(flights.join, "key"), BrokenStateError)


def test_more_leaving_than_came_is_an_impossible_state():
    """A count below zero would let too many in for ever."""
    limiter = Limiter(LimitPolicy(max_concurrent=1))
    slot = limiter.enter()
    limiter._leases.in_use = 0
    assert isinstance(caught(slot.release), BrokenStateError)


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
