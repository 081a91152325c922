"""When 429s close the gate, for how long, and how it opens again."""

from __future__ import annotations

import math
import os
import random
import threading

import pytest

from dspy_resilient.events import Throttled
from dspy_resilient.limits import ThrottleGate
from dspy_resilient.testing import Clock


@pytest.fixture
def clock():
    return Clock(100.0)


@pytest.fixture
def make(clock):
    """Build a gate on the test's clock that draws the longest pauses unless told otherwise."""

    def build(*, random=lambda: 1.0, **options):
        return ThrottleGate(clock=clock, random=random, **options)

    return build


def close(gate, hint=None):
    """Let one call meet a 429; return for how long the gate is closed."""
    return gate.admit().throttled(hint)


def pass_through(gate, clock):
    """Wait out the gate's pause, and return the permit of the first call after it."""
    clock.advance(gate.wait_time())
    return gate.admit()


def in_flight(gate):
    """Take every pass that may be had now."""
    permits = []
    while (permit := gate.admit()) is not None:
        permits.append(permit)
        assert len(permits) <= 1000
    return permits


# How long it closes


def test_open_gate_lets_everybody_through(make):
    """Without a 429 there is no gate."""
    gate = make()
    permits = [gate.admit() for _ in range(1000)]
    assert None not in permits
    for permit in permits:
        permit.answered()
    assert (gate.wait_time(), gate.hint) == (0, None)


def test_hint_closes_it_for_so_long(make, clock):
    """A 429 closes the gate for what the provider asked for, exactly."""
    gate = make()
    assert close(gate, 7.5) == 7.5
    assert gate.admit() is None
    clock.advance(7.25)
    assert gate.wait_time() == 0.25
    assert gate.admit() is None
    clock.advance(0.25)
    assert gate.wait_time() == 0
    assert gate.admit() is not None


def test_shorter_hint_shortens_nothing(make):
    """The longest pause asked for holds."""
    gate = make()
    early, late = gate.admit(), gate.admit()
    early.throttled(30)
    assert late.throttled(2) == 30
    assert gate.hint == 30


def test_longer_hint_lengthens(make, clock):
    """A later, longer pause holds."""
    gate = make()
    early, late = gate.admit(), gate.admit()
    early.throttled(5)
    clock.advance(4)
    assert late.throttled(20) == 20


def test_pauses_without_hint_double(make, clock):
    """Without a hint: 1, 2, 4 … 30 s for each 429 that no answer broke."""
    gate = make()
    pauses = [close(gate)]
    pauses += [pass_through(gate, clock).throttled(None) for _ in range(7)]
    assert pauses == [1, 2, 4, 8, 16, 30, 30, 30]


@pytest.mark.parametrize(("draw", "pause"), [(0.0, 0.1), (0.5, 0.55), (1.0, 1.0)])
def test_pauses_without_hint_are_jittered_but_never_nothing(make, draw, pause):
    """Drawn evenly, from a tenth of the step to the whole of it."""
    assert close(make(random=lambda: draw)) == pytest.approx(pause)


@pytest.mark.parametrize("hint", [0, -3, math.nan, math.inf, -math.inf])
def test_senseless_hint_is_no_hint(make, hint):
    """A provider that asks for nothing, or for ever, has said nothing."""
    gate = make()
    assert close(gate, hint) == 1
    assert gate.hint is None


def test_burst_of_429s_is_one_step(make, clock):
    """Calls that were under way when the gate closed bring old news."""
    gate = make()
    permits = [gate.admit() for _ in range(50)]
    assert {permit.throttled(None) for permit in permits} == {1}
    assert pass_through(gate, clock).throttled(None) == 2


def test_pass_from_before_a_closing_is_not_current(make, clock):
    """What has waited elsewhere meanwhile must ask again."""
    gate = make()
    early = gate.admit()
    assert early.is_current
    reporter = gate.admit()
    reporter.throttled(5)
    assert not early.is_current
    clock.advance(5)
    assert gate.admit().is_current
    gate.reset()
    assert not early.is_current
    assert gate.admit().is_current


