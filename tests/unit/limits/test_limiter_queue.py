"""The queue before a target: first come, first served, and no trace of those who left."""

import gc
import math
import os
import threading
import warnings
import weakref

import pytest

from dspy_resilient.errors import CallRejectedError, LimitExceededError
from dspy_resilient.limits import Limiter
from dspy_resilient.policies import LimitPolicy
from dspy_resilient.testing.clock import Clock


def limiter_for(clock=None, **policy):
    return Limiter(LimitPolicy(**policy), clock=clock or Clock(), client="fast", target="openai/x")


def test_places_are_granted_up_to_the_limit():
    """As many as allowed go at once; the next one waits."""
    limiter = limiter_for(max_concurrent=2)
    slots = [limiter.enter() for _ in range(3)]
    assert [slot.granted for slot in slots] == [True, True, False]
    assert (limiter.in_use, limiter.queued, limiter.limit) == (2, 1, 2)


def test_free_place_goes_to_the_longest_waiting():
    """First in, first out."""
    limiter = limiter_for(max_concurrent=1)
    busy, *waiters = [limiter.enter() for _ in range(4)]
    order = []
    for _ in waiters:
        busy.release()
        (busy,) = (w for w in waiters if w.future.done() and w not in order)
        assert busy.poll()
        order.append(busy)
    assert order == waiters


def test_newcomer_does_not_overtake_a_waiter_who_has_not_woken_yet():
    """A freed place already belongs to the head of the queue, awake or not."""
    limiter = limiter_for(max_concurrent=1)
    busy, waiter = limiter.enter(), limiter.enter()
    busy.release()
    assert not limiter.enter().granted
    assert waiter.poll()


def test_one_place_means_strictly_one_at_a_time():
    """max_concurrent=1 turns the client into a serial one."""
    limiter = limiter_for(max_concurrent=1)
    slots = [limiter.enter() for _ in range(5)]
    for slot in slots:
        assert [s.poll() for s in slots].count(True) == 1
        assert slot.granted
        slot.release()
    assert (limiter.in_use, limiter.queued) == (0, 0)


def test_cancelled_waiter_leaves_no_trace():
    """Who gives up waiting is gone from the queue, and the others keep their order."""
    limiter = limiter_for(max_concurrent=1)
    busy, first, second = (limiter.enter() for _ in range(3))
    first.release()
    assert (limiter.in_use, limiter.queued) == (1, 1)
    busy.release()
    assert second.poll()
    second.release()
    assert (limiter.in_use, limiter.queued) == (0, 0)


def test_many_cancelled_waiters_are_forgotten():
    """Waiters that come and give up while nothing moves are not remembered."""
    limiter = limiter_for(max_concurrent=1)
    limiter.enter()
    gone = []
    for _ in range(100):
        waiter = limiter.enter()
        waiter.release()
        gone.append(weakref.ref(waiter.future))
    del waiter
    gc.collect()
    assert not any(ref() for ref in gone)


def test_place_offered_to_a_cancelled_waiter_goes_to_the_next():
    """A waiter cancelled just as its place came free passes the place on."""
    limiter = limiter_for(max_concurrent=1)
    busy, cancelled, next_one = (limiter.enter() for _ in range(3))
    busy.release()
    assert cancelled.future.done()
    cancelled.release()
    assert next_one.poll()
    assert limiter.in_use == 1


def test_leaving_counts_once():
    """However often a slot is left, one place comes free."""
    limiter = limiter_for(max_concurrent=2)
    slot, other = limiter.enter(), limiter.enter()
    for _ in range(3):
        slot.release()
    assert limiter.in_use == 1
    assert other.granted
    assert not slot.granted


