"""How long a 429 closes the gate, and how the gate opens again.

Of the changes of one operator, constant or statement in `gate.py`, those that no test notices
change nothing: `__slots__`, first values that the first closing sets anew, numbers of generations
and default leases that are only compared, shortcuts that save a lock or a look (an open gate's in
`admit`, in both reports and in `_wait`), and a sixth doubling, which is above the longest step.
"""

from __future__ import annotations

import math
import os
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
    """Wait out the gate's pause, and return the pass of the first call after it."""
    clock.advance(gate.wait_time())
    return gate.admit()


def in_flight(gate):
    """Take every pass that may be had now."""
    passes = []
    while (ticket := gate.admit()) is not None:
        passes.append(ticket)
        assert len(passes) <= 1000
    return passes


# How long it closes


def test_open_gate_lets_everybody_through(make):
    """Without a 429 there is no gate."""
    gate = make()
    passes = [gate.admit() for _ in range(1000)]
    assert None not in passes
    for ticket in passes:
        ticket.answered()
    assert (gate.wait_time(), gate.hint, gate.unbroken) == (0, None, 0)


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


def test_hint_is_clamped_but_told_whole(make, clock):
    """`max_retry_after` bounds the pause; the caller hears what was asked for."""
    gate = make(max_retry_after=60.0)
    assert close(gate, 3600) == 60
    assert gate.hint == 3600
    clock.advance(50)
    assert (gate.wait_time(), gate.hint) == (10, 3550)


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
    passes = [gate.admit() for _ in range(50)]
    assert {ticket.throttled(None) for ticket in passes} == {1}
    assert pass_through(gate, clock).throttled(None) == 2


def test_answer_starts_the_steps_again(make, clock):
    """After an answer the next 429 is a first one."""
    gate = make()
    close(gate)
    pass_through(gate, clock).throttled(None)
    pass_through(gate, clock).answered()
    assert close(gate) == 1


def test_old_429_closes_an_open_gate(make, clock):
    """News may be old, but while nothing newer is known they count."""
    gate = make()
    straggler = gate.admit()
    close(gate)
    clock.advance(1)
    while not gate._open:
        for ticket in in_flight(gate):
            ticket.answered()
    newer = gate.admit()
    assert straggler.throttled(5) == 5
    assert not newer.is_current


def test_old_429_makes_a_reopening_gate_careful(make, clock):
    """A straggler's hint holds, and the reopening begins with one call again."""
    gate = make()
    straggler = gate.admit()
    close(gate)
    pass_through(gate, clock).answered()
    assert straggler.throttled(5) == 5
    clock.advance(5)
    assert len(in_flight(gate)) == 1


def test_new_429_shortens_no_old_hint(make, clock):
    """Neither a straggler's pause nor a newer, shorter one ends the longest."""
    gate = make()
    straggler = gate.admit()
    close(gate)
    reopening = pass_through(gate, clock)
    straggler.throttled(30)
    assert reopening.throttled(2) == 30


def test_answer_opens_no_closed_gate(make, clock):
    """What was answered before a straggler's 429 calls nobody to a closed gate."""
    gate = make()
    straggler = gate.admit()
    close(gate)
    reopening = pass_through(gate, clock)
    straggler.throttled(30)
    waiter = gate.enlist()
    reopening.answered()
    assert not waiter.done()
    assert gate.wait_time() == 30


def test_answers_open_no_gate_before_its_time(make, clock):
    """However many calls that were let in before a straggler's 429 are answered after it."""
    gate = make()
    straggler = gate.admit()
    close(gate)
    pass_through(gate, clock).answered()
    for _ in range(3):
        gate.admit().answered()
    passes = in_flight(gate)
    assert len(passes) == 16
    straggler.throttled(30)
    for ticket in passes:
        ticket.answered()
    assert gate.wait_time() == 30
    clock.advance(30)
    assert len(in_flight(gate)) == 1


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


def test_zero_max_retry_after_waits_for_no_hint(make):
    """0 is an answer: no pause is waited for, however short."""
    gate = make(max_retry_after=0)
    assert close(gate, 5) == 0
    assert gate.hint == 5
    ticket, waiter = gate.admit(), gate.enlist()
    assert not waiter.done()
    ticket.throttled(5)
    assert waiter.done()  # the place is free again


@pytest.mark.parametrize("value", [-1, math.nan, math.inf])
def test_bad_max_retry_after_is_refused(value):
    """Bad arguments are refused by name."""
    with pytest.raises(ValueError, match=r"^ThrottleGate: max_retry_after must"):
        ThrottleGate(max_retry_after=value)


