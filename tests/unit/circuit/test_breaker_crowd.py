"""A circuit among many callers: threads, tasks, and threads beside several event loops.

A caller is written once, as a generator that yields the futures it waits for.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import os
import random
import threading
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from circuitbreaker import CircuitBreakerMonitor

from dspy_resilient.circuit import CircuitBreaker
from dspy_resilient.events import CircuitClosed, CircuitHalfOpened, CircuitOpened
from dspy_resilient.limits import ThrottleGate
from dspy_resilient.policies import CircuitPolicy
from dspy_resilient.testing import Clock

PATIENCE = 30


class ServerError(Exception):
    pass


def on_thread(caller):
    value = None
    while True:
        try:
            future = caller.send(value)
        except StopIteration as end:
            return end.value
        value = future.result(PATIENCE)


async def as_task(caller):
    value = None
    while True:
        try:
            future = caller.send(value)
        except StopIteration as end:
            return end.value
        value = await asyncio.wait_for(asyncio.wrap_future(future), PATIENCE)


def on_threads(callers):
    with ThreadPoolExecutor(max(1, len(callers))) as pool:
        return list(pool.map(on_thread, callers))


def on_loop(callers):
    async def gather():
        return await asyncio.gather(*map(as_task, callers))

    return asyncio.run(gather())


def on_both(callers):
    third = len(callers) // 3
    parts = callers[:third], callers[third : 2 * third], callers[2 * third :]
    with ThreadPoolExecutor(3) as pool:
        results = pool.map(lambda run, part: run(part), (on_threads, on_loop, on_loop), parts)
        return [result for part in results for result in part]


@pytest.fixture(params=[on_threads, on_loop, on_both])
def crowd(request):
    """Run many callers at once and return their results."""
    return request.param


class Meeting:
    """`yield meeting.join()` goes on when `size` callers have joined."""

    def __init__(self, size):
        self._missing = size
        self._lock = threading.Lock()
        self._complete = Future()

    def join(self):
        with self._lock:
            self._missing -= 1
            complete = self._missing == 0
        if complete:
            self._complete.set_result(None)
        return self._complete


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def half_open(clock):
    """Build a circuit whose open time is just over."""

    def build(**policy):
        breaker = CircuitBreaker(CircuitPolicy(jitter=0.0, **policy), clock=clock)
        breaker.trip()
        clock.advance(breaker.open_remaining)
        return breaker

    return build


# Probes


def test_reopening_admits_exactly_one(crowd, half_open, clock):
    """Of 999 callers at the reopening exactly one reaches the provider, and at each that follows."""
    breaker = half_open()
    asking, asked, again, over = (Meeting(999) for _ in range(4))

    def caller(number):
        yield asking.join()
        first = breaker.try_admit()
        yield asked.join()
        if number == 0:
            clock.advance(breaker.wait_time())
        yield again.join()
        second = breaker.try_admit()
        yield over.join()
        return first, second

    admitted = list(zip(*crowd([caller(number) for number in range(999)]), strict=True))
    for permits in admitted:
        (probe,) = [permit for permit in permits if permit is not None]
        assert probe.probe
    assert breaker.rejected == 2 * 998


def test_calls_run_side_by_side(crowd):
    """The lock is not held during a call: all are inside at once."""
    breaker = CircuitBreaker(CircuitPolicy())
    inside = Meeting(30)

    def caller():
        with breaker:
            yield inside.join()
        return True

    assert all(crowd([caller() for _ in range(30)]))


def test_every_failure_is_counted(crowd):
    """No report is lost, whoever reports."""
    breaker = CircuitBreaker(CircuitPolicy(failure_threshold=10_000, min_calls=100_000))
    start = Meeting(30)

    def caller():
        yield start.join()
        for _ in range(100):
            breaker.admit().failure()

    crowd([caller() for _ in range(30)])
    assert breaker.failure_count == 3000


def test_neutral_results_neither_count_nor_reset(crowd):
    """However many calls say nothing about the provider, four failures stay four."""
    breaker = CircuitBreaker(CircuitPolicy())
    for _ in range(4):
        breaker.admit().failure()
    start = Meeting(30)

    def caller(number):
        yield start.join()
        for turn in range(40):
            permit = breaker.admit()
            if (number + turn) % 2:
                permit.neutral()
            else:
                with permit:
                    pass

    crowd([caller(number) for number in range(30)])
    assert (breaker.state, breaker.failure_count) == ("closed", 4)
    breaker.admit().failure()
    assert breaker.state == "open"


def test_unexpected_exceptions_neither_count_nor_reset(crowd):
    """The same in the package's form, where only some exceptions are failures."""
    breaker = CircuitBreaker(5, expected_exception=ConnectionError)
    start = Meeting(30)

    def refuse():
        raise ValueError("400")

    def lose():
        raise ConnectionError

    def caller(number):
        yield start.join()
        for _ in range(10):
            with pytest.raises(ValueError, match="400"):
                breaker.call(refuse)
        if number % 8 == 0:
            with pytest.raises(ConnectionError):
                breaker.call(lose)

    crowd([caller(number) for number in range(30)])
    assert (breaker.state, breaker.failure_count) == ("closed", 4)