def test_answer_starts_the_steps_again(make, clock):
    """After an answer the next closing is a first one."""
    gate = make()
    close(gate)
    pass_through(gate, clock).throttled(None)
    pass_through(gate, clock).answered()
    gate.reset()
    assert close(gate) == 1


def test_old_429_lengthens_the_pause_and_is_no_step(make, clock):
    """A straggler's hint holds while the gate is closed; a newer, shorter one ends nothing."""
    gate = make()
    straggler, other = gate.admit(), gate.admit()
    close(gate, 1)
    assert straggler.throttled(30) == 30
    assert other.throttled(2) == 30
    assert gate._closings == 1


def test_answer_of_a_call_from_before_opens_nothing(make, clock):
    """An answer to a call that was let in before the 429 says nothing about what came after."""
    gate = make()
    early = [gate.admit() for _ in range(10)]
    close(gate, 3)
    for permit in early:
        permit.answered()
    assert gate.wait_time() == 3
    assert gate.hint == 3
    clock.advance(3)
    assert len(in_flight(gate)) == 1


# What closes it


def test_random_share_of_429s_closes_it_now_and_then_at_most(make, clock):
    """One 429 in five, as dice fall: a caller in trouble waits, the others go on."""
    dice = random.Random(1)
    gate = make()
    closed = 0
    for _ in range(2000):
        permit = pass_through(gate, clock)
        if dice.random() < 0.2:
            closed += permit.throttled(None) > 0
        else:
            permit.answered()
    assert 1 <= closed <= 10


def test_run_of_429s_closes_it_however_common_they_were(make, clock):
    """A provider that refuses everything is left alone after 30 calls, whatever went before."""
    for share, calls in ((0.0, 1), (0.05, 4), (0.2, 6), (0.5, 14), (0.98, 30)):
        gate = make()
        gate._share = share
        refused = [gate.admit().throttled(5) for _ in range(calls)]
        assert refused == [0] * (calls - 1) + [5]


def test_requests_under_way_count_as_accepted(make):
    """Answers take longer than refusals: of a crowd sent at once, the first reports are 429s."""
    gate = make()
    permits = [gate.admit() for _ in range(32)]
    for permit in permits:
        permit.sent()
    assert [permit.throttled(5) for permit in permits[:20]] == [0] * 20
    for permit in permits[20:]:
        permit.answered()
    permits = [gate.admit() for _ in range(32)]
    for permit in permits:
        permit.sent()
    assert [permit.throttled(5) for permit in reversed(permits)].count(0) < 32


def test_run_goes_on_until_an_answer(make, clock):
    """The first call after a pause that meets a 429 closes the gate again, at once."""
    gate = make()
    gate._share = 0.2
    while gate.admit().throttled(None) == 0:
        pass
    for _ in range(3):
        assert pass_through(gate, clock).throttled(None) > 0
    pass_through(gate, clock).answered()
    assert pass_through(gate, clock).throttled(None) == 0


# How it opens


def test_it_reopens_for_one_call_and_twice_as_many_each_second(make, clock):
    """1 at once, 2 in the first second, then 4, 8, 16, 32: by time, whatever was answered."""
    gate = make()
    close(gate)
    clock.advance(1)
    sizes = [len(in_flight(gate))]
    for _ in range(5):
        clock.advance(1)
        sizes.append(len(in_flight(gate)))
    assert sizes == [1, 2, 4, 8, 16, 32]
    clock.advance(1)
    assert None not in [gate.admit() for _ in range(1000)]


def test_answers_open_it_sooner(make, clock):
    """Each makes room for two more: a quick provider need not wait for the seconds."""
    gate = make()
    close(gate)
    clock.advance(1)
    sizes = []
    while not gate._open:
        permits = in_flight(gate)
        sizes.append(len(permits))
        for permit in permits:
            permit.answered()
    assert sizes == [1, 2, 4, 8, 16, 32]


def test_each_waiter_has_a_time_of_its_own(make, clock):
    """Those who wait need not all come at once to find that one may go."""
    gate = make()
    close(gate, 10)
    times = []
    for _ in range(7):
        gate.enlist()
        times.append(gate.recheck_time())
    assert times == pytest.approx([10, 10 + math.log2(3) - 1, 11, *times[3:6], 12])
    assert times == sorted(times)