# How it opens


def test_it_reopens_for_one_call_and_doubles_per_answer(make, clock):
    """1, 2, 4, 8 … calls at a time: no stampede into the next 429."""
    gate = make()
    close(gate)
    clock.advance(1)
    sizes = []
    for _ in range(6):
        passes = in_flight(gate)
        sizes.append(len(passes))
        passes[0].answered()
        for ticket in passes[1:]:
            ticket.release()
    assert sizes == [1, 2, 4, 8, 16, 32]
    assert gate._open


def test_waiting_crowd_keeps_it_from_opening_wide(make, clock):
    """It is open only when it has room for everybody who waits."""
    gate = make()
    close(gate)
    waiters = [gate.enlist() for _ in range(500)]
    clock.advance(1)
    called = []
    for _ in range(9):
        gate.admit().answered()
        called.append(sum(waiter.done() for waiter in waiters))
    assert called[:6] == [2, 6, 14, 30, 62, 126]
    assert called[-1] == 500


def test_released_pass_gives_its_place_back(make, clock):
    """A call that was never sent teaches nothing and blocks nobody."""
    gate = make()
    close(gate)
    ticket = pass_through(gate, clock)
    assert gate.wait_time() == math.inf
    ticket.release()
    assert gate.wait_time() == 0
    assert len(in_flight(gate)) == 1


def test_lost_pass_loses_its_place(make, clock):
    """A call that hangs, or was dropped, does not keep the gate nearly closed for ever."""
    gate = make()
    close(gate)
    pass_through(gate, clock)
    assert gate.recheck_time() == 60
    clock.advance(60)
    assert gate.admit() is not None


def test_lease_grows_with_the_clients_timeout(make, clock):
    """A call may take as long as its client allows."""
    gate = make()
    close(gate)
    clock.advance(1)
    gate.admit(lease=300)
    clock.advance(299)
    assert gate.admit() is None
    clock.advance(1)
    assert gate.admit() is not None


def test_first_report_of_a_pass_counts(make, clock):
    """A pass reports once; what follows is ignored, but told the truth."""
    gate = make()
    ticket = gate.admit()
    assert ticket.throttled(5) == 5
    clock.advance(1)
    assert ticket.throttled(50) == 4
    ticket.answered()
    ticket.release()
    assert gate.unbroken == 1
    assert gate.wait_time() == 4


@pytest.mark.parametrize("report", ["answered", "release"])
@pytest.mark.parametrize("reopening", [False, True])
def test_nothing_is_heard_after_the_first_report(make, clock, report, reopening):
    """Neither of an open gate nor of one that reopens."""
    gate = make()
    if reopening:
        close(gate)
        clock.advance(1)
    ticket = gate.admit()
    getattr(ticket, report)()
    assert ticket.throttled(30) == 0
    assert gate.wait_time() == 0


def test_reset_forgets_everything(make, clock):
    """After `reset` it is as new, and nobody waits any more."""
    gate = make()
    close(gate, 40)
    clock.advance(1)
    waiter = gate.enlist()
    gate.reset()
    assert waiter.done()
    assert (gate.wait_time(), gate.hint, gate.unbroken) == (0, None, 0)
    assert close(gate, 5) == 5
    pass_through(gate, clock).throttled(None)
    clock.advance(gate.wait_time())
    gate.admit()
    gate.reset()
    assert gate.wait_time() == 0
    assert None not in [gate.admit() for _ in range(100)]
    assert close(gate) == 1


def test_gate_that_opens_keeps_nobodys_place(make, clock):
    """Those still under way report to an open gate, which asks for no place back."""
    by_hand, by_answers = make(), make()
    for gate in (by_hand, by_answers):
        close(gate)
        clock.advance(gate.wait_time())
    late = [by_hand.admit()]
    by_hand.reset()
    while by_answers.wait_time() == 0 and not by_answers._open:
        ticket, *others = in_flight(by_answers)
        late += others
        ticket.answered()
    for ticket in late:
        ticket.answered()
    assert by_hand._leases.taken(-math.inf) == by_answers._leases.taken(-math.inf) == 0


