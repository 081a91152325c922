"""50 callers and a provider that is down: what reaches it, and when."""

from __future__ import annotations

import asyncio
import threading
from bisect import bisect_left
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import dspy
import pytest

from dspy_resilient import CircuitPolicy, RetryPolicy
from dspy_resilient.events import CircuitHalfOpened, RetryScheduled

CALLERS = 50


@pytest.fixture(params=["threads", "tasks"])
def storm(request):
    """Let 50 callers call at once; return what each was told."""

    def in_threads(lm, callers=range(CALLERS)):
        barrier, told = threading.Barrier(len(callers)), []

        def call(number):
            barrier.wait()
            try:
                lm(f"caller {number}")
            except dspy.LMError as error:
                told.append(error)

        threads = [threading.Thread(target=call, args=(n,)) for n in callers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(50)
        return told

    def in_tasks(lm, callers=range(CALLERS)):
        async def gather():
            calls = (lm.acall(f"caller {n}") for n in callers)
            return await asyncio.gather(*calls, return_exceptions=True)

        return asyncio.run(gather())

    def in_both(lm):
        half = CALLERS // 2
        with ThreadPoolExecutor(1) as pool:
            tasks = pool.submit(in_tasks, lm, range(half))
            return in_threads(lm, range(half, CALLERS)) + tasks.result()

    return {"threads": in_threads, "tasks": in_tasks, "both": in_both}[request.param]


def retries_of(provider):
    """Return when each request arrived that was not its caller's first."""
    seen, retries = Counter(), []
    for request in provider.requests:
        caller = request.body["messages"][-1]["content"]
        seen[caller] += 1
        if seen[caller] > 1:
            retries.append(request.at)
    return sorted(retries)


def worst(times):
    """Return how many of `times` fall within the worst 100 ms."""
    return max((bisect_left(times, at + 0.1) - n for n, at in enumerate(times)), default=0)


@pytest.mark.parametrize("storm", ["threads", "tasks", "both"], indirect=True)
def test_an_outage_is_not_multiplied(provider, make, storm):
    """What was under way at the opening, and the probes: nothing more reaches it.

    Under way are the first attempts of all, and the second ones of those whose failures have been
    counted until then, if the others are slow.
    """
    events = []
    circuit = CircuitPolicy(failure_threshold=5, recovery_time=0.3, jitter=0.0)
    lm = make(circuit=circuit, max_wait=2.0, cache=False, on_event=events.append)
    provider.latency = 0.02
    provider.down("500")
    told = storm(lm)
    probes = sum(isinstance(each, CircuitHalfOpened) for each in events)
    retries = retries_of(provider)
    assert len(told) == CALLERS
    assert probes >= 1
    second = circuit.failure_threshold - 1
    assert provider.count <= CALLERS + second + probes
    assert len(retries) <= second + probes


def test_retries_are_spread(provider, make, storm):
    """No 100 ms holds more than a fifth of them."""
    events = []
    retry = RetryPolicy(base=0.5)
    lm = make(circuit=False, cache=False, retry=retry, max_wait=0, on_event=events.append)
    provider.down("500")
    assert len(storm(lm)) == CALLERS
    due = sorted(e.at + e.seconds for e in events if isinstance(e, RetryScheduled))
    assert len(due) == len(retries_of(provider)) == 3 * CALLERS
    assert worst(due) <= len(due) / 5