def test_namesakes_built_at_once_are_all_found(crowd):
    """However many take one name at once, none hides another in the monitor."""
    start = Meeting(30)

    def caller():
        yield start.join()
        return CircuitBreaker(CircuitPolicy(), name="namesake")

    breakers = crowd([caller() for _ in range(30)])
    assert len({breaker.name for breaker in breakers}) == 30
    assert all(CircuitBreakerMonitor.get(breaker.name) == breaker for breaker in breakers)


def test_longest_pause_that_a_crowd_is_told_holds(crowd, clock):
    """Of 429s that arrive at once, none shortens what another has asked for."""
    gate = ThrottleGate(clock=clock)
    passes = [gate.admit() for _ in range(30)]
    start = Meeting(30)

    def caller(number):
        yield start.join()
        hint = 1.0 + number * 7 % 30
        return passes[number].throttled(hint) >= hint

    assert all(crowd([caller(number) for number in range(30)]))
    assert gate.wait_time() == gate.hint == 30


def test_one_permit_reported_by_many_counts_once(crowd):
    """Whoever reports first wins, on whatever thread."""
    breaker = CircuitBreaker(CircuitPolicy())
    permit = breaker.admit()
    start = Meeting(30)

    def caller():
        yield start.join()
        permit.failure()

    crowd([caller() for _ in range(30)])
    assert breaker.failure_count == 1


def test_results_from_before_the_trip_change_nothing(crowd, clock):
    """Calls that began before the trouble did neither close nor prolong it."""
    breaker = CircuitBreaker(CircuitPolicy(jitter=0.0, recovery_time=5.0), clock=clock)
    inside = Meeting(31)
    tripped = Future()

    def caller(number):
        permit = breaker.admit()
        yield inside.join()
        yield tripped
        if number % 2:
            permit.success()
        else:
            permit.failure()

    def trip():
        yield inside.join()
        clock.advance(1)
        breaker.trip()
        clock.advance(2)
        tripped.set_result(None)

    crowd([*(caller(number) for number in range(30)), trip()])
    assert breaker.state == "open"
    assert breaker.open_remaining == 3


def test_the_first_answer_closes_it_whoever_brings_it(crowd, clock):
    """Of thirty attempts that were under way when it opened, each may."""
    breaker = CircuitBreaker(CircuitPolicy(jitter=0.0), clock=clock)
    for _ in range(4):
        breaker.admit().failure()
    inside, opened = Meeting(30), Future()

    def caller(number):
        permit = breaker.admit()
        yield inside.join()
        if number == 0:
            permit.failure()
            assert breaker.opened
            opened.set_result(None)
        yield opened
        if number:
            permit.success()

    crowd([caller(number) for number in range(30)])
    assert breaker.closed


# Probes that come to nothing


ENDS = ["cancelled", "interrupted", "unreported", "abandoned", "lost"]


@pytest.mark.parametrize("end", ENDS)
def test_probe_that_comes_to_nothing_holds_up_no_other(crowd, half_open, clock, end):
    """Wherever probes end without a verdict, the next goes in its time, wherever that is."""
    breaker = half_open(backoff=1.0)
    turns = [Future() for _ in range(31)]
    turns[0].set_result(None)

    @breaker
    def items():
        yield 1
        yield 2

    def probe():
        match end:
            case "unreported":
                with breaker.admit():
                    pass
            case "abandoned":
                running = items()
                next(running)
                running.close()
            case "lost":
                breaker.admit()
            case _:
                error = asyncio.CancelledError if end == "cancelled" else KeyboardInterrupt
                with pytest.raises(error), breaker:
                    raise error

    def caller(number):
        yield turns[number]
        probe()
        found = breaker.state, breaker.wait_time(), breaker.failure_count
        clock.advance(1)
        turns[number + 1].set_result(None)
        return found

    state = "half_open" if end == "lost" else "open"
    assert crowd([caller(number) for number in range(30)]) == [(state, 1, 0)] * 30