def test_waiting_crowd_keeps_it_from_opening_wide(make, clock):
    """It is open only when it has room for all who wait."""
    gate = make()
    close(gate)
    waiters = [gate.enlist() for _ in range(500)]
    clock.advance(7)
    assert gate.admit() is not None
    assert not gate._open
    assert not any(waiter.done() for waiter in waiters)
    clock.advance(2)
    assert gate.admit() is not None
    assert gate._open
    assert all(waiter.done() for waiter in waiters)


def test_released_permit_gives_its_place_back(make, clock):
    """A call that was never sent takes no place from the next, once."""
    gate = make()
    close(gate)
    permit = pass_through(gate, clock)
    assert gate.wait_time() > 0
    permit.release()
    permit.release()
    assert gate.wait_time() == 0
    assert len(in_flight(gate)) == 1


def test_lost_permit_holds_up_nobody(make, clock):
    """A call that hangs, or was dropped, does not keep the gate nearly closed."""
    gate = make()
    close(gate)
    pass_through(gate, clock)
    assert 0 < gate.recheck_time() < 1
    clock.advance(1)
    assert gate.admit() is not None


def test_first_report_of_a_permit_counts(make, clock):
    """A permit reports once; what follows is ignored, but told the truth."""
    gate = make()
    permit = gate.admit()
    assert permit.throttled(5) == 5
    clock.advance(1)
    assert permit.throttled(50) == 4
    permit.answered()
    permit.release()
    assert gate.wait_time() == 4


@pytest.mark.parametrize("report", ["answered", "release"])
@pytest.mark.parametrize("reopening", [False, True])
def test_nothing_is_heard_after_the_first_report(make, clock, report, reopening):
    """Neither of an open gate nor of one that reopens."""
    gate = make()
    if reopening:
        close(gate)
        clock.advance(1)
    permit = gate.admit()
    getattr(permit, report)()
    assert permit.throttled(30) == 0
    assert gate.wait_time() == 0


def test_reset_forgets_everything(make, clock):
    """After `reset` it is as new, and nobody waits any more."""
    gate = make()
    close(gate, 40)
    clock.advance(1)
    waiter = gate.enlist()
    gate.reset()
    assert waiter.done()
    assert (gate.wait_time(), gate.hint) == (0, None)
    assert close(gate, 5) == 5
    pass_through(gate, clock).throttled(None)
    clock.advance(gate.wait_time())
    gate.admit()
    gate.reset()
    assert gate.wait_time() == 0
    assert None not in [gate.admit() for _ in range(100)]
    assert close(gate) == 1


def test_answers_from_before_do_not_reopen(make, clock):
    """An answer to a call that was let in before the 429 opens nothing."""
    gate = make()
    early = [gate.admit() for _ in range(10)]
    close(gate)
    clock.advance(1)
    for permit in early:
        permit.answered()
    assert len(in_flight(gate)) == 1


def test_what_another_client_heard_closes_it_too(make, clock):
    """It is news if the pause that is known here is over, and a longer one holds."""
    gate = make()
    permit = gate.admit()
    gate._follow(clock(), 5, None)
    assert (gate.wait_time(), permit.is_current) == (5, False)
    gate._follow(clock(), 30, 90)
    assert (gate.wait_time(), gate.hint) == (30, 90)
    assert gate._closings == 1
    clock.advance(30)
    permit = gate.admit()
    gate._follow(clock(), 2, None)
    assert (gate.wait_time(), permit.is_current) == (2, False)
    assert pass_through(gate, clock).throttled(None) == 4


# What it tells


def test_hint_is_over_with_its_time_or_an_answer(make, clock):
    """What was asked for once is not told for ever."""
    gate = make()
    close(gate, 90)
    clock.advance(60)
    assert gate.hint == 30
    pass_through(gate, clock).answered()
    assert gate.hint is None
    gate.reset()
    close(gate, 5)
    clock.advance(4.5)
    assert gate.hint == 0.5
    clock.advance(0.5)
    assert gate.hint is None


