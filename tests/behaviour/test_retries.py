"""How patiently a failed attempt is repeated, in virtual time."""

from __future__ import annotations

import math

import dspy
import pytest
from virtual_time import Drill, down, server_error

from dspy_resilient import RetryPolicy
from dspy_resilient.events import RetryScheduled

ALWAYS = (0.0, math.inf)
NO_CIRCUIT = {"circuit": False, "max_wait": 0, "latency": (0.1, 0.1)}


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
        (RetryPolicy(), [1, 2, 4]),
        (RetryPolicy(base=2.0, max_attempts=7), [2, 4, 8, 16, 30, 30]),
        (RetryPolicy(base=0.0, max_attempts=3), [0, 0]),
        (RetryPolicy(cap=1.5), [1, 1.5, 1.5]),
        (RetryPolicy(max_attempts=1), []),
    ],
)
def test_the_waits_double_up_to_the_cap(policy, longest):
    """The n-th wait is min(cap, base * 2**n)."""

    def drill(note):
        made = Drill(down(server_error, ALWAYS), retry=policy, on_event=note, **NO_CIRCUIT)
        made._lm._runtime.random = lambda: 0.5
        return made.run(callers=1, calls=1)

    done, waits = retries_of(drill)
    assert waits == longest
    assert done.sent == policy.max_attempts
    assert done.errors == {"LMServerError": 1}


def test_waits_vary_by_a_quarter():
    """No two callers go in step for long."""
    retry = RetryPolicy(base=4.0, max_attempts=2)

    def drill(note):
        made = Drill(down(server_error, ALWAYS), retry=retry, on_event=note, **NO_CIRCUIT)
        return made.run(callers=1000, calls=1)

    _, waits = retries_of(drill)
    assert len(waits) == 1000
    for tenth in range(10):
        assert 60 < sum(3 + tenth * 0.2 <= wait < 3.2 + tenth * 0.2 for wait in waits) < 140


@pytest.mark.parametrize(("deadline", "attempts"), [(0.5, 1), (1.5, 2), (3.8, 3), (100.0, 4)])
def test_a_retry_that_the_deadline_would_cut_short_is_not_waited_for(deadline, attempts):
    """The provider's error is raised while there is still time to do something else."""
    drill = Drill(down(server_error, ALWAYS), deadline=deadline, **NO_CIRCUIT)
    drill._lm._runtime.random = lambda: 0.5  # waits of 1, 2 and 4 s
    drill.run(callers=1, calls=1)
    assert drill.sent == attempts
    assert drill.errors == {"LMServerError": 1}
    assert drill.seconds < deadline


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
    drill = Drill(down(server_error, ALWAYS), deadline=1.5, **NO_CIRCUIT)
    drill._lm._runtime.random = lambda: 0.5  # a wait of 1 s
    drill.time.after(0.5, lambda: drill.time.clock.advance(5.0))
    drill.run(callers=1, calls=1)
    assert drill.sent == 1
    assert drill.errors == {"DeadlineExceededError": 1}
