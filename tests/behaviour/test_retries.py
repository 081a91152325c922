"""How patiently a failed attempt is repeated, in virtual time."""

from __future__ import annotations

import math

import dspy
import pytest
from virtual_time import Drill, down, server_error

from dspy_resilient import RetryPolicy
from dspy_resilient.events import RetryScheduled

ALWAYS = (0.0, math.inf)
NO_CIRCUIT = {"circuit": False, "latency": (0.1, 0.1)}


def retries_of(drill_with):
    """Return the waits of the retries in a drill built with an `on_event`."""
    waits = []

    def note(event):
        if isinstance(event, RetryScheduled):
            waits.append(event.seconds)

    return drill_with(note), waits


@pytest.mark.parametrize(
    ("policy", "longest"),
    [
        (RetryPolicy(), [2, 4, 8]),
        (RetryPolicy(base=1.0, max_attempts=8), [1, 2, 4, 8, 16, 30, 30]),
        (RetryPolicy(base=0.0, max_attempts=3), [0, 0]),
        (RetryPolicy(cap=3.0), [2, 3, 3]),
        (RetryPolicy(max_attempts=1), []),
    ],
)
def test_the_longest_waits_double_up_to_the_cap(policy, longest):
    """The n-th wait is drawn from 0 to min(cap, base * 2**n)."""

    def drill(note):
        made = Drill(down(server_error, ALWAYS), retry=policy, on_event=note, **NO_CIRCUIT)
        made._lm._runtime.random = lambda: 1.0
        return made.run(callers=1, calls=1)

    done, waits = retries_of(drill)
    assert waits == longest
    assert done.sent == policy.max_attempts
    assert done.errors == {"LMServerError": 1}


def test_waits_are_drawn_evenly_from_nothing_to_the_longest():
    """Full jitter: no two callers in step, and half the longest on average."""
    retry = RetryPolicy(base=4.0, max_attempts=2, budget=100_000)

    def drill(note):
        made = Drill(down(server_error, ALWAYS), retry=retry, on_event=note, **NO_CIRCUIT)
        return made.run(callers=1000, calls=1)

    _, waits = retries_of(drill)
    assert len(waits) == 1000
    for tenth in range(10):
        assert 60 < sum(tenth * 0.4 <= wait < (tenth + 1) * 0.4 for wait in waits) < 140


def test_the_budget_ends_retries_and_answers_pay_for_new_ones():
    """500 tokens, 14 for a retry, 1 for an answer that needed none."""
    drill = Drill(down(server_error, (0.0, 1000.0)), max_wait=0, **NO_CIRCUIT)
    drill.run(callers=1, calls=100)
    assert drill.sent == 100 + 500 // 14
    level = drill._lm._runtime.routes.find(drill._lm, {}).budget.level
    assert level == 500 % 14
    drill.time.clock.advance(1000)
    drill.run(callers=1, calls=20)
    assert drill._lm._runtime.routes.find(drill._lm, {}).budget.level == level + 20


@pytest.mark.parametrize(("deadline", "attempts"), [(0.5, 1), (2.5, 2), (6.5, 3), (100.0, 4)])
def test_a_retry_that_the_deadline_would_cut_short_is_not_waited_for(deadline, attempts):
    """The provider's error is raised while there is still time to do something else."""
    drill = Drill(down(server_error, ALWAYS), deadline=deadline, **NO_CIRCUIT)
    drill._lm._runtime.random = lambda: 1.0  # waits of 2, 4 and 8 s
    drill.run(callers=1, calls=1)
    assert drill.sent == attempts
    assert drill.errors == {"LMServerError": 1}
    assert drill.seconds < deadline


@pytest.mark.parametrize(("hint", "attempts"), [(59.0, 2), (61.0, 1)])
def test_what_a_provider_asks_for_is_waited_for_up_to_the_cap(hint, attempts):
    """A 503 with Retry-After is left alone for so long, or not asked again by this call."""

    def busy():
        error = server_error()
        error.retry_after = hint
        return error

    drill = Drill(down(busy, (0.0, 50.0)), **NO_CIRCUIT).run(callers=1, calls=1)
    assert drill.sent == attempts
    assert (drill.answered == 1) == (attempts == 2)
    if attempts == 2:
        assert drill.seconds >= hint


def test_a_success_after_retries_is_a_success():
    """Nobody hears of what went wrong on the way, but history and events."""
    drill = Drill(down(server_error, (0.0, 0.05)), **NO_CIRCUIT).run(callers=10, calls=1)
    assert (drill.answered, drill.failed, drill.sent) == (10, 0, 20)


def test_what_cannot_help_is_not_repeated():
    """A request at fault stays at fault (section 5)."""

    def refused():
        return dspy.LMInvalidRequestError("no", model="openai/test", status=400)

    drill = Drill(down(refused, ALWAYS), **NO_CIRCUIT).run(callers=1, calls=1)
    assert drill.sent == 1


def test_who_is_woken_too_late_sends_nothing():
    """A busy machine may oversleep a wait that fitted; the deadline holds all the same."""
    drill = Drill(down(server_error, ALWAYS), deadline=2.5, **NO_CIRCUIT)
    drill._lm._runtime.random = lambda: 1.0  # a wait of 2 s
    drill.time.after(1.0, lambda: drill.time.clock.advance(5.0))
    drill.run(callers=1, calls=1)
    assert drill.sent == 1
    assert drill.errors == {"DeadlineExceededError": 1}