def test_every_lengthening_is_told(make, clock):
    """An event per 429 that closes the gate or keeps it closed longer; no echo."""
    heard = []
    gate = make(listener=heard.append, client="fast", target="t")
    permits = [gate.admit() for _ in range(4)]
    permits[0].throttled(5)
    permits[1].throttled(5)
    permits[2].throttled(90)
    permits[3].throttled(None)
    facts = {"client": "fast", "target": "t", "at": 100.0}
    assert heard == [
        Throttled(seconds=5, hint=5, **facts),
        Throttled(seconds=90, hint=90, **facts),
    ]


def test_nameless_gate_tells_no_name(make):
    """Its events say so."""
    heard = []
    close(make(listener=heard.append), 5)
    assert heard == [Throttled(client="", target=None, at=100.0, seconds=5, hint=5)]


def test_listener_may_use_the_gate(make):
    """No lock is held while a listener runs."""
    seen = []

    def listener(event):
        reader = threading.Thread(target=lambda: seen.append(gate.wait_time()), daemon=True)
        reader.start()
        reader.join(10)

    gate = make(listener=listener)
    close(gate, 5)
    assert seen == [5]


def test_repr_says_how_it_stands(make, clock):
    """A gate can be read in a debugger."""
    gate = make(target="t")
    assert repr(gate) == "<ThrottleGate 't': open>"
    close(gate, 5)
    assert repr(gate) == "<ThrottleGate 't': closed for 5.0 s>"
    pass_through(gate, clock)
    assert repr(gate) == "<ThrottleGate 't': reopening>"


# Waiting


def test_each_free_place_calls_the_longest_waiter(make, clock):
    """While it reopens, a place that comes free calls one waiter, an answer two, oldest first."""
    gate = make()
    close(gate)
    permit = pass_through(gate, clock)
    waiters = [gate.enlist() for _ in range(4)]
    permit.release()
    assert [waiter.done() for waiter in waiters] == [True, False, False, False]
    gate.admit().answered()
    assert [waiter.done() for waiter in waiters] == [True, True, True, False]


def test_called_waiter_that_leaves_permits_its_turn_on(make, clock):
    """A cancelled caller takes nobody's chance away."""
    gate = make()
    close(gate)
    permit = pass_through(gate, clock)
    first, second = gate.enlist(), gate.enlist()
    permit.release()
    gate.leave(first)
    assert second.done()


def test_nobody_waits_for_an_open_gate(make):
    """Where a pass may be had, a waiter is called at once."""
    gate = make()
    assert gate.enlist().done()
    assert gate.recheck_time() == 0


def test_crowd_of_threads_never_exceeds_the_allowance(make, clock):
    """Hundreds of threads at the reopening: one gets a pass."""
    gate = make()
    close(gate)
    clock.advance(1)
    start = threading.Barrier(100)
    permits = []

    def ask():
        start.wait()
        permits.append(gate.admit())

    crew = [threading.Thread(target=ask) for _ in range(100)]
    for thread in crew:
        thread.start()
    for thread in crew:
        thread.join()
    assert sum(permit is not None for permit in permits) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_child_of_a_fork_goes_on(make, clock):
    """Held locks and a waiter stay behind; the pause does not."""
    heard = []
    gate = make(listener=heard.append)
    close(gate)
    clock.advance(gate.wait_time())
    gate.enlist()
    locked, may_go = threading.Event(), threading.Event()

    def hold():
        with gate._lock:
            locked.set()
            may_go.wait()

    threading.Thread(target=hold, daemon=True).start()
    locked.wait()
    child = os.fork()
    if child == 0:
        usable = False
        try:
            waiting, first, second = gate._notifier.waiting, gate.admit(), gate.admit()
            first.answered()
            gate.reset()
            gate.admit().throttled(5)
            told = [event.seconds for event in heard]
            usable = (waiting, second, told) == (0, None, [1, 5])
        finally:
            os._exit(0 if usable else 1)
    may_go.set()
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