def test_what_another_client_heard_closes_it_too(make, clock):
    """It is news if the pause that is known here is over, and a longer one holds."""
    gate = make(max_retry_after=60.0)
    ticket = gate.admit()
    gate._follow(clock(), 5, None)
    assert (gate.wait_time(), ticket.is_current) == (5, False)
    gate._follow(clock(), 30, 90)
    assert (gate.wait_time(), gate.hint) == (30, 90)
    gate._follow(clock(), 300, 300)
    assert gate.wait_time() == 60
    assert gate._closings == 1
    clock.advance(60)
    ticket = gate.admit()
    gate._follow(clock(), 2, None)
    assert (gate.wait_time(), ticket.is_current) == (2, False)
    assert pass_through(gate, clock).throttled(None) == 4


def test_answers_from_before_do_not_reopen(make, clock):
    """An answer to a call that was let in before the 429 opens nothing."""
    gate = make()
    early = [gate.admit() for _ in range(10)]
    close(gate)
    clock.advance(1)
    for ticket in early:
        ticket.answered()
    assert len(in_flight(gate)) == 1


# What it tells


def test_unbroken_is_the_time_since_the_first_429(make, clock):
    """It runs until an answer, not from 429 to 429."""
    gate = make()
    close(gate, 3)
    pass_through(gate, clock).throttled(3)
    clock.advance(1)
    assert gate.unbroken == 4
    pass_through(gate, clock).answered()
    assert gate.unbroken == 0


def test_hint_is_over_with_its_time_or_an_answer(make, clock):
    """What was asked for once is not told for ever."""
    gate = make()
    close(gate, 90)
    clock.advance(60)
    assert gate.hint == 30
    gate.admit().answered()
    assert gate.hint is None
    close(gate, 5)
    clock.advance(4.5)
    assert gate.hint == 0.5
    clock.advance(0.5)
    assert gate.hint is None


def test_every_lengthening_is_told(make, clock):
    """An event per 429 that closes the gate or keeps it closed longer; no echo."""
    heard = []
    gate = make(listener=heard.append, client="fast", target="t")
    passes = [gate.admit() for _ in range(4)]
    passes[0].throttled(5)
    passes[1].throttled(5)
    passes[2].throttled(90)
    passes[3].throttled(None)
    facts = {"client": "fast", "target": "t", "at": 100.0}
    assert heard == [
        Throttled(seconds=5, hint=5, **facts),
        Throttled(seconds=60, hint=90, **facts),
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
    """While it reopens, waiters are called one per place, oldest first."""
    gate = make()
    close(gate)
    ticket = pass_through(gate, clock)
    waiters = [gate.enlist() for _ in range(4)]
    ticket.release()
    assert [waiter.done() for waiter in waiters] == [True, False, False, False]
    gate.admit().answered()
    assert [waiter.done() for waiter in waiters] == [True, True, True, False]


def test_no_more_are_called_than_there_is_room_for(make, clock):
    """Those who are under way keep their places."""
    gate = make()
    close(gate)
    pass_through(gate, clock).answered()
    first, second = in_flight(gate)
    waiters = [gate.enlist() for _ in range(10)]
    first.answered()
    assert [waiter.done() for waiter in waiters] == [True] * 3 + [False] * 7
    second.release()
    assert [waiter.done() for waiter in waiters] == [True] * 4 + [False] * 6


def test_next_429_calls_all(make, clock):
    """Whoever waits must hear that the wait is longer: it may not fit any more."""
    gate = make()
    close(gate)
    ticket = pass_through(gate, clock)
    waiters = [gate.enlist() for _ in range(3)]
    ticket.throttled(20)
    assert all(waiter.done() for waiter in waiters)
    assert gate.wait_time() == 20


def test_called_waiter_that_leaves_passes_its_turn_on(make, clock):
    """A cancelled caller takes nobody's chance away."""
    gate = make()
    close(gate)
    ticket = pass_through(gate, clock)
    first, second = gate.enlist(), gate.enlist()
    ticket.release()
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
    passes = []

    def ask():
        start.wait()
        passes.append(gate.admit())

    crew = [threading.Thread(target=ask) for _ in range(100)]
    for thread in crew:
        thread.start()
    for thread in crew:
        thread.join()
    assert sum(ticket is not None for ticket in passes) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_child_of_a_fork_goes_on(make, clock):
    """Held locks, a pass and a waiter stay behind; the pause does not."""
    heard = []
    gate = make(listener=heard.append)
    close(gate)
    pass_through(gate, clock)
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
            gate.admit().throttled(5)
            told = [event.seconds for event in heard]
            usable = (waiting, second, told) == (0, None, [1, 5])
        finally:
            os._exit(0 if usable else 1)
    may_go.set()
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
