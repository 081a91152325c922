"""Calls whose event loop is closed under them, as notebooks and test frameworks do.

Nothing will ever go on with such a call, and its task may be held by a caller for good: what it
holds comes back all the same, as the loop is closed.
"""

from __future__ import annotations

import asyncio
import contextvars
import gc
import subprocess
import sys
import time
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from dspy_resilient import LimitPolicy, ResilientLM
from dspy_resilient._support.loop_close import when_closed
from dspy_resilient.testing import Hold, rate_limited

PATIENCE = 20.0
"""Seconds for what takes one on a quiet machine."""

pytestmark = [
    # of what the closed loop leaves to the collector, which ends it in a context that is not its own
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:coroutine 'ServiceLogging:RuntimeWarning"),
]


@pytest.fixture(scope="module")
def kept():
    """The tasks, which nobody collects before the end."""
    tasks = []
    yield tasks
    tasks.clear()
    gc.collect()


@pytest.fixture
def strand(provider, kept):
    """Make calls on a loop and close it under them.

    `strand(lm, "a", "b")` makes one call for each prompt; `requests` of them reach the provider
    before the loop is closed, which `meanwhile`, if given, precedes.
    """

    def strand(lm, *prompts, requests=1, meanwhile=lambda: None):
        loop = asyncio.new_event_loop()
        tasks = [loop.create_task(lm.acall(each)) for each in prompts]
        awaited = provider.count + requests

        def are_under_way():
            return provider.count >= awaited and len(lm._runtime.in_flight) >= len(prompts)

        loop.run_until_complete(asyncio.to_thread(wait_until, are_under_way))
        meanwhile()
        loop.close()
        kept.extend(tasks)

    return strand


@pytest.fixture
def waiting(ask):
    """Begin calls on threads of their own: `waiting(lm, "q")` returns the future of one."""
    with ThreadPoolExecutor(4) as pool:

        def begin(lm, prompt):
            in_flight = len(lm._runtime.in_flight)
            future = pool.submit(ask, lm, prompt)
            wait_until(lambda: len(lm._runtime.in_flight) > in_flight)
            time.sleep(0.02)  # it joins
            return future

        yield begin


@pytest.fixture
def hold(provider):
    """Hold the first request, and answer the others."""
    hold = Hold()
    provider.script(hold)
    yield hold
    hold.release()


def wait_until(condition):
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_follower_that_waits_takes_the_lead(provider, make, strand, waiting, hold):
    """Behind a leader that never runs again, one who waits sends."""
    lm = make()
    followers = []
    strand(lm, "q", meanwhile=lambda: followers.extend(waiting(lm, "q") for _ in range(2)))
    assert [each.result(PATIENCE) for each in followers] == [["Paris"]] * 2
    assert provider.count == 2


def test_follower_that_comes_later_takes_the_lead(provider, make, strand, ask, hold):
    """Nobody comes to wait behind a leader that never runs again."""
    lm = make()
    strand(lm, "q")
    assert ask(lm, "q") == ["Paris"]
    assert provider.count == 2


def test_lead_is_left_to_no_follower_of_the_same_loop(provider, make, strand, waiting, hold):
    """The one who has waited longest is as dead as the leader."""
    lm = make()
    followers = []
    strand(lm, "q", "q", "q", meanwhile=lambda: followers.append(waiting(lm, "q")))
    assert followers[0].result(PATIENCE) == ["Paris"]
    assert len(lm._runtime.flights) == 0


def test_place_comes_back_to_who_waits_for_it(make, strand, waiting, hold):
    """Also past those of the same loop who stand in the queue before them."""
    lm = make(cache=False, limits=LimitPolicy(max_concurrent=1))
    behind = []
    strand(lm, "a", "b", "c", meanwhile=lambda: behind.append(waiting(lm, "d")))
    assert behind[0].result(PATIENCE) == ["Paris"]
    limiter = lm._runtime.all_routes()[0].limiter
    assert (limiter.in_use, limiter.queued) == (0, 0)


def test_place_comes_back_to_who_would_be_refused(make, strand, ask, hold):
    """A queue full of the dead is soon a queue again."""
    lm = make(cache=False, limits=LimitPolicy(max_concurrent=1, max_queue=1))
    strand(lm, "a", "b")
    assert ask(lm, "c") == ["Paris"]


def test_place_that_another_client_lends_comes_back(provider, make, strand, ask, hold):
    """A fallback's limits are the lender's own."""
    lender = make("openai/lent", cache=False, limits=LimitPolicy(max_concurrent=1))
    lm = make("openai/down", cache=False, fallbacks=[lender], max_wait=0)
    lm.circuit.force_open()
    strand(lm, "q")
    assert ask(lender, "q") == ["Paris"]


@pytest.mark.parametrize("max_wait", [0, 30])
def test_probe_comes_back(make, strand, ask, hold, max_wait):
    """To a caller that waits for its verdict and to one that would not."""
    lm = make(cache=False, max_wait=max_wait)
    lm.circuit.force_half_open()
    strand(lm, "q")
    if not max_wait:
        time.sleep(lm.circuit.wait_time())
    started = time.monotonic()
    assert ask(lm, "q") == ["Paris"]
    assert time.monotonic() - started < PATIENCE


def test_pass_of_the_gate_comes_back(provider, make, strand, ask):
    """The one call that may go after a 429."""
    hold = Hold()
    provider.script(rate_limited(0.01), hold)
    lm = make(cache=False)
    strand(lm, "q", requests=2)
    assert ask(lm, "q") == ["Paris"]
    hold.release()