def test_leaving_from_many_threads_counts_once():
    """Racing threads that leave one slot free one place."""
    limiter = limiter_for(max_concurrent=5)
    slots = [limiter.enter() for _ in range(2)]
    start = threading.Barrier(8)

    def release():
        start.wait()
        slots[0].release()

    threads = [threading.Thread(target=release) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert limiter.in_use == 1


def test_block_leaves_its_place_whatever_happens():
    """Return, error, and cancellation all free the place."""
    limiter = limiter_for(max_concurrent=1)
    for failure in (ValueError, KeyboardInterrupt, GeneratorExit):
        with pytest.raises(failure), limiter.enter():
            raise failure
        assert limiter.in_use == 0
    with limiter.enter() as slot:
        assert slot.granted
        assert limiter.in_use == 1
    assert limiter.in_use == 0


def test_waiting_for_a_place_has_no_time():
    """Only a leaver can help: there is nothing to time."""
    limiter = limiter_for(max_concurrent=1)
    busy, first, second = (limiter.enter() for _ in range(3))
    assert (busy.wait_time(), first.wait_time(), second.wait_time()) == (0.0, math.inf, math.inf)
    busy.release()
    assert first.wait_time() == 0.0


def test_full_queue_refuses_at_once():
    """Past max_queue a call is refused, not queued, and takes nothing."""
    limiter = limiter_for(max_concurrent=1, max_queue=1)
    busy, waiter = limiter.enter(), limiter.enter()
    with pytest.raises(LimitExceededError) as caught:
        limiter.enter()
    assert isinstance(caught.value, CallRejectedError)
    assert caught.value.retry_after is None
    assert (limiter.in_use, limiter.queued) == (1, 1)
    waiter.release()
    assert not limiter.enter().granted
    busy.release()


def test_refusal_says_who_refused_and_why():
    """The message names client, target and the option that would help."""
    limiter = limiter_for(max_concurrent=1, max_queue=0)
    limiter.enter()
    with pytest.raises(LimitExceededError, match=r"'fast': openai/x .* 1 .* 0 .*max_queue=0") as e:
        limiter.enter()
    assert e.value.client == "fast"


def test_refusal_by_rate_tells_when_there_is_room():
    """Where the rate alone decides, retry_after is exact."""
    clock = Clock()
    limiter = limiter_for(clock, rpm=60, max_queue=0)
    for _ in range(5):
        limiter.enter()
    with pytest.raises(LimitExceededError) as caught:
        limiter.enter()
    assert caught.value.retry_after == pytest.approx(1.0)
    clock.advance(caught.value.retry_after)
    assert limiter.enter().granted


def test_refusal_behind_a_rate_bound_queue_tells_when_it_moves():
    """With a queue, there is room as soon as its head may go."""
    clock = Clock()
    limiter = limiter_for(clock, tpm=600, max_queue=1)  # 10 a second, 50 at once
    for tokens in (50, 10):
        limiter.enter(tokens)
    clock.advance(0.25)
    with pytest.raises(LimitExceededError) as caught:
        limiter.enter(40)
    assert caught.value.retry_after == pytest.approx(0.75)
    clock.advance(caught.value.retry_after)
    assert not limiter.enter(40).granted


def test_cancelling_the_future_changes_nothing():
    """A task that was waiting may be cancelled without harm to the queue."""
    limiter = limiter_for(max_concurrent=1)
    busy, waiter = limiter.enter(), limiter.enter()
    assert not waiter.future.cancel()
    busy.release()
    assert waiter.future.done()
    assert waiter.poll()


def test_futures_are_resolved_with_no_lock_held():
    """A callback of a waiter may use the limiter from another thread and from its own."""
    limiter = limiter_for(max_concurrent=1)
    busy, waiter = limiter.enter(), limiter.enter()
    seen = []

    def use(_):
        seen.append(limiter.enter())
        other = threading.Thread(target=lambda: seen.append(limiter.enter()))
        other.start()
        other.join(5)
        seen.append(other.is_alive())

    waiter.future.add_done_callback(use)
    busy.release()
    assert seen[-1] is False
    assert limiter.queued == 2


@pytest.mark.parametrize("act", ["enter", "poll", "wait_time", "release"])
def test_finalizer_inside_the_limiter_can_leave(act):
    """An abandoned call collected while its thread is inside the limiter blocks nothing."""
    doomed = []

    def clock():  # is read where the garbage collector may strike: inside, with the lock held
        if doomed:
            doomed.pop().release()
        return 0.0

    limiter = limiter_for(clock, max_concurrent=2)
    other, busy, waiter = (limiter.enter() for _ in range(3))
    doomed.append(busy)
    {"enter": limiter.enter, "release": other.release}.get(act, getattr(waiter, act, None))()
    assert not doomed
    assert waiter.future.done()
    assert waiter.poll()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forked_child_starts_empty_and_unlocked():
    """A child is not stopped by locks and places that only its parent's threads had."""
    inside, finish = threading.Event(), threading.Event()

    def clock():
        if threading.current_thread() is holder:
            inside.set()
            finish.wait(30)
        return 0.0

    limiter = limiter_for(clock, max_concurrent=1)
    holder = threading.Thread(target=limiter.enter)
    mine = limiter.enter()
    holder.start()
    assert inside.wait(30)  # the holder is inside, with the lock
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # 3.12 warns of threads, as it should
        child = os.fork()
        if child == 0:
            mine.release()
            fine = limiter.in_use == 0 and limiter.enter().granted
            os._exit(0 if fine and limiter.in_use == 1 else 1)
    finish.set()
    holder.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    mine.release()
    assert limiter.in_use == 1


def test_fork_handling_keeps_nobody_alive():
    """A limiter that nobody uses any more is freed."""
    limiter = limiter_for(max_concurrent=1)
    gone = weakref.ref(limiter)
    del limiter
    gc.collect()
    assert gone() is None