@pytest.mark.parametrize("form", ["decorator", "block", "permit"])
async def test_cancelled_probe_leaves_it_open(half_open, form):
    """A cancelled probe closes nothing and counts for nothing; the next has its time already."""
    breaker = half_open()

    async def hang():
        await asyncio.Event().wait()

    async def in_block():
        with breaker:
            await hang()

    async def with_permit():
        with breaker.admit():
            await hang()

    work = {"decorator": breaker(hang), "block": in_block, "permit": with_permit}[form]
    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    assert breaker.state == "half_open"
    wait = breaker.wait_time()
    assert wait > 0
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (breaker.state, breaker.wait_time(), breaker.failure_count) == ("open", wait, 0)


async def test_timed_out_probe_leaves_it_open(half_open):
    """A caller that loses patience has cancelled."""
    breaker = half_open()

    @breaker
    async def hang():
        await asyncio.Event().wait()

    with pytest.raises(TimeoutError):
        await asyncio.wait_for(hang(), 0.001)
    assert breaker.state == "open"


def test_hanging_probes_keep_nothing_from_recovering(crowd, half_open, clock):
    """However many hang, the next is sent in its time, and its answer closes the circuit."""
    breaker = half_open(backoff=1.0)
    admitted, recovered = [Future() for _ in range(6)], Future()
    admitted[0].set_result(None)

    def hanging(number):
        yield admitted[number]
        with breaker.admit() as permit:
            clock.advance(1)
            admitted[number + 1].set_result(None)
            yield recovered
            permit.failure()

    def healthy():
        yield admitted[5]
        breaker.admit().success()
        recovered.set_result(None)

    crowd([*(hanging(number) for number in range(5)), healthy()])
    assert breaker.closed


def test_generator_closed_in_the_middle_of_the_circuit_is_no_deadlock(half_open, clock):
    """The collector may end a generator on the thread that is inside the circuit."""
    breaker = half_open()
    running = breaker(lambda: (yield 1))()
    next(running)

    class Collecting(Clock):
        def __call__(self):
            running.close()
            return clock()

    breaker._clock = Collecting()
    worker = threading.Thread(target=breaker.try_admit, daemon=True)
    worker.start()
    worker.join(PATIENCE)
    assert not worker.is_alive()
    assert breaker.state == "open"


# Waiting


def test_nobody_waits_for_a_closed_circuit():
    """Where a call would be let through, a waiter is called at once."""
    breaker = CircuitBreaker(CircuitPolicy())
    assert breaker.wait_time() == 0
    assert breaker.recheck_time() == 0
    assert breaker.enlist().done()


def test_waiter_of_an_open_circuit_waits_its_time(clock):
    """The open time is exact, and its end needs no call."""
    breaker = CircuitBreaker(CircuitPolicy(jitter=0.0, recovery_time=5.0), clock=clock)
    breaker.trip()
    waiter = breaker.enlist()
    assert not waiter.done()
    assert breaker.recheck_time() == breaker.wait_time() == 5
    clock.advance(5)
    assert breaker.wait_time() == 0
    assert breaker.enlist().done()


def test_forced_open_needs_a_hand(clock):
    """Where only a person can help, no time is promised."""
    breaker = CircuitBreaker(CircuitPolicy(), clock=clock)
    breaker.force_open()
    assert breaker.recheck_time() == math.inf
    waiter = breaker.enlist()
    breaker.auto()
    assert waiter.done()


@pytest.mark.parametrize("end", ["success", "force_half_open", "force_closed", "reset"])
def test_what_lets_a_call_through_calls_all(half_open, end):
    """An answer, and a hand, concern all who wait."""
    breaker = half_open()
    probe = breaker.admit()
    waiters = [breaker.enlist() for _ in range(5)]
    getattr(probe if hasattr(probe, end) else breaker, end)()
    assert all(waiter.done() for waiter in waiters)


