"""The concurrency limit, and how an adaptive one learns."""

from contextlib import suppress

import pytest

from dspy_resilient.limits import Limiter
from dspy_resilient.policies import LimitPolicy


def adaptive(max_concurrent=None):
    return Limiter(LimitPolicy(max_concurrent=max_concurrent, adaptive=True))


def succeed(limiter, times):
    for _ in range(times):
        limiter.enter().release()


def test_without_limit_everybody_goes():
    """No number means no limit on how many are under way."""
    limiter = Limiter(LimitPolicy())
    assert all(limiter.enter().granted for _ in range(1000))
    assert limiter.limit is None


def test_adaptive_limit_starts_at_16():
    """Without a number an adaptive limit starts at 16."""
    limiter = adaptive()
    assert [limiter.enter().granted for _ in range(17)] == [True] * 16 + [False]
    assert limiter.limit == 16


def test_adaptive_limit_starts_at_the_given_number():
    """max_concurrent is where an adaptive limit starts, and its ceiling."""
    limiter = adaptive(max_concurrent=3)
    assert limiter.limit == 3
    succeed(limiter, 100)
    assert limiter.limit == 3


def test_429_halves_the_limit():
    """A throttled attempt halves the limit."""
    limiter = adaptive()
    limiter.enter().release(throttled=True, ok=False)
    assert limiter.limit == 8


def test_simultaneous_429s_halve_the_limit_once():
    """Sixteen attempts refused together are one sign, not sixteen."""
    limiter = adaptive()
    for slot in [limiter.enter() for _ in range(16)]:
        slot.release(throttled=True, ok=False)
    assert limiter.limit == 8


def test_429_of_the_next_round_halves_again():
    """An attempt begun under the new limit speaks about the new limit."""
    limiter = adaptive()
    for expected in (8, 4, 2, 1, 1):
        limiter.enter().release(throttled=True, ok=False)
        assert limiter.limit == expected


def test_slow_answers_lower_the_limit_by_a_fifth_once_a_round():
    """A slow answer costs a fifth of the limit; those begun before the cut count no more."""
    limiter = adaptive(max_concurrent=10)
    for slot in [limiter.enter() for _ in range(10)]:
        slot.release(slow=True)
    assert limiter.limit == 8
    limiter.enter().release(slow=True)
    assert limiter.limit == 6


@pytest.mark.parametrize("signal", [{"slow": True}, {"throttled": True, "ok": False}])
def test_limit_never_falls_below_one(signal):
    """However bad it gets, one attempt at a time remains possible."""
    limiter = adaptive(max_concurrent=4)
    for _ in range(20):
        limiter.enter().release(**signal)
    assert limiter.limit == 1
    assert limiter.enter().granted


def test_limit_full_of_successes_raises_the_limit_by_one():
    """Each limit-full of clean successes adds one place."""
    limiter = adaptive()
    succeed(limiter, 15)
    assert limiter.limit == 16
    succeed(limiter, 1)
    assert limiter.limit == 17
    succeed(limiter, 17)
    assert limiter.limit == 18


def test_cut_starts_the_count_of_successes_again():
    """After a cut it takes a whole limit-full of successes to gain a place."""
    limiter = adaptive()
    succeed(limiter, 15)
    limiter.enter().release(throttled=True, ok=False)
    succeed(limiter, 7)
    assert limiter.limit == 8
    succeed(limiter, 1)
    assert limiter.limit == 9


def test_limit_never_exceeds_256():
    """Without a number the ceiling is 256."""
    limiter = adaptive()
    succeed(limiter, 40_000)
    assert limiter.limit == 256


def test_success_begun_before_the_cut_does_not_raise_the_limit():
    """What began under the old limit says nothing about the new one."""
    limiter = adaptive(max_concurrent=8)
    old = [limiter.enter() for _ in range(8)]
    old[0].release(throttled=True, ok=False)
    for slot in old[1:]:
        slot.release()
    assert limiter.limit == 4
    succeed(limiter, 4)
    assert limiter.limit == 5


@pytest.mark.parametrize("ending", [{"ok": False}, {"sent": False}, {"sent": False, "ok": False}])
def test_failures_and_unsent_attempts_teach_nothing(ending):
    """Failures belong to the circuit, and what was not sent shows nothing."""
    limiter = adaptive()
    for _ in range(100):
        limiter.enter().release(**ending)
    assert limiter.limit == 16


def test_block_that_raises_teaches_nothing():
    """Only a block that ends well counts as a clean success."""
    limiter = adaptive(max_concurrent=2)
    limiter.enter().release(throttled=True, ok=False)
    for _ in range(10):
        with suppress(ValueError), limiter.enter():
            raise ValueError
    assert limiter.limit == 1
    with limiter.enter():
        pass
    assert limiter.limit == 2


def test_fixed_limit_does_not_learn():
    """Without adaptive=True the limit is what was written."""
    limiter = Limiter(LimitPolicy(max_concurrent=4))
    limiter.enter().release(throttled=True, ok=False)
    limiter.enter().release(slow=True)
    succeed(limiter, 10)
    assert limiter.limit == 4


def test_cut_limit_holds_the_queue_until_enough_have_left():
    """After a cut nobody is let in until fewer than the new limit are under way."""
    limiter = adaptive(max_concurrent=4)
    busy = [limiter.enter() for _ in range(4)]
    waiter = limiter.enter()
    busy[0].release(throttled=True, ok=False)
    busy[1].release(ok=False)
    assert not waiter.future.done()
    busy[2].release(ok=False)
    assert waiter.poll()


def test_raised_limit_lets_waiters_in():
    """A place gained by success goes to the head of the queue at once."""
    limiter = adaptive(max_concurrent=4)
    limiter.enter().release(throttled=True, ok=False)
    first, second = limiter.enter(), limiter.enter()
    waiters = [limiter.enter() for _ in range(3)]
    first.release()
    assert [w.future.done() for w in waiters] == [True, False, False]
    second.release()
    assert limiter.limit == 3
    assert [w.poll() for w in waiters] == [True, True, True]