def test_call_is_under_way_no_more(provider, make, strand, hold):
    """A client that is closed waits for no call that cannot end, and health counts none."""
    lm = make(cache=False)
    strand(lm, "q")
    assert lm.health().in_flight == 0
    provider.script(hold)
    strand(lm, "q")
    started = time.monotonic()
    lm.close(grace=PATIENCE)
    assert time.monotonic() - started < PATIENCE / 2


@pytest.mark.parametrize("turns", [1, 2, 3], ids=["not begun", "begun", "under way"])
def test_what_was_being_closed_keeps_no_loop(make, caplog, turns):
    """Nothing goes on closing it once that loop is closed, and nobody complains."""
    gc.collect()  # for a circuit of an earlier test that listens, LiteLLM reports, on this loop
    lm = make(cache=False)
    loop = asyncio.new_event_loop()
    gone = weakref.ref(loop)
    loop.run_until_complete(lm.acall("q"))
    lm.restart()
    for _ in range(turns):
        loop.call_soon(loop.stop)
        loop.run_forever()
    loop.close()
    del loop
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        gc.collect()
    assert not [each for each in told if "coroutine 'close'" in str(each.message)]
    told.clear()  # they hold what they warn of
    gc.collect()
    assert gone() is None
    assert "coro=<close()" not in caplog.text


@pytest.mark.parametrize("restarts", [False, True])
def test_its_memory_comes_back(make, strand, kept, hold, restarts):
    """With its loop, connections included."""
    lm = make()
    strand(lm, "q")
    task = weakref.ref(kept.pop())
    if restarts:
        lm.restart()
    assert lm.health().in_flight == 0
    gc.collect()
    assert task() is None


def test_collector_ends_no_call(provider, kept, hold):
    """In the middle of `ContextVar.set` CPython 3.11 would not survive what LiteLLM sets then.

    A call is held until its loop is closed, and then it is ended in a context of its own.
    """
    lm = ResilientLM("openai/test", api_base=provider.api_base, api_key="dummy-key-for-tests")
    loop = asyncio.new_event_loop()
    task = weakref.ref(loop.create_task(lm.acall("q")))
    loop.run_until_complete(asyncio.to_thread(provider.wait_for, 1))
    del lm
    gc.collect()
    assert task() is not None
    callers = contextvars.Context()
    callers.run(loop.close)
    assert not [*callers]
    del loop
    gc.collect()
    assert task() is None


def test_a_loop_that_is_closed_tells_each_listener_once():
    """As it is closed, and neither before nor after."""
    loop, told = asyncio.new_event_loop(), []
    for name in "ab":
        loop.call_soon(when_closed, loop, partial(told.append, name))
    loop.run_until_complete(asyncio.sleep(0.01))
    gc.collect()
    assert told == []
    loop.close()
    assert sorted(told) == ["a", "b"]
    loop.close()
    del loop
    gc.collect()
    assert len(told) == 2


def test_no_wait_looks_around(make, waiting, provider, hold, monkeypatch):
    """A call that waits is woken by what it waits for, and by nothing before."""
    lm = make(cache=False, limits=LimitPolicy(max_concurrent=1))
    first = waiting(lm, "first")
    provider.wait_for(1)
    looked = []
    limiter = lm._runtime.all_routes()[0].limiter
    monkeypatch.setattr(
        limiter, "poll", lambda slot, _poll=limiter.poll: looked.append(slot) or _poll(slot)
    )
    second = waiting(lm, "second")
    before = len(looked)
    time.sleep(1.2)
    assert len(looked) == before
    hold.release()
    assert [each.result(PATIENCE) for each in (first, second)] == [["Paris"]] * 2


WOKEN_AND_STRANDED = """
import asyncio, gc
from dspy_resilient import ResilientLM, providers

providers.load()
lm = ResilientLM("openai/m", api_base="http://127.0.0.1:9/v1", api_key="k", cache=False, max_wait=60)
lm.circuit.trip()
gc.disable()

async def ask():
    await lm.acall("q")

async def turn():
    await asyncio.sleep(0.1)

loop = asyncio.new_event_loop()
task = loop.create_task(ask())
loop.run_until_complete(turn())
lm.circuit.reset()
loop.call_soon(loop.stop)
loop.run_forever()
loop.close()
middle = task.get_coro().cr_await
waits = middle.cr_await
del loop, task
middle.close()
assert waits.cr_frame is None
print("alive")
"""


ENDED_BY_TWO_THREADS = """
import asyncio, threading
from dspy_resilient.pipeline.in_flight import InFlight

running = InFlight().call()
ending, both = threading.Event(), threading.Event()

async def call():
    with running:
        try:
            await woken
        finally:
            ending.set()
            both.wait(20)

async def ask():
    coroutine = call()
    running.depend_on(loop, asyncio.current_task(), coroutine)
    await coroutine

loop = asyncio.new_event_loop()
woken = loop.create_future()
loop.create_task(ask())
loop.call_soon(woken.set_result, None)
loop.call_soon(loop.stop)
loop.run_forever()
loop.close()
del loop, woken
first = threading.Thread(target=running.end)
first.start()
ending.wait(20)
running.end()
both.set()
first.join()
print("alive")
"""


@pytest.mark.parametrize("program", [WOKEN_AND_STRANDED, ENDED_BY_TWO_THREADS], ids=["wait", "end"])
def test_no_call_is_closed_while_it_is_being_closed(program):
    """Neither by a task that the collector finds, nor by one that another thread lets go of."""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr
    assert "already executing" not in done.stderr