@pytest.mark.parametrize("end", ["failure", "neutral"])
def test_a_probe_without_an_answer_calls_none(half_open, end):
    """Each knows for how long to wait."""
    breaker = half_open()
    probe = breaker.admit()
    waiter = breaker.enlist()
    getattr(probe, end)()
    assert not waiter.done()


def test_waiter_that_left_is_not_called(half_open):
    """A caller that has left keeps no place in line, nor does one whose future is cancelled."""
    breaker = half_open()
    probe = breaker.admit()
    first, second, third = (breaker.enlist() for _ in range(3))
    breaker.leave(first)
    second.cancel()
    probe.success()
    assert not first.done()
    assert third.done()


def test_leaving_twice_or_as_a_stranger_does_no_harm(half_open):
    """`leave` is safe in any `finally`."""
    breaker = half_open()
    probe = breaker.admit()
    waiter = breaker.enlist()
    for each in (waiter, waiter, Future()):
        breaker.leave(each)
    probe.success()
    assert not waiter.done()


def test_waiters_are_resolved_without_the_lock(half_open):
    """What hangs on a waiter may use the circuit, from any thread."""
    breaker = half_open()
    seen = []

    def look(_):
        reader = threading.Thread(target=lambda: seen.append(breaker.state), daemon=True)
        reader.start()
        reader.join(PATIENCE)

    probe = breaker.admit()
    breaker.enlist().add_done_callback(look)
    probe.success()
    assert seen == ["closed"]


def test_one_wait_is_news_once(clock):
    """Of all who wait for the same end one tells of it; readings of it differ a little."""
    breaker = CircuitBreaker(CircuitPolicy(), clock=clock)
    assert [breaker.is_news(until) for until in (30.0, 30.0, 31.0, 29.0)] == [True, *[False] * 3]
    assert [breaker.is_news(until) for until in (31.5, 32.0, 32.6)] == [True, False, True]


# Everything at once


def test_nothing_wears_out(crowd):
    """Whatever hundreds of callers do, the circuit ends up usable and says what it is."""
    events = []
    breaker = CircuitBreaker(
        CircuitPolicy(recovery_time=1e-6, max_recovery_time=1e-6, failure_threshold=3),
        listener=events.append,
    )

    def caller(number):
        dice = random.Random(number)
        for _ in range(100):
            permit = breaker.try_admit()
            if permit is None:
                waiter = breaker.enlist()
                breaker.leave(waiter)
            elif dice.random() < 0.9:
                dice.choice([permit.success, permit.failure, permit.neutral])()
            else:
                dice.choice([breaker.trip, breaker.reset, breaker.force_half_open, breaker.auto])()
                permit.neutral()
        return
        yield

    crowd([caller(number) for number in range(30)])
    breaker.force_half_open()
    breaker.admit().success()
    assert breaker.closed
    for before, after in itertools.pairwise(events):
        assert before.at <= after.at
        assert not (type(before) is CircuitClosed and type(after) is CircuitClosed)
    assert {type(event) for event in events} == {CircuitOpened, CircuitHalfOpened, CircuitClosed}


# Fork


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("state", ["closed", "open", "half_open"])
@pytest.mark.parametrize("held", [False, True])
def test_child_of_a_fork_goes_on(state, held):
    """A lock that another thread held at the fork, and a waiter, stay behind."""
    breaker = CircuitBreaker(CircuitPolicy(recovery_time=200.0))
    if state != "closed":
        breaker.trip()
        breaker.enlist()
    if state == "half_open":
        breaker.force_half_open()
    locked, may_go = threading.Event(), threading.Event()

    def hold():
        with breaker._lock:
            locked.set()
            may_go.wait()

    holder = threading.Thread(target=hold, daemon=True)
    if held:
        holder.start()
        locked.wait()
    child = os.fork()
    if child == 0:
        usable = False
        try:
            expected = "closed" if held else state
            found, waiting = breaker.state, breaker._notifier.waiting
            permit = breaker.try_admit()
            if expected != "open":
                permit.success()
            opened = permit is None and breaker.opened
            usable = (found, waiting) == (expected, 0) and opened == (expected == "open")
        finally:
            os._exit(0 if usable else 1)
    may_go.set()
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert breaker.state == state
